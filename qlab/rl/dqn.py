"""Double deep Q-learning (van Hasselt et al. 2016) over discrete actions of which some may be illegal.

An observation is (features, legal): a pytree with leading axis N, which the net reads, and bool[N, A]. An illegal action is
never drawn, and its value is -inf in the greedy choice, in the choice of the next action by the online net, and so in
the target. A state without any legal action, or without a next state (discount 0), has the value 0.

Target: sum_{k<n} gamma^k r_k + D Q_target(s', argmax_a Q_online(s', a)), D = gamma^m (1 - terminated) after the m <= n
steps that were taken. Huber loss, Adam, the target net copied every so many updates, epsilon multiplied by a
factor at each update.
Letters: N = batch, A = actions, n = steps of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.rl.agent import Agent, Transition, td_target
from qlab.rl.networks import dense_init

Obs = tuple[Any, jax.Array]


class QNet(NamedTuple):
    """init: key -> params. apply: (params, features [N, ...]) -> values f32[N, A]."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Any], jax.Array]


class DQNState(NamedTuple):
    """params, target: of the net. opt_state: of optax. updates: i32[]. epsilon: f32[], chance of a random action."""

    params: Any
    target: Any
    opt_state: Any
    updates: jax.Array
    epsilon: jax.Array


def flat_features(features: Any) -> jax.Array:
    """All leaves [N, ...] of a pytree side by side, f32[N, F].

    >>> flat_features((jnp.ones((2, 3, 4), jnp.int8), jnp.zeros(2))).shape
    (2, 13)
    """
    leaves = jax.tree.leaves(features)
    return jnp.concatenate([x.reshape(x.shape[0], -1).astype(jnp.float32) for x in leaves], -1)


def mlp_q(num_features: int, hidden: Sequence[int], num_actions: int, slope: float = 0.01) -> QNet:
    """LeakyReLU perceptron on `flat_features`, fan-in uniform weights; hidden = () is linear. Always float32."""

    def init(key: jax.Array) -> Any:
        params = dense_init(key, num_features, hidden, num_actions)
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def apply(params: Any, features: Any) -> jax.Array:
        x = flat_features(features)
        for layer in params[:-1]:
            x = jax.nn.leaky_relu(x @ layer["w"] + layer["b"], slope)
        return x @ params[-1]["w"] + params[-1]["b"]

    return QNet(init, apply)


def best_legal(values: jax.Array, legal: jax.Array) -> jax.Array:
    """i32[N], the legal action of highest value; values f32[N, A], legal bool[N, A].

    >>> best_legal(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[False, True, True]])).tolist()
    [2]
    """
    return jnp.where(legal, values, -jnp.inf).argmax(-1).astype(jnp.int32)


def pick_legal(u: jax.Array, legal: jax.Array) -> jax.Array:
    """i32[N], uniform over the legal actions bool[N, A] if u f32[N, A] is uniform in [0, 1); 0 where there is none."""
    return jnp.where(legal, u, -1.0).argmax(-1).astype(jnp.int32)


def n_step_return(reward: jax.Array, discount: float) -> jax.Array:
    """sum_k discount^k reward[:, k], f32[N]; a reward f32[N] is its own.

    >>> n_step_return(jnp.array([[1.0, 1.0, 4.0]]), 0.5).tolist()
    [2.5]
    """
    if reward.ndim == 1:
        return reward
    powers = discount ** jnp.arange(reward.shape[1], dtype=jnp.float32)
    return (reward * powers).sum(1)


def double_dqn(
    net: QNet,
    num_actions: int,
    *,
    discount: float = 0.99,
    n_step: int = 1,
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    target_every: int = 500,
    epsilon: float = 1.0,
    epsilon_decay: float = 0.99995,
    epsilon_final: float = 0.05,
    huber: float = 1.0,
    double: bool = True,
) -> Agent:
    """The learner. Observations are (features, legal); actions i32[N].

    Args:
      discount: gamma, for the rewards inside a window.
      n_step: steps of a target. With 1, batches are one-step Transitions, reward f32[N]. With more, `reward` is
        f32[N, n_step], zero after the end of the episode, `discount` f32[N] gamma^m (1 - terminated) and `next_obs` what
        followed the window's last step: what `windows.window_sample` draws.
      target_every: updates between two copies of the net. epsilon_decay: factor at each update, down to epsilon_final.
      double: False takes the target net's own maximum (over legal actions).

    >>> agent = double_dqn(mlp_q(3, (8,), 2), 2)
    >>> state = agent.init(jax.random.key(0))
    >>> legal = jnp.array([[True, False]] * 4)
    >>> agent.act(state, jax.random.key(1), (jnp.ones((4, 3)), legal)).tolist()
    [0, 0, 0, 0]
    """
    if not 0 <= discount <= 1 or n_step < 1 or target_every < 1 or num_actions < 1:
        raise ValueError(
            f"discount={discount}, n_step={n_step}, target_every={target_every}, num_actions={num_actions}: "
            "expected 0 <= discount <= 1 and at least 1 of the others"
        )
    tx = optax.adam(learning_rate)

    def init(key: jax.Array) -> DQNState:
        params = net.init(key)
        target = jax.tree.map(jnp.copy, params)
        return DQNState(params, target, tx.init(params), jnp.int32(0), jnp.float32(epsilon))

    def act(state: DQNState, key: jax.Array, obs: Obs, greedy: bool = False) -> jax.Array:
        features, legal = obs
        best = best_legal(net.apply(state.params, features), legal)
        if greedy:
            return best
        u = jax.random.uniform(key, (*best.shape, 1 + num_actions), jnp.float32)
        explore = u[:, 0] < state.epsilon
        return jnp.where(explore, pick_legal(u[:, 1:], legal), best)

    def next_value(params: Any, target: Any, obs: Obs) -> jax.Array:
        features, legal = obs
        frozen = net.apply(target, features)
        chosen = best_legal(net.apply(params, features) if double else frozen, legal)
        value = jnp.take_along_axis(frozen, chosen[:, None], 1)[:, 0]
        return jnp.where(legal.any(-1), value, 0.0)

    def update(state: DQNState, key: jax.Array, batch: Transition):
        del key
        shape = batch.reward.shape[1:]
        if shape not in ((), (1,)) if n_step == 1 else shape != (n_step,):
            raise ValueError(
                f"reward has shape {batch.reward.shape}; n_step={n_step} expects "
                + ("[N]" if n_step == 1 else f"[N, {n_step}]")
            )
        v_next = next_value(state.params, state.target, batch.next_obs)
        y = td_target(n_step_return(batch.reward, discount), batch.discount, v_next)

        def loss(params):
            q = net.apply(params, batch.obs[0])
            taken = jnp.take_along_axis(q, batch.action[:, None], 1)[:, 0]
            return optax.huber_loss(taken, y, delta=huber).mean(), taken.mean()

        (value, q), grad = jax.value_and_grad(loss, has_aux=True)(state.params)
        step, opt_state = tx.update(grad, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, step)
        count = state.updates + 1
        copy = count % target_every == 0
        target = jax.tree.map(lambda p, t: jnp.where(copy, p, t), params, state.target)
        # never raised to the final value where it starts below it
        low = jnp.minimum(epsilon_final, state.epsilon)
        eps = jnp.maximum(state.epsilon * epsilon_decay, low).astype(jnp.float32)
        new = DQNState(params, target, opt_state, count, eps)
        return new, {"loss": value, "q": q, "epsilon": eps}

    def value(state: DQNState, obs: Obs) -> jax.Array:
        features, legal = obs
        q = jnp.where(legal, net.apply(state.params, features), -jnp.inf).max(-1)
        return jnp.where(legal.any(-1), q, 0.0)

    def q_value(state: DQNState, obs: Obs, action: jax.Array) -> jax.Array:
        return jnp.take_along_axis(net.apply(state.params, obs[0]), action[:, None], 1)[:, 0]

    return Agent(init, act, update, value, q_value)


def unmasked(agent: Agent, num_actions: int) -> Agent:
    """The agent on observations without a mask: every action is always legal.

    >>> agent = unmasked(double_dqn(mlp_q(3, (8,), 2), 2), 2)
    >>> agent.act(agent.init(jax.random.key(0)), jax.random.key(1), jnp.ones((4, 3))).shape
    (4,)
    """

    def masked(features: Any) -> Obs:
        n = jax.tree.leaves(features)[0].shape[0]
        return features, jnp.ones((n, num_actions), bool)

    def update(state: DQNState, key: jax.Array, batch: Transition):
        seen = batch._replace(obs=masked(batch.obs), next_obs=masked(batch.next_obs))
        return agent.update(state, key, seen)

    value, q_value = agent.value, agent.q_value
    return Agent(
        agent.init,
        lambda state, key, obs, greedy=False: agent.act(state, key, masked(obs), greedy),
        update,
        value and (lambda state, obs: value(state, masked(obs))),
        q_value and (lambda state, obs, action: q_value(state, masked(obs), action)),
    )
