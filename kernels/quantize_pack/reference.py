"""Quantize and pack written out: a grid for each group, a code for each element, then `layout.pack`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common import grid, layout
from qlab.kernels.common.dispatch import Impl, Spec


def per_column(v: jax.Array, k: int, group: int) -> jax.Array:
    """[N, G] -> [N, K]: the value of each column's group."""
    return jnp.repeat(v, group or k, axis=-1)[..., :k]


def words(options: dict, n: int, k: int, key: jax.Array | None) -> jax.Array | None:
    """i32[N, K]: the random word of each element; None unless rounding is stochastic."""
    if options["rounding"] != "stochastic":
        return None
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (n, k), axis) for axis in (0, 1))
    return grid.threefry(key[0], key[1], row, col)


def calibrated(options: dict, x, scale, zero):
    """(scale f32[N, G], zero f32[N, G] or None) of x f32[N, K]."""
    o, (n, k) = options, x.shape
    if o["calibration"] == "given":
        return scale, zero
    x = x.reshape(n, layout.num_groups(k, o["group"]), o["group"] or k)
    if o["calibration"] == "absmax":
        amax = jnp.abs(grid.finite(x, jnp.inf)).max(-1)
        return grid.absmax_scale(amax, o["bits"]), None
    lo, hi = grid.finite(x, -jnp.inf).min(-1), grid.finite(x, jnp.inf).max(-1)
    return grid.minmax_grid(lo, hi, o["bits"])


def run(spec: Spec, x, scale, zero, key):
    o, (n, k) = spec.options, x.shape
    x = x.astype(jnp.float32)
    scale, zero = calibrated(o, x, scale, zero)
    wide = [None if a is None else per_column(a, k, o["group"]) for a in (1.0 / scale, zero)]
    codes = grid.codes(x, *wide, words(o, n, k, key), o)
    return layout.pack(codes, o["bits"], o["group"]), scale, zero


IMPL = Impl("reference", lambda spec: "", run)
