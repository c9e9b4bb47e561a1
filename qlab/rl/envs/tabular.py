"""Tabular decision processes whose action is a vector of bins, and their exact solutions.

Every joint action is enumerated, so soft and hard optimal values, optimal policies and the return of any
policy are exact: the oracle for agents that factorise the action.
Letters: S = states, D = action dimensions, B = bins of a dimension, K = B^D joint actions (index
base B, dimension 0 most significant); column S of a transition is the end of the episode.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.rl.c2f import ActionGrid, all_bins, decode_c2f, encode_c2f
from qlab.rl.envs.env import Env, TimeStep


class TabularMDP(NamedTuple):
    """transition: f32[S, K, S+1], rows sum to 1. reward: f32[S, K, S+1]. start: f32[S]."""

    transition: jax.Array
    reward: jax.Array
    start: jax.Array


class Solution(NamedTuple):
    """v: f32[S]. q: f32[S, K]. policy: f32[S, K]."""

    v: jax.Array
    q: jax.Array
    policy: jax.Array


def joint_index(action: jax.Array, num_bins: int) -> jax.Array:
    """action f32[..., D] -> i32[...] in 0..K-1.

    >>> int(joint_index(jnp.array([0.9, -0.9]), 3))
    6
    """
    bins = encode_c2f(action, 1, num_bins)[..., 0, :]
    place = jnp.asarray([num_bins**i for i in range(action.shape[-1] - 1, -1, -1)])
    return (bins * place).sum(-1)


def refine(mdp: TabularMDP, num_bins: int, grid: ActionGrid) -> TabularMDP:
    """The same process seen through an agent's grid: K becomes the agent's number of joint actions.

    Each action of the agent (in the order of `all_bins(grid)`) does what its decoded centre does in
    bins of the process. With equal grids this only reorders nothing.
    """
    action = decode_c2f(jnp.asarray(all_bins(grid)), grid.num_bins)
    index = joint_index(action, num_bins)
    return TabularMDP(mdp.transition[:, index], mdp.reward[:, index], mdp.start)


def backup(mdp: TabularMDP, v: jax.Array, discount: float) -> jax.Array:
    """Q f32[S, K] of state values f32[S]."""
    after = jnp.concatenate([v, jnp.zeros(1, v.dtype)])
    return (mdp.transition * (mdp.reward + discount * after)).sum(-1)


def solve(mdp: TabularMDP, discount: float, alpha: float = 0.0, num_iters: int = 400) -> Solution:
    """Value iteration: soft with temperature alpha > 0, hard with alpha = 0.

    The soft policy is exp((Q - V) / alpha); the hard one is uniform over the best actions.
    """

    def value(q):
        return alpha * jax.nn.logsumexp(q / alpha, -1) if alpha else q.max(-1)

    v = jax.lax.fori_loop(
        0, num_iters, lambda _, v: value(backup(mdp, v, discount)), jnp.zeros(mdp.start.shape)
    )
    q = backup(mdp, v, discount)
    if alpha:
        return Solution(v, q, jax.nn.softmax(q / alpha, -1))
    best = (q >= q.max(-1, keepdims=True) - 1e-6).astype(jnp.float32)
    return Solution(v, q, best / best.sum(-1, keepdims=True))


def policy_value(mdp: TabularMDP, policy: jax.Array, discount: float) -> jax.Array:
    """Exact V of a policy f32[S, K], f32[S]: the solution of (I - gamma P) v = r."""
    num_states = mdp.start.shape[0]
    p = jnp.einsum("sk,skt->st", policy, mdp.transition)[:, :num_states]
    r = jnp.einsum("sk,skt,skt->s", policy, mdp.transition, mdp.reward)
    return jnp.linalg.solve(jnp.eye(num_states) - discount * p, r)


def normalised_return(mdp: TabularMDP, policy: jax.Array, discount: float) -> jax.Array:
    """Discounted return from the start distribution, 0 = uniform policy, 100 = optimal."""
    num_actions = mdp.transition.shape[1]
    uniform = jnp.full(policy.shape, 1 / num_actions)
    best = mdp.start @ solve(mdp, discount).v
    low = mdp.start @ policy_value(mdp, uniform, discount)
    return 100 * (mdp.start @ policy_value(mdp, policy, discount) - low) / (best - low)


class TabularState(NamedTuple):
    """state: i32[]. age: i32[], steps since the reset."""

    state: jax.Array
    age: jax.Array


def tabular_env(mdp: TabularMDP, num_dims: int, num_bins: int, horizon: int) -> Env:
    """The process as an Env: one-hot observations, actions in [-1, 1]^D, truncated after `horizon`."""
    num_states, num_actions = mdp.transition.shape[:2]
    if num_bins**num_dims != num_actions:
        raise ValueError(
            f"the process has {num_actions} joint actions, num_bins={num_bins} in each of "
            f"num_dims={num_dims} dimensions make {num_bins**num_dims}"
        )

    def observe(s: jax.Array) -> jax.Array:
        return jax.nn.one_hot(s, num_states)

    def reset(key: jax.Array) -> tuple[TabularState, jax.Array]:
        s = jax.random.categorical(key, jnp.log(mdp.start)).astype(jnp.int32)
        return TabularState(s, jnp.int32(0)), observe(s)

    def step(state: TabularState, action: jax.Array, key: jax.Array):
        k_next, k_reset = jax.random.split(key)
        k = joint_index(action, num_bins)
        after = jax.random.categorical(k_next, jnp.log(mdp.transition[state.state, k]))
        after = after.astype(jnp.int32)
        reward = mdp.reward[state.state, k, after]
        terminated = after == num_states
        truncated = (state.age + 1 >= horizon) & ~terminated
        # A terminated step has no next state: its final observation is the zero vector.
        final_obs = observe(after)
        fresh, first = reset(k_reset)
        over = terminated | truncated
        new = TabularState(jnp.where(over, fresh.state, after), jnp.where(over, 0, state.age + 1))
        obs = jnp.where(over, first, final_obs)
        return new, TimeStep(obs, reward, terminated, truncated, final_obs)

    return Env(reset, step, num_states, num_dims)


def from_numpy(transition: np.ndarray, reward: np.ndarray, start: np.ndarray) -> TabularMDP:
    """A TabularMDP from arrays, checked: shapes agree and every row is a distribution."""
    s, k, t = transition.shape
    if t != s + 1 or reward.shape != transition.shape or start.shape != (s,):
        raise ValueError(
            f"transition {transition.shape}, reward {reward.shape}, start {start.shape}: expected "
            "(S, K, S+1), the same, and (S,)"
        )
    if not np.allclose(transition.sum(-1), 1) or not np.isclose(start.sum(), 1):
        raise ValueError("rows of transition and start must sum to 1")
    return TabularMDP(*(jnp.asarray(x, jnp.float32) for x in (transition, reward, start)))
