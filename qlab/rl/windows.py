"""A replay of one-step rows in the order they came, from which targets of any number of steps are cut.

E environments write a row each at every time step, so the rows of one environment are C time steps of a ring. A
window starts at a drawn row and holds what followed it, at most n steps and never past the end of an episode; what is
not yet followed by n - 1 rows is not drawn.
Letters: C = time steps kept, E = environments, N = windows, n = steps of a window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.rl.agent import Transition


class Windows(NamedTuple):
    """rows: Transition with leading axes [C, E]. over: bool[C, E], an episode ended with this row (terminated or
    truncated). cursor: i32[], next time step. size: i32[], time steps filled."""

    rows: Transition
    over: jax.Array
    cursor: jax.Array
    size: jax.Array


def windows_init(row: Transition, capacity: int) -> Windows:
    """An empty replay.

    Args:
      row: one time step of all environments, arrays or shapes with leading axis E.
      capacity: rows in all; C = capacity // E.
    """
    num_envs = row.reward.shape[0]
    steps = capacity // num_envs
    if steps < 1:
        raise UserError(
            f"replay_size={capacity}: {num_envs} environments write as many rows a step; raise it"
        )
    rows = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), row)
    over = jnp.zeros((steps, num_envs), bool)
    return Windows(rows, over, jnp.int32(0), jnp.int32(0))


def windows_add(replay: Windows, row: Transition, over: jax.Array) -> Windows:
    """Writes one time step (leading axis E) over the oldest."""
    steps = replay.over.shape[0]
    rows = jax.tree.map(lambda d, r: d.at[replay.cursor].set(r), replay.rows, row)
    return Windows(
        rows,
        replay.over.at[replay.cursor].set(over),
        (replay.cursor + 1) % steps,
        jnp.minimum(replay.size + 1, steps),
    )


def window_ready(replay: Windows, least_rows: int, n_step: int) -> jax.Array:
    """bool[]: at least `least_rows` rows, and one whole window, are there."""
    return (replay.size * replay.over.shape[1] >= least_rows) & (replay.size >= n_step)


def window_sample(replay: Windows, key: jax.Array, n: int, n_step: int = 1) -> Transition:
    """n windows drawn uniformly with replacement (`window_ready` must hold).

    Returns:
      Transition with obs and action of the first row; next_obs of the last row of the window; `discount` f[N] the
      product of the rows' discounts; `reward` f[N] for n_step = 1, else f[N, n_step], zero after an end. Other fields: of
      the first row.
    """
    steps, num_envs = replay.over.shape
    starts = replay.size - (n_step - 1)
    # Not randint, and one draw for both: each would compile as long as all the rest of this
    u = jax.random.uniform(key, (2, n), jnp.float32)
    t = jnp.minimum((u[0] * starts).astype(jnp.int32), starts - 1)  # the rounding of f32
    e = jnp.minimum((u[1] * num_envs).astype(jnp.int32), num_envs - 1)
    first = (replay.cursor - replay.size + t) % steps
    at = (first[:, None] + jnp.arange(n_step)) % steps  # [N, n]
    over = replay.over[at, e[:, None]]
    # row k counts unless an earlier one ended the episode
    counts = jnp.cumsum(over, 1) - over == 0
    last = (first + counts.sum(1) - 1) % steps
    one = jax.tree.map(lambda x: x[first, e], replay.rows._replace(next_obs=None))
    following: Any = jax.tree.map(lambda x: x[last, e], replay.rows.next_obs)
    reward = jnp.where(counts, replay.rows.reward[at, e[:, None]], 0.0)
    discount = jnp.where(counts, replay.rows.discount[at, e[:, None]], 1.0).prod(1)
    return one._replace(
        reward=reward[:, 0] if n_step == 1 else reward, discount=discount, next_obs=following
    )
