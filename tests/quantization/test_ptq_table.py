"""The table of methods: nets made ready for the walk, any method on any of them, times, and studies side by side."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from qlab.configs.ptq_table import get_config
from qlab.experiments.ptq_table import build
from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase, side_by_side
from qlab.nn import zoo
from qlab.nn.chain import Layer
from qlab.nn.dense import dense_net, dense_params
from qlab.nn.outliers import relu_twin
from qlab.nn.resnet import ResNetSize, resnet
from qlab.quantization.blocks import (
    SiteInput,
    fake_run,
    nearest_weight,
    packed_run,
    quantize_block,
    run_blocks,
)
from qlab.quantization.decoupleq import DecoupleQ, decoupleq_layer
from qlab.quantization.decoupleq_walk import decoupleq_weight
from qlab.quantization.gptq import layer_problem
from qlab.quantization.matrix import RULES
from qlab.quantization.ptq_table import (
    BLOCKS,
    ROUNDING,
    Family,
    Method,
    Recipe,
    acts,
    arm,
    cells,
    family,
    fits,
    rounding,
)
from qlab.quantization.qtensor import dequantize
from qlab.quantization.quantize_net import quantize_net
from qlab.quantization.site_study import Cell, site_study
from qlab.quantization.timed_study import measure_once, narrowed, timed

WIDTHS = (12, 6, 6, 6, 3)
STRENGTHS = {"mlp": 2.0, "vit": 2.5, "mamba": 4.0, "resnet": 2.0, "vlm": 2.5}
SMALL = {
    "mlp": "digits_shallow", "vit": "digits_vit_small", "mamba": "digits_mamba_small",
    "resnet": "digits_resnet_small", "vlm": "digits_vlm_small",
}  # fmt: skip


@pytest.fixture(scope="module")
def layers():
    rng = np.random.default_rng(0)
    shapes = list(zip(WIDTHS[1:], WIDTHS, strict=False))
    return tuple(
        Layer(
            jnp.asarray(rng.standard_normal(s), jnp.float32),
            jnp.asarray(rng.standard_normal(s[0]), jnp.float32),
        )
        for s in shapes
    )


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (20, 12))


def test_an_mlp_in_blocks_is_the_mlp(layers, x):
    net = dense_net(WIDTHS)
    assert net.names == ("first", "hidden1.0", "hidden1.1", "head")
    want = np.asarray(x, np.float64)
    for i, layer in enumerate(layers):
        want = want @ np.asarray(layer.w, np.float64).T + np.asarray(layer.b, np.float64)
        want = np.maximum(want, 0) if i < len(layers) - 1 else want
    np.testing.assert_allclose(net.apply(dense_params(layers), x), want, rtol=1e-4, atol=1e-4)


def test_a_relu_twin_is_the_same_function_with_other_ranges():
    family_ = resnet(ResNetSize(widths=(3,), classes=3))
    net = family_.folded
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), shapes)
    twin = relu_twin(params, (("conv1", "conv2"),), 3.0, jax.random.key(1))
    x = jax.random.uniform(jax.random.key(2), (4, 8, 8, 1))
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(twin, x), apply(params, x), rtol=2e-4, atol=2e-4)
    normed = family_.init(jax.random.key(3))
    got = family_.fold(relu_twin(normed, (("conv1", "conv2"),), 3.0, jax.random.key(1)))
    want = relu_twin(family_.fold(normed), (("conv1", "conv2"),), 3.0, jax.random.key(1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
    spread = [jnp.abs(p[1]["conv1"]["kernel"]).max((0, 1)) for p in (params, twin)]
    assert spread[1].max() / spread[1].min() > 1.5 * spread[0].max() / spread[0].min()


def test_the_problem_of_a_layer_is_least_squares_against_the_float_outputs():
    rng = np.random.default_rng(0)
    w, x_fp = rng.standard_normal((3, 4)), rng.standard_normal((50, 4))
    x_q = x_fp + 0.3 * rng.standard_normal((50, 4))
    got, h = layer_problem(*(jnp.asarray(a, jnp.float32) for a in (w, x_q, x_fp)), damp=1e-6)
    want = np.linalg.lstsq(x_q, x_fp @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(h, x_q.T @ x_q / 50, atol=1e-5)
    same, _ = layer_problem(jnp.asarray(w, jnp.float32), jnp.asarray(x_q, jnp.float32))
    np.testing.assert_array_equal(same, np.float32(w))


def test_decoupleq_of_a_product_is_that_of_the_layer():
    w = jax.random.normal(jax.random.key(0), (3, 6))
    x = jax.random.normal(jax.random.key(1), (40, 6)).cumsum(1)
    i = SiteInput("dense", x, x, w, jnp.float32(2), jax.random.key(2))
    weight = decoupleq_weight(target="same", max_bits=8)
    qt, failed = jax.jit(lambda bits: weight(i._replace(bits=bits)))(2.0)
    want, _ = decoupleq_layer(w, (x.T @ x) / 40, DecoupleQ(bits=2))
    np.testing.assert_allclose(dequantize(qt), dequantize(want), rtol=1e-4, atol=1e-4)
    assert failed == 0
    with pytest.raises(ValueError, match="no plain product"):
        decoupleq_weight()(i._replace(x=None))


@pytest.mark.parametrize("name", ["gptq", "flexround"])
def test_weights_alone_leave_activations_and_pack(name, layers, x):
    """32 bits are the identity; codes stored at 8 bits pack at the grid's width and run alike."""
    net, params = dense_net(WIDTHS), dense_params(layers)
    f = Family("mlp", net, lambda key: {"plain": params}, (), {})
    method = arm(f, Method(name, num_iters=20))["method"]
    block, own = net.groups[0].block, jax.tree.map(lambda a: a[0], params[0])
    q, _ = jax.jit(lambda w, a: method(block, own, x, x, w, a, jax.random.key(0)))(3.0, 32.0)
    y = block(own, x, fake_run(q))
    only = q._replace(acts={})
    np.testing.assert_array_equal(y, block(own, x, fake_run(only)))
    (small,) = narrowed([q], 3)
    assert [b.weights["dense"].bits for b in (small, q)] == [3, 8]
    np.testing.assert_allclose(block(own, x, packed_run(small)), y, rtol=1e-4, atol=1e-4)


def test_methods_stand_only_where_they_exist():
    assert [k for k in STRENGTHS if fits(Method("pd_quant"), k)] == ["resnet"]
    assert [k for k in STRENGTHS if fits(Method("gptq", "repquant"), k)] == ["vit"]
    assert [k for k in STRENGTHS if fits(Method("mse", "smooth"), k)] == ["vit", "mamba", "vlm"]
    assert [k for k in STRENGTHS if fits(Method("ada_dfq"), k)] == ["resnet"]
    assert [k for k in STRENGTHS if fits(Method("q_vlm"), k)] == ["vlm"]
    assert all(fits(Method(name), k) for name in ROUNDING for k in STRENGTHS)
    f = Family("mlp", dense_net(WIDTHS), lambda key: {}, (), {})
    for m, text in (
        (Method("nearest"), "rounding='nearest'"),
        (Method("mse", "turn"), "rewrite='turn'"),
        (Method("qdrop"), "not for nets of kind 'mlp'"),
    ):
        with pytest.raises(UserError, match=text):
            arm(f, m)
    with pytest.raises(UserError, match="digits_cnn is a net of kind 'cnn'"):
        family("digits_cnn", STRENGTHS)


def test_other_weights_than_products_go_to_nearest_and_inputs_keep_eight_bits():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    i = SiteInput("conv", None, None, w, jnp.float32(3), jax.random.key(1))
    got, _ = rounding(Method("gptq"))(i)
    want, _ = nearest_weight(max_bits=8, calibration="shares")(i)
    np.testing.assert_array_equal(got.codes, want.codes)
    f = Family("vit", dense_net(WIDTHS), lambda key: {}, ("patch",), {})
    x = jax.random.normal(jax.random.key(2), (50, 3))
    levels = {
        site: float(acts(f, Method())(i._replace(site=site, x=x, bits=jnp.float32(4))).q_max)
        for site in ("patch", "qkv")
    }
    assert levels == {"patch": 255.0, "qkv": 15.0}


def test_studies_side_by_side_are_the_studies_alone():
    def walk(name, speed):
        def step(s):
            return s + speed, {"at": s}

        return Experiment(
            lambda key: jax.random.uniform(key), lambda s: {name: s}, (Phase(name, 2, step),)
        )

    one, two = walk("one", 1.0), walk("two", 10.0)
    both = side_by_side({"a": one, "b": two})
    state = both.init(jax.random.key(0))
    for phase in both.phases:
        for _ in range(phase.num_steps):
            state, _ = phase.step(state)
    u = float(jax.random.uniform(jax.random.key(0)))
    assert [p.name for p in both.phases] == ["a one", "b two"]
    got = both.evaluate(state)
    np.testing.assert_allclose([got["one"], got["two"]], [u + 2, u + 20], rtol=1e-6)
    assert side_by_side({"a": one}) is one
    with pytest.raises(ValueError, match="a result called 'one'"):
        side_by_side({"a": one, "b": one}).evaluate({"a": u, "b": u})


@pytest.fixture(scope="module")
def study(layers, x):
    params = dense_params(layers)
    f = Family("mlp", dense_net(WIDTHS), lambda key: {"plain": params}, (), {})
    made = [Cell("w2", 2, 32), Cell("w4a4", 4, 4)]
    labels = np.zeros(len(x), np.int32)
    one = site_study(
        f.net,
        f.nets,
        np.asarray(x),
        (np.asarray(x), labels),
        made,
        num_calibration=16,
        **arm(f, Method()),
    )
    return f, made, one


def finished(experiment):
    state = experiment.init(jax.random.key(3))
    (phase,) = experiment.phases
    for _ in range(phase.num_steps):
        state, _ = phase.step(state)
    return experiment.evaluate(state)


def test_a_timed_study_is_the_study_and_tells_time_memory_and_the_packed_net(study, x):
    f, made, plain = study
    got, want = finished(timed(plain, made, measure_once(f.net, made, x))), finished(plain)
    assert {k: float(v) for k, v in want.items()} == {k: float(got[k]) for k in want}
    for cell in made:
        for metric in ("seconds", "memory", "packed_time", "float_time"):
            assert got[f"{cell.name}/{metric}"] > 0
    assert want["w2/bytes"] < want["w4a4/bytes"]


def test_names_of_cells():
    c = get_config()
    found = cells(c.cells, "vit")
    assert [found[0], found[-1]] == [Cell("vit_w2", 2, 32), Cell("vit_w4a4_twin", 4, 4, "twin")]
    with pytest.raises(UserError, match="'w4b4'"):
        cells(("w4b4",), "vit")
    c = get_config("smoke")
    c.update(rounding="pd_quant")
    with pytest.raises(UserError, match="fits none of the nets"):
        build(c)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "m"),
    [
        *(
            (kind, Method(n))
            for kind in STRENGTHS
            for n in ("gptq", "decoupleq", *RULES, "gradient")
        ),
        *(("resnet", Method(name, rate=1e-1)) for name in BLOCKS),
        ("vit", Method("gptq", "smooth")),
        ("vit", Method("gptq", "repquant")),
        ("mamba", Method("mse", "smooth")),
        ("mamba", Method("mse", "mambaquant")),
        ("vlm", Method("gptq", "smooth")),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.rounding}-{v.rewrite}",
)
def test_packed_execution_equals_fake_quantization(kind, m):
    """Each method's result on each kind of net, W4A8, on the net as trained."""
    key = jax.random.key(0)
    f = family(SMALL[kind], STRENGTHS, m.rewrite)
    params = f.nets(key)["twin"]
    pool = zoo.examples(zoo.recipe(SMALL[kind]).dataset).x_train
    images = jax.tree.map(lambda a: jnp.asarray(a[:32]), pool)
    made = arm(f, m._replace(num_iters=20, dc_steps=10))
    if "transform" in made:
        transform = made["transform"]
        params = transform.apply(params, transform.init(params, images, key))
    around = {}
    if made.get("around"):
        around = {"around": True, "beside": made["beside"](key, "twin", images)}
    result = quantize_net(f.net, params, images, made["method"], w_bits=4, a_bits=8, **around)
    blocks = narrowed(result.blocks, 4, f.wide)
    run = partial(run_blocks, f.net, blocks)
    want = run(images, fake_run)
    gap = jnp.abs(jax.jit(lambda x: run(x, packed_run))(images) - want).max()
    # a code that moves by a step where a sum is rounded otherwise moves the output by a little
    assert gap < 2e-2 * jnp.abs(want).max()


def test_quantize_block_is_what_the_table_walks(layers, x):
    """mse of the table is the walk with nearest weights and quantile grids, nothing else."""
    net, params = dense_net(WIDTHS), dense_params(layers)
    f = Family("mlp", net, lambda key: {"plain": params}, (), {})
    m, own = Method(), jax.tree.map(lambda a: a[0], params[0])
    args = (net.groups[0].block, own, x, x, 3.0, 4.0, jax.random.key(0))
    got, _ = arm(f, m)["method"](*args)
    want, _ = quantize_block(
        *args, act=acts(f, m), weight=nearest_weight(max_bits=8, calibration="shares")
    )
    np.testing.assert_array_equal(got.weights["dense"].codes, want.weights["dense"].codes)
    assert float(got.acts["dense"].q_max) == 15


def test_a_recipe_of_base_choices_is_adaround_with_relative_weights():
    """Its loss and regulariser are AdaRound's divided by one number, which Adam does not see."""
    w = jax.random.normal(jax.random.key(0), (3, 6))
    x = jax.random.normal(jax.random.key(1), (40, 6)).cumsum(1)
    i = SiteInput("dense", x, x, w, jnp.float32(2), jax.random.key(2))
    nearest = dequantize(nearest_weight(max_bits=8, calibration="shares")(i)[0])
    unit = float(((x @ (nearest - w).T) ** 2).sum(-1).mean())
    reg = 0.01 * w.size / unit  # what the 0.01 of AdaRound weighs relative to nearest
    m = Method("gradient", num_iters=100, recipe=Recipe(reg_weight=reg))
    got = jax.jit(lambda bits: rounding(m)(i._replace(bits=bits))[0])(2.0)
    want = jax.jit(lambda bits: rounding(m._replace(rounding="adaround"))(i._replace(bits=bits))[0])
    np.testing.assert_array_equal(got.codes, want(2.0).codes)
    error = lambda q: float(((x @ (dequantize(q) - w).T) ** 2).sum())  # noqa: E731
    for recipe in (Recipe("ste", "l1", "lion", "constant"), Recipe("flexround", "log_l2")):
        q = rounding(m._replace(recipe=recipe))(i)[0]
        assert error(q) < len(x) * unit  # learns


@pytest.mark.rotates(2)
def test_whole_nets_in_the_table():
    """AdaDFQ on a batch-norm net and its twin: the metrics of the walk, the same test, Q as deployed."""
    c = get_config()
    c.nets = ConfigDict({"resnet": "digits_resnet_small"})
    c.num_calibration = 16
    c.data_free.update(num_steps=6, warmup=2, range_steps=3, gen_widths=(16, 8))
    arm_ = c.arms.ada_dfq
    c.update(rounding=arm_.rounding, cells=("w8a8", "w4a4_twin"))
    experiment = build(c)
    state = experiment.init(jax.random.key(0))
    assert set(state.nets) == {"plain", "twin"}
    for i in range(experiment.phases[0].num_steps):
        state, metrics = experiment.phases[0].step(state)
        assert 0 < metrics["error"] < 10
        assert int(state.step) == i + 1
    found = {k: float(v) for k, v in experiment.evaluate(state).items()}
    assert abs(found["resnet_w8a8/accuracy"] - found["resnet_w8a8/fp_accuracy"]) < 2
    assert found["resnet_w8a8/kl"] < 0.01 < found["resnet_w4a4_twin/kl"]
    assert found["resnet_w8a8/bytes"] > found["resnet_w4a4_twin/bytes"]
    assert found["resnet_w8a8/seconds"] > 0
    other = site_keys(c, "mse")
    for name in ("plain", "twin"):  # the same nets as those of the walk
        own = resnet(ResNetSize(*zoo.recipe("digits_resnet_small").widths)).fold(state.nets[name])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), own, other[name])


def site_keys(c, rounding_):
    """The nets that an arm of the walk starts from."""
    c.update(rounding=rounding_)
    state = build(c).init(jax.random.key(0)).study
    at = {"plain": 0, "twin": 1}
    return {name: jax.tree.map(lambda a, i=i: a[i], state.nets) for name, i in at.items()}


@pytest.mark.slow
def test_q_vlm_in_the_table_keeps_what_the_others_keep():
    c = get_config("vlm")
    c.nets = ConfigDict({"vlm": "digits_vlm_small"})
    c.update(num_calibration=8, cells=("w4a4", "w4a4_twin"))
    found = {}
    for name in ("q_vlm", "mse"):
        c.update(rounding=name)
        experiment = build(c)
        state = experiment.init(jax.random.key(0))
        (phase,) = experiment.phases
        for _ in range(phase.num_steps):
            state, _ = phase.step(state)
        found[name] = {k: float(v) for k, v in experiment.evaluate(state).items()}
    for metric in ("bytes", "stored_bits", "sites_total"):
        assert found["q_vlm"][f"vlm_w4a4/{metric}"] == found["mse"][f"vlm_w4a4/{metric}"]
    assert found["q_vlm"]["vlm_w4a4/fp_accuracy"] == found["mse"]["vlm_w4a4/fp_accuracy"]
    twin = found["q_vlm"]
    assert twin["vlm_w4a4_twin/fp_accuracy"] == pytest.approx(twin["vlm_w4a4/fp_accuracy"], abs=0.2)
