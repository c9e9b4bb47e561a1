"""Where the time of a search goes: its parts, each alone, on the table and queue of a running search."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches.measure import Number, interleave
from qlab.search import driver
from qlab.search.plan import Plan
from qlab.search.problem import Problem
from qlab.search.queue import pop, push
from qlab.search.table import insert, pack, relax, unpack

SPREAD = 7919  # a prime: parents are taken from all over the table, as a queue gives them


def expand(p: Problem, plan: Plan, words: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(children u32[K, n], costs f32[K]) of states u32[B, n]: all, or in the edge modes one of each."""
    num = p.num_actions
    actions = jnp.arange(num) if plan.mode == "astar" else (i % num)[None]
    one = lambda s, a: (p.next_state(s, a), p.cost(s, a))  # noqa: E731
    children, cost = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(
        unpack(words, plan.state), actions
    )
    return pack(children.reshape(-1, *plan.state.shape)), cost.astype(jnp.float32).ravel()


def measure(
    p: Problem, plan: Plan, heuristic: Any, start: np.ndarray, repetitions: int
) -> list[Number]:
    """Nanoseconds per generated node of each part; table and queue are half full at first.

    table and heuristic are timed with the expansion that makes their input, which is taken off.
    Every child goes through the heuristic and into the queue here, in a search only new ones do.
    """
    limit = jnp.int32(plan.max_nodes // 2)
    run = jax.jit(partial(driver.run, p, plan), donate_argnums=3)
    w, _ = run(heuristic, jnp.float32(1), limit, driver.new_work(plan), jnp.asarray(start))
    k, b, rows = plan.slack, plan.batch, int(w.table.size)
    room = {
        "table": (plan.max_nodes - rows) // k,
        "pop": int(w.queue.num_open) // b,
        "push": (plan.max_rows - int(w.queue.rows)) // (k + plan.chunk),
    }
    # One call to compile, and one a repetition, all on the same arrays.
    iters = {part: max(1, min(200, n // (repetitions + 1))) for part, n in room.items()}
    iters |= {"expand": max(1, 10**6 // k), "heuristic": max(1, 10**6 // k)}
    valid = jnp.ones(k, bool)
    pieces = -(-k // plan.chunk)

    def children(words, i):
        parent = (i * b + jnp.arange(b)) * SPREAD % rows
        return *expand(p, plan, words[parent], i), jnp.repeat(parent, k // b)

    def part_expand(words, i):
        new, cost, _ = children(words, i)
        return words, new.sum(dtype=jnp.uint32).astype(jnp.float32) + cost.sum()

    def part_heuristic(words, i):
        new, cost, _ = children(words, i)

        def piece(j, total):
            some = jax.lax.dynamic_slice_in_dim(new, j * plan.chunk, plan.chunk)
            return total + heuristic(jax.vmap(p.encode)(unpack(some, plan.state))).sum()

        return words, jax.lax.fori_loop(0, pieces, piece, cost.sum())

    def part_table(state, i):
        table, parent_g = state  # as in a search, where the entries carry the g of the parents
        new, cost, parent = children(table.words, i)
        g = parent_g[parent] + cost
        table, node, _ = insert(table, new, valid)
        table, win = relax(table, node, g, parent, jnp.zeros(k, jnp.int32), valid)
        return (table, parent_g), win.sum().astype(jnp.float32)

    def part_pop(queue, i):
        queue, entry, _, f = pop(queue, plan.queue, b, plan.tie == "lifo")
        return queue, entry.sum() + f[0]

    def part_push(queue, i):
        n, width = plan.chunk, plan.queue.width

        def piece(j, queue):
            f = (40 + (i + j + jnp.arange(n * width)) % 16).astype(jnp.float32).reshape(n, width)
            return push(queue, plan.queue, f, f[:, 0], jnp.arange(n), jnp.int32(n))

        queue = jax.lax.fori_loop(0, pieces, piece, queue)
        return queue, queue.num_open.astype(jnp.float32)

    def copied(tree):
        return jax.tree.map(jnp.copy, tree)

    clock = {
        "expand": _clock(part_expand, jnp.copy(w.table.words), iters["expand"]),
        "heuristic": _clock(part_heuristic, jnp.copy(w.table.words), iters["heuristic"]),
        "table": _clock(part_table, (copied(w.table), jnp.copy(w.table.g)), iters["table"]),
        "pop": _clock(part_pop, copied(w.queue), iters["pop"]),
        "push": _clock(part_push, w.queue, iters["push"]),
    }

    def sample():
        ns = {name: 1e9 * seconds() / (iters[name] * k) for name, seconds in clock.items()}
        taken_off = {"table": ns["expand"], "heuristic": ns["expand"]}
        return {f"{name}_ns": t - taken_off.get(name, 0.0) for name, t in ns.items()}

    return interleave({"qlab": sample}, repetitions)


def _clock(part: Callable, state: Any, iters: int) -> Callable[[], float]:
    """() -> seconds of `iters` runs of a part, in place on its own copy of the state."""

    def loop(state):
        def body(i, c):
            state, extra = part(c[0], i)
            return state, c[1] + extra

        return jax.lax.fori_loop(0, iters, body, (state, jnp.float32(0)))

    jitted = jax.jit(loop, donate_argnums=0)
    at = [jax.block_until_ready(jitted(state))[0]]

    def seconds() -> float:
        start = time.perf_counter()
        at[0] = jax.block_until_ready(jitted(at[0]))[0]
        return time.perf_counter() - start

    return seconds
