"""Brax's environments under the contract of `env.Env`.

Brax's own wrappers restart an episode where it first began; here every episode draws a new start. An end that
Brax calls `done` is a termination, the time limit is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.rl.envs.env import Env, TimeStep

HORIZON = 1000


class BraxState(NamedTuple):
    """inner: Brax's state. age: i32[], steps since the reset."""

    inner: Any
    age: jax.Array


def brax_env(name: str, backend: str = "spring", horizon: int = HORIZON) -> tuple[Env, int]:
    """The environment and its time limit.

    Raises:
      UserError: brax is not installed, or does not know the name.
    """
    try:
        from brax import envs  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"tasks: brax:{name} needs brax: pip install 'qlab[brax]'") from e
    known = list(envs._envs)
    if name not in known:
        raise UserError(f"tasks: brax has no environment {name!r}{nearest(name, known)}")
    brax = envs.get_environment(name, backend=backend)

    def reset(key: jax.Array) -> tuple[BraxState, jax.Array]:
        inner = brax.reset(key)
        return BraxState(inner, jnp.int32(0)), inner.obs

    def step(state: BraxState, action: jax.Array, key: jax.Array):
        after = brax.step(state.inner, jnp.clip(action, -1, 1))
        terminated = after.done > 0
        truncated = (state.age + 1 >= horizon) & ~terminated
        over = terminated | truncated
        inner = jax.tree.map(lambda a, b: jnp.where(over, a, b), brax.reset(key), after)
        ts = TimeStep(inner.obs, after.reward, terminated, truncated, after.obs)
        return BraxState(inner, jnp.where(over, 0, state.age + 1)), ts

    return Env(reset, step, brax.observation_size, brax.action_size), horizon
