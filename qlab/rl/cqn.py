"""Coarse-to-fine Q-network with independent action dimensions (CQN, Seo et al. 2024, arXiv 2407.07787).

At level l the critic sees the observation, the level and the interval centres of ALL dimensions chosen
at coarser levels, and returns for each dimension on its own the value of each bin. Every dimension
regresses to the return of the joint action, so Q_d(s, b_d) is a mean over what the data did in the other
dimensions: the flaw that an auto-regressive Q removes. Dueling heads are mean-subtracted; the critic
is C51 ("c51": atoms on [v_min, v_max], cross-entropy with the projected target distribution, as
published) or scalar ("scalar": squared error), all else equal. The next action is the online
critic's, its value the target critic's; `act` uses the target critic and breaks near-ties at random.
Behaviour cloning on demonstrations: a first-order stochastic dominance term (C51 only) and a margin.

Differences from the published agent: vectors instead of pixels, so there are no encoders and no
augmentation; exploration noise is clipped to the box instead of drawn from a truncated normal.
Letters: N = batch, S = observation, L levels, D dimensions, B bins, Z atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.rl.agent import Agent, LearnerState, Transition, ema, td_target
from qlab.rl.c2f import ActionGrid, action_grid, decode_c2f, encode_c2f, prefix_centres
from qlab.rl.networks import mlp_apply, mlp_init

TIE = 1e-4  # a dimension whose best and worst bin are closer than this acts at random


class Critic(NamedTuple):
    """grid: of the actions. support: the atoms' values, () for a scalar critic."""

    grid: ActionGrid
    support: tuple[float, ...]

    @property
    def num_outputs(self) -> int:
        return max(len(self.support), 1)


def critic_params(key: jax.Array, critic: Critic, obs_dim: int, hidden: Sequence[int]) -> Any:
    d, l, b = critic.grid
    k_value, k_advantage = jax.random.split(key)
    num_in = obs_dim + d + l
    return {
        "value": mlp_init(k_value, num_in, hidden, d * critic.num_outputs),
        "advantage": mlp_init(k_advantage, num_in, hidden, d * b * critic.num_outputs),
    }


def critic_logits(
    critic: Critic, params: Any, obs: jax.Array, centres: jax.Array, level: jax.Array
) -> jax.Array:
    """Dueling heads of one or more levels: f32[..., D, B, Z].

    Args:
      obs: f32[..., S]. centres: f32[..., D]. level: i32[...] or i32[].
    """
    d, l, b = critic.grid
    onehot = jnp.broadcast_to(jax.nn.one_hot(level, l), (*obs.shape[:-1], l))
    x = jnp.concatenate([obs, centres, onehot], -1)
    value = mlp_apply(params["value"], x).reshape(*x.shape[:-1], d, 1, critic.num_outputs)
    adv = mlp_apply(params["advantage"], x).reshape(*x.shape[:-1], d, b, critic.num_outputs)
    return value + adv - adv.mean(-2, keepdims=True)


def mean_value(critic: Critic, logits: jax.Array) -> jax.Array:
    """f32[..., Z] -> expected value f32[...]."""
    if not critic.support:
        return logits[..., 0]
    return (jax.nn.softmax(logits, -1) * jnp.asarray(critic.support)).sum(-1)


def teacher_forced(critic: Critic, params: Any, obs: jax.Array, bins: jax.Array) -> jax.Array:
    """Logits of all levels along the given action, f32[N, L, D, B, Z]; bins i32[N, L, D]."""
    l, b = critic.grid.num_levels, critic.grid.num_bins
    s = jnp.broadcast_to(obs[:, None], (obs.shape[0], l, obs.shape[-1]))
    level = jnp.broadcast_to(jnp.arange(l), s.shape[:-1])
    return critic_logits(critic, params, s, prefix_centres(bins, b), level)


def at_bins(logits: jax.Array, bins: jax.Array) -> jax.Array:
    """f32[N, L, D, B, Z] at bins i32[N, L, D] -> f32[N, L, D, Z]."""
    return jnp.take_along_axis(logits, bins[..., None, None], -2)[..., 0, :]


def best_bins(critic: Critic, params: Any, key: jax.Array, obs: jax.Array) -> jax.Array:
    """The greedy action, level by level and each dimension on its own: i32[N, L, D]."""
    d, l, b = critic.grid
    n = obs.shape[0]

    def choose(bins, level):
        centre = prefix_centres(bins, b)[:, level]
        q = mean_value(critic, critic_logits(critic, params, obs, centre, level))  # [N, D, B]
        other = jax.random.randint(jax.random.fold_in(key, level), (n, d), 0, b)
        pick = jnp.where(jnp.ptp(q, axis=-1) < TIE, other, q.argmax(-1))
        return bins.at[:, level].set(pick.astype(jnp.int32)), None

    return jax.lax.scan(choose, jnp.zeros((n, l, d), jnp.int32), jnp.arange(l))[0]


def project(
    prob: jax.Array, reward: jax.Array, discount: jax.Array, support: jax.Array
) -> jax.Array:
    """Distribution of reward + discount Z put back on the atoms (C51's projection).

    Args:
      prob: f32[N, ..., Z] over `support` f32[Z] (equal steps). reward, discount: f32[N].
    Returns:
      f32[N, ..., Z]: each shifted atom is clipped to the support and split between its neighbours.

    >>> z = jnp.array([0.0, 1.0, 2.0])
    >>> project(jnp.array([[0.0, 1.0, 0.0]]), jnp.array([0.25]), jnp.array([1.0]), z).tolist()
    [[0.0, 0.75, 0.25]]
    """
    shifted = jnp.clip(reward[:, None] + discount[:, None] * support, support[0], support[-1])
    step = support[1] - support[0]
    weight = jnp.clip(1 - jnp.abs(shifted[:, :, None] - support) / step, 0, 1)  # [N, Z, Z]
    return jnp.einsum("n...i,nij->n...j", prob, weight)


def cqn_loss(
    critic: Critic,
    params: Any,
    target: Any,
    key: jax.Array,
    batch: Transition,
    *,
    lambda_bc: float = 0.0,
    margin: float = 0.01,
    critic_weight: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """critic_weight (TD term of every level and dimension) + lambda_bc (dominance + margin)."""
    grid = critic.grid
    bins = encode_c2f(batch.action, grid.num_levels, grid.num_bins)
    logits = teacher_forced(critic, params, batch.obs, bins)
    chosen = at_bins(logits, bins)
    next_bins = best_bins(critic, params, key, batch.next_obs)
    next_chosen = at_bins(teacher_forced(critic, target, batch.next_obs, next_bins), next_bins)
    if critic.support:
        next_prob = jax.nn.softmax(next_chosen, -1)
        y = project(next_prob, batch.reward, batch.discount, jnp.asarray(critic.support))
        td = -(jax.lax.stop_gradient(y) * jax.nn.log_softmax(chosen, -1)).sum(-1).mean()
    else:
        reward, discount = batch.reward[:, None, None], batch.discount[:, None, None]
        td = jnp.square(chosen[..., 0] - td_target(reward, discount, next_chosen[..., 0])).mean()

    q, q_chosen = mean_value(critic, logits), mean_value(critic, chosen)
    metrics = {"td_loss": td, "q": q_chosen.mean()}
    loss = critic_weight * td
    if lambda_bc:
        demo = jnp.ones_like(batch.reward) if batch.demo is None else batch.demo
        each = jax.nn.relu(margin - (q_chosen[..., None] - q)).mean((1, 2, 3))
        if critic.support:
            cdf = jnp.cumsum(jax.nn.softmax(logits, -1), -1)
            cdf_chosen = jnp.cumsum(jax.nn.softmax(chosen, -1), -1)[..., None, :]
            each += jax.nn.relu(cdf_chosen - cdf).sum(-1).mean((1, 2, 3))
        metrics["bc_loss"] = (demo * each).sum() / jnp.maximum(demo.sum(), 1)
        loss += lambda_bc * metrics["bc_loss"]
    return loss, {"loss": loss, **metrics}


def cqn(
    obs_dim: int,
    action_dim: int,
    *,
    num_levels: int = 3,
    num_bins: int = 5,
    distribution: str = "c51",
    num_atoms: int = 51,
    v_min: float = -2.0,
    v_max: float = 2.0,
    hidden: Sequence[int] = (512, 512),
    learning_rate: optax.ScalarOrSchedule = 5e-5,
    weight_decay: float = 0.1,
    tau: float = 0.02,
    noise: float = 0.01,
    lambda_bc: float = 0.0,
    margin: float = 0.01,
    critic_weight: float = 0.1,
) -> Agent:
    """The learner; num_levels = 1 is the flat per-dimension discretisation.

    `value` is the mean over levels and dimensions of the greedy bins' values, `q_value` that of the
    action's bins: an independent critic has no single joint value.

    >>> agent = cqn(3, 2, num_levels=2, hidden=(16,))
    >>> state = agent.init(jax.random.key(0))
    >>> agent.act(state, jax.random.key(1), jnp.ones((4, 3))).shape
    (4, 2)
    """
    if distribution not in ("c51", "scalar"):
        raise ValueError(f"distribution={distribution!r}: expected c51 or scalar")
    step = (v_max - v_min) / (num_atoms - 1)
    support = tuple(v_min + step * i for i in range(num_atoms)) if distribution == "c51" else ()
    critic = Critic(action_grid(action_dim, num_levels, num_bins), support)
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def init(key: jax.Array) -> LearnerState:
        params = critic_params(key, critic, obs_dim, hidden)
        return LearnerState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    def act(state: LearnerState, key: jax.Array, obs: jax.Array, greedy: bool = False):
        k_tie, k_noise = jax.random.split(key)
        action = decode_c2f(best_bins(critic, state.target, k_tie, obs), num_bins)
        if greedy:
            return action
        action += noise * jax.random.normal(k_noise, action.shape)
        return decode_c2f(encode_c2f(action, num_levels, num_bins), num_bins)

    def update(state: LearnerState, key: jax.Array, batch: Transition):
        grad, metrics = jax.grad(
            lambda p: cqn_loss(
                critic,
                p,
                state.target,
                key,
                batch,
                lambda_bc=lambda_bc,
                margin=margin,
                critic_weight=critic_weight,
            ),
            has_aux=True,
        )(state.params)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return LearnerState(params, ema(state.target, params, tau), opt_state), metrics

    def q_of(state: LearnerState, obs: jax.Array, bins: jax.Array) -> jax.Array:
        logits = teacher_forced(critic, state.params, obs, bins)
        return mean_value(critic, at_bins(logits, bins)).mean((1, 2))

    def value(state: LearnerState, obs: jax.Array) -> jax.Array:
        # Ties are broken by a fixed key: at a tie the values are equal anyway.
        return q_of(state, obs, best_bins(critic, state.params, jax.random.key(0), obs))

    def q_value(state: LearnerState, obs: jax.Array, action: jax.Array) -> jax.Array:
        return q_of(state, obs, encode_c2f(action, num_levels, num_bins))

    return Agent(init, act, update, value, q_value)
