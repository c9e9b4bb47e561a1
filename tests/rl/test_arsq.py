"""The exact properties of an auto-regressive soft Q-function, by enumeration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlab.rl import arsq as m
from qlab.rl.agent import Transition
from qlab.rl.c2f import action_grid, all_bins, decode_c2f

SHAPES = [(1, 1, 3), (2, 1, 5), (2, 2, 3), (3, 1, 4)]
OBS = 3
advantages = jax.jit(m.ar_advantages, static_argnums=0)
sample = jax.jit(m.sample_action, static_argnums=(0, 5, 6))
loss_of = jax.jit(m.arsq_loss, static_argnums=0)


def random_net(shape, conditioning="ar", order="identity", hidden=(16, 16), scale=1.0, seed=0):
    """A net with every parameter random, heads included."""
    net = m.token_net(action_grid(*shape), order, conditioning)
    like = jax.eval_shape(lambda k: m.arsq_params(k, net, OBS, hidden), jax.random.key(0))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return net, jax.tree.map(draw, like)


@partial(jax.jit, static_argnums=0)
def enumerate_q(net, params, obs, alpha):
    """log pi and Q of every joint action in one state: f32[A], f32[A]."""
    bins = jnp.asarray(all_bins(net.grid))
    s = jnp.broadcast_to(obs, (len(bins), OBS))
    return m.log_prob(net, params, s, bins, alpha), m.q_value(net, params, s, bins, alpha)


def table_params(net, q, alpha):
    """Linear-net parameters of a two-dimensional one-level task whose Q-table is q f64[B, B].

    u_1 = V_1 and u_2 = Q up to a constant, so that the net represents any table exactly.
    """
    b = net.grid.num_bins
    assert net.grid.num_dims == 2
    assert net.grid.num_levels == 1
    v1 = alpha * np.logaddexp.reduce(q / alpha, axis=1)
    v0 = alpha * np.logaddexp.reduce(v1 / alpha)
    params = m.arsq_params(jax.random.key(0), net, 1, ())
    w = np.zeros(params["advantage"]["w"].shape)
    w[2] = v1  # rows: obs, level, dimension (2), centres (2), bins (2 B)
    w[6 : 6 + b] = q
    params["advantage"]["w"] = jnp.asarray(w, jnp.float32)
    params["value"]["b"] = jnp.full(1, v0, jnp.float32)
    return params, v0, v1


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_advantage_is_normalised_given_its_prefix(shape, alpha):
    net, params = random_net(shape)
    bins = jax.random.randint(jax.random.key(5), (50, shape[1], shape[0]), 0, shape[2])
    obs = jax.random.normal(jax.random.key(6), (50, OBS))
    a = advantages(net, params, obs, bins, alpha)
    assert a.shape == (50, shape[0] * shape[1], shape[2])
    np.testing.assert_allclose(jnp.exp(a / alpha).sum(-1), 1, atol=1e-6 if alpha > 0.01 else 3e-6)


@pytest.mark.parametrize(
    ("conditioning", "order"),
    [("ar", "identity"), ("ar", "random"), ("level", "reverse"), ("none", "identity")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_policy_sums_to_one_and_v_is_the_soft_maximum_of_q(shape, conditioning, order):
    net, params = random_net(shape, conditioning, order)
    alpha, obs = 0.5, jnp.asarray([0.3, -1.0, 2.0])
    log_pi, q = (np.float64(x) for x in enumerate_q(net, params, obs, alpha))
    v = float(m.soft_value(params, obs))
    np.testing.assert_allclose(np.exp(log_pi).sum(), 1, atol=2e-6)
    np.testing.assert_allclose(alpha * np.logaddexp.reduce(q / alpha), v, atol=5e-6)
    np.testing.assert_allclose(np.exp((q - v) / alpha), np.exp(log_pi), atol=2e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
def test_chain_decomposition_of_a_given_table(alpha):
    q = np.random.default_rng(3).normal(size=(5, 5))
    net = m.token_net(action_grid(2, 1, 5))
    params, v0, v1 = table_params(net, q, alpha)
    bins = jnp.asarray(all_bins(net.grid))
    obs = jnp.zeros((25, 1))
    a = np.asarray(advantages(net, params, obs, bins, alpha)).reshape(5, 5, 2, 5)
    for b1 in range(5):
        for b2 in range(5):
            np.testing.assert_allclose(a[b1, b2, 0], v1 - v0, atol=5e-6)
            np.testing.assert_allclose(a[b1, b2, 1], q[b1] - v1[b1], atol=5e-6)
    got = m.q_value(net, params, obs, bins, alpha).reshape(5, 5)
    np.testing.assert_allclose(got, q, atol=5e-6)


@pytest.mark.parametrize("conditioning", m.CONDITIONING)
def test_a_token_sees_earlier_tokens_only(conditioning):
    shape = d, l, b = (3, 2, 4)
    net, params = random_net(shape, conditioning, order=(2, 0, 1))
    obs = jnp.ones((1, OBS))
    bins = jax.random.randint(jax.random.key(1), (1, l, d), 0, b)
    base = np.asarray(advantages(net, params, obs, bins, 0.1))[0]
    for t in range(l * d):
        level, dim = t // d, net.order[t % d]
        other = bins.at[0, level, dim].add(1) % b
        got = np.asarray(advantages(net, params, obs, other, 0.1))[0]
        for u in range(l * d):
            same = np.array_equal(got[u], base[u])
            if conditioning == "ar":
                sees = u > t
            elif conditioning == "level":
                sees = u // d > level
            else:
                sees = False
            assert same != sees, (conditioning, t, u)


def test_zero_heads_make_a_uniform_policy_and_zero_values():
    agent = m.arsq(OBS, 2, num_levels=2, num_bins=3, hidden=(16,), alpha=0.01)
    state = agent.init(jax.random.key(0))
    net = m.token_net(action_grid(2, 2, 3))
    log_pi, q = enumerate_q(net, state.params, jnp.ones(OBS), 0.01)
    np.testing.assert_allclose(np.exp(log_pi), 1 / 81, rtol=1e-5)
    np.testing.assert_allclose(m.soft_value(state.params, jnp.ones((1, OBS))), 0)
    np.testing.assert_allclose(q, -0.01 * np.log(81), rtol=1e-5)


def test_sampling_follows_the_enumerated_policy():
    net, params = random_net((2, 2, 2), scale=0.5)
    obs, n, alpha = jnp.asarray([0.5, 0.1, -0.2]), 20000, 0.7
    _, bins = sample(net, params, jax.random.key(3), jnp.tile(obs, (n, 1)), alpha)
    index = np.asarray(bins).reshape(n, 4) @ (8, 4, 2, 1)
    log_pi, _ = enumerate_q(net, params, obs, alpha)
    p = np.exp(np.float64(log_pi))
    counts = np.bincount(index, minlength=16)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 44.3  # 1 - 1e-4 quantile with 15 degrees of freedom


@pytest.mark.parametrize("order", ["identity", "reverse"])
def test_greedy_takes_the_best_bin_at_each_token(order):
    net, params = random_net((2, 2, 3), order=order)
    obs = jax.random.normal(jax.random.key(8), (20, OBS))
    action, got = sample(net, params, jax.random.key(0), obs, 0.1, "greedy")
    want = np.zeros((20, 2, 2), np.int32)
    for t in range(4):
        a = advantages(net, params, obs, jnp.asarray(want), 0.1)
        want[:, t // 2, net.order[t % 2]] = np.asarray(a[:, t].argmax(-1))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(action, decode_c2f(jnp.asarray(want), 3))


def test_full_beam_is_the_joint_argmax():
    net, params = random_net((2, 2, 3))
    obs = jax.random.normal(jax.random.key(8), (10, OBS))
    _, got = sample(net, params, jax.random.key(0), obs, 0.5, "beam", 81)
    for n in range(10):
        _, q = enumerate_q(net, params, obs[n], 0.5)
        np.testing.assert_array_equal(got[n], all_bins(net.grid)[int(q.argmax())])


def test_greedy_tends_to_the_argmax_as_alpha_falls_and_may_miss_it_at_a_large_alpha():
    q = np.full((3, 3), 0.0)
    q[0, 0] = 1.0  # the best joint action
    q[2] = 0.9  # a row with a larger soft tail
    net = m.token_net(action_grid(2, 1, 3))
    picks = {}
    for alpha in (1e-3, 1.0):
        params, *_ = table_params(net, q, alpha)
        for mode in ("greedy", "beam"):
            _, bins = sample(net, params, jax.random.key(0), jnp.zeros((1, 1)), alpha, mode)
            picks[alpha, mode] = tuple(np.asarray(bins)[0, 0])
    assert picks[1e-3, "greedy"] == picks[1e-3, "beam"] == picks[1.0, "beam"] == (0, 0)
    assert picks[1.0, "greedy"][0] == 2


def test_loss_and_gradient_stop_match_the_formula():
    shape, alpha, lam = (2, 1, 3), 0.3, 0.7
    net, params = random_net(shape)
    _, target = random_net(shape, seed=9)
    rng = np.random.default_rng(0)
    batch = Transition(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, OBS), (6, 2), 6, 6, (6, OBS))),
        demo=jnp.asarray([1.0, 0, 1, 0, 0, 1]),
    )
    loss, metrics = loss_of(
        net, params, target, batch, alpha, lambda_td=2.0, lambda_bc=lam, reward_scale=0.5
    )
    bins = m.encode_c2f(batch.action, 1, 3)
    q = np.float64(m.q_value(net, params, batch.obs, bins, alpha))
    y = 0.5 * batch.reward + batch.discount * m.soft_value(target, batch.next_obs)
    td = ((q - np.float64(y)) ** 2).mean()
    bc = -np.float64(m.log_prob(net, params, batch.obs, bins, alpha))[[0, 2, 5]].mean() / 2
    np.testing.assert_allclose(metrics["td_loss"], td, rtol=1e-5)
    np.testing.assert_allclose(metrics["bc_loss"], bc, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * td + lam * bc, rtol=1e-5)
    g = jax.grad(lambda t: loss_of(net, params, t, batch, alpha)[0])(target)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(g))
    g = jax.grad(lambda p: loss_of(net, p, target, batch, alpha)[0])(params)
    assert all(float(jnp.abs(x).max()) > 0 for x in (g["value"]["w"], g["advantage"]["w"]))


def test_one_token_learner_is_tabular_soft_q_learning():
    """D = L = 1 with a linear net: V(s) and u(s, .) are free tables, so Q is one too."""
    alpha, gamma, states, b = 0.2, 0.8, 3, 4
    rng = np.random.default_rng(1)
    after = rng.integers(0, states, (states, b))
    reward = rng.normal(size=(states, b))
    s, a = (x.ravel() for x in np.mgrid[:states, :b])
    eye = np.eye(states, dtype=np.float32)
    batch = Transition(
        jnp.asarray(eye[s]),
        jnp.asarray((2 * a[:, None] + 1) / b - 1, jnp.float32),
        jnp.asarray(reward[s, a], jnp.float32),
        jnp.full(len(s), gamma),
        jnp.asarray(eye[after[s, a]]),
    )
    # The same Q-table gives the same target and the same loss.
    table = rng.normal(size=(states, b))
    net = m.token_net(action_grid(1, 1, b))
    params = m.arsq_params(jax.random.key(0), net, states, ())
    w = np.zeros(params["advantage"]["w"].shape, np.float32)
    w[:states] = table
    params["advantage"]["w"] = jnp.asarray(w)
    v = alpha * np.logaddexp.reduce(table / alpha, axis=1)
    params["value"]["w"] = jnp.asarray(v[:, None], jnp.float32)
    loss, _ = m.arsq_loss(net, params, params, batch, alpha)
    want = (table[s, a] - reward[s, a] - gamma * v[after[s, a]]) ** 2
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)

    # Both learners end at the same fixed point, that of exact tabular soft Q-learning.
    q = np.zeros((states, b))
    for _ in range(500):
        q = reward + gamma * (alpha * np.logaddexp.reduce(q / alpha, axis=1))[after]
    agent = m.arsq(
        states,
        1,
        num_levels=1,
        num_bins=b,
        alpha=alpha,
        hidden=(),
        learning_rate=optax.cosine_decay_schedule(0.05, 6000),
        weight_decay=0.0,
        tau=0.1,
    )
    state = agent.init(jax.random.key(0))

    def step(state, _):
        return agent.update(state, jax.random.key(0), batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, None, 6000)[0])(state)
    got = agent.q_value(state, batch.obs, batch.action).reshape(states, b)
    np.testing.assert_allclose(got, q, atol=2e-3)
    got_v = agent.value(state, jnp.asarray(eye))
    np.testing.assert_allclose(got_v, alpha * np.logaddexp.reduce(q / alpha, axis=1), atol=2e-3)


def three_modes():
    """The motivating example as a log of ten rows: r = 1 twice, 0.1 and -1 four times each."""
    rows = [((3, 3), 1.0)] * 2 + [((1, 3), 0.1)] * 4 + [((3, 1), -1.0)] * 4
    bins = np.array([r[0] for r in rows])
    return Transition(
        jnp.ones((10, 1)),
        jnp.asarray((2 * bins + 1) / 5 - 1, jnp.float32),
        jnp.asarray([r[1] for r in rows], jnp.float32),
        jnp.zeros(10),
        jnp.ones((10, 1)),
    )


@pytest.mark.parametrize(
    ("alpha", "low", "high"),
    [(0.01, 0.999, 1.001), (0.1, 0.999, 1.02), (0.5, 1.1, 1.6), (1.0, 1.5, 2.7)],
)
def test_unseen_actions_lift_v_as_alpha_grows_and_greedy_stays_right(alpha, low, high):
    """With three of 25 actions seen, V is only bounded from below by their soft maximum."""
    agent = m.arsq(
        1,
        2,
        num_levels=1,
        num_bins=5,
        alpha=alpha,
        hidden=(),
        learning_rate=0.01,
        weight_decay=0.0,
    )
    batch = three_modes()

    def step(state, _):
        state, metrics = agent.update(state, jax.random.key(0), batch)
        return state, metrics["loss"]

    # Long after it has converged, Adam at a constant rate jumps now and then.
    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, None, 3000))(
        agent.init(jax.random.key(0))
    )
    assert float(losses[-1]) < 1e-6
    v = float(agent.value(state, jnp.ones((1, 1)))[0])
    seen = alpha * np.logaddexp.reduce(np.array([1.0, 0.1, -1.0]) / alpha)
    assert v >= seen - 1e-3
    assert low <= v <= high
    action = agent.act(state, jax.random.key(0), jnp.ones((1, 1)), greedy=True)
    np.testing.assert_allclose(action, [[0.4, 0.4]], atol=1e-6)


def test_behaviour_cloning_alone_learns_the_empirical_joint_policy():
    agent = m.arsq(
        1,
        2,
        num_levels=1,
        num_bins=5,
        alpha=0.3,
        hidden=(),
        learning_rate=0.02,
        weight_decay=0.0,
        lambda_td=0.0,
        lambda_bc=1.0,
    )
    batch = three_modes()
    state = agent.init(jax.random.key(0))

    def step(state, _):
        return agent.update(state, jax.random.key(0), batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, None, 2000)[0])(state)
    net = m.token_net(action_grid(2, 1, 5))
    bins = m.encode_c2f(batch.action, 1, 5)
    p = np.exp(m.log_prob(net, state.params, batch.obs, bins, 0.3))
    np.testing.assert_allclose(p, [0.2] * 2 + [0.4] * 8, atol=0.01)


def test_target_is_a_moving_average_and_update_is_adamw():
    agent = m.arsq(OBS, 2, num_levels=1, num_bins=3, hidden=(8,), tau=0.1, weight_decay=0.2)
    state = agent.init(jax.random.key(0))
    batch = Transition(
        jnp.ones((4, OBS)), jnp.zeros((4, 2)), jnp.ones(4), jnp.zeros(4), jnp.ones((4, OBS))
    )
    new, _ = jax.jit(agent.update)(state, jax.random.key(0), batch)
    net = m.token_net(action_grid(2, 1, 3))
    grad = jax.grad(lambda p: loss_of(net, p, state.target, batch, 0.01)[0])(state.params)
    opt = optax.adamw(5e-5, weight_decay=0.2)
    want = optax.apply_updates(
        state.params, opt.update(grad, opt.init(state.params), state.params)[0]
    )
    for a, b in zip(*map(jax.tree.leaves, (new.params, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    for t0, p, t in zip(*map(jax.tree.leaves, (state.target, want, new.target)), strict=True):
        np.testing.assert_allclose(t, 0.9 * t0 + 0.1 * p, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [{"alpha": 0.0}, {"dim_order": "sideways"}, {"conditioning": "all"}, {"action_mode": "best"}],
)
def test_bad_arguments_name_themselves(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        m.arsq(OBS, 2, **bad)
