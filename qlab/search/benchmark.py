"""Search arms on the same instances: train a heuristic per task, then count and time the searches.

A task is one domain at one macro depth. Instances are drawn from the seed's key, or fixed; all arms of a
seed see the same ones. The clock is read on the host around a compiled block of searches, never around
compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Metric, Phase
from qlab.search.calibration import Probe, calibration
from qlab.search.driver import search_many
from qlab.search.learning import Learner
from qlab.search.problem import NODE_LIMIT, SOLVED, Problem, SearchResult

MAX_TASKS = 2**20  # keys below belong to the tasks' learners
COUNTS = ("num_generated", "num_net_inputs", "num_iters", "max_open", "cost", "status")
METRICS = {
    "generated": Metric("nodes", "lower", "states made by next_state, mean over instances"),
    "net_inputs": Metric("states", "lower", "states given to the heuristic, mean over instances"),
    "iterations": Metric("", "lower", "batches popped, mean over instances"),
    "max_open": Metric("entries", "lower", "most entries in OPEN, mean over instances"),
    "time": Metric("s", "lower", "wall-clock a search, without compilation"),
    "solved": Metric("%", "higher", "instances solved within the limits"),
    "cost": Metric("", "lower", "mean cost of the solved instances"),
    "cost_gap": Metric("%", "lower", "mean cost above the exact optimum, solved instances"),
    "optimal": Metric("%", "higher", "instances solved at the optimal cost"),
    "h_error": Metric("", "lower", "mean |heuristic - exact cost-to-go| over the domain's states"),
    "h_over": Metric("%", "lower", "of these states overestimated: there the heuristic is not admissible"),
    "generated_growth": Metric("x", "lower", "generated nodes, last of a series over its first"),
    "time_growth": Metric("s", "lower", "time, last of a series over its first (unit s: a clock reading)"),
    "slope": Metric("", "lower", "growth of the mean cost along a series, instances solved everywhere"),
    "slope_ratio": Metric("x", "lower", "slope over that of the other series, instances solved everywhere"),
    "slope_on": Metric("%", "higher", "instances solved everywhere in both series"),
    "node_limit": Metric("%", "lower", "searches that met the limit of generated nodes"),
    "failed": Metric("%", "lower", "searches that ended otherwise without a goal: no room, nothing left to open, NaN"),
}  # fmt: skip


class Instances(NamedTuple):
    """
    Attributes:
      starts: start states [N, ...].
      known: costs f32[N] of the same instances by other means, nan where they have none. Of "optimum"
        come cost_gap and optimal; of any other <name>, over the instances both solved, vs_<name> (mean
        cost over theirs) and with_<name> (how many, in % of all).
    """

    starts: np.ndarray
    known: dict[str, np.ndarray]


class Task(NamedTuple):
    """
    Attributes:
      label: "puzzle8_a52"; the first name part of the task's results.
      series: name of the tasks it forms one curve with, "" for none; at: its place on that curve.
      problem: what is searched.
      learner: trains the net; None if the heuristic needs none.
      heuristic: params (None without a learner) -> what `search` takes.
      instances: the seed's key -> Instances, the same for all arms.
      options: keyword arguments of `search_many`.
      net: label of the task whose net this one uses; "" for its own.
      solve: (problem, heuristic, starts, key, **options) -> SearchResult, in place of `search_many`.
      probe: states with exact costs that its heuristic is compared with in the end; None: is not.
    """

    label: str
    series: str
    at: float
    problem: Problem
    learner: Learner | None
    heuristic: Callable[[Any], Any]
    instances: Callable[[jax.Array], Instances]
    options: dict[str, Any]
    net: str = ""
    solve: Callable[..., SearchResult] = search_many
    probe: Probe | None = None


def search_benchmark(
    tasks: Sequence[Task],
    *,
    count: int,
    train_steps: int,
    block: int,
    slopes: Sequence[tuple[str, str]] = (),
) -> Experiment:
    """One "train" phase per task with a learner, then a host phase that solves block after block.

    State: learn (a LearnState per task), starts and known (of its Instances), result (counts f32[count]
    and wall f32[blocks]), key (of searches that draw), next.

    Args:
      count: instances of every task. block: how many are searched and timed together.
      slopes: pairs of series with the same instances whose growth of cost is compared.
    Raises:
      UserError: block does not divide count.
    """
    if count % block:
        raise UserError(f"block={block} does not divide the {count} instances; take a divisor")
    blocks = [(t, i) for t in tasks for i in range(0, count, block)]
    warm: set[str] = set()  # compiled in this process; not a part of the state

    def init(key: jax.Array) -> dict[str, Any]:
        k_instances, k_search = jax.random.split(jax.random.fold_in(key, MAX_TASKS), 2)
        learn, starts, known, result = {}, {}, {}, {}
        for i, t in enumerate(tasks):
            if t.learner is not None:
                learn[t.label] = jax.jit(t.learner.init)(jax.random.fold_in(key, i))
            drawn = t.instances(k_instances)
            starts[t.label] = jnp.asarray(drawn.starts)
            known[t.label] = {k: jnp.asarray(v, jnp.float32) for k, v in drawn.known.items()}
            result[t.label] = {name: jnp.zeros(count) for name in COUNTS}
            result[t.label]["wall"] = jnp.zeros(count // block)
        return {
            "learn": learn, "starts": starts, "known": known, "result": result,
            "key": k_search, "next": jnp.int32(0),
        }  # fmt: skip

    def train(label: str, learner: Learner):
        def step(state):
            learn, metrics = learner.step(state["learn"][label])
            return {**state, "learn": {**state["learn"], label: learn}}, metrics

        return step

    def search_step(state):
        at = int(state["next"])
        task, first = blocks[at]
        heuristic = heuristic_of(task, state)
        starts = state["starts"][task.label][first : first + block]
        key = jax.random.fold_in(state["key"], at)

        def run(**options):
            return jax.block_until_ready(
                task.solve(task.problem, heuristic, starts, key, **{**task.options, **options})
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
        evaluate=lambda state: {**summary(tasks, state, slopes), **calibrations(tasks, state)},
        phases=tuple(phases),
        jittable=False,
    )


def heuristic_of(task: Task, state: dict[str, Any]) -> Any:
    """What `search` takes, with the net as it is trained by now."""
    learned = state["learn"].get(task.net or task.label)
    return task.heuristic(None if learned is None else learned.params)


def calibrations(tasks: Sequence[Task], state: dict[str, Any]) -> dict[str, np.ndarray]:
    """`calibration` of every task with a probe, its names behind the task's."""
    return {
        f"{t.label}/{name}": np.asarray(value)
        for t in tasks
        if t.probe is not None
        for name, value in calibration(t.problem, heuristic_of(t, state), t.probe).items()
    }


def costs(state: dict[str, Any], label: str) -> np.ndarray:
    """f64[N]: costs of a task's instances, nan where the search found nothing."""
    r = state["result"][label]
    solved = np.asarray(r["status"]) == SOLVED
    return np.where(solved, np.asarray(r["cost"], np.float64), np.nan)


def versus(cost: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """(mean cost over mean other, % of instances) over the instances that both solved.

    Means over what each solved alone would favour the one that solves only the easy ones.

    >>> versus(np.array([2.0, 4.0, np.nan, 1.0]), np.array([4.0, 8.0, 100.0, np.nan]))
    (0.5, 50.0)
    """
    both = np.isfinite(cost) & np.isfinite(other)
    ratio = cost[both].sum() / other[both].sum() if other[both].any() else np.nan
    return float(ratio), float(100 * both.mean())


def growth(cost: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """How costs f64[..., E, N] of N instances at E places x f64[E] of one or several series grow.

    Returns:
      (means f64[..., E] over the instances solved everywhere, their least-squares slopes f64[...], and how
      many instances those are in %). nan where there are none.

    >>> growth(np.array([[1.0, 5.0], [2.0, np.nan]]), np.array([0.0, 0.5]))
    (array([1., 2.]), array(2.), 50.0)
    """
    on = np.isfinite(cost).all(tuple(range(cost.ndim - 1)))
    means = cost[..., on].mean(-1) if on.any() else np.full(cost.shape[:-1], np.nan)
    centred = x - x.mean()
    return means, np.asarray(means @ centred / (centred @ centred)), float(100 * on.mean())


def summary(
    tasks: Sequence[Task], state: dict[str, Any], slopes: Sequence[tuple[str, str]] = ()
) -> dict[str, np.ndarray]:
    """Means per task; per series, growth from its first to its last task and arrays over its places.

    Means of counts and times are over all instances, those of costs over the solved ones, of a series' costs
    over those solved in all its tasks.
    """
    out: dict[str, Any] = {}
    rows: dict[str, list[tuple[float, float, float, np.ndarray]]] = {}
    for t in tasks:
        r = {k: np.asarray(v, np.float64) for k, v in state["result"][t.label].items()}
        cost = costs(state, t.label)
        solved = np.isfinite(cost)
        scalars = {
            "generated": r["num_generated"].mean(),
            "net_inputs": r["num_net_inputs"].mean(),
            "iterations": r["num_iters"].mean(),
            "max_open": r["max_open"].mean(),
            "time": r["wall"].mean(),
            "solved": 100 * solved.mean(),
            "cost": cost[solved].mean() if solved.any() else np.nan,
            "node_limit": 100 * (r["status"] == NODE_LIMIT).mean(),
            "failed": 100 * (~np.isin(r["status"], (SOLVED, NODE_LIMIT))).mean(),
        }
        for name, known in state["known"][t.label].items():
            known = np.asarray(known, np.float64)
            if name != "optimum":
                scalars[f"vs_{name}"], scalars[f"with_{name}"] = versus(cost, known)
                continue
            both = solved & (known > 0)  # at 0 there is nothing to find
            ratio = cost[both] / known[both]
            scalars["cost_gap"] = 100 * (ratio.mean() - 1) if both.any() else np.nan
            scalars["optimal"] = 100 * (cost == known).mean()
        out |= {f"{t.label}/{k}": v for k, v in scalars.items()}
        if t.series:
            rows.setdefault(t.series, []).append(
                (t.at, scalars["generated"], scalars["time"], cost)
            )
    series = {name: [np.asarray(v) for v in zip(*r, strict=True)] for name, r in rows.items()}
    for name, (at, generated, seconds, cost) in series.items():
        out |= {f"{name}_at": at, f"{name}_generated": generated, f"{name}_wall": seconds}
        if len(at) > 1:
            out[f"{name}_cost"] = growth(cost, at)[0]
            with np.errstate(divide="ignore", invalid="ignore"):  # solvers that make no states
                out[f"{name}/generated_growth"] = generated[-1] / generated[0]
            out[f"{name}/time_growth"] = seconds[-1] / seconds[0]
    for a, b in slopes:
        if a in series and b in series and len(at := series[a][0]) > 1:
            _, slope, share = growth(np.stack([series[a][3], series[b][3]]), at)
            out |= {f"{a}/slope": slope[0], f"{b}/slope": slope[1]}
            with np.errstate(divide="ignore", invalid="ignore"):
                out |= {f"{a}/slope_ratio": slope[0] / slope[1], f"{a}/slope_on": share}
    return {k: np.asarray(v, np.float32) for k, v in out.items()}
