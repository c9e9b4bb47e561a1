"""`quantize` on models that the lab does not define: nnx, linen and plain functions.

All matrices are 16 x 16 and see 48 x 16 rows, whatever layer they lie in, so that the compiled programs are shared.
Other shapes are the views' business, whose tests come last.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from qlab.lab.errors import UserError
from qlab.quantization import dequantize, quantize, quantize_matrix
from qlab.quantization.layers import View, view_of

X = jax.random.normal(jax.random.key(0), (48, 8, 8, 4))  # patches of 2 x 2 give 16 tokens


class Net(nnx.Module):
    """Convolution, attention, an einsum, lists, dropout: what other people's models hold."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 16, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.mix = nnx.Einsum("ntd,dhk->nthk", (16, 2, 8), (2, 8), rngs=rngs)
        self.body = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(16, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.attention(x)
        x = self.mix(x).reshape(x.shape)
        for layer in self.body:
            x = self.drop(nnx.relu(layer(x)))
        return self.head(x).mean(1)


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def evaluated(net):
    copy = nnx.clone(net)
    copy.eval()
    return copy


def test_every_kind_of_nnx_layer_is_found_and_quantized(net):
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    result = quantize(net, [X[:20], X[20:]], method="gptq", bits=8)
    names = [f"attention/{n}" for n in ("query", "key", "value", "out")]
    assert set(result.weights) == {"conv", "mix", "body/0", "body/1", "head", *names}
    assert result.fallbacks == 0
    y = evaluated(net)(X)
    np.testing.assert_allclose(result.model(X), y, atol=0.05 * float(jnp.abs(y).max()))
    np.testing.assert_allclose(result.apply(X), result.model(X), rtol=1e-6)
    jitted = nnx.jit(lambda m, x: m(x))(result.model, X)
    np.testing.assert_allclose(jitted, result.model(X), rtol=1e-3, atol=1e-4)
    # the model given is as it was, and no float kernel is left in the copy
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    left = nnx.to_pure_dict(nnx.state(result.model, nnx.Param))
    assert "kernel" not in str(jax.tree_util.tree_structure(left))
    assert all(r.bytes < r.float_bytes for r in result.rows)


def test_the_model_runs_with_the_matrices_reported(net):
    result = quantize(net, [X], method="rtn", bits=3, pattern="head|conv")
    assert set(result.weights) == {"head", "conv"}
    by_hand = evaluated(net)
    by_hand.head.kernel.set_value(dequantize(result.weights["head"]).T)
    w = dequantize(result.weights["conv"]).reshape(16, 4, 2, 2)  # out, C, rows, columns
    by_hand.conv.kernel.set_value(w.transpose(2, 3, 1, 0))
    np.testing.assert_allclose(result.model(X), by_hand(X), rtol=1e-4, atol=1e-5)
    plain = quantize_matrix(net.head.kernel[...].T, method="rtn", bits=3)
    np.testing.assert_array_equal(dequantize(result.weights["head"]), dequantize(plain))


def test_rtn_needs_no_calibration_for_nnx_and_is_the_same_with_it(net):
    a, b = quantize(net, method="rtn"), quantize(net, [X], method="rtn")
    assert set(a.weights) == set(b.weights)
    for name in a.weights:
        np.testing.assert_array_equal(a.weights[name].codes, b.weights[name].codes)


@pytest.mark.slow
def test_errors_of_earlier_layers_are_corrected_with_target_fp():
    # a deep narrow net at two bits: what target "fp" is for
    keys = nnx.Rngs(3)
    deep = nnx.Sequential(*[f for _ in range(6) for f in (nnx.Linear(24, 24, rngs=keys), nnx.relu)])
    x = jax.random.normal(jax.random.key(1), (400, 24)) @ jax.random.normal(
        jax.random.key(2), (24, 24)
    )
    y = deep(x)
    gaps = {}
    for method, target in (("rtn", "fp"), ("gptq", "same"), ("gptq", "fp")):
        result = quantize(deep, [x], method=method, bits=3, target=target)
        gaps[method, target] = float(((result.model(x) - y) ** 2).mean())
    assert gaps["gptq", "fp"] < gaps["gptq", "same"] < gaps["rtn", "fp"]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.relu(linen.Conv(16, (2, 2), strides=2, padding="VALID")(x))
        x = linen.relu(linen.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x))
        x = x.reshape(x.shape[0], -1, 16)
        x = linen.MultiHeadDotProductAttention(2)(x)
        x = linen.DenseGeneral((2, 8), axis=-1)(x)
        x = linen.DenseGeneral(16, axis=(-2, -1))(x)
        x = linen.Dense(16)(x).mean(1)
        return linen.Dropout(0.5, deterministic=not train)(x)


def test_an_unedited_linen_module():
    module = Linen()
    variables = module.init(jax.random.key(0), X, train=False)
    y = module.apply(variables, X, train=False)
    result = quantize(
        module, [X], method="gptq", bits=8, variables=variables, call={"train": False}
    )
    assert set(result.weights) == {
        "Conv_0", "DenseGeneral_0", "DenseGeneral_1", "Dense_0",
        *(f"MultiHeadDotProductAttention_0/{n}" for n in ("query", "key", "value", "out")),
    }  # fmt: skip
    np.testing.assert_allclose(result.apply(X), y, atol=0.05 * float(jnp.abs(y).max()))
    np.testing.assert_allclose(jax.jit(result.apply)(X), result.apply(X), rtol=1e-3, atol=1e-4)
    (row,) = (r for r in result.rows if r.name == "depthwise")
    assert row.note == "stays float: grouped convolution (feature_group_count=16)"
    assert result.fallbacks == 1
    assert "grouped convolution" in repr(result)


def test_a_function_of_params():
    params = {"a": {"w": jax.random.normal(jax.random.key(0), (4, 4, 16)), "b": jnp.zeros(16)}}

    def apply(p, x):
        return jnp.einsum("nij,ijo->no", x, p["a"]["w"]) + p["a"]["b"]

    x = jax.random.normal(jax.random.key(1), (768, 4, 4))
    result = quantize(apply, method="rtn", bits=8, variables=params)
    assert set(result.weights) == {"a/w"}
    np.testing.assert_allclose(result.apply(x), apply(params, x), atol=0.2)
    learned = quantize(apply, method="gptq", bits=3, variables=params, inputs={"a/w": x})
    nearest = quantize(apply, method="rtn", bits=3, variables=params)
    y = apply(params, x)
    assert float(((learned.apply(x) - y) ** 2).mean()) < float(((nearest.apply(x) - y) ** 2).mean())
    with pytest.raises(UserError, match=r"a/w: method='gptq' needs inputs"):
        quantize(apply, [x], method="gptq", variables=params)
    with pytest.raises(UserError, match="inputs names 'a/v', no kernel"):
        quantize(apply, method="gptq", variables=params, inputs={"a/v": x})


def test_shared_layers_are_quantized_once_and_traced_ones_stay_float():
    class Shared(nnx.Module):
        def __init__(self):
            self.lin = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
            self.inner = nnx.Linear(16, 16, rngs=nnx.Rngs(1))

        def __call__(self, x):
            x = self.lin(self.lin(x))
            return nnx.jit(lambda layer, x: layer(x))(self.inner, x)

    x = jax.random.normal(jax.random.key(0), (768, 16))
    result = quantize(Shared(), [x], method="gptq", bits=8)
    assert set(result.weights) == {"lin"}
    assert [r.name for r in result.rows if r.note] == ["inner"]
    assert "inside jit" in repr(result)


def drawn(key, shape, dtype=jnp.float32):
    """A kernel; JAX's own initialisers compile a program for each shape."""
    del key
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("text", "x", "k"),
    [
        ("ntd,dhk->nthk", (2, 3, 4), (4, 5, 6)),
        ("...ab,abc->...c", (2, 3, 4, 5), (4, 5, 6)),
        ("nab,cba->nc", (2, 4, 5), (3, 5, 4)),
        ("anb,abc->nc", (4, 2, 5), (4, 5, 3)),
    ],
)
def test_views_of_einsums(text, x, k):
    layer = nnx.Einsum(text, k, kernel_init=drawn, rngs=nnx.Rngs(0))
    view = view_of(layer, k)
    assert isinstance(view, View)
    x, kernel = drawn(None, x), layer.kernel[...]
    want = jnp.einsum(text, x, kernel)
    np.testing.assert_allclose(
        (view.rows(x) @ view.matrix(kernel).T).ravel(), want.ravel(), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(view.kernel(view.matrix(kernel)), kernel)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
def test_views_of_convolutions(rank, padding):
    size = (3, 2, 3)[:rank]
    layer = nnx.Conv(
        2, 5, size, strides=2, kernel_dilation=2, padding=padding, kernel_init=drawn,
        bias_init=drawn, rngs=nnx.Rngs(0),
    )  # fmt: skip
    view = view_of(layer, layer.kernel[...].shape)
    assert isinstance(view, View)
    x = drawn(None, (2, *(7, 8, 6)[:rank], 2))
    want = layer(x)
    got = view.rows(x) @ view.matrix(layer.kernel[...]).T + layer.bias[...]
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(view.kernel(view.matrix(layer.kernel[...])), layer.kernel[...])


def test_layers_without_a_matrix_say_why():
    assert "batch letters" in str(
        view_of(
            nnx.Einsum("nhd,hdk->nhk", (2, 3, 4), kernel_init=drawn, rngs=nnx.Rngs(0)), (2, 3, 4)
        )
    )
    circular = nnx.Conv(2, 2, (3,), padding="CIRCULAR", kernel_init=drawn, rngs=nnx.Rngs(0))
    assert view_of(circular, (3, 2, 2)) == "padding='CIRCULAR'"
    assert view_of(object(), (2, 2)) == "object is no linear layer"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "gtpq"}, "method='gtpq' is not known; did you mean gptq"),
        ({"target": "float"}, "target='float'; use"),
        ({"pattern": "hed"}, "no linear layer fits pattern='hed'.*head"),
        ({"pattern": "("}, "is no regular expression"),
        ({"bits": 9}, "bits=9; a width from 1 to 8"),
        ({"granularity": "group:100"}, "attention|conv|body|head|mix"),
        ({"calibration": []}, "calibration holds no batch"),
        ({"calibration": None}, "needs calibration batches"),
        ({"calibration": [X[:4], jnp.ones((4, 8, 8, 3))]}, "do not join"),
        ({"calibration": [X[:, :, :, :1]]}, "does not run on the calibration batches"),
        ({"calibration": [X.at[0, 0, 0, 0].set(jnp.nan)]}, "conv: its calibration inputs hold NaN"),
        ({"model": "net"}, "model is a str"),
    ],
)
def test_bad_input_is_one_line(net, kwargs, message):
    given = {"model": net, "calibration": [X], "method": "gptq", **kwargs}
    with pytest.raises(UserError, match=message) as error:
        quantize(given.pop("model"), given.pop("calibration"), **given)
    assert "\n" not in str(error.value)


def test_nan_weights_are_named(net):
    broken = nnx.clone(net)
    broken.head.kernel.set_value(broken.head.kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(UserError, match="head: its weights hold NaN or infinity"):
        quantize(broken, method="rtn")


def test_a_dead_input_falls_back_and_says_so():
    """No sample excites the first layer: nearest with its cause, not an error about weights that are fine."""
    net = nnx.Sequential(
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1))
    )
    result = quantize(net, [jnp.zeros((32, 8))], method="gptq", bits=4)
    rows = {r.name: r for r in result.rows}
    assert "rounded to nearest" in rows["layers/0"].note
    assert result.fallbacks >= 1
