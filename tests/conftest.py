"""Shared fixtures, and which tests run: of the slow ones all with --slow, else a sixth that rotates by day;
of all a rotating Nth with --share N."""

import datetime
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

TOYS = Path(__file__).parent / "toys"

# Pallas's GPU interpreter runs each thread of a kernel as a computation that may block in a callback. With
# as few threads as a small machine has cores, all of them end up waiting for one that cannot start.
os.environ.setdefault("PJRT_NPROC", "8")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run all slow tests")
    parser.addoption("--fast", action="store_true", help="run no slow tests")
    parser.addoption("--share", type=int, default=1, help="run a rotating Nth of all tests")


def pytest_collection_modifyitems(config, items):
    all_slow = config.getoption("--slow") or "slow" in (config.option.markexpr or "")
    day = int(os.environ.get("QLAB_TEST_DAY", datetime.date.today().toordinal()))
    share = config.getoption("--share")
    for item in items:
        turn = zlib.crc32(item.nodeid.encode())
        if turn % share != day % share:
            item.add_marker(pytest.mark.skip(reason="another day's turn"))
        elif all_slow or "slow" not in item.keywords:
            continue
        elif config.getoption("--fast") or turn // share % 6 != day % 6:
            item.add_marker(pytest.mark.skip(reason="slow: another day's turn, or --slow"))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A session compiles thousands of small programs; kept all, they take gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the toy study's two files, made the current one; gives the config's path."""
    for file in TOYS.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.py"
