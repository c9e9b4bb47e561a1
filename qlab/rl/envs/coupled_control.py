"""Control tasks in which the dimensions of an action matter together, and scripted controllers for them.

gates      A point in the plane, damped, inside a fence of radius 1 that ends the episode where it is touched.
           Gates at 45 and 225 degrees pay 1, a side door at 90 degrees pays 0.2, the fence pays -1; a step
           costs 0.01. From the middle, both dimensions the same way is good, opposite ways is bad.
           Expert: to one of the gates, each as often. Medium: to the side door. Bad: to where no gate is, 135
           or 315 degrees, each as often.
thrusters  A craft in the plane flies to a goal. A pair of thrusters gives the force of one axis as
           the product of its two actions, so that only both signs together say where it goes.
           A step pays 0.05 exp(-2 distance). Expert: a PD force, split evenly over the pair with a random
           sign for the episode. Medium: a tenth of that force. Bad: the second sign of a pair is random at every step.
thrusters_separable  The same craft with the mean of the two actions as force: no coupling. Controllers likewise.
pendulum   The swing-up of `control.pendulum`, one dimension; pays 0.003 times its reward. Expert: pumps
           energy, then balances. Medium: the same with half the torque. Bad: brakes.

All run out of time; only gates may end before. The names with _expert take their demonstrations from a mostly expert mix.
The first two tasks are built to be coupled, the other two are their controls. Every scripted action gets Gaussian noise
(`demo_tasks.scripted`). All numbers are our choice.
Letters: D = action dimensions, S = observation size, P = pairs of thrusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.rl.envs.control import Physics, System, pendulum, two_player
from qlab.rl.envs.env import Env, alone

EXPERT, MEDIUM, BAD = range(3)
GATE_ANGLES, DOOR_ANGLE, HALF_WIDTH = (jnp.pi / 4, -3 * jnp.pi / 4), jnp.pi / 2, jnp.pi / 12
GATE_PAY, DOOR_PAY, FENCE_PAY, STEP_COST = 1.0, 0.2, -1.0, 0.01
PAIRS = 2  # of thrusters: one axis of the plane each
PENDULUM_SCALE = 0.003  # brings discounted returns to the order of 1, as in the other tasks


class Variation(NamedTuple):
    """What makes tasks of one shape differ, as arrays.

    Attributes:
      mix: f32[3], shares of the demonstrations' episodes by expert, medium and bad.
      coupling: f32[], 1 = the product of a pair of thrusters, 0 = their mean.
    """

    mix: Any
    coupling: Any


class ControlTask(NamedTuple):
    """A task as functions of its variation.

    Attributes:
      system: Variation -> System without a second player.
      control: (Variation, which i32[], mode f32[2], luck f32[2], obs f32[S]) -> action f32[D] before the noise. `which`
        is EXPERT, MEDIUM or BAD; `mode` in [-1, 1) is drawn once an episode, `luck` at every step.
      action_dim: D. horizon: steps of an episode. scale: of the reward. max_action: physical units of an action of 1.
    """

    system: Callable[[Variation], System]
    control: Callable[..., jax.Array]
    action_dim: int
    horizon: int
    scale: float = 1.0
    max_action: float = 1.0


def task_env(task: ControlTask, variation: Variation) -> Env:
    """The task with its clock, scaled rewards and automatic resets."""
    system = task.system(variation)

    def advance(x, action, push):
        after, reward, terminated = system.advance(x, action, push)
        return after, task.scale * reward, terminated

    scaled = system._replace(advance=advance)
    return alone(
        two_player(scaled, max_action=task.max_action, max_force=1.0, horizon=task.horizon)
    )


def _turn(angle: jax.Array) -> jax.Array:
    """angle in [-pi, pi)."""
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi


def _gates_system(variation: Variation) -> System:
    """x = (place, velocity); observation the same."""
    del variation

    def advance(x, action, push):
        del push
        velocity = 0.7 * x[2:] + 0.06 * action
        place = x[:2] + velocity
        out = jnp.square(place).sum() >= 1
        # where the straight step meets the fence: |place - back velocity| = 1
        a, b = jnp.square(velocity).sum(), place @ velocity
        root = jnp.sqrt(jnp.maximum(b**2 - a * (jnp.square(place).sum() - 1), 0.0))
        crossing = place - (b - root) / jnp.maximum(a, 1e-9) * velocity
        angle = jnp.arctan2(crossing[1], crossing[0])
        near = [jnp.abs(_turn(angle - g)) < HALF_WIDTH for g in (*GATE_ANGLES, DOOR_ANGLE)]
        pay = jnp.where(near[0] | near[1], GATE_PAY, jnp.where(near[2], DOOR_PAY, FENCE_PAY))
        reward = jnp.where(out, pay, 0.0) - STEP_COST
        return jnp.concatenate([place, velocity]), reward, out

    def start(key):
        place = jax.random.uniform(key, (2,), minval=-0.05, maxval=0.05)
        return jnp.concatenate([place, jnp.zeros(2)])

    return System(start, advance, lambda x: x, (4, 2, 1))


def _gates_control(variation, which, mode, luck, obs):
    del variation, luck
    side = jnp.where(mode[0] < 0, -1.0, 1.0)
    same, opposite = jnp.array([side, side]), jnp.array([side, -side])
    aims = jnp.stack([same * 0.8, jnp.array([0.0, 1.1]), opposite * 0.8])
    return jnp.clip(8 * (aims[which] - obs[:2]) - 4 * obs[2:], -1, 1)


def _force(coupling: jax.Array, action: jax.Array) -> jax.Array:
    """f32[P] from action f32[2 P]: a pair's product (coupling 1) or mean (coupling 0).

    >>> _force(1.0, jnp.array([-1.0, -0.5, 1.0, -1.0])).tolist()
    [0.5, -1.0]
    >>> _force(0.0, jnp.array([-1.0, -0.5, 1.0, -1.0])).tolist()
    [-0.75, 0.0]
    """
    pair = action.reshape(PAIRS, 2)
    return coupling * pair.prod(-1) + (1 - coupling) * pair.mean(-1)


def _thrusters_system(variation: Variation) -> System:
    """x = (place, velocity, goal); observation the same."""

    def advance(x, action, push):
        del push
        velocity = 0.8 * x[2:4] + 0.05 * _force(variation.coupling, action)
        place = x[:2] + velocity
        reward = 0.05 * jnp.exp(-2 * jnp.linalg.norm(place - x[4:]))
        return jnp.concatenate([place, velocity, x[4:]]), reward, jnp.bool_(False)

    def start(key):
        goal = jax.random.uniform(key, (2,), minval=-1.0)
        return jnp.concatenate([jnp.zeros(4), goal])

    return System(start, advance, lambda x: x, (6, 2 * PAIRS, 1))


def _thrusters_control(variation, which, mode, luck, obs):
    force = jnp.clip(4 * (obs[4:] - obs[:2]) - 12 * obs[2:4], -1, 1)
    force = jnp.where(which == MEDIUM, force / 10, force)
    flips = jnp.where((which == BAD) & (luck < 0), -1.0, 1.0)
    side = jnp.where(mode < 0, -1.0, 1.0)
    root = jnp.sqrt(jnp.abs(force))
    coupled = jnp.stack([side * root, side * jnp.sign(force) * flips * root], -1)
    plain = jnp.stack([force, flips * force], -1)
    return (variation.coupling * coupled + (1 - variation.coupling) * plain).reshape(-1)


def _pendulum_control(variation, which, mode, luck, obs):
    del variation, mode, luck
    cos, sin, spin = obs
    angle = jnp.arctan2(sin, cos)
    energy = 0.5 * spin**2 + 15 * (cos - 1)  # 0 at rest upright, in units of inertia
    pump = jnp.where(energy < 0, 1.0, -1.0) * jnp.where(spin < 0, -1.0, 1.0)
    balance = jnp.clip(-5 * angle - spin, -1, 1)  # in units of 2 N m
    swing = jnp.where((jnp.abs(angle) < 0.35) & (jnp.abs(spin) < 2.0), balance, pump)
    brake = jnp.clip(-spin, -1, 1)
    return jnp.stack([swing, swing / 2, brake])[which][None]


_GATES = ControlTask(_gates_system, _gates_control, 2, 30)
_THRUSTERS = ControlTask(_thrusters_system, _thrusters_control, 2 * PAIRS, 40)
_PENDULUM = ControlTask(
    lambda v: pendulum(Physics(1.0, 0.0)), _pendulum_control, 1, 200, PENDULUM_SCALE, 2.0
)


class Named(NamedTuple):
    """task: the shape. mix: the config key of its demonstrations' shares. coupling: of its variation."""

    task: ControlTask
    mix: str
    coupling: float = 1.0


CONTROL_TASKS = {
    "gates": Named(_GATES, "demo_mix"),
    "gates_expert": Named(_GATES, "expert_mix"),
    "thrusters": Named(_THRUSTERS, "demo_mix"),
    "thrusters_expert": Named(_THRUSTERS, "expert_mix"),
    "thrusters_separable": Named(_THRUSTERS, "demo_mix", 0.0),
    "pendulum": Named(_PENDULUM, "demo_mix"),
}
