"""One site of a quantized net redone, the rest untouched; and the trial of a study at its widest block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.nn.vit import ViTSize, vit
from qlab.quantization.activations import affine, minmax
from qlab.quantization.blocks import gptq_weight, nearest_weight, site_by_site
from qlab.quantization.quantize_net import quantize_net, redo_site
from qlab.quantization.site_study import Cell, site_study

NET = vit(ViTSize(patch=4, dim=16, hidden=32, heads=2, depth=2))


def by_range(i):
    return affine(*minmax(i.x), i.bits)


@pytest.fixture(scope="module")
def walked():
    params = NET.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (64, 8, 8, 1))
    method = site_by_site(act=by_range, weight=gptq_weight())
    return params, x, quantize_net(NET, params, x, method, w_bits=3, a_bits=8)


def codes(done):
    return {
        (g, i, site): np.asarray(qt.codes[i])
        for g, q in enumerate(done.blocks)
        for site, qt in q.weights.items()
        for i in range(len(qt.codes))
    }


def test_a_site_redone_as_before_is_as_before(walked):
    params, x, done = walked
    again = redo_site(done, NET, params, x, "encoder.1/fc1", gptq_weight(), w_bits=3)
    same = {k: (a == codes(done)[k]).mean() for k, a in codes(again).items()}
    assert same.pop((1, 1, "fc1")) > 0.995  # one program less: sums in another order
    assert set(same.values()) == {1.0}


def test_another_damping_moves_that_site_alone(walked):
    params, x, done = walked
    for damp, least in ((0.1, 0.001), (100.0, 0.02)):
        again = redo_site(done, NET, params, x, "encoder.1/fc1", gptq_weight(damp=damp), w_bits=3)
        moved = {k: (a != codes(done)[k]).mean() for k, a in codes(again).items()}
        assert moved.pop((1, 1, "fc1")) > least
        assert not any(moved.values())
    w = np.asarray(params[1]["fc1"]["kernel"][1]).T
    nearest, _ = nearest_weight()(type("Input", (), {"w": jnp.asarray(w), "bits": jnp.float32(3)}))
    again = redo_site(
        done, NET, params, x, "encoder.1/fc1", gptq_weight(damp=1e9, target="same"), w_bits=3
    )  # nothing but the diagonal is left of the Hessian
    np.testing.assert_array_equal(codes(again)[1, 1, "fc1"], nearest.codes)


def test_places_that_do_not_exist_are_named(walked):
    params, x, done = walked
    for where, text in (
        ("encoder.7/fc1", "no block is called 'encoder.7'"),
        ("encoder.1/fc9", "has no quantized weight 'fc9'; did you mean"),
    ):
        with pytest.raises(UserError, match=text):
            redo_site(done, NET, params, x, where, gptq_weight(), w_bits=3)


def test_inputs_and_weights_that_do_not_fit_are_named(walked):
    params, x, _ = walked
    method = site_by_site(act=by_range, weight=nearest_weight())
    broken = jax.tree.map(jnp.array, params)
    broken[1]["fc1"]["kernel"] = broken[1]["fc1"]["kernel"].at[0, 0, 0].set(jnp.nan)
    for given, inputs, text in (
        (params, x[:, :4], r"does not take calibration inputs of shape \(64, 4, 8, 1\)"),
        (params, x.at[0].set(jnp.inf), "empty or not finite"),
        (broken, x, r"encoder.*fc1.*kernel.* holds NaN"),
    ):
        with pytest.raises(UserError, match=text) as error:
            quantize_net(NET, given, inputs, method, w_bits=4, a_bits=8)
        assert "\n" not in str(error.value)


def test_a_study_is_tried_at_its_widest_block(walked):
    params, x, _ = walked
    study = site_study(
        NET, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), np.zeros(64, np.int32)),
        [Cell("w4a4", 4, 4), Cell("w3a3", 3, 3)], site_by_site(act=by_range, weight=nearest_weight()),
        num_calibration=16,
    )  # fmt: skip
    (phase,) = study.phases
    assert phase.widest is not None
    start = phase.widest(study.init(jax.random.key(0)))
    assert NET.names[int(start.step)] == "encoder.0"
    state, metrics = phase.step(start)
    made = np.asarray(state.quantized[1].weights["fc1"].codes)
    assert made[0].any()
    assert not made[1].any()
    assert np.isfinite(float(metrics["error"]))
