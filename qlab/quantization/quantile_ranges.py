"""Ranges from quantiles: of a few candidates, the one whose grid has the least squared error (RepQ-ViT's search).

The candidates lie far out in the tails, so a few largest values are found instead of sorting everything.
Letters: D = channels, P = candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qlab.quantization.activations import Affine, Log, Zero, affine, fake
from qlab.quantization.qtensor import Ties

SHARES = (0.999, 0.9999, 0.99999)  # of RepQ-ViT's repository
# Steps between 0 and a range at most: a channel that is nearly constant gets no finer grid.
FARTHEST = 4096.0


def tail_quantiles(x: jax.Array, ps: Sequence[float]) -> jax.Array:
    """f32[P] or f32[P, D]: the quantiles ps of x f32[N] or of each column of x f32[N, D], interpolated linearly.

    >>> [round(float(q), 2) for q in tail_quantiles(jnp.arange(101.0), (0.995, 1.0))]
    [99.5, 100.0]
    """
    if not all(0 <= p <= 1 for p in ps):
        raise ValueError(f"ps={tuple(ps)}; shares from 0 to 1 are expected")
    most = len(x) - 1
    below = [(1.0 - p) * most for p in ps]  # ranks from the top
    k = min(math.ceil(max(below)) + 1, len(x))
    top = jax.lax.top_k(jnp.moveaxis(x, 0, -1), k)[0]
    first = jnp.array([min(math.floor(b), k - 1) for b in below])
    second = jnp.minimum(first + 1, k - 1)
    weight = jnp.array([b - math.floor(b) for b in below], x.dtype)
    found = top[..., first] * (1 - weight) + top[..., second] * weight
    return jnp.moveaxis(found, -1, 0)


def range_grid(lo, hi, bits, ties: Ties = "half_even") -> Affine:
    """Affine of a range as it is, not widened to 0; its zero point may lie outside the rails.

    A (nearly) constant channel would have a step of 0 and a zero point of any size, which averages with those
    of other channels; so the step is at least 1 / FARTHEST of the larger end.
    """
    q_max = 2.0 ** jnp.asarray(bits, jnp.float32) - 1
    least = jnp.maximum(jnp.abs(lo), jnp.abs(hi)) / FARTHEST
    return affine(lo, jnp.maximum(hi, lo + least * q_max), bits, widen=False, ties=ties)


def calib_affine_quantile(
    x: jax.Array, bits, axis: int | None = None, ps: Sequence[float] = SHARES
) -> tuple[jax.Array, jax.Array]:
    """(s, z) of the range between the (1 - p, p) quantiles, p that of `ps` with least mean squared error.

    The range is not widened to hold 0 and z may lie outside the rails (as in RepQ-ViT's repository).

    Args:
      x: f32[...]. bits: int or f32[]. axis: the axis whose entries have a grid of their own; None: one for all.
    Returns:
      s, z: f32[], or f32[D] with D the length of `axis`; each channel takes its own p. z is integer-valued.
    Raises:
      ValueError: a share outside [0, 1].

    >>> s, z = calib_affine_quantile(jnp.arange(1.0, 17.0), 4, ps=(1.0,))
    >>> float(s), float(z)
    (1.0, -1.0)
    """
    rows = x.reshape(-1) if axis is None else jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    lo, hi = -tail_quantiles(-rows, ps), tail_quantiles(rows, ps)

    def error(lo, hi):
        grid = range_grid(lo, hi, bits)
        return ((fake(grid, rows) - rows) ** 2).mean(0), grid.scale, grid.zero

    errors, scale, zero = jax.vmap(error)(lo, hi)
    best = errors.argmin(0)[None]
    return jnp.take_along_axis(scale, best, 0)[0], jnp.take_along_axis(zero, best, 0)[0]


def calib_log(
    x: jax.Array, bits, per_octave: int = 2, zero: Zero = "reserve", ps: Sequence[float] = SHARES
) -> Log:
    """The Log grid for softmax outputs whose scale is the p quantile, p of `ps` with least squared error.

    Args:
      x: f32[...] in [0, 1]. bits: int or f32[]. per_octave: 2 (log sqrt 2) or 1 (log 2). zero: see `Log`.
    """
    levels = 2.0 ** jnp.asarray(bits, jnp.float32)
    scales = jnp.maximum(tail_quantiles(x.reshape(-1), ps), 1e-8)

    def error(scale):
        return ((fake(Log(scale, levels, per_octave, zero), x) - x) ** 2).mean()

    return Log(scales[jax.lax.map(error, scales).argmin()], levels, per_octave, zero)
