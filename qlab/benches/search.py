"""Nodes a second of qlab.search on the 15-puzzle, by batch size, over bare expansion and plain Python.

Contestants, all with the Manhattan distance (in mode qstar: of every child) from one unsolvable start,
so that no search ends before its node limit:
    qlab       qlab.search: expansion, hash table, priority queue, heuristic
    expansion  the same expansion alone, children taken as the next parents: the bound
    python     A* with heapq and a dict, one state at a time
    deepxube   its own batched search, where it is installed
A generated node is a child made from a popped entry; four an expansion in A*, moves against the rim
included, for all contestants. The parts are timed alone on the table and queue of a running search.
Two further comparisons: many instances in one program against one by one (`search_together`), and Q* against
A* at several sizes of the action space (`search_growth`).
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches import search_growth, search_parts, search_peers, search_together
from qlab.benches.kernel_peers import Absent
from qlab.benches.measure import Number, Sample, Tell, find, interleave, ratio
from qlab.lab.experiment import Claim, Figure, Metric
from qlab.search import driver
from qlab.search.domains.sliding import goal_state, manhattan, sliding
from qlab.search.plan import Plan, make_plan
from qlab.search.problem import STATUS, Problem
from qlab.search.table import pack

N = 4
A = 4
MOVES = np.array(  # [cell, action] -> where the blank goes
    [
        [c - N if c >= N else c, c + N if c < N * N - N else c]
        + [c - 1 if c % N else c, c + 1 if c % N < N - 1 else c]
        for c in range(N * N)
    ],
    np.int32,
)
METRICS = {
    "generated_per_s": Metric("1/s", "higher", "children made a second"),
    "best_per_s": Metric("1/s", "higher", "generated_per_s at the best batch size"),
    "of_expansion": Metric("times", "higher", "generated_per_s over that of expansion alone"),
    "of_python": Metric("times", "higher", "generated_per_s over that of plain Python"),
    "of_deepxube": Metric("times", "higher", "generated_per_s over that of deepxube"),
    "stored_per_s": Metric("1/s", "higher", "distinct states a second"),
    "search_ns": Metric("ns", "lower", "a generated node in a search"),
    "search_cpu_ns": Metric(
        "ns", "lower", "processor time of it: little disturbed by other programs"
    ),
    "expand_ns": Metric("ns", "lower", "of it: unpacking, next states, costs, packing"),
    "table_ns": Metric("ns", "lower", "of it: hashing, finding or adding, lowering g"),
    "heuristic_ns": Metric(
        "ns", "lower", "of it: encoding and heuristic, every child taken as new"
    ),
    "pop_ns": Metric("ns", "lower", "of it: taking the best entries out"),
    "push_ns": Metric("ns", "lower", "of it: writing entries, every child taken as new"),
    "first_call_s": Metric("s", "lower", "tracing and compiling a search"),
    "searches_per_s": Metric("1/s", "higher", "instances solved a second"),
    "of_one_by_one": Metric(
        "times", "higher", "searches_per_s over that of one search after another"
    ),
    "generated": Metric("nodes", "lower", "states made by a search, mean over instances"),
    "solve_ms": Metric("ms", "lower", "a search, mean over instances"),
    "solved": Metric("%", "higher", "instances solved within the node limit"),
    "nodes_over_qstar": Metric("times", "higher", "generated over that of Q*"),
    "time_over_qstar": Metric("times", "higher", "solve_ms over that of Q*"),
}
FIGURES = (
    Figure("Generated nodes a second", "bars", "generated_per_s", ylabel="1/s", logy=True),
    Figure("A* over Q* by actions: nodes", "bars", "nodes_over_qstar", ylabel="times"),
    Figure("A* over Q* by actions: time", "bars", "time_over_qstar", ylabel="times"),
)


def goals(s: dict[str, Any]) -> tuple[Claim, ...]:
    """Nodes a second at the best batch size, and over deepxube at the largest of those it is timed at."""
    wanted = (
        ("generates at least 2 million nodes a second", "best_per_s", 2e6, "", "at the best batch size"),
        ("generates at least 50 times as fast as deepxube", "of_deepxube", 50.0, f"_b{max(s['peer_batches'])}", ""),
    )  # fmt: skip
    return tuple(
        Claim(f"{mode} {text}", "goal", ("qlab", f"{mode}{at}/{name}"), ">=", bound, note=note)
        for text, name, bound, at, note in wanted
        for mode in s["modes"]
    )


def settings(quick: bool) -> dict[str, Any]:
    return {
        "modes": ("astar", "qstar"),
        "batches": (1000,) if quick else (1, 10, 100, 1000, 3000, 10_000),
        "parts": () if quick else (100, 1000, 10_000),
        "part_modes": ("astar", "qstar"),
        "max_nodes": 1 << (20 if quick else 22),
        "run_s": 0.7 if quick else 2.0,
        "python_nodes": 100_000 if quick else 1_000_000,
        "peer_batches": (1000,) if quick else (1000, 10_000),
        "peer_nodes": 40_000 if quick else 400_000,
        "together": ("short",) if quick else search_together.CASES,
        "instances": 100,
        "macro_depths": () if quick else (1, 2, 3),
        "updates": 2000,
        "repetitions": 3 if quick else 5,
        "budget_s": 6.0 if quick else 60.0,
    }


# ---- the puzzle ---------------------------------------------------------------------------------


def unsolvable_start() -> np.ndarray:
    """u8[16]: the goal after 1000 random moves, with two tiles exchanged."""
    rng = np.random.default_rng(0)
    move = jax.jit(sliding(N).next_state)
    s = goal_state(N)
    for a in rng.integers(0, A, 1000):
        s = move(s, a)
    s = np.array(s)
    i, j = np.flatnonzero(s)[:2]
    s[i], s[j] = s[j], s[i]
    return s


def puzzle() -> Problem:
    """The 15-puzzle whose heuristic sees the 16 tiles as they are: no one-hot code to pay for."""
    return sliding(N)._replace(encode=lambda s: s.astype(jnp.float32))


def distance(params: jax.Array, enc: jax.Array) -> jax.Array:
    """Manhattan distance f32[E] of states f32[E, 16]; params f32[16, 16] = [cell, tile]."""
    return params[jnp.arange(N * N), enc.astype(jnp.int32)].sum(1)


def child_distance(params: jax.Array, enc: jax.Array) -> jax.Array:
    """1 + Manhattan distance of every child, f32[E, 4]: one tile moves into the blank's cell."""
    s = enc.astype(jnp.int32)
    blank = jnp.argmin(s, 1)[:, None]
    to = jnp.asarray(MOVES)[
        blank[:, 0]
    ]  # i32[E, 4], the blank's own cell for moves against the rim
    tile = jnp.take_along_axis(s, to, 1)
    return distance(params, enc)[:, None] + params[blank, tile] - params[to, tile] + 1.0


HEURISTICS = {"astar": distance, "qstar": child_distance}


def heuristic(mode: str) -> jax.tree_util.Partial:
    far = jnp.asarray(manhattan(N), jnp.float32).reshape(N * N, N * N)
    return jax.tree_util.Partial(HEURISTICS[mode], far)


# ---- contestants --------------------------------------------------------------------------------


def expansion(p: Any, plan: Plan, start: np.ndarray) -> Callable[[int], Sample]:
    """num_iters -> rate of expansions whose children are the next parents."""

    @jax.jit
    def loop(words, n):
        def body(i, words):
            children, _ = search_parts.expand(p, plan, words, i)
            step = children.shape[0] // plan.batch
            return children.reshape(plan.batch, step, -1)[:, i % step]

        return jax.lax.fori_loop(0, n, body, words)

    words = jnp.tile(pack(jnp.asarray(start)[None]), (plan.batch, 1))
    loop(words, np.int32(1)).block_until_ready()

    def sample(n):
        begun = time.perf_counter()
        loop(words, np.int32(n)).block_until_ready()
        return {"generated_per_s": n * plan.slack / (time.perf_counter() - begun)}

    return sample


def python_astar(start: np.ndarray, node_limit: int) -> tuple[int, int, int]:
    """A* as one writes it in plain Python: nodes generated, states stored, cost (-1: node limit)."""
    moves = MOVES.tolist()
    far = [
        [abs(c // N - (t - 1) // N) + abs(c % N - (t - 1) % N) if t else 0 for c in range(N * N)]
        for t in range(N * N)
    ]
    goal = tuple(int(x) for x in goal_state(N))
    root = tuple(int(x) for x in start)
    h = sum(far[t][c] for c, t in enumerate(root))
    best, heap, generated = {root: 0}, [(h, 0, root, root.index(0))], 0
    while heap and generated < node_limit:
        f, minus_g, s, blank = heapq.heappop(heap)
        g = -minus_g
        if s == goal:
            return generated, len(best), g
        if g > best[s]:
            continue
        generated += A
        for to in moves[blank]:
            if to == blank:
                continue
            tile, child = s[to], list(s)
            child[blank], child[to] = tile, 0
            key = tuple(child)
            if g + 1 < best.get(key, 1 << 30):
                best[key] = g + 1
                f_new = f + 1 + far[tile][blank] - far[tile][to]
                heapq.heappush(heap, (f_new, -g - 1, key, to))
    return generated, len(best), -1


def peer(plan: Plan, start: np.ndarray, node_limit: int) -> Callable[[], Sample]:
    """deepxube at the plan's mode and batch. Raises Absent."""
    run = search_peers.deepxube(
        plan.mode, np.asarray(manhattan(N)).reshape(N * N, N * N), plan.batch
    )

    def sample() -> Sample:
        gc.collect()  # the objects of its last search are not this one's to count
        begun = time.perf_counter()
        generated, stored, cost = run(start, node_limit)
        took = time.perf_counter() - begun
        if cost >= 0:
            raise RuntimeError(f"deepxube solved an unsolvable state at cost {cost}")
        return {"generated_per_s": generated / took, "stored_per_s": stored / took}

    return sample


def searching(p: Any, plan: Plan, start: np.ndarray) -> tuple[Callable[[int], Sample], float]:
    """(node_limit -> one timed search, seconds of tracing and compiling)."""
    h, state = heuristic(plan.mode), jnp.asarray(start)[None]

    def once(node_limit):
        begun, cpu = time.perf_counter(), time.process_time()
        results, _ = driver._search_all(
            p, plan, h, state, jnp.float32(1), jnp.asarray(node_limit, jnp.int32)
        )
        r = jax.tree.map(lambda x: x[0], jax.block_until_ready(results))
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        if STATUS[int(r.status)] not in ("node_limit", "table_full"):
            raise RuntimeError(f"the search from an unsolvable state ended {STATUS[int(r.status)]}")
        nodes = int(r.num_generated)
        return {
            "generated_per_s": nodes / took,
            "stored_per_s": int(r.num_nodes) / took,
            "search_ns": 1e9 * took / nodes,
            "search_cpu_ns": 1e9 * cpu / nodes,
        }

    begun = time.perf_counter()
    once(1)
    return once, time.perf_counter() - begun


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    p, start = puzzle(), unsolvable_start()
    state = jax.ShapeDtypeStruct(start.shape, start.dtype)
    numbers: list[Number] = []
    for mode in s["modes"]:
        of_mode: list[Number] = []
        for batch in s["batches"]:
            tell(f"search: {mode}, batch {batch}")
            plan = make_plan(p, state, mode, batch=batch, max_nodes=s["max_nodes"])
            found = one_size(p, plan, start, s)
            of_mode += [n._replace(name=f"{mode}_b{batch}/{n.name}") for n in found]
        rates = [n for n in of_mode if n.arm == "qlab" and n.name.endswith("/generated_per_s")]
        best = max(rates, key=lambda n: n.median)
        numbers += [*of_mode, best._replace(name=f"{mode}/best_per_s")]
    repeated = s["repetitions"], s["budget_s"] / 4
    for case in s["together"]:
        tell(f"search: {s['instances']} {case} searches in one program")
        numbers += search_together.measure(case, s["instances"], *repeated)
    for depth in s["macro_depths"]:
        tell(f"search: Q* against A*, macro-actions of up to {depth}")
        numbers += search_growth.measure(depth, s["updates"], s["instances"], *repeated)
    return numbers


def one_size(p: Any, plan: Plan, start: np.ndarray, s: dict[str, Any]) -> list[Number]:
    search, first_s = searching(p, plan, start)
    alone = expansion(p, plan, start)
    trial = max(20 * plan.slack, 1000)
    limit = min(int(search(trial)["generated_per_s"] * s["run_s"]), 2**30)
    iters = max(
        1, int(alone(max(1, trial // plan.slack))["generated_per_s"] * s["run_s"] / 4) // plan.slack
    )

    def python() -> Sample:
        begun = time.perf_counter()
        generated, stored, _ = python_astar(start, s["python_nodes"])
        took = time.perf_counter() - begun
        return {"generated_per_s": generated / took, "stored_per_s": stored / took}

    ways = {"qlab": lambda: search(limit), "expansion": lambda: alone(iters)}
    absent: list[Number] = []
    if plan.mode == "astar":
        ways["python"] = python
    if plan.batch in s["peer_batches"]:
        try:
            ways["deepxube"] = peer(plan, start, s["peer_nodes"])
        except Absent as e:
            absent.append(Number("deepxube", "generated_per_s", status="absent", note=str(e)))
    numbers = interleave(ways, s["repetitions"], s["budget_s"]) + absent
    for other in ("expansion", "python", "deepxube"):
        if any(n.arm == other for n in numbers):
            numbers.append(ratio(numbers, "qlab", other, "generated_per_s", f"of_{other}"))
    numbers.append(Number("qlab", "first_call_s", (first_s,)))
    if plan.batch in s["parts"] and plan.mode in s["part_modes"]:
        numbers += search_parts.measure(p, plan, heuristic(plan.mode), start, s["repetitions"])
    return numbers


def summary(numbers: list[Number]) -> str:
    texts = []
    for mode in ("astar", "qstar"):
        best = find(numbers, "qlab", f"{mode}/best_per_s")
        same = [
            n
            for n in numbers
            if n.arm == "qlab" and n.values == best.values and n.name != best.name
        ]
        if not same:
            continue
        task = same[0].name.split("/")[0]
        bound = find(numbers, "qlab", f"{task}/of_expansion").median
        texts.append(
            f"{mode} {best.median / 1e6:.2f} M/s ({task}, {100 * bound:.0f} % of bare expansion)"
        )
    python = [n for n in numbers if n.arm == "python" and n.name.endswith("generated_per_s")]
    if python:
        texts.append(f"plain Python {np.median([n.median for n in python]) / 1e6:.2f} M/s")
    said = [", ".join(texts) + " generated"]
    words = {
        "of_deepxube": "times deepxube",
        "of_one_by_one": "times one by one",
        "nodes_over_qstar": "times the nodes of Q* by A*",
    }
    for n in numbers:
        task, _, metric = n.name.rpartition("/")
        if metric in words and n.values:
            said.append(f"{task} {n.median:.3g} {words[metric]}")
    return "; ".join(said)
