"""Cart-pole, pendulum and a point mass in wind, each with a second player who pushes.

cartpole    Gymnasium's CartPole equations with a continuous force, and a force (f_x, f_z) on the centre of
            the pole: temp = (F - friction x' + f_x + m l th'^2 sin th) / (M + m),
            th'' = (g sin th - cos th temp + (f_x cos th - f_z sin th) / m) / (l (4/3 - m cos^2 th / (M + m))),
            x'' = temp - m l th'' cos th / (M + m); explicit Euler. Ends at |x| > 2.4 m or |th| > 12 degrees.
            Pays 1 - (x / 2.4 m)^2 / 2 - (th / 12 degrees)^2 / 2, not below 0, where Gymnasium pays 1: an adversary
            that cannot yet fell the pole would learn nothing from a constant.
pendulum    Gymnasium's Pendulum with a second torque and viscous friction; pays minus its cost; never ends.
point_mass  Two dimensions, wall at y = 0 with a gap of width 1 around x = 0; start near (0, 3), goal (0, -3);
            mass v' = force - friction v + wind. Pays exp(-0.6 distance to the goal); crossing the wall
            beside the gap ends the episode. Time step, mass, friction and gap from QARL's repository; start,
            goal, reward and semi-implicit Euler are our choice.

Physical parameters are arrays, so a grid of them is one vmapped program. Units: SI.
Letters: X = state, D = action, K = disturbance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.rl.envs.env import TimeStep, TwoPlayerEnv, check_bound

GRAVITY_CARTPOLE, GRAVITY_PENDULUM = 9.8, 10.0
CART_MASS, HALF_LENGTH, TAU = 1.0, 0.5, 0.02
X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * jnp.pi / 360
PENDULUM_DT, MAX_SPEED = 0.05, 8.0
POINT_DT, GAP, START, GOAL = 0.01, 1.0, (0.0, 3.0), (0.0, -3.0)


class Physics(NamedTuple):
    """mass: f32[], kg, of the pole, the pendulum or the point. friction: f32[], viscous."""

    mass: Any
    friction: Any


class System(NamedTuple):
    """A process without a clock.

    Attributes:
      start: key -> x f32[X].
      advance: (x, action f32[D], push f32[K], both in physical units) -> (x, reward f32[],
        terminated bool[]).
      observe: x -> obs.
      sizes: of obs, action, push.
    """

    start: Callable[[jax.Array], jax.Array]
    advance: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    observe: Callable[[jax.Array], jax.Array]
    sizes: tuple[int, int, int]


class Clocked(NamedTuple):
    """x: f32[X]. age: i32[], steps since the reset."""

    x: jax.Array
    age: jax.Array


def two_player(
    system: System, *, max_action: float, max_force: float, horizon: int
) -> TwoPlayerEnv:
    """The process with actions scaled to [-1, 1], a time limit and automatic resets.

    Raises:
      UserError: an infinite bound, or a horizon below 1.
    """
    check_bound("max_action", max_action)
    check_bound("adv_max_force", max_force)
    if horizon < 1:
        raise UserError(f"horizon={horizon}: an episode has at least one step")

    def reset(key: jax.Array) -> tuple[Clocked, jax.Array]:
        x = system.start(key)
        return Clocked(x, jnp.int32(0)), system.observe(x)

    def step(state: Clocked, action: jax.Array, push: jax.Array, key: jax.Array):
        action, push = jnp.clip(action, -1, 1), jnp.clip(push, -1, 1)
        after, reward, terminated = system.advance(state.x, max_action * action, max_force * push)
        truncated = (state.age + 1 >= horizon) & ~terminated
        over = terminated | truncated
        x = jnp.where(over, system.start(key), after)
        age = jnp.where(over, 0, state.age + 1)
        ts = TimeStep(system.observe(x), reward, terminated, truncated, system.observe(after))
        return Clocked(x, age), ts

    return TwoPlayerEnv(reset, step, *system.sizes)


def cartpole(physics: Physics) -> System:
    """x = (x, x', theta, theta'); observation the same."""
    m, total = physics.mass, CART_MASS + physics.mass

    def advance(s, action, push):
        _, v, angle, spin = s
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        f_x, f_z = push
        temp = action[0] - physics.friction * v + f_x + m * HALF_LENGTH * spin**2 * sin
        temp = temp / total
        bend = GRAVITY_CARTPOLE * sin - cos * temp + (f_x * cos - f_z * sin) / m
        bend = bend / (HALF_LENGTH * (4 / 3 - m * cos**2 / total))
        push_x = temp - m * HALF_LENGTH * bend * cos / total
        after = s + TAU * jnp.stack([v, push_x, spin, bend])
        fell = (jnp.abs(after[0]) > X_LIMIT) | (jnp.abs(after[2]) > ANGLE_LIMIT)
        near = 1 - 0.5 * ((after[0] / X_LIMIT) ** 2 + (after[2] / ANGLE_LIMIT) ** 2)
        return after, jnp.maximum(near, 0.0), fell

    def start(key):
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    return System(start, advance, lambda s: s, (4, 1, 2))


def pendulum(physics: Physics) -> System:
    """x = (theta, theta'), theta = 0 upright; observation (cos, sin, theta')."""

    def advance(s, action, push):
        angle, spin = s
        wrapped = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = wrapped**2 + 0.1 * spin**2 + 0.001 * action[0] ** 2
        torque = action[0] + push[0] - physics.friction * spin
        bend = 3 * GRAVITY_PENDULUM / 2 * jnp.sin(angle) + 3 / physics.mass * torque
        spin = jnp.clip(spin + PENDULUM_DT * bend, -MAX_SPEED, MAX_SPEED)
        return jnp.stack([angle + PENDULUM_DT * spin, spin]), -cost, jnp.bool_(False)

    def start(key):
        return jax.random.uniform(key, (2,), minval=-1.0) * jnp.array([jnp.pi, 1.0])

    def observe(s):
        return jnp.stack([jnp.cos(s[0]), jnp.sin(s[0]), s[1]])

    return System(start, advance, observe, (3, 1, 1))


def point_mass(physics: Physics) -> System:
    """x = (x, y, x', y'); observation the same."""
    goal = jnp.array(GOAL)

    def advance(s, action, push):
        place, v = s[:2], s[2:]
        v = v + POINT_DT * (action + push - physics.friction * v) / physics.mass
        after = place + POINT_DT * v
        crosses = (place[1] > 0) != (after[1] > 0)
        share = place[1] / jnp.where(crosses, place[1] - after[1], 1.0)
        x_wall = place[0] + share * (after[0] - place[0])
        crash = crosses & (jnp.abs(x_wall) > GAP / 2)
        reward = jnp.exp(-0.6 * jnp.linalg.norm(after - goal))
        return jnp.concatenate([after, v]), reward, crash

    def start(key):
        place = jnp.array(START) + jax.random.uniform(key, (2,), minval=-0.1, maxval=0.1)
        return jnp.concatenate([place, jnp.zeros(2)])

    return System(start, advance, lambda s: s, (4, 2, 2))


class Default(NamedTuple):
    """What stands for a name: its system, its physics, the protagonist's bound, the horizon."""

    make: Callable[[Physics], System]
    physics: Physics
    max_action: float
    horizon: int


ENVS = {
    "cartpole": Default(cartpole, Physics(0.1, 0.0), 10.0, 500),
    "pendulum": Default(pendulum, Physics(1.0, 0.0), 2.0, 200),
    "point_mass": Default(point_mass, Physics(5.0, 1.0), 10.0, 500),
}


def control(
    name: str, *, max_force: float, horizon: int = 0, physics: Physics | None = None
) -> TwoPlayerEnv:
    """An environment by name; horizon = 0 and physics = None take its own.

    Raises:
      UserError: an unknown name.

    >>> control("cartpole", max_force=0.5).obs_dim
    4
    """
    if name not in ENVS:
        raise UserError(f"env={name!r} is not known{nearest(name, list(ENVS))}")
    d = ENVS[name]
    return two_player(
        d.make(d.physics if physics is None else physics),
        max_action=d.max_action,
        max_force=max_force,
        horizon=horizon or d.horizon,
    )
