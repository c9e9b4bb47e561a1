"""Tabular decision processes whose action is a vector of bins, and their exact solutions.

Every joint action is enumerated, so soft and hard optimal values, optimal policies and the return of any
policy are exact: the oracle for agents that factorise the action.
Letters: S = states, D = action dimensions, B = bins of a dimension, K = B^D joint actions (index
base B, dimension 0 most significant); column S of a transition is the end of the episode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.rl.c2f import ActionGrid, all_bins, encode_c2f
from qlab.rl.envs.env import Env, TimeStep


class TabularMDP(NamedTuple):
    """transition: f32[S, K, S+1], rows sum to 1. reward: f32[S, K, S+1]. start: f32[S]."""

    transition: Any
    reward: Any
    start: Any


class Solution(NamedTuple):
    """v: f32[S]. q: f32[S, K]. policy: f32[S, K]."""

    v: Any
    q: Any
    policy: Any


def tabular_mdp(transition: np.ndarray, reward: np.ndarray, start: np.ndarray) -> TabularMDP:
    """A TabularMDP from NumPy arrays, checked: shapes agree and every row is a distribution."""
    s = len(start)
    if (
        transition.ndim != 3
        or transition.shape[::2] != (s, s + 1)
        or reward.shape != transition.shape
    ):
        raise ValueError(
            f"transition {transition.shape}, reward {reward.shape}, start {start.shape}: expected "
            "(S, K, S+1), the same, and (S,)"
        )
    if not np.allclose(transition.sum(-1), 1) or not np.isclose(start.sum(), 1):
        raise ValueError("rows of transition and start must sum to 1")
    return TabularMDP(*(x.astype(np.float32) for x in (transition, reward, start)))


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

    Action i does what the centre of cell `all_bins(grid)[i]` does in the bins of the process. On the host.
    """
    cells = grid.num_bins**grid.num_levels
    place = grid.num_bins ** np.arange(grid.num_levels - 1, -1, -1)
    cell = (all_bins(grid) * place[:, None]).sum(1)  # [A, D]
    bins = (2 * cell + 1) * num_bins // (2 * cells)  # of the centre (2 cell + 1) / cells - 1
    index = (bins * num_bins ** np.arange(grid.num_dims - 1, -1, -1)).sum(-1)
    return TabularMDP(mdp.transition[:, index], mdp.reward[:, index], mdp.start)


def solve(mdp: TabularMDP, discount: float, alpha: float = 0.0, num_iters: int = 2000) -> Solution:
    """Value iteration in float64 on the host: soft with temperature alpha > 0, hard with alpha = 0.

    The soft policy is exp((Q - V) / alpha); the hard one is uniform over the best actions.
    """
    transition, reward = np.float64(mdp.transition), np.float64(mdp.reward)
    v = np.zeros(len(mdp.start) + 1)  # the last entry is the end of the episode
    for _ in range(num_iters):
        q = (transition * (reward + discount * v)).sum(-1)
        top = q.max(-1, keepdims=True)
        new = top[:, 0] + (alpha * np.log(np.exp((q - top) / alpha).sum(-1)) if alpha else 0.0)
        change = np.abs(new - v[:-1]).max()
        v[:-1] = new
        if change < 1e-12:
            break
    q = (transition * (reward + discount * v)).sum(-1)
    if alpha:
        policy = np.exp((q - v[:-1, None]) / alpha)
    else:
        policy = (q >= q.max(-1, keepdims=True) - 1e-9).astype(float)
    policy /= policy.sum(-1, keepdims=True)
    return Solution(*(np.float32(x) for x in (v[:-1], q, policy)))


def policy_value(mdp: TabularMDP, policy: Any, discount: float) -> Any:
    """Exact V of a policy f32[S, K], f32[S]: the solution of (I - gamma P) v = r.

    NumPy in, NumPy out (float64); jittable with arrays of JAX.
    """
    xp: Any = np if isinstance(policy, np.ndarray) else jnp
    num_states = mdp.start.shape[0]
    p = xp.einsum("sk,skt->st", policy, mdp.transition)[:, :num_states]
    r = xp.einsum("sk,skt,skt->s", policy, mdp.transition, mdp.reward)
    return xp.linalg.solve(xp.eye(num_states) - discount * p, r)


def choose(u: jax.Array, probs: Any) -> jax.Array:
    """The index that u uniform in [0, 1) picks from probs f32[K], i32[]; never one of probability 0.

    >>> [int(choose(jnp.float32(u), jnp.array([0.0, 0.5, 0.5]))) for u in (0.0, 0.4, 0.6)]
    [1, 1, 2]
    """
    cdf = jnp.cumsum(jnp.asarray(probs))
    return (u * cdf[-1] >= cdf).sum().astype(jnp.int32)


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
        s = choose(jax.random.uniform(key), mdp.start)
        return TabularState(s, jnp.int32(0)), observe(s)

    def step(state: TabularState, action: jax.Array, key: jax.Array):
        u_next, u_reset = jax.random.uniform(key, (2,))
        k = joint_index(action, num_bins)
        after = choose(u_next, jnp.asarray(mdp.transition)[state.state, k])
        reward = jnp.asarray(mdp.reward)[state.state, k, after]
        terminated = after == num_states
        truncated = (state.age + 1 >= horizon) & ~terminated
        # A terminated step has no next state: its final observation is the zero vector.
        final_obs = observe(after)
        over = terminated | truncated
        first = choose(u_reset, mdp.start)
        new = TabularState(jnp.where(over, first, after), jnp.where(over, 0, state.age + 1))
        return new, TimeStep(observe(new.state), reward, terminated, truncated, final_obs)

    return Env(reset, step, num_states, num_dims)
