"""The contract of an environment that runs inside jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError


class TimeStep(NamedTuple):
    """What one step returns.

    Attributes:
      obs: what the agent acts on next; the first observation of a new episode after an end.
      reward: f32[].
      terminated: bool[], the process ended: no value follows. truncated: bool[], time ran out.
      final_obs: the last observation before any reset; every target bootstraps from it.
    """

    obs: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: Any


class Env(NamedTuple):
    """One environment; vmap it for many.

    Attributes:
      reset: key -> (state, obs).
      step: (state, action f32[D] in [-1, 1], key) -> (state, TimeStep); resets itself at an end.
      obs_dim, action_dim: sizes of the vectors.
    """

    reset: Callable[[jax.Array], tuple[Any, Any]]
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, TimeStep]]
    obs_dim: int
    action_dim: int


class TwoPlayerEnv(NamedTuple):
    """A zero-sum environment: the protagonist is paid the reward, the adversary its negative.

    Attributes:
      reset: key -> (state, obs).
      step: (state, action f32[D], disturbance f32[K], key) -> (state, TimeStep); both actions in
        [-1, 1], clipped to it; resets itself at an end.
      obs_dim, action_dim, adversary_dim: sizes of the vectors.
    """

    reset: Callable[[jax.Array], tuple[Any, Any]]
    step: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[Any, TimeStep]]
    obs_dim: int
    action_dim: int
    adversary_dim: int


def alone(env: TwoPlayerEnv) -> Env:
    """The environment with no disturbance, for one player."""
    nothing = jnp.zeros(env.adversary_dim)
    return Env(
        env.reset,
        lambda state, action, key: env.step(state, action, nothing, key),
        env.obs_dim,
        env.action_dim,
    )


def discrete(env: Env, actions: Any) -> Env:
    """The environment with a list of actions to choose from: step takes i32[], a row of actions f32[A, D].

    action_dim of the result is A.
    """
    table = jnp.asarray(actions, jnp.float32)
    return Env(
        env.reset,
        lambda state, action, key: env.step(state, table[action], key),
        env.obs_dim,
        len(table),
    )


def check_bound(name: str, bound: float) -> None:
    """Raises where a box of actions has no finite positive half-width.

    >>> check_bound("max_action", float("inf"))
    Traceback (most recent call last):
    ...
    qlab.lab.errors.UserError: max_action=inf: an unbounded action space cannot be scaled to [-1, 1]; give a finite bound above 0
    """
    if not 0 < bound < float("inf"):
        raise UserError(
            f"{name}={bound}: an unbounded action space cannot be scaled to [-1, 1]; "
            "give a finite bound above 0"
        )
