"""Auto-Regressive Soft Q-network (Liu et al. 2025, ICML, arXiv 2502.00288).

An action is L x D tokens b_1..b_T (level-major, then dimension). With the partial soft values
V_0 = V(s), V_t(b_<=t) = alpha log sum over the later tokens of exp(Q / alpha), V_T = Q, the
dimensional soft advantage is A_t = V_t - V_{t-1}. It is normalised over its own bins for each prefix,
sum_b exp(A_t(b) / alpha) = 1, so Q(s, a) = V(s) + sum_t A_t and pi(a|s) = prod_t exp(A_t / alpha):
each A_t is alpha times an auto-regressive log policy. Here A_t = u_t - alpha logsumexp(u_t / alpha)
with u_t the output of one MLP for all tokens, so V(s) = alpha logsumexp over all actions of Q / alpha
holds by construction and the target needs no maximum: y = r + gamma (1 - terminated) V(s').

Where actions were never seen in a state, V is only bounded from below by the seen ones: the unseen
take the rest of the mass and V drifts up as alpha grows. Keep alpha small. In control the target feeds on that
drift and only own experience, or cloning of good demonstrations (lambda_bc), holds it (configs/arsq.py:control).

The network, the loss weights and the constants are our choice where the paper's were not at hand;
widths, LayerNorm, zero heads, AdamW and the target rate default to the parent's (CQN, arXiv 2407.07787).
Letters: N = batch, S = observation, L levels, D dimensions, B bins, T = L D, W = beam width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.rl.agent import Agent, LearnerState, Transition, ema, td_target
from qlab.rl.c2f import ActionGrid, action_grid, decode_c2f, encode_c2f, prefix_centres
from qlab.rl.networks import mlp_apply, mlp_init

CONDITIONING = ("ar", "level", "none")
MODES = ("sample", "greedy", "beam")


class TokenNet(NamedTuple):
    """The static shape of the advantage network.

    Attributes:
      grid: of the actions.
      order: the dimension at each position inside a level, a permutation of range(D).
      conditioning: what a token sees besides state, level and dimension: "ar" the coarser intervals
        of all dimensions and the bins of the earlier dimensions at its level; "level" only the coarser
        intervals (no auto-regression over dimensions); "none" nothing. The inputs left out are zeros, so
        that all three have the same parameters.
    """

    grid: ActionGrid
    order: tuple[int, ...]
    conditioning: str = "ar"

    @property
    def num_features(self) -> int:
        d, l, b = self.grid
        return l + d + d + d * b


def token_net(
    grid: ActionGrid,
    dim_order: Literal["identity", "reverse", "random"] | Sequence[int] = "identity",
    conditioning: str = "ar",
    order_seed: int = 0,
) -> TokenNet:
    """A TokenNet, checked; "random" is one permutation drawn from order_seed.

    >>> token_net(action_grid(3, 1, 2), "reverse").order
    (2, 1, 0)
    """
    d = grid.num_dims
    if dim_order == "identity":
        order = range(d)
    elif dim_order == "reverse":
        order = range(d - 1, -1, -1)
    elif dim_order == "random":
        order = np.random.default_rng(order_seed).permutation(d)
    else:
        order = dim_order
    if isinstance(order, str) or sorted(order) != list(range(d)):
        raise ValueError(
            f"dim_order={dim_order!r}: expected identity, reverse, random or a permutation of 0..{d - 1}"
        )
    if conditioning not in CONDITIONING:
        raise ValueError(
            f"conditioning={conditioning!r}: expected one of {', '.join(CONDITIONING)}"
        )
    return TokenNet(grid, tuple(int(i) for i in order), conditioning)


def arsq_params(key: jax.Array, net: TokenNet, obs_dim: int, hidden: Sequence[int]) -> Any:
    """{"value", "advantage"}: V of the observation alone; u of observation and token features."""
    k_value, k_advantage = jax.random.split(key)
    return {
        "value": mlp_init(k_value, obs_dim, hidden, 1),
        "advantage": mlp_init(k_advantage, obs_dim + net.num_features, hidden, net.grid.num_bins),
    }


def token_features(net: TokenNet, bins: jax.Array) -> jax.Array:
    """What each token sees of an action: f32[..., L, D, F] from bins i32[..., L, D].

    Entry [l, j] belongs to the dimension at position j of level l. It reads tokens before t = l D + j
    only: row l of the interval centres depends on coarser levels, and the bins of its own level are
    masked to earlier positions. F = level one-hot, dimension one-hot, D centres, D x B bins.
    """
    d, l, b = net.grid
    order = jnp.asarray(net.order)
    rank = jnp.argsort(order)  # position of each dimension
    lead = bins.shape[:-2]
    level = jnp.broadcast_to(jnp.eye(l)[:, None, :], (*lead, l, d, l))
    dim = jnp.broadcast_to(jax.nn.one_hot(order, d)[None], (*lead, l, d, d))
    centre = jnp.broadcast_to(prefix_centres(bins, b)[..., :, None, :], (*lead, l, d, d))
    earlier = (rank[None, :] < jnp.arange(d)[:, None]).astype(jnp.float32)  # [j, dim]
    chosen = jax.nn.one_hot(bins, b)[..., :, None, :, :] * earlier[:, :, None]
    chosen = chosen.reshape(*lead, l, d, d * b)
    if net.conditioning != "ar":
        chosen = jnp.zeros_like(chosen)
    if net.conditioning == "none":
        centre = jnp.zeros_like(centre)
    return jnp.concatenate([level, dim, centre, chosen], -1)


def normalise(u: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """u - alpha logsumexp(u / alpha) over the last axis: a soft advantage.

    >>> a = normalise(jnp.array([1.0, 2.0]), 0.5)
    >>> round(float(jnp.exp(a / 0.5).sum()), 5)
    1.0
    """
    return alpha * jax.nn.log_softmax(u / alpha, -1)


def ar_advantages(
    net: TokenNet, params: Any, obs: jax.Array, bins: jax.Array, alpha: float | jax.Array
) -> jax.Array:
    """A_t of every bin given the prefix of `bins`, all tokens in one pass (teacher forcing).

    Args:
      obs: f32[N, S]. bins: i32[N, L, D].
    Returns:
      f32[N, T, B]; sum over B of exp(. / alpha) is 1. Token t = l D + j is dimension order[j].
    """
    features = token_features(net, bins)
    features = features.reshape(*bins.shape[:-2], net.grid.num_tokens, -1)
    s = jnp.broadcast_to(obs[..., None, :], (*features.shape[:-1], obs.shape[-1]))
    u = mlp_apply(params["advantage"], jnp.concatenate([s, features], -1))
    return normalise(u, alpha)


def _tokens(net: TokenNet, bins: jax.Array) -> jax.Array:
    """bins i32[..., L, D] in token order, i32[..., T]."""
    ordered = bins[..., jnp.asarray(net.order)]
    return ordered.reshape(*bins.shape[:-2], net.grid.num_tokens)


def sum_advantage(
    net: TokenNet, params: Any, obs: jax.Array, bins: jax.Array, alpha: float | jax.Array
) -> jax.Array:
    """sum_t A_t(b_t | s, b_<t) = Q - V, f32[N]."""
    a = ar_advantages(net, params, obs, bins, alpha)
    return jnp.take_along_axis(a, _tokens(net, bins)[..., None], -1)[..., 0].sum(-1)


def log_prob(
    net: TokenNet, params: Any, obs: jax.Array, bins: jax.Array, alpha: float | jax.Array
) -> jax.Array:
    """log pi(a|s), f32[N]."""
    return sum_advantage(net, params, obs, bins, alpha) / alpha


def soft_value(params: Any, obs: jax.Array) -> jax.Array:
    """V(s), f32[N]; sees neither the action nor the prefix."""
    return mlp_apply(params["value"], obs)[..., 0]


def q_value(
    net: TokenNet, params: Any, obs: jax.Array, bins: jax.Array, alpha: float | jax.Array
) -> jax.Array:
    """Q(s, a) = V(s) + sum_t A_t, f32[N]."""
    return soft_value(params, obs) + sum_advantage(net, params, obs, bins, alpha)


def sample_action(
    net: TokenNet,
    params: Any,
    key: jax.Array,
    obs: jax.Array,
    alpha: float | jax.Array,
    mode: str = "sample",
    beam_width: int = 8,
) -> tuple[jax.Array, jax.Array]:
    """One action per row, token by token.

    Args:
      obs: f32[N, S].
      mode: "sample" from pi; "greedy" takes the best bin at each token (it maximises the soft tail
        value, which at a large alpha need not be the best joint action); "beam" keeps the
        beam_width likeliest prefixes and returns the likeliest action found (exact from B^T up).
    Returns:
      action f32[N, D] (centres), bins i32[N, L, D].
    """
    d, l, b = net.grid
    order = jnp.asarray(net.order)
    width = beam_width if mode == "beam" else 1
    n = obs.shape[0]
    s = jnp.broadcast_to(obs[:, None], (n, width, obs.shape[-1]))

    def choose(carry, t):
        bins, score = carry  # i32[N, W, L, D], f32[N, W]
        level, j = t // d, t % d
        features = token_features(net, bins)[..., level, j, :]
        u = mlp_apply(params["advantage"], jnp.concatenate([s, features], -1))
        logp = jax.nn.log_softmax(u / alpha, -1)  # [N, W, B]
        if mode == "beam":
            score, flat = jax.lax.top_k((score[..., None] + logp).reshape(n, width * b), width)
            bins = jnp.take_along_axis(bins, (flat // b)[..., None, None], 1)
            pick = flat % b
        elif mode == "greedy":
            pick = logp.argmax(-1)
        else:
            pick = jax.random.categorical(jax.random.fold_in(key, t), logp)
        return (bins.at[:, :, level, order[j]].set(pick.astype(jnp.int32)), score), None

    # All but one beam start impossible, else the first tokens would fill it with copies.
    score = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    carry = (jnp.zeros((n, width, l, d), jnp.int32), jnp.broadcast_to(score, (n, width)))
    (bins, _), _ = jax.lax.scan(choose, carry, jnp.arange(net.grid.num_tokens))
    return decode_c2f(bins[:, 0], b), bins[:, 0]


def arsq_loss(
    net: TokenNet,
    params: Any,
    target: Any,
    batch: Transition,
    alpha: float | jax.Array,
    *,
    lambda_td: float = 1.0,
    lambda_bc: float = 0.0,
    reward_scale: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """lambda_td mean (V + sum A - y)^2 + lambda_bc mean over demos of -log pi / T.

    The gradient of the first term reaches both heads; no second loss ties V to Q, the
    normalisation does. Rows with demo = 0 are not imitated; demo = None imitates all rows.
    """
    bins = encode_c2f(batch.action, net.grid.num_levels, net.grid.num_bins)
    advantage = sum_advantage(net, params, batch.obs, bins, alpha)
    q = soft_value(params, batch.obs) + advantage
    v_next = soft_value(target, batch.next_obs)
    error = q - td_target(reward_scale * batch.reward, batch.discount, v_next)
    td = jnp.square(error).mean()
    demo = jnp.ones_like(advantage) if batch.demo is None else batch.demo
    bc = -(demo * advantage).sum() / (alpha * net.grid.num_tokens * jnp.maximum(demo.sum(), 1))
    loss = lambda_td * td + lambda_bc * bc
    return loss, {"loss": loss, "td_loss": td, "bc_loss": bc, "q": q.mean() / reward_scale}


def arsq(
    obs_dim: int,
    action_dim: int,
    *,
    num_levels: int = 3,
    num_bins: int = 5,
    alpha: float | jax.Array = 0.01,
    dim_order: Literal["identity", "reverse", "random"] | Sequence[int] = "identity",
    conditioning: str = "ar",
    action_mode: str = "sample",
    beam_width: int = 8,
    hidden: Sequence[int] = (512, 512),
    learning_rate: optax.ScalarOrSchedule = 5e-5,
    weight_decay: float = 0.1,
    tau: float = 0.02,
    lambda_td: float = 1.0,
    lambda_bc: float = 0.0,
    reward_scale: float = 1.0,
) -> Agent:
    """The learner.

    Args:
      alpha: temperature, in units of reward_scale x reward; fixed.
      conditioning: see TokenNet; "level" is the ablation without auto-regression over dimensions.
      action_mode: how `act` chooses when not greedy; greedy is per-token, or the beam if "beam".
      lambda_td, lambda_bc: loss weights; (0, 1) is auto-regressive behaviour cloning.

    >>> agent = arsq(3, 2, num_levels=1, num_bins=5, hidden=(16,))
    >>> state = agent.init(jax.random.key(0))
    >>> agent.act(state, jax.random.key(1), jnp.ones((4, 3))).shape
    (4, 2)
    """
    if isinstance(alpha, (int, float)) and not alpha > 0:  # a traced one cannot be asked
        raise ValueError(f"alpha={alpha}: the temperature must be positive (it may be small)")
    if action_mode not in MODES:
        raise ValueError(f"action_mode={action_mode!r}: expected one of {', '.join(MODES)}")
    net = token_net(action_grid(action_dim, num_levels, num_bins), dim_order, conditioning)
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def init(key: jax.Array) -> LearnerState:
        params = arsq_params(key, net, obs_dim, hidden)
        # The copy matters: the runner donates buffers, and one buffer cannot be given away twice.
        return LearnerState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    def act(state: LearnerState, key: jax.Array, obs: jax.Array, greedy: bool = False):
        mode = "greedy" if greedy and action_mode == "sample" else action_mode
        return sample_action(net, state.params, key, obs, alpha, mode, beam_width)[0]

    def update(state: LearnerState, key: jax.Array, batch: Transition):
        del key
        grad, metrics = jax.grad(
            lambda p: arsq_loss(
                net,
                p,
                state.target,
                batch,
                alpha,
                lambda_td=lambda_td,
                lambda_bc=lambda_bc,
                reward_scale=reward_scale,
            ),
            has_aux=True,
        )(state.params)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return LearnerState(params, ema(state.target, params, tau), opt_state), metrics

    def value(state: LearnerState, obs: jax.Array) -> jax.Array:
        return soft_value(state.params, obs) / reward_scale

    def q(state: LearnerState, obs: jax.Array, action: jax.Array) -> jax.Array:
        bins = encode_c2f(action, num_levels, num_bins)
        return q_value(net, state.params, obs, bins, alpha) / reward_scale

    return Agent(init, act, update, value, q)
