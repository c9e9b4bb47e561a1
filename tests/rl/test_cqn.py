"""The independent coarse-to-fine critic against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl import cqn as m
from qlab.rl.agent import Transition
from qlab.rl.c2f import action_grid, encode_c2f

OBS = 3
loss_of = jax.jit(
    m.cqn_loss, static_argnums=0, static_argnames=("lambda_bc", "margin", "critic_weight")
)


def random_critic(distribution, shape=(2, 2, 3), seed=0):
    support = tuple(np.linspace(-2, 2, 7)) if distribution == "c51" else ()
    critic = m.Critic(action_grid(*shape), support)
    like = jax.eval_shape(lambda k: m.critic_params(k, critic, OBS, (8,)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)
    return critic, params


def random_batch(n=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((n, OBS), (n, 2), n, n, (n, OBS))
    batch = Transition(*(jnp.asarray(rng.uniform(-1, 1, size=s), jnp.float32) for s in shapes))
    return batch._replace(discount=jnp.abs(batch.discount), demo=jnp.arange(n) % 2 * 1.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def project_by_hand(prob, reward, discount, support):
    """C51's projection, one atom at a time."""
    out, step = np.zeros(len(support)), support[1] - support[0]
    for p, z in zip(prob, support, strict=True):
        at = (np.clip(reward + discount * z, support[0], support[-1]) - support[0]) / step
        low, high = int(np.floor(at)), int(np.ceil(at))
        if low == high:
            out[low] += p
        else:
            out[low] += p * (high - at)
            out[high] += p * (at - low)
    return out


def test_projection_equals_the_loop_and_keeps_mass_and_mean():
    rng = np.random.default_rng(0)
    support = np.linspace(-2, 2, 9)
    prob = rng.dirichlet(np.ones(9), size=(50, 2))
    reward, discount = rng.uniform(-3, 3, 50), rng.uniform(0, 1, 50)
    discount[:5] = 0.0  # terminal
    reward[:3] = (-2.0, 0.5, 2.0)  # exactly on an atom
    got = np.asarray(
        m.project(*(jnp.asarray(x, jnp.float32) for x in (prob, reward, discount, support)))
    )
    for n in range(50):
        for d in range(2):
            want = project_by_hand(prob[n, d], reward[n], discount[n], support)
            np.testing.assert_allclose(got[n, d], want, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("distribution", ["c51", "scalar"])
def test_loss_matches_the_formula(distribution):
    critic, params = random_critic(distribution)
    _, target = random_critic(distribution, seed=4)
    batch, key = random_batch(), jax.random.key(2)
    margin, weight, lam = 0.3, 0.1, 0.7
    loss, metrics = loss_of(
        critic, params, target, key, batch, lambda_bc=lam, margin=margin, critic_weight=weight
    )
    bins = np.asarray(encode_c2f(batch.action, 2, 3))
    nxt = m.best_bins(critic, params, key, batch.next_obs)
    logits = np.float64(m.teacher_forced(critic, params, batch.obs, jnp.asarray(bins)))
    next_logits = np.float64(m.teacher_forced(critic, target, batch.next_obs, nxt))
    support = np.array(critic.support)
    td, bc = [], []
    for n in range(6):
        r, g = float(batch.reward[n]), float(batch.discount[n])
        gap, fosd = [], []
        for l in range(2):
            for d in range(2):
                z, b = logits[n, l, d], bins[n, l, d]
                z_next = next_logits[n, l, d, int(nxt[n, l, d])]
                if distribution == "c51":
                    y = project_by_hand(softmax(z_next), r, g, support)
                    td.append(-(y * np.log(softmax(z)[b])).sum())
                    q = softmax(z) @ support
                    cdf = softmax(z).cumsum(-1)
                    fosd += [np.maximum(cdf[b] - c, 0).sum() for c in cdf]
                else:
                    td.append((z[b, 0] - r - g * z_next[0]) ** 2)
                    q = z[:, 0]
                gap += [max(margin - (q[b] - x), 0) for x in q]
        bc.append(np.mean(gap) + (np.mean(fosd) if fosd else 0))
    np.testing.assert_allclose(metrics["td_loss"], np.mean(td), rtol=2e-5)
    np.testing.assert_allclose(metrics["bc_loss"], np.mean(bc[1::2]), rtol=2e-5)
    np.testing.assert_allclose(loss, weight * np.mean(td) + lam * np.mean(bc[1::2]), rtol=2e-5)


def test_dueling_heads_are_mean_subtracted():
    critic, params = random_critic("scalar")
    params["value"] = jax.tree.map(jnp.zeros_like, params["value"])
    q = m.critic_logits(critic, params, jnp.ones((5, OBS)), jnp.zeros((5, 2)), jnp.int32(0))
    np.testing.assert_allclose(q.mean(-2), 0, atol=1e-5)
    assert float(jnp.abs(q).max()) > 0.1


@pytest.mark.parametrize("distribution", ["c51", "scalar"])
def test_a_dimension_never_sees_the_others_at_its_level(distribution):
    critic, params = random_critic(distribution)
    obs, bins = jnp.ones((1, OBS)), jnp.zeros((1, 2, 2), jnp.int32)
    base = np.asarray(m.teacher_forced(critic, params, obs, bins))
    fine = np.asarray(m.teacher_forced(critic, params, obs, bins.at[0, 1, 0].set(2)))
    coarse = np.asarray(m.teacher_forced(critic, params, obs, bins.at[0, 0, 0].set(2)))
    np.testing.assert_array_equal(fine, base)
    np.testing.assert_array_equal(coarse[:, 0], base[:, 0])
    assert np.abs(coarse[:, 1, 1] - base[:, 1, 1]).max() > 1e-4  # a finer level sees all intervals


def test_greedy_is_the_best_bin_of_each_dimension_level_by_level():
    critic, params = random_critic("scalar")
    obs = jax.random.normal(jax.random.key(1), (30, OBS))
    got = m.best_bins(critic, params, jax.random.key(0), obs)
    q = m.mean_value(critic, m.teacher_forced(critic, params, obs, got))
    np.testing.assert_array_equal(q.argmax(-1), got)


def test_ties_are_broken_at_random():
    agent = m.cqn(OBS, 2, num_levels=1, num_bins=4, hidden=(8,))
    state = agent.init(jax.random.key(0))
    action = agent.act(state, jax.random.key(1), jnp.ones((4000, OBS)), greedy=True)
    counts = np.unique(np.asarray(action), return_counts=True)[1]
    assert len(counts) == 4
    assert counts.min() > 1800  # of 2000 expected in each of four bins, over two dimensions


@pytest.mark.parametrize("distribution", ["c51", "scalar"])
def test_independent_values_are_means_over_the_other_dimension(distribution):
    """On the motivating example the optimal bin of dimension 1 is worth (2 - 4) / 6 and loses."""
    bins = np.array([(3, 3)] * 2 + [(1, 3)] * 4 + [(3, 1)] * 4)
    reward = np.array([1.0] * 2 + [0.1] * 4 + [-1.0] * 4)
    batch = Transition(
        jnp.ones((10, 1)),
        jnp.asarray((2 * bins + 1) / 5 - 1, jnp.float32),
        jnp.asarray(reward, jnp.float32),
        jnp.zeros(10),
        jnp.ones((10, 1)),
    )
    agent = m.cqn(
        1,
        2,
        num_levels=1,
        num_bins=5,
        distribution=distribution,
        hidden=(),
        learning_rate=0.02,
        weight_decay=0.0,
        critic_weight=1.0,
    )

    def step(state, _):
        return agent.update(state, jax.random.key(0), batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, None, 1500)[0])(agent.init(jax.random.key(0)))
    critic = m.Critic(
        action_grid(2, 1, 5), tuple(np.linspace(-2, 2, 51)) if distribution == "c51" else ()
    )
    logits = m.critic_logits(
        critic, state.params, jnp.ones((1, 1)), jnp.zeros((1, 2)), jnp.int32(0)
    )
    q = np.asarray(m.mean_value(critic, logits))[0]
    for d in range(2):
        for b in (1, 3):
            np.testing.assert_allclose(q[d, b], reward[bins[:, d] == b].mean(), atol=0.01)
    assert q[0, 1] > q[0, 3]


def test_bad_distribution_is_refused():
    with pytest.raises(ValueError, match="distribution='iqn'"):
        m.cqn(OBS, 2, distribution="iqn")
