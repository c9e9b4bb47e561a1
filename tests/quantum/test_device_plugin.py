"""qlab.ptm as PennyLane finds it, and PennyLane's own tests of devices."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pennylane as qml
import pytest

from qlab.quantum.device import PTMDevice

ROOT = Path(__file__).parents[2]
MIXED = """from qlab.quantum.device import PTMDevice
class Mixed(PTMDevice):
    name = "qlab.ptm (mixed)"
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A folder that announces pyproject.toml's entry points, as an installation of this checkout does.

    Beside it the same device under a name by which PennyLane's tests recognise a density-matrix simulator.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = {**project["entry-points"]["pennylane.plugins"], "qlab.ptm.mixed": "mixed_ptm:Mixed"}
    folder = tmp_path_factory.mktemp("site")
    info = folder / "qlab_checkout-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qlab-checkout\nVersion: 0.1\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pennylane.plugins]", *lines, ""]))
    (folder / "mixed_ptm.py").write_text(MIXED)
    return folder


def test_entry_point(plugin, monkeypatch):
    with monkeypatch.context() as m:
        m.syspath_prepend(plugin)
        assert "qlab.ptm" in {p.name for p in metadata.entry_points(group="pennylane.plugins")}
        qml.refresh_devices()
        dev = qml.device("qlab.ptm", wires=4, noise="ibm_like")
    qml.refresh_devices()
    assert isinstance(dev, PTMDevice)
    assert dev.name == "qlab.ptm"
    assert dev.noise.default[1]


def device_tests(plugin, device, *args) -> dict[str, int]:
    """How many of PennyLane's device tests passed, failed, were skipped ..."""
    pytest.importorskip("flaky")
    pytest.importorskip("pytest_mock")
    from pennylane.devices.tests import get_device_tests

    paths = [str(ROOT), str(plugin), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", get_device_tests(), f"--device={device}", *args]
    command += ["--no-flaky-report", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    done = subprocess.run(command, env=env, cwd=plugin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    return {word: int(num) for num, word in re.findall(r"(\d+) (\w+)", last)}


AUTOGRAD = (
    "(test_gradients_autograd and backprop) or (test_gradients_torch and backprop)"  # refused
)
STATE_VECTOR = "(test_backprop_state and backprop) or " + " or ".join(
    ("test_BasisRotation", "test_FlipSign", "test_MottonenStatePreparation_state")
)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [None, 200_000])
def test_pennylanes_device_tests(plugin, shots):
    """Nothing fails, and most of it runs; which tests are not asked, and why: qlab.quantum.device."""
    options = [] if shots is None else [f"--shots={shots}"]
    found = device_tests(
        plugin, "qlab.ptm", "-k", f"not ({AUTOGRAD}) and not ({STATE_VECTOR})", *options
    )
    assert not {"failed", "error", "errors"} & set(found)
    assert found["passed"] > 5 * found["skipped"], found


@pytest.mark.slow
def test_pennylanes_state_tests(plugin):
    """Those that take state() for a state vector unless the name says mixed: two of the three templates have a form for us."""
    found = device_tests(plugin, "qlab.ptm.mixed", "-k", f"not ({AUTOGRAD}) and ({STATE_VECTOR})")
    assert not {"failed", "error", "errors"} & set(found)
    assert found["passed"] == 4, found  # with and without PennyLane's decomposition graph
