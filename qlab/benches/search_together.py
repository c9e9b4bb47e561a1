"""Many instances in one program, against one compiled search after another.

(`search` under vmap is left out: every step copies the arrays of all searches, a hundred times the time on a CPU.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches.measure import Number, Sample, interleave, ratio
from qlab.search import nets, search, search_many
from qlab.search.domains import domain, exact

CASES = ("long", "short")


def contestants(case: str, count: int) -> tuple[dict[str, Callable[[], np.ndarray]], np.ndarray]:
    """({arm: () -> costs f32[count]}, the exact ones) of the 8-puzzle, its instances fixed.

    "long": A* with the Manhattan distance, 3100 nodes. "short": Q* with a table of exact values, 22.
    """
    d = domain("puzzle8")
    assert d.distance is not None
    starts = jnp.asarray(d.instances(0, count))
    options: dict[str, Any] = {"mode": "astar", "max_nodes": 1 << 14}
    p, h = (
        d.problem,
        jax.tree_util.Partial(nets.linear, (jnp.asarray(d.admissible, jnp.float32), 0.0)),
    )
    if case == "short":
        (p, h), options = exact(d, "q"), {"mode": "qstar", "max_nodes": 1 << 10}
    each = list(starts)

    def one_by_one():
        found = [search(p, h, s, **options).cost for s in each]
        return np.asarray(jax.block_until_ready(found))

    def together():
        return np.asarray(search_many(p, h, starts, **options).cost)

    return {"qlab": together, "one_by_one": one_by_one}, np.asarray(d.distance(starts))


def measure(case: str, count: int, repetitions: int, budget_s: float) -> list[Number]:
    """Searches a second of both, and those in one program over those one by one.

    Raises:
      RuntimeError: costs that are not the exact ones.
    """
    ways, want = contestants(case, count)

    def timed(call: Callable[[], np.ndarray]) -> Callable[[], Sample]:
        def sample() -> Sample:
            begun = time.perf_counter()
            call()
            return {"searches_per_s": count / (time.perf_counter() - begun)}

        return sample

    for arm, call in ways.items():  # compiles
        if not np.array_equal(costs := call(), want):
            raise RuntimeError(f"{arm}: {(costs != want).sum()} of {count} costs are not exact")
    numbers = interleave({a: timed(f) for a, f in ways.items()}, repetitions, budget_s)
    numbers.append(ratio(numbers, "qlab", "one_by_one", "searches_per_s", "of_one_by_one"))
    return [n._replace(name=f"{case}_{count}/{n.name}") for n in numbers]
