"""States of the control processes as line drawings, for filmstrips on a run's page.

A drawing is f32[L, 5]: lines from (x0, y0) to (x1, y1) in metres, y upwards, and their look: GROUND, BODY (what
the agent moves), LIMB (what follows) or NONE, which is not drawn. Every drawing of a process has the same ground, so
that frames have the same frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlab.rl.envs.control import GAP, GOAL, HALF_LENGTH, X_LIMIT
from qlab.rl.envs.env import Env
from qlab.rl.rollout import Acting, film

NONE, GROUND, BODY, LIMB = range(4)
WALL = 3.0  # half-width of what is shown of the point mass's wall


def _lines(*rows: tuple[Any, Any, Any, Any, int]) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in row]) for row in rows])


def cartpole_drawing(x: jax.Array) -> jax.Array:
    """x f32[4] -> track, height, cart and pole, f32[4, 5].

    >>> cartpole_drawing(jnp.zeros(4))[3].tolist()  # upright
    [0.0, 0.0, 0.0, 1.0, 3.0]
    """
    at, angle, long = x[0], x[2], 2 * HALF_LENGTH
    return _lines(
        (-X_LIMIT, 0.0, X_LIMIT, 0.0, GROUND),
        (-X_LIMIT, 0.0, -X_LIMIT, 1.2 * long, NONE),  # room for the pole, also where it lies
        (at - 0.25, 0.0, at + 0.25, 0.0, BODY),
        (at, 0.0, at + long * jnp.sin(angle), long * jnp.cos(angle), LIMB),
    )


def pendulum_drawing(x: jax.Array) -> jax.Array:
    """x f32[2] -> a mark at the height of the goal and the rod, f32[3, 5]; theta grows to the left, as there."""
    end = -jnp.sin(x[0]), jnp.cos(x[0])
    return _lines(
        (-1.1, -1.1, 1.1, 1.1, NONE),
        (-0.15, 1.05, 0.15, 1.05, GROUND),
        (0.0, 0.0, *end, LIMB),
    )


def point_mass_drawing(x: jax.Array) -> jax.Array:
    """x f32[4] -> both walls, the goal and the mass as short lines, f32[4, 5]."""
    return _lines(
        (-WALL, 0.0, -GAP / 2, 0.0, GROUND),
        (GAP / 2, 0.0, WALL, 0.0, GROUND),
        (GOAL[0] - 0.3, GOAL[1], GOAL[0] + 0.3, GOAL[1], GROUND),
        (x[0] - 0.15, x[1], x[0] + 0.15, x[1], BODY),
    )


DRAWINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cartpole": cartpole_drawing,
    "pendulum": pendulum_drawing,
    "point_mass": point_mass_drawing,
}


def drawn(name: str, x: jax.Array, shown: jax.Array) -> jax.Array:
    """Frames f32[F, L, 5] of states x f32[F, X]; where shown bool[F] is false, lines of look NONE."""
    frames = jax.vmap(DRAWINGS[name])(x)
    return frames.at[..., 4].multiply(shown[:, None])


def filmed(
    name: str, env: Env, policy: Acting, key: jax.Array, every: int, num_frames: int = 8
) -> dict[str, jax.Array]:
    """What a Figure of kind "filmstrip" draws: an episode of a process of `control` under (key, obs [1]) -> action [1].

    "film" f32[F, L, 5] and "film_step" f32[F], the steps at which the frames were taken.
    """
    states, shown = film(env, policy, key, num_frames, every)
    steps = every * jnp.arange(num_frames, dtype=jnp.float32)
    return {"film": drawn(name, states.x, shown), "film_step": steps}
