"""int8_matmul: the integers of every implementation against int64 NumPy, the rest against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.kernels.common import dispatch
from qlab.kernels.int8_matmul import api, cost, epilogue, pallas_gpu, pallas_tpu

# Relative to |x_scale w_scale sum| + |bias|: roundings of the sum, two products, a bias, and of y.
TOLERANCE = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}


def codes(rng, *shape):
    return rng.integers(-128, 128, shape).astype(np.int8)


def exact(x, w, zx=0, zw=0):
    """int64[M, N] from codes and zero points [M, 1], [N]."""
    return (x.astype(np.int64) - zx) @ (w.astype(np.int64) - np.asarray(zw)[..., None]).T


def activate(y, name):
    if name == "relu":
        return np.maximum(y, 0)
    if name == "gelu":
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y / (1 + np.exp(-y)) if name == "silu" else y


def product(run, *args, **options):
    return np.asarray(run(api.int8_matmul, api.IMPLS, *args, **options))


@pytest.mark.parametrize(
    ("m", "k", "n", "zeros"),
    [(1, 1, 1, "xw"), (3, 127, 5, ""), (2, 4097, 3, "x"), (127, 300, 70, "w")],
)
def test_integers_are_exact_in_every_implementation(run, m, k, n, zeros, rng):
    x, w = codes(rng, m, k), codes(rng, n, k)
    x[0], w[0] = -128, -128  # sums beyond 2^24, where a float accumulator would round
    zx = codes(rng, m, 1) if "x" in zeros else None
    zw = codes(rng, n) if "w" in zeros else None
    y = product(run, x, w, None, None, zx, zw, out_dtype=jnp.int32)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, exact(x, w, 0 if zx is None else zx, 0 if zw is None else zw))


@pytest.mark.parametrize(("zeros", "k"), [("", 131071), ("w", 65793), ("xw", 33025)])
def test_the_longest_sums_do_not_overflow(run, zeros, k):
    if run.impl == "pallas_gpu":
        pytest.skip("hundreds of interpreted steps; the sum is the same as in the shorter test")
    x, w = np.full((1, k), -128, np.int8), np.full((1, k), -128, np.int8)
    zx = np.int8(127) if "x" in zeros else None
    zw = np.full(1, 127, np.int8) if "w" in zeros else None
    y = product(run, x, w, None, None, zx, zw, out_dtype=jnp.int32)
    assert y.item() == k * (255 if "x" in zeros else 128) * (255 if "w" in zeros else 128)


@pytest.mark.parametrize(
    ("activation", "dtype", "shape"),
    [
        ("relu", "bfloat16", (70, 40, 24)),
        ("gelu", "float16", (5, 40, 24)),
        ("silu", "float32", (5, 40, 24)),
    ],
)
def test_the_epilogue(run, activation, dtype, shape, rng):
    m, k, n = shape
    x, w, zx, zw = codes(rng, m, k), codes(rng, n, k), codes(rng, m, 1), codes(rng, n, 1)
    sx = rng.uniform(1e-3, 1e-2, (m, 1)).astype(np.float32)
    sw = rng.uniform(1e-3, 1e-2, (n, 1)).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32)
    y = product(
        run, x, w, sx, sw, zx, zw, bias, activation=activation, out_dtype=dtype
    )  # fmt: skip
    assert y.dtype == jnp.dtype(dtype)
    before = exact(x, w, zx, zw[:, 0]) * sx.astype(np.float64) * sw[:, 0].astype(np.float64)
    size = np.abs(before) + np.abs(bias)
    want = activate(before + bias, activation)
    assert (np.abs(y.astype(np.float64) - want) <= TOLERANCE[dtype] * size + 1e-7).all()


def test_scalars_leading_axes_strides_and_a_known_sum(run, rng):
    x, w = codes(rng, 2, 3, 80)[..., ::2], codes(rng, 40, 9).T  # neither is contiguous
    sx, zx, zw = np.float32(0.01), np.int8(-5), codes(rng, 9)
    sw = rng.uniform(0.01, 0.1, 9).astype(np.float32)
    w_sum = w.sum(1, dtype=np.int32)
    y = product(run, x, w, sx, sw, zx, zw, w_sum=w_sum)
    want = exact(x.reshape(6, 40), w, zx, zw).reshape(2, 3, 9) * np.float64(sx) * sw
    np.testing.assert_allclose(y, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 64, 8), (2, 64, 0), (2, 0, 8)])
def test_nothing_to_multiply(run, shape):
    m, k, n = shape
    x, w = np.zeros((m, k), np.int8), np.zeros((n, k), np.int8)
    y = product(run, x, w, 1.0, np.ones(n, np.float32), None, None, np.ones(n, np.float32))
    np.testing.assert_array_equal(y, np.ones((m, n)))
    f = np.zeros((m, k), np.float32)
    y = run(api.int8_dynamic_matmul, api.IMPLS, f, w, np.ones(n, np.float32))
    np.testing.assert_array_equal(y, np.zeros((m, n)))


# ---- dynamic activation scales


def test_token_codes_are_the_nearest_to_even(rng):
    x = np.concatenate([rng.normal(size=(20, 33)) * 10.0 ** rng.integers(-12, 30, (20, 1))])
    x = np.concatenate([x, np.zeros((1, 33)), [np.arange(33) - 16.5]]).astype(np.float32)
    x[-1, 0] = 127.0  # scale 1: all others lie half way
    q, scale = jax.jit(epilogue.quantize_tokens)(x)
    want = np.maximum(np.abs(x.astype(np.float64)).max(1) / 127, 1e-8)
    np.testing.assert_allclose(scale, want, rtol=3e-7)
    u = x / want[:, None]
    tie = np.abs(np.abs(u - np.floor(u)) - 0.5) < 1e-4
    tie[-1] = False
    off = np.abs(np.asarray(q, np.int64) - np.round(u))
    assert (off[~tie] == 0).all()
    assert off.max() <= 1
    assert np.abs(np.asarray(q, np.int64)).max() == 127


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dynamic_is_static_on_the_tokens_codes(run, dtype, rng):
    x = jnp.asarray(rng.normal(size=(3, 2, 40)), dtype)
    w, zw, bias = codes(rng, 24, 40), codes(rng, 24), rng.normal(size=24).astype(np.float32)
    sw = rng.uniform(1e-3, 1e-2, 24).astype(np.float32)
    y = run(api.int8_dynamic_matmul, api.IMPLS, x, w, sw, zw, bias)
    assert y.dtype == x.dtype
    assert y.shape == (3, 2, 24)
    q, s = jax.jit(epilogue.quantize_tokens)(x.reshape(6, 40))
    before = exact(np.asarray(q), w, 0, zw) * np.asarray(s, np.float64)[:, None] * sw
    y = np.asarray(y, np.float64).reshape(6, 24)
    size = np.abs(before) + np.abs(bias)
    assert (np.abs(y - before - bias) <= TOLERANCE[dtype] * size).all()
    # Against the unquantized product: half a step for each element of x.
    x64, w_hat = (
        np.asarray(x, np.float64).reshape(6, 40),
        (w.astype(float) - zw[:, None]) * sw[:, None],
    )
    half = 0.5 * np.abs(x64).max(1, keepdims=True) / 127 * np.abs(w_hat).sum(1)
    assert (np.abs(y - bias - x64 @ w_hat.T) <= 1.001 * half + TOLERANCE[dtype] * size).all()


def test_a_token_with_nan_or_inf_is_nan_and_alone(run, rng):
    x = rng.normal(size=(4, 40)).astype(np.float32)
    x[0, 3], x[1, 5] = np.nan, -np.inf
    q, scale = epilogue.quantize_tokens(jnp.asarray(x))
    assert np.isnan(scale[:2]).all()  # and codes that need no conversion of a NaN
    assert not np.asarray(q)[:2].any()
    w = codes(rng, 8, 40)
    y = run(api.int8_dynamic_matmul, api.IMPLS, x, w, np.ones(8, np.float32), activation="relu")
    assert np.isnan(np.asarray(y)[:2]).all()
    assert np.isfinite(np.asarray(y)[2:]).all()


# ---- gradients


def test_gradient_of_the_static_entry(rng):
    m, k, n = 4, 30, 6
    x, w, zx, zw = codes(rng, m, k), codes(rng, n, k), codes(rng, m, 1), codes(rng, n)
    sw, bias, dy = (rng.normal(size=s).astype(np.float32) for s in (n, n, (m, n)))
    acc = exact(x, w, zx, zw).astype(np.float64)

    def loss(sx, sw, bias, impl):
        y = api.int8_matmul(x, w, sx, sw, zx, zw, bias, impl=impl)
        return (y * dy).sum()

    for sx in (np.float32(0.1), rng.normal(size=(m, 1)).astype(np.float32)):
        got = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(sx), sw, bias, "reference")
        by_token = (dy * acc * sw).sum(1, keepdims=True)
        np.testing.assert_allclose(got[0], by_token if sx.ndim else by_token.sum(), rtol=1e-5)
        np.testing.assert_allclose(got[1], (dy * acc * sx).sum(0), rtol=1e-4)
        np.testing.assert_allclose(got[2], dy.sum(0), rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradient_of_the_dynamic_entry_is_straight_through(activation, rng):
    m, k, n = 4, 30, 6
    x, w, zw = rng.normal(size=(m, k)).astype(np.float32), codes(rng, n, k), codes(rng, n)
    sw, bias, dy = (rng.normal(size=s).astype(np.float32) for s in (n, n, (m, n)))
    q, s = (np.asarray(a, np.float64) for a in epilogue.quantize_tokens(jnp.asarray(x)))

    def loss(x, sw, bias):
        y = api.int8_dynamic_matmul(x, w, sw, zw, bias, activation=activation)
        return (y * dy).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, sw, bias)
    int_w = w.astype(np.float64) - zw[:, None]
    y = (q * s[:, None]) @ (int_w * sw[:, None]).T + bias
    d = dy * (y > 0) if activation else dy.astype(np.float64)
    np.testing.assert_allclose(got[0], d @ (int_w * sw[:, None]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], (d * ((q * s[:, None]) @ int_w.T)).sum(0), rtol=1e-4)
    np.testing.assert_allclose(got[2], d.sum(0), rtol=1e-5)


def test_codes_have_no_gradient():
    x, w, one = jnp.ones((2, 8), jnp.int8), jnp.ones((3, 8), jnp.int8), jnp.ones(3)
    y, back = jax.vjp(lambda x, w: api.int8_matmul(x, w, 1.0, one), x, w)
    assert [g.dtype for g in back(y)] == [jax.dtypes.float0] * 2
    assert [g.shape for g in back(y)] == [(2, 8), (3, 8)]


# ---- arguments


X, W, S1 = np.zeros((2, 16), np.int8), np.zeros((4, 16), np.int8), np.ones(4, np.float32)
LONG = np.zeros((1, 33026), np.int8)
BAD = {
    "x_codes has dtype uint8; use int8": dict(x_codes=X.astype(np.uint8)),
    "w_codes has dtype float32; use int8": dict(w_codes=W.astype(np.float32)),
    r"w_codes has shape \(4, 8\), expected \(\*, 16\)": dict(w_codes=W[:, :8]),
    r"x_scale has shape \(2,\), expected \(2, 1\)": dict(x_scale=np.ones(2, np.float32)),
    "x_scale has dtype float16; use float32": dict(x_scale=np.ones((2, 1), np.float16)),
    "x_scale is None": dict(x_scale=None),
    r"w_scale has shape \(3,\), expected \(4,\) or \(4, 1\)": dict(w_scale=S1[:3]),
    "x_zero has dtype int32; use int8": dict(x_zero=np.zeros((2, 1), np.int32)),
    r"w_zero has shape \(1, 4\)": dict(w_zero=np.zeros((1, 4), np.int8)),
    r"bias has shape \(2,\), expected \(4\)": dict(bias=np.zeros(2, np.float32)),
    r"w_sum has dtype int8; use int32": dict(w_sum=np.zeros(4, np.int8)),
    "activation='tanh'; use one of None, 'relu'": dict(activation="tanh"),
    "out_dtype='int8'; use one of 'bfloat16'": dict(out_dtype=jnp.int8),
    "bias is given with out_dtype=int32": dict(
        x_scale=None, w_scale=None, bias=S1, out_dtype=jnp.int32
    ),
    "K=33026 could overflow int32 here; use K <= 33025": dict(
        x_codes=LONG,
        w_codes=LONG,
        x_scale=1.0,
        w_scale=S1[:1],
        x_zero=np.int8(1),
        w_zero=LONG[0, :1],
    ),
    "impl='triton': int8_matmul has reference, xla": dict(impl="triton"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = dict(x_codes=X, w_codes=W, x_scale=np.ones((2, 1), np.float32), w_scale=S1)
    with pytest.raises(ValueError, match=message):
        api.int8_matmul(**{**good, **BAD[message]})


def test_bad_arguments_of_the_dynamic_entry():
    with pytest.raises(ValueError, match="x has dtype int8; use bfloat16 or float16 or float32"):
        api.int8_dynamic_matmul(X, W, S1)
    with pytest.raises(ValueError, match="out_dtype=int32 loses the token scales"):
        api.int8_dynamic_matmul(X.astype(np.float32), W, S1, out_dtype=jnp.int32)


def test_who_runs_and_who_refuses_why():
    def choice(impl=None, **at):
        return dispatch.choose(api.IMPLS, api.spec_of(64, 512, 512, **at), impl)

    assert choice(platform="cpu").name == "xla"
    assert choice(platform="gpu", device="NVIDIA H200").name == "pallas_gpu"
    assert choice(platform="tpu", device="TPU v5 lite").name == "pallas_tpu"
    for at, why in [
        (dict(platform="gpu", device="NVIDIA B200"), "no Hopper GPU"),
        (dict(platform="tpu", device="TPU v4"), "TPU v4 does not multiply int8"),
    ]:
        assert why in choice(**at).refused[0][1]
        assert choice(**at).name == "xla"
    with pytest.raises(NotImplementedError, match="pallas_gpu: needs a GPU, the device is cpu"):
        api.int8_matmul(X, W, 1.0, S1, impl="pallas_gpu")


def test_blocks_fit_and_count():
    for m, k, n in [(1, 64, 64), (64, 8192, 8192), (65, 300, 100), (8192, 8192, 28672)]:
        for out in ("bfloat16", "float32"):
            spec = api.spec_of(m, k, n, out=out, interpret=True)
            assert pallas_gpu.why_not(spec) == ""
            assert pallas_tpu.why_not(spec) == ""
    assert cost.flops(2, 3, 5) == 60
    assert cost.num_bytes(2, 3, 5, out="float32", bias=True) == 6 + 15 + 8 + 20 + 20 + 40


def test_jit_vmap_and_no_second_compile(rng):
    x, w = codes(rng, 3, 2, 16), codes(rng, 3, 4, 16)
    sw = np.ones((3, 4), np.float32)
    f = jax.jit(jax.vmap(lambda x, w, s: api.int8_matmul(x, w, 1.0, s)))
    want = np.stack([exact(a, b) for a, b in zip(x, w, strict=True)])
    np.testing.assert_array_equal(f(x, w, sw), want)
    f(x[::-1], w, sw)
    assert f._cache_size() == 1
