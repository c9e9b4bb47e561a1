"""Lights Out on n x n cells: pressing a cell flips it and its neighbours; the goal is all dark.

A state is u8[n * n], 1 = lit. Presses commute and undo themselves, so a solution is a set of cells x
with M x = s over GF(2), and the optimum is the lightest of the solutions x0 + kernel(M).
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.problem import Problem, with_macros


@functools.cache
def masks(n: int) -> np.ndarray:
    """u8[n * n, n * n]: row a is what pressing cell a flips (the matrix is symmetric)."""
    row, col = np.divmod(np.arange(n * n), n)
    near = np.abs(row[:, None] - row) + np.abs(col[:, None] - col)
    return (near <= 1).astype(np.uint8)


@functools.cache
def lights_out(n: int, macro_depth: int = 1, dedup: bool = True) -> Problem:
    """Unit costs; macro_depth > 1 adds the presses of up to so many distinct cells.

    >>> [lights_out(4, d).num_actions for d in (1, 2, 3)]
    [16, 136, 696]
    """
    flips = masks(n)
    base = Problem(
        next_state=lambda s, a: s ^ jnp.asarray(flips)[a],
        cost=lambda s, a: jnp.float32(1),
        is_goal=lambda s: (s == 0).all(),
        encode=lambda s: 2.0 * s.astype(jnp.float32) - 1.0,
        num_actions=n * n,
    )
    return base if macro_depth == 1 else with_macros(base, macro_depth, dedup, commute=True)


def scramble(key: jax.Array, n: int, k: jax.Array, k_max: int) -> jax.Array:
    """The goal after k <= k_max random presses: u8[n * n]."""
    cells = jax.random.randint(key, (k_max,), 0, n * n)
    pressed = jax.nn.one_hot(cells, n * n, dtype=jnp.float32) * (jnp.arange(k_max) < k)[:, None]
    return (pressed.sum(0) @ jnp.asarray(masks(n), jnp.float32)).astype(jnp.int32).astype(
        jnp.uint8
    ) % 2


def rank(s: jax.Array) -> jax.Array:
    """i32[]: the bits of a state as a number, cell 0 lowest."""
    return jnp.sum(s.astype(jnp.int32) << jnp.arange(s.shape[0]), dtype=jnp.int32)


def kernel(n: int) -> np.ndarray:
    """u8[d, n * n]: a basis of the press sets that change nothing (d = 4 for n = 4, 2 for n = 5)."""
    m = n * n
    a = np.concatenate([masks(n), np.eye(m, dtype=np.uint8)], 1)  # rows: [M x | x]
    done = 0
    for col in range(m):
        pivots = np.flatnonzero(a[done:, col]) + done
        if len(pivots):
            a[[done, pivots[0]]] = a[[pivots[0], done]]
            others = np.flatnonzero(a[:, col])
            a[others[others != done]] ^= a[done]
            done += 1
    return a[done:, m:]


def solve(states: np.ndarray, n: int) -> np.ndarray:
    """Fewest presses for each state u8[N, n * n]: i32[N], -1 if it cannot be solved."""
    m = n * n
    a = np.concatenate(
        [masks(n), states.T.astype(np.uint8)], 1
    )  # one elimination for all right sides
    pivot_cols: list[int] = []
    for col in range(m):
        done = len(pivot_cols)
        rows = np.flatnonzero(a[done:, col]) + done
        if len(rows):
            a[[done, rows[0]]] = a[[rows[0], done]]
            others = np.flatnonzero(a[:, col])
            a[others[others != done]] ^= a[done]
            pivot_cols.append(col)
    done = len(pivot_cols)
    x = np.zeros((m, states.shape[0]), np.uint8)
    x[pivot_cols] = a[:done, m:]
    solvable = ~a[done:, m:].any(0)
    basis = kernel(n)
    best = np.full(states.shape[0], m + 1)
    for coefficients in itertools.product((0, 1), repeat=len(basis)):
        shift = (
            (np.asarray(coefficients, np.uint8) @ basis) % 2
            if len(basis)
            else np.zeros(m, np.uint8)
        )
        best = np.minimum(best, (x ^ shift[:, None].astype(np.uint8)).sum(0, dtype=np.int64))
    return np.where(solvable, best, -1).astype(np.int32)


@functools.cache
def distances(n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """All states of a small board (n <= 4): (fewest presses by rank i8[2^(n n)], -1 unsolvable; solvable states)."""
    bits = np.arange(2 ** (n * n))
    states = ((bits[:, None] >> np.arange(n * n)) & 1).astype(np.uint8)
    dist = solve(states, n).astype(np.int8)
    return dist, states[dist >= 0]
