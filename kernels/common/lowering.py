"""Compiling kernels for accelerators that are not at hand: what `explain` and the tests rely on.

GPU: the kernel's IR is built for an abstract device (register and shared-memory limits show only on the
GPU). TPU: with the libtpu wheel Mosaic really compiles, so what does not fit or is not supported fails;
without it the IR is built, which misses code-generation errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

GPU_CALLS = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")
TOPOLOGIES = {
    "TPU v4": "v4:2x2x1",
    "TPU v5 lite": "v5e:2x2",
    "TPU v5": "v5p:2x2x1",
    "TPU v6 lite": "v6e:2x2",
    "TPU7x": "tpu7x:2x2x1",
}


def _as_if_on(kind: str, cores: int, platform: str):
    """What kernels ask for the device they are built for."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lower_gpu(f: Callable[..., Any], *args: Any, device: str = "NVIDIA H200", cores: int = 132):
    """Builds f for a GPU that need not be there.

    Args:
      args: arrays or ShapeDtypeStructs.
    """
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in GPU_CALLS]
    with _as_if_on(device, cores, "gpu"):
        return export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)(*args)


def lower_tpu(f: Callable[..., Any], *args: Any, device: str = "TPU v5 lite"):
    """Builds f's IR for a TPU; needs no libtpu and misses code-generation errors."""
    with _as_if_on(device, 1, "tpu"):
        return export.export(jax.jit(f), platforms=["tpu"])(*args)


def compile_tpu(f: Callable[..., Any], args: Sequence[Any], device: str = "TPU v5 lite"):
    """Compiles f for a TPU that need not be there; needs the libtpu wheel (`pip install 'jax[tpu]'`).

    Raises:
      whatever the compiler throws, for example when a block does not fit into VMEM.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    if jax.default_backend() == "cpu":  # no chip to guard: tests compile in several processes
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    where = SingleDeviceSharding(topology.devices[0])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in args]
    with _as_if_on(topology.devices[0].device_kind, 1, "tpu"):
        return jax.jit(f).lower(*shapes).compile()
