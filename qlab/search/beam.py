"""Searches without a queue, the baselines of best-first search: beam (width 1 is greedy) and random walks.

Both take what `search_many` takes and count the same way: a node is a state made by next_state.
Letters: B beam width or walkers, A actions, L longest path.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search import problem as P
from qlab.search.problem import Problem, SearchResult
from qlab.search.table import hash64, pack

INF = jnp.inf


def _result(s, found, cost, path, generated, inputs, iters, limit) -> SearchResult:
    status = jnp.where(found, P.SOLVED, jnp.where(generated >= limit, P.NODE_LIMIT, P.EXHAUSTED))
    return SearchResult(
        path=jnp.where(found, path, -1), cost=jnp.where(found, cost, INF), solved=found,
        num_generated=generated, num_net_inputs=inputs, num_iters=iters, max_open=jnp.int32(s),
        status=status.astype(jnp.int32), num_nodes=generated,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("problem", "width", "max_length"))
def beam(
    problem: Problem, heuristic, starts: jax.Array, key: jax.Array | None = None, *, width: int,
    max_length: int, node_limit=2**30,
) -> SearchResult:  # fmt: skip
    """Of the B A edges at a depth the best B by g + Q go on; equal children of a level are one.

    Ends with the cheapest goal of the first level that has one, as "exhausted" after max_length levels.
    heuristic: enc f32[E, m] -> Q f32[E, A], the transition cost inside. key: not used.
    """
    del key
    p, a = problem, problem.num_actions

    def level(c):
        i, states, g, paths, _, _, generated, inputs = c
        f = g[:, None] + heuristic(jax.vmap(p.encode)(states))
        score, edge = jax.lax.top_k(-jnp.where(jnp.isfinite(g)[:, None], f, INF).ravel(), width)
        parent, action = edge // a, (edge % a).astype(jnp.int32)
        alive = score > -INF
        before = states[parent]
        states = jax.vmap(p.next_state)(before, action)
        g_new = jnp.where(alive, g[parent] + jax.vmap(p.cost)(before, action), INF)
        paths = paths[parent].at[:, i].set(jnp.where(alive, action, -1))
        x, y = hash64(pack(states))
        twin = (x[:, None] == x[None]) & (y[:, None] == y[None]) & alive[None]
        better = (g_new[None] < g_new[:, None]) | (
            (g_new[None] == g_new[:, None]) & (jnp.arange(width)[None] < jnp.arange(width)[:, None])
        )
        goal = jnp.where(jax.vmap(p.is_goal)(states), g_new, INF)
        g_next = jnp.where((twin & better).any(1), INF, g_new)
        at = jnp.argmin(goal)
        return (
            i + 1, states, g_next, paths, goal[at], paths[at],
            generated + jnp.sum(alive, dtype=jnp.int32),
            inputs + jnp.sum(jnp.isfinite(g), dtype=jnp.int32),
        )  # fmt: skip

    def one(start):
        done = p.is_goal(start)
        states = jnp.broadcast_to(start, (width, *start.shape))
        g = jnp.where(jnp.arange(width) == 0, 0.0, INF)
        none = jnp.full((width, max_length), -1, jnp.int32)
        c = (0, states, g, none, jnp.where(done, 0.0, INF), none[0], jnp.int32(0), jnp.int32(0))
        c = jax.lax.while_loop(
            lambda c: (c[0] < max_length) & ~(c[4] < INF) & (c[6] < node_limit), level, c
        )
        return _result(width, c[4] < INF, c[4], c[5], c[6], c[7], c[0], node_limit)

    return jax.lax.map(one, starts)


@functools.partial(jax.jit, static_argnames=("problem", "width", "max_length"))
def random_walks(
    problem: Problem, heuristic: Any, starts: jax.Array, key: jax.Array, *, width: int,
    max_length: int, node_limit,
) -> SearchResult:  # fmt: skip
    """B walkers with uniform actions, sent back to the start after max_length moves, until one is at a goal.

    Every start has a stream of its own from `key`; `heuristic` is not used.
    """
    del heuristic
    p = problem

    def one(x):
        key, start = x
        here = jnp.broadcast_to(start, (width, *start.shape))
        blank = jnp.full((width, max_length), -1, jnp.int32)
        done = p.is_goal(start)

        def move(c):
            i, states, g, paths, _, _, generated = c
            depth = i % max_length
            states = jnp.where((depth == 0), here, states)
            g, paths = jnp.where(depth == 0, 0.0, g), jnp.where(depth == 0, blank, paths)
            actions = jax.random.randint(jax.random.fold_in(key, i), (width,), 0, p.num_actions)
            g = g + jax.vmap(p.cost)(states, actions)
            states = jax.vmap(p.next_state)(states, actions)
            paths = paths.at[:, depth].set(actions)
            goal = jnp.where(jax.vmap(p.is_goal)(states), g, INF)
            at = jnp.argmin(goal)
            return i + 1, states, g, paths, goal[at], paths[at], generated + width

        c = (0, here, jnp.zeros(width), blank, jnp.where(done, 0.0, INF), blank[0], jnp.int32(0))
        c = jax.lax.while_loop(lambda c: ~(c[4] < INF) & (c[6] < node_limit), move, c)
        return _result(width, c[4] < INF, c[4], c[5], c[6], jnp.int32(0), c[0], node_limit)

    return jax.lax.map(one, (jax.random.split(key, len(starts)), starts))


def from_words(found: list[tuple[int, ...] | None], nodes: int, price=None) -> SearchResult:
    """A SearchResult, in NumPy, of words found on the host; None where there is none.

    price: what each action costs, f32[A]; default 1.

    >>> from_words([(1, 0), None], 7).cost.tolist()
    [2.0, inf]
    """
    ok = np.array([w is not None for w in found])
    of = len if price is None else lambda w: sum(price[a] for a in w)
    cost = np.array([np.inf if w is None else of(w) for w in found], np.float32)
    path = np.full((len(found), max([1, *(len(w or ()) for w in found)])), -1, np.int32)
    for row, w in zip(path, found, strict=True):
        row[: len(w or ())] = w or ()
    n, zero = np.full(len(found), nodes, np.int32), np.zeros(len(found), np.int32)
    status = np.where(ok, P.SOLVED, P.EXHAUSTED).astype(np.int32)
    fields: Any = dict(path=path, cost=cost, solved=ok, num_generated=n, num_net_inputs=zero)
    fields |= dict(num_iters=zero, max_open=zero, status=status, num_nodes=n)
    return SearchResult(**fields)
