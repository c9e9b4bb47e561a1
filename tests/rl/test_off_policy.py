"""Windows against plain Python, and the loop on a process whose optimum is known and on the cart-pole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.rl.agent import Transition
from qlab.rl.dqn import double_dqn, mlp_q
from qlab.rl.envs.control import control
from qlab.rl.envs.env import TimeStep, alone
from qlab.rl.off_policy import OnlineConfig, OnlineTask, off_policy, online_rl
from qlab.rl.windows import window_ready, window_sample, windows_add, windows_init

GAMMA = 0.9


@pytest.mark.parametrize("n_step", [1, 2, 4])
@pytest.mark.parametrize("written", [5, 11])  # less than, and more than, the ring of 7 holds
def test_windows_end_with_their_episode(n_step, written, rng):
    envs, steps = 3, 7
    over = rng.random((written, envs)) < 0.3
    term = over & (rng.random((written, envs)) < 0.5)
    reward = rng.normal(size=(written, envs)).astype(np.float32)
    ids = np.arange(written * envs, dtype=np.float32).reshape(written, envs)
    row = lambda t: Transition(  # noqa: E731
        jnp.asarray(ids[t]), jnp.asarray(ids[t], jnp.int32), jnp.asarray(reward[t]),
        jnp.asarray(GAMMA * ~term[t], jnp.float32), jnp.asarray(ids[t] + 0.5),
    )  # fmt: skip
    replay = windows_init(row(0), steps * envs + 2)
    for t in range(written):
        assert bool(window_ready(replay, 3, n_step)) == (min(t, steps) >= max(n_step, 1) and t >= 1)
        replay = windows_add(replay, row(t), jnp.asarray(over[t]))
    batch = jax.tree.map(np.asarray, window_sample(replay, jax.random.key(0), 4000, n_step))
    oldest = max(0, written - steps)
    expected_starts = {ids[t, e] for t in range(oldest, written - n_step + 1) for e in range(envs)}
    assert set(batch.obs) == expected_starts  # all, and nothing that is not yet followed
    counts = np.bincount(batch.obs.astype(int))
    counts = counts[counts > 0]
    assert counts.min() > 0.6 * counts.mean()
    for i in range(200):
        t, e = divmod(int(batch.obs[i]), envs)
        want, prod = [0.0] * n_step, 1.0
        for k in range(n_step):
            want[k] = reward[t + k, e]
            prod *= GAMMA * (not term[t + k, e])
            last = t + k
            if over[t + k, e]:
                break
        np.testing.assert_allclose(batch.reward[i], want[0] if n_step == 1 else want, rtol=1e-6)
        np.testing.assert_allclose(batch.discount[i], prod, rtol=1e-6)
        assert batch.next_obs[i] == ids[last, e] + 0.5
        assert batch.action[i] == ids[t, e]


def chain(num_envs, length=5):
    """Right (1) moves towards the end, which pays 1; left (0) goes back to the start. Left at the start is illegal."""

    def observe(s):
        return jax.nn.one_hot(s, length), jnp.stack([s > 0, jnp.full_like(s, True, bool)], -1)

    def reset(key):
        s = jnp.zeros(num_envs, jnp.int32)
        return (s, jnp.int32(0)), observe(s)

    def step(state, action, key):
        s, ended = state
        after = jnp.where(action == 1, s + 1, 0)
        done = after == length
        reward = done.astype(jnp.float32)
        now = jnp.where(done, 0, after)
        final = observe(jnp.minimum(after, length - 1))
        state = now, ended + done.sum(dtype=jnp.int32)
        return state, TimeStep(observe(now), reward, done, jnp.zeros_like(done), final)

    return reset, step


@pytest.mark.parametrize("n_step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loop_learns_a_chain(n_step):
    reset, step = chain(4)
    agent = double_dqn(
        mlp_q(5, (), 2), 2, discount=GAMMA, n_step=n_step, learning_rate=0.02, target_every=20,
        epsilon_decay=1.0,  # uniform throughout: values are those of the best policy all the same
    )  # fmt: skip
    config = OnlineConfig(GAMMA, 2, 64, n_step, 2000, 100)
    loop = off_policy(step, agent, config)
    task = OnlineTask(
        loop,
        reset,
        busy=lambda env, upto: env[1] < upto,
        metrics=lambda env, first, count: {"ended": env[1].astype(jnp.float32)},
        results=lambda env: {"ended": env[1]},
    )
    experiment = online_rl({"chain": task}, 60, 20)
    state = experiment.init(jax.random.key(0))
    advance = jax.jit(experiment.phases[0].step)
    for i in range(3):
        state, metrics = advance(state)
        assert int(metrics["chain/ended"]) >= 20 * (i + 1)
    assert set(metrics) == {"chain/ended", "chain/q", "chain/epsilon", "loss"}
    assert experiment.evaluate(state)["chain/ended"] >= 60
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 1000, lambda i, s: loop.step(s), s))
    final = run(state["chain"][0])
    obs = jnp.eye(5), jnp.ones((5, 2), bool).at[0, 0].set(False)
    q = agent.q_value(final.agent, obs, jnp.ones(5, jnp.int32))
    # longer windows are off-policy: their values are those of the uniform policy's first steps
    if n_step == 1:
        np.testing.assert_allclose(q, GAMMA ** np.arange(4.0, -1, -1), atol=0.05)
    assert (agent.act(final.agent, jax.random.key(0), obs, greedy=True) == 1).all()


def test_an_agent_that_does_not_learn_keeps_its_net():
    reset, step = chain(4)
    agent = double_dqn(mlp_q(5, (), 2), 2)
    loop = off_policy(step, agent, OnlineConfig(GAMMA, 2, 8, 1, 100, 8))
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 5, lambda i, s: loop.step(s), s))
    for learns in (False, True):
        state = loop.init(jax.random.key(0), *reset(None), learns)
        new = run(state)
        assert int(new.replay.size) == 5
        assert int(new.agent.updates) == (2 * 4 if learns else 0)  # from the second step on
        if not learns:
            jax.tree.map(np.testing.assert_array_equal, new.agent, state.agent)


def test_bad_input():
    reset, step = chain(4)
    agent = double_dqn(mlp_q(5, (), 2), 2)
    loop = off_policy(step, agent, OnlineConfig(GAMMA, 1, 8, 1, 50, 100))
    with pytest.raises(UserError, match="replay_size=50"):
        loop.init(jax.random.key(0), *reset(None), True)
    with pytest.raises(UserError, match="does not divide"):
        online_rl({}, 10, 3)
    with pytest.raises(UserError, match="replay_size=2"):
        windows_init(Transition(jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.ones(3)), 2)


@pytest.mark.slow
def test_cartpole_stands():
    """Two forces of full strength; 200 steps an episode, random policies fall after about 20."""
    envs = 8
    env = alone(control("cartpole", max_force=0.1, horizon=200))

    def reset(key):
        state, obs = jax.vmap(env.reset)(jax.random.split(key, envs))
        return state, (obs, jnp.ones((envs, 2), bool))

    def step(state, action, key):
        push = (2.0 * action - 1.0)[:, None]
        state, ts = jax.vmap(env.step)(state, push, jax.random.split(key, envs))
        wrap = lambda x: (x, jnp.ones((envs, 2), bool))  # noqa: E731
        return state, ts._replace(obs=wrap(ts.obs), final_obs=wrap(ts.final_obs))

    agent = double_dqn(
        mlp_q(env.obs_dim, (64, 64), 2), 2, discount=0.99, learning_rate=1e-3, target_every=200, epsilon_decay=0.9995,
    )  # fmt: skip
    loop = off_policy(step, agent, OnlineConfig(0.99, 4, 128, 1, 20_000, 500))
    state = loop.init(jax.random.key(0), *reset(jax.random.key(1)), True)
    state = jax.jit(lambda s: jax.lax.fori_loop(0, 4000, lambda i, s: loop.step(s), s))(state)

    def greedy(carry, key):
        env_state, obs, alive, steps = carry
        action = agent.act(state.agent, key, obs, greedy=True)
        env_state, ts = step(env_state, action, key)
        steps += alive
        return (env_state, ts.obs, alive & ~ts.terminated, steps), None

    start = (*reset(jax.random.key(7)), jnp.ones(envs, bool), jnp.zeros(envs))
    (_, _, _, steps), _ = jax.jit(
        lambda c: jax.lax.scan(greedy, c, jax.random.split(jax.random.key(8), 200))
    )(start)
    assert steps.mean() > 150
