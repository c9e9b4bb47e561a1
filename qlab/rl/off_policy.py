"""Off-policy learning while acting: E environments in step, a window replay, updates between the steps.

The environments are one function of all of them (they may share a curriculum), with the fields of
`envs.env.TimeStep` and a leading axis E. Whether the agent learns is a number in the state, so that a random agent runs the
same program as the learner it is compared with. Demonstrations may fill a fixed part of every minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase
from qlab.rl.agent import Agent, Transition
from qlab.rl.loop import task_key
from qlab.rl.replay import check_fits, replay_bytes
from qlab.rl.windows import Windows, window_ready, window_sample, windows_add, windows_init


class OnlineConfig(NamedTuple):
    """How the agent learns.

    Attributes:
      discount: gamma, of the transitions. updates_per_step: after each step of all environments. batch_size: windows of
        an update. n_step: steps of a window. capacity, learning_starts: of the replay, in rows. demo_rows: rows of a
        minibatch that come from the demonstrations, the others are windows.
    """

    discount: float
    updates_per_step: int
    batch_size: int = 128
    n_step: int = 1
    capacity: int = 20_000
    learning_starts: int = 1000
    demo_rows: int = 0


class OnlineState(NamedTuple):
    """key: of the steps. step: i32[]. learns: bool[]. agent: its state. env: states of all environments. obs: the
    next ones. metrics: of the last update, 0 before the first. demos: one-step rows, fixed, or None."""

    key: jax.Array
    step: jax.Array
    learns: jax.Array
    agent: Any
    env: Any
    obs: Any
    replay: Windows
    metrics: dict[str, jax.Array]
    demos: Transition | None = None


class Online(NamedTuple):
    """init: (key, state of the environments, their observations, learns bool[], demos=None) -> state. step: state -> state,
    one step of all environments and the updates after it; metrics of the last update are state.metrics."""

    init: Callable[..., OnlineState]
    step: Callable[[OnlineState], OnlineState]


def off_policy(
    env_step: Callable[[Any, jax.Array, jax.Array], tuple[Any, Any]],
    agent: Agent,
    config: OnlineConfig,
    *,
    num_seeds: int = 1,
) -> Online:
    """Acts, stores and, where the state says so, learns.

    Args:
      env_step: (states, actions [E], key) -> (states, TimeStep with leading axis E).
      num_seeds: side by side, for the check of the memory.
    Raises:
      UserError: a replay too small for one window or for learning_starts, or too large for the memory; demo_rows
        that do not fit a minibatch of one-step rows.
    """
    c = config
    if not 0 <= c.demo_rows <= c.batch_size or (c.demo_rows and c.n_step > 1):
        raise UserError(
            f"demo_rows={c.demo_rows}: expected 0 to batch_size={c.batch_size}, and n_step=1, not {c.n_step}"
        )

    def row_of(obs: Any, action: Any, ts: Any) -> Transition:
        return Transition(
            obs=obs,
            action=action,
            reward=ts.reward,
            discount=(c.discount * (1.0 - ts.terminated)).astype(jnp.float32),
            next_obs=ts.final_obs,
            demo=jnp.zeros_like(ts.reward) if c.demo_rows else None,
        )

    def draw(state: OnlineState, key: jax.Array) -> Transition:
        """One minibatch: demo_rows demonstrations first."""
        if not c.demo_rows:
            return window_sample(state.replay, key, c.batch_size, c.n_step)
        k_demo, k_own = jax.random.split(key)
        demos = state.demos
        assert demos is not None, "init refuses demo_rows without demonstrations"
        at = jax.random.uniform(k_demo, (c.demo_rows,)) * demos.reward.shape[0]
        rows = jax.tree.map(lambda x: x[at.astype(jnp.int32)], demos)
        if c.demo_rows == c.batch_size:
            return rows
        own = window_sample(state.replay, k_own, c.batch_size - c.demo_rows)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, own)

    def init(key: jax.Array, env: Any, obs: Any, learns: Any, demos: Any = None) -> OnlineState:
        if (demos is None) == bool(c.demo_rows):
            raise UserError(
                f"demo_rows={c.demo_rows} with {'no' if demos is None else 'unused'} demonstrations"
            )
        k_agent = jax.random.fold_in(key, 0)
        state = agent.init(k_agent)
        action = jax.eval_shape(agent.act, state, key, obs)
        ts = jax.eval_shape(env_step, env, action, key)[1]
        row = jax.eval_shape(row_of, obs, action, ts)
        num_envs = row.reward.shape[0]
        held = c.capacity // num_envs
        if held < c.n_step or held * num_envs < c.learning_starts:
            raise UserError(
                f"replay_size={c.capacity}: learning_starts={c.learning_starts} rows and n_step={c.n_step} steps of "
                f"{num_envs} environments must fit"
            )
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), row)
        check_fits(num_seeds * replay_bytes(one, c.capacity), "replay_size")
        replay = windows_init(row, c.capacity)
        learns = jnp.asarray(learns, bool)
        new = OnlineState(key, jnp.int32(0), learns, state, env, obs, replay, {}, demos)
        batch = jax.eval_shape(draw, new, key)
        names = jax.eval_shape(agent.update, state, key, batch)[1]
        metrics = {k: jnp.zeros((), v.dtype) for k, v in names.items()}
        return new._replace(key=jax.random.fold_in(key, 1), metrics=metrics)

    def learn(state: OnlineState, key: jax.Array) -> OnlineState:
        def update(carry, k):
            return agent.update(carry[0], k[1], draw(state, k[0])), None

        def updates(carry):
            return jax.lax.scan(update, carry, jax.random.split(key, (c.updates_per_step, 2)))[0]

        ready = window_ready(state.replay, c.learning_starts, c.n_step)
        carry = (state.agent, state.metrics)
        new, metrics = jax.lax.cond(ready & state.learns, updates, lambda x: x, carry)
        return state._replace(agent=new, metrics=metrics)

    def step(state: OnlineState) -> OnlineState:
        k_act, k_env, k_learn = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        action = agent.act(state.agent, k_act, state.obs)
        env, ts = env_step(state.env, action, k_env)
        row = row_of(state.obs, action, ts)
        replay = windows_add(state.replay, row, ts.terminated | ts.truncated)
        state = state._replace(step=state.step + 1, env=env, obs=ts.obs, replay=replay)
        return learn(state, k_learn) if c.updates_per_step else state

    return Online(init, step)


class OnlineTask(NamedTuple):
    """One task of an experiment.

    Attributes:
      loop: `off_policy`. reset: key -> (states of the environments, observations).
      busy: (their states, n i32[]) -> bool[], one of the first n episodes has not ended.
      metrics: (their states, number of the first episode, count) -> scalars of a round of `count` episodes.
      results: their states -> results, on the host, at the end. learns: False keeps the agent as it starts.
    """

    loop: Online
    reset: Callable[[jax.Array], tuple[Any, Any]]
    busy: Callable[[Any, jax.Array], jax.Array]
    metrics: Callable[[Any, jax.Array, int], dict[str, jax.Array]]
    results: Callable[[Any], Mapping[str, Any]]
    learns: bool = True


def online_rl(tasks: Mapping[str, OnlineTask], episodes: int, round_episodes: int) -> Experiment:
    """Each task a phase of its own, a step a round: until its next `round_episodes` episodes have ended.

    A task's key hangs on its name only, so that arms with fewer tasks share it. A seed varies the net,
    exploration, minibatches and what `reset` and the environments draw. Metrics: "task/name".

    Raises:
      UserError: round_episodes does not divide episodes.
    """
    if round_episodes < 1 or episodes % round_episodes:
        raise UserError(f"round_episodes={round_episodes} does not divide episodes={episodes}")

    def start(name: str) -> Callable[[jax.Array], Any]:
        def init(key: jax.Array) -> Any:
            key = task_key(key, name)
            task = tasks[name]
            return task.loop.init(key, *task.reset(jax.random.fold_in(key, 2)), task.learns)

        return jax.jit(init)

    starts = {name: start(name) for name in tasks}

    def init(key: jax.Array) -> Any:
        return {name: (make(key), jnp.int32(0)) for name, make in starts.items()}

    def phase(name: str) -> Phase:
        task = tasks[name]

        def step(states: Any):
            state, number = states[name]
            first, upto = number * round_episodes, (number + 1) * round_episodes
            state = jax.lax.while_loop(lambda s: task.busy(s.env, upto), task.loop.step, state)
            metrics = task.metrics(state.env, first, round_episodes) | state.metrics
            # the runner looks for non-finite values in "loss"
            named = {k if k == "loss" else f"{name}/{k}": v for k, v in metrics.items()}
            return states | {name: (state, number + 1)}, named

        return Phase(name, episodes // round_episodes, step)

    def evaluate(states: Any):
        found = {name: task.results(states[name][0].env) for name, task in tasks.items()}
        return {f"{name}/{k}": v for name, out in found.items() for k, v in out.items()}

    # "map": under vmap the loops over rounds and the updates' condition would run for all seeds
    return Experiment(init, evaluate, tuple(map(phase, tasks)), "map", jittable=False)
