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


def lower_gpu(f: Callable[..., Any], *args: Any, device: str = "NVIDIA H200", cores: int = 132):
    """Builds f for a GPU that need not be there.

    Args:
      args: arrays or ShapeDtypeStructs.
    """
    mesh = AbstractMesh(
        (),
        (),
        abstract_device=AbstractDevice(device_kind=device, num_cores=cores, platform="gpu"),
    )
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in GPU_CALLS]
    with use_abstract_mesh(mesh):
        return export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)(*args)


def lower_tpu(f: Callable[..., Any], *args: Any):
    """Builds f's IR for a TPU; needs no libtpu and misses code-generation errors."""
    return export.export(jax.jit(f), platforms=["tpu"])(*args)


def compile_tpu(f: Callable[..., Any], args: Sequence[Any], device: str = "TPU v5 lite"):
    """Compiles f for a TPU that need not be there; needs the libtpu wheel (`pip install 'jax[tpu]'`).

    Raises:
      whatever the compiler throws, for example when a block does not fit into VMEM.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    where = SingleDeviceSharding(topology.devices[0])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in args]
    return jax.jit(f).lower(*shapes).compile()
