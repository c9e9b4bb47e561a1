"""Small exact tasks in which the dimensions of an action matter together, and the data logged on them.

bandit     One step, two dimensions: the motivating example of ARSQ (Liu et al. 2025, project page).
           Three modes: r = 1, and the more frequent r = 0.1 and r = -1. Every other action pays 0. The
           modes share bins with the optimal one, as they must for per-dimension values to mislead:
           (hi, hi) pays 1, (lo, hi) 0.1, (hi, lo) -1.
chain      Five states in a row, two thrusters with three bins {left, off, right}. Both thrusters the same way
           (LL or RR) move one state forward, opposite ways (LR, RL) stay and cost 0.2, both off drift
           forward at a cost of 0.1, one alone stays. Past the last state the episode ends with reward 1.
           The marginal values of left and right are equal and hide the coupling; no sum of
           per-dimension values represents it.
chain_1d   The same process with its nine joint actions relabelled as the nine bins of one dimension.
separable  The same states; dimension 1 alone moves (right forward, off stays, left costs 0.2) and dimension 2
           alone costs 0.1, 0.05 or 0: the optimal Q is a sum over dimensions.

Data: `mix` shares of an expert, a medium and a bad controller, each with a share of uniform actions
(`noise`), placed uniformly inside the bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.rl.agent import Transition
from qlab.rl.c2f import ActionGrid, all_bins
from qlab.rl.envs.tabular import TabularMDP, choose, tabular_env, tabular_mdp
from qlab.rl.rollout import best_share, collect, episode_returns

NUM_STATES = 5
LEFT, OFF, RIGHT = 0, 1, 2
STALL_COST, DRIFT_COST = 0.2, 0.1


class Task(NamedTuple):
    """A process and its controllers.

    Attributes:
      mdp: the process. num_dims, num_bins: of its action. horizon: of the logged episodes.
      controllers: f32[3, S, K], the action probabilities of expert, medium and bad.
    """

    mdp: TabularMDP
    num_dims: int
    num_bins: int
    horizon: int
    controllers: np.ndarray


def bandit(num_bins: int = 5, num_contexts: int = 1) -> Task:
    """The motivating example: expert = the r = 1 mode, medium = r = 0.1, bad = r = -1.

    The observation is one of num_contexts that all pay the same.
    """
    if num_bins < 3:
        raise ValueError(f"num_bins={num_bins}: three modes need at least 3 bins")
    lo, hi = num_bins // 4, num_bins - 1 - num_bins // 4
    table = np.zeros((num_bins, num_bins))
    table[hi, hi], table[lo, hi], table[hi, lo] = 1.0, 0.1, -1.0
    reward = np.zeros((num_contexts, num_bins**2, num_contexts + 1))
    reward[..., -1] = table.ravel()
    transition = np.zeros_like(reward)
    transition[..., -1] = 1.0
    modes = np.zeros((3, num_contexts, num_bins**2))
    for i, (a, b) in enumerate(((hi, hi), (lo, hi), (hi, lo))):
        modes[i, :, a * num_bins + b] = 1.0
    mdp = tabular_mdp(transition, reward, np.full(num_contexts, 1 / num_contexts))
    return Task(mdp, 2, num_bins, 1, modes)


def _walk(forward: np.ndarray, gain: np.ndarray, slip: float) -> TabularMDP:
    """Moves where forward[k], stays elsewhere; pays gain[k], and 1 on leaving the last state.

    With probability `slip` a forward move fails and stays.
    """
    s, k = NUM_STATES, len(forward)
    transition, reward = np.zeros((s, k, s + 1)), np.zeros((s, k, s + 1))
    for x in range(s):
        for a in range(k):
            p = (1 - slip) * forward[a]
            transition[x, a, x + 1] = p
            transition[x, a, x] += 1 - p
            reward[x, a] = gain[a]
    reward[s - 1, :, s] += 1.0
    return tabular_mdp(transition, reward, np.full(s, 1 / s))


def chain(slip: float = 0.0, num_dims: int = 2) -> Task:
    """The coupled chain; num_dims = 1 relabels the same nine actions as one dimension."""
    if num_dims not in (1, 2):
        raise ValueError(f"num_dims={num_dims}: the chain has 2 dimensions, or 1 as relabelled")
    a, b = all_bins(ActionGrid(2, 1, 3))[:, 0].T
    together = (a == b) & (a != OFF)
    opposite = (a != b) & (a != OFF) & (b != OFF)
    drift = (a == OFF) & (b == OFF)
    gain = -STALL_COST * opposite - DRIFT_COST * drift
    mdp = _walk((together | drift).astype(float), gain, slip)
    table = np.stack([together / 2, drift, opposite / 2]).astype(float)
    controllers = np.broadcast_to(table[:, None], (3, NUM_STATES, 9))
    return Task(mdp, num_dims, 9 if num_dims == 1 else 3, NUM_STATES, controllers)


def separable(slip: float = 0.0) -> Task:
    """The chain without coupling: expert (right, right), medium (right, left), bad (left, off)."""
    a, b = all_bins(ActionGrid(2, 1, 3))[:, 0].T
    gain = 0.05 * (b - 2) - STALL_COST * (a == LEFT)
    mdp = _walk((a == RIGHT).astype(float), gain, slip)
    modes = ((RIGHT, RIGHT), (RIGHT, LEFT), (LEFT, OFF))
    table = np.stack([(a == x) & (b == y) for x, y in modes]).astype(float)
    controllers = np.broadcast_to(table[:, None], (3, NUM_STATES, 9))
    return Task(mdp, 2, 3, NUM_STATES, controllers)


def behaviour(task: Task, noise: float) -> np.ndarray:
    """The controllers with a share of uniform actions, f32[3, S, K]."""
    mixed = (1 - noise) * task.controllers + noise / task.controllers.shape[-1]
    return mixed.astype(np.float32)


def place_action(task: Task, index: jax.Array, inside: jax.Array) -> jax.Array:
    """Action f32[D] in the bins of joint action `index` i32[], at `inside` f32[D] in [0, 1) of each bin."""
    place = jnp.asarray([task.num_bins**i for i in range(task.num_dims - 1, -1, -1)])
    # A margin keeps rounding from moving an action into the next bin.
    return 2 * (index // place % task.num_bins + 0.01 + 0.98 * inside) / task.num_bins - 1


class Logged(NamedTuple):
    """What defines a log, as arrays, so that logs of one shape are drawn side by side.

    mdp: the process. probs: f32[C, S, K], action probabilities of C controllers. mix: f32[C], the share
    of episodes of each.
    """

    mdp: TabularMDP
    probs: Any
    mix: Any


def draw_log(
    task: Task, logged: Logged, key: jax.Array, num_steps: int, discount: float, demo_share: float
) -> Transition:
    """num_steps transitions, episode after episode, each by one controller drawn from the mix.

    Of `task` only the static shape is read. `demo` marks the transitions of the episodes with the
    best discounted returns: the best `demo_share` of all transitions, and ties.
    """
    env = tabular_env(logged.mdp, task.num_dims, task.num_bins, task.horizon)

    def policy(controller, k, obs, first):
        u = jax.random.uniform(k, (2 + task.num_dims,))
        controller = jnp.where(first, choose(u[0], logged.mix), controller)
        index = choose(u[1], jnp.asarray(logged.probs)[controller, obs.argmax()])
        return controller, place_action(task, index, u[2:])

    data, ends = collect(env, policy, jnp.int32(0), key, num_steps, discount)
    total = episode_returns(data.reward, ends, discount)
    return data._replace(demo=best_share(total, demo_share))
