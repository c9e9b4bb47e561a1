"""The self-paced Gamma teacher against SciPy's distributions, quadrature and a constrained optimiser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from qlab.lab.errors import UserError
from qlab.rl import teacher as t


@partial(jax.jit, static_argnums=4)
def _update(state, temps, returns, numbers, explore):
    return t.teacher_update(state, temps, returns, t.TeacherConfig(*numbers, explore))


def update(state, temps, returns, config):
    """Compiled once for all settings."""
    return _update(state, temps, returns, tuple(config[:-1]), config.explore)


def kl64(a, b):
    return (a - b) * special.digamma(a) - special.gammaln(a) + special.gammaln(b)


@pytest.mark.parametrize(
    ("a", "b"), [(50.0, 1.0), (1.0, 50.0), (3.0, 3.0), (0.5, 2.0), (43.3, 50.0)]
)
def test_kl_is_that_of_quadrature(a, b):
    p, q = stats.gamma(a, scale=0.1), stats.gamma(b, scale=0.1)
    want, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)),
        0,
        p.isf(1e-15),
        points=[p.mean()],
        limit=500,
    )
    np.testing.assert_allclose(t.gamma_kl(a, b), want, atol=2e-4)
    np.testing.assert_allclose(t.gamma_kl(50.0, 1.0), 46.6318, atol=2e-4)


def test_density_and_samples_are_those_of_a_rate(rng):
    x = rng.gamma(5.0, 1e-3, 50)
    np.testing.assert_allclose(
        t.gamma_logpdf(jnp.asarray(x), 5.0, 1000.0),
        stats.gamma(5.0, scale=1e-3).logpdf(x),
        rtol=2e-4,
        atol=1e-3,
    )
    draws = np.asarray(t.sample_gamma(jax.random.key(0), 50.0, 1000.0, 4000))
    assert stats.kstest(draws, stats.gamma(50.0, scale=1e-3).cdf).pvalue > 1e-3


def test_importance_weights_in_float64_and_unbiased(rng):
    temps = rng.gamma(50.0, 1e-3, 60)
    returns = rng.normal(size=60)
    for new in (49.0, 43.0, 30.0, 1.0):
        ratio = stats.gamma(new, scale=1e-3).pdf(temps) / stats.gamma(50.0, scale=1e-3).pdf(temps)
        got = t.iw_performance(new, 50.0, jnp.asarray(temps), jnp.asarray(returns), 1000.0)
        np.testing.assert_allclose(got, (ratio * returns).mean(), rtol=2e-3, atol=1e-6)
    # With many pairs the estimate is the mean over the new distribution: of the temperature itself 0.045.
    many = rng.gamma(50.0, 1e-3, 200_000)
    got = t.iw_performance(45.0, 50.0, jnp.asarray(many), jnp.asarray(many), 1000.0)
    np.testing.assert_allclose(got, 0.045, rtol=0.02)
    mask = jnp.arange(60) < 10
    np.testing.assert_allclose(
        t.iw_performance(50.0, 50.0, jnp.asarray(temps), jnp.asarray(returns), 1e3, mask),
        returns[:10].mean(), rtol=1e-4,
    )  # fmt: skip


def edge64(old, target, eps):
    if kl64(target, old) <= eps:
        return target
    return optimize.brentq(lambda k: kl64(k, old) - eps, target, old, xtol=1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_a_student_always_good_enough_moves_the_predicted_path(eps):
    config = t.TeacherConfig(kl_eps=eps, j_lb=0.0)
    state, want, path = t.teacher_init(50.0, config), 50.0, []
    for _ in range(200):
        state = update(state, jnp.full(40, 0.03), jnp.ones(40), config)
        want = edge64(want, 1.0, eps)
        path.append(want)
        np.testing.assert_allclose(state.conc, want, rtol=3e-3)
        assert int(state.count) == 0
        if want == 1.0:
            break
    assert int(state.branch) == t.ARRIVED
    assert float(state.conc) == 1.0
    assert len(path) == {0.1: 29, 0.5: 13, 2.0: 7}[eps]


def test_a_target_above_is_reached_too():
    config = t.TeacherConfig(conc_target=9.0)
    state = t.teacher_init(2.0, config)
    for _ in range(12):
        before = float(state.conc)
        state = update(state, jnp.full(40, 0.003), jnp.ones(40), config)
        assert float(state.conc) > before or before == 9.0
    assert float(state.conc) == 9.0


def test_a_bound_on_the_return_binds_like_a_constrained_optimiser(rng):
    """Returns that fall as the adversary cools: the step ends where the estimate meets J_lb."""
    temps = np.float32(rng.gamma(50.0, 1e-3, 80))
    returns = np.float32(100 * temps)  # mean 5; at k' about k' / 10
    config = t.TeacherConfig(j_lb=4.8)
    state = update(t.teacher_init(50.0, config), jnp.asarray(temps), jnp.asarray(returns), config)

    def estimate(k):
        log = (
            (k - 50.0) * np.log(1000 * np.float64(temps))
            + special.gammaln(50.0)
            - special.gammaln(k)
        )
        return (np.exp(log) * returns).mean()

    grid = np.linspace(edge64(50.0, 1.0, 0.5), 50.0, 200_001)
    ok = [k for k in grid if estimate(k) >= 4.8]
    assert estimate(50.0) >= 4.8
    np.testing.assert_allclose(state.conc, min(ok), rtol=2e-3)
    assert edge64(50.0, 1.0, 0.5) + 0.5 < float(state.conc) < 49.9
    found = optimize.minimize(
        lambda k: kl64(k[0], 1.0), [49.9], method="trust-constr", bounds=[(2, 60)],
        constraints=[optimize.NonlinearConstraint(lambda k: kl64(k[0], 50.0), -np.inf, 0.5),
                     optimize.NonlinearConstraint(lambda k: estimate(k[0]), 4.8, np.inf)],
    )  # fmt: skip
    np.testing.assert_allclose(state.conc, found.x[0], rtol=5e-3)
    assert int(state.branch) == t.MOVED


def test_too_weak_a_student_freezes_it_even_after_better_days():
    config = t.TeacherConfig(j_lb=1.0)
    state = t.teacher_init(50.0, config)
    state = update(state, jnp.full(40, 0.05), jnp.full(40, 0.5), config)
    assert (float(state.conc), int(state.branch), bool(state.above)) == (50.0, t.FROZEN, False)
    state = update(state, jnp.full(40, 0.05), jnp.full(40, 2.0), config)
    assert bool(state.above)
    assert float(state.conc) < 50
    before = float(state.conc)
    state = update(state, jnp.full(40, 0.05), jnp.full(40, 0.5), config)
    assert (float(state.conc), int(state.branch), bool(state.above)) == (before, t.FROZEN, True)


def test_exploring_climbs_the_estimate_inside_the_trust_region(rng):
    config = t.TeacherConfig(j_lb=1e9, explore=True)
    temps = jnp.asarray(rng.gamma(50.0, 1e-3, 80), jnp.float32)
    up = update(t.teacher_init(50.0, config), temps, 100 * temps, config)
    down = update(t.teacher_init(50.0, config), temps, -100 * temps, config)
    for state in (up, down):
        assert int(state.branch) == t.EXPLORED
        assert kl64(float(state.conc), 50.0) <= 0.5 * 1.001

    def mean_at(k, sign):
        return float(t.iw_performance(k, 50.0, temps, sign * 100 * temps, 1000.0))

    assert mean_at(up.conc, 1) > mean_at(50.0, 1)
    assert mean_at(down.conc, -1) > mean_at(50.0, -1)
    # Once it was above, it is not tried again.
    state = up._replace(above=jnp.bool_(True))
    after = update(state, temps, temps, config)
    assert float(after.conc) == float(up.conc)


def test_pairs_are_collected_until_there_are_enough():
    config = t.TeacherConfig(min_pairs=30)
    state = t.teacher_init(50.0, config)
    for n in (10, 20):
        state = update(state, jnp.full(10, 0.05), jnp.ones(10), config)
        assert (int(state.count), int(state.branch), float(state.conc)) == (n, t.WAITED, 50.0)
    state = update(state, jnp.full(10, 0.05), jnp.ones(10), config)
    assert (int(state.count), int(state.branch)) == (0, t.MOVED)
    np.testing.assert_allclose(state.performance, 1.0)


@pytest.mark.parametrize(
    "bad", [{"rate": 0.0}, {"kl_eps": -1.0}, {"conc_target": np.inf}, {"min_pairs": 101}]
)
def test_bad_settings_name_themselves(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        t.teacher_init(50.0, t.TeacherConfig(**bad))
