"""Cart-pole, pendulum and point mass, step for step against their published formulae in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.rl.envs import control as c
from qlab.rl.envs.env import alone


def cartpole64(s, force, push, mass, friction):
    """Gymnasium's CartPole (force_mag replaced by the force itself), plus the generalised forces of a push on
    the pole's centre, from the Lagrangian: f_x on x, l (f_x cos th - f_z sin th) on th."""
    gravity, masscart, length, tau = 9.8, 1.0, 0.5, 0.02
    x, x_dot, theta, theta_dot = s
    total_mass, polemass_length = mass + masscart, mass * length
    a = np.array([[total_mass, polemass_length * np.cos(theta)],
                  [polemass_length * np.cos(theta), 4 / 3 * mass * length**2]])  # fmt: skip
    b = np.array([
        force - friction * x_dot + push[0] + polemass_length * theta_dot**2 * np.sin(theta),
        polemass_length * gravity * np.sin(theta) + length * (push[0] * np.cos(theta) - push[1] * np.sin(theta)),
    ])  # fmt: skip
    xacc, thetaacc = np.linalg.solve(a, b)
    return np.array(
        [x + tau * x_dot, x_dot + tau * xacc, theta + tau * theta_dot, theta_dot + tau * thetaacc]
    )


def gymnasium_cartpole64(s, force):
    """The formula as it stands in Gymnasium."""
    gravity, masscart, masspole, length, tau = 9.8, 1.0, 0.1, 0.5, 0.02
    total_mass, polemass_length = masscart + masspole, masspole * length
    x, x_dot, theta, theta_dot = s
    costheta, sintheta = np.cos(theta), np.sin(theta)
    temp = (force + polemass_length * np.square(theta_dot) * sintheta) / total_mass
    thetaacc = (gravity * sintheta - costheta * temp) / (
        length * (4.0 / 3.0 - masspole * np.square(costheta) / total_mass)
    )
    xacc = temp - polemass_length * thetaacc * costheta / total_mass
    return np.array(
        [x + tau * x_dot, x_dot + tau * xacc, theta + tau * theta_dot, theta_dot + tau * thetaacc]
    )


def pendulum64(s, u, push=0.0, mass=1.0, friction=0.0):
    th, thdot = s
    g, l, dt = 10.0, 1.0, 0.05
    costs = (((th + np.pi) % (2 * np.pi)) - np.pi) ** 2 + 0.1 * thdot**2 + 0.001 * u**2
    torque = u + push - friction * thdot
    new = thdot + (3 * g / (2 * l) * np.sin(th) + 3.0 / (mass * l**2) * torque) * dt
    new = np.clip(new, -8, 8)
    return np.array([th + new * dt, new]), -costs


def test_cartpole_is_gymnasiums(rng):
    advance = jax.jit(c.cartpole(c.Physics(0.1, 0.0)).advance)
    for _ in range(50):
        s, force = rng.uniform(-1, 1, 4) * [2, 2, 0.2, 2], rng.uniform(-10, 10)
        got, reward, fell = advance(jnp.asarray(s), jnp.array([force]), jnp.zeros(2))
        want = gymnasium_cartpole64(s, force)
        np.testing.assert_allclose(got, want, atol=2e-6)
        near = 1 - (want[0] / 2.4) ** 2 / 2 - (want[2] / (12 * 2 * np.pi / 360)) ** 2 / 2
        np.testing.assert_allclose(reward, max(near, 0), atol=1e-4)
        assert bool(fell) == (abs(want[0]) > 2.4 or abs(want[2]) > 12 * 2 * np.pi / 360)


def test_cartpole_with_a_push_follows_the_lagrangian(rng):
    for _ in range(20):
        mass, friction = rng.uniform(0.05, 2), rng.uniform(0, 3)
        s, push, force = rng.uniform(-1, 1, 4), rng.uniform(-2, 2, 2), rng.uniform(-10, 10)
        got, *_ = c.cartpole(c.Physics(mass, friction)).advance(
            jnp.asarray(s, jnp.float32), jnp.array([force]), jnp.asarray(push)
        )
        np.testing.assert_allclose(got, cartpole64(s, force, push, mass, friction), atol=3e-5)


def test_pendulum_is_gymnasiums_over_an_episode(rng):
    advance = jax.jit(c.pendulum(c.Physics(1.0, 0.0)).advance)
    for _ in range(50):
        s, u = rng.uniform(-1, 1, 2) * [7, 8], rng.uniform(-2, 2)
        got, reward, over = advance(jnp.asarray(s), jnp.array([u]), jnp.zeros(1))
        want, pay = pendulum64(s, u)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(reward, pay, rtol=1e-4, atol=1e-4)
        assert not over
    got, *_ = c.pendulum(c.Physics(2.0, 0.3)).advance(
        jnp.array([0.4, 1.0]), jnp.array([1.0]), jnp.array([-0.5])
    )
    np.testing.assert_allclose(got, pendulum64([0.4, 1.0], 1.0, -0.5, 2.0, 0.3)[0], atol=1e-6)


def test_point_mass_moves_crashes_and_passes_the_gap():
    advance = jax.jit(c.point_mass(c.Physics(5.0, 1.0)).advance)
    s = np.array([0.3, 1.0, -0.5, 0.2])
    got, reward, crash = advance(jnp.asarray(s), jnp.array([10.0, -5.0]), jnp.array([1.0, 2.0]))
    v = s[2:] + 0.01 * (np.array([11.0, -3.0]) - s[2:]) / 5
    want = np.concatenate([s[:2] + 0.01 * v, v])
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(reward, np.exp(-0.6 * np.hypot(want[0], want[1] + 3)), rtol=1e-5)
    assert not crash
    for x, crashes in ((0.0, False), (0.49, False), (0.51, True), (-0.7, True)):
        _, _, crash = advance(jnp.array([x, 0.001, 0.0, -1.0]), jnp.zeros(2), jnp.zeros(2))
        assert bool(crash) == crashes


def counter(fall_at=99):
    """x counts the steps; pays x; falls at `fall_at`."""

    def advance(x, a, o):
        return x + 1, x[0] + 1 + 0 * a[0] * o[0], x[0] + 1 >= fall_at

    return c.System(lambda key: jnp.zeros(1), advance, lambda x: 10 * x, (1, 1, 1))


@pytest.mark.parametrize("fall_at", [99, 4, 2])
def test_ends_are_told_apart_and_the_last_observation_is_kept(fall_at):
    env = alone(c.two_player(counter(fall_at), max_action=1, max_force=1, horizon=4))
    state, _ = env.reset(jax.random.key(0))
    seen = []
    for i in range(8):
        state, ts = env.step(state, jnp.zeros(1), jax.random.key(i))
        seen.append(
            [float(ts.obs[0]), float(ts.final_obs[0]), bool(ts.terminated), bool(ts.truncated)]
        )
    length = min(4, fall_at)
    for i, row in enumerate(seen):
        n = i % length + 1
        last = n == length
        assert row == [
            0.0 if last else 10.0 * n,
            10.0 * n,
            last and fall_at <= 4,
            last and fall_at > 4,
        ]


def test_actions_are_scaled_and_clipped(rng):
    env = c.control("cartpole", max_force=0.5)
    state, _ = env.reset(jax.random.key(1))
    step = jax.jit(env.step)
    _, ts = step(state, jnp.array([3.0]), jnp.array([-9.0, 0.5]), jax.random.key(0))
    want = cartpole64(np.float64(state.x), 10.0, [-0.5, 0.25], 0.1, 0.0)
    np.testing.assert_allclose(ts.final_obs, want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: c.control("cartpole", max_force=float("inf")), "adv_max_force=inf.*unbounded.*finite"),
        (lambda: c.two_player(counter(), max_action=float("inf"), max_force=1, horizon=4), "max_action=inf"),
        (lambda: c.control("cartpol", max_force=1.0), "did you mean cartpole"),
        (lambda: c.two_player(counter(), max_action=1, max_force=1, horizon=0), "horizon=0"),
    ],
)  # fmt: skip
def test_bad_environments_are_one_line(call, word):
    with pytest.raises(UserError, match=word) as e:
        call()
    assert "\n" not in str(e.value)
