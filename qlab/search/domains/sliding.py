"""Sliding-tile puzzles: 8-puzzle (n = 3), 15-puzzle (n = 4); exact distances for n = 3.

A state is u8[n * n], the tile in each cell row by row, 0 the blank; the goal is 1, 2, ..., 0.
Actions move the blank: up, down, left, right. A move off the board leaves the state as it is.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.problem import Problem, with_macros

UNDO = (1, 0, 3, 2)


def goal_state(n: int) -> jax.Array:
    """u8[n * n]."""
    return jnp.asarray((np.arange(n * n) + 1) % (n * n), jnp.uint8)


def _targets(n: int) -> np.ndarray:
    """i32[n * n, 4]: where the blank goes; its own cell if the move is illegal."""
    row, col = np.divmod(np.arange(n * n), n)
    up = np.where(row > 0, row * n + col - n, row * n + col)
    down = np.where(row < n - 1, row * n + col + n, row * n + col)
    left = np.where(col > 0, row * n + col - 1, row * n + col)
    right = np.where(col < n - 1, row * n + col + 1, row * n + col)
    return np.stack([up, down, left, right], 1).astype(np.int32)


@functools.cache
def sliding(n: int, macro_depth: int = 1, dedup: bool = True) -> Problem:
    """The n x n puzzle with unit costs; macro_depth > 1 adds all words of up to so many moves.

    >>> sliding(3).num_actions, sliding(3, 2).num_actions, sliding(3, 3).num_actions
    (4, 16, 52)
    >>> sliding(3).next_state(goal_state(3), 0).tolist()
    [1, 2, 3, 4, 5, 0, 7, 8, 6]
    """
    cells = np.arange(n * n, dtype=np.int32)
    weights = cells.astype(np.uint8)
    table = _targets(n)
    goal = np.asarray((cells + 1) % (n * n), np.uint8)

    def next_state(s, a):
        # Masks and sums instead of gathers: they vectorise over a batch.
        at = jnp.sum(jnp.where(s == 0, weights, 0), dtype=jnp.uint8).astype(jnp.int32)
        to = jnp.asarray(table)[at, a]
        tile = jnp.sum(jnp.where(cells == to, s, 0), dtype=jnp.uint8)
        return jnp.where(cells == to, 0, jnp.where(cells == at, tile, s)).astype(jnp.uint8)

    base = Problem(
        next_state=next_state,
        cost=lambda s, a: jnp.float32(1),
        is_goal=lambda s: (s == goal).all(),
        encode=lambda s: jax.nn.one_hot(s, n * n).ravel(),
        num_actions=4,
    )
    return base if macro_depth == 1 else with_macros(base, macro_depth, dedup, undo=UNDO)


def scramble(key: jax.Array, n: int, k: jax.Array, k_max: int) -> jax.Array:
    """The goal after k <= k_max random base moves (illegal ones do nothing): u8[n * n]."""
    # Four actions: two bits of a random byte.
    actions = (jax.random.bits(key, (k_max,), jnp.uint8) & 3).astype(jnp.int32)
    moves = jnp.arange(k_max), actions
    if n == 3:  # all states are known: walk on their numbers, one lookup a move
        to, states = jnp.asarray(neighbours()), jnp.asarray(distances()[1])
        walk = lambda at, x: (jnp.where(x[0] < k, to[at, x[1]], at), None)  # noqa: E731
        return states[jax.lax.scan(walk, jnp.int32(0), moves)[0]]
    p = sliding(n)
    move = lambda s, x: (jnp.where(x[0] < k, p.next_state(s, x[1]), s), None)  # noqa: E731
    return jax.lax.scan(move, goal_state(n), moves)[0]


@functools.cache
def walk_law(k_max: int) -> np.ndarray:
    """f64[181440]: law of the 8-puzzle's state after U{0..k_max} random moves, states as in `distances`."""
    to = neighbours()  # a move and its undo are equally likely, so the walk's matrix is symmetric
    now = np.zeros(len(to))
    now[0] = 1.0
    total = now.copy()
    for _ in range(k_max):
        now = now[to].mean(1)
        total += now
    return total / (k_max + 1)


def scrambles8(key: jax.Array, n: int, k_max: int) -> jax.Array:
    """n states of the 8-puzzle, each after U{0..k_max} random base moves: u8[n, 9].

    Drawn from the law of the walk, 18 look-ups a state instead of k_max sequential ones.
    """
    law = np.cumsum(walk_law(k_max))
    bounds = np.minimum(law / law[-1] * 2.0**32, 2.0**32 - 1).astype(np.uint32)
    u = jax.random.bits(key, (n,), jnp.uint32)
    at = jnp.searchsorted(jnp.asarray(bounds[:-1]), u, side="right")
    return jnp.asarray(distances()[1])[at]


@functools.cache
def manhattan(n: int) -> np.ndarray:
    """f32[n^2 * n^2]: dotted with the one-hot encoding it gives the sum of the tiles' distances."""
    d = np.zeros((n * n, n * n), np.float32)
    for cell, tile in itertools.product(range(n * n), range(1, n * n)):
        d[cell, tile] = abs(cell // n - (tile - 1) // n) + abs(cell % n - (tile - 1) % n)
    return d.ravel()


def rank(s: jax.Array) -> jax.Array:
    """i32[]: the index of a permutation u8[m] in lexicographic order.

    >>> int(rank(jnp.array([1, 0, 2], jnp.uint8)))
    2
    """
    m = s.shape[0]
    x = s.astype(jnp.int32)
    later = jnp.triu(jnp.ones((m, m), jnp.int32), 1)
    digits = jnp.sum((x[:, None] > x[None, :]) * later, 1)
    factorials = np.cumprod([1, *range(1, m)])[::-1].astype(np.int32)
    return jnp.sum(digits * factorials, dtype=jnp.int32)


def ranks(s: np.ndarray) -> np.ndarray:
    """i64[N]: `rank` of u8[N, m], on the host."""
    m = s.shape[1]
    out = np.zeros(len(s), np.int64)
    for i in range(m - 1):
        out = out * (m - i) + (s[:, i + 1 :] < s[:, i : i + 1]).sum(1)
    return out


@functools.cache
def distances() -> tuple[np.ndarray, np.ndarray]:
    """The 8-puzzle whole: (moves to the goal by rank i8[9!], -1 if unreachable; states u8[181440, 9]).

    States come in breadth-first order, so their distances never fall.
    """
    targets = _targets(3)
    dist = np.full(362880, -1, np.int8)
    layer = np.asarray([[1, 2, 3, 4, 5, 6, 7, 8, 0]], np.uint8)
    dist[ranks(layer)] = 0
    layers = [layer]
    depth = 0
    while len(layer):
        depth += 1
        at = layer.argmin(1)
        lines = np.arange(len(layer))
        children = []
        for a in range(4):
            to = targets[at, a]
            child = layer.copy()
            child[lines, at] = layer[lines, to]
            child[lines, to] = 0
            children.append(child)
        children = np.concatenate(children)
        found, first = np.unique(ranks(children), return_index=True)
        first = first[dist[found] < 0]
        layer = children[np.sort(first)]
        dist[ranks(layer)] = depth
        if len(layer):
            layers.append(layer)
    return dist, np.concatenate(layers)


@functools.cache
def neighbours() -> np.ndarray:
    """i32[181440, 4]: the number of the state after each move, states numbered as in `distances`."""
    states = distances()[1]
    number = np.zeros(362880, np.int32)
    number[ranks(states)] = np.arange(len(states))
    at, lines = states.argmin(1), np.arange(len(states))
    out = np.zeros((len(states), 4), np.int32)
    for a in range(4):
        to = _targets(3)[at, a]
        child = states.copy()
        child[lines, at] = states[lines, to]
        child[lines, to] = 0
        out[:, a] = number[ranks(child)]
    return out
