"""Two players who take turns: whose rows and signs, whose updates, schedules, and games with a known end."""

import functools
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.configs.qarl import get_config
from qlab.experiments import qarl
from qlab.lab.errors import UserError
from qlab.rl import teacher as tt
from qlab.rl import two_player as m
from qlab.rl.agent import Agent
from qlab.rl.envs.control import Physics, System, control, two_player
from qlab.rl.sac import sac

E, H = 4, 6


def pushed(physics=None, fall_at=99):
    """x counts steps; pays mass (default 1) times action minus push."""
    mass = 1.0 if physics is None else physics.mass

    def advance(x, a, o):
        return x + 1, mass * (a[0] - o[0]), x[0] + 1 >= fall_at

    return System(lambda key: jnp.zeros(1), advance, lambda x: x / 10, (1, 1, 1))


def config_of(**kw):
    base = dict(
        iterations=2, best_response=1, num_envs=E, horizon=H, steps_per_update=2, batch_size=8,
        capacity=200, learning_starts=10, discount=0.9, gamma=tt.TeacherConfig(min_pairs=8),
    )  # fmt: skip
    return m.DuelConfig(**{**base, **kw})


class SimpleState(NamedTuple):
    params: Any
    updates: Any


def simple(obs_dim, action_dim, temperature):
    """A linear player who learns next to nothing: what is tested here is who plays and learns when."""

    def init(key):
        params = {"w": jax.random.normal(key, (obs_dim, action_dim)), "log_alpha": jnp.float32(-1)}
        return SimpleState(params, jnp.int32(0))

    def act(state, key, obs, greedy=False):
        noise = 0 if greedy else 0.3 * jax.random.normal(key, (len(obs), action_dim))
        return jnp.tanh(obs @ state.params["w"] + noise)

    def update(state, key, batch):
        w = state.params["w"]
        loss = jnp.square(batch.obs @ w - batch.reward[:, None]).mean()
        params = {**state.params, "w": 0.9 * w}
        new = SimpleState(params, state.updates + 1)
        return new, {"loss": loss, "entropy": loss, "alpha": jnp.exp(params["log_alpha"])}

    return Agent(init, act, update)


def duel_of(config, system=None, agent=simple, evaluate=lambda *a: {}):
    env = two_player(system or pushed(), max_action=1, max_force=1, horizon=config.horizon)
    return m.duel(env, agent, config, evaluate)


@functools.cache
def built(adversary):
    """One duel for several tests, and its iteration compiled."""
    exp = duel_of(config_of(adversary=adversary), pushed(fall_at=4))
    return exp, jax.jit(exp.phases[0].step)


@jax.jit
def schedule(plan, iteration, key, conc):
    return m.schedule(plan, iteration, key, conc, E)


def constant(value):
    return lambda key, x: jnp.full((x.shape[0], 1), value)


def test_play_is_the_return_of_one_episode():
    @jax.jit
    def play(fall_at, gamma):
        env = two_player(pushed(fall_at=fall_at), max_action=1, max_force=0.5, horizon=5)
        players = constant(1.0), constant(-1.0)
        return m.play(env, jax.random.key(0), players, jnp.zeros(3), 9, gamma)

    for fall_at, length in ((99, 5), (3, 3)):
        for gamma in (1.0, 0.5):
            want = 1.5 * sum(gamma**i for i in range(length))
            np.testing.assert_allclose(play(fall_at, gamma), want, rtol=1e-6)


def test_grid_sets_the_physics_of_each_cell():
    masses = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    make = lambda p: two_player(pushed(p), max_action=1, max_force=1, horizon=5)  # noqa: E731
    got = m.robustness_grid(
        jax.random.key(0), constant(0.5), make, Physics(masses, jnp.zeros((2, 2))), 3, 5
    )
    np.testing.assert_allclose(got, 2.5 * masses, rtol=1e-6)


@pytest.mark.parametrize("adversary", ["sac_adaptive", "none"])
def test_each_learns_in_its_own_turns_from_its_own_rows(adversary):
    exp, step = built(adversary)
    first = exp.init(jax.random.key(0))
    state, metrics = step(first)
    turns = {"sac_adaptive": 1, "none": 2}[adversary]
    rows = E * H
    players = [(state.protagonist, first.protagonist, 1.0, turns)]
    if adversary != "none":
        players.append((state.adversary, first.adversary, -1.0, 1))
    for after, before, sign, n in players:
        data, size = after.replay.data, int(after.replay.size)
        assert size == n * rows
        # Updates wait for 10 rows, that is 3 of the vector steps.
        assert int(after.state.updates) == (n * H - 2) * E // 2
        age = np.rint(np.asarray(data.obs[:size, 0]) * 10)
        np.testing.assert_allclose(data.next_obs[:size, 0] * 10, age + 1, atol=1e-5)
        np.testing.assert_allclose(data.discount[:size], np.where(age == 3, 0.0, 0.9), atol=1e-6)
        # What the own action did not pay, the opponent's did: |r - sign * own| <= 1 only with the right sign.
        other = sign * data.reward[:size] - sign * data.action[:size, 0]
        assert np.abs(other).max() <= 1 + 1e-5
        shrunk = 0.9 ** int(after.state.updates) * before.state.params["w"]
        np.testing.assert_allclose(after.state.params["w"], shrunk, rtol=1e-5)
        want = data.temperature[:size]
        np.testing.assert_allclose(data.obs[:size, 1], want, rtol=1e-5)
        np.testing.assert_allclose(data.next_obs[:size, 1], want, rtol=1e-5)
        # One temperature an environment and iteration, the same in both turns.
        assert len(np.unique(data.temperature[:size])) == (1 if adversary == "none" else E)
    if adversary != "none":
        assert set(np.unique(state.adversary.replay.data.temperature[:rows])) == set(
            np.unique(state.protagonist.replay.data.temperature[:rows])
        )
        assert int(state.teacher.branch) != tt.WAITED  # 2 E = 8 pairs are enough
    fresh = [jax.tree.leaves(s.fresh.replay) for s in (state, first)]
    assert all(np.array_equal(a, b) for a, b in zip(*fresh, strict=True))
    assert np.isfinite(metrics["loss"])


def test_best_response_trains_only_the_fresh_adversary_against_a_greedy_protagonist():
    exp, _ = built("sac_adaptive")
    first = exp.init(jax.random.key(0))
    state, _ = jax.jit(exp.phases[1].step)(first)
    for name in ("protagonist", "adversary", "teacher"):
        pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, first)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    data = state.fresh.replay.data
    greedy = simple(2, 1, "learned").act(
        first.protagonist.state, jax.random.key(0), data.obs[: E * H], greedy=True
    )
    np.testing.assert_allclose(
        data.reward[: E * H], data.action[: E * H, 0] - greedy[:, 0], atol=1e-5
    )
    np.testing.assert_array_equal(data.obs[: E * H, 1], 0)


@pytest.mark.parametrize(
    ("teacher", "adversary", "temps", "force"),
    [
        ("linear", "sac_adaptive", (0.05, 0.0255, 0.001), (1, 1, 1)),
        ("step", "sac_adaptive", (0.05, 0.001, 0.001), (1, 1, 1)),
        ("none", "constant_temp", (0.05, 0.05, 0.05), (1, 1, 1)),
        ("none", "sac", (-1, -1, -1), (1, 1, 1)),
        ("gamma", "sac", (-1, -1, -1), (1, 1, 1)),
        ("force", "sac", (-1, -1, -1), (0.1, 0.55, 1)),
    ],
)
def test_schedules(teacher, adversary, temps, force):
    config = config_of(teacher=teacher, adversary=adversary, iterations=3)
    plan = m.make_plan(config)
    shown = teacher in ("linear", "step")
    for i in range(3):
        got, seen, share = schedule(plan, jnp.int32(i), jax.random.key(0), jnp.float32(50))
        np.testing.assert_allclose(got, np.full(E, temps[i]), rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(seen, got * shown)
        np.testing.assert_allclose(share, force[i], rtol=1e-5)
    hidden = m.make_plan(config._replace(visible=False))
    assert not schedule(hidden, jnp.int32(0), jax.random.key(0), jnp.float32(50))[1].any()


def test_the_gamma_teachers_temperatures_are_drawn_around_its_mean_and_shown():
    plan = m.make_plan(config_of())
    got, seen, share = schedule(plan, jnp.int32(1), jax.random.key(0), jnp.float32(50))
    np.testing.assert_array_equal(got, seen)
    assert len(np.unique(got)) == E
    assert 0.03 < got.mean() < 0.07  # 0.05, standard deviation 0.007 / 2
    assert share == 1


@pytest.mark.slow
def test_the_adversary_of_a_one_step_game_learns_to_push_against():
    """It is paid push - action: the best response is push = +1, a cooperative one -1; the protagonist's is +1."""
    agent = partial(sac, hidden=(16,), lr_actor=1e-2, lr_critic=1e-2, init_temperature=0.01)
    agent = lambda o, a, t, make=agent: make(o, a, temperature=t)  # noqa: E731
    config = config_of(horizon=1, num_envs=16, steps_per_update=8, batch_size=64, capacity=4000,
                       learning_starts=64, adversary="sac")  # fmt: skip
    exp = duel_of(config, agent=agent)

    def run(state, phase, n):
        return jax.jit(
            lambda s: jax.lax.fori_loop(0, n, lambda i, s: exp.phases[phase].step(s)[0], s)
        )(state)

    state = run(exp.init(jax.random.key(1)), 0, 150)
    state = run(state, 1, 150)
    shown = jnp.zeros((1, 2))
    for player in (state.protagonist, state.adversary, state.fresh):
        act = sac(2, 1, hidden=(16,)).act(player.state, jax.random.key(0), shown, greedy=True)
        assert float(act[0, 0]) > 0.8


def test_a_networks_nan_reaches_the_loss_that_the_runner_watches():
    exp, step = built("sac_adaptive")
    for name in ("protagonist", "adversary"):
        state = exp.init(jax.random.key(0))
        player = getattr(state, name)
        broken = jax.tree.map(lambda x: x * jnp.nan, player.state.params)
        bad = player._replace(state=player.state._replace(params=broken))
        _, metrics = step(state._replace(**{name: bad}))
        assert not np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"adversary": "sacc"}, "adversary_algo='sacc'"),
        ({"teacher": "gama"}, "did you mean gamma"),
        ({"steps_per_update": 3}, "steps_per_update=3 does not divide"),
        ({"capacity": 3}, "replay_size=3"),
        ({"capacity": 10**12}, "lower replay_size"),
    ],
)
def test_bad_settings_are_one_line(change, word):
    with pytest.raises(UserError, match=word) as e:
        duel_of(config_of(**change))
    assert "\n" not in str(e.value)


def smoke(**kw):
    c = get_config("smoke")
    c.update(c.arms.get(kw.pop("arm", "qarl"), {}))
    c.update(kw)
    return c


def test_walkers_name_what_is_missing():
    with pytest.raises(UserError, match=r"qlab\[brax\]|not in this lab"):
        qarl.build(smoke(env="brax/walker2d"))
    with pytest.raises(UserError, match="did you mean pendulum"):
        qarl.build(smoke(env="pendulm"))


@pytest.mark.parametrize("name", ["pendulum", "point_mass"])
def test_other_environments_keep_the_contract(name):
    env = control(name, max_force=1.0, horizon=3)
    state, obs = env.reset(jax.random.key(0))
    assert obs.shape == (env.obs_dim,)
    _, ts = jax.jit(env.step)(
        state, jnp.zeros(env.action_dim), jnp.zeros(env.adversary_dim), jax.random.key(1)
    )
    assert ts.obs.shape == ts.final_obs.shape == obs.shape
    assert not ts.terminated
    assert not ts.truncated


@pytest.mark.slow
def test_sac_alone_reaches_the_published_level_on_pendulum():
    """About -150 an episode is what published SACs reach; a random policy gets about -1200."""
    c = get_config()
    c.update(env="pendulum", horizon=200, eval_horizon=200, iterations=12, adversary_algo="none")
    c.update(adv_max_force=1.0, best_response_steps=0, eval_episodes=32)
    exp = qarl.build(SimpleNamespace(**c))
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 12, lambda i, s: exp.phases[0].step(s)[0], s))
    result = jax.jit(exp.evaluate)(run(exp.init(jax.random.key(0))))
    assert float(result["none/return"]) > -190
