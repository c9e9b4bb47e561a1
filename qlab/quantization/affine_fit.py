"""The float side of a uniform grid: the scale and the real offset that fit given integers best.

    min over s, z of tr(E H E^T),  E = q s + z - w,  H = E[x x^T]

Rows are independent given H, and every row is a weighted least-squares problem in 2 G unknowns for G
groups. A step for any weight quantizer (decoupleQ's float step, Guo et al., arXiv 2404.12759).

Letters: out = rows, in = columns of w; G = groups of `group` neighbouring columns (the last may be short).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.qtensor import expand

CHUNK = 2**24  # floats of the largest intermediate: rows are taken in pieces of it


class Fit(NamedTuple):
    scale: jax.Array  # f[out, G], may be negative
    offset: jax.Array  # f[out, G]
    err: jax.Array  # f[out], (q s + z - w) H (q s + z - w)^T


def row_error(w_hat: jax.Array, w: jax.Array, h: jax.Array) -> jax.Array:
    """f[out]: (w_hat - w) H (w_hat - w)^T of each row; their sum is tr(E H E^T)."""
    e = w_hat - w
    return jnp.einsum("oi,ij,oj->o", e, h, e, precision="highest")


def width_of(group: int, num_in: int) -> int:
    """Columns of a group; 0, -1 and everything from `num_in` on mean the whole row.

    >>> width_of(-1, 64), width_of(16, 64), width_of(128, 64)
    (64, 16, 64)
    """
    return num_in if group <= 0 else min(group, num_in)


def pad_groups(width: int, h: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
    """Zero columns behind h f[in, in] (zero rows too) and rows f[out, in], up to whole groups."""
    pad = (0, -h.shape[0] % width)
    return (jnp.pad(h, [pad, pad]), *(jnp.pad(a, [(0, 0), pad]) for a in rows))


def fit_affine(q, w, h, group: int = 0, symmetric: bool = False, *, scale=None) -> Fit:
    """The scale s and offset z of least (q s + z - w) H (q s + z - w)^T in each row, in closed form.

    A group is fitted by 1 and q minus its H-weighted mean, which do not cancel as 1 and q do; the normal
    equations are scaled to unit diagonal, eliminated, and refined once with the true residual. A column
    that depends on the ones before it (q constant over a group, inputs that are always 0) is dropped.

    Args:
      q: integers [out, in]. w: f[out, in]. h: f[in, in], symmetric and positive semi-definite; its dtype
        is the one computed in.
      group: columns that share (s, z); 0 or -1: the whole row. symmetric: z = 0.
      scale: f[out, G], what s stays where nothing decides it (all q of a group equal); None: 0.
    Returns:
      Fit(scale, offset, err).

    >>> q = jnp.array([[-2, -1, 0, 1]])
    >>> fit = fit_affine(q, 0.5 * q + 3.0, jnp.eye(4))
    >>> fit.scale.round(4).tolist(), fit.offset.round(4).tolist()
    ([[0.5]], [[3.0]])
    """
    num_in, dtype = w.shape[1], h.dtype
    if q.shape != w.shape or h.shape != (num_in, num_in):
        raise ValueError(
            f"q {q.shape}, w {w.shape} and h {h.shape} do not fit; (out, in) twice and (in, in) are expected"
        )
    width = width_of(group, num_in)
    h, q, w = pad_groups(width, (h + h.T) / 2, q.astype(dtype), w.astype(dtype))
    rows, num = w.shape[0], w.shape[1] // width
    blocks = h.reshape(num, width, num, width)
    own = jnp.einsum("jxjy->jx", blocks)  # H_jj 1
    total = own.sum(-1)
    eps = jnp.finfo(dtype).eps
    trace = jnp.trace(h)
    is_live = (jnp.diagonal(h) > 0).reshape(num, width)

    def solve(q, w, start):  # one row: [G, width], [G, width], [G]
        most, least = (
            f(jnp.where(is_live, q, v), -1) for f, v in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))
        )
        is_flat = ~(most > least)
        mean = (q * own).sum(-1) / jnp.where(total > 4 * eps * trace, total, jnp.inf)
        mean = jnp.where(is_flat & jnp.isfinite(most), most, mean)
        if symmetric:
            mean, is_flat = jnp.zeros(num, dtype), (q * is_live == 0).all(-1)
        centred = jnp.where(is_live, q - mean[:, None], 0.0) * ~is_flat[:, None]
        basis = centred[None] if symmetric else jnp.stack([is_live.astype(dtype), centred])
        side = jnp.einsum("jxky,bky->bjxk", blocks, basis)
        n = basis.shape[0] * num
        gram = jnp.einsum("ajx,bjxk->ajbk", basis, side).reshape(n, n)
        inverse = _inverse(gram, 4 * eps * trace * (basis**2).sum(-1).ravel())

        def coefficients(residual):
            right = jnp.einsum("ajx,jxky,ky->aj", basis, blocks, residual)
            return (inverse @ right.ravel()).reshape(-1, num)

        x = coefficients(w)
        x = x + coefficients(w - jnp.einsum("aj,ajx->jx", x, basis))
        s = jnp.where(is_flat, start, x[-1])
        return s, (jnp.zeros_like(s) if symmetric else x[0] - s * mean)

    start = jnp.zeros((rows, num), dtype) if scale is None else scale.astype(dtype)
    piece = max(1, min(rows, CHUNK // (2 * w.shape[1] * num)))
    with jax.default_matmul_precision("highest"):
        by_group = (rows, num, width)
        args = (q.reshape(by_group), w.reshape(by_group), start)
        if piece == rows:
            s, z = jax.vmap(solve)(*args)
        else:
            s, z = jax.lax.map(lambda a: solve(*a), args, batch_size=piece)
        return Fit(s, z, row_error(q * expand(s, q.shape) + expand(z, q.shape), w, h))


def _inverse(m: jax.Array, floor: jax.Array) -> jax.Array:
    """Inverse of a positive semi-definite m f[n, n] on the columns that do not depend on earlier ones.

    Gauss-Jordan on the matrix scaled to unit diagonal, where a pivot is the share of a column that the
    earlier ones leave over. Diagonals up to `floor` f[n] and pivots that are only rounding are dropped.
    """
    n = m.shape[0]
    diagonal = jnp.diagonal(m)
    unit = jnp.where(
        diagonal > floor, jax.lax.rsqrt(jnp.where(diagonal > floor, diagonal, 1.0)), 0.0
    )
    index = jnp.arange(n)

    def body(i, a):
        pivot = a[i, i]
        row = jnp.where(pivot > 32 * jnp.finfo(m.dtype).eps, a[i] / pivot, 0.0)
        return (a - jnp.outer(jnp.where(index == i, 0.0, a[:, i]), row)).at[i].set(row)

    scaled = m * unit[:, None] * unit
    out = jax.lax.fori_loop(0, n, body, jnp.concatenate([scaled, jnp.eye(n, dtype=m.dtype)], 1))[
        :, n:
    ]
    return out * unit[:, None] * unit


def rails(bits):
    """(q_min, q_max) of signed codes, with or without offset.

    >>> rails(2)
    (-2.0, 1.0)
    """
    half = 2.0 ** (bits - 1)
    return -half, half - 1.0


def minmax(w, q_min, q_max, group: int = 0, symmetric: bool = False, share=1.0):
    """(s, z) f[out, G] from the range of each group, widened to contain 0 and shrunk to `share` of it.

    Symmetric: the range is +-max |w|. A group that is all zeros takes the range +-1.
    """
    width = width_of(group, w.shape[1])
    w = jnp.pad(w, [(0, 0), (0, -w.shape[1] % width)]).reshape(w.shape[0], -1, width)
    lo, hi = jnp.minimum(w.min(-1), 0.0), jnp.maximum(w.max(-1), 0.0)
    if symmetric:
        hi = jnp.maximum(-lo, hi)
        lo = -hi
    is_empty = hi == lo
    lo, hi = jnp.where(is_empty, -1.0, lo) * share, jnp.where(is_empty, 1.0, hi) * share
    s = (hi - lo) / (q_max - q_min)
    return s, (jnp.zeros_like(s) if symmetric else lo - s * q_min)


def nearest(w, s, z, q_min, q_max) -> jax.Array:
    """f[out, in]: clip(round((w - z) / s)), halves up; a negative s keeps its sign, s = 0 gives the code 0."""
    s, z = expand(s, w.shape), expand(z, w.shape)
    u = (w - z) / jnp.where(s == 0, 1.0, s)
    return jnp.clip(jnp.floor(jnp.where(s == 0, 0.0, u) + 0.5), q_min, q_max)


def shrink_search(
    w, h, bits, group: int = 0, *, symmetric: bool = False, grid: int = 200, maxshrink: float = 0.8
):
    """(s, z) f[out, G]: the range shrunk to the share p = 1 - i / grid of least error in the norm of h.

    Every row tries all i < maxshrink * grid, one p for all its groups, with rounding to nearest
    (halves up) onto signed codes in [-2^(b-1), 2^(b-1) - 1]. Of equal errors the widest range wins.

    >>> s, z = shrink_search(jnp.array([[-2.0, -1.0, 0.0, 1.0]]), jnp.eye(4), 2)
    >>> s.round(4).tolist(), z.round(4).tolist()
    ([[1.0]], [[0.0]])
    """
    return best_range(w, h, *rails(bits), group, symmetric, grid, maxshrink)


def best_range(
    w, h, q_min, q_max, group: int = 0, symmetric: bool = False, grid: int = 200, maxshrink=0.8
):
    """`shrink_search` with rails (arrays, if they are to vary under vmap) instead of bits."""
    width = width_of(group, w.shape[1])
    h, w = pad_groups(width, h, w.astype(h.dtype))

    def body(i, best):
        s, z = minmax(w, q_min, q_max, width, symmetric, 1.0 - i / grid)
        q = nearest(w, s, z, q_min, q_max)
        err = row_error(q * expand(s, w.shape) + expand(z, w.shape), w, h)
        better = err < best[0]
        return tuple(
            jnp.where(better[:, None] if a.ndim == 2 else better, a, b)
            for a, b in zip((err, s, z), best, strict=True)
        )

    start = minmax(w, q_min, q_max, width, symmetric)
    first = (jnp.full(w.shape[0], jnp.inf, h.dtype), *(a.astype(h.dtype) for a in start))
    _, s, z = jax.lax.fori_loop(0, int(maxshrink * grid), body, first)
    return s, z
