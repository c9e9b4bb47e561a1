"""Shares of ranges searched jointly over a block of layers, and the partition of a net into such blocks.

Layer i of a block is layer(i, state, share) -> state, which rounds its input on `share` times its range; i is traced, so one
compiled program serves blocks of all lengths. A block is judged by the loss of its last state. Any method that
searches clipping ratios can use this.

Letters: P = candidate shares, n = layers of a block (traced, at most `room`), L = layers of a net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Layer = Callable[[Any, Any, jax.Array], Any]
Partition = tuple[tuple[int, int], ...]
EXHAUSTIVE = 343  # combinations up to which all are tried: 7^3


class Found(NamedTuple):
    """shares: f32[room], 1 behind the block's n layers. loss: f32[]."""

    shares: jax.Array
    loss: jax.Array


class Cost(NamedTuple):
    """What a search took. blocks: blocks of candidates run, each from its input to its loss; layers: layers run, where
    candidates with a common beginning share it."""

    blocks: int
    layers: int

    def __add__(self, other: Any) -> Cost:
        return Cost(self.blocks + other.blocks, self.layers + other.layers)


def joint_range_search(
    layer: Layer, x: Any, loss: Callable[[Any], jax.Array], grid: jax.Array, length, room: int
) -> Found:
    """The best of all P^n combinations of shares; of equal ones the first in the order of the grid.

    The combinations are the leaves of a tree, walked depth first: a common beginning is run once.

    Args:
      layer: see above. x: state before the block, a pytree whose form no layer changes. loss: state behind it -> f32[].
      grid: f32[P]. length: n, an int or i32[] from 1 to room.

    >>> found = joint_range_search(
    ...     lambda i, y, share: y + share, 0.0, lambda y: (y - 1.4) ** 2, jnp.array([1.0, 0.9, 0.5]), 2, 3
    ... )
    >>> [round(float(s), 1) for s in found.shares]
    [0.9, 0.5, 1.0]
    """
    last = jnp.asarray(length, jnp.int32) - 1
    places = jnp.arange(room)

    def step(carry):
        at, digits, states, best, least = carry
        state = layer(at, jax.tree.map(lambda a: a[at], states), grid[digits[at]])
        leaf = at == last
        value = jnp.where(leaf, loss(state), jnp.inf)
        best = jnp.where(value < least, digits, best)
        least = jnp.minimum(value, least)
        # On to the next leaf: the deepest layer up to here that has a share left, which moves on by one.
        left = (digits < len(grid) - 1) & (places <= at)
        turn = jnp.where(left, places, -1).max()
        after = jnp.where(places < turn, digits, jnp.where(places == turn, digits + 1, 0))
        states = jax.tree.map(lambda a, b: a.at[at + 1].set(b), states, state)
        at = jnp.where(leaf, turn, at + 1)
        return at, jnp.where(leaf, after, digits), states, best, least

    zeros = jnp.zeros(room, jnp.int32)
    states = jax.tree.map(
        lambda a: jnp.zeros((room + 1, *jnp.shape(a)), jnp.result_type(a)).at[0].set(a), x
    )
    start = (jnp.int32(0), zeros, states, zeros, jnp.float32(jnp.inf))
    *_, best, least = jax.lax.while_loop(lambda carry: carry[0] >= 0, step, start)
    return Found(jnp.where(places <= last, grid[best], 1.0), least)


def run_layers(layer: Layer, x: Any, shares: jax.Array, length) -> Any:
    """The state behind the first `length` layers."""
    return jax.lax.fori_loop(0, length, lambda i, y: layer(i, y, shares[i]), x)


def coordinate_search(
    layer: Layer,
    x: Any,
    loss: Callable[[Any], jax.Array],
    grid: jax.Array,
    start: jax.Array,
    length,
    sweeps: int = 2,
) -> Found:
    """Shares improved one at a time, each over the whole grid, from start f32[room]; never worse than start."""
    num = len(grid)

    def try_one(t, best: Found) -> Found:
        """The start itself, then coordinate after coordinate each share of the grid."""
        place = (t - 1) // num % length
        tried = jnp.where(t == 0, best.shares, best.shares.at[place].set(grid[(t - 1) % num]))
        value = loss(run_layers(layer, x, tried, length))
        better = value < best.loss
        return Found(jnp.where(better, tried, best.shares), jnp.where(better, value, best.loss))

    first = Found(start, jnp.float32(jnp.inf))
    return jax.lax.fori_loop(0, 1 + sweeps * length * num, try_one, first)


def search_cost(num: int, length: int, sweeps: int = 2, exhaustive: int = EXHAUSTIVE) -> Cost:
    """Of one block: all num^length combinations if they are at most `exhaustive`, else coordinate search.

    >>> search_cost(7, 3), search_cost(7, 4)
    (Cost(blocks=343, layers=399), Cost(blocks=57, layers=228))
    """
    if num**length <= exhaustive:
        return Cost(num**length, sum(num**i for i in range(1, length + 1)))
    tried = 1 + sweeps * length * num
    return Cost(tried, tried * length)


def partition_by_proxy(proxy: Any, tau: float = 1.0, max_len: int = 3) -> Partition:
    """Blocks (first, last) of layers: k + 1 joins k where proxy[k] >= tau * mean(proxy), up to max_len layers.

    Args:
      proxy: f32[L], of layer k for its dependency with k + 1.
    Raises:
      ValueError: no layer, a proxy that is not finite, or max_len < 1.

    >>> partition_by_proxy([3.0, 3.0, 3.0, 1.0, 1.0])
    ((0, 2), (3, 3), (4, 4))
    """
    values = np.asarray(proxy, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"proxy of shape {values.shape} is no finite number for each layer")
    if max_len < 1:
        raise ValueError(f"max_len={max_len}; use at least 1")
    joins = values >= tau * values.mean()
    blocks = [[0, 0]]
    for k in range(len(values) - 1):
        if joins[k] and k + 1 - blocks[-1][0] < max_len:
            blocks[-1][1] = k + 1
        else:
            blocks.append([k + 1, k + 1])
    return tuple((i, j) for i, j in blocks)


def fixed_partition(num: int, length: int) -> Partition:
    """Blocks of `length` layers, the last one of what is left.

    >>> fixed_partition(5, 2)
    ((0, 1), (2, 3), (4, 4))
    """
    if length < 1:
        raise ValueError(f"blocks of {length} layers; use at least 1")
    return tuple((i, min(i + length, num) - 1) for i in range(0, num, length))


def shuffled_partition(blocks: Partition, key: jax.Array) -> Partition:
    """The same lengths in random order: what a partition is worth beyond its lengths."""
    lengths = np.array([j - i + 1 for i, j in blocks])
    ends = np.cumsum(lengths[np.asarray(jax.random.permutation(key, len(lengths)))])
    return tuple(
        (int(e - n), int(e - 1)) for e, n in zip(ends, np.diff(ends, prepend=0), strict=True)
    )
