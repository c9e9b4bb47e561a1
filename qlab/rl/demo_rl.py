"""Experiments that learn from demonstrations of mixed quality and their own experience at once.

Each task is learned by `off_policy` with E environments; a fixed share of every minibatch is drawn from the
demonstrations. Tasks of one shape run side by side in one program.
Letters: G = tasks of a group, E = environments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase
from qlab.rl.demo_tasks import DemoGroup
from qlab.rl.loop import task_keys
from qlab.rl.off_policy import OnlineConfig, OnlineState, off_policy
from qlab.rl.rollout import first_episode


class Schedule(NamedTuple):
    """How long, and how often it is looked at.

    Attributes:
      env_steps: of each task, all environments together. num_envs: E. points: evaluations during training.
      eval_episodes: of each of them.
    """

    env_steps: int
    num_envs: int
    points: int
    eval_episodes: int

    @property
    def tail(self) -> int:
        """The last fifth of the evaluations, whose mean is the final score."""
        return max(1, self.points // 5)

    @property
    def vector_steps(self) -> int:
        """Steps of all environments between two evaluations."""
        steps = self.env_steps // (self.num_envs * self.points)
        if steps < 1:
            raise UserError(
                f"env_steps={self.env_steps} give {self.num_envs} environments no step between {self.points} "
                "evaluations; raise env_steps or lower eval_points"
            )
        return steps


class GroupState(NamedTuple):
    """Leading axis G. online: learners. low, high: anchors, f32[G]. sums: f32[G, 2] of what `play` saw, over all
    evaluations and over the last ones."""

    online: OnlineState
    low: jax.Array
    high: jax.Array
    sums: dict[str, jax.Array]


class DemoState(NamedTuple):
    """key: of the seed. step: i32[]. groups: one GroupState each."""

    key: jax.Array
    step: jax.Array
    groups: tuple[GroupState, ...]


def demo_rl(
    groups: Sequence[DemoGroup], config: OnlineConfig, schedule: Schedule, *, num_seeds: int = 1
) -> Experiment[DemoState]:
    """Every task of every group: draw its demonstrations, then act and learn.

    A step is `schedule.vector_steps` steps of all environments with their updates, and one evaluation of the greedy
    policy. A seed varies demonstrations, the initial net, exploration, starts and minibatches; a task's keys hang on
    its name only, so that arms and subsets of the tasks share the draws. The anchors do not vary.

    Result metrics: "task/score" (mean of the last fifth of the evaluations), "task/auc_score" (mean of all), and where the
    agent has values "task/value_bias": mean of V(s) minus the discounted return that followed, at first states.
    """

    def learner(group: DemoGroup, variation: Any):
        step_one = group.task.env(variation).step

        def step_all(states, action, key):
            return jax.vmap(step_one)(states, action, jax.random.split(key, schedule.num_envs))

        return off_policy(step_all, group.agent, config, num_seeds=num_seeds * len(group.names))

    def play(group: DemoGroup, variation: Any, agent: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Means over greedy episodes: total (undiscounted return) and, with values, value_bias."""
        env, horizon = group.task.env(variation), group.task.horizon

        def policy(memory, k_act, obs, first):
            return memory, group.agent.act(agent, k_act, obs[None], greedy=True)[0]

        keys = jax.random.split(key, schedule.eval_episodes)
        run = jax.vmap(lambda k: first_episode(env, policy, (), k, horizon, config.discount))
        total, discounted, obs = run(keys)
        out = {"total": total.mean()}
        if group.agent.value is not None:
            out["value_bias"] = (group.agent.value(agent, obs) - discounted).mean()
        return out

    # Drawn and initialised by two programs: the first is the same for every arm.
    def draw_all(key: jax.Array, variations: Sequence[Any]) -> list[Any]:
        def one(group: DemoGroup, v: Any, k: jax.Array):
            return group.task.demos(v, jax.random.fold_in(k, 2)), group.task.anchors(v)

        return [
            jax.vmap(partial(one, g))(v, task_keys(key, g.names))
            for g, v in zip(groups, variations, strict=True)
        ]

    def start(group: DemoGroup, v: Any, key: jax.Array, demos: Any, anchors: Any) -> GroupState:
        k_reset, k_learn = (jax.random.fold_in(key, i) for i in (5, 3))
        states, obs = jax.vmap(group.task.env(v).reset)(
            jax.random.split(k_reset, schedule.num_envs)
        )
        given = demos if config.demo_rows else None
        online = learner(group, v).init(k_learn, states, obs, True, given)
        names = jax.eval_shape(partial(play, group, v), online.agent, key)
        sums = {n: jnp.zeros(2) for n in names}
        low, high = anchors
        return GroupState(online, low, high, sums)

    def start_all(key: jax.Array, variations: Sequence[Any], drawn: list[Any]):
        return tuple(
            jax.vmap(partial(start, g))(v, task_keys(key, g.names), *d)
            for g, v, d in zip(groups, variations, drawn, strict=True)
        )

    draw_all, start_all = jax.jit(draw_all), jax.jit(start_all)

    def init(key: jax.Array) -> DemoState:
        variations = [jax.tree.map(jnp.asarray, g.variation) for g in groups]
        drawn = draw_all(key, variations)
        return DemoState(key, jnp.int32(0), start_all(key, variations, drawn))

    def train(group: DemoGroup, step: jax.Array, v: Any, s: GroupState, key: jax.Array):
        loop = learner(group, v)

        def one(online, _):
            online = loop.step(online)
            return online, online.metrics["loss"]

        online, loss = jax.lax.scan(one, s.online, None, schedule.vector_steps)
        seen = play(group, v, online.agent, key)
        seen["total"] = 100 * (seen["total"] - s.low) / (s.high - s.low)
        counts = jnp.stack([jnp.float32(1), step >= schedule.points - schedule.tail])
        sums = {n: s.sums[n] + counts * x for n, x in seen.items()}
        return s._replace(online=online, sums=sums), seen, loss.mean()

    def step(state: DemoState):
        new, metrics, losses = [], {}, []
        for group, s in zip(groups, state.groups, strict=True):
            keys = task_keys(jax.random.fold_in(state.key, 1000 + state.step), group.names)
            run = jax.vmap(partial(train, group, state.step))
            s, seen, loss = run(group.variation, s, keys)
            new.append(s)
            losses.append(loss)
            for i, name in enumerate(group.names):
                metrics[f"{name}/score"] = seen["total"][i]
        metrics["loss"] = jnp.concatenate(losses).mean()
        return DemoState(state.key, state.step + 1, tuple(new)), metrics

    def evaluate(state: DemoState):
        out: dict[str, jax.Array] = {}
        for group, s in zip(groups, state.groups, strict=True):
            for i, name in enumerate(group.names):
                out[f"{name}/auc_score"] = s.sums["total"][i, 0] / schedule.points
                out[f"{name}/score"] = s.sums["total"][i, 1] / schedule.tail
                if "value_bias" in s.sums:
                    out[f"{name}/value_bias"] = s.sums["value_bias"][i, 1] / schedule.tail
        return out

    return Experiment(init, evaluate, (Phase("control", schedule.points, step),))
