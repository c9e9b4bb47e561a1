"""What every agent shares: the record of functions, the transition, the one-step target.

Letters: N = transitions of a batch, S = observation size, D = action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Transition(NamedTuple):
    """A batch of one-step experience.

    Attributes:
      obs: f32[N, S].
      action: f32[N, D] in [-1, 1] (or i32[N] for agents with discrete actions).
      reward: f32[N].
      discount: f32[N], gamma (1 - terminated): a truncated episode still bootstraps.
      next_obs: f32[N, S], the observation before any auto-reset.
      demo: f32[N], 1 where behaviour cloning may imitate the action; None where no agent asks.
      temperature: f32[N], per-sample entropy temperature of agents that read it; None elsewhere.
    """

    obs: Any
    action: jax.Array
    reward: jax.Array
    discount: jax.Array
    next_obs: Any
    demo: jax.Array | None = None
    temperature: jax.Array | None = None


class Agent(NamedTuple):
    """A learner as pure functions.

    Attributes:
      init: key -> state.
      act: (state, key, obs f32[N, S], greedy=False) -> action f32[N, D]. `greedy` is static.
      update: (state, key, batch: Transition) -> (state, metrics of scalars, one of them "loss").
      value: (state, obs f32[N, S]) -> f32[N], the agent's own estimate of the state value; None
        for agents without one. In reward units of the environment.
      q_value: (state, obs f32[N, S], action f32[N, D]) -> f32[N], likewise.
    """

    init: Callable[[jax.Array], Any]
    act: Callable[..., jax.Array]
    update: Callable[[Any, jax.Array, Transition], tuple[Any, dict[str, jax.Array]]]
    value: Callable[[Any, Any], jax.Array] | None = None
    q_value: Callable[[Any, Any, jax.Array], jax.Array] | None = None


def random_agent(draw: Callable[[jax.Array, int], jax.Array]) -> Agent:
    """An agent that acts at random and learns nothing: the floor that a learner is compared with.

    Args:
      draw: (key, N) -> N actions.

    >>> agent = random_agent(lambda key, n: jax.random.randint(key, (n,), 0, 2))
    >>> agent.act(agent.init(jax.random.key(0)), jax.random.key(1), jax.numpy.ones((3, 4))).shape
    (3,)
    """

    def act(state: Any, key: jax.Array, obs: Any, greedy: bool = False) -> jax.Array:
        del state, greedy
        return draw(key, jax.tree.leaves(obs)[0].shape[0])

    return Agent(
        init=lambda key: (),
        act=act,
        update=lambda state, key, batch: (state, {"loss": jax.numpy.float32(0)}),
    )


class LearnerState(NamedTuple):
    """params: pytree. target: its moving average. opt_state: of optax."""

    params: Any
    target: Any
    opt_state: Any


def td_target(reward: jax.Array, discount: jax.Array, v_next: jax.Array) -> jax.Array:
    """One-step target f32[N] = reward + discount * v_next, without a gradient.

    `discount` is gamma (1 - terminated). With a soft value v_next no entropy bonus is added again.

    >>> float(td_target(1.0, 0.5, 4.0))
    3.0
    """
    return jax.lax.stop_gradient(reward + discount * v_next)


def ema(target: Any, online: Any, tau: float) -> Any:
    """target + tau (online - target), leaf by leaf.

    >>> ema({'w': 0.0}, {'w': 1.0}, 0.25)
    {'w': 0.25}
    """
    return jax.tree.map(lambda t, o: t + tau * (o - t), target, online)
