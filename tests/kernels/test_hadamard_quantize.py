"""hadamard_quantize: every implementation against dense float64 matrices; orders against H H^T = n I."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qlab.kernels.common import layout
from qlab.kernels.hadamard_quantize import api, cost, matrices, pallas_gpu, pallas_tpu

# Of the norm of a block: float32 sums; of the value: one rounding to the dtype.
SUMS = 1e-6
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}


def make(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense64(k, block):
    """[K, K] in float64: block-diagonal, from scipy for powers of two."""
    n = block or k
    m, _ = matrices.decompose(n)
    h = scipy.linalg.hadamard(n) if m == 1 else matrices.dense(n)
    return np.kron(np.eye(k // n), h / np.sqrt(n))


def jitted(run, op, x, **options):
    """One compiled program instead of one an operation."""
    return jax.jit(lambda x: run(op, api.IMPLS, x, **options))(x)


# --- orders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 40, 56, 76, 108, 140, 148])
def test_rows_are_orthogonal(n):
    h = matrices.dense(n).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))


def test_orders():
    assert np.array_equal(matrices.dense(64), scipy.linalg.hadamard(64))
    sizes = {m << j for m in (1, 12, 20, 28) for j in range(12)}
    assert all(matrices.decompose(n) for n in sizes)
    assert not any(matrices.decompose(n) for n in (3, 6, 127, 4097, 11008))


# --- the plain transform ----------------------------------------------------------------------------

PLAIN = [
    ((3, 512), 0, "float32"),
    ((2, 3, 256), 32, "bfloat16"),
    ((5, 768), 0, "float32"),
    ((1, 12), 0, "float32"),
    ((3, 320), 160, "float16"),
    ((4, 1), 0, "float32"),
]


@pytest.mark.parametrize(("shape", "block", "dtype"), PLAIN)
def test_transform_and_inverse(run, shape, block, dtype):
    x = make(shape, dtype)
    h, x64 = dense64(shape[-1], block), np.asarray(x, np.float64)
    for inverse, want in ((False, x64 @ h.T), (True, x64 @ h)):
        y = jitted(run, api.hadamard, x, block=block, inverse=inverse)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        norm = np.linalg.norm(x64, axis=-1, keepdims=True)
        err = np.abs(np.asarray(y, np.float64) - want)
        assert (err <= SUMS * norm + ROUNDING[dtype] * np.abs(want)).all(), err.max()


def test_inverse_undoes_it(run):
    x = make((3, 480))
    there = jitted(run, api.hadamard, x, block=240)
    np.testing.assert_allclose(
        jitted(run, api.hadamard, there, block=240, inverse=True), x, atol=3e-6
    )


def test_gradient_is_the_transpose(run):
    x, c = make((2, 80)), make((2, 80), seed=1)
    grad = jax.jit(jax.grad(lambda x: (run(api.hadamard, api.IMPLS, x, block=20) * c).sum()))(x)
    np.testing.assert_allclose(grad, np.asarray(c, np.float64) @ dense64(80, 20), atol=3e-6)


# --- with quantization ------------------------------------------------------------------------------

QUANTIZED = [
    ((3, 1024), 0, 8, "float32"),
    ((5, 128), 0, 4, "bfloat16"),
    ((3, 768), 0, 4, "float32"),
    ((2, 2048), 512, 3, "float32"),
    ((2, 3, 128), 16, 8, "bfloat16"),
    ((3, 24), 12, 2, "float32"),
]


@pytest.mark.parametrize(("shape", "block", "bits", "dtype"), QUANTIZED)
def test_codes_and_scales(run, shape, block, bits, dtype):
    x, k = make(shape, dtype), shape[-1]
    codes, scale = jitted(run, api.hadamard_quantize, x, block=block, bits=bits)
    y = np.asarray(x, np.float64) @ dense64(k, block).T
    top = 2 ** (bits - 1) - 1
    assert scale.shape == (*shape[:-1], 1)
    np.testing.assert_allclose(scale, np.abs(y).max(-1, keepdims=True) / top, rtol=1e-5)
    if bits == 8:
        assert codes.dtype == jnp.int8
        got = np.asarray(codes, np.float64)
    else:
        assert codes.shape == (*shape[:-1], layout.row_bytes(k, bits))
        unsigned = layout.unpack(codes, k, bits)
        assert np.array_equal(layout.pack(unsigned, bits), codes)
        got = np.asarray(unsigned, np.float64) - 2 ** (bits - 1)
    u = y / np.asarray(scale, np.float64)
    tie = np.abs(np.abs(u - np.floor(u)) - 0.5) < 1e-5 * top  # sums in another order
    assert (np.abs(got - np.round(u)) <= tie).all()
    assert tie.mean() < 0.02
    decoded = api.decode(codes, scale, k, bits=bits)
    assert np.array_equal(decoded, np.float32(got) * np.asarray(scale))


def test_fake_is_the_decoded_codes_with_a_straight_through_gradient(run):
    x, c = make((3, 128)), make((3, 128), seed=1)

    def loss(x):
        y = run(api.hadamard_fake, api.IMPLS, x, bits=4)
        return (y * c).sum(), y

    grad, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    codes, scale = jitted(run, api.hadamard_quantize, x, bits=4)
    assert np.array_equal(y, api.decode(codes, scale, 128, bits=4))
    np.testing.assert_allclose(grad, np.asarray(c, np.float64) @ dense64(128, 0), atol=3e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_with_nan_or_inf_decodes_to_nan_and_spares_the_others(run, bad):
    x = make((3, 128)).at[1, 5].set(bad)
    codes, scale = jitted(run, api.hadamard_quantize, x)
    assert np.isinf(scale[1, 0])
    assert np.isfinite(scale[::2]).all()
    assert (np.asarray(codes[1]) == 0).all()
    assert np.isnan(api.decode(codes, scale, 128)[1]).all()
    assert not np.isfinite(jitted(run, api.hadamard, x, block=64)[1, :64]).any()


def test_zeros_and_an_empty_batch(run):
    codes, scale = jitted(run, api.hadamard_quantize, jnp.zeros((2, 64)))
    assert (np.asarray(codes) == 0).all()
    assert np.array_equal(scale, np.full((2, 1), 1e-8, np.float32))
    codes, scale = run(api.hadamard_quantize, api.IMPLS, jnp.zeros((0, 64)), bits=4)
    assert codes.shape == (0, 32)
    assert scale.shape == (0, 1)


def test_input_that_is_not_contiguous(run):
    wide = make((64, 6))
    x = jax.jit(lambda w: run(api.hadamard, api.IMPLS, w.T[::2]))(wide)
    assert np.array_equal(x, jitted(run, api.hadamard, jnp.asarray(np.asarray(wide).T[::2].copy())))


# --- what is refused --------------------------------------------------------------------------------

X = jnp.ones((2, 48))


@pytest.mark.parametrize(
    ("x", "options", "text"),
    [
        (X.astype(jnp.int32), {}, "x has dtype int32; use bfloat16 or float16 or float32"),
        (X[:, :0], {}, "at least one column"),
        (jnp.ones((1, 11008)), {}, r"order K=11008 .* nearest 10752 and 11136, or use block=256"),
        (X, dict(block=6), "order block=6 is known here; nearest 4 and 8, or use block=48"),
        (X, dict(block=32), "block=32 does not divide K=48; the largest that does is block=48"),
        (X, dict(block=-4), "block=-4; use 0 for the whole axis or the size of a block"),
        (X, dict(bits=1), "bits=1; use one of 2, 3"),
    ],
)
def test_bad_arguments_are_named_in_one_line(x, options, text):
    with pytest.raises(ValueError, match=text) as e:
        api.hadamard_quantize(x, **options)
    assert "\n" not in str(e.value)


def test_refusals_of_the_kernels():
    def why(module, k, **options):
        platform = module.IMPL.name[-3:]
        return module.why_not(api.spec_of(4, k, platform=platform, device="a device", **options))

    assert why(pallas_gpu, 4096, bits=4) == why(pallas_tpu, 4096, bits=4) == ""
    assert why(pallas_gpu, 14336) == why(pallas_tpu, 14336) == ""
    assert why(pallas_gpu, 12).startswith("block=12 is no a x c")
    assert "bytes of shared memory" in why(pallas_gpu, 16384, x_dtype="float32")
    assert "rows of a tile" in why(pallas_gpu, 96, block=16)
    assert "planes of 2 columns" in why(pallas_gpu, 16, bits=3)
    assert "no float16" in why(pallas_tpu, 4096, x_dtype="float16")
    assert why(pallas_tpu, 1792, block=28).startswith("block=28 is not whole slabs")
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        api.hadamard(jnp.ones((1, 64)), impl="pallas_gpu")


def test_bytes():
    x = make((4, 256), "bfloat16")
    moved = x.nbytes + sum(a.nbytes for a in api.hadamard_quantize(x, bits=4))
    assert cost.num_bytes(4, 256, bits=4) == moved
