"""An Experiment from one way of searching: learn its heuristic, then solve fixed instances.

Per task a jitted phase trains the net (if the arm has one), and a host phase searches a block of the
instances a step, with the wall clock taken after a warm-up search that compiles. Counts are exact and
repeat bit for bit; clocks do not, and their state leaves are called wall.
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

COUNTS = ("generated", "net_inputs", "iterations", "solved", "cost", "wall")


class SearchTask(NamedTuple):
    """One domain at one size of the action space.

    Attributes:
      name: of the task. family: tasks of one family are compared along the action axis.
      domain: with its macro-actions. starts: states [N, ...]; the same for every arm and seed.
      learner: trains the heuristic's parameters; None where nothing is learned.
      heuristic: params -> what `search` takes.
      options: of `search_many`.
    """

    name: str
    family: str
    domain: Domain
    starts: jax.Array
    learner: Learner | None
    heuristic: Callable[[Any], Any]
    options: dict[str, Any]


class TaskState(NamedTuple):
    """learn: LearnState or an empty tuple. found: {count: f32[N]}, NaN where not searched yet."""

    learn: Any
    found: dict[str, jax.Array]


class BenchState(NamedTuple):
    """step: i32[], blocks done over all tasks. tasks: one TaskState each."""

    step: jax.Array
    tasks: tuple[TaskState, ...]


def search_benchmark(
    tasks: Sequence[SearchTask], *, train_steps: int, num_blocks: int
) -> Experiment[BenchState]:
    """Every task: train_steps of its learner, then its instances in `num_blocks` host steps.

    What a seed varies: the initial net and the states it is trained on. The instances are fixed.
    Result metrics per task: generated and net_inputs (means over instances), time (seconds an
    instance), solved (%), cost_gap (% over the optimum, of the solved ones), iterations. Per family:
    generated_growth and time_growth from its smallest to its largest action space; arrays num_actions,
    generated and time along that axis.
    """

    def init(key: jax.Array) -> BenchState:
        empty = {name: jnp.full(tasks[0].starts.shape[0], jnp.nan) for name in COUNTS}
        states = []
        for i, task in enumerate(tasks):
            learn = (
                ()
                if task.learner is None
                else jax.jit(task.learner.init)(jax.random.fold_in(key, i))
            )
            states.append(TaskState(learn, dict(empty)))
        return BenchState(jnp.int32(0), tuple(states))

    def replaced(state: BenchState, i: int, task: TaskState) -> BenchState:
        return state._replace(tasks=(*state.tasks[:i], task, *state.tasks[i + 1 :]))

    def train(i: int, learner: Learner) -> Phase[BenchState]:
        def step(state: BenchState):
            learn, metrics = learner.step(state.tasks[i].learn)
            return replaced(state, i, state.tasks[i]._replace(learn=learn)), metrics

        return Phase(f"train {tasks[i].name}", train_steps, step)

    def solve(i: int, task: SearchTask, before: int) -> Phase[BenchState]:
        size = -(-task.starts.shape[0] // num_blocks)
        compiled: list[bool] = []

        def step(state: BenchState):
            block = int(state.step) - before
            learn, found = state.tasks[i]
            heuristic = task.heuristic(learn.params if task.learner else None)
            index = np.arange(block * size, min((block + 1) * size, task.starts.shape[0]))
            starts = task.starts[jnp.asarray(np.resize(index, size))]  # the last block is filled up
            if not compiled:
                jax.block_until_ready(
                    search_many(task.domain.problem, heuristic, starts, **task.options)
                )
                compiled.append(True)
            begun = time.perf_counter()
            r = jax.block_until_ready(
                search_many(task.domain.problem, heuristic, starts, **task.options)
            )
            wall = (time.perf_counter() - begun) / size
            values = {
                "generated": r.num_generated,
                "net_inputs": r.num_net_inputs,
                "iterations": r.num_iters,
                "solved": r.solved,
                "cost": r.cost,
                "wall": np.full(size, wall),
            }
            n = len(index)
            found = {
                k: found[k].at[index].set(jnp.asarray(v, jnp.float32)[:n])
                for k, v in values.items()
            }
            state = replaced(state, i, TaskState(learn, found))._replace(step=state.step + 1)
            return state, {"generated": float(values["generated"][:n].mean())}

        return Phase(f"search {task.name}", num_blocks, step, "host")

    phases = []
    for i, task in enumerate(tasks):
        if task.learner is not None:
            phases.append(train(i, task.learner))
        phases.append(solve(i, task, i * num_blocks))

    optimum = [t.domain.distance(t.starts) if t.domain.distance else None for t in tasks]

    def evaluate(state: BenchState) -> dict[str, jax.Array]:
        out: dict[str, jax.Array] = {}
        for task, (_, found), best in zip(tasks, state.tasks, optimum, strict=True):
            solved = found["solved"] > 0
            out[f"{task.name}/generated"] = found["generated"].mean()
            out[f"{task.name}/net_inputs"] = found["net_inputs"].mean()
            out[f"{task.name}/time"] = found["wall"].mean()
            out[f"{task.name}/solved"] = 100.0 * solved.mean()
            out[f"{task.name}/iterations"] = found["iterations"].mean()
            if best is not None:
                gap = jnp.where(solved, found["cost"] / best - 1.0, 0.0)
                out[f"{task.name}/cost_gap"] = 100.0 * gap.sum() / jnp.maximum(solved.sum(), 1)
        for family in dict.fromkeys(t.family for t in tasks):
            names = [t.name for t in tasks if t.family == family]
            for count in ("generated", "time"):
                along = jnp.stack([out[f"{n}/{count}"] for n in names])
                out[f"{family}/{count}_growth"] = along[-1] / along[0]
                out[f"{family}_{count}"] = along
            sizes = [float(t.domain.problem.num_actions) for t in tasks if t.family == family]
            out[f"{family}_num_actions"] = jnp.asarray(sizes)
        return out

    return Experiment(init, evaluate, tuple(phases))
