"""The transform as one dense matrix in float32, then a scale and codes for each token. Obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import grid, layout
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.hadamard_quantize import matrices

GRID = {"rounding": "half_even", "levels": "full"}


def quantized(y: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """(codes, scale f32[N, 1]) of y f32[N, K]: i8 at 8 bits, else u8 packed."""
    scale = grid.absmax_scale(jnp.abs(grid.finite(y, jnp.inf)).max(-1, keepdims=True), bits)
    codes = grid.codes(y, 1.0 / scale, None, None, {"bits": bits, **GRID})
    if bits == 8:
        return (codes - 128).astype(jnp.int8), scale
    return layout.pack(codes, bits), scale


def finish(y: jax.Array, spec: Spec, dtype):
    """f32[N, K] -> the result: cast, or codes and scale."""
    bits = spec.options["bits"]
    return quantized(y, bits) if bits else y.astype(dtype)


def run(spec: Spec, x: jax.Array):
    n, block = x.shape[0], spec.options["block"]
    h = matrices.dense(block).astype(np.float32) / np.sqrt(block)
    h = h if spec.options["inverse"] else h.T
    y = jnp.matmul(
        x.reshape(n, x.shape[1] // block, block).astype(jnp.float32),
        h,
        precision=jax.lax.Precision.HIGHEST,
    )
    return finish(y.reshape(x.shape), spec, x.dtype)


IMPL = Impl("reference", lambda spec: "", run)
