"""Search arms on fixed instances: train a heuristic per task, then count and time the searches.

A task is one domain at one macro depth. All arms see the same instances, scrambles and keys; the clock
is read on the host around a compiled block of searches, never around compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Phase
from qlab.search.domains import Domain
from qlab.search.driver import search_many
from qlab.search.learning import Learner
from qlab.search.problem import SOLVED, STATUS, Problem, SearchResult

COUNTS = ("num_generated", "num_net_inputs", "num_iters", "max_open", "cost", "status")


class Task(NamedTuple):
    """
    Attributes:
      label: "puzzle8_a52"; the first name part of the task's results.
      domain: where it comes from. problem: what is searched; the domain's, or with another encoding.
      learner: trains the net; None if the heuristic needs none.
      heuristic: params (None without a learner) -> what `search` takes.
      instances: start states [N, ...].
      optimum: f32[N] exact costs, None if unknown.
      options: keyword arguments of `search_many`.
      net: label of the task whose net this one uses; "" for its own.
      solve: (problem, heuristic, starts, **options) -> SearchResult, in place of `search_many`.
    """

    label: str
    domain: Domain
    problem: Problem
    learner: Learner | None
    heuristic: Callable[[Any], Any]
    instances: np.ndarray
    optimum: np.ndarray | None
    options: dict[str, Any]
    net: str = ""
    solve: Callable[..., SearchResult] = search_many


def search_benchmark(tasks: Sequence[Task], *, train_steps: int, block: int) -> Experiment:
    """One "train" phase per task with a learner, then a host phase that solves block after block.

    State: learn (a LearnState per task), result (counts f32[N] and wall f32[blocks] per task), next.
    """
    for t in tasks:
        if len(t.instances) % block:
            raise ValueError(f"block={block} does not divide the {len(t.instances)} instances")
    blocks = [(t, i) for t in tasks for i in range(0, len(t.instances), block)]
    warm: set[str] = set()  # compiled in this process; not a part of the state

    def init(key: jax.Array) -> dict[str, Any]:
        learn, result = {}, {}
        for i, t in enumerate(tasks):
            n = len(t.instances)
            if t.learner is not None:
                learn[t.label] = jax.jit(t.learner.init)(jax.random.fold_in(key, i))
            result[t.label] = {name: jnp.zeros(n) for name in COUNTS}
            result[t.label]["wall"] = jnp.zeros(n // block)
        return {"learn": learn, "result": result, "next": jnp.int32(0)}

    def train(label: str, learner: Learner):
        def step(state):
            learn, metrics = learner.step(state["learn"][label])
            return {**state, "learn": {**state["learn"], label: learn}}, metrics

        return step

    def search_step(state):
        at = int(state["next"])
        task, first = blocks[at]
        learned = state["learn"].get(task.net or task.label)
        heuristic = task.heuristic(None if learned is None else learned.params)
        starts = jnp.asarray(task.instances[first : first + block])

        def run(**options):
            return jax.block_until_ready(
                task.solve(task.problem, heuristic, starts, **{**task.options, **options})
            )

        if task.label not in warm:
            run(node_limit=0)  # compiles, and pops one batch a search
            warm.add(task.label)
        start = time.perf_counter()
        found = run()
        wall = time.perf_counter() - start
        result = dict(state["result"][task.label])
        for name in COUNTS:
            value = np.array(result[name])
            value[first : first + block] = np.asarray(getattr(found, name), np.float32)
            result[name] = jnp.asarray(value)
        walls = np.array(result["wall"])
        walls[first // block] = wall / block
        result["wall"] = jnp.asarray(walls)
        results = {**state["result"], task.label: result}
        metrics = {
            "searched_generated": float(np.mean(found.num_generated)),
            "searched_solved": 100 * float(np.mean(found.solved)),
        }
        return {**state, "result": results, "next": jnp.int32(at + 1)}, metrics

    phases = [
        Phase(f"train {t.label}", train_steps, train(t.label, t.learner))
        for t in tasks
        if t.learner is not None
    ]
    phases.append(Phase("search", len(blocks), search_step, loop="host"))
    return Experiment(
        init=init,
        evaluate=lambda state: summary(tasks, state["result"]),
        phases=tuple(phases),
        jittable=False,
    )


def summary(tasks: Sequence[Task], result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Means per task; per domain, growth from its first to its last task and arrays over actions.

    Means of counts and times are over all instances, those of costs over the solved ones.
    """
    out: dict[str, Any] = {}
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for t in tasks:
        r = {k: np.asarray(v, np.float64) for k, v in result[t.label].items()}
        solved = r["status"] == SOLVED
        scalars = {
            "generated": r["num_generated"].mean(),
            "net_inputs": r["num_net_inputs"].mean(),
            "iterations": r["num_iters"].mean(),
            "max_open": r["max_open"].mean(),
            "time": r["wall"].mean(),
            "solved": 100 * solved.mean(),
            "cost": r["cost"][solved].mean() if solved.any() else np.nan,
        }
        if t.optimum is not None:
            ratio = r["cost"][solved] / t.optimum[solved]
            scalars["cost_gap"] = 100 * (ratio.mean() - 1) if solved.any() else np.nan
            scalars["optimal"] = 100 * (ratio == 1).sum() / len(solved)
        for code in range(SOLVED + 1, len(STATUS)):
            if (r["status"] == code).any():
                scalars[STATUS[code]] = 100 * (r["status"] == code).mean()
        out |= {f"{t.label}/{k}": v for k, v in scalars.items()}
        row = (t.problem.num_actions, scalars["generated"], scalars["time"])
        rows.setdefault(t.domain.name, []).append(row)
    for name, values in rows.items():
        actions, generated, seconds = np.asarray(values).T
        out[f"{name}_num_actions"] = actions
        out[f"{name}_generated"] = generated
        out[f"{name}_wall"] = seconds
        if len(values) > 1:
            out[f"{name}/generated_growth"] = generated[-1] / generated[0]
            out[f"{name}/time_growth"] = seconds[-1] / seconds[0]
    return {k: np.asarray(v, np.float32) for k, v in out.items()}
