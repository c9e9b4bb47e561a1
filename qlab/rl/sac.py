"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905), with a learned, a fixed or a per-sample temperature.

Twin critics, a tanh-squashed Gaussian actor. With alpha the temperature of a transition,
    y      = r + discount (min_j Qbar_j(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    actor    minimises  mean of  alpha log pi(a|s) - min_j Q_j(s, a)
    learned  log alpha descends  -log alpha (log pi + target entropy),    target entropy = -D by default.
"batch" takes alpha from `batch.temperature`: each transition keeps the temperature of the episode it
was drawn in, and its next state uses the same one (the adaptive temperature of QARL's adversary,
arXiv 2311.01642). A negative entry asks for the learned temperature instead, so that one compiled program
serves both kinds. The observation may carry the temperature too; that is the caller's choice.

Mean and log standard deviation are separate networks of one shape (QARL's), or two heads of one (shared_actor, most
implementations'); the two critics are separate networks of one shape. With `layer_norm` the critics are normalised
after every hidden layer, which RLPD (Ball et al. 2023, arXiv 2302.02948) finds necessary where half of a minibatch are
demonstrations.
Letters: N = batch, S = observation, D = action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.lab.errors import UserError
from qlab.rl.agent import Agent, Transition, ema, td_target
from qlab.rl.networks import dense_apply, dense_init, mlp_apply, mlp_init

LOG_STD = (-20.0, 2.0)
TEMPERATURE_FLOOR = 1e-6


class SACState(NamedTuple):
    """params: {"actor", "critic", "log_alpha"}. target: of the critics. opt_state: of the three in one.

    updates: i32[], how many were done.
    """

    params: Any
    target: Any
    opt_state: Any
    updates: jax.Array


def _pair(key: jax.Array, num_in: int, hidden: Sequence[int], num_out: int, make=dense_init) -> Any:
    """Two networks of one shape, leading axis 2."""
    return jax.vmap(lambda k: make(k, num_in, hidden, num_out))(jax.random.split(key))


def gaussian(actor: Any, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log standard deviation before the tanh, f32[N, D] each."""
    if actor[0]["w"].ndim == 2:  # one network
        mean, log_std = jnp.split(dense_apply(actor, obs), 2, -1)
    else:
        mean, log_std = jax.vmap(dense_apply, (0, None))(actor, obs)
    return mean, jnp.clip(log_std, *LOG_STD)


def squash(mean: jax.Array, log_std: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a = tanh(u), u = mean + std noise, and its log density, f32[N, D] and f32[N].

    log pi(a) = sum over D of log N(u) - log(1 - tanh(u)^2); the last term as
    2 (log 2 - u - softplus(-2 u)), which does not cancel for large |u|.
    """
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (log_normal - log_slope).sum(-1)


def q_values(critic: Any, obs: jax.Array, action: jax.Array) -> jax.Array:
    """Both critics, f32[2, N]; normalised ones are dicts."""
    apply = mlp_apply if isinstance(critic, dict) else dense_apply
    return jax.vmap(apply, (0, None))(critic, jnp.concatenate([obs, action], -1))[..., 0]


def sac(
    obs_dim: int,
    action_dim: int,
    *,
    temperature: str | float = "learned",
    hidden: Sequence[int] = (256, 256, 256),
    lr_actor: float = 1e-4,
    lr_critic: float = 3e-4,
    lr_alpha: float = 3e-4,
    tau: float = 0.005,
    init_temperature: float = 1.0,
    target_entropy: float | None = None,
    actor_warmup: int = 0,
    shared_actor: bool = False,
    layer_norm: bool = False,
) -> Agent:
    """The learner; defaults are those of QARL's repository.

    Args:
      temperature: "learned"; a float > 0, fixed; or "batch", read per sample from the batch
        (from 0 to 1e-6 it counts as 1e-6, a negative one as learned).
      init_temperature: start of a learned temperature.
      target_entropy: of a learned temperature, in nats; None is -action_dim.
      actor_warmup: updates in which only the critics learn.
      shared_actor: mean and log standard deviation are heads of one network.
      layer_norm: critics as in `networks.mlp_init` (LayerNorm, SiLU, zero head).
    Returns:
      An Agent; "update" reports loss (critic + actor), critic_loss, actor_loss, entropy, alpha, q.
    Raises:
      ValueError: an unknown temperature, or sizes that no network can have.

    >>> agent = sac(3, 2, temperature=0.1, hidden=(8,))
    >>> state = agent.init(jax.random.key(0))
    >>> agent.act(state, jax.random.key(1), jnp.ones((4, 3))).shape
    (4, 2)
    """
    if isinstance(temperature, (int, float)):
        known = not isinstance(temperature, bool) and 0 < temperature < float("inf")
    else:
        known = temperature in ("learned", "batch")
    if not known:
        raise ValueError(
            f"temperature={temperature!r}: expected learned, batch or a number above 0 (it may be small)"
        )
    if obs_dim < 1 or action_dim < 1:
        raise ValueError(f"obs_dim={obs_dim}, action_dim={action_dim}: both must be at least 1")
    entropy_goal = -float(action_dim) if target_entropy is None else target_entropy
    rates = {"actor": lr_actor, "critic": lr_critic, "log_alpha": lr_alpha}
    optimizer = optax.partition(
        {k: optax.flatten(optax.adam(v)) for k, v in rates.items()}, {k: k for k in rates}
    )

    def init(key: jax.Array) -> SACState:
        k_actor, k_critic = jax.random.split(key)
        make = mlp_init if layer_norm else dense_init
        critic = _pair(k_critic, obs_dim + action_dim, hidden, 1, make)
        if shared_actor:
            actor = dense_init(k_actor, obs_dim, hidden, 2 * action_dim)
        else:
            actor = _pair(k_actor, obs_dim, hidden, action_dim)
        params = {
            "actor": actor,
            "critic": critic,
            "log_alpha": jnp.log(jnp.float32(init_temperature)),
        }
        target = jax.tree.map(jnp.copy, critic)
        return SACState(params, target, optimizer.init(params), jnp.int32(0))

    def act(state: SACState, key: jax.Array, obs: jax.Array, greedy: bool = False) -> jax.Array:
        mean, log_std = gaussian(state.params["actor"], obs)
        if greedy:
            return jnp.tanh(mean)
        return jnp.tanh(mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape))

    def alpha_of(params: Any, batch: Transition) -> jax.Array:
        if temperature == "learned":
            return jax.lax.stop_gradient(jnp.exp(params["log_alpha"]))
        if temperature == "batch":
            given = batch.temperature
            if given is None:
                raise UserError('temperature="batch" reads batch.temperature, which is None')
            learned = jax.lax.stop_gradient(jnp.exp(params["log_alpha"]))
            return jnp.where(given < 0, learned, jnp.maximum(given, TEMPERATURE_FLOOR))
        return jnp.float32(temperature)

    def learns(batch: Transition) -> Any:
        """Which samples teach the learned temperature."""
        if batch.temperature is not None and temperature == "batch":
            return batch.temperature < 0
        return float(temperature == "learned")

    def losses(params: Any, target: Any, key: jax.Array, batch: Transition):
        noise = jax.random.normal(key, (2, *batch.action.shape))
        alpha = alpha_of(params, batch)
        frozen = jax.lax.stop_gradient(params)

        next_action, next_log_pi = squash(*gaussian(frozen["actor"], batch.next_obs), noise[0])
        next_q = q_values(target, batch.next_obs, next_action).min(0)
        y = td_target(batch.reward, batch.discount, next_q - alpha * next_log_pi)
        q = q_values(params["critic"], batch.obs, batch.action)
        critic_loss = jnp.square(q - y).mean(1).sum()

        action, log_pi = squash(*gaussian(params["actor"], batch.obs), noise[1])
        actor_loss = (alpha * log_pi - q_values(frozen["critic"], batch.obs, action).min(0)).mean()
        gap = jax.lax.stop_gradient(log_pi) + entropy_goal
        alpha_loss = -params["log_alpha"] * (learns(batch) * gap).mean()
        metrics = {
            "loss": critic_loss + actor_loss,
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "entropy": -log_pi.mean(),
            "alpha": jnp.mean(alpha),
            "q": q.mean(),
        }
        # The three terms share no parameters: one gradient of their sum is the gradient of each.
        return critic_loss + actor_loss + alpha_loss, metrics

    def update(state: SACState, key: jax.Array, batch: Transition):
        grad, metrics = jax.grad(losses, has_aux=True)(state.params, state.target, key, batch)
        moves, opt_state = optimizer.update(grad, state.opt_state, state.params)
        updates: Any = moves
        if actor_warmup:
            on = (state.updates >= actor_warmup).astype(jnp.float32)
            updates = {
                k: u if k == "critic" else jax.tree.map(lambda x: on * x, u)
                for k, u in updates.items()
            }
        params: Any = optax.apply_updates(state.params, updates)
        target = ema(state.target, params["critic"], tau)
        return SACState(params, target, opt_state, state.updates + 1), metrics

    def q_value(state: SACState, obs: jax.Array, action: jax.Array) -> jax.Array:
        return q_values(state.params["critic"], obs, action).min(0)

    return Agent(init, act, update, None, q_value)
