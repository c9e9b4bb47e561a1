"""CLOSED: all states met, with an open-addressing hash index, in fixed-size arrays.

States are stored as 32-bit words in the order met; a node is its row number. The index maps the
64-bit hash of a state (one u32 to start, one odd u32 to step) to its node, and a hit counts only when
all words agree, so a collision costs a probe and never a state.
Letters: M rows, N slots (a power of two), n words a state, K states looked up at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.pinning import pin

_EMPTY = np.int32(2**31 - 1)


class Table(NamedTuple):
    slots: jax.Array  # i32[N]: base + node; anything >= base + M is empty
    base: jax.Array  # i32[], lowered by M to forget everything at once
    words: jax.Array  # u32[M, n]
    g: jax.Array  # f32[M], cost of the best way found
    parent: jax.Array  # i32[M], -1 at the root
    action: jax.Array  # i32[M], the action from the parent
    mark: jax.Array  # i32[M], scratch, 0 between calls
    size: jax.Array  # i32[]


def num_words(state: jax.ShapeDtypeStruct | jax.Array) -> int:
    """32-bit words that hold one state."""
    bits = 8 if state.dtype == jnp.bool_ else state.dtype.itemsize * 8
    return max(1, math.ceil(math.prod(state.shape) * bits / 32))


def pack(states: jax.Array) -> jax.Array:
    """u32[K, n]: the bits of states [K, ...], zero-padded to whole words.

    >>> pack(jnp.array([[1, 2, 3, 4, 5]], jnp.uint8)).tolist()
    [[67305985, 5]]
    """
    x = states.reshape(states.shape[0], -1)
    if x.dtype == jnp.complex64:
        x = jnp.stack([x.real, x.imag], -1).reshape(x.shape[0], -1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    per = max(1, 4 // x.dtype.itemsize)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % per)))
    if per > 1:
        x = x.reshape(x.shape[0], -1, per)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def unpack(words: jax.Array, state: jax.ShapeDtypeStruct) -> jax.Array:
    """The states whose bits `pack` took: words u32[K, n] -> [K, *state.shape]."""
    k, dtype = words.shape[0], state.dtype
    if dtype == jnp.complex64:
        x = jax.lax.bitcast_convert_type(words, jnp.float32).reshape(k, -1, 2)
        return jax.lax.complex(x[..., 0], x[..., 1]).reshape(k, *state.shape)
    raw = jnp.uint8 if dtype == jnp.bool_ else dtype
    x = jax.lax.bitcast_convert_type(words, raw).reshape(k, -1)
    return x[:, : math.prod(state.shape)].astype(dtype).reshape(k, *state.shape)


def hash64(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two u32[K] from u32[K, n]: a sum of mixed words, mixed again (each step is a bijection of one word)."""
    rng = np.random.default_rng(0x51AB)
    n = words.shape[1]
    odd = rng.integers(0, 2**32, (2, n), np.uint32) | np.uint32(1)
    add = rng.integers(0, 2**32, (2, n), np.uint32)

    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    def one(i):
        # Python loop over few words, one reduction over many.
        if n <= 8:
            total = jnp.zeros(words.shape[0], jnp.uint32)
            for j in range(n):
                total = (total ^ mix(words[:, j] * odd[i, j] + add[i, j])) * np.uint32(0x9E3779B1)
        else:
            total = jnp.sum(mix(words * odd[i] + add[i]) * odd[i][::-1], axis=1, dtype=jnp.uint32)
        return mix(total)

    return one(0), one(1)


def table_init(max_nodes: int, slack: int, state: jax.ShapeDtypeStruct) -> Table:
    """A table for max_nodes states; `slack` more rows take the states of a batch while they are looked up."""
    rows = max_nodes + slack
    num_slots = 1 << max(4, math.ceil(math.log2(2 * rows)))
    return Table(
        slots=jnp.full(num_slots, _EMPTY, jnp.int32),
        base=jnp.int32(0),
        words=jnp.zeros((rows, num_words(state)), jnp.uint32),
        g=jnp.zeros(rows, jnp.float32),
        parent=jnp.full(rows, -1, jnp.int32),
        action=jnp.full(rows, -1, jnp.int32),
        mark=jnp.zeros(rows, jnp.int32),
        size=jnp.int32(0),
    )


def table_clear(t: Table) -> Table:
    """Forgets all states without touching the slots: what they hold now reads as empty.

    Slots are claimed by minimum and hold base + node, so entries under an older, higher base lose
    against any claim. When base would pass the end of i32, the slots are really wiped.
    """
    rows = t.words.shape[0]
    low = t.base < -(2**31) + 3 * rows
    slots = jax.lax.fori_loop(
        0, low.astype(jnp.int32), lambda _, s: jnp.full_like(s, _EMPTY), t.slots
    )
    # min(size, 0) and not a constant 0: `pin` must not know.
    return t._replace(
        slots=slots, base=jnp.where(low, 0, t.base - rows), size=jnp.minimum(t.size, 0)
    )


def _slot(t: Table, h: jax.Array, step: jax.Array, probe: jax.Array) -> jax.Array:
    mask = jnp.uint32(t.slots.shape[0] - 1)
    return ((h + probe * step) & mask).astype(jnp.int32)


def lookup(t: Table, words: jax.Array, valid: jax.Array) -> jax.Array:
    """i32[K]: node of each state u32[K, n], -1 where it is not stored (or not valid)."""
    h, step = hash64(words)
    step |= jnp.uint32(1)

    def body(carry):
        probe, todo, found = carry
        value = t.slots[_slot(t, h, step, probe)]
        empty = value >= t.base + t.words.shape[0]
        node = jnp.where(empty, 0, value - t.base)
        same = ~empty & (t.words[node] == words).all(1)
        return probe + 1, todo & ~empty & ~same, jnp.where(todo & same, node, found)

    start = (jnp.uint32(0), valid, jnp.full(words.shape[0], -1, jnp.int32))
    return jax.lax.while_loop(lambda c: c[1].any(), body, start)[2]


def insert(t: Table, words: jax.Array, valid: jax.Array) -> tuple[Table, jax.Array, jax.Array]:
    """Finds or adds states u32[K, n]; equal states of a batch become one node.

    New nodes are numbered in batch order and get g = inf. The caller keeps size + K <= M.

    Returns:
      (table, node i32[K], is_new bool[K]); is_new marks the first of each new state; node of an
      invalid entry is meaningless.
    """
    k = words.shape[0]
    h, step = hash64(words)
    step |= jnp.uint32(1)
    # Every state first gets a provisional node, size + its place in the batch, so that a claimed slot
    # can be compared like any other; the smallest claim stays, older nodes are smaller still.
    stored = jax.lax.dynamic_update_slice(t.words, words, (t.size, jnp.int32(0)))
    claim = t.base + t.size + jnp.arange(k, dtype=jnp.int32)
    num_slots = t.slots.shape[0]

    def probe_all(carry, h, step, words, claim):
        slots, stored, probe, todo, node, at = carry
        slot = _slot(t, h, step, probe)
        # Only free slots are claimed: a smaller claim must not take one that went in an earlier round.
        free = slots[slot] >= t.base + t.words.shape[0]
        to = pin(jnp.where(todo & free, slot, num_slots), probe.astype(jnp.int32))
        slots = slots.at[to].min(claim, mode="drop")
        now = slots[slot] - t.base
        same = todo & (stored[jnp.where(todo, now, 0)] == words).all(1)
        node, at = jnp.where(same, now, node), jnp.where(same, slot, at)
        return slots, stored, probe + 1, todo & ~same, node, at

    zero = jnp.zeros(k, jnp.int32)
    few = k // 16 if k >= 1024 else 0  # when so few are left, go on with those alone
    # `stored` goes through the loops unchanged, so that it is still updated in place after them.
    carry = (t.slots, stored, jnp.uint32(0), valid, zero, zero)
    slots, stored, probe, todo, node, at = jax.lax.while_loop(
        lambda c: jnp.sum(c[3], dtype=jnp.int32) > few,
        lambda c: probe_all(c, h, step, words, claim),
        carry,
    )
    if few:
        (i,) = jnp.nonzero(todo, size=few, fill_value=0)
        left = jnp.arange(few) < jnp.sum(todo, dtype=jnp.int32)
        small = (h[i], step[i], words[i], claim[i])
        slots, stored, _, _, node_i, at_i = jax.lax.while_loop(
            lambda c: c[3].any(),
            lambda c: probe_all(c, *small),
            (slots, stored, probe, left, jnp.zeros(few, jnp.int32), jnp.zeros(few, jnp.int32)),
        )
        to = jnp.where(left, i, k)
        node, at = node.at[to].set(node_i, mode="drop"), at.at[to].set(at_i, mode="drop")
    is_new = valid & (node == t.size + jnp.arange(k))
    rank = jnp.cumsum(is_new.astype(jnp.int32)) - 1
    count = jnp.sum(is_new, dtype=jnp.int32)
    # Close the gaps that the duplicates left.
    place = node - t.size
    node = jnp.where(place >= 0, t.size + rank[jnp.maximum(place, 0)], node)
    slots = slots.at[jnp.where(is_new, at, num_slots)].set(t.base + node, mode="drop")
    (order,) = jnp.nonzero(is_new, size=k, fill_value=0)
    words, node, is_new, size = pin((words[order], node, is_new, t.size), t.size)
    put = jax.lax.dynamic_update_slice
    table = t._replace(
        slots=slots,
        words=put(stored, words, (size, jnp.int32(0))),
        g=put(t.g, jnp.full(k, jnp.inf, t.g.dtype), (size,)),
        size=size + count,
    )
    return table, node, is_new


def relax(
    t: Table, node: jax.Array, g: jax.Array, parent: jax.Array, action: jax.Array, valid: jax.Array
) -> tuple[Table, jax.Array]:
    """Lowers g of nodes where g: f32[K] is strictly smaller; bool[K] marks the one winner per node.

    Of several equal offers in a batch the first wins.
    """
    k, rows = g.shape[0], t.words.shape[0]
    better = pin(valid & (g < t.g[node]), t.size)
    best = t.g.at[jnp.where(better, node, rows)].min(g, mode="drop")
    better = pin(better & (g == best[node]), t.size)
    to = jnp.where(better, node, rows)
    turn = k - jnp.arange(k, dtype=jnp.int32)
    mark = t.mark.at[to].max(turn, mode="drop")
    win, to = pin((better & (mark[node] == turn), to), t.size)
    mark = mark.at[to].set(0, mode="drop")
    to = jnp.where(win, node, rows)
    parent = t.parent.at[to].set(parent, mode="drop")
    action = t.action.at[to].set(action, mode="drop")
    return t._replace(g=best, mark=mark, parent=parent, action=action), win
