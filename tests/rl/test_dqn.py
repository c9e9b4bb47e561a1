"""Double DQN against exact values of small processes, and its masks, targets and schedules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl.agent import Transition
from qlab.rl.dqn import best_legal, double_dqn, mlp_q
from qlab.rl.envs.tabular import solve, tabular_mdp

S, A, GAMMA = 5, 3, 0.8


@pytest.fixture(scope="module")
def mdp():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(S + 1), (S, A))
    return tabular_mdp(p, rng.normal(size=(S, A, S + 1)), np.ones(S) / S)


def rows(mdp, rng, n, legal):
    """n one-step transitions with uniform states and legal actions."""
    s = rng.integers(0, S, n)
    a = np.array([rng.choice(np.flatnonzero(legal[i])) for i in s])
    cdf = np.cumsum(mdp.transition[s, a], 1)
    after = (rng.random(n)[:, None] > cdf).sum(1).clip(0, S)
    mask = np.concatenate([legal, np.zeros((1, A), bool)])
    eye = np.eye(S + 1, dtype=np.float32)[:, :S]
    return Transition(
        (jnp.asarray(eye[s]), jnp.asarray(mask[s])),
        jnp.asarray(a, jnp.int32),
        jnp.asarray(mdp.reward[s, a, after], jnp.float32),
        jnp.asarray(GAMMA * (after < S), jnp.float32),
        (jnp.asarray(eye[after]), jnp.asarray(mask[after])),
    )


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_linear_net_learns_the_exact_q(mdp, masked):
    rng = np.random.default_rng(0)
    legal = np.ones((S, A), bool)
    if masked:
        legal[np.arange(S), rng.integers(0, A, S)] = False
    # an illegal action is one that ends the episode at a great loss: it never is the best
    reward = np.where(legal[:, :, None], mdp.reward, -100.0)
    exact = solve(mdp._replace(reward=reward.astype(np.float32)), GAMMA)
    agent = double_dqn(
        mlp_q(S, (), A),
        A,
        discount=GAMMA,
        learning_rate=optax_schedule(),
        target_every=50,
        huber=1e3,
    )
    data = rows(mdp, rng, 40_000, legal)

    def one(state, k):
        at = jax.random.randint(k, (512,), 0, 40_000)
        return agent.update(state, k, jax.tree.map(lambda x: x[at], data))

    state = agent.init(jax.random.key(0))
    state, metrics = jax.jit(
        lambda s: jax.lax.scan(one, s, jax.random.split(jax.random.key(1), 3000))
    )(state)
    obs = jnp.eye(S), jnp.asarray(legal)
    q = np.stack([agent.q_value(state, obs, jnp.full(S, a, jnp.int32)) for a in range(A)], 1)
    assert np.abs(q - exact.q)[legal].max() < 0.1  # 40,000 draws of 15 rewards of spread 1
    assert np.abs(agent.value(state, obs) - exact.v).max() < 0.1
    greedy = agent.act(state, jax.random.key(2), obs, greedy=True)
    np.testing.assert_array_equal(greedy, np.where(legal, exact.q, -np.inf).argmax(1))
    assert np.isfinite(metrics["loss"]).all()


def optax_schedule():
    import optax

    return optax.exponential_decay(0.05, 1000, 0.1)


def batch_of(reward, legal=None, n=4):
    legal = jnp.ones((n, A), bool) if legal is None else legal
    x = jax.random.normal(jax.random.key(5), (n, S))
    return Transition((x, legal), jnp.zeros(n, jnp.int32), reward, jnp.full(n, 0.5), (x + 1, legal))


def numpy_q(params, x):
    x = np.asarray(x)
    for i, layer in enumerate(params):
        x = x @ np.asarray(layer["w"]) + np.asarray(layer["b"])
        x = np.where(x > 0, x, 0.01 * x) if i < len(params) - 1 else x
    return x


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("n_step", [1, 3])
def test_loss_by_hand(double, n_step):
    """Online net chooses among legal actions, target net values; the rewards of a window are discounted."""
    agent = double_dqn(
        mlp_q(S, (7, 6), A), A, discount=0.9, n_step=n_step, double=double, huber=0.3
    )
    state = agent.init(jax.random.key(0))
    state = state._replace(target=agent.init(jax.random.key(9)).params)
    legal = jnp.array([[True, False, True], [True, True, True], [False, True, False], [False] * 3])
    reward = jax.random.normal(jax.random.key(2), (4,) if n_step == 1 else (4, n_step))
    batch = batch_of(reward, legal)
    online, frozen = (numpy_q(p, batch.next_obs[0]) for p in (state.params, state.target))
    pick = np.where(legal, online if double else frozen, -np.inf).argmax(1)
    v = np.where(np.asarray(legal).any(1), frozen[np.arange(4), pick], 0.0)
    r = np.asarray(reward) if n_step == 1 else np.asarray(reward) @ 0.9 ** np.arange(n_step)
    d = np.abs(numpy_q(state.params, batch.obs[0])[:, 0] - (r + 0.5 * v))
    expected = np.where(d < 0.3, d**2 / 2, 0.3 * (d - 0.15)).mean()
    new, metrics = agent.update(state, jax.random.key(0), batch)
    assert abs(float(metrics["loss"]) - expected) < 1e-5
    assert any(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True))  # fmt: skip


def test_exploration_is_uniform_over_legal_actions_and_decays():
    agent = double_dqn(mlp_q(S, (), A), A, epsilon_decay=0.5, epsilon_final=0.2, target_every=2)
    state = agent.init(jax.random.key(0))
    legal = jnp.broadcast_to(jnp.array([True, False, True]), (8000, A))
    action = np.asarray(agent.act(state, jax.random.key(1), (jnp.ones((8000, S)), legal)))
    assert set(action) == {0, 2}
    assert abs((action == 0).mean() - 0.5) < 0.03
    half = state._replace(epsilon=jnp.float32(0.4))
    q = agent.value(half, (jnp.ones((1, S)), legal[:1]))
    best = int(best_legal(mlp_q(S, (), A).apply(half.params, jnp.ones((1, S))), legal[:1])[0])
    action = np.asarray(agent.act(half, jax.random.key(2), (jnp.ones((8000, S)), legal)))
    assert abs((action == best).mean() - 0.8) < 0.03
    assert np.isfinite(q).all()
    eps, copied = [], []
    for i in range(5):
        state, metrics = agent.update(state, jax.random.key(i), batch_of(jnp.ones(4)))
        eps.append(float(metrics["epsilon"]))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, state.target)
        copied.append(all(jax.tree.leaves(same)))
    np.testing.assert_allclose(eps, [0.5, 0.25, 0.2, 0.2, 0.2])
    assert copied == [False, True, False, True, False]


def test_a_final_epsilon_above_the_first_does_not_raise_it():
    agent = double_dqn(mlp_q(S, (), A), A, epsilon=0.0, epsilon_final=0.1)
    state, _ = agent.update(agent.init(jax.random.key(0)), jax.random.key(0), batch_of(jnp.ones(4)))
    assert float(state.epsilon) == 0.0


def test_nets_stay_float32_under_x64():
    with jax.enable_x64(True):
        agent = double_dqn(mlp_q(S, (4,), A), A)
        state = agent.init(jax.random.key(0))
        new, _ = jax.jit(agent.update)(state, jax.random.key(0), jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, batch_of(jnp.ones(4))))  # fmt: skip
        assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_bad_input():
    with pytest.raises(ValueError, match="n_step=0"):
        double_dqn(mlp_q(S, (), A), A, n_step=0)
    agent = double_dqn(mlp_q(S, (), A), A, n_step=3)
    with pytest.raises(ValueError, match=r"expects \[N, 3\]"):
        agent.update(agent.init(jax.random.key(0)), jax.random.key(0), batch_of(jnp.ones((4, 2))))
