"""Exact solutions against brute force, the environment against its table, agents against both."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl.agent import Transition
from qlab.rl.c2f import action_grid, all_bins, decode_c2f
from qlab.rl.envs import coupled
from qlab.rl.envs import tabular as m
from qlab.rl.joint_q import joint_q
from qlab.rl.rollout import collect, episode_returns


def random_mdp(states=3, actions=4, seed=0):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states + 1) / 2, size=(states, actions))
    reward = rng.normal(size=transition.shape)
    return m.tabular_mdp(transition, reward, rng.dirichlet(np.ones(states)))


def test_hard_optimum_is_the_best_of_all_deterministic_policies():
    mdp = random_mdp()
    best = np.full(3, -np.inf)
    for choice in itertools.product(range(4), repeat=3):
        best = np.maximum(best, m.policy_value(mdp, np.eye(4)[list(choice)], 0.9))
    solution = m.solve(mdp, 0.9)
    np.testing.assert_allclose(solution.v, best, atol=1e-5)
    np.testing.assert_allclose(
        m.policy_value(mdp, np.float64(solution.policy), 0.9), best, atol=1e-5
    )


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_soft_optimum_is_the_best_return_plus_entropy(alpha):
    """Soft V is the value of its policy with -alpha log pi added to the reward, and no policy beats it."""
    mdp = random_mdp()
    s = m.solve(mdp, 0.9, alpha)

    def with_entropy(policy):
        bonus = np.where(policy > 0, -alpha * np.log(np.maximum(policy, 1e-300)), 0)
        reward = mdp.reward + bonus[..., None]
        return m.policy_value(mdp._replace(reward=reward), policy, 0.9)

    np.testing.assert_allclose(with_entropy(np.float64(s.policy)), s.v, atol=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(50):
        mixed = 0.7 * s.policy + 0.3 * rng.dirichlet(np.ones(4), size=3)
        assert (with_entropy(mixed) <= s.v + 1e-6).all()
    np.testing.assert_allclose(s.policy.sum(-1), 1, atol=1e-6)


def test_policy_value_matches_rollouts_of_the_environment():
    task = coupled.chain(slip=0.3)
    env = m.tabular_env(task.mdp, 2, 3, horizon=200)

    def policy(memory, key, obs, first):
        return memory, jax.random.uniform(key, (2,), minval=-1, maxval=1)

    data, ends = jax.jit(lambda k: collect(env, policy, 0, k, 20000, 0.9))(jax.random.key(0))
    first = np.concatenate([[True], np.asarray(ends)[:-1]])
    returns = np.asarray(episode_returns(data.reward, ends, 0.9))[first][:-1]
    want = task.mdp.start @ m.policy_value(task.mdp, np.full((5, 9), 1 / 9), 0.9)
    error = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - want) < 4 * error
    assert error < 0.02


def test_environment_keeps_the_contract_at_both_kinds_of_end():
    task = coupled.chain()
    env = m.tabular_env(task.mdp, 2, 3, horizon=3)
    same, off = jnp.asarray([0.9, 0.9]), jnp.asarray([0.9, 0.0])
    state = m.TabularState(jnp.int32(4), jnp.int32(0))
    state, ts = env.step(state, same, jax.random.key(0))
    assert bool(ts.terminated)
    assert not bool(ts.truncated)
    assert float(ts.reward) == 1.0
    np.testing.assert_array_equal(ts.final_obs, np.zeros(5))
    np.testing.assert_array_equal(ts.obs, np.eye(5)[int(state.state)])
    assert int(state.age) == 0

    state = m.TabularState(jnp.int32(2), jnp.int32(2))
    state, ts = env.step(state, off, jax.random.key(0))
    assert bool(ts.truncated)
    assert not bool(ts.terminated)
    np.testing.assert_array_equal(ts.final_obs, np.eye(5)[2])

    state = m.TabularState(jnp.int32(2), jnp.int32(0))
    state, ts = env.step(state, same, jax.random.key(0))
    assert not bool(ts.truncated)
    np.testing.assert_array_equal(ts.obs, np.eye(5)[3])
    assert int(state.age) == 1


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 2, 3), (2, 1, 6), (2, 2, 2)])
def test_refined_process_does_what_the_decoded_action_does(shape):
    grid, mdp = action_grid(*shape), coupled.chain().mdp
    fine = m.refine(mdp, 3, grid)
    index = m.joint_index(decode_c2f(jnp.asarray(all_bins(grid)), grid.num_bins), 3)
    np.testing.assert_array_equal(fine.reward, mdp.reward[:, np.asarray(index)])
    np.testing.assert_array_equal(fine.transition, mdp.transition[:, np.asarray(index)])


def test_random_numbers_choose_by_the_given_shares():
    probs = jnp.asarray([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    u = (np.arange(10000) + 0.5) / 10000
    picks = np.asarray(jax.vmap(lambda x: m.choose(x, probs))(jnp.asarray(u, jnp.float32)))
    np.testing.assert_allclose(np.bincount(picks, minlength=6) / 10000, probs, atol=2e-4)


def test_malformed_processes_are_refused():
    good = random_mdp()
    with pytest.raises(ValueError, match="sum to 1"):
        m.tabular_mdp(good.transition * 0.9, good.reward, good.start)
    with pytest.raises(ValueError, match="expected"):
        m.tabular_mdp(good.transition[:2], good.reward, good.start)
    with pytest.raises(ValueError, match="num_bins=3"):
        m.tabular_env(good, 2, 3, 5)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_joint_critic_ends_at_the_exact_optimum(alpha):
    task = coupled.chain()
    s, k = (x.ravel() for x in np.mgrid[:5, :9])
    after = task.mdp.transition[s, k].argmax(-1)
    batch = Transition(
        jnp.asarray(np.eye(5)[s], jnp.float32),
        jnp.asarray(np.stack([k // 3, k % 3], -1) * 2 / 3 - 2 / 3, jnp.float32),
        jnp.asarray(task.mdp.reward[s, k, after]),
        jnp.asarray(0.9 * (after < 5), jnp.float32),
        jnp.asarray(np.eye(6)[after][:, :5], jnp.float32),
    )
    agent = joint_q(
        5, 2, num_bins=3, alpha=alpha, hidden=(), learning_rate=0.02, weight_decay=0.0, tau=0.1
    )

    def step(state, _):
        return agent.update(state, jax.random.key(0), batch)[0], None

    state = jax.jit(lambda x: jax.lax.scan(step, x, None, 2000)[0])(agent.init(jax.random.key(0)))
    want = m.solve(task.mdp, 0.9, alpha)
    q = agent.q_value(state, batch.obs, batch.action).reshape(5, 9)
    np.testing.assert_allclose(q, want.q, atol=2e-3)
    np.testing.assert_allclose(agent.value(state, jnp.eye(5)), want.v, atol=2e-3)
    greedy = m.joint_index(agent.act(state, jax.random.key(0), jnp.eye(5), greedy=True), 3)
    assert (
        np.take_along_axis(want.q, np.asarray(greedy)[:, None], 1)[:, 0] > want.q.max(-1) - 5e-3
    ).all()


def test_joint_critic_indexes_every_action_of_a_finer_grid():
    agent = joint_q(2, 2, num_levels=2, num_bins=2, alpha=0.0, hidden=())
    state = agent.init(jax.random.key(0))
    state = state._replace(params={**state.params, "b": jnp.arange(16.0)})
    actions = decode_c2f(jnp.asarray(all_bins(action_grid(2, 1, 4))), 4)
    q = agent.q_value(state, jnp.ones((16, 2)), actions)
    np.testing.assert_array_equal(q, np.arange(16.0))
    best = agent.act(state, jax.random.key(0), jnp.ones((1, 2)), greedy=True)
    np.testing.assert_allclose(best, actions[-1:])


def test_too_many_joint_actions_are_refused():
    with pytest.raises(ValueError, match="15625 joint actions"):
        joint_q(3, 6, num_bins=5)
