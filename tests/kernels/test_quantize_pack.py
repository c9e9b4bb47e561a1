"""quantize_pack: every implementation against float64 NumPy, the house's fake and independent random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from qlab.kernels.common import grid, layout
from qlab.kernels.quantize_pack import api, cost, pallas_gpu, pallas_tpu

KEY = jax.random.key(7)


def make(n, k, dtype="float32", seed=0):
    """Rows of unlike size, some one-signed, one all zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, k)) * 10.0 ** rng.uniform(-2, 2, (n, 1))
    x[1::4] = np.abs(x[1::4])
    x[3::8] = 0
    return jnp.asarray(x, dtype)


def grid64(x, bits, group, calibration):
    """(scale, zero or None) in float64, [N, G]."""
    x = np.asarray(x, np.float64)
    x = x.reshape(x.shape[0], layout.num_groups(x.shape[1], group), -1)
    if calibration == "absmax":
        return np.maximum(np.abs(x).max(-1) / max(2 ** (bits - 1) - 1, 1), 1e-8), None
    lo, hi = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = np.maximum((hi - lo) / (2**bits - 1), 1e-8)
    return scale, np.clip(np.round(-lo / scale), 0, 2**bits - 1)


def jitted(run, *arrays, **options):
    """One compiled program instead of one an operation."""
    return jax.jit(lambda *a: run(api.quantize_pack, api.IMPLS, *a, **options))(*arrays)


def check(run, n, k, dtype="float32", **options):
    """Grid to 2 ulp; codes are those of float64 on the returned grid, but for x / scale at a tie."""
    x = make(n, k, dtype)
    got = jitted(run, x, **options)
    bits, group = options["bits"], options.get("group", 0)
    calibration, num = options.get("calibration", "absmax"), layout.num_groups(k, group)
    assert got.codes.shape == (n, layout.row_bytes(k, bits, group))
    assert got.codes.dtype == jnp.uint8
    scale, zero = grid64(x, bits, group, calibration)
    assert got.scale.shape == (n, num)
    np.testing.assert_allclose(got.scale, scale, rtol=3e-7)  # two roundings of 2^-24 each
    assert (zero is None) == (got.zero is None)
    if zero is not None:
        np.testing.assert_allclose(got.zero, zero, atol=1)  # -lo / scale may be at a tie
        zero = np.asarray(got.zero, np.float64)
    codes = np.asarray(layout.unpack(got.codes, k, bits, group), np.float64)
    wide = [None if a is None else np.repeat(a, k // num, 1) for a in (np.asarray(got.scale), zero)]
    u = np.asarray(x, np.float64) / wide[0]
    low = 2 ** (bits - 1) if zero is None else wide[1]
    want = np.clip(np.round(u) + low, 0, 2**bits - 1)
    tie = (
        np.abs(np.abs(u - np.floor(u)) - 0.5) < 1e-5
    )  # the float32 quotient may fall on the other side
    assert (np.abs(codes - want) <= tie).all()
    assert_canonical(got.codes, codes, bits, group)
    return got


def assert_canonical(packed, codes, bits, group):
    """Bits that stand for no column are 0: packing the codes again gives the same bytes."""
    again = layout.pack(jnp.asarray(codes, jnp.uint8), bits, group)
    assert np.array_equal(packed, again)


@pytest.mark.parametrize("calibration", ["absmax", "minmax"])
@pytest.mark.parametrize(("bits", "group"), [(2, 256), (3, 64), (4, 32), (8, 0)])
def test_grids_and_widths(run, bits, group, calibration):
    check(run, 9, 512, bits=bits, group=group, calibration=calibration)


@pytest.mark.parametrize(("bits", "dtype"), [(1, "bfloat16"), (4, "float16")])
def test_dtypes(run, bits, dtype):
    check(run, 6, 256, dtype, bits=bits, group=64)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 127), (2, 4097)])
@pytest.mark.parametrize("bits", [3])
def test_awkward_sizes(run, n, k, bits):
    check(run, n, k, bits=bits, calibration="minmax")


@pytest.mark.parametrize("bits", [3])
def test_a_long_row_is_one_group(run, bits):
    check(run, 3, 2048, bits=bits, calibration="minmax")


def test_many_small_groups(run):
    """More groups than a vector register has lanes; the rows fill no whole block."""
    check(run, 5, 130 * 8, bits=4, group=8)


def test_an_empty_batch_has_an_empty_result(run):
    got = jitted(run, jnp.zeros((0, 64)), bits=4, group=32)
    assert got.codes.shape == (0, 32)
    assert got.scale.shape == (0, 2)


def test_input_that_is_not_contiguous(run):
    wide = np.asarray(make(64, 18))
    x = jax.jit(lambda w: run(api.quantize_pack, api.IMPLS, w.T[::2], bits=4, group=32))(wide)
    y = jitted(run, jnp.asarray(wide.T[::2].copy()), bits=4, group=32)
    assert all(np.array_equal(a, b) for a, b in zip(x[:2], y[:2], strict=True))


CASES = [
    dict(bits=4, group=64, calibration="minmax"),
    dict(bits=3, group=128, rounding="half_up"),
    dict(bits=2, group=32, rounding="stochastic", key=KEY),
    dict(bits=4, rounding="stochastic", key=KEY, calibration="minmax"),
    dict(bits=8, group=128, levels="narrow"),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_all_implementations_give_the_same_bits(run, options):
    x = make(11, 256, "bfloat16", seed=1)
    x = x.at[0, :8].set(jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0, 127.0], x.dtype))  # ties
    got = jitted(run, x, **options)
    want = jax.jit(lambda x: api.quantize_pack(x, **options, impl="reference"))(x)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or np.array_equal(a, b)


# --- given scales, the house ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "symmetric", "ties"),
    [
        ("channel", True, "half_up"),
        ("group:32", False, "half_even"),
        ("group:32", True, "half_even"),
    ],
)
def test_decode_equals_the_fake_of_the_house_on_its_grid(run, granularity, symmetric, ties):
    x = make(6, 128, seed=2).at[:, 0].set(-1e4)  # beyond the rails of the searched grid
    from qlab.quantization.quantizers import uniform

    house = uniform(3, symmetric=symmetric, granularity=granularity, ties=ties)
    house_grid = house.init(x[:, 1:].repeat(2, 1)[:, :128])
    scale, zero = house_grid.scale, house_grid.zero
    group = 0 if granularity == "channel" else 32
    got = jitted(run, x, scale, zero,
        bits=3, group=group, calibration="given", rounding=ties,
    )  # fmt: skip
    decoded = api.decode(got, 128, bits=3, group=group)
    assert np.array_equal(decoded, house.fake(house_grid, x))
    assert got.scale is scale or np.array_equal(got.scale, scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_is_the_house_s_minmax(symmetric):
    x = make(8, 64)[:3]  # rows within 1e8 of the largest: there the two floors agree
    from qlab.quantization.quantizers import uniform

    house = uniform(4, symmetric=symmetric, granularity="group:16", calibration="minmax").init(x)
    got = api.quantize_pack(x, bits=4, group=16, calibration="absmax" if symmetric else "minmax")
    np.testing.assert_allclose(got.scale, house.scale, rtol=3e-7)
    if not symmetric:
        assert np.array_equal(got.zero, house.zero)


def test_levels_of_a_given_grid(run):
    x = jnp.tile(jnp.asarray([[-9.0, -4.0, -3.4, 0.0, 2.6, 3.0, 9.0, 0.4]]), (4, 2))
    for levels, low in (("full", -4), ("narrow", -3)):
        got = jitted(run, x, jnp.ones((4, 1)),
            bits=3, calibration="given", levels=levels,
        )  # fmt: skip
        want = [low, low, -3, 0, 3, 3, 3, 0]
        assert api.decode(got, 16, bits=3)[0, :8].tolist() == want


# --- stochastic -------------------------------------------------------------------------------------


def test_words_are_threefry_of_row_and_column():
    """Against JAX's own Threefry-2x32."""
    data = jax.random.key_data(KEY)
    row, col = jnp.meshgrid(jnp.arange(9, dtype=jnp.uint32), jnp.arange(5, dtype=jnp.uint32))
    want = threefry_2x32(data, jnp.concatenate([row.ravel(), col.ravel()]))[:45]
    words = [jax.lax.bitcast_convert_type(a, jnp.int32) for a in (*data, row.ravel(), col.ravel())]
    got = jax.lax.bitcast_convert_type(grid.threefry(*words), jnp.uint32)
    assert np.array_equal(want, got)


def test_stochastic_codes_do_not_depend_on_what_is_beside_an_element():
    x = make(8, 256, seed=3)
    scale = jnp.ones((8, 1)) * 0.7
    options = dict(bits=8, calibration="given", rounding="stochastic", key=KEY)
    whole = api.quantize_pack(x, scale, **options).codes
    part = api.quantize_pack(x[:5, :100], scale[:5], **options).codes
    assert np.array_equal(whole[:5, :100], part)
    grouped = api.quantize_pack(x, jnp.repeat(scale, 4, 1), group=64, **options).codes
    assert np.array_equal(whole, grouped)


def test_stochastic_rounding_is_unbiased():
    u = jnp.asarray([[-3.99, -2.5, -0.25, 0.0, 0.03125, 0.5, 1.75, 2.9375]])
    x = jnp.tile(u, (16, 32))
    keys = jax.random.split(jax.random.key(0), 64)

    def mean(key):
        options = dict(bits=4, calibration="given", rounding="stochastic")
        got = api.quantize_pack(x, jnp.ones((16, 1)), key=key, **options)
        return api.decode(got, 256, bits=4).reshape(16, 32, 8).mean((0, 1))

    draws = jax.vmap(mean)(keys).mean(0)  # 32768 draws each, deviation at most 0.5 / sqrt(32768)
    np.testing.assert_allclose(draws, u[0], atol=5 * 0.5 / np.sqrt(64 * 512))
    assert draws[3] == 0  # an integer is never moved


# --- NaN, inf, zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "bad"), [("absmax", np.nan), ("minmax", np.nan), ("minmax", -np.inf)]
)
def test_a_group_with_nan_or_inf_decodes_to_nan_and_spares_the_others(run, calibration, bad):
    x = make(4, 256, seed=4)
    clean = jitted(run, x, bits=4, group=64, calibration=calibration)
    got = run(
        api.quantize_pack,
        api.IMPLS,
        x.at[1, 70].set(bad),
        bits=4,
        group=64,
        calibration=calibration,
    )
    assert np.isinf(got.scale[1, 1])
    decoded = np.asarray(api.decode(got, 256, bits=4, group=64))
    assert np.isnan(decoded[1, 64:128]).all()
    want = np.asarray(api.decode(clean, 256, bits=4, group=64)).copy()
    want[1, 64:128] = np.nan
    np.testing.assert_array_equal(decoded, want)


def test_nan_and_inf_on_a_given_scale(run):
    x = jnp.zeros((2, 64)).at[0, :3].set(jnp.asarray([np.nan, np.inf, -np.inf]))
    scale, zero = jnp.ones((2, 1)), jnp.full((2, 1), 5.0)
    got = jitted(run, x, scale, zero, bits=4, calibration="given")
    assert api.decode(got, 64, bits=4)[0, :4].tolist() == [0, 10, -5, 0]


def test_tiny_rows_meet_the_floor(run):
    got = jitted(run, jnp.full((2, 64), 1e-20), bits=4)
    assert np.array_equal(got.scale, np.full((2, 1), 1e-8, np.float32))
    assert (np.asarray(api.decode(got, 64, bits=4)) == 0).all()


# --- what is refused --------------------------------------------------------------------------------

X = jnp.ones((2, 48))


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((X.astype(jnp.int32),), dict(bits=4), "x has dtype int32; use bfloat16 or float16 or float32"),
        ((X[0],), dict(bits=4), r"x has shape \(48,\), expected \(\*, \*\)"),
        ((X[:, :0],), dict(bits=4), "at least one column"),
        ((X,), dict(bits=9), "bits=9; use one of 1, 2"),
        ((X,), dict(bits=4, group=32), "group=32 does not divide K=48; use 16, 8 or 0"),
        ((X,), dict(bits=4, group=12), "group=12; use 0 for the whole row or a multiple of 8"),
        ((X,), dict(bits=4, rounding="up"), "rounding='up'; use one of 'half_even'"),
        ((X,), dict(bits=4, calibration="mse"), "calibration='mse'; use one of"),
        ((X,), dict(bits=4, calibration="given"), "no scale is given"),
        ((X, X[:, :1]), dict(bits=4), "a scale is given; pass scale with 'given' only"),
        ((X, X), dict(bits=4, calibration="given"), r"scale has shape \(2, 48\), expected \(2, 1\)"),
        ((X, None, X[:, :1]), dict(bits=4), "zero is given with calibration='absmax'"),
        ((X,), dict(bits=4, rounding="stochastic"), "no key is given"),
        ((X,), dict(bits=4, key=KEY), "a key is given; pass key with 'stochastic' only"),
        ((X,), dict(bits=4, rounding="stochastic", key=jnp.zeros(4, jnp.uint32)), r"key is uint32\[4\]"),
        ((X,), dict(bits=1, levels="narrow"), "symmetric grid of 2 bits or more"),
        ((X,), dict(bits=4, levels="narrow", calibration="minmax"), "symmetric grid"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_in_one_line(args, options, text):
    with pytest.raises(ValueError, match=text) as e:
        api.quantize_pack(*args, **options)
    assert "\n" not in str(e.value)


def test_refusals_of_the_kernels():
    def spec(k, **o):
        return api.spec_of(4, k, platform=platform, device="a device", **o)

    platform = "gpu"
    assert pallas_gpu.why_not(spec(4096, bits=4, group=128)) == ""
    assert pallas_gpu.why_not(spec(127, bits=4)).startswith("K=127 is no multiple of 8")
    assert "do not fill 128 threads" in pallas_gpu.why_not(spec(1032, bits=4))
    assert "needs a GPU" in pallas_gpu.why_not(api.spec_of(4, 64, bits=4, platform="cpu"))
    platform = "tpu"
    assert pallas_tpu.why_not(spec(4096, bits=4, group=128)) == ""
    assert "neither divides 128 lanes" in pallas_tpu.why_not(spec(4800, bits=4, group=96))
    assert "no float16" in pallas_tpu.why_not(spec(64, bits=4, x_dtype="float16"))
    assert "do not fit into VMEM" in pallas_tpu.why_not(spec(65536, bits=4))
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        api.quantize_pack(X, bits=4, impl="pallas_gpu")


def test_bytes():
    got = api.quantize_pack(make(4, 256, "bfloat16"), bits=3, group=64, calibration="minmax")
    moved = 4 * 256 * 2 + sum(a.nbytes for a in got)
    assert cost.num_bytes(4, 256, bits=3, group=64, zero=True) == moved
