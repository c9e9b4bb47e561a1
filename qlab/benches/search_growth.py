"""Q* against A* on Lights Out 4 x 4 as the action space grows, each with a net of its own kind, of one size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches.measure import Number, Sample, interleave, ratio
from qlab.search import nets, search_many
from qlab.search.domains import Domain, domain
from qlab.search.learning import Target, learner
from qlab.search.problem import SearchResult

# Not the least of one net's Q-values for A*: they mean nothing at the goal, which it would pop late.
KINDS: dict[str, tuple[Target, Any]] = {"astar": ("h", nets.h_value), "qstar": ("q", nets.q_values)}
OPTIONS: dict[str, Any] = {
    "weight": 0.6, "node_limit": 100_000, "max_nodes": 4096, "max_rows": 16384, "prune_stale": True,
}  # fmt: skip


def trained(d: Domain, kind: Target, updates: int) -> Any:
    """Parameters of a net of two layers of 128 after so many updates on exact values, as in the q_star study."""
    made = learner(d, kind, widths=(128, 128), k_max=32, lr=3e-3, lr_decay=0.999)
    run = jax.jit(lambda s: jax.lax.fori_loop(0, updates, lambda _, s: made.step(s)[0], s))
    return run(made.init(jax.random.key(0))).params


def contestants(
    depth: int, updates: int, count: int
) -> tuple[int, dict[str, Callable[[], SearchResult]]]:
    """(number of actions, {mode: () -> the searches}) of fixed instances."""
    d = domain("lightsout4", depth)
    starts = jnp.asarray(d.instances(0, count))

    def way(mode: Any) -> Callable[[], SearchResult]:
        kind, value = KINDS[mode]
        h = jax.tree_util.Partial(value, trained(d, kind, updates))
        return lambda: jax.block_until_ready(
            search_many(d.problem, h, starts, mode=mode, **OPTIONS)
        )

    return d.problem.num_actions, {mode: way(mode) for mode in KINDS}


def measure(
    depth: int, updates: int, count: int, repetitions: int, budget_s: float
) -> list[Number]:
    """Nodes, time and share solved of a search, and A*'s nodes and time over those of Q*."""
    actions, ways = contestants(depth, updates, count)

    def timed(call: Callable[[], SearchResult]) -> Callable[[], Sample]:
        call()  # compiles

        def sample() -> Sample:
            begun = time.perf_counter()
            found = call()
            return {
                "solve_ms": 1e3 * (time.perf_counter() - begun) / count,
                "generated": float(np.mean(found.num_generated)),
                "solved": 100 * float(np.mean(found.solved)),
            }

        return sample

    numbers = interleave({m: timed(f) for m, f in ways.items()}, repetitions, budget_s)
    for name, to in (("generated", "nodes_over_qstar"), ("solve_ms", "time_over_qstar")):
        numbers.append(ratio(numbers, "astar", "qstar", name, to))
    return [n._replace(name=f"actions_{actions}/{n.name}") for n in numbers]
