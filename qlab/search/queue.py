"""OPEN: an exact priority queue in fixed-size arrays that pops the k best at once.

Entries are written once, row by row, and never move; a row is one node (W = 1) or the W outgoing
edges of one node, and all its entries share g. Over the entries stands a tree of block minima, so a
pop walks down from the top with a beam of k blocks and a push refreshes only the blocks it touched:
no operation reads the whole queue. This is exact because each of the k best entries lies in a block
whose own best is among the k best of its level.

Order: smaller f, then with "lifo" larger g and later written, with "fifo" earlier written.
Letters: R rows, W entries a row, k popped at once, c entries a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.search.pinning import pin

INF = jnp.inf
_TOP_BIT = jnp.uint32(0x80000000)


class Queue(NamedTuple):
    """levels_f[0]: f32[R * W] are the entries, inf = none; level i + 1 holds the minima of blocks of level i.

    levels_g[i] is the g of the best entry below each element of level i; at the row level it is given,
    above it is maintained. `rows` counts rows written: what lies beyond was never written or belongs to
    an earlier search, and is masked everywhere, so a queue is emptied by rows = 0.
    """

    levels_f: tuple[jax.Array, ...]
    levels_g: tuple[jax.Array, ...]  # f32[R], then one per level above
    node: jax.Array  # i32[R]
    rows: jax.Array  # i32[]
    num_open: jax.Array  # i32[]


class Shape(NamedTuple):
    """Static layout. fanouts[i]: elements of level i per element of level i + 1."""

    width: int
    fanouts: tuple[int, ...]
    sizes: tuple[int, ...]


def layout(max_rows: int, width: int, k: int) -> Shape:
    """Levels for `max_rows` rows of `width` entries when k entries are popped at once.

    >>> layout(1000, 1, 1).sizes
    (1024, 8)
    >>> layout(4096, 4, 1000).sizes
    (16384, 4096)
    """
    # One pop reads about levels * k * c elements: wide blocks for single pops, narrow ones for batches.
    c = 128 if k == 1 else (32 if k <= 32 else 8)
    fanouts = [width] if width > 1 else []
    rows = max_rows
    while rows > max(c, k * c):
        fanouts.append(c)
        rows = -(-rows // c)
    for _ in range(len(fanouts) - (width > 1)):
        rows *= c
    sizes = [rows * width]
    for f in fanouts:
        sizes.append(sizes[-1] // f)
    return Shape(width, tuple(fanouts), tuple(sizes))


def queue_init(shape: Shape) -> Queue:
    rows = shape.sizes[0] // shape.width
    above = shape.sizes[1:] if shape.width == 1 else shape.sizes[2:]
    return Queue(
        levels_f=tuple(jnp.full(n, INF, jnp.float32) for n in shape.sizes),
        levels_g=tuple(jnp.zeros(n, jnp.float32) for n in (rows, *above)),
        node=jnp.zeros(rows, jnp.int32),
        rows=jnp.int32(0),
        num_open=jnp.int32(0),
    )


def _g_of(q: Queue, shape: Shape, level: int) -> jax.Array | None:
    """g at a level; None at the entry level of wide rows, where it is constant within a block."""
    return q.levels_g[level] if shape.width == 1 else (q.levels_g[level - 1] if level else None)


def _used(q: Queue, shape: Shape, level: int) -> jax.Array:
    n = q.rows * shape.width
    for f in shape.fanouts[:level]:
        n = -(-n // f)
    return n


def sortable(x: jax.Array) -> jax.Array:
    """u32 with the order of f32 x (no NaN; -0 is below +0)."""
    u = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(u >> 31 == 1, ~u, u | _TOP_BIT)


def _kth_smallest(u: jax.Array, mask: jax.Array, k: jax.Array, skip: jax.Array) -> jax.Array:
    """The k-th smallest of u[mask] by bisection on bits: counting vectorises, sorting does not."""

    def body(i, low):
        trial = low | (_TOP_BIT >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(mask & (u < trial), dtype=jnp.int32) < k, trial, low)

    top = jnp.uint32(0xFFFFFFFF)
    return jax.lax.fori_loop(0, jnp.where(skip, 0, 32), body, jnp.where(skip, top, jnp.uint32(0)))


def select(f: jax.Array, g: jax.Array, k: int, lifo: bool) -> tuple[jax.Array, jax.Array]:
    """Indices i32[k] of the k best of f32[n], in index order, and which of them exist.

    Best is by (f, -g, -index), or by (f, index) without lifo. Non-existing ones (fewer than k finite f)
    come last with index 0.
    """
    n = f.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    if k == 1:
        best_f = f.min()
        tied = f == best_f
        if lifo:
            tied &= g == jnp.where(tied, g, -INF).max()
        i = jnp.where(tied, index, -1).max() if lifo else jnp.where(tied, index, n).min()
        exists = best_f < INF
        return jnp.where(exists, i, 0)[None], exists[None]
    finite = f < INF
    u, few = sortable(f), jnp.sum(finite, dtype=jnp.int32) <= k
    cut = _kth_smallest(u, finite, jnp.int32(k), few)
    below, tied = finite & (u < cut), finite & (u == cut)
    need = k - jnp.sum(below, dtype=jnp.int32)
    if lifo:
        v = sortable(-g)
        cut_g = _kth_smallest(v, tied, need, jnp.sum(tied, dtype=jnp.int32) <= need)
        below |= tied & (v < cut_g)
        tied &= v == cut_g
        need = k - jnp.sum(below, dtype=jnp.int32)
    rank = jnp.cumsum(tied.astype(jnp.int32))
    chosen = below | (tied & ((rank > rank[-1] - need) if lifo else (rank <= need)))
    (i,) = jnp.nonzero(chosen, size=k, fill_value=0)
    return i.astype(jnp.int32), jnp.arange(k) < jnp.sum(chosen, dtype=jnp.int32)


def _refresh(
    q: Queue, shape: Shape, level: int, f: jax.Array, g: jax.Array | None, first: jax.Array
):
    """(min f, its largest g) of blocks; f: f32[b, c] read at level, `first` i32[b] their first index."""
    c = shape.fanouts[level]
    live = first[:, None] + jnp.arange(c) < _used(q, shape, level)
    f = jnp.where(live, f, INF)
    best = f.min(1)
    if g is None:
        return best, None
    return best, jnp.where(f == best[:, None], g, -INF).max(1)


def pop(q: Queue, shape: Shape, k: int, lifo: bool):
    """Takes the k best entries out.

    Returns:
      (queue, entry i32[k], exists bool[k], f f32[k]); row = entry // W. Entries come in index order.
    """
    top = len(shape.fanouts)
    size = shape.sizes[top]
    f = jnp.where(jnp.arange(size) < _used(q, shape, top), q.levels_f[top], INF)
    g = _g_of(q, shape, top)
    if g is None:  # a queue of one level with wide rows
        g = jnp.repeat(q.levels_g[0], shape.width)
    at, exists = select(f, g, min(k, size), lifo)
    for level in range(top - 1, -1, -1):
        c = shape.fanouts[level]
        index = at[:, None] * c + jnp.arange(c, dtype=jnp.int32)
        f = q.levels_f[level].reshape(-1, c)[at]
        f = jnp.where(exists[:, None] & (index < _used(q, shape, level)), f, INF)
        g = _g_of(q, shape, level)
        g = (
            jnp.broadcast_to(q.levels_g[0][at][:, None], f.shape)
            if g is None
            else g.reshape(-1, c)[at]
        )
        pick, exists = select(f.ravel(), g.ravel(), min(k, f.size), lifo)
        at, exists = pin((index.ravel()[pick], exists), q.rows)
    if at.shape[0] < k:
        pad = k - at.shape[0]
        at, exists = jnp.pad(at, (0, pad)), jnp.pad(exists, (0, pad))
    values, exists = pin((jnp.where(exists, q.levels_f[0][at], INF), exists), q.rows)
    levels_f, levels_g = list(q.levels_f), list(q.levels_g)
    levels_f[0] = levels_f[0].at[jnp.where(exists, at, shape.sizes[0])].set(INF, mode="drop")
    up = at
    for level in range(top):
        c = shape.fanouts[level]
        up = up // c
        g = _g_of(q, shape, level)
        if g is not None:  # levels_g of this level may have changed one step before
            g = levels_g[level if shape.width == 1 else level - 1].reshape(-1, c)[up]
        block = levels_f[level].reshape(-1, c)[up]
        best, best_g = pin(_refresh(q, shape, level, block, g, up * c), q.rows)
        to = jnp.where(exists, up, shape.sizes[level + 1])
        levels_f[level + 1] = levels_f[level + 1].at[to].set(best, mode="drop")
        if best_g is not None:
            j = level + 1 if shape.width == 1 else level
            levels_g[j] = levels_g[j].at[to].set(best_g, mode="drop")
    taken = jnp.sum(exists, dtype=jnp.int32)
    q = q._replace(levels_f=tuple(levels_f), levels_g=tuple(levels_g), num_open=q.num_open - taken)
    return q, at, exists, values


def push(q: Queue, shape: Shape, f: jax.Array, g: jax.Array, node: jax.Array, count: jax.Array):
    """Writes the first `count` of K rows: f f32[K, W], g f32[K], node i32[K].

    The caller keeps rows + K <= R. Entries with f = inf are not in the queue (dead ends).
    """
    k, w = f.shape
    f = jnp.where((jnp.arange(k) < count)[:, None], f, INF)
    start = q.rows
    put = jax.lax.dynamic_update_slice
    levels_f, levels_g = list(q.levels_f), list(q.levels_g)
    levels_f[0] = put(levels_f[0], f.ravel(), (start * w,))
    levels_g[0] = put(levels_g[0], g, (start,))
    q = q._replace(
        node=put(q.node, node, (start,)),
        rows=start + count,
        num_open=q.num_open + jnp.sum(f < INF, dtype=jnp.int32),
    )
    first, span = start * w, k * w
    for level, c in enumerate(shape.fanouts):
        above = shape.sizes[level + 1]
        exact = level == 0 and w > 1  # rows are whole blocks
        span = min(above, k if exact else (span + c - 2) // c + 1)
        first = jnp.minimum(first // c, above - span)
        block = jax.lax.dynamic_slice(levels_f[level], (first * c,), (span * c,)).reshape(span, c)
        g_level = None
        if not exact:
            j = level if w == 1 else level - 1
            g_level = jax.lax.dynamic_slice(levels_g[j], (first * c,), (span * c,)).reshape(span, c)
        at = (first + jnp.arange(span)) * c
        best, best_g = pin(_refresh(q, shape, level, block, g_level, at), q.rows)
        levels_f[level + 1] = put(levels_f[level + 1], best, (first,))
        if best_g is not None:
            j = level + 1 if w == 1 else level
            levels_g[j] = put(levels_g[j], best_g, (first,))
    return q._replace(levels_f=tuple(levels_f), levels_g=tuple(levels_g))
