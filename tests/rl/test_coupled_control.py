"""The coupled control tasks against float64 formulas, and what their controllers earn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl.demo_tasks import scripted
from qlab.rl.envs import coupled_control as cc

EVEN = cc.Variation(jnp.full(3, 1 / 3), jnp.float32(1.0))
GATES, THRUSTERS, PENDULUM = (cc.CONTROL_TASKS[n].task for n in ("gates", "thrusters", "pendulum"))


def gate64(place, velocity, action):
    """The step of `gates` in float64: place, velocity, reward, whether the fence was touched."""
    velocity = 0.7 * velocity + 0.06 * action
    new = place + velocity
    if new @ new < 1:
        return new, velocity, -0.01, False
    t = np.linspace(0, 1, 200_001)[:, None]
    path = place + t * velocity
    x, y = path[np.argmax((path**2).sum(1) >= 1)]
    degrees = np.degrees(np.arctan2(y, x))
    if min(abs(degrees - 45), abs(degrees + 135)) < 15:
        return new, velocity, 1 - 0.01, True
    return new, velocity, (0.2 if abs(degrees - 90) < 15 else -1.0) - 0.01, True


def test_gates_pay_where_the_path_meets_the_fence(rng):
    advance = jax.jit(jax.vmap(cc._gates_system(EVEN).advance, (0, 0, None)))
    angle = rng.uniform(-np.pi, np.pi, 400)
    place = rng.uniform(0.8, 0.999, (400, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
    velocity, action = rng.uniform(-0.2, 0.2, (400, 2)), rng.uniform(-1, 1, (400, 2))
    got = advance(np.float32(np.hstack([place, velocity])), np.float32(action), jnp.zeros(1))
    pays = set()
    for i in range(400):
        new, v, reward, out = gate64(place[i], velocity[i], action[i])
        if abs(new @ new - 1) > 1e-5:
            assert bool(got[2][i]) == out
            pays.add(round(reward, 2))
            assert float(got[1][i]) == pytest.approx(reward, abs=1e-6), (i, new)
        np.testing.assert_allclose(got[0][i], np.concatenate([new, v]), atol=1e-6)
    assert pays == {-0.01, 0.99, 0.19, -1.01}


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_thrusters_fly_by_products_or_means(rng, coupling):
    advance = jax.jit(cc._thrusters_system(EVEN._replace(coupling=coupling)).advance)
    for _ in range(10):
        x, a = rng.uniform(-1, 1, 6), rng.uniform(-1, 1, 4)
        force = np.array([a[0] * a[1], a[2] * a[3]])
        if not coupling:
            force = np.array([a[0] + a[1], a[2] + a[3]]) / 2
        v = 0.8 * x[2:4] + 0.05 * force
        place = x[:2] + v
        got, reward, over = advance(np.float32(x), np.float32(a), jnp.zeros(1))
        np.testing.assert_allclose(got, np.concatenate([place, v, x[4:]]), atol=1e-6)
        assert float(reward) == pytest.approx(
            0.05 * np.exp(-2 * np.hypot(*(place - x[4:]))), rel=1e-5
        )
        assert not over


def test_time_limits_truncate_and_still_bootstrap():
    env = cc.task_env(THRUSTERS, EVEN)
    state, obs = env.reset(jax.random.key(0))

    def step(carry, i):
        state, ts = env.step(carry, jnp.ones(4), jax.random.fold_in(jax.random.key(1), i))
        return state, ts

    _, ts = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(45)))(state)
    np.testing.assert_array_equal(np.flatnonzero(ts.truncated), [39])
    assert not np.asarray(ts.terminated).any()
    np.testing.assert_allclose(ts.final_obs[39, 4:], obs[4:])  # still the old goal
    assert not np.allclose(ts.obs[39, 4:], obs[4:])
    np.testing.assert_allclose(ts.obs[39, :4], 0)


def demos(task, mix, coupling=1.0, share=0.1, key=1):
    made = scripted(task, num_demos=3200, num_streams=16, discount=0.9, noise=0.2, demo_share=share)
    v = cc.Variation(jnp.asarray(mix, jnp.float32), jnp.float32(coupling))
    return made, v, jax.random.key(key)


@pytest.mark.slow
@pytest.mark.parametrize("task", [GATES, THRUSTERS], ids=["gates", "thrusters"])
def test_expert_medium_and_bad_deserve_their_names(task):
    made, v, key = demos(task, (1, 0, 0))
    draw = jax.jit(made.demos)
    pay = [float(draw(v._replace(mix=m), key).reward.mean()) for m in jnp.eye(3)]
    assert pay[0] > pay[1] > pay[2]
    low, high = jax.jit(made.anchors)(v)
    assert low < high
    data = draw(v._replace(mix=jnp.array([0.2, 0.4, 0.4])), key)
    assert data.obs.shape == (3200, 6 if task is THRUSTERS else 4)
    assert float(jnp.abs(data.action).max()) <= 1
    # only a true end stops the bootstrap, the time limit does not
    ended = np.asarray(data.discount == 0)
    assert set(np.unique(data.discount).tolist()) <= {0.0, np.float32(0.9).item()}
    if task is THRUSTERS:
        assert not ended.any()
    else:
        assert np.asarray(jnp.square(data.next_obs[:, :2]).sum(-1) >= 1)[ended].all()
    assert 0.099 < float(data.demo.mean()) < 0.2
    # what may be imitated pays more
    assert float(data.reward[data.demo == 1].mean()) > float(data.reward.mean())


@pytest.mark.slow
def test_coupled_demonstrations_hide_the_good_action_from_each_dimension_alone():
    """At the start of gates neither dimension tells expert from bad, both together do."""
    made, v, key = demos(GATES, (0.5, 0, 0.5))
    data = jax.jit(made.demos)(v, key)
    middle = np.asarray(jnp.linalg.norm(data.obs, axis=-1) < 0.08)
    a = np.sign(np.asarray(data.action))[middle]
    good = a[:, 0] == a[:, 1]
    assert 0.35 < good.mean() < 0.65
    for d in (0, 1):
        assert abs(np.corrcoef(a[:, d], good)[0, 1]) < 0.25


@pytest.mark.slow
def test_the_pendulums_expert_swings_up_and_its_reward_is_scaled():
    made, v, _ = demos(PENDULUM, (1, 0, 0))
    low, high = jax.jit(made.anchors)(v)
    assert float(low) < -2.5
    assert float(high) > -0.8  # 200 steps hanging would cost 0.003 pi^2 each, 5.9
