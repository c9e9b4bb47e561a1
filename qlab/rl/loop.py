"""Experiments from agents: training on logged data, with several tasks learned side by side."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Phase
from qlab.rl.agent import Agent, Transition


class OfflineGroup(NamedTuple):
    """Tasks of one shape and the agent that learns each of them, in one program.

    Attributes:
      names: of the G tasks.
      agent: its hyper-parameters serve all of them.
      context: pytree with leading axis G, what makes the tasks differ (tables, shares, optima).
      dataset: (context of one task, key) -> Transition with a leading axis of logged steps.
      score: (context of one task, agent state, key) -> dict of scalars, cheap: it runs at every step.
      inspect: (context of one task, agent state, data, key) -> dict, once at the end; arrays become figures.
    """

    names: tuple[str, ...]
    agent: Agent
    context: Any
    dataset: Callable[[Any, jax.Array], Transition]
    score: Callable[[Any, Any, jax.Array], dict[str, jax.Array]]
    inspect: Callable[[Any, Any, Transition, jax.Array], dict[str, jax.Array]]


class GroupState(NamedTuple):
    """Leading axis G on every leaf: learner states, logged data, contexts, sums of the scores so far."""

    agent: Any
    data: Transition
    context: Any
    score_sums: dict[str, Any]


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def task_key(key: jax.Array, name: str) -> jax.Array:
    """A task's key: it hangs on the name only, so that arms and subsets of the tasks share it."""
    return jax.random.fold_in(key, _number(name))


def task_keys(key: jax.Array, names: Sequence[str]) -> jax.Array:
    """key[G]: `task_key` of several."""
    ids = jnp.asarray([_number(n) for n in names], jnp.int32)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


class OfflineState(NamedTuple):
    """key: of the seed. step: i32[]. groups: one GroupState each."""

    key: jax.Array
    step: jax.Array
    groups: tuple[GroupState, ...]


def offline_rl(
    groups: Sequence[OfflineGroup],
    *,
    num_updates: int,
    batch_size: int,
    updates_per_step: int = 20,
) -> Experiment[OfflineState]:
    """Every task of every group: draw its log, then num_updates updates on uniform minibatches of it.

    A step is `updates_per_step` updates and one `score` of each task. What a seed varies: the logged
    data, the initial network and the minibatches, each with its own key, and a task's keys hang on its
    name only, so that arms and subsets of the tasks share them.

    Result metrics: "task/name" of `inspect` and of the last `score`, and "task/auc_name": the mean of
    that score over training.
    """
    if num_updates % updates_per_step:
        raise ValueError(
            f"num_updates={num_updates} is not a multiple of updates_per_step={updates_per_step}"
        )

    # Drawn and initialised by two programs: the first is the same for every arm.
    def draw_all(key: jax.Array, contexts: Sequence[Any]) -> list[Transition]:
        keys = [task_keys(jax.random.fold_in(key, 2), g.names) for g in groups]
        return [jax.vmap(g.dataset)(c, k) for g, c, k in zip(groups, contexts, keys, strict=True)]

    def init_all(key: jax.Array) -> list[Any]:
        return [
            jax.vmap(g.agent.init)(task_keys(jax.random.fold_in(key, 3), g.names)) for g in groups
        ]

    draw_all, init_all = jax.jit(draw_all), jax.jit(init_all)

    def init(key: jax.Array) -> OfflineState:
        contexts = [jax.tree.map(jnp.asarray, g.context) for g in groups]
        states = []
        for g, context, data, agent in zip(
            groups, contexts, draw_all(key, contexts), init_all(key), strict=True
        ):
            one = jax.tree.map(lambda x: x[0], (g.context, agent))
            names = jax.eval_shape(lambda c, a, g=g: g.score(c, a, key), *one)
            sums = {n: np.zeros(len(g.names), x.dtype) for n, x in names.items()}
            states.append(GroupState(agent, data, context, sums))
        return OfflineState(key, jnp.int32(0), tuple(states))

    def train(group: OfflineGroup, state: GroupState, key: jax.Array, step: jax.Array):
        """updates_per_step updates of one task."""
        num_rows = state.data.reward.shape[0]

        def one(agent, i):
            k_rows, k_update = jax.random.split(
                jax.random.fold_in(key, step * updates_per_step + i)
            )
            # Not randint: it draws twice and compiles twice as long; the bias is below 2^-24 a row.
            rows = (jax.random.uniform(k_rows, (batch_size,)) * num_rows).astype(jnp.int32)
            batch = jax.tree.map(lambda x: x[rows], state.data)
            agent, metrics = group.agent.update(agent, k_update, batch)
            return agent, metrics["loss"]

        return jax.lax.scan(one, state.agent, jnp.arange(updates_per_step))

    def step(state: OfflineState):
        new, metrics, losses = [], {}, []
        for group, s in zip(groups, state.groups, strict=True):
            keys = task_keys(jax.random.fold_in(state.key, 1), group.names)
            agent, loss = jax.vmap(lambda s, k, g=group: train(g, s, k, state.step))(s, keys)
            score = jax.vmap(group.score)(s.context, agent, keys)
            sums = {n: s.score_sums[n] + v for n, v in score.items()}
            new.append(s._replace(agent=agent, score_sums=sums))
            losses.append(loss.mean(-1))
            for i, task in enumerate(group.names):
                metrics |= {f"{task}/{n}": v[i] for n, v in score.items()}
        metrics["loss"] = jnp.concatenate(losses).mean()
        return OfflineState(state.key, state.step + 1, tuple(new)), metrics

    def evaluate(state: OfflineState):
        out: dict[str, jax.Array] = {}
        for group, s in zip(groups, state.groups, strict=True):
            keys = task_keys(jax.random.fold_in(state.key, 4), group.names)
            result = jax.vmap(group.score)(s.context, s.agent, keys)
            result |= jax.vmap(group.inspect)(s.context, s.agent, s.data, keys)
            steps = jnp.maximum(state.step, 1)
            result |= {f"auc_{n}": v / steps for n, v in s.score_sums.items()}
            for i, task in enumerate(group.names):
                out |= {f"{task}/{n}": v[i] for n, v in result.items()}
        return out

    phase = Phase("train", num_updates // updates_per_step, step)
    return Experiment(init, evaluate, (phase,))
