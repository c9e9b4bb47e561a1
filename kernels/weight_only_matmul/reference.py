"""The product written out: unpack, dequantize in float32, multiply in float32. Obviously right, slow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common import layout
from qlab.kernels.common.dispatch import Impl, Spec

ACTIVATIONS = {
    # jax.nn.relu is a custom_jvp_call, which kernels cannot lower; NaN stays NaN, the slope at 0 is 0.
    "relu": lambda y: jnp.where(y <= 0, 0.0, y),
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),
    "silu": jax.nn.silu,
}


def per_column(v: jax.Array, k: int, group: int) -> jax.Array:
    """[N, G] -> [N, K]: the value of each column's group."""
    return jnp.repeat(v, group or k, axis=-1)[..., :k]


def dequantize(codes, scale, zero, offset, k: int, bits: int, group: int) -> jax.Array:
    """f32[N, K] = scale * (code - zero) + offset; without a zero point code 2^(b-1) stands for 0."""
    q = layout.unpack(codes, k, bits, group).astype(jnp.float32)
    if zero is not None:
        q = q - per_column(zero.astype(jnp.float32), k, group)
    elif offset is None:
        q = q - 2.0 ** (bits - 1)
    w = q * per_column(scale.astype(jnp.float32), k, group)
    return w if offset is None else w + per_column(offset.astype(jnp.float32), k, group)


def epilogue(y: jax.Array, bias, activation: str | None, dtype) -> jax.Array:
    """f32[M, N] accumulator -> the result: bias, activation, cast."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y.astype(dtype)


def run(spec: Spec, x, codes, scale, zero, offset, bias) -> jax.Array:
    o = spec.options
    w = dequantize(codes, scale, zero, offset, x.shape[-1], o["bits"], o["group"])
    y = jnp.matmul(x.astype(jnp.float32), w.T, precision=jax.lax.Precision.HIGHEST)
    return epilogue(y, bias, o["activation"], x.dtype)


IMPL = Impl("reference", lambda spec: "", run)
