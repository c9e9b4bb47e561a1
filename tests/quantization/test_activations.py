"""Activation records against NumPy, closed forms and their own definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import activations as act
from qlab.quantization.activations import Affine, Log, PerToken, search_range

# A primitive at a time would compile ten times as many programs.
encode, decode, fake = jax.jit(act.encode), jax.jit(act.decode), jax.jit(act.fake)
affine = jax.jit(act.affine, static_argnames=("symmetric", "widen"))
minmax, quantile = (jax.jit(f, static_argnames="per") for f in (act.minmax, act.quantile))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"widen": False}])
def test_fake_is_decode_of_encode_and_within_half_a_step(bits, per, options):
    x = np.random.default_rng(bits).standard_normal((40, 3)) * (0.1, 1.0, 5.0) + 2.0
    x = x.astype(np.float32)
    record = affine(*minmax(x, per=per), bits, **options)
    codes = encode(record, x)
    x_hat = fake(record, x)
    np.testing.assert_array_equal(x_hat, decode(record, codes))
    np.testing.assert_array_equal(fake(record, x_hat), x_hat)  # idempotent
    assert codes.min() >= record.q_min
    assert codes.max() <= record.q_max
    np.testing.assert_array_equal(codes, np.round(codes))
    # the zero point is rounded too, so an end of the range may lie half a step outside the rails
    assert np.all(np.abs(x_hat - x) <= np.asarray(record.scale) * (1 + 1e-5))
    if options.get("widen", True):
        assert float(jnp.abs(fake(record, jnp.zeros((1, 3)))).max()) == 0.0


def test_affine_against_numpy_and_32_bits_is_the_identity():
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    record = affine(*minmax(jnp.asarray(x)), 4)
    lo, hi = x.min(), x.max()
    s = (hi - lo) / 15
    z = np.round(-lo / s)
    want = s * (np.clip(np.round(x / s) + z, 0, 15) - z)
    np.testing.assert_allclose(fake(record, jnp.asarray(x)), want, atol=1e-5)
    for sym in (False, True):
        wide = affine(*minmax(jnp.asarray(x)), 32, symmetric=sym)
        np.testing.assert_array_equal(fake(wide, jnp.asarray(x)), x)
    np.testing.assert_array_equal(fake(PerToken(jnp.float32(32)), jnp.asarray(x)), x)


def test_gradient_is_one_inside_and_on_the_rails_else_zero():
    record = Affine(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(0.0), jnp.float32(3.0))
    slope = jax.jit(jax.vmap(jax.grad(lambda v: act.fake(record, v))))
    grad = slope(np.float32([-0.7, -0.2, 1.3, 3.4, 3.6]))
    assert grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    dead = affine(jnp.zeros(()), jnp.zeros(()), 8)  # a channel that is always 0
    assert float(fake(dead, jnp.zeros(()))) == 0.0
    assert np.isfinite(float(fake(dead, jnp.ones(()))))


def test_per_token_uses_each_rows_own_range():
    x = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    np.testing.assert_allclose(fake(PerToken(jnp.float32(2)), x), x, rtol=1e-6)


@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("zero_code", ["repo", "reserve"])
def test_log_codes(per_octave, zero_code):
    r = Log(jnp.float32(0.7), jnp.float32(16.0), per_octave, zero_code)
    q = jnp.arange(16 if zero_code == "repo" else 15, dtype=jnp.float32)
    np.testing.assert_allclose(
        decode(r, q), 0.7 * 2.0 ** (-np.arange(len(q)) / per_octave), rtol=1e-6
    )
    np.testing.assert_array_equal(encode(r, decode(r, q)), q)
    none = 16.0 if zero_code == "repo" else 15.0
    assert encode(r, jnp.array([0.0, 1e-30, 2.0])).tolist() == [none, none, 0.0]
    assert decode(r, jnp.array(none)) == 0.0
    x = np.random.default_rng(0).random(50, np.float32)
    np.testing.assert_array_equal(fake(r, x), decode(r, encode(r, x)))
    assert jax.jit(jax.grad(lambda v: act.fake(r, v)))(0.3) == 1.0


def test_quantile_and_search():
    x = np.arange(1001, dtype=np.float32)[:, None] * np.float32([1, -1])
    lo, hi = quantile(x, 0.999, per="channel")
    np.testing.assert_allclose(lo, [1.0, -999.0], atol=1e-2)
    np.testing.assert_allclose(hi, [999.0, -1.0], atol=1e-2)
    z = np.random.default_rng(0).standard_normal((501, 1)).astype(np.float32)
    z[-1] = 50.0
    shares = np.linspace(0.05, 1.0, 40, dtype=np.float32)
    lo, hi = jax.jit(partial(search_range, p=1.0))(z, 3, *minmax(z), shares)
    errors = [np.abs(fake(affine(z.min() * s, z.max() * s, 3), z) - z).mean() for s in shares]
    np.testing.assert_allclose(hi / z.max(), shares[int(np.argmin(errors))], rtol=1e-6)
    assert hi < 0.5 * z.max()
