import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import hamiltonians as hm
from qlab.quantum import zne
from qlab.quantum.ansatz import noisy_expval

LAMS = np.arange(1, 11) / 100  # NumPy: made before float64 is switched on


@pytest.fixture(scope="module")
def ladder():
    """The circuit theta_k = 0.1 k, k = 1..18, n = 3, L = 2, Z^3: E at LAMS and at 0."""
    with jax.enable_x64(True):  # a module's fixture comes before the folder's
        theta = 0.1 * (1 + jnp.arange(18.0)).reshape(3, 2, 3)
        e = jax.jit(jax.vmap(lambda l: noisy_expval(theta, l, l, hm.zn(3))))(
            jnp.concatenate([jnp.zeros(1), LAMS])
        )
    return np.asarray(e[1:]), float(e[0])


@pytest.mark.parametrize("degree", [0, 1, 2, 4, 9])
def test_richardson_is_exact_on_polynomials(degree):
    """d + 1 points, any polynomial of degree d; and not on degree d + 1."""
    rng = np.random.default_rng(degree)
    coeffs = rng.standard_normal(degree + 1)
    x = LAMS[: degree + 1]
    y = jnp.polyval(coeffs, x)
    tol = 1e-14 * float(jnp.abs(zne.richardson_weights(x)).sum())
    assert float(zne.richardson(x, y)) == pytest.approx(coeffs[-1], abs=max(tol, 1e-13))
    assert float(zne.richardson(x, y, 0.03)) == pytest.approx(
        float(jnp.polyval(coeffs, 0.03)), abs=1e-8
    )
    assert abs(float(zne.richardson(x, y + x ** (degree + 1)))) != pytest.approx(
        coeffs[-1], abs=1e-15
    )


@pytest.mark.parametrize(("points", "factor"), [(3, 19), (5, 251), (10, 184755)])
def test_richardson_variance_factor(points, factor):
    """sum_j w_j^2 for equally spaced lam: C(2m, m) - 1."""
    got = float((zne.richardson_weights(LAMS[:points]) ** 2).sum())
    assert got == pytest.approx(factor, rel=1e-9)


def test_richardson_variance_is_that_of_sampled_estimates():
    noise = jax.random.normal(jax.random.key(0), (200_000, 3))
    estimates = noise @ zne.richardson_weights(LAMS[:3])
    assert float(estimates.var()) == pytest.approx(19, rel=0.02)


@pytest.mark.parametrize("deg", [1, 2, 3])
def test_poly_is_numpys_polyfit(deg):
    rng = np.random.default_rng(deg)
    y = rng.standard_normal(10)
    want = np.polyval(np.polyfit(np.asarray(LAMS), y, deg), [0.0, 0.05, 0.2])
    np.testing.assert_allclose(
        zne.poly_zne(LAMS, jnp.asarray(y), deg, jnp.array([0.0, 0.05, 0.2])), want, atol=1e-9
    )


def test_leave_one_out_shortcut_is_leaving_one_out():
    y = np.random.default_rng(0).standard_normal(6)
    x = np.asarray(LAMS[:6])
    want = [
        y[i] - np.polyval(np.polyfit(np.delete(x, i), np.delete(y, i), 2), x[i]) for i in range(6)
    ]
    np.testing.assert_allclose(zne.loo_residuals(LAMS[:6], jnp.asarray(y), 2), want, atol=1e-9)


def test_poly_loo_finds_a_quadratic_and_never_needs_zero():
    y = 1.0 - 3.0 * LAMS + 5.0 * LAMS**2
    assert float(zne.poly_loo(LAMS, y)) == pytest.approx(1.0, abs=1e-9)
    # white noise on a straight line: the chosen fit is a long, low-degree one more often than not
    keys = jax.random.split(jax.random.key(1), 400)
    noisy = jax.vmap(lambda k: 1.0 - LAMS + 0.01 * jax.random.normal(k, (10,)))(keys)
    errors = jax.jit(jax.vmap(lambda e: zne.poly_loo(LAMS, e)))(noisy) - 1.0
    worst = 0.01 * float(jnp.sqrt((zne.richardson_weights(LAMS[:5]) ** 2).sum()))
    assert float(jnp.sqrt((errors**2).mean())) < worst / 3


survival_given = jax.jit(lambda y, a: zne.exp_zne(jnp.asarray(LAMS), y, a, survival=True))
survival_free = jax.jit(lambda y: zne.exp_zne(jnp.asarray(LAMS), y, None, survival=True))


@pytest.mark.parametrize("power", [1, 7, 30, 60])
@pytest.mark.parametrize("asymptote", [0.0, 0.3])
def test_exponential_is_exact_on_survival_probabilities(power, asymptote):
    """a + b (1 - lam)^K with x = -log(1 - lam), asymptote given or fitted."""
    y = jnp.asarray(asymptote - 0.7 * (1 - LAMS) ** power)
    given, free = survival_given(y, jnp.float64(asymptote)), survival_free(y)
    assert given.ok
    assert float(given.value) == pytest.approx(asymptote - 0.7, abs=1e-9)
    assert free.ok
    assert float(free.value) == pytest.approx(asymptote - 0.7, abs=1e-6)


def test_exponential_in_lam_and_at_other_points():
    at = jnp.array([0.0, 0.055, 0.3])
    want = 0.2 + 0.5 * np.exp(-11.0 * np.asarray(at))
    y = 0.2 + 0.5 * jnp.exp(-11.0 * LAMS)
    np.testing.assert_allclose(zne.exp_zne(LAMS, y, None, at).value, want, atol=1e-7)
    np.testing.assert_allclose(zne.exp_zne(LAMS, y, jnp.float64(0.2), at).value, want, atol=1e-9)


def test_exponential_is_the_least_squares_fit_of_scipy():
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(3)
    x = np.asarray(LAMS)
    y = 0.1 + 0.6 * np.exp(-15 * x) + 0.003 * rng.standard_normal(10)
    popt, _ = curve_fit(lambda v, a, b, c: a + b * np.exp(-c * v), x, y, p0=(0.1, 0.6, 15))
    got = zne.exp_zne(LAMS, jnp.asarray(y))
    assert got.ok
    assert float(got.value) == pytest.approx(popt[0] + popt[1], abs=1e-5)


def test_exponential_that_cannot_be_fitted_says_so_and_stays_finite():
    """A single outlier in a flat curve drives the rate to infinity: the linear fit, flagged."""
    y = jnp.zeros(10).at[0].set(1.0)
    fit = zne.exp_zne(LAMS, y, None)
    assert not fit.ok
    assert float(fit.value) == pytest.approx(float(zne.poly_zne(LAMS, y, 1)))
    constant = zne.exp_zne(LAMS, jnp.full(10, 0.4), None)
    assert np.isfinite(constant.value)


def test_gp_against_scikit_learn():
    """The same kernel and noise: the same posterior mean, and the same evidence up to the profiled variance."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    rng = np.random.default_rng(0)
    y = np.exp(-20 * np.asarray(LAMS)) + 0.02 * rng.standard_normal(10)
    z, x = (y - y.mean()) / y.std(), np.asarray(LAMS / (LAMS[-1] - LAMS[0]))[:, None]
    floor = 20 * 10 * np.finfo(float).eps
    best = (-np.inf, 0.0)
    for length in zne.GP_LENGTHS:
        for noise in zne.GP_NOISES:
            k = np.exp(-0.5 * ((x - x.T) / length) ** 2) + (noise + floor) * np.eye(10)
            variance = z @ np.linalg.solve(k, z) / 10
            kernel = ConstantKernel(variance) * RBF(length) + WhiteKernel(
                variance * (noise + floor)
            )
            gp = GaussianProcessRegressor(kernel, optimizer=None, alpha=1e-14)
            try:
                gp.fit(x, z)
            except np.linalg.LinAlgError:
                continue
            evidence = gp.log_marginal_likelihood_value_
            if evidence > best[0]:
                best = (evidence, float(gp.predict(np.zeros((1, 1)))[0]))
    got = zne.gp_zne(LAMS, jnp.asarray(y))
    assert got.ok
    assert float(got.value) == pytest.approx(y.mean() + y.std() * best[1], abs=1e-6)


def test_measured_magnitudes(ladder):
    """Known errors of this circuit: raw 3.8e-2, linear on five 1.4e-2, quadratic 1.4e-3, Richardson-3 5.4e-4."""
    y, ideal = jnp.asarray(ladder[0]), ladder[1]
    assert abs(float(y[0]) - ideal) == pytest.approx(3.80e-2, rel=0.01)
    assert abs(float(zne.poly_zne(LAMS[:5], y[:5], 1)) - ideal) == pytest.approx(1.39e-2, rel=0.01)
    assert abs(float(zne.poly_zne(LAMS[:5], y[:5], 2)) - ideal) == pytest.approx(1.37e-3, rel=0.01)
    assert abs(float(zne.richardson(LAMS[:3], y[:3])) - ideal) == pytest.approx(5.41e-4, rel=0.01)
    assert abs(float(zne.richardson(LAMS, y)) - ideal) < 1e-8


@pytest.mark.parametrize(
    "name",
    [
        "raw",
        "linear",
        "quadratic",
        "cubic",
        "richardson",
        "exp_fixed",
        "exp_free",
        "exp_survival",
        "poly_loo",
        "gp",
    ],
)
def test_every_estimator_by_name(name, ladder):
    """Beats (or is) the raw point on a smooth curve, maps over curves, and gives the fit at other points."""
    y, ideal = jnp.asarray(ladder[0]), ladder[1]
    at = jnp.array([0.0, 0.05])
    fit = zne.fit_curves(name, LAMS, jnp.stack([y, -y]), jnp.float64(0), at)
    assert fit.value.shape == (2, 2)
    assert fit.ok.all()
    np.testing.assert_allclose(
        fit.value[0], -fit.value[1], atol=1e-6
    )  # all are odd in the energies
    assert abs(float(fit.value[0, 0]) - ideal) <= abs(float(y[0]) - ideal) * 1.3
    assert float(fit.value[0, 1]) == pytest.approx(float(y[4]), abs=2e-2)


def test_a_bias_that_does_not_scale_survives():
    """E(lam) + constant: every linear estimator returns E(0) + constant."""
    y = 1 - 2 * LAMS
    for name in ("linear", "cubic", "richardson", "poly_loo"):
        fit = zne.fit_curves(name, LAMS, (y + 0.05)[None], jnp.float64(0), jnp.zeros(1))
        assert float(fit.value[0, 0]) == pytest.approx(1.05, abs=1e-8)


def test_flat_curve_is_returned_as_it_is():
    """What dephasing after the last gate leaves <Z>: every estimator gives the raw value."""
    y = jnp.full((1, 10), 0.3)
    for name in ("linear", "cubic", "richardson", "exp_fixed", "exp_free", "poly_loo", "gp"):
        fit = zne.fit_curves(name, LAMS, y, jnp.float64(0), jnp.zeros(1))
        assert float(fit.value[0, 0]) == pytest.approx(0.3, abs=1e-9), name


def test_bad_names_and_degrees():
    with pytest.raises(UserError, match="one of raw"):
        zne.estimator("magic")
    with pytest.raises(UserError, match="needs 4 points"):
        zne.poly_zne(LAMS[:3], LAMS[:3], 3)


def test_against_mitiq():
    """Mitiq's factories on the same scale factors and values."""
    inference = pytest.importorskip("mitiq.zne.inference")
    x = np.asarray(LAMS[:5] / LAMS[0])
    y = 0.9 * np.exp(-0.12 * x) + 0.01 * np.cos(3 * x)
    lams, values = jnp.asarray(x), jnp.asarray(y)
    assert float(zne.poly_zne(lams, values, 1)) == pytest.approx(
        inference.LinearFactory.extrapolate(x, y), abs=1e-8
    )
    assert float(zne.poly_zne(lams, values, 2)) == pytest.approx(
        inference.PolyFactory.extrapolate(x, y, 2), abs=1e-8
    )
    assert float(zne.richardson(lams, values)) == pytest.approx(
        inference.RichardsonFactory.extrapolate(x, y), abs=1e-8
    )
    clean = 0.9 * np.exp(-0.12 * x)  # where all exponential fits must agree
    want = inference.ExpFactory.extrapolate(x, clean, asymptote=0.0)
    assert float(zne.exp_zne(lams, jnp.asarray(clean), jnp.float64(0)).value) == pytest.approx(
        want, abs=1e-5
    )
