"""Pieces of Mosaic GPU kernels that several operations share."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import layout

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # parts of the device kinds with sm_90
SHARED = 227 << 10  # bytes of shared memory a block may use on sm_90


def interpreter():
    """What `plgpu.kernel(interpret=...)` takes to run on a CPU; has no public name yet."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def load(ref, index, how, interpret: bool) -> jax.Array:
    """ref[index] with the layout `how`; the interpreter has no layouts."""
    if interpret:
        return ref[index]
    return plgpu.load(ref, index, layout=how, optimized=False)


def iota(shape, axis: int, how, interpret: bool) -> jax.Array:
    """i32 of `shape` counting along `axis`."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=how)


def merge(chunks: list[jax.Array], bits: int) -> list[list[jax.Array]]:
    """Bytes of a group of the packed layout from its codes, element by element, for each part in turn.

    Args:
      chunks: 8 / p arrays of unsigned codes i32, p the narrowest part: the group cut into as many
        stretches as the narrowest part has planes.
    Returns:
      For each part of p' bits its bytes u8 as p' / p such stretches.
    """
    parts = layout.parts(bits)
    least = min(p for p, _ in parts)
    out = []
    for p, first in parts:
        ratio = p // least
        part = [lax.shift_right_logical(c, jnp.full_like(c, first)) & (2**p - 1) for c in chunks]
        planes = [[part[j * ratio + c] << (p * j) for j in range(8 // p)] for c in range(ratio)]
        out.append([functools.reduce(operator.or_, p).astype(jnp.uint8) for p in planes])
    return out
