"""Gymnasium's CartPole-v1 and Pendulum-v1, with its rewards and time limits, for scores that others published.

They are the processes of `control` without the second player. CartPole-v1: two forces of 10 N, reward 1 a step,
500 steps. Pendulum-v1: a torque of at most 2 N m, reward minus the cost, 200 steps. Both start as there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.rl.envs.control import ENVS, System, two_player
from qlab.rl.envs.env import Env, alone, discrete

SOLVED_CARTPOLE = 475.0  # Gymnasium's reward threshold of CartPole-v1


def cartpole_v1() -> Env:
    """Actions i32[]: 0 pushes left, 1 right. action_dim is 2, the number of actions.

    >>> env = cartpole_v1()
    >>> state, obs = env.reset(jax.random.key(0))
    >>> float(env.step(state, jnp.int32(1), jax.random.key(1))[1].reward)
    1.0
    """
    default = ENVS["cartpole"]
    process = default.make(default.physics)

    def advance(x: jax.Array, action: jax.Array, push: jax.Array):
        after, _, fell = process.advance(x, action, push)
        return after, jnp.float32(1), fell

    paid = System(process.start, advance, process.observe, process.sizes)
    env = two_player(paid, max_action=default.max_action, max_force=1.0, horizon=default.horizon)
    return discrete(alone(env), [[-1.0], [1.0]])


def pendulum_v1() -> Env:
    """Actions f32[1] in [-1, 1], of which 1 is 2 N m."""
    default = ENVS["pendulum"]
    return alone(
        two_player(
            default.make(default.physics),
            max_action=default.max_action,
            max_force=1.0,
            horizon=default.horizon,
        )
    )
