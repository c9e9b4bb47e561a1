"""The same three searches with a host heap and dictionaries: slow, plain, the reference for the tests."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.problem import Problem


class OracleResult(NamedTuple):
    status: str
    cost: float
    path: list[int]
    num_generated: int
    num_net_inputs: int
    num_iters: int
    max_open: int
    popped: list[tuple[int, int]]  # (node, action) in the order popped; nodes numbered as met


def oracle_search(
    problem: Problem,
    heuristic,
    start,
    *,
    mode: str,
    weight: float = 1.0,
    batch: int = 1,
    stop: str = "first",
    tie: str = "lifo",
    prune_stale: bool = False,
) -> OracleResult:
    """`search` with identical rules (ties, batches, re-opening, stopping), without limits."""
    num_actions = problem.num_actions
    actions = jnp.arange(num_actions)
    expand = jax.jit(
        jax.vmap(lambda s, a: (problem.next_state(s, a), problem.cost(s, a)), (None, 0))
    )
    evaluate = jax.jit(lambda s: heuristic(problem.encode(s)[None])[0])
    goal_test = jax.jit(problem.is_goal)
    edges, sign = mode != "astar", -1 if tie == "lifo" else 1
    w = np.float32(weight)

    states: list[np.ndarray] = [np.asarray(start)]
    children: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    number = {states[0].tobytes(): 0}
    g = [np.float32(0)]
    parent: list[tuple[int, int]] = [(-1, -1)]
    heap: list[tuple] = []
    popped: list[tuple[int, int]] = []
    generated = inputs = iters = rows = max_open = 0
    best, best_node, lower = np.float32(np.inf), 0, -np.inf

    def push(node: int, cost: np.float32) -> None:
        nonlocal inputs, rows
        inputs += 1
        value = np.asarray(evaluate(states[node]), np.float32)
        f = np.broadcast_to(w * cost + value, (num_actions,)) if edges else [w * cost + value]
        for a, fa in enumerate(f):
            if fa < np.inf:
                heapq.heappush(
                    heap,
                    (fa, -cost if tie == "lifo" else 0, sign * (rows * len(f) + a), node, a, cost),
                )
        rows += 1

    def child(node: int) -> tuple[np.ndarray, np.ndarray]:
        if node not in children:
            s, c = expand(states[node], actions)
            children[node] = np.asarray(s), np.asarray(c, np.float32)
        return children[node]

    def finish(status: str) -> OracleResult:
        path: list[int] = []
        total = np.float32(0)
        node = best_node
        if status == "solved":
            while parent[node][0] >= 0:
                node, a = parent[node]
                path.insert(0, a)
                total += child(node)[1][a]
        cost = float(total) if status == "solved" else np.inf
        return OracleResult(status, cost, path, generated, inputs, iters, max_open, popped)

    if bool(goal_test(states[0])):
        return finish("solved")
    push(0, g[0])
    max_open = len(heap)
    while True:
        batch_entries = [heapq.heappop(heap) for _ in range(min(batch, len(heap)))]
        if not batch_entries:
            return finish("solved" if best < np.inf else "exhausted")
        lower = max(lower, float(batch_entries[0][0]))
        if stop == "bound" and best < np.inf and lower >= w * best:
            return finish("solved")
        iters += 1
        batch_entries.sort(key=lambda e: sign * e[2])
        popped += [(e[3], e[4]) for e in batch_entries]
        if prune_stale:
            batch_entries = [e for e in batch_entries if e[5] <= g[e[3]]]
        if not edges and stop == "first":
            goals = [
                (e[5], i, e[3]) for i, e in enumerate(batch_entries) if goal_test(states[e[3]])
            ]
            if goals:
                best, _, best_node = min(goals)
                return finish("solved")
        offers: list[tuple[int, np.float32, int, int]] = []  # node, g, parent, action
        for *_, node, a0, cost in batch_entries:
            s, c = child(node)
            for a in [a0] if edges else range(num_actions):
                generated += 1
                name = s[a].tobytes()
                if name not in number:
                    number[name] = len(states)
                    states.append(s[a])
                    g.append(np.float32(np.inf))
                    parent.append((-1, -1))
                offers.append((number[name], cost + c[a], node, a))
        winners: dict[int, tuple[np.float32, int]] = {}
        for i, (node, cost, _, _) in enumerate(offers):
            if cost < g[node] and cost < winners.get(node, (np.inf, 0))[0]:
                winners[node] = cost, i
        order = sorted(i for _, i in winners.values())
        for i in order:
            node, cost, up, a = offers[i]
            g[node], parent[node] = cost, (up, a)
        if edges or stop == "bound":
            goals = [(o[1], i, o[0]) for i, o in enumerate(offers) if goal_test(states[o[0]])]
            if goals and min(goals)[0] < best:
                best, _, best_node = min(goals)
            if goals and stop == "first":
                return finish("solved")
        for i in order:
            push(offers[i][0], offers[i][1])
        max_open = max(max_open, len(heap))
