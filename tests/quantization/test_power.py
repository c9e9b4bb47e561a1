"""The power quantizer and powers of two against closed forms and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization.power import (
    fit_power,
    from_power,
    log2_map,
    log2_scale,
    log2_unmap,
    power_decode,
    power_encode,
    power_scale,
    to_power,
)
from qlab.quantization.quantizers import uniform


@pytest.fixture
def w():
    return jnp.asarray(np.random.default_rng(0).standard_normal((5, 33)), jnp.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exponent_one_is_the_uniform_symmetric_quantizer(w, bits):
    q = uniform(bits, symmetric=True)  # its lowest code -2^(b-1) is not reached from min/max
    params = q.init(w)
    scale = power_scale(w, 1.0, bits, axis=0)
    codes = power_encode(w, 1.0, scale, bits)
    np.testing.assert_array_equal(scale, params.scale)
    np.testing.assert_array_equal(codes, q.encode(params, w))
    np.testing.assert_array_equal(power_decode(codes, 1.0, scale, bits), q.decode(params, q.encode(params, w)))  # fmt: skip


@pytest.mark.parametrize("a", [0.4, 0.5, 0.75, 1.0])
def test_decoded_levels_in_float64(w, a):
    bits, n = 4, 7
    s = float(power_scale(w, a, bits).item())
    codes = np.asarray(power_encode(w, a, s, bits), np.int64)
    x = np.asarray(w, np.float64)
    t = np.sign(x) * np.abs(x) ** a
    want = np.clip(np.rint(t / s), -n, n)
    assert (np.abs(codes - want) <= 1).all()
    assert (codes == want).mean() > 0.99  # float32 may round a tie otherwise
    values = np.sign(codes) * (np.abs(codes) * s) ** (1 / a)
    np.testing.assert_allclose(power_decode(jnp.asarray(codes), a, s), values, rtol=2e-6)
    # codes of decoded values are the codes
    again = power_encode(power_decode(jnp.asarray(codes), a, s), a, s, bits)
    np.testing.assert_array_equal(again, codes)


def test_zero_stays_zero_and_small_values_get_more_levels():
    x = jnp.linspace(-1, 1, 2001)
    for a in (0.4, 1.0):
        assert power_decode(power_encode(jnp.zeros(3), a, 0.1, 4), a, 0.1).tolist() == [0.0] * 3
    low = np.unique(power_decode(power_encode(x, 0.5, 1 / 7, 4), 0.5, 1 / 7))
    assert (np.abs(low) < 0.25).sum() == 7  # (k / 7)^2 < 1/4: k = 0..3
    even = np.unique(power_decode(power_encode(x, 1.0, 1 / 7, 4), 1.0, 1 / 7))
    assert (np.abs(even) < 0.25).sum() == 3


def test_slope_of_the_map_back():
    grad = jax.vmap(jax.grad(from_power), (0, None))
    t = jnp.array([-2.0, 0.0, 0.5])
    np.testing.assert_allclose(grad(t, 1.0), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(grad(t, 0.5), [4.0, 0.0, 1.0])
    np.testing.assert_allclose(from_power(to_power(t, 0.5), 0.5), t, rtol=1e-6)


@pytest.mark.parametrize("shares", [1, 10])
def test_fit_finds_the_least_error_of_all_candidates(w, shares):
    exponents, bits, n = (0.4, 0.6, 0.8, 1.0), 3, 3
    fit = fit_power(w, bits, exponents, axis=0, shares=shares)
    x = np.asarray(w, np.float64)
    total = {}
    for a in exponents:
        t = np.sign(x) * np.abs(x) ** a
        rows = []
        for row, target in zip(t, x, strict=True):
            errors = []
            for i in range(shares):
                s = np.abs(row).max() / n * (shares - i) / shares
                q = np.clip(np.rint(row / s), -n, n)
                errors.append(((np.sign(q) * (np.abs(q) * s) ** (1 / a) - target) ** 2).sum())
            rows.append(min(errors))
        total[a] = sum(rows)
    best = min(total, key=lambda a: total[a])
    assert float(fit.a) == np.float32(best)
    np.testing.assert_allclose(float(fit.error), total[best], rtol=1e-4)
    x_hat = power_decode(power_encode(w, fit.a, fit.scale, bits), fit.a, fit.scale)
    np.testing.assert_allclose(((x_hat - w) ** 2).sum(), total[best], rtol=1e-4)


def test_a_power_grid_fits_peaked_weights_better(w):
    peaked = w**3
    one = fit_power(peaked, 4, (1.0,), axis=0)
    assert float(fit_power(peaked, 4, axis=0).error) < 0.7 * float(one.error)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"bits=1"):
        power_encode(jnp.ones(3), 0.5, 1.0, 1)
    with pytest.raises(ValueError, match="exponents in"):
        fit_power(jnp.ones((1, 3)), 4, (0.0, 1.0))


def test_powers_of_two_are_met_exactly():
    x = jnp.array([[1.0, -0.5, 0.25, 0.125, -0.0625]])
    scale = log2_scale(x, 4, axis=0)
    k = jnp.clip(jnp.round(log2_map(x, scale)), 0, 7)
    assert k.tolist() == [[0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(log2_unmap(k, x, scale), x)
    # rounding is to the nearest exponent: 0.75 lies above sqrt(1/2)
    y = jnp.array([[1.0, 0.75, 0.70]])
    assert jnp.round(log2_map(y, 1.0)).tolist() == [[0, 0, 1]]
