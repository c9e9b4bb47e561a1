"""A grid: what a weight is rounded onto. Ranges from min/max or from a search of the error.

Bits and granularity are data here (q_max is an array, one scale per tensor is one value repeated over
the rows), so that one compiled program serves W2, W3, W4, per tensor and per channel.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qlab.quantization.elementwise import abs_power
from qlab.quantization.qtensor import QTensor, Ties, expand, round_ties

Calibration = Literal["searched", "shares", "minmax"]
MAX_BITS = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero", "q_min", "q_max", "shared"],
    meta_fields=["bits", "ties"],
)
@dataclasses.dataclass(frozen=True)
class Grid:
    """A QTensor without codes: w_hat = scale * (q - zero), q integer in [q_min, q_max].

    Attributes:
      scale: f32[out, 1] or f32[out, G] > 0. zero: integer-valued f32 like scale, or None (symmetric).
      q_min, q_max: f32[], the rails (data, so that vmap can run several widths at once).
      shared: bool[], one scale for the whole matrix: all rows of `scale` hold the same number.
      bits: width of the stored codes (the widest, if q_max varies under vmap). ties: rounding rule.
    """

    scale: jax.Array
    zero: jax.Array | None
    q_min: jax.Array
    q_max: jax.Array
    shared: jax.Array
    bits: int = 8
    ties: Ties = "half_even"

    def qtensor(self, codes: jax.Array, shape: tuple[int, ...], scale: jax.Array | None = None):
        """The QTensor with these codes, and with `scale` where it was learned."""
        dtype = jnp.int8 if self.zero is None else jnp.uint8
        return QTensor(
            codes=codes.astype(dtype),
            scale=self.scale if scale is None else scale,
            zero=self.zero,
            bits=self.bits,
            axes=(1,),
            shape=shape,
        )


def grid_of(qt: QTensor, bits) -> Grid:
    """The grid, one scale per row, on which an asymmetric QTensor lies. bits: i32[], at most qt.bits.

    >>> w = jnp.array([[0.0, 1.0, 3.0]])
    >>> grid = make_grid(w, 2, calibration="minmax")
    >>> grid_of(nearest_qtensor(w, grid), 2).q_max.tolist()
    3.0
    """
    if qt.zero is None or qt.offset is not None:
        raise ValueError("grid_of reads asymmetric grids with zero points only")
    q_max = 2.0 ** jnp.asarray(bits, jnp.float32) - 1
    return Grid(qt.scale, qt.zero, jnp.zeros_like(q_max), q_max, jnp.asarray(False), qt.bits)


def nearest_codes(w: jax.Array, grid: Grid) -> jax.Array:
    """f32[out, in] integers: clip(round(w / scale) + zero, q_min, q_max)."""
    q = round_ties(w / expand(grid.scale, w.shape), grid.ties)
    if grid.zero is not None:
        q = q + expand(grid.zero, w.shape)
    return jnp.clip(q, grid.q_min, grid.q_max)


def nearest_qtensor(w: jax.Array, grid: Grid) -> QTensor:
    """w f32[out, in] rounded to nearest on the grid."""
    return grid.qtensor(nearest_codes(w, grid), w.shape)


def search_affine(x, bits: int, axis: int | None, *, p: float = 2.4, n_grid: int = 100):
    """The asymmetric grid of least mean |x - x_hat|^p, by enumeration.

    Candidates are `n_grid` fractions of the range times all 2^b zero points; a one-signed tensor
    (row) searches the fractions only, with 0 at the end of the range. Cost grows with 2^b.

    Args:
      x: f32[...]. bits: 1 to 8. axis: the axis with a scale of its own per entry; None: one scale.
    Returns:
      (scale, zero), f32, broadcastable to x; zero is integer-valued in [0, 2^b - 1].

    >>> x = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, -2.0, -4.0, -6.0]])
    >>> scale, zero = search_affine(x, 2, axis=0)
    >>> scale.ravel().tolist(), zero.ravel().tolist()
    ([1.0, 2.0], [0.0, 3.0])
    """
    rows, shape = _rows(x, bits, axis)
    scale, zero = _search_affine(rows, 2.0**bits - 1, axis is None, 2**bits, p=p, n_grid=n_grid)
    return scale.reshape(shape), zero.reshape(shape)


def search_symmetric(x, bits: int, axis: int | None, *, p: float = 2.4, n_grid: int = 100):
    """The symmetric grid [-2^(b-1), 2^(b-1) - 1] of least mean |x - x_hat|^p over `n_grid` fractions.

    >>> float(search_symmetric(jnp.array([[-4.0, 1.0, 3.0]]), 3, axis=None).item())
    1.0
    """
    rows, shape = _rows(x, bits, axis)
    q_max = 2.0 ** (bits - 1) - 1
    return _search_symmetric(rows, -q_max - 1, q_max, axis is None, p=p, n_grid=n_grid).reshape(
        shape
    )


def _rows(x, bits: int, axis: int | None):
    check_bits(bits)
    x = jnp.asarray(x, jnp.float32)
    if axis is None:
        return x.reshape(1, -1), (1,) * x.ndim
    rows = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return rows, tuple(n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape))


def check_bits(bits: int, most: int = MAX_BITS) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= most:
        raise ValueError(f"bits={bits!r} is no width for a grid; use an integer from 1 to {most}")


def _range(w, shared):
    """Row ranges (lo, hi) f32[out, 1] widened to contain 0; the whole range where shared."""
    lo = jnp.minimum(w.min(-1, keepdims=True), 0.0)
    hi = jnp.maximum(w.max(-1, keepdims=True), 0.0)
    return jnp.where(shared, lo.min(), lo), jnp.where(shared, hi.max(), hi)


def _floor(scale, w):
    """A scale is never 0: an all-zero row would divide by it."""
    return jnp.maximum(scale, 1e-8 * jnp.maximum(1.0, jnp.abs(w).max()))


def _error(w, scale, zero, q_min, q_max, p, shared):
    """sum |w - w_hat|^p, f32[out, 1]; over all rows where the scale is shared."""
    q = jnp.clip(jnp.round(w / scale) + zero, q_min, q_max)
    err = abs_power(w - scale * (q - zero), p).sum(-1, keepdims=True)
    return jnp.where(shared, err.sum(), err)


@partial(jax.jit, static_argnames=("num_zeros", "n_grid"))
def _search_affine(w, q_max, shared, num_zeros: int, p=2.4, n_grid: int = 100):
    lo, hi = _range(w, shared)
    positive, negative = lo >= 0, hi <= 0

    def body(i, best):
        fraction = (i // num_zeros + 1) / n_grid
        zero = (i % num_zeros).astype(jnp.float32)
        scale = _floor((hi - lo) * fraction / q_max, w)
        err = _error(w, scale, zero, 0.0, q_max, p, shared)
        # the one-signed ends come first: an all-zero row is both, and takes zero = 0
        legal = jnp.where(positive, zero == 0, jnp.where(negative, zero == q_max, zero <= q_max))
        better = legal & (err < best[0])
        new = (err, jnp.broadcast_to(scale, err.shape), jnp.broadcast_to(zero, err.shape))
        return jax.tree.map(partial(jnp.where, better), new, best)

    start = (jnp.full_like(lo, jnp.inf), _floor((hi - lo) / q_max, w), jnp.zeros_like(lo))
    _, scale, zero = jax.lax.fori_loop(0, n_grid * num_zeros, body, start)
    return scale, zero


@partial(jax.jit, static_argnames=("n_grid",))
def _search_shares(w, q_max, shared, p=2.4, n_grid: int = 100):
    lo, hi = _range(w, shared)

    def body(i, best):
        scale = _floor((hi - lo) * (n_grid - i) / n_grid / q_max, w)
        zero = jnp.clip(jnp.round(-lo * (n_grid - i) / n_grid / scale), 0.0, q_max)
        err = _error(w, scale, zero, 0.0, q_max, p, shared)
        return jax.tree.map(partial(jnp.where, err < best[0]), (err, scale, zero), best)

    start = (jnp.full_like(lo, jnp.inf), _floor((hi - lo) / q_max, w), jnp.zeros_like(lo))
    return jax.lax.fori_loop(0, n_grid, body, start)[1:]


@partial(jax.jit, static_argnames=("n_grid",))
def _search_symmetric(w, q_min, q_max, shared, p=2.4, n_grid: int = 100):
    lo, hi = _range(w, shared)
    # the negative rail holds one level more than the positive one
    most = jnp.maximum(-lo / -q_min, hi / jnp.maximum(q_max, 1.0))

    def body(i, best):
        scale = _floor(most * (i + 1) / n_grid, w)
        err = _error(w, scale, 0.0, q_min, q_max, p, shared)
        return jax.tree.map(partial(jnp.where, err < best[0]), (err, scale), best)

    start = (jnp.full_like(lo, jnp.inf), _floor(most, w))
    return jax.lax.fori_loop(0, n_grid, body, start)[1]


def calibrate(
    w,
    bits,
    shared,
    *,
    max_bits: int,
    symmetric: bool = False,
    calibration: Calibration = "searched",
    ties: Ties = "half_even",
    p: float = 2.4,
    n_grid: int = 100,
    group: int = 0,
) -> Grid:
    """The grid of a matrix w f32[out, in], with `bits` i32[] and `shared` bool[] as data.

    Args:
      bits: width of the grid, at most max_bits (static: the width of the stored codes).
      shared: one scale for all rows. symmetric: [-2^(b-1), 2^(b-1) - 1] and no zero point.
      calibration: "searched" (least |error|^p), "minmax" (symmetric: max |w| / (2^(b-1) - 1)), or
        "shares": least |error|^p over shares of the range only, each with the zero point its ends
        give, which costs 2^b times less than "searched" (symmetric grids: the same).
      group: columns that share a scale, a divisor of in; 0: the whole row.
    """
    if group:
        options: dict[str, Any] = dict(
            symmetric=symmetric, calibration=calibration, ties=ties, p=p, n_grid=n_grid
        )
        grid = calibrate(w.reshape(-1, group), bits, shared, max_bits=max_bits, **options)
        shape = (w.shape[0], w.shape[1] // group)
        zero = None if grid.zero is None else grid.zero.reshape(shape)
        return dataclasses.replace(grid, scale=grid.scale.reshape(shape), zero=zero)
    bits = jnp.asarray(bits, jnp.float32)
    shared = jnp.asarray(shared)
    if symmetric:
        q_max = 2.0 ** (bits - 1) - 1
        q_min = -q_max - 1
        if calibration != "minmax":
            scale = _search_symmetric(w, q_min, q_max, shared, p=p, n_grid=n_grid)
        else:
            lo, hi = _range(w, shared)
            scale = _floor(jnp.maximum(-lo, hi) / jnp.maximum(q_max, 1.0), w)
        return Grid(scale, None, q_min, q_max, shared, max_bits, ties)
    q_max = 2.0**bits - 1
    if calibration == "searched":
        scale, zero = _search_affine(w, q_max, shared, 2**max_bits, p=p, n_grid=n_grid)
    elif calibration == "shares":
        scale, zero = _search_shares(w, q_max, shared, p=p, n_grid=n_grid)
    else:
        lo, hi = _range(w, shared)
        scale = _floor((hi - lo) / q_max, w)
        zero = jnp.clip(jnp.round(-lo / scale), 0.0, q_max)
    return Grid(scale, zero, jnp.zeros_like(q_max), q_max, shared, max_bits, ties)


def make_grid(w, bits: int, granularity: str = "channel", **options) -> Grid:
    """The grid of a matrix w f32[out, in]: per "tensor", per "channel" (row) or per "group:g".

    Args:
      **options: symmetric, calibration, ties, p, n_grid of `calibrate`.

    >>> make_grid(jnp.array([[0.0, 3.0], [-1.0, 2.0]]), 2, "channel", calibration="minmax").scale.tolist()
    [[1.0], [1.0]]
    """
    check_bits(bits)
    group = group_size(granularity, w.shape[-1])
    if group and w.shape[-1] % group:
        raise ValueError(
            f"{granularity} does not divide in={w.shape[-1]}; pad the columns with zeros"
        )
    return calibrate(w, bits, granularity == "tensor", max_bits=bits, group=group, **options)


def group_size(granularity: str, width: int) -> int:
    """Columns that share a scale; 0 for "tensor" and "channel".

    >>> group_size("group:16", 64)
    16
    """
    if granularity in ("tensor", "channel"):
        return 0
    name, _, size = granularity.partition(":")
    if name != "group" or not size.isdigit() or not 1 <= int(size) <= width:
        raise ValueError(
            f'granularity={granularity!r}; use "tensor", "channel" or "group:g" with g from 1 to {width}'
        )
    return int(size)
