"""Experience from an environment, in one scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlab.rl.agent import Transition
from qlab.rl.envs.env import Env

# (memory, key, obs, first) -> (memory, action); `first` is true at the first step of an episode.
Policy = Callable[[Any, jax.Array, Any, jax.Array], tuple[Any, jax.Array]]


def collect(
    env: Env, policy: Policy, memory: Any, key: jax.Array, num_steps: int, discount: float
) -> tuple[Transition, jax.Array]:
    """num_steps transitions of one environment in order, and bool[num_steps]: an episode ended here."""
    k_reset, k_steps = jax.random.split(key)
    state, obs = env.reset(k_reset)

    def one(carry, i):
        state, obs, first, memory = carry
        k_act, k_env = jax.random.split(jax.random.fold_in(k_steps, i))
        memory, action = policy(memory, k_act, obs, first)
        state, ts = env.step(state, action, k_env)
        row = Transition(
            obs=obs,
            action=action,
            reward=ts.reward,
            discount=discount * (1.0 - ts.terminated),
            next_obs=ts.final_obs,
        )
        over = ts.terminated | ts.truncated
        return (state, ts.obs, over, memory), (row, over)

    carry = (state, obs, jnp.bool_(True), memory)
    return jax.lax.scan(one, carry, jnp.arange(num_steps))[1]


def episode_returns(reward: jax.Array, ends: jax.Array, discount: float) -> jax.Array:
    """The discounted return of its whole episode at every step, f32[T] from reward f32[T], ends bool[T].

    >>> episode_returns(jnp.array([0.0, 1.0, 5.0]), jnp.array([False, True, True]), 0.5).tolist()
    [0.5, 0.5, 5.0]
    """

    def back(after, x):
        r, end = x
        to_go = r + discount * jnp.where(end, 0.0, after)
        return to_go, to_go

    _, to_go = jax.lax.scan(back, jnp.float32(0), (reward, ends), reverse=True)
    first = jnp.concatenate([jnp.ones(1, bool), ends[:-1]])

    def forth(current, x):
        value, is_first = x
        current = jnp.where(is_first, value, current)
        return current, current

    return jax.lax.scan(forth, jnp.float32(0), (to_go, first))[1]


Acting = Callable[[jax.Array, Any], jax.Array]  # (key, obs with leading axis E) -> actions [E]


def episode_scores(
    env: Env, policy: Acting, key: jax.Array, num_episodes: int, num_steps: int
) -> jax.Array:
    """Undiscounted return f32[num_episodes] of one episode each, at most num_steps long, side by side."""
    n = num_episodes

    def one(carry, keys):
        states, obs, alive, total = carry
        states, ts = jax.vmap(env.step)(states, policy(keys[n], obs), keys[:n])
        total += alive * ts.reward
        return (states, ts.obs, alive & ~(ts.terminated | ts.truncated), total), None

    k_reset, k_steps = jax.random.split(key)
    states, obs = jax.vmap(env.reset)(jax.random.split(k_reset, n))
    carry = (states, obs, jnp.ones(n, bool), jnp.zeros(n))
    keys = jax.random.split(k_steps, (num_steps, n + 1))
    return jax.lax.scan(one, carry, keys)[0][3]


def film(
    env: Env, policy: Acting, key: jax.Array, num_frames: int, every: int
) -> tuple[Any, jax.Array]:
    """States of one episode, every so many steps, and bool[num_frames]: it had not ended before.

    The first frame is the first state; the states have the leading axis num_frames.
    """

    def one(carry, k):
        state, obs, alive = carry
        state_then, ts = env.step(state, policy(k[0], obs[None])[0], k[1])
        return (state_then, ts.obs, alive & ~(ts.terminated | ts.truncated)), (state, alive)

    k_reset, k_steps = jax.random.split(key)
    carry = (*env.reset(k_reset), jnp.bool_(True))
    keys = jax.random.split(k_steps, ((num_frames - 1) * every + 1, 2))
    return jax.tree.map(lambda x: x[::every], jax.lax.scan(one, carry, keys)[1])


def best_share(total: jax.Array, share: float | jax.Array) -> jax.Array:
    """f32[T], 1 on the best `share` of the steps by the return `total` of their episodes, and on ties.

    >>> best_share(jnp.array([1.0, 1.0, 3.0, 2.0]), 0.5).tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    n = total.shape[0]
    count = jnp.maximum(jnp.round(share * n), 1).astype(jnp.int32)  # share may be traced
    bar = jnp.sort(total)[n - count]
    return (total >= bar).astype(jnp.float32)


def first_episode(
    env: Env, policy: Policy, memory: Any, key: jax.Array, horizon: int, discount: float
) -> tuple[jax.Array, jax.Array, Any]:
    """One episode of at most `horizon` steps: its return, its discounted return (f32[] each), its first observation."""
    data, over = collect(env, policy, memory, key, horizon, 1.0)
    alive = jnp.cumsum(over) - over == 0
    reward = jnp.where(alive, data.reward, 0.0)
    first = jax.tree.map(lambda x: x[0], data.obs)
    return reward.sum(), (reward * discount ** jnp.arange(horizon)).sum(), first
