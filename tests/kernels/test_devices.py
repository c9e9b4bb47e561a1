"""Every operation's kernels, built on a machine without the device: lowered for H100 and H200, compiled ahead
of time for TPU v5e, v6e and v5p (with libtpu; without it, their IR is built)."""

import importlib.util
import os

import device_cases
import pytest

from qlab.kernels.common import lowering

GPUS = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
TPUS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5"}
CALLS = {"group_sparse_matmul": "__gpu$xla.gpu.triton"}  # Mosaic GPU has no gather
LIBTPU = importlib.util.find_spec("libtpu") is not None


def listed(platform, devices, slow=lambda device, i: False):
    for op, cases in device_cases.CASES.items():
        for short, device in devices.items():
            for i, (name, *_) in enumerate(cases(platform=platform, device=device)):
                marks = pytest.mark.slow if slow(short, i) else ()
                yield pytest.param(op, device, i, id=f"{op}-{name}-{short}", marks=marks)


def built(op, platform, device, i):
    _, *case = list(device_cases.CASES[op](platform=platform, device=device))[i]
    return device_cases.closed(*case, impl=f"pallas_{platform}")


# The two GPUs differ in one number: the cases take turns, so that each is seen on one of them without --slow.
GPU = list(listed("gpu", GPUS, lambda device, i: (device == "H200") == i % 2))
TPU = list(listed("tpu", TPUS))


@pytest.mark.parametrize(("op", "device", "i"), GPU)
def test_lowers_for_a_gpu(op, device, i):
    f, args = built(op, "gpu", device, i)
    text = lowering.lower_gpu(f, *args, device=device).mlir_module()
    assert CALLS.get(op, "mosaic_gpu") in text


@pytest.mark.parametrize(("op", "device", "i"), [p for p in TPU if p.id.endswith("v5e")])
def test_lowers_for_a_tpu(op, device, i):
    f, args = built(op, "tpu", device, i)
    assert "tpu_custom_call" in lowering.lower_tpu(f, *args, device=device).mlir_module()


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cpu", reason="set JAX_PLATFORMS=cpu")
@pytest.mark.parametrize(("op", "device", "i"), TPU)
@pytest.mark.aot
def test_compiles_for_a_tpu(op, device, i):
    text = lowering.compile_tpu(*built(op, "tpu", device, i), device).as_text()
    assert "tpu_custom_call" in text
    if op == "group_sparse_matmul":  # the codes are transposed by reading them so, not by a copy
        assert not [line for line in text.splitlines() if " copy(" in line and "u8[" in line]
