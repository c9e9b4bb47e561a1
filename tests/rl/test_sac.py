"""SAC and its replay: the loss against its formula in NumPy, temperatures against each other, time limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from qlab.lab.errors import UserError
from qlab.rl import replay as rp
from qlab.rl import sac as m
from qlab.rl.agent import Transition
from qlab.rl.envs.control import System, two_player
from qlab.rl.envs.env import alone
from qlab.rl.rollout import collect

OBS, ACT, N = 3, 2, 8


def batch_of(seed=0, temperature=None):
    rng = np.random.default_rng(seed)
    draw = lambda *s: np.float32(rng.normal(size=s))  # noqa: E731
    return Transition(
        draw(N, OBS),
        np.tanh(draw(N, ACT)),
        draw(N),
        np.full(N, 0.9, np.float32),
        draw(N, OBS),
        None,
        temperature,
    )


@functools.cache
def agent_of(temperature):
    """Compiled once for all tests."""
    agent = m.sac(
        OBS, ACT, temperature=temperature, hidden=(8,), lr_actor=1e-3, tau=0.1, actor_warmup=2
    )
    return agent._replace(update=jax.jit(agent.update))


@functools.cache
def started():
    """The first state, the same for every kind of temperature, past the warm-up."""
    return jax.jit(agent_of(0.3).init)(jax.random.key(0))._replace(updates=jnp.int32(2))


def arrays(tree):
    return [np.float64(x) for x in jax.tree.leaves(tree)]


def distance(a, b):
    """Largest difference between two trees of arrays."""
    return max(np.abs(x - y).max() for x, y in zip(arrays(a), arrays(b), strict=True))


def test_density_of_the_squashed_gaussian_is_a_density():
    mean, log_std, squash = np.float32([0.3]), np.float32([-0.4]), jax.jit(m.squash)

    def density(a):
        noise = (np.arctanh(a) - 0.3) / np.exp(-0.4)
        got, log_pi = squash(mean, log_std, np.float32([noise]))
        np.testing.assert_allclose(got, a, atol=1e-5)
        return float(np.exp(log_pi))

    for a in (-0.9, 0.0, 0.5, 0.99):
        u = np.arctanh(a)
        np.testing.assert_allclose(
            density(a), stats.norm(0.3, np.exp(-0.4)).pdf(u) / (1 - a**2), rtol=1e-4
        )
    grid = np.tanh(np.linspace(-6, 6, 4001))
    noise = (np.linspace(-6, 6, 4001) - 0.3) / np.exp(-0.4)
    _, log_pi = squash(
        np.full((4001, 1), 0.3, np.float32),
        np.full((4001, 1), -0.4, np.float32),
        np.float32(noise[:, None]),
    )
    np.testing.assert_allclose(integrate.trapezoid(np.exp(log_pi), grid), 1.0, atol=1e-3)
    far = squash(np.float32([40]), np.float32([0]), np.float32([0]))[1]
    assert np.isfinite(far)


def numpy_net(params, x, i):
    layers = [{k: np.float64(v[i]) for k, v in layer.items()} for layer in params]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["w"] + layer["b"], 0)
    return x @ layers[-1]["w"] + layers[-1]["b"]


def test_losses_are_the_formulae(rng):
    """Temperatures of every kind in one batch: given, below the floor, and negative, which asks for the learned."""
    alpha = rng.uniform(0.1, 2, N)
    given = np.where(np.arange(N) == 0, 0.0, np.where(np.arange(N) % 3 == 1, -1.0, alpha))
    batch = batch_of(temperature=jnp.asarray(given, jnp.float32))
    agent = agent_of("batch")
    state, key = started(), jax.random.key(5)
    state = state._replace(
        target=jax.tree.map(lambda x: np.float32(0.7) * np.asarray(x), state.target)
    )
    state = state._replace(params={**state.params, "log_alpha": np.log(np.float32(0.7))})
    alpha = np.where(given < 0, 0.7, np.maximum(given, 1e-6))
    new, metrics = agent.update(state, key, batch)
    noise = np.float64(jax.random.normal(key, (2, N, ACT)))
    obs, after, action = (np.float64(x) for x in (batch.obs, batch.next_obs, batch.action))
    actor, critic = state.params["actor"], state.params["critic"]

    def sample(x, eps):
        mean, log_std = numpy_net(actor, x, 0), np.clip(numpy_net(actor, x, 1), -20, 2)
        u = mean + np.exp(log_std) * eps
        log_pi = stats.norm(mean, np.exp(log_std)).logpdf(u) - np.log(1 - np.tanh(u) ** 2)
        return np.tanh(u), log_pi.sum(1)

    def q(params, x, a):
        return np.stack([numpy_net(params, np.concatenate([x, a], 1), i)[:, 0] for i in (0, 1)])

    a2, lp2 = sample(after, noise[0])
    y = np.float64(batch.reward) + 0.9 * (q(state.target, after, a2).min(0) - alpha * lp2)
    critic_loss = ((q(critic, obs, action) - y) ** 2).mean(1).sum()
    a1, lp1 = sample(obs, noise[1])
    actor_loss = (alpha * lp1 - q(critic, obs, a1).min(0)).mean()
    np.testing.assert_allclose(metrics["critic_loss"], critic_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["actor_loss"], actor_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -lp1.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["alpha"], alpha.mean(), rtol=1e-4)
    # The learned one is taught by its own samples only: Adam's first step is -lr times the sign of the gradient.
    slope = -(np.where(given < 0, lp1 - ACT, 0.0)).mean()
    step = new.params["log_alpha"] - state.params["log_alpha"]
    np.testing.assert_allclose(step, -3e-4 * np.sign(slope), rtol=1e-3)


def test_each_loss_moves_its_own_parameters_by_adam():
    """First step of Adam: lr times the sign of each loss's own gradient."""
    agent, key, state, batch = agent_of(0.3), jax.random.key(1), started(), batch_of()
    new, _ = agent.update(state, key, batch)
    eps = jax.random.normal(key, (2, N, ACT))

    def actor_loss(actor):
        a, lp = m.squash(*m.gaussian(actor, batch.obs), eps[1])
        return (0.3 * lp - m.q_values(state.params["critic"], batch.obs, a).min(0)).mean()

    grad = jax.jit(jax.grad(actor_loss))(state.params["actor"])
    actors = grad, new.params["actor"], state.params["actor"]
    for g, a, b in zip(*map(arrays, actors), strict=True):
        big = np.abs(g) > 1e-5
        np.testing.assert_allclose((b - a)[big], 1e-3 * np.sign(g)[big], rtol=2e-2)
    for t0, p, t1 in zip(
        *map(arrays, (state.target, new.params["critic"], new.target)), strict=True
    ):
        np.testing.assert_allclose(t1, 0.9 * t0 + 0.1 * p, atol=1e-6)


@pytest.mark.parametrize(("kind", "entry"), [(0.3, 0.3), ("learned", -1.0)])
def test_a_constant_column_of_temperatures_equals_that_agent_step_for_step(kind, entry):
    """A column of 0.3 is the fixed temperature, a column of -1 the learned one; warm-up included."""
    f, g = agent_of(kind).update, agent_of("batch").update
    first = a = b = started()._replace(updates=jnp.int32(0))
    for i in range(20):
        a, _ = f(a, jax.random.key(i), batch_of(i))
        b, _ = g(b, jax.random.key(i), batch_of(i, jnp.full(N, entry)))
        assert (distance(a.params["actor"], first.params["actor"]) > 0) == (i >= 2)
    assert distance(a, b) < 1e-6
    c, _ = g(b, jax.random.key(99), batch_of(99, jnp.linspace(0, 1, N)))
    d, _ = f(a, jax.random.key(99), batch_of(99))
    assert distance(c.params, d.params) > 1e-5


@pytest.mark.parametrize(("log_std", "sign"), [(-3.0, 1), (-0.2, -1)])
def test_a_learned_temperature_follows_the_entropy(log_std, sign):
    """A policy of less entropy than wanted (-2 nats): alpha rises; of more: it falls."""
    state = started()
    last = {"w": jnp.zeros((2, 8, ACT)), "b": jnp.array([[0.0] * ACT, [log_std] * ACT])}
    params = {**state.params, "actor": [*state.params["actor"][:-1], last]}
    new, metrics = agent_of("learned").update(
        state._replace(params=params), jax.random.key(1), batch_of()
    )
    assert (float(metrics["entropy"]) < -ACT) == (sign > 0)
    np.testing.assert_allclose(
        new.params["log_alpha"] - params["log_alpha"], sign * 3e-4, rtol=1e-3
    )


def test_time_limits_bootstrap_and_ends_do_not():
    """A clock pays 1 a step for 4 steps. Where it ends then, n steps in it is worth (1 - gamma^(4 - n)) /
    (1 - gamma); where it is only cut, and the agent sees no clock, it is worth 1 / (1 - gamma)."""
    gamma = 0.8

    def observe(x, ends):
        return jax.nn.one_hot((x[0] * ends).astype(int), 5)

    agent = m.sac(5, 1, temperature=1e-6, hidden=(32,), lr_critic=3e-3, tau=0.1)

    @jax.jit
    @jax.vmap
    def learn(ends):
        def advance(x, a, o):
            return x + 1, jnp.float32(1), (x[0] + 1 >= 4) & ends

        system = System(lambda key: jnp.zeros(1), advance, lambda x: observe(x, ends), (5, 1, 1))
        env = alone(two_player(system, max_action=1, max_force=1, horizon=4))
        random = lambda mem, k, obs, first: (mem, jax.random.uniform(k, (1,), minval=-1.0))  # noqa: E731
        data, over = collect(env, random, jnp.int32(0), jax.random.key(0), 200, gamma)

        def step(state, i):
            k_rows, k_update = jax.random.split(jax.random.key(i))
            rows = jax.random.randint(k_rows, (64,), 0, 200)
            return agent.update(state, k_update, jax.tree.map(lambda x: x[rows], data))[0], None

        state = jax.lax.scan(step, agent.init(jax.random.key(0)), jnp.arange(1500))[0]
        seen = jax.vmap(lambda x: observe(x, ends))(jnp.arange(4.0)[:, None])
        return agent.q_value(state, seen, jnp.zeros((4, 1))), over

    for ends, q, over in zip((False, True), *learn(np.array([False, True])), strict=True):
        assert np.flatnonzero(over).tolist() == list(range(3, 200, 4))
        left = 4 - np.arange(4) if ends else np.inf
        np.testing.assert_allclose(q, np.full(4, (1 - gamma**left) / (1 - gamma)), atol=0.1)


def test_ring_overwrites_the_oldest_and_draws_from_the_filled_part():
    row = {"x": jax.ShapeDtypeStruct((2,), jnp.float32), "i": jax.ShapeDtypeStruct((), jnp.int32)}
    ring, add = rp.replay_init(row, 7), jax.jit(rp.replay_add)
    sample = jax.jit(rp.replay_sample, static_argnums=2)
    assert rp.replay_bytes(row, 7) == 7 * 12
    kept = []
    for n in range(5):
        ids = np.arange(3 * n, 3 * n + 3)
        ring = add(ring, {"x": np.ones((3, 2), np.float32) * ids[:, None], "i": np.int32(ids)})
        kept = (kept + ids.tolist())[-7:]
        drawn = sample(ring, jax.random.key(n), 7000)
        assert set(np.asarray(drawn["i"]).tolist()) == set(kept)
        np.testing.assert_array_equal(np.asarray(drawn["x"])[:, 0], drawn["i"])
        assert int(ring.size) == len(kept)
    counts = np.bincount(np.asarray(sample(ring, jax.random.key(9), 7000)["i"]))[8:]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_replay_that_does_not_fit_says_so_before_it_is_made():
    with pytest.raises(UserError, match=r"2 GB.*1 GB.*lower replay_size") as e:
        rp.check_fits(2_000_000_000, "replay_size", free=1_000_000_000)
    assert "\n" not in str(e.value)
    rp.check_fits(100, "replay_size")
    with pytest.raises(ValueError, match="raise its capacity"):
        rp.replay_add(rp.replay_init(jax.ShapeDtypeStruct((), jnp.float32), 2), jnp.ones(3))


@pytest.mark.parametrize("bad", ["warm", 0.0, -1.0, float("inf"), True])
def test_bad_temperatures_name_themselves(bad):
    with pytest.raises(ValueError, match="temperature="):
        m.sac(OBS, ACT, temperature=bad)


def test_a_missing_temperature_is_one_line():
    with pytest.raises(UserError, match=r"batch\.temperature"):
        agent_of("batch").update(started(), jax.random.key(0), batch_of())


@pytest.mark.slow
def test_normalised_critics_start_at_zero_and_learn_the_same_loss():
    """RLPD's critics: LayerNorm and a zero head; a huge input cannot make their values huge."""
    agent = m.sac(3, 2, hidden=(16, 16), layer_norm=True, temperature=0.1, lr_critic=1e-3)
    state = agent.init(jax.random.key(0))
    obs, action = jnp.ones((4, 3)), jnp.zeros((4, 2))
    np.testing.assert_array_equal(agent.q_value(state, obs, action), 0)
    batch = Transition(obs, action, jnp.ones(4), jnp.zeros(4), obs)
    update = jax.jit(agent.update)
    for i in range(300):
        state, metrics = update(state, jax.random.key(i), batch)
    np.testing.assert_allclose(
        agent.q_value(state, obs, action), 1, atol=0.1
    )  # the reward, no bootstrap
    far = agent.q_value(state, 1e6 * obs, action)
    assert float(jnp.abs(far).max()) < 10
    assert np.isfinite(metrics["loss"])
