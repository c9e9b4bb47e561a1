"""The exact tasks: are they what their docstring says, and do they separate the arms for that reason?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl.envs import coupled as m
from qlab.rl.envs.tabular import policy_value, solve


def additive_fit(q, weight):
    """The best c + f(b1) + g(b2) to q f[B, B] in weighted least squares."""
    b = len(q)
    i, j = np.mgrid[:b, :b]
    x = np.concatenate([np.eye(b)[i.ravel()], np.eye(b)[j.ravel()]], 1)
    w = np.sqrt(weight.ravel())
    fit = np.linalg.lstsq(x * w[:, None], q.ravel() * w, rcond=None)[0]
    return (x @ fit).reshape(b, b)


def marginal_means(q, weight):
    """Per-dimension values under the log's joint shares, f[B] each."""
    return (q * weight).sum(1) / weight.sum(1), (q * weight).sum(0) / weight.sum(0)


def logged_shares(task, mix, noise=0.1):
    return np.einsum("c,csk->sk", mix, m.behaviour(task, noise))


def test_bandit_pays_the_three_modes_and_its_marginals_mislead():
    task = m.bandit()
    table = task.mdp.reward[0, :, 1].reshape(5, 5)
    np.testing.assert_allclose(sorted(table[table != 0]), [-1.0, 0.1, 1.0], rtol=1e-6)
    best = np.unravel_index(table.argmax(), table.shape)
    weight = logged_shares(task, (0.2, 0.4, 0.4))[0].reshape(5, 5)
    first, second = marginal_means(table, weight)
    picked = (first.argmax(), second.argmax())
    assert picked != best
    np.testing.assert_allclose(table[picked], 0.1)


def test_coupled_chain_is_beyond_sums_of_dimensions():
    task = m.chain()
    best = solve(task.mdp, 0.9)
    np.testing.assert_allclose(best.v, 0.9 ** np.arange(4, -1, -1), atol=1e-6)
    np.testing.assert_array_equal(best.policy[:, [0, 8]], 0.5)
    weight = logged_shares(task, (0.2, 0.4, 0.4))
    for s in range(5):
        q, w = best.q[s].reshape(3, 3), weight[s].reshape(3, 3)
        assert np.unravel_index(q.argmax(), (3, 3)) in ((0, 0), (2, 2))
        # Even with the optimal values given, a sum over dimensions prefers both thrusters off.
        assert np.unravel_index(additive_fit(q, w).argmax(), (3, 3)) == (1, 1)
        assert [int(x.argmax()) for x in marginal_means(q, w)] == [1, 1]
    drift = np.zeros((5, 9))
    drift[:, 4] = 1
    value = policy_value(task.mdp, drift, 0.9)
    want = [0.9 ** (4 - s) - 0.1 * sum(0.9**i for i in range(5 - s)) for s in range(5)]
    np.testing.assert_allclose(value, want, atol=1e-6)


def test_optimal_q_of_the_separable_task_is_a_sum():
    task = m.separable()
    q = solve(task.mdp, 0.9).q
    for s in range(5):
        table = q[s].reshape(3, 3)
        np.testing.assert_allclose(additive_fit(table, np.ones((3, 3))), table, atol=1e-5)
        assert np.unravel_index(table.argmax(), (3, 3)) == (2, 2)


def test_one_dimensional_chain_is_the_same_process():
    a, b = m.chain(0.1), m.chain(0.1, num_dims=1)
    np.testing.assert_array_equal(a.mdp.transition, b.mdp.transition)
    np.testing.assert_array_equal(a.mdp.reward, b.mdp.reward)
    assert (b.num_dims, b.num_bins) == (1, 9)


@pytest.mark.parametrize(
    "task", [m.bandit(), m.bandit(3, 5), m.chain(0.2), m.separable(), m.chain(num_dims=1)]
)
def test_the_log_follows_the_process_and_the_mix(task):
    mix, noise, n = (0.2, 0.5, 0.3), 0.2, 4000
    logged = m.Logged(task.mdp, m.behaviour(task, noise), np.float32(mix))
    draw = jax.jit(lambda k: m.draw_log(task, logged, k, n, 0.9, 0.25))
    data = jax.tree.map(np.asarray, draw(jax.random.key(1)))
    assert np.abs(data.action).max() < 1
    bins = np.floor((data.action + 1) / 2 * task.num_bins).astype(int)
    index = bins[:, 0] if task.num_dims == 1 else bins[:, 0] * task.num_bins + bins[:, 1]
    s = data.obs.argmax(-1)
    terminal = data.next_obs.sum(-1) == 0
    after = np.where(terminal, task.mdp.start.size, data.next_obs.argmax(-1))
    assert (task.mdp.transition[s, index, after] > 0).all()
    np.testing.assert_array_equal(data.reward, task.mdp.reward[s, index, after])
    np.testing.assert_allclose(data.discount, 0.9 * ~terminal, rtol=1e-6)
    if task.horizon == 1:  # every step is an episode: the joint shares are known
        want = logged_shares(task, mix, noise)[0]
        got = np.bincount(index, minlength=len(want)) / n
        assert np.abs(got - want).max() < 4 * 0.5 / np.sqrt(n)
    assert 0.25 <= data.demo.mean() < 1
    again = draw(jax.random.key(1))
    assert all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (data, again)), strict=True)
    )


def test_marked_demonstrations_are_the_best_episodes():
    task = m.bandit()
    logged = m.Logged(task.mdp, m.behaviour(task, 0.0), np.float32((0.3, 0.3, 0.4)))
    data = m.draw_log(task, logged, jax.random.key(0), 500, 0.9, 0.1)
    np.testing.assert_array_equal(data.demo, (data.reward == 1.0).astype(jnp.float32))


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="num_bins=2"):
        m.bandit(2)
    with pytest.raises(ValueError, match="num_dims=3"):
        m.chain(num_dims=3)
