"""log2_softmax_quantize and log2_attend: every implementation against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.kernels.common import dispatch, layout
from qlab.kernels.log2_softmax_quantize import api, cost, levels, pallas_gpu, pallas_tpu

STEPS = {"log2": 1, "log_sqrt2": 2}


def truth(z, seen, scale, bits, base, zero_code):
    """(codes, which are safe from a tie) in float64."""
    z = np.where(seen, np.asarray(z, np.float64), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.exp(z - z.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        t = -STEPS[base] * np.log2(p / scale)
    last = 2**bits if zero_code == "repo" else 2**bits - 1
    t = np.where(np.isnan(t), last, np.minimum(t, last))
    return np.clip(np.round(t), 0, last), np.abs(t % 1 - 0.5) > 1e-4


def values_of(codes, bits, base, zero_code):
    """f64 2^(-q / steps), 0 for the zero code."""
    q = np.asarray(codes, np.float64)
    last = 2**bits if zero_code == "repo" else 2**bits - 1
    return np.where((q < last) | (zero_code == "clip"), 2.0 ** (-q / STEPS[base]), 0.0)


def check(
    run,
    shape,
    bits,
    base,
    zero_code="reserve",
    *,
    mask=None,
    causal=False,
    scale=1.0,
    spread=3.0,
    dtype="float32",
):
    r, c = shape[-2:]
    z = jnp.asarray(np.random.default_rng(0).normal(size=shape) * spread, dtype)
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    if causal:
        seen = seen & (np.arange(c) <= np.arange(r)[:, None] + c - r)
    options = dict(bits=bits, base=base, zero_code=zero_code, causal=causal)
    f = lambda z, mask, scale: run(  # noqa: E731
        api.log2_softmax_quantize, api.IMPLS, z, mask, scale, **options
    )
    q = jax.jit(f)(z, None if mask is None else jnp.asarray(mask), scale)
    want, safe = truth(z, seen, scale, bits, base, zero_code)
    assert q.dtype == jnp.uint8
    assert q.shape == shape
    off = np.abs(np.asarray(q, int) - want)
    assert off[safe].max(initial=0) == 0
    assert off.max(initial=0) <= 1  # a tie may fall to either side
    assert safe.mean() > 0.99
    return np.asarray(q)


@pytest.mark.parametrize(
    ("bits", "base", "zero_code"),
    [(4, "log2", "reserve"), (2, "log_sqrt2", "repo"), (8, "log_sqrt2", "clip")],
)
def test_codes(run, bits, base, zero_code):
    check(run, (2, 5, 200), bits, base, zero_code, scale=0.7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 4097)])
def test_awkward_sizes(run, shape):
    check(run, shape, 4, "log_sqrt2")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits(run, dtype):
    check(run, (4, 128), 4, "log2", dtype=dtype)


def test_masks_and_rows_that_see_nothing(run):
    rng = np.random.default_rng(1)
    mask = rng.random((6, 160)) < 0.6
    mask[2] = False
    q = check(run, (2, 6, 160), 4, "log2", mask=mask)
    assert (q[:, ~mask] == 15).all()
    q = check(run, (1, 6, 9), 4, "log2", causal=True, mask=np.ones((6, 9), bool))
    assert (q[0, 0, 4:] == 15).all()
    assert (q[0, 0, :4] < 15).all()


def test_rows_read_twice(run, monkeypatch):
    """Long rows: a running maximum and sum, the first blocks of a row unseen."""
    monkeypatch.setattr(pallas_tpu, "ELEMENTS", 128 * 32)
    monkeypatch.setattr(pallas_gpu, "WIDTH", 128)
    mask = np.ones((5, 500), bool)
    mask[1, :300] = False
    mask[3] = False
    check(run, (5, 500), 5, "log_sqrt2", mask=mask, spread=6.0)
    check(run, (5, 500), 5, "log_sqrt2", causal=True, spread=6.0)


def test_infinite_and_not_a_number(run):
    z = np.random.default_rng(2).normal(size=(6, 40)).astype(np.float32)
    z[1, 3], z[2, 3], z[3, 3], z[4] = -np.inf, np.inf, np.nan, -np.inf
    f = lambda z: run(api.log2_softmax_quantize, api.IMPLS, z, bits=4)  # noqa: E731
    q = np.asarray(jax.jit(f)(jnp.asarray(z)))
    assert q[1, 3] == 15
    assert (q[2:5] == 15).all()
    assert (q[[0, 5]] < 15).any()
    want, safe = truth(z[[0, 1, 5]], True, 1.0, 4, "log2", "reserve")
    assert (q[[0, 1, 5]] == want)[safe].all()


def test_equal_logits_are_exact_and_half_codes_round_to_even():
    q = api.log2_softmax_quantize(jnp.zeros((1, 8)), bits=4)
    assert q.tolist() == [[3] * 8]
    t = jnp.array([-3.0, 0.5, 1.5, 2.5, 13.5, 14.49, 14.5, 15.5, 16.5, np.inf, np.nan])
    assert levels.code(t, 4, "reserve").tolist() == [0, 0, 2, 2, 14, 14, 14, 15, 15, 15, 15]
    assert levels.code(t, 4, "repo").tolist() == [0, 0, 2, 2, 14, 14, 14, 16, 16, 16, 16]


@pytest.mark.parametrize("zero_code", ["reserve", "repo", "clip"])
@pytest.mark.parametrize("base", STEPS)
def test_decode_and_encode_are_inverse(base, zero_code):
    bits = 6  # all values are normal float32 numbers
    last = levels.top(bits, zero_code)
    q = jnp.arange(last + 1, dtype=jnp.uint8)
    p = api.decode(q, 0.3, bits=bits, base=base, zero_code=zero_code)
    np.testing.assert_allclose(p, 0.3 * values_of(q, bits, base, zero_code), rtol=1e-6)
    if base == "log_sqrt2":  # the card's parity form
        n = np.arange(last)
        parity = 2.0 ** -np.ceil(n / 2) * (1 + (n % 2) * (np.sqrt(2) - 1))
        np.testing.assert_allclose(p[:last], 0.3 * parity, rtol=1e-6)
    with np.errstate(divide="ignore"):
        t = -STEPS[base] * jnp.log2(p / 0.3)
    assert levels.code(t, bits, zero_code).tolist() == q.tolist()


def product(run, r, c, d, bits, base, dtype, zero_code="reserve", lead=(2,), **options):
    """(result, f64 truth, f64 sum of p |v|) on codes that fall off as a softmax's do."""
    rng = np.random.default_rng(3)
    last = levels.top(bits, zero_code)
    codes = np.minimum(rng.geometric(0.15, (*lead, r, c)) + 3, last).astype(np.uint8)
    v = rng.integers(-128, 128, (*lead, c, d))
    v = jnp.asarray(v, dtype)
    f = lambda q, v: run(  # noqa: E731
        api.log2_attend, api.ATTEND_IMPLS, q, v, 0.5, bits=bits, base=base, zero_code=zero_code,
        **options,
    )  # fmt: skip
    y = np.asarray(jax.jit(f)(jnp.asarray(codes), v), np.float64)
    p = 0.5 * values_of(codes, bits, base, zero_code)
    return y, p @ np.asarray(v, np.float64), p @ np.abs(np.asarray(v, np.float64))


@pytest.mark.parametrize(("bits", "zero_code"), [(4, "reserve"), (4, "repo"), (3, "clip")])
def test_shifted_integers_are_exact(run, bits, zero_code):
    y, want, _ = product(run, 5, 200, 24, bits, "log2", "int8", zero_code)
    np.testing.assert_array_equal(y, want)


def test_parity_of_log_sqrt2(run):
    y, want, size = product(run, 5, 200, 24, 4, "log_sqrt2", "int8")
    assert (np.abs(y - want) <= 3e-7 * size).all()


def test_few_fraction_bits_drop_small_terms_only(run):
    """8 bits need shifts up to 127; with F = 20 the loss stays below 127 C 2^-21, and differs from none."""
    y, want, size = product(run, 3, 64, 8, 8, "log_sqrt2", "int8")
    assert (np.abs(y - want) <= 64 * 127 * 2.0**-21 + 3e-7 * size).all()
    y, want, _ = product(run, 3, 64, 8, 4, "log2", "int8", fraction=5)
    assert np.abs(y - want).max() > 1e-3
    assert (np.abs(y - want) <= 0.5 * 64 * 127 * 2.0**-6).all()


@pytest.mark.parametrize("base", STEPS)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-10), ("float32", 1e-6)]
)
def test_float_values(run, dtype, rounding, base):
    y, want, size = product(run, 5, 200, 24, 4, base, dtype)
    assert (np.abs(y - want) <= rounding * np.abs(want) + 1e-6 * size).all()


@pytest.mark.parametrize(("r", "c", "d"), [(1, 1, 1), (3, 127, 3), (2, 4097, 5)])
def test_awkward_products(run, r, c, d):
    y, want, _ = product(run, r, c, d, 4, "log2", "int8", lead=())
    np.testing.assert_array_equal(y, want)


def test_many_blocks_of_rows_and_values(run):
    y, want, _ = product(run, 130, 150, 140, 4, "log2", "int8", lead=(1, 2))
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes(bits):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 37)), jnp.float32)
    v = jnp.asarray(np.random.default_rng(1).normal(size=(2, 37, 4)), jnp.float32)
    q = api.log2_softmax_quantize(z, bits=bits)
    packed = api.log2_softmax_quantize(z, bits=bits, packed=True)
    assert packed.shape == (2, 3, layout.row_bytes(37, bits))
    assert layout.unpack(packed, 37, bits).tolist() == q.tolist()
    np.testing.assert_array_equal(
        api.log2_attend(packed, v, bits=bits, packed=True), api.log2_attend(q, v, bits=bits)
    )


def test_empty_batch_and_non_contiguous_logits():
    assert api.log2_softmax_quantize(jnp.zeros((0, 3, 5)), bits=4).shape == (0, 3, 5)
    assert api.log2_softmax_quantize(jnp.zeros((2, 0, 5)), bits=4).shape == (2, 0, 5)
    z = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    want, safe = truth(z.T[::2], True, 1.0, 4, "log2", "reserve")
    assert (np.asarray(api.log2_softmax_quantize(jnp.asarray(z.T[::2]), bits=4)) == want)[
        safe
    ].all()


def test_gradient_is_that_of_the_softmax():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 6)) < 0.7).at[1].set(False)
    got = jax.grad(lambda z: (api.log2_softmax(z, mask, bits=3) * w).sum())(z)
    p = np.where(mask, np.exp(np.asarray(z, np.float64)), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    want = p * (w - (p * w).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, want, atol=1e-6)
    values = api.log2_softmax(z, mask, bits=3)
    np.testing.assert_array_equal(
        values, api.decode(api.log2_softmax_quantize(z, mask, bits=3), bits=3)
    )


def test_gradient_in_float_values_and_scale():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.integers(0, 15, (3, 6)), jnp.uint8)
    v, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 4), (3, 4)))
    loss = lambda v, d: (api.log2_attend(q, v, d, bits=4, base="log_sqrt2") * w).sum()  # noqa: E731
    gv, gd = jax.grad(loss, (0, 1))(v, 0.5)
    p = values_of(q, 4, "log_sqrt2", "reserve")
    np.testing.assert_allclose(gv, 0.5 * p.T @ np.asarray(w), rtol=1e-5)
    np.testing.assert_allclose(gd, ((p @ np.asarray(v)) * w).sum(), rtol=1e-5)


def test_bad_input_is_named():
    z, q, v = jnp.zeros((4, 8)), jnp.zeros((4, 8), jnp.uint8), jnp.zeros((8, 2), jnp.int8)
    quantize, attend = api.log2_softmax_quantize, api.log2_attend
    for error, why in (
        (lambda: quantize(z.astype(int), bits=4), r"logits has dtype int32; use bfloat16"),
        (lambda: quantize(z, bits=1), r"bits=1; use one of 2, 3"),
        (lambda: quantize(z, bits=4, base="ln"), r"base='ln'; use one of 'log2', 'log_sqrt2'"),
        (lambda: quantize(z, bits=8, zero_code="repo"), r"needs code 256; use at most 7 bits"),
        (lambda: quantize(z, bits=3, packed=True), r"packed=True with bits=3.*use bits 2 or 4"),
        (lambda: quantize(z[0], bits=4), r"logits has shape \(8,\), expected \(..., R, C\)"),
        (lambda: quantize(z, z > 0, bits=4, zero_code="clip"), r"no code for a masked element"),
        (lambda: quantize(z, z[:3, :3] > 0, bits=4), r"mask has shape \(3, 3\), which does not"),
        (lambda: quantize(z, z, bits=4), r"mask has dtype float32; use bool"),
        (lambda: quantize(z, None, jnp.ones(2), bits=4), r"scale has shape \(2,\), expected \(\)"),
        (lambda: attend(q[:, 1:], v, bits=4), r"codes has shape \(4, 7\), expected \(\*, 8\)"),
        (lambda: attend(q, v, bits=4, packed=True), r"codes has shape \(4, 8\), expected \(\*, 4\)"),
        (lambda: attend(q, v.astype(jnp.int16), bits=4), r"v has dtype int16; use int8"),
        (lambda: attend(q, v, bits=4, fraction=24), r"fraction=24; use one of 0, 1"),
        (lambda: attend(q, v[None], bits=4), r"expected \(..., R, C\), \(..., C, D\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            error()
    with pytest.raises(NotImplementedError, match="pallas_gpu: needs a GPU"):
        quantize(z, bits=4, impl="pallas_gpu")


def test_what_the_kernels_refuse():
    def refused(name, impls, **o):
        spec = api.spec_of(1, 64, 64, bits=4, interpret=True, **o)
        return dispatch.choose(impls, spec, name).refused

    for name in ("pallas_gpu", "pallas_tpu"):
        assert not refused(name, api.IMPLS)
        assert not refused(name, api.ATTEND_IMPLS, d=64, dtype="int8", fraction=14)
    assert "would round it" in refused("pallas_gpu", api.ATTEND_IMPLS, d=64, dtype="float32")[0][1]


def test_cost_counts_what_moves():
    assert cost.num_bytes(2, 3, 5, z="float32", mask=True) == 2 * 3 * 5 * 6
    assert cost.attend_bytes(1, 4, 8, 2) == 4 * 8 + 8 * 2 + 4 * 2 * 4
