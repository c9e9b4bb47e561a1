"""ops: the record meets the kernels. Oracle: float64 products with the dequantized record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab import ops
from qlab.kernels.common import tuned
from qlab.kernels.weight_only_matmul import api as weight_only
from qlab.quantization import QTensor, dequantize, make_grid, quantize_matrix, uniform

GRANULARITIES = ("tensor", "channel", "group:32")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def record(bits, granularity, kind, shape=(24, 64)):
    qt = quantize_matrix(
        draw(shape), method="rtn", bits=bits, granularity=granularity, symmetric=kind == "symmetric",
        calibration="minmax",
    )  # fmt: skip
    if kind == "offset":
        q = ops.unpack(qt)
        qt = QTensor(q.codes, q.scale, None, -q.scale * q.zero, bits, q.axes, q.shape)
    return qt


def runners():
    """(name, options) of each implementation of the product: Pallas ones in their interpreter."""
    for i in weight_only.IMPLS:
        yield i.name, dict(impl=i.name, interpret=i.name.startswith("pallas"))


def close(y, x, w, bias=0.0, rtol=2e-6):
    """y f32 against x @ w.T in float64: a few roundings of each term."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    size = np.abs(x) @ np.abs(w).T + np.abs(bias)
    assert (np.abs(np.asarray(y, np.float64) - (x @ w.T + bias)) <= rtol * size + 1e-30).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["symmetric", "zero", "offset"])
@pytest.mark.parametrize("bits", [3, 4])
def test_matmul_is_the_product_with_the_dequantized_record(bits, kind, granularity):
    qt = ops.pack(record(bits, granularity, kind))
    x, bias = draw((2, 3, 64), 1), draw((24,), 2)
    y = ops.matmul(x, qt, bias, activation="relu")
    plain = ops.matmul(x, qt)
    assert plain.shape == (2, 3, 24)
    close(plain, x, dequantize(qt))
    np.testing.assert_allclose(y, np.maximum(plain + bias, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), runners(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_fake_is_decode_of_encode_and_the_product_of_every_implementation(name, options):
    w = draw((16, 128), 3)
    for symmetric, granularity in ((True, "channel"), (False, "group:32")):
        q = uniform(4, symmetric=symmetric, granularity=granularity)
        params = q.init(w)
        fake = q.fake(params, w)
        np.testing.assert_array_equal(fake, q.decode(params, q.encode(params, w)))
        qt = params.qtensor(q.encode(params, w), w.shape)
        np.testing.assert_array_equal(fake, dequantize(qt))
        x = draw((8, 128), 4)
        try:
            y = ops.matmul(x, ops.pack(qt), **options)
        except NotImplementedError as e:
            pytest.skip(str(e))
        close(y, x, fake)


def test_a_short_last_group_and_permuted_columns():
    w = draw((8, 100), 5)
    qt = ops.pack(quantize_matrix(w, method="rtn", bits=3, granularity="group:32"))
    assert qt.scale.shape == (8, 4)
    x = draw((3, 100), 6)
    close(ops.matmul(x, qt), x, dequantize(qt))
    perm = np.random.default_rng(7).permutation(100)
    close(ops.matmul(x, qt, perm=jnp.asarray(perm)), np.asarray(x)[:, perm], dequantize(qt))


def test_matmul_has_the_gradient_of_the_dequantized_product():
    qt, x = ops.pack(record(4, "group:32", "zero")), draw((3, 64), 8)
    ours = jax.grad(lambda x: (ops.matmul(x, qt) ** 2).sum())(x)
    plain = jax.grad(lambda x: ((x @ dequantize(qt).T) ** 2).sum())(x)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_int8_matmul_of_every_grid_it_takes():
    x = draw((5, 64), 9)
    token = np.maximum(np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) / 127, 1e-8)
    x_hat = np.round(np.asarray(x) / token.astype(np.float32)).astype(np.float64) * token
    for bits, kind, granularity in (
        (8, "symmetric", "channel"),
        (8, "zero", "channel"),
        (4, "zero", "tensor"),
        (4, "symmetric", "tensor"),
    ):
        qt = record(bits, granularity, kind)
        y = ops.int8_matmul(x, qt)
        close(y, x_hat, dequantize(qt), rtol=1e-5)
        np.testing.assert_array_equal(ops.int8_matmul(x, ops.pack(qt)), y)
    static = ops.int8_matmul(x, qt, x_scale=0.05)
    codes = np.clip(np.round(np.asarray(x) / np.float32(0.05)), -128, 127)
    close(static, codes * np.float64(np.float32(0.05)), dequantize(qt), rtol=1e-5)
    again = ops.int8_matmul(jnp.asarray(codes, jnp.int8), qt, x_scale=0.05)
    np.testing.assert_array_equal(again, static)


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 0)])
def test_quantize_pack_makes_the_record_of_the_grid(bits, group):
    pytest.importorskip("qlab.kernels.quantize_pack.api")
    x = draw((6, 32), 10)
    granularity = f"group:{group}" if group else "channel"
    for calibration, symmetric in (("absmax", True), ("minmax", False)):
        qt = ops.quantize_pack(x, bits, group, calibration=calibration)
        grid = make_grid(x, bits, granularity, symmetric=symmetric, calibration="minmax")
        assert qt.packed
        assert qt.shape == (6, 32)
        assert qt.signed == symmetric
        np.testing.assert_allclose(qt.scale, grid.scale, rtol=1e-6)
        plain = uniform(bits, symmetric=symmetric, granularity=granularity)
        step = np.repeat(np.asarray(grid.scale), 32 // grid.scale.shape[1], 1)
        # A code may sit on the other side of a tie where the scales differ in the last bit.
        np.testing.assert_allclose(dequantize(qt), plain.fake(grid, x), atol=1.001 * step.max())
        assert (np.abs(dequantize(qt) - x) <= 0.5001 * step + 1e-6).all()


def test_hadamard_quantize_gives_a_record_of_the_rotated_tokens():
    api = pytest.importorskip("qlab.kernels.hadamard_quantize.api")
    x = draw((3, 32), 11)
    y = np.asarray(api.hadamard(x), np.float64)
    for bits in (4, 8):
        qt = ops.hadamard_quantize(x, bits)
        assert qt.packed == (bits < 8)
        step = np.abs(y).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert (np.abs(dequantize(qt) - y) <= 0.501 * step).all()


def test_log2_softmax_and_its_product_are_near_attention():
    pytest.importorskip("qlab.kernels.log2_softmax_quantize.api")
    logits, v = draw((1, 4, 8), 12), draw((1, 8, 5), 13)
    codes = ops.log2_softmax_quantize(logits, bits=4, base="log_sqrt2")
    y = ops.log2_attend(codes, v, bits=4, base="log_sqrt2")
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    # half a step of sqrt(2) is a factor 2^(1/4) either way
    bound = (2**0.25 - 1) * p @ np.abs(np.asarray(v, np.float64))
    assert (np.abs(y - p @ np.asarray(v, np.float64)) <= bound + 1e-2).all()


def test_group_sparse_matmul_of_the_kept_groups():
    pytest.importorskip("qlab.kernels.group_sparse_matmul.api")
    x = draw((3, 64), 14)
    mask = np.random.default_rng(15).random((24, 4)) < 0.5
    for kind in ("symmetric", "zero"):
        qt = ops.pack(record(4, "group:16", kind))
        bsr = ops.group_sparse(qt, mask)
        y = ops.group_sparse_matmul(x, bsr, bits=4, group=16)
        close(y, x, np.asarray(dequantize(qt)) * np.repeat(mask, 16, 1), rtol=1e-5)
    with pytest.raises(ValueError, match="group_sparse: qt is QTensor"):
        ops.group_sparse(ops.pack(record(4, "channel", "zero")), mask)


def test_explain_names_what_runs_and_why_others_do_not():
    x, qt = draw((5, 64)), ops.pack(record(4, "group:32", "zero"))
    here = ops.explain("matmul", x, qt, device="cpu")
    assert here.runs == "xla"
    assert here == ops.explain(
        "matmul", m=5, k=64, n=24, bits=4, group=32, kind="zero", x_dtype="float32", device="cpu"
    )
    reasons = dict(here.reasons)
    assert reasons["xla"] == "runs"
    assert "could run" in reasons["reference"]
    assert ops.explain("matmul", x, qt, impl="reference", device="cpu").runs == "reference"
    assert str(here).startswith("matmul on cpu: xla\n  xla: runs")
    far = ops.explain("matmul", x, qt, device="NVIDIA H200")
    assert far.device == "NVIDIA H200"
    assert far.runs in ("pallas_gpu", "xla")
    if "pallas_tpu" in dict(far.reasons):
        assert "TPU" in dict(far.reasons)["pallas_tpu"]


def test_would_help_answers_from_measurements_or_says_unknown(monkeypatch):
    def row(m, us, dense, **change):
        r = dict(
            impl="pallas_gpu", device="NVIDIA H200", bucket={"m": m, "k": 8192, "n": 8192}, us=us,
            dtypes={"x": "bfloat16"}, options={"bits": 4, "group": 128}, blocks={}, dense_us=dense,
        )  # fmt: skip
        return {**r, **change}

    table = [
        row(1, 10.0, 30.0), row(1, 12.0, 30.0, impl="xla"), row(16, 12.0, 30.0), row(128, 50.0, 40.0),
        row(64, 1.0, 99.0, device="NVIDIA A100"), row(32, 5.0, 30.0, dense_us=None),
    ]  # fmt: skip
    monkeypatch.setattr(tuned, "table", lambda op: table)
    got = ops.would_help(1, 8192, 8000, 4, "NVIDIA H200")
    assert got.helps
    assert got.speedup == pytest.approx(3.0)
    assert got.crossover == 128
    assert "lose from M=128" in got.why
    assert ops.would_help(100, 8192, 8192, 4, "NVIDIA H200").helps is False
    for args in ((32, 8192, 8192, 4), (1, 8192, 8192, 2), (1, 4096, 8192, 4)):
        unknown = ops.would_help(*args, "NVIDIA H200")
        assert unknown[:3] == (None, None, None)
        assert unknown.why.startswith("unknown")
    assert "no measurement for TPU v5p" in ops.would_help(1, 8192, 8192, 4, "TPU v5p").why
    assert ops.would_help(1, 8192, 8192, 4, "NVIDIA H200", x_dtype="float16").helps is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, qt: ops.matmul(x, ops.unpack(qt)), r"unpacked codes \(uint8\); pack them once"),
        (lambda x, qt: ops.matmul(x[:, :63], qt), r"x has shape \(5, 63\), expected \(..., 64\)"),
        (lambda x, qt: ops.matmul(x, qt, bias=jnp.ones(3)), r"bias has shape \(3,\)"),
        (lambda x, qt: ops.matmul(x, qt, impl="fast"), "impl='fast'"),
        (lambda x, qt: ops.matmul(x, qt, activation="tanh"), "activation='tanh'"),
        (
            lambda x, qt: ops.matmul(x, ops.pack(record(4, "group:4", "zero"))),
            'groups of 4 columns.*"group:8"',
        ),
        (lambda x, qt: ops.matmul(x, jax.tree.map(lambda a: a[None], qt)), "stack.*vmap"),
        (lambda x, qt: ops.int8_matmul(x, qt), "groups of 32 columns.*ops.matmul"),
        (lambda x, qt: ops.explain("matmull"), "op='matmull'"),
        (lambda x, qt: ops.explain("matmul", m=1, k=1, n=1, bits=4, rows=2), "has no rows"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call(draw((5, 64)), ops.pack(record(4, "group:32", "zero")))
    assert "\n" not in str(e.value)
