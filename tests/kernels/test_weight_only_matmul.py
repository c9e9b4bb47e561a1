"""weight_only_matmul: every implementation against float64 NumPy on independently packed codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.kernels.common import cpu, dispatch, layout
from qlab.kernels.weight_only_matmul import api, pallas_gpu, pallas_tpu, reference, xla

KINDS = ("symmetric", "zero", "offset", "zero_offset")
# Of sum |x| |w|: rounding of x is in both, so what is left is one rounding of each weight and of y.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 2e-6}


def make(m, k, n, bits, group, kind, dtype, seed=0):
    rng = np.random.default_rng(seed)
    num = layout.num_groups(k, group)
    codes = rng.integers(0, 2**bits, (n, k))
    scale = rng.uniform(0.01, 0.1, (n, num)).astype(np.float32)
    zero = rng.integers(0, 2**bits, (n, num)).astype(np.float32) if "zero" in kind else None
    offset = rng.normal(size=(n, num)).astype(np.float32) if "offset" in kind else None
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    return x, codes, scale, zero, offset


def truth(x, codes, scale, zero, offset, bits, group):
    """float64; also sum |x| |w|, the yardstick of rounding."""
    g = group or x.shape[1]
    wide = [
        None if a is None else np.repeat(a.astype(np.float64), g, 1)[:, : x.shape[1]]
        for a in (scale, zero, offset)
    ]
    q = codes.astype(np.float64)
    q = q - (wide[1] if zero is not None else (0 if offset is not None else 2.0 ** (bits - 1)))
    w = q * wide[0] + (wide[2] if offset is not None else 0)
    x = np.asarray(x, np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


def packed(codes, bits, group, *arrays):
    """What the operation takes."""
    return layout.pack(jnp.asarray(codes), bits, group), *(
        None if a is None else jnp.asarray(a) for a in arrays
    )


def check(run, m, k, n, bits, group, kind, dtype, transposed=False):
    x, codes, scale, zero, offset = make(m, k, n, bits, group, kind, dtype)
    arrays = packed(codes, bits, group, scale, zero, offset)

    def product(x, arrays):
        x = x.T if transposed else x
        return run(api.weight_only_matmul, api.IMPLS, x, *arrays, bits=bits, group=group)

    y = jax.jit(product)(jnp.asarray(np.asarray(x).T.copy()) if transposed else x, arrays)
    assert y.shape == (m, n)
    assert y.dtype == jnp.dtype(dtype)
    want, size = truth(x, codes, scale, zero, offset, bits, group)
    err = np.abs(np.asarray(y, np.float64) - want)
    assert (err <= TOLERANCE[dtype] * size + 1e-30).all(), (err / size).max()


# The interpreters take seconds a case: Pallas kernels get the few cases below, and these grids when slow.
GRID = pytest.mark.parametrize(
    "run",
    [
        "reference",
        "xla",
        pytest.param("pallas_gpu", marks=pytest.mark.slow),
        pytest.param("pallas_tpu", marks=pytest.mark.slow),
    ],
    indirect=True,
)
PALLAS = pytest.mark.parametrize("run", ["pallas_gpu", "pallas_tpu"], indirect=True)


SLOW = pytest.mark.slow


@PALLAS
@pytest.mark.parametrize(
    ("m", "k", "n", "bits", "group", "kind", "dtype"),
    [
        (3, 256, 72, 4, 64, "symmetric", "bfloat16"),  # more rows than one warpgroup
        (2, 256, 48, 3, 128, "zero_offset", "float32"),  # two parts, several groups
        (0, 64, 8, 4, 32, "symmetric", "bfloat16"),
        pytest.param(1, 127, 3, 2, 0, "zero", "float16", marks=SLOW),  # nothing fits
        pytest.param(2, 72, 5, 7, 24, "symmetric", "float32", marks=SLOW),  # padded groups
        pytest.param(
            2, 640, 5, 3, 0, "offset", "float32", marks=SLOW
        ),  # two parts, one scale a row, several chunks
        pytest.param(
            2, 4096, 8, 4, 64, "symmetric", "bfloat16", marks=SLOW
        ),  # several blocks along K
    ],
)
def test_kernels(run, m, k, n, bits, group, kind, dtype):
    check(run, m, k, n, bits, group, kind, dtype)


@GRID
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_grids_and_widths(run, bits, kind):
    check(run, 5, 128, 24, bits, 64, kind, "float32")


@GRID
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("m", [1, 17])
def test_dtypes_groups_and_rows(run, m, group, dtype):
    check(run, m, 384, 72, 4, group, "zero", dtype)


@GRID
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 127, 3), (2, 4097, 5), (127, 64, 1)])
@pytest.mark.parametrize("bits", [3, 4])
def test_awkward_sizes(run, m, k, n, bits):
    check(run, m, k, n, bits, 0, "zero", "float32")


@pytest.mark.parametrize("run", ["xla"], indirect=True)
@pytest.mark.parametrize("m", [xla.FEW, xla.FEW + 1])
def test_planes_and_whole_weights_meet(run, m):
    check(run, m, 96, 9, 4, 32, "zero_offset", "bfloat16")


@GRID
def test_x_may_be_a_transposed_view(run):
    check(run, 3, 64, 8, 4, 32, "symmetric", "float32", transposed=True)


@pytest.mark.slow
@PALLAS
@pytest.mark.parametrize(
    ("m", "k", "n", "bits", "group", "kind"),
    [
        (2, 128 * 136, 8, 4, 128, "zero_offset"),  # more groups than a register row; split over K
        (150, 256, 130, 4, 128, "offset"),  # several tiles of x and of weights
        (1, 1536, 8, 2, 768, "zero"),  # a group longer than a step
    ],
)
def test_several_blocks(run, m, k, n, bits, group, kind):
    check(run, m, k, n, bits, group, kind, "bfloat16")


def test_leading_axes_and_an_empty_batch():
    x, codes, scale, *_ = make(6, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)
    f = functools.partial(api.weight_only_matmul, bits=4, group=32)
    np.testing.assert_array_equal(f(x.reshape(2, 3, 64), w, s).reshape(6, 8), f(x, w, s))
    for impl in ("reference", "xla"):
        assert f(x[:0], w, s, impl=impl).shape == (0, 8)


@pytest.mark.parametrize("impl", ["reference", "xla", "pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_spoils_its_row_only(impl, bad):
    if impl == "pallas_gpu" and np.isnan(bad):
        pytest.skip("an infinity becomes NaN in its pieces, so that case covers both")
    x, codes, scale, *_ = make(3, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)
    y = api.weight_only_matmul(
        x.at[1, 5].set(bad), w, s, bits=4, group=32, impl=impl, interpret=impl.startswith("pallas")
    )
    finite = np.isfinite(y)
    assert not finite[1].any()
    assert finite[[0, 2]].all()
    if np.isnan(bad):
        assert np.isnan(y[1]).all()


@pytest.mark.parametrize("impl", ["xla", "pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_and_activation(impl, activation):
    if impl == "pallas_gpu" and activation in ("relu", "silu"):
        pytest.skip(
            "seconds a case in the interpreter; that they lower is tested with the lowering"
        )
    x, codes, scale, *_ = make(4, 64, 8, 4, 32, "symmetric", "bfloat16")
    bias = np.linspace(-2, 2, 8).astype(np.float32)
    w, s, b = packed(codes, 4, 32, scale, bias)
    y = api.weight_only_matmul(
        x, w, s, bias=b, bits=4, group=32, activation=activation, impl=impl,
        interpret=impl.startswith("pallas"),
    )  # fmt: skip
    z, size = truth(x, codes, scale, None, None, 4, 32)
    z = z + bias
    want = {
        None: lambda: z,
        "relu": lambda: np.maximum(z, 0),
        "gelu": lambda: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
        "silu": lambda: z / (1 + np.exp(-z)),
    }[activation]()
    # No slope of an activation exceeds 1.13.
    assert (np.abs(np.asarray(y, np.float64) - want) <= 1.2 * 2**-7 * (size + np.abs(bias))).all()


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_a_plane_is_exact_on_both_accelerators(p):
    """Every byte, so the high bit of the highest field too."""
    byte = np.arange(256)
    for j in range(8 // p):
        field = (byte >> (p * j)) & (2**p - 1)
        for minus in (0, 2 ** (p - 1)):
            got = pallas_gpu.plane(jnp.asarray(byte, jnp.uint8), j, p, 1.0, float(minus))
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(got, np.float64), field - minus)
            got = pallas_tpu.plane(jnp.asarray(byte, jnp.int32), j, p, minus > 0)
            np.testing.assert_array_equal(got, field - minus)
        got = pallas_gpu.plane(jnp.asarray(byte, jnp.uint8), j, p, 2.0 ** (8 - p), 128.0)
        np.testing.assert_array_equal(np.asarray(got, np.float64), field * 2.0 ** (8 - p) - 128)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pieces_add_up_to_x(dtype, rng):
    x = jnp.asarray(rng.normal(size=(5, 33)) * 10.0 ** rng.integers(-4, 4, (5, 33)), dtype)
    p = np.asarray(jax.jit(pallas_gpu.pieces)(x), np.float64).reshape(-1, 5, 33).sum(0)
    want = np.asarray(x, np.float64)
    assert (np.abs(p - want) <= (2.0**-24 if dtype == "float32" else 0) * np.abs(want)).all()


@pytest.mark.parametrize("impl", ["reference", "xla", "pallas_gpu", "pallas_tpu"])
def test_gradients_are_those_of_the_reference(impl):
    x, codes, scale, zero, offset = make(3, 64, 8, 3, 32, "zero_offset", "float32")
    bias = np.linspace(-1, 1, 8).astype(np.float32)
    w, *floats = packed(codes, 3, 32, scale, zero, offset, bias)
    spec = api.spec_of(3, 64, 8, bits=3, group=32, x_dtype="float32", activation="silu", bias=True)

    def loss(x, s, z, o, b, plain=False):
        if plain:
            y = reference.run(spec, x, w, s, z, o, b)
        else:
            y = api.weight_only_matmul(
                x, w, s, z, o, b, bits=3, group=32, activation="silu", impl=impl,
                interpret=impl.startswith("pallas"),
            )  # fmt: skip
        return (y**2).sum()

    every = tuple(range(5))
    got = jax.jit(jax.grad(loss, every))(x, *floats)
    want = jax.grad(functools.partial(loss, plain=True), every)(x, *floats)
    for g, e in zip(got, want, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4 * np.abs(e).max())


def test_codes_have_no_gradient():
    x, codes, scale, *_ = make(3, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)

    def loss(w):
        return api.weight_only_matmul(x, w, s, bits=4, group=32).sum()

    g = jax.grad(loss, allow_int=True)(w)
    assert g.dtype == jax.dtypes.float0
    assert g.shape == w.shape


@pytest.mark.parametrize(
    "impl", ["xla", "pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.slow)]
)
def test_vmap_and_scan(impl):
    x, codes, scale, *_ = make(6, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)
    f = functools.partial(
        api.weight_only_matmul, bits=4, group=32, impl=impl, interpret=impl.startswith("pallas")
    )
    want = np.asarray(f(x, w, s))
    each = x.reshape(3, 2, 64)
    got = jax.jit(jax.vmap(f, (0, None, None)))(each, w, s)
    np.testing.assert_allclose(got.reshape(6, 8), want, rtol=1e-5, atol=1e-4)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), (w, s))
    got = jax.jit(jax.vmap(f, (None, 0, 0)))(x, *stack)
    np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-4)
    got = jax.jit(lambda xs: jax.lax.scan(lambda c, a: (c, f(a, w, s)), 0, xs)[1])(each)
    np.testing.assert_allclose(got.reshape(6, 8), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(x=jnp.zeros((2, 64), jnp.int32)), "x has dtype int32; use bfloat16 or float16 or float32"),
        (dict(codes=jnp.zeros((8, 32), jnp.int8)), "codes has dtype int8; use uint8"),
        (dict(codes=jnp.zeros((8, 31), jnp.uint8)), r"codes has shape \(8, 31\), expected \(\*, 32\); 4 bits, K=64, group=32"),
        (dict(bits=9), "bits=9; use one of 1, 2"),
        (dict(group=48), r"group=48 does not divide K=64; use 64, 32, 16, 8 or 0 \(the whole row\)"),
        (dict(group=12), "group=12; use 0 for the whole row or a multiple of 8"),
        (dict(scale=jnp.ones((8, 3))), r"scale has shape \(8, 3\), expected \(8, 2\); one for each of 2 groups"),
        (dict(zero=jnp.ones((8,))), r"zero has shape \(8,\), expected \(8, 2\)"),
        (dict(offset=jnp.ones((2, 8))), r"offset has shape \(2, 8\), expected \(8, 2\)"),
        (dict(bias=jnp.ones((1, 8))), r"bias has shape \(1, 8\), expected \(8\)"),
        (dict(activation="tanh"), "activation='tanh'; use one of None, 'relu', 'gelu', 'silu'"),
        (dict(impl="cuda"), "impl='cuda': weight_only_matmul has reference, xla, pallas_gpu, pallas_tpu"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(change, text):
    args = dict(
        x=jnp.zeros((2, 64)), codes=jnp.zeros((8, 32), jnp.uint8), scale=jnp.ones((8, 2)),
        bits=4, group=32,
    ) | change  # fmt: skip
    with pytest.raises(ValueError, match=text) as e:
        jax.eval_shape(lambda: api.weight_only_matmul(**args))
    assert "\n" not in str(e.value)


def test_a_named_implementation_runs_or_says_why_not(monkeypatch):
    x, codes, scale, *_ = make(2, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)
    f = functools.partial(api.weight_only_matmul, x, w, s, bits=4, group=32)
    if jax.default_backend() == "cpu":
        with pytest.raises(
            NotImplementedError, match=r"pallas_tpu: needs a TPU, the device is cpu"
        ):
            f(impl="pallas_tpu")
        monkeypatch.setenv("QLAB_IMPL", "pallas_gpu")
        with pytest.raises(
            NotImplementedError, match=r"pallas_gpu: needs a GPU, the device is cpu"
        ):
            f()
    monkeypatch.setenv("QLAB_IMPL", "nothing")
    with pytest.raises(ValueError, match="QLAB_IMPL='nothing'"):
        f()


def test_without_a_name_a_failure_gives_way_to_the_next(monkeypatch):
    def broken(spec, *arrays):
        raise RuntimeError("no such instruction\nand more")

    impls = (reference.IMPL, xla.IMPL._replace(run=broken))
    x, codes, scale, *_ = make(2, 64, 8, 4, 32, "symmetric", "float32")
    w, s = packed(codes, 4, 32, scale)
    spec = api.spec_of(2, 64, 8, bits=4, group=32, x_dtype="float32")
    y = dispatch.run(impls, spec, x, w, s, None, None, None)
    np.testing.assert_array_equal(y, reference.run(spec, x, w, s, None, None, None))
    with pytest.raises(RuntimeError):
        dispatch.run(impls, spec, x, w, s, None, None, None, impl="xla")


@pytest.mark.parametrize(
    ("platform", "device", "first", "refused"),
    [
        ("cpu", "cpu", "xla", None),
        ("gpu", "NVIDIA H200", "pallas_gpu", None),
        ("gpu", "NVIDIA H100 80GB HBM3", "pallas_gpu", None),
        ("gpu", "NVIDIA A100-SXM4-80GB", "xla", "needs Hopper (sm_90"),
        ("gpu", "NVIDIA B200", "xla", "needs Hopper (sm_90"),
        ("tpu", "TPU v5 lite", "pallas_tpu", None),
        ("tpu", "TPU v6e", "pallas_tpu", None),
        ("tpu", "TPU v3", "xla", "not for TPU v3"),
    ],
)
def test_what_would_run_elsewhere(platform, device, first, refused):
    for m in (1, 4096):
        spec = api.spec_of(m, 4096, 4096, bits=4, group=128, platform=platform, device=device)
        choice = dispatch.choose(api.IMPLS, spec)
        assert choice.name == first
        assert (refused is None) == (not choice.refused)
        assert refused is None or refused in choice.refused[0][1]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [0, 8, 128, 4096])
def test_the_heuristic_blocks_fit_every_device(bits, group):
    for m in (1, 16, 200, 8192):
        for x in TOLERANCE:
            shape = dict(bits=bits, group=group, x_dtype=x, kind="zero_offset")
            for device in pallas_tpu.VMEM:
                if group == 4096 and device == "TPU v4":
                    continue  # a group is unpacked as a whole: too long for 16 MB
                spec = api.spec_of(m, 28672, 8192, **shape, platform="tpu", device=device)
                assert pallas_tpu.why_not(spec) == ""
            spec = api.spec_of(m, 28672, 8192, **shape, platform="gpu", device="NVIDIA H200")
            assert pallas_gpu.why_not(spec) == ""


def test_blocks_that_do_not_fit_are_refused(monkeypatch):
    big = {"bm": 4096, "bn": 4096, "bk": 8192, "tile_m": 256, "step": 4096, "stages": 8}
    monkeypatch.setattr(
        "qlab.kernels.common.tuned.blocks", lambda spec, impl, default: default | big
    )
    shape = dict(bits=4, group=128)
    spec = api.spec_of(4096, 8192, 8192, **shape, platform="tpu", device="TPU v5 lite")
    assert "MiB of VMEM" in pallas_tpu.why_not(spec)
    spec = api.spec_of(4096, 8192, 8192, **shape, platform="gpu", device="NVIDIA H200")
    assert "bytes of shared memory" in pallas_gpu.why_not(spec)


def test_the_cpu_multiplies_in_bf16_only_where_it_has_the_unit(monkeypatch):
    for flags, kind in (({"avx2"}, "cpu"), ({"avx2", "avx512_bf16", "amx_bf16"}, "cpu amx_bf16")):
        monkeypatch.setattr(cpu, "features", lambda flags=flags: frozenset(flags))
        assert cpu.kind.__wrapped__() == kind
        spec = api.spec_of(64, 64, 8, bits=4, platform="cpu", device=kind)
        assert xla.narrow(spec, 64, jnp.bfloat16) is (kind != "cpu")
        assert not xla.narrow(spec, 64, jnp.float16)
        assert not xla.narrow(spec, 1, jnp.bfloat16)
    assert xla.narrow(spec._replace(platform="gpu"), 64, jnp.float16)
