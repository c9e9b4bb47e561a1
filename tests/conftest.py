"""Shared fixtures, and which tests run: of the slow ones all with --slow, else a twelfth that rotates by day;
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
        every = 1 if all_slow else days_between(item, config.getoption("--fast"))
        ours = (turn - day) % share == 0
        # Rounds of `share` days, so that every pair of turns comes.
        if not (ours and every and (turn // share - day // share) % every == 0):
            item.add_marker(pytest.mark.skip(reason="another day's turn; --slow, no --share: all"))


def days_between(item, fast):
    """In how many days a test runs once; 0: not at all."""
    if "slow" in item.keywords:
        return 0 if fast else 12
    mark = item.get_closest_marker("rotates")
    return mark.args[0] if mark else 1


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
