"""A learner on one environment for a fixed number of steps, then its greedy policy over fresh episodes.

Letters: E = environments side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase
from qlab.rl.agent import Agent
from qlab.rl.envs.drawings import filmed
from qlab.rl.envs.env import Env
from qlab.rl.loop import task_key
from qlab.rl.off_policy import OnlineConfig, off_policy
from qlab.rl.rollout import episode_scores

STEPS_BETWEEN = 10  # two frames of a film


class Budget(NamedTuple):
    """num_steps: of all E environments together. num_envs: E. round_steps: of all, between two log lines. horizon: of
    an episode. eval_episodes: of the test."""

    num_steps: int
    num_envs: int
    round_steps: int
    horizon: int
    eval_episodes: int


class Scored(NamedTuple):
    """env: states of E environments. running: f32[E], return of the episodes under way. total: f32[], sum of returns
    of `count` i32[] episodes that ended since the round began."""

    env: Any
    running: jax.Array
    total: jax.Array
    count: jax.Array


def control_study(
    name: str,
    env: Env,
    agent: Agent,
    config: OnlineConfig,
    budget: Budget,
    *,
    film: bool = False,
    num_seeds: int = 1,
) -> Experiment:
    """Trains for budget.num_steps environment steps, then scores the greedy policy.

    Args:
      name: of the task; keys hang on it, so that arms share them.
      film: record the start of a test episode as arrays "film" and "film_step"; the name is a process of `envs.control`.
      num_seeds: for the check of the memory.

    A seed varies the net, exploration, minibatches, and the starts of training and test. Step metric "name/return": mean
    over the episodes that ended in a round (while exploring). Results: "name/return", mean over the test's episodes;
    array "returns" f32[eval_episodes].
    Raises:
      UserError: num_envs does not divide round_steps, or round_steps num_steps; a replay that does not fit.
    """
    b = budget
    if b.round_steps % b.num_envs or b.num_steps % b.round_steps:
        raise UserError(
            f"num_envs={b.num_envs} must divide round_steps={b.round_steps}, and that num_steps={b.num_steps}"
        )

    def env_step(state: Scored, action: jax.Array, key: jax.Array):
        inner, ts = jax.vmap(env.step)(state.env, action, jax.random.split(key, b.num_envs))
        running, over = state.running + ts.reward, ts.terminated | ts.truncated
        total = state.total + (running * over).sum()
        count = state.count + over.sum(dtype=jnp.int32)
        return Scored(inner, jnp.where(over, 0.0, running), total, count), ts

    loop = off_policy(env_step, agent, config, num_seeds=num_seeds)

    @jax.jit
    def init(key: jax.Array):
        key = task_key(key, name)
        starts = jax.random.split(jax.random.fold_in(key, 2), b.num_envs)
        states, obs = jax.vmap(env.reset)(starts)
        scored = Scored(states, jnp.zeros(b.num_envs), jnp.float32(0), jnp.int32(0))
        return loop.init(key, scored, obs, True), jax.random.fold_in(key, 3)

    def step(state):
        online, k_test = state
        fresh = online.env._replace(total=jnp.float32(0), count=jnp.int32(0))
        online = jax.lax.fori_loop(
            0, b.round_steps // b.num_envs, lambda i, s: loop.step(s), online._replace(env=fresh)
        )
        mean = jnp.where(online.env.count > 0, online.env.total / online.env.count, jnp.nan)
        named = {k if k == "loss" else f"{name}/{k}": v for k, v in online.metrics.items()}
        return (online, k_test), named | {f"{name}/return": mean}

    def evaluate(state):
        online, k_test = state
        policy = lambda key, obs: agent.act(online.agent, key, obs, greedy=True)  # noqa: E731
        returns = episode_scores(env, policy, k_test, b.eval_episodes, b.horizon)
        out = {"return": returns.mean(), "least": returns.min(), "returns": returns}
        if film:
            out |= filmed(name, env, policy, k_test, STEPS_BETWEEN)
        return {f"{name}/{k}": v for k, v in out.items()}

    # "map": under vmap the condition on whether to learn yet would run both sides
    phase = Phase("train", b.num_steps // b.round_steps, step)
    return Experiment(init, evaluate, (phase,), "map")
