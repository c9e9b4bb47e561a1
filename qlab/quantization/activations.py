"""Activation quantizers: what a site does to the tensor that passes it.

A site holds a record, a pytree of arrays: Affine (static range, per tensor or per channel), PerToken
(range of each row, found at run time), Log (softmax outputs). `encode`, `decode` and `fake` read any of
them; `fake` equals decode(encode) and passes gradients straight through the rounding. The width is data
(q_max is an array), so that one compiled program serves every width; from 22 bits on everything is the identity.

    record = affine(*minmax(x_calib), bits=8)
    x_hat = fake(record, x)

Letters: D = channels (the last axis).
"""

from __future__ import annotations

import dataclasses
from functools import partial, singledispatch
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qlab.quantization.elementwise import abs_power
from qlab.quantization.qtensor import Ties, clip_ste, round_ste

Zero = Literal["repo", "reserve"]
IDENTITY_LEVELS = 2.0**22  # from here on a grid is the identity: float32 has no finer one


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero", "q_min", "q_max"],
    meta_fields=["ties"],
)
@dataclasses.dataclass(frozen=True)
class Affine:
    """x_hat = scale * (clip(round(x / scale) + zero, q_min, q_max) - zero), range known beforehand.

    Attributes:
      scale, zero: f32[] or f32[D]; zero integer-valued (0 for symmetric grids; it may lie outside
        the rails where a range does not hold 0). q_min, q_max: f32[].
    """

    scale: jax.Array
    zero: jax.Array
    q_min: jax.Array
    q_max: jax.Array
    ties: Ties = "half_even"


@partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["symmetric"])
@dataclasses.dataclass(frozen=True)
class PerToken:
    """Each row's own min/max (widened to 0) over the last axis, found at run time."""

    bits: jax.Array
    symmetric: bool = False


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "levels"],
    meta_fields=["per_octave", "zero_code"],
)
@dataclasses.dataclass(frozen=True)
class Log:
    """x_hat = scale * 2^(-q / per_octave) for x in (0, scale]: grids for softmax outputs.

    Attributes:
      scale: f32[]. levels: f32[], 2^b. per_octave: 1 (log2) or 2 (log sqrt2, RepQ-ViT's).
      zero_code: "repo" gives zero a code of its own, 2^b (2^b + 1 values, no b-bit code); "reserve" gives
        it the last one, 2^b - 1, which is what packed codes need.
    """

    scale: jax.Array
    levels: jax.Array
    per_octave: int = 2
    zero_code: Zero = "repo"


Record = Affine | PerToken | Log


def affine(lo, hi, bits, *, symmetric: bool = False, widen: bool = True, ties: Ties = "half_even"):
    """The grid of a range.

    Args:
      lo, hi: f32[] or f32[D]. bits: int or f32[]. symmetric: levels -2^(b-1) .. 2^(b-1) - 1 and no
        zero point. widen: the range is widened to hold 0, and the zero point then lies on the grid.
    """
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    bits = jnp.asarray(bits, jnp.float32)
    floor = 1e-8 * jnp.maximum(1.0, jnp.maximum(jnp.abs(lo).max(), jnp.abs(hi).max()))
    if symmetric:
        top = 2.0 ** (bits - 1) - 1
        scale = jnp.maximum(jnp.maximum(jnp.abs(lo), jnp.abs(hi)) / top, floor)
        return Affine(scale, jnp.zeros_like(scale), -top - 1, top, ties)
    if widen:
        lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    q_max = 2.0**bits - 1
    scale = jnp.maximum((hi - lo) / q_max, floor)
    zero = jnp.round(-lo / scale)
    if widen:
        zero = jnp.clip(zero, 0.0, q_max)
    return Affine(scale, zero, jnp.zeros_like(q_max), q_max, ties)


def minmax(x: jax.Array, *, per: Literal["tensor", "channel"] = "tensor"):
    """(lo, hi) of x f32[..., D], f32[] or f32[D]."""
    axes = None if per == "tensor" else tuple(range(x.ndim - 1))
    return x.min(axes), x.max(axes)


def quantile(x: jax.Array, share, *, per: Literal["tensor", "channel"] = "tensor"):
    """(lo, hi): the (1 - share) and share quantiles, exact (sorted, linear interpolation)."""
    rows = x.reshape(-1) if per == "tensor" else x.reshape(-1, x.shape[-1])
    lo, hi = jnp.quantile(rows, jnp.stack([1.0 - jnp.asarray(share), jnp.asarray(share)]), axis=0)
    return lo, hi


def search_range(
    x: jax.Array, bits, lo, hi, shares, *, p: float = 2.0, **options
) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi) times the share of `shares` f32[S] whose grid has least mean |x - x_hat|^p.

    Args:
      lo, hi: f32[] or f32[D] (each channel then takes its own share). options: of `affine`.
    """
    axes = None if jnp.ndim(lo) == 0 else tuple(range(x.ndim - 1))

    def error(share):
        record = affine(lo * share, hi * share, bits, **options)
        return abs_power(fake(record, x) - x, p).mean(axes)

    best = jnp.asarray(shares)[jax.lax.map(error, jnp.asarray(shares)).argmin(0)]
    return lo * best, hi * best


@singledispatch
def encode(record: Any, x: jax.Array) -> jax.Array:
    """Integer codes (as f32) of x under a record."""
    raise TypeError(f"{type(record).__name__} is no activation record")


@singledispatch
def decode(record: Any, q: jax.Array) -> jax.Array:
    """The values that codes stand for."""
    raise TypeError(f"{type(record).__name__} is no activation record")


@singledispatch
def fake(record: Any, x: jax.Array) -> jax.Array:
    """x on the grid of a record, straight-through: decode(encode(x)) in value.

    >>> fake(affine(0.0, 3.0, 2), jnp.array([0.4, 1.2, 9.0])).tolist()
    [0.0, 1.0, 3.0]
    """
    raise TypeError(f"{type(record).__name__} is no activation record")


@encode.register
def _(r: Affine, x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(_affine_codes(r, x))


def _affine_codes(r: Affine, x: jax.Array) -> jax.Array:
    return clip_ste(round_ste(x / r.scale, r.ties) + r.zero, r.q_min, r.q_max)


@decode.register
def _(r: Affine, q: jax.Array) -> jax.Array:
    return r.scale * (q - r.zero)


@fake.register
def _(r: Affine, x: jax.Array) -> jax.Array:
    exact = r.q_max - r.q_min >= IDENTITY_LEVELS - 1
    return jnp.where(exact, x, decode(r, _affine_codes(r, x)))


def token_grid(r: PerToken, x: jax.Array) -> Affine:
    """The Affine record, scale f32[..., 1], of each row of x f32[..., D]."""
    lo, hi = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return affine(lo, hi, r.bits, symmetric=r.symmetric)


@encode.register
def _(r: PerToken, x: jax.Array) -> jax.Array:
    return encode(token_grid(r, x), x)


@decode.register
def _(r: PerToken, q: jax.Array) -> jax.Array:
    raise TypeError("codes per token need their rows' scales: decode(token_grid(record, x), q)")


@fake.register
def _(r: PerToken, x: jax.Array) -> jax.Array:
    return fake(jax.lax.stop_gradient(token_grid(r, x)), x)


def _zero_code(r: Log) -> jax.Array:
    return r.levels if r.zero_code == "repo" else r.levels - 1


@encode.register
def _(r: Log, x: jax.Array) -> jax.Array:
    none = _zero_code(r)
    q = jnp.round(-r.per_octave * jnp.log2(jnp.where(x > 0, x, 1.0) / r.scale))
    return jax.lax.stop_gradient(jnp.where((x <= 0) | (q >= none), none, jnp.maximum(q, 0.0)))


@decode.register
def _(r: Log, q: jax.Array) -> jax.Array:
    return jnp.where(q >= _zero_code(r), 0.0, r.scale * 2.0 ** (-q / r.per_octave))


@fake.register
def _(r: Log, x: jax.Array) -> jax.Array:
    x_hat = jnp.where(r.levels >= IDENTITY_LEVELS, x, decode(r, encode(r, x)))
    return jax.lax.stop_gradient(x_hat) + (x - jax.lax.stop_gradient(x))  # x_hat exactly


def qdrop(key: jax.Array, x_q: jax.Array, x: jax.Array, share: float | jax.Array) -> jax.Array:
    """Each element quantized with probability `share`, else float (QDrop, Wei et al., arXiv 2203.05740).

    Args:
      x_q, x: of one shape. share: 1 and 0 take all and nothing (as Python numbers without a draw).

    >>> x = jnp.ones(1000)
    >>> 400 < float(qdrop(jax.random.key(0), 0 * x, x, 0.5).sum()) < 600
    True
    """
    if not isinstance(share, jax.Array) and share in (0.0, 1.0):
        return x_q if share else x
    return jnp.where(jax.random.uniform(key, x.shape) < share, x_q, x)
