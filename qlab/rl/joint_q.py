"""Q-learning over the joint bins of all action dimensions: exact about coupling, exponential in D.

One output per joint action, K = B^(L D). With a temperature it is soft Q-learning,
V(s) = alpha logsumexp_k(Q / alpha); with alpha = 0 it is double Q-learning (the online net picks, the
target net values). The strong baseline wherever K is small enough to enumerate.
Letters: N = batch, S = observation, K = joint actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlab.rl.agent import Agent, LearnerState, Transition, ema, td_target
from qlab.rl.c2f import action_grid, decode_c2f, encode_c2f
from qlab.rl.networks import mlp_apply, mlp_init

MAX_ACTIONS = 4096


def soft_max(q: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """alpha logsumexp(q / alpha) over the last axis.

    >>> round(float(soft_max(jnp.array([0.0, 1.0]), 0.01)), 4)
    1.0
    """
    return alpha * jax.nn.logsumexp(q / alpha, -1)


def joint_q(
    obs_dim: int,
    action_dim: int,
    *,
    num_levels: int = 1,
    num_bins: int = 3,
    alpha: float = 0.01,
    epsilon: float = 0.05,
    hidden: Sequence[int] = (512, 512),
    learning_rate: optax.ScalarOrSchedule = 5e-5,
    weight_decay: float = 0.1,
    tau: float = 0.02,
) -> Agent:
    """The learner. Explores by sampling exp(Q / alpha), or epsilon-greedily where alpha = 0.

    >>> agent = joint_q(3, 2, num_bins=3, hidden=(16,))
    >>> agent.act(agent.init(jax.random.key(0)), jax.random.key(1), jnp.ones((4, 3))).shape
    (4, 2)
    """
    grid = action_grid(action_dim, num_levels, num_bins)
    cells = num_bins**num_levels
    num_actions = cells**action_dim
    if num_actions > MAX_ACTIONS:
        raise ValueError(
            f"{cells} cells in each of {action_dim} dimensions are {num_actions} joint actions (at "
            f"most {MAX_ACTIONS}); use fewer bins or levels, or an agent that factorises"
        )
    if alpha < 0:
        raise ValueError(f"alpha={alpha}: expected 0 (hard maximum) or a positive temperature")
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    place = jnp.asarray([cells ** (action_dim - 1 - d) for d in range(action_dim)])
    digit = jnp.asarray([num_bins ** (grid.num_levels - 1 - l) for l in range(num_levels)])

    def to_index(action: jax.Array) -> jax.Array:
        cell = (encode_c2f(action, num_levels, num_bins) * digit[:, None]).sum(-2)
        return (cell * place).sum(-1)

    def to_action(index: jax.Array) -> jax.Array:
        cell = index[..., None] // place % cells
        return decode_c2f(cell[..., None, :], cells)

    def init(key: jax.Array) -> LearnerState:
        params = mlp_init(key, obs_dim, hidden, num_actions)
        return LearnerState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    def act(state: LearnerState, key: jax.Array, obs: jax.Array, greedy: bool = False):
        q = mlp_apply(state.params, obs)
        if greedy:
            return to_action(q.argmax(-1))
        if alpha:
            return to_action(jax.random.categorical(key, q / alpha))
        k_flip, k_pick = jax.random.split(key)
        other = jax.random.randint(k_pick, q.shape[:-1], 0, num_actions)
        flip = jax.random.bernoulli(k_flip, epsilon, q.shape[:-1])
        return to_action(jnp.where(flip, other, q.argmax(-1)))

    def next_value(params: Any, target: Any, obs: jax.Array) -> jax.Array:
        q = mlp_apply(target, obs)
        if alpha:
            return soft_max(q, alpha)
        best = mlp_apply(params, obs).argmax(-1)
        return jnp.take_along_axis(q, best[..., None], -1)[..., 0]

    def update(state: LearnerState, key: jax.Array, batch: Transition):
        del key

        def loss_fn(params):
            q = mlp_apply(params, batch.obs)
            q = jnp.take_along_axis(q, to_index(batch.action)[..., None], -1)[..., 0]
            v_next = next_value(params, state.target, batch.next_obs)
            error = q - td_target(batch.reward, batch.discount, v_next)
            loss = jnp.square(error).mean()
            return loss, {"loss": loss, "td_loss": loss, "q": q.mean()}

        grad, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return LearnerState(params, ema(state.target, params, tau), opt_state), metrics

    def value(state: LearnerState, obs: jax.Array) -> jax.Array:
        q = mlp_apply(state.params, obs)
        return soft_max(q, alpha) if alpha else q.max(-1)

    def q_value(state: LearnerState, obs: jax.Array, action: jax.Array) -> jax.Array:
        q = mlp_apply(state.params, obs)
        return jnp.take_along_axis(q, to_index(action)[..., None], -1)[..., 0]

    return Agent(init, act, update, value, q_value)
