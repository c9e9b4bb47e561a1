"""Softmax, logarithm, rounding; and values shifted right one by one. Obviously right, slow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.log2_softmax_quantize import levels


def allowed(r: int, c: int, mask: jax.Array | None, causal: bool) -> jax.Array | None:
    """bool, broadcast against [B, R, C]; causal: the last row sees the last column."""
    if not causal:
        return mask
    tri = jnp.arange(c)[None, :] <= jnp.arange(r)[:, None] + (c - r)
    return tri if mask is None else mask & tri


def exponent(z: jax.Array, seen: jax.Array | None, d: jax.Array, steps: int) -> jax.Array:
    """f32 -steps log2(softmax(z) / d); masked: inf; a row with nothing to see, NaN or inf: NaN or inf."""
    z = z.astype(jnp.float32)
    if seen is not None:
        z = jnp.where(seen, z, -jnp.inf)
    u = (z - z.max(-1, keepdims=True)) * levels.LOG2E
    t = steps * (jnp.log2(jnp.exp2(u).sum(-1, keepdims=True)) + jnp.log2(d) - u)
    return t if seen is None else jnp.where(seen, t, jnp.inf)


def run(spec: Spec, z, mask, d) -> jax.Array:
    o = spec.options
    seen = allowed(z.shape[1], z.shape[2], mask, o["causal"])
    t = exponent(z, seen, d, levels.STEPS[o["base"]])
    return levels.code(t, o["bits"], o["zero_code"]).astype(jnp.uint8)


def attend(spec: Spec, codes, v) -> jax.Array:
    """Integers: every value shifted right by its code, bits below 2^-F dropped with the term."""
    o = spec.options
    if v.dtype != jnp.int8:
        p = levels.weight(codes.astype(jnp.int32), o["bits"], o["base"], o["zero_code"])
        y = jnp.matmul(p, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return y.astype(v.dtype)
    f = o["fraction"]

    def one_row(q):  # i32[B, C]
        total = 0.0
        wide = v.astype(jnp.int32) << f
        for odd, (e, counts) in enumerate(levels.parities(q, o["bits"], o["base"], o["zero_code"])):
            counts = (counts & (e <= f))[..., None]
            part = jnp.where(counts, wide >> jnp.minimum(e, f)[..., None], 0).sum(1)
            total = total + part.astype(jnp.float32) * (levels.SQRT2 if odd else 1.0)
        return total * 2.0**-f

    return jnp.moveaxis(jax.lax.map(one_row, jnp.moveaxis(codes.astype(jnp.int32), 1, 0)), 0, 1)


IMPL = Impl("reference", lambda spec: "", run)
ATTEND = Impl("reference", lambda spec: "", attend)
