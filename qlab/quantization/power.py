"""Non-uniform grids that a map makes uniform: the power quantizer, and powers of two.

PowerQuant (Yvinec et al., arXiv 2301.09858) rounds t = sign(x) |x|^a on a uniform symmetric grid of step s and reads
x_hat = sign(q) (|q| s)^(1/a). For a < 1 levels are dense near 0; a = 1 is the uniform quantizer, 0 stays 0 exactly.
Because the grid is uniform in t, every RoundingRule works on it: it rounds t, and `from_power` maps its result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.elementwise import abs_power

EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class PowerFit(NamedTuple):
    """a f32[], the exponent; scale f32, the step in t, broadcastable to x; error f32[], sum |x - x_hat|^p."""

    a: jax.Array
    scale: jax.Array
    error: jax.Array


def to_power(x: jax.Array, a) -> jax.Array:
    """t = sign(x) |x|^a. Not to be differentiated: its slope at 0 is infinite for a < 1."""
    return jnp.sign(x) * jnp.abs(x) ** a


@jax.custom_jvp
def from_power(t: jax.Array, a) -> jax.Array:
    """x = sign(t) |t|^(1/a), the inverse of `to_power`; its slope at 0 is 1 for a = 1 and 0 for a < 1.

    >>> from_power(jnp.array([-2.0, 0.0, 2.0]), 0.5).tolist()
    [-4.0, 0.0, 4.0]
    """
    return jnp.sign(t) * jnp.abs(t) ** (1.0 / a)


@from_power.defjvp
def _from_power_jvp(primals, tangents):
    """In t only: a is chosen, not trained."""
    t, a = primals
    slope = jnp.abs(t) ** (1.0 / a - 1.0) / a  # 0^0 = 1, where autodiff of abs would give 0
    return from_power(t, a), slope * tangents[0]


def rails(bits):
    """The largest code n = 2^(b-1) - 1 of the symmetric grid -n .. n."""
    if isinstance(bits, int) and not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is no width for a symmetric grid; use 2 to 8")
    return 2.0 ** (jnp.asarray(bits, jnp.float32) - 1.0) - 1.0


def power_scale(x: jax.Array, a, bits, axis: int | None = None) -> jax.Array:
    """The step max |t| / n, of all x or for each entry of `axis` (broadcastable to x); never 0."""
    axes = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    most = jnp.abs(to_power(x, a)).max(axes, keepdims=True)
    return jnp.maximum(most / rails(bits), 1e-8)


def power_encode(x: jax.Array, a, s, bits) -> jax.Array:
    """i8 codes clip(round(sign(x) |x|^a / s), -n, n), ties to even.

    Args:
      a: exponent in (0, 1]. s: step, broadcastable to x. bits: 2 to 8, n = 2^(bits - 1) - 1.

    >>> power_encode(jnp.array([-1.0, 0.0, 0.04, 0.3]), 0.5, 1 / 3, 3).tolist()
    [-3, 0, 1, 2]
    """
    n = rails(bits)
    return jnp.clip(jnp.round(to_power(x, a) / s), -n, n).astype(jnp.int8)


def power_decode(q: jax.Array, a, s, bits=None) -> jax.Array:
    """f32: sign(q) (|q| s)^(1/a). bits is taken for the symmetry with `power_encode` and not needed.

    >>> power_decode(jnp.array([-2, 0, 1]), 0.5, 0.5).tolist()
    [-1.0, 0.0, 0.25]
    """
    del bits
    return from_power(q.astype(jnp.float32) * s, a)


def fit_power(
    x: jax.Array,
    bits,
    grid: Sequence[float] = EXPONENTS,
    *,
    axis: int | None = None,
    shares: int = 1,
    p: float = 2.0,
) -> PowerFit:
    """One exponent for all of x, and its steps, of least sum |x - x_hat|^p over the exponents of `grid`.

    Args:
      bits: 2 to 8; may be traced and broadcast to x. grid: candidates for a, each in (0, 1].
      axis: the axis with a step of its own for each entry; None: one step.
      shares: 1 takes the step max |t| / n; more tries so many shares of it and keeps the best for each entry.

    >>> x = jnp.array([[-1.0, -0.25, 0.0, 0.25, 1.0]])
    >>> fit = fit_power(x, 3, (0.5, 1.0), axis=0)
    >>> float(fit.a), round(float(fit.scale.item()), 4)
    (1.0, 0.3333)
    """
    if not grid or not all(0 < a <= 1 for a in grid):
        raise ValueError(f"grid={tuple(grid)}; exponents in (0, 1] are expected")
    rails(bits)  # a width that is no integer from 2 to 8 is an error here
    return _fit_power(x, bits, tuple(grid), axis, shares, p)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _fit_power(x, bits, grid: tuple[float, ...], axis, shares: int, p) -> PowerFit:
    axes = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    n = rails(bits)
    exponents = jnp.asarray(grid, jnp.float32)

    def fit(a):
        whole = power_scale(x, a, bits, axis)
        t = to_power(x, a)

        def body(i, best):
            scale = whole * (shares - i) / shares
            x_hat = from_power(jnp.clip(jnp.round(t / scale), -n, n) * scale, a)
            error = abs_power(x - x_hat, p).sum(axes, keepdims=True)
            return jax.tree.map(partial(jnp.where, error < best[1]), (scale, error), best)

        return jax.lax.fori_loop(0, shares, body, (whole, jnp.full_like(whole, jnp.inf)))

    scale, error = jax.lax.map(fit, exponents)
    total = error.reshape(len(grid), -1).sum(1)
    best = total.argmin()  # the first of equals
    return PowerFit(exponents[best], scale[best], total[best])


def log2_scale(x: jax.Array, bits, axis: int | None = None, *, shares: int = 1, p: float = 2.0):
    """The largest level of the grid +- s 2^-k, k = 0 .. 2^(bits-1) - 1 (no zero), broadcastable to x.

    s is max |x|, or of `shares` shares of it the one of least sum |x - x_hat|^p.
    """
    axes = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    whole = jnp.maximum(jnp.abs(x).max(axes, keepdims=True), 1e-8)

    def body(i, best):
        scale = whole * (shares - i) / shares
        k = jnp.clip(jnp.round(log2_map(x, scale)), 0.0, 2.0 ** (bits - 1.0) - 1.0)
        error = abs_power(x - log2_unmap(k, x, scale), p).sum(axes, keepdims=True)
        return jax.tree.map(partial(jnp.where, error < best[1]), (scale, error), best)

    return jax.lax.fori_loop(0, shares, body, (whole, jnp.full_like(whole, jnp.inf)))[0]


def log2_map(x: jax.Array, scale) -> jax.Array:
    """k = log2(scale / |x|) f32, the place of |x| among the levels scale 2^-k; at most 30."""
    return jnp.minimum(jnp.log2(scale) - jnp.log2(jnp.maximum(jnp.abs(x), 1e-30)), 30.0)


def log2_unmap(k: jax.Array, x: jax.Array, scale) -> jax.Array:
    """sign(x) scale 2^-k, with the sign of 0 positive; differentiable in k.

    >>> log2_unmap(jnp.array([0.0, 1.0]), jnp.array([-0.9, 0.4]), 1.0).tolist()
    [-1.0, 0.5]
    """
    return jnp.where(x < 0, -1.0, 1.0) * scale * jnp.exp2(-k)
