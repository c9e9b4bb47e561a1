"""The contract of an environment that runs inside jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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
