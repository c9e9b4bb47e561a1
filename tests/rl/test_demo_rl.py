"""Learning from demonstrations and own experience: what a minibatch holds, what is shared, what is scored."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.rl.agent import Agent, Transition
from qlab.rl.demo_rl import Schedule, demo_rl
from qlab.rl.demo_tasks import DemoGroup, DemoTask
from qlab.rl.envs.brax_env import brax_env
from qlab.rl.envs.env import Env, TimeStep
from qlab.rl.off_policy import OnlineConfig, off_policy
from qlab.rl.rollout import first_episode

GAMMA, HORIZON, NUM_DEMOS = 0.5, 3, 6


def line(fall_at=99):
    """x counts the steps; pays the action; ends at fall_at, runs out of time after HORIZON steps."""

    def reset(key):
        return jnp.zeros(1), jnp.zeros(1)

    def step(x, action, key):
        after = x + 1
        terminated = after[0] >= fall_at
        truncated = (after[0] >= HORIZON) & ~terminated
        new = jnp.where(terminated | truncated, 0.0, after)
        return new, TimeStep(new, action[0], terminated, truncated, after)

    return Env(reset, step, 1, 1)


def demos_of(v, key):
    """Demonstrations that no environment makes: observations -1, actions 100 + the variation."""
    ones = jnp.ones(NUM_DEMOS)
    noise = jax.random.uniform(key, (NUM_DEMOS,))
    return Transition(
        -ones[:, None], (100 + v + 0 * noise)[:, None], noise, GAMMA * ones, -ones[:, None], ones
    )


TASK = DemoTask(lambda v: line(), HORIZON, demos_of, lambda v: (jnp.float32(0), HORIZON * (1 + v)))


def recorder(batch_size, act_by=lambda state, obs: 0 * obs):
    """An agent that only remembers its last minibatch and counts its updates."""
    n = batch_size
    like = Transition(
        obs=jnp.zeros((n, 1)),
        action=jnp.zeros((n, 1)),
        reward=jnp.zeros(n),
        discount=jnp.zeros(n),
        next_obs=jnp.zeros((n, 1)),
        demo=jnp.zeros(n),
    )

    def init(key):
        return jnp.float32(0), like

    def act(state, key, obs, greedy=False):
        return act_by(state, obs)

    def update(state, key, batch):
        return (state[0] + 1, batch), {"loss": jnp.float32(0)}

    return Agent(init, act, update, lambda state, obs: 7.0 + 0 * obs[:, 0])


def state_after(steps, demo_rows, batch_size=8, env=None):
    config = OnlineConfig(GAMMA, 1, batch_size, 1, 100, 0, demo_rows)
    env = env or line()
    step = lambda s, a, k: jax.vmap(env.step)(s, a, jax.random.split(k, 2))  # noqa: E731
    loop = off_policy(step, recorder(batch_size), config)
    start, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2))
    demos = demos_of(0.0, jax.random.key(1)) if demo_rows else None
    state = loop.init(jax.random.key(2), start, obs, True, demos)
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: (loop.step(s), None), s, None, steps)[0])(
        state
    )


@pytest.mark.parametrize("demo_rows", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_minibatch_holds_exactly_its_share_of_demonstrations(demo_rows):
    batch = state_after(5, demo_rows).agent[1]
    from_demos = np.asarray(batch.obs[:, 0] == -1)
    np.testing.assert_array_equal(from_demos, np.arange(8) < demo_rows)
    np.testing.assert_array_equal(batch.demo, from_demos)  # own experience is never imitated
    assert len(set(np.asarray(batch.reward)[from_demos].tolist())) > 1  # drawn, not the first


def test_own_rows_keep_bootstrapping_at_the_time_limit_and_stop_at_an_end():
    for fall_at, last in ((99, GAMMA), (2, 0.0)):
        batch = state_after(30, 1, 64, line(fall_at)).agent[1]
        obs, following = np.asarray(batch.obs)[1:, 0], np.asarray(batch.next_obs)[1:, 0]
        np.testing.assert_array_equal(following, obs + 1)  # never the start of the next episode
        end = following == min(fall_at, HORIZON)
        assert end.any()
        np.testing.assert_allclose(np.asarray(batch.discount)[1:], np.where(end, last, GAMMA))


def test_shares_that_do_not_fit_are_refused():
    env, step = line(), lambda s, a, k: (s, None)
    for rows, n_step in ((9, 1), (-1, 1), (2, 3)):
        with pytest.raises(UserError, match="demo_rows"):
            off_policy(step, recorder(8), OnlineConfig(GAMMA, 1, 8, n_step, 100, 0, rows))
    start, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2))
    for rows, demos in ((2, None), (0, demos_of(0.0, jax.random.key(1)))):
        loop = off_policy(step, recorder(8), OnlineConfig(GAMMA, 1, 8, 1, 100, 0, rows))
        with pytest.raises(UserError, match="demonstrations"):
            loop.init(jax.random.key(2), start, obs, True, demos)
    with pytest.raises(UserError, match="env_steps=10"):
        _ = Schedule(10, 4, 5, 1).vector_steps


def experiment(names, agent, points=10):
    variation = np.array([{"a": 0.0, "b": 1.0}[n] for n in names], np.float32)
    group = DemoGroup(names, TASK, agent, variation)
    schedule = Schedule(env_steps=4 * points, num_envs=2, points=points, eval_episodes=4)
    return demo_rl([group], OnlineConfig(GAMMA, 1, 8, 1, 100, 0, 4), schedule)


def run(exp, seed=0):
    def one(s, _):
        return exp.phases[0].step(s)

    state = exp.init(jax.random.key(seed))
    state, curve = jax.jit(lambda s: jax.lax.scan(one, s, None, exp.num_steps))(state)
    return state, {k: np.asarray(v) for k, v in (curve | exp.evaluate(state)).items()}


def test_scores_lie_between_the_anchors_and_the_final_one_is_the_mean_of_the_last_fifth():
    """The agent's action is a hundredth of its number of updates, two in each step."""
    agent = recorder(8, lambda state, obs: state[0] / 100 + 0 * obs)
    exp = experiment(("a", "b"), agent)
    assert exp.num_steps == 10
    state, out = run(exp)
    updates = 2.0 * np.arange(1, 11)
    assert float(state.groups[0].online.agent[0][0]) == updates[-1]
    np.testing.assert_allclose(out["a/score"], updates[-2:].mean(), rtol=1e-5)
    np.testing.assert_allclose(out["a/auc_score"], updates.mean(), rtol=1e-5)
    np.testing.assert_allclose(out["b/score"], updates[-2:].mean() / 2, rtol=1e-5)
    # V = 7 against the discounted return a (1 + 1/2 + 1/4)
    np.testing.assert_allclose(out["a/value_bias"], 7 - 1.75 * updates[-2:].mean() / 100, rtol=1e-5)


def test_arms_and_subsets_of_the_tasks_share_demonstrations_and_seeds_do_not():
    def drawn(names, agent, seed) -> Any:
        return experiment(names, agent).init(jax.random.key(seed)).groups[0].online.demos

    rival = recorder(8, lambda state, obs: obs)
    both, alone = drawn(("a", "b"), recorder(8), 3), drawn(("b",), rival, 3)
    for x, y in zip(*map(jax.tree.leaves, (both, alone)), strict=True):
        np.testing.assert_array_equal(x[1:], y)
    assert not np.array_equal(both.reward[0], both.reward[1])
    assert not np.array_equal(drawn(("b",), rival, 4).reward, alone.reward)


def test_first_episode_stops_at_its_end():
    def act(memory, key, obs, first):
        return memory, obs + 1

    for fall_at, rewards in ((99, [1, 2, 3]), (2, [1, 2])):
        total, discounted, first = first_episode(
            line(fall_at), act, (), jax.random.key(0), 7, GAMMA
        )
        assert float(total) == sum(rewards)
        assert float(discounted) == sum(r * GAMMA**i for i, r in enumerate(rewards))
        assert float(first[0]) == 0.0


def test_brax_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    with pytest.raises(UserError, match="brax:ant needs brax: pip install") as e:
        brax_env("ant")
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_brax_restarts_and_truncates():
    pytest.importorskip("brax")
    with pytest.raises(UserError, match="did you mean halfcheetah"):
        brax_env("half_cheetah")
    env, _ = brax_env("inverted_pendulum", horizon=5)
    step = jax.jit(env.step)
    state, obs = jax.jit(env.reset)(jax.random.key(0))
    assert obs.shape == (env.obs_dim,) == (4,)
    for i in range(5):
        state, ts = step(state, jnp.zeros(env.action_dim), jax.random.key(i))
    assert bool(ts.truncated)
    assert not bool(ts.terminated)
    assert int(state.age) == 0
    assert not np.allclose(ts.obs, ts.final_obs)
    # the pole falls when pushed: an end of the process, not of time
    env, _ = brax_env("inverted_pendulum")
    state, _ = env.reset(jax.random.key(0))

    def push(carry, i):
        state, ts = env.step(carry, jnp.ones(1), jax.random.key(i))
        return state, (ts.terminated, ts.truncated)

    _, (terminated, truncated) = jax.jit(lambda s: jax.lax.scan(push, s, jnp.arange(60)))(state)
    assert np.asarray(terminated).any()
    assert not np.asarray(truncated).any()
