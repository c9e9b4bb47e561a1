"""Gymnasium's two classics: its formulae, rewards and limits; cut episodes in the loop; memory of a replay; DQN without a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.rl.agent import Transition, random_agent
from qlab.rl.control_study import Budget, control_study
from qlab.rl.dqn import double_dqn, mlp_q, unmasked
from qlab.rl.envs.classic import cartpole_v1, pendulum_v1
from qlab.rl.envs.control import System, two_player
from qlab.rl.envs.env import alone, discrete
from qlab.rl.off_policy import OnlineConfig, off_policy
from qlab.rl.replay import replay_add, replay_bytes, replay_init
from qlab.rl.rollout import episode_scores, film

GAMMA = 0.8


def clock(ends, horizon=4):
    """Pays 1 a step; ends after 4 steps, or is only cut there."""
    system = System(
        lambda key: jnp.zeros(1),
        lambda x, a, o: (x + 1, jnp.float32(1), (x[0] + 1 >= 4) & ends),
        lambda x: jax.nn.one_hot(x[0].astype(int) % 4 * ends, 4),
        (4, 1, 1),
    )
    return discrete(
        alone(two_player(system, max_action=1, max_force=1, horizon=horizon)), [[-1.0], [1.0]]
    )


@pytest.mark.parametrize("n_step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loop_bootstraps_over_a_time_limit_and_not_over_an_end(n_step):
    """Where the clock ends after 4 steps, step k is worth (1 - g^(4 - k)) / (1 - g); where it is only cut and nothing
    shows the time, 1 / (1 - g) = 5."""
    envs = 4
    learner = double_dqn(
        mlp_q(4, (), 2), 2, discount=GAMMA, n_step=n_step, learning_rate=0.05, target_every=20
    )
    agent = unmasked(learner, 2)

    @jax.jit
    @jax.vmap
    def learn(ends):
        env = clock(ends)

        def step(state, action, key):
            return jax.vmap(env.step)(state, action, jax.random.split(key, envs))

        loop = off_policy(step, agent, OnlineConfig(GAMMA, 1, 64, n_step, 400, 40))
        starts = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), envs))
        state = loop.init(jax.random.key(1), *starts, True)
        state = jax.lax.fori_loop(0, 800, lambda i, s: loop.step(s), state)
        return agent.value(state.agent, jnp.eye(4))

    cut, ended = np.asarray(learn(np.array([False, True])))
    np.testing.assert_allclose(cut[0], 1 / (1 - GAMMA), atol=0.05)
    left = 4 - np.arange(4)
    np.testing.assert_allclose(ended, (1 - GAMMA**left) / (1 - GAMMA), atol=0.05)


def test_the_classics_have_gymnasiums_rewards_limits_and_starts():
    env = cartpole_v1()
    assert (env.obs_dim, env.action_dim) == (4, 2)
    zero = random_agent(lambda key, n: jnp.zeros(n, jnp.int32))
    act = lambda key, obs: zero.act((), key, obs)  # noqa: E731
    # pushed to one side it falls within 8 to 10 steps (Gymnasium, any start in +-0.05)
    scores = np.asarray(jax.jit(lambda k: episode_scores(env, act, k, 50, 20))(jax.random.key(0)))
    assert set(scores) <= {8.0, 9.0, 10.0, 11.0}
    env = pendulum_v1()
    still = lambda key, obs: jnp.zeros((len(obs), 1))  # noqa: E731
    state, _ = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    over = []
    for _ in range(200):
        state, ts = step(state, jnp.zeros(1), jax.random.key(1))
        over.append((bool(ts.terminated), bool(ts.truncated)))
    assert over == [(False, False)] * 199 + [(False, True)]
    x = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(2), 4000))[0].x
    assert np.abs(x).max(0) == pytest.approx([np.pi, 1.0], rel=2e-3)
    assert np.abs(x.mean(0)).max() < 0.1
    assert -1500 < float(episode_scores(env, still, jax.random.key(3), 64, 200).mean()) < -900


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_step_for_step_beside_gymnasium(name, rng):
    gymnasium = pytest.importorskip("gymnasium")
    ours = jax.jit({"CartPole-v1": cartpole_v1, "Pendulum-v1": pendulum_v1}[name]().step)
    theirs = gymnasium.make(name)
    from qlab.rl.envs.control import Clocked

    for seed in range(3):
        obs, _ = theirs.reset(seed=seed)
        inner = theirs.unwrapped.state
        state = Clocked(jnp.asarray(inner, jnp.float32), jnp.int32(0))
        over = False
        for _ in range(60):
            if name == "CartPole-v1":
                action, given = (a := int(rng.integers(2))), a
            else:
                action = rng.uniform(-1, 1, 1).astype(np.float32)
                given = 2 * action
            obs, reward, over, *_ = theirs.step(given)
            state, ts = ours(state, jnp.asarray(action), jax.random.key(0))
            np.testing.assert_allclose(ts.final_obs, obs, atol=2e-3)
            np.testing.assert_allclose(ts.reward, reward, atol=2e-2)
            assert bool(ts.terminated) == over
            if over:
                break


def test_scores_are_those_of_one_episode_each_and_a_film_stops_at_its_end():
    env = clock(True, horizon=9)
    act = lambda key, obs: jnp.zeros(len(obs), jnp.int32)  # noqa: E731
    assert episode_scores(env, act, jax.random.key(0), 3, 9).tolist() == [4.0] * 3
    assert episode_scores(env, act, jax.random.key(0), 3, 2).tolist() == [2.0] * 3
    states, shown = film(env, act, jax.random.key(0), 4, 2)
    assert shown.tolist() == [True, True, False, False]
    assert states.x[:2, 0].tolist() == [0.0, 2.0]


def test_an_agent_without_a_mask_is_the_agent_with_all_actions_legal():
    agent = double_dqn(mlp_q(4, (8,), 3), 3, discount=GAMMA)
    plain = unmasked(agent, 3)
    state, x = agent.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 4))
    legal = jnp.ones((6, 3), bool)
    batch = Transition(x, jnp.arange(6) % 3, jnp.ones(6), jnp.full(6, GAMMA), x + 1)
    masked = batch._replace(obs=(x, legal), next_obs=(x + 1, legal))
    a, b = (
        plain.update(state, jax.random.key(2), batch),
        agent.update(state, jax.random.key(2), masked),
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for greedy in (False, True):
        np.testing.assert_array_equal(
            plain.act(state, jax.random.key(3), x, greedy), agent.act(state, jax.random.key(3), (x, legal), greedy)
        )  # fmt: skip


def _study(**changed):
    budget = Budget(num_steps=400, num_envs=2, round_steps=200, horizon=4, eval_episodes=3)
    agent = unmasked(double_dqn(mlp_q(4, (), 2), 2), 2)
    config = OnlineConfig(GAMMA, 1, 16, 1, 100, 20)
    return control_study("clock", clock(False), agent, config, budget._replace(**changed))


def test_a_study_counts_its_steps_and_scores_the_test():
    e = _study()
    assert e.num_steps == 2
    step = jax.jit(e.phases[0].step)
    state = e.init(jax.random.key(0))
    for i in (1, 2):
        state, metrics = step(state)
        assert int(state[0].step) == 100 * i  # of two environments each
        assert float(metrics["clock/return"]) == 4.0
        assert int(state[0].env.count) == 50
        assert np.isfinite(metrics["loss"])
    out = jax.jit(e.evaluate)(state)
    assert out["clock/returns"].tolist() == [4.0] * 3
    with pytest.raises(UserError, match="num_envs=3 must divide round_steps=200"):
        _study(num_envs=3)
    with pytest.raises(UserError, match="num_steps=300"):
        _study(num_steps=300)


def test_a_donated_replay_is_written_in_place():
    """Input and output of a donated step share the buffer, and nothing of its size is made beside it."""
    row = jax.ShapeDtypeStruct((25,), jnp.float32)
    size = 200_000
    ring = jax.eval_shape(functools.partial(replay_init, row, size))
    add = jax.jit(replay_add, donate_argnums=0)
    memory = add.lower(ring, jax.ShapeDtypeStruct((4, 25), jnp.float32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= replay_bytes(row, size) == 100 * size
    assert memory.temp_size_in_bytes < 0.01 * replay_bytes(row, size)


@pytest.mark.slow
def test_the_loop_makes_no_second_replay():
    env, size = cartpole_v1(), 400_000
    agent = unmasked(double_dqn(mlp_q(4, (8,), 2), 2), 2)

    def step(state, action, key):
        return jax.vmap(env.step)(state, action, jax.random.split(key, 2))

    loop = off_policy(step, agent, OnlineConfig(GAMMA, 1, 32, 1, size, 100))

    def start(key):
        return loop.init(key, *jax.vmap(env.reset)(jax.random.split(key, 2)), True)

    state = jax.eval_shape(start, jax.random.key(0))
    run = jax.jit(
        lambda s: jax.lax.fori_loop(0, 10, lambda i, s: loop.step(s), s), donate_argnums=0
    )
    memory = run.lower(state).compile().memory_analysis()
    one = 4 * (4 + 1 + 1 + 1 + 4)  # obs, action, reward, discount, next_obs
    assert memory.alias_size_in_bytes >= one * size
    assert memory.temp_size_in_bytes < 0.02 * one * size
