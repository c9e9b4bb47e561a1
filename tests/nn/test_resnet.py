"""The residual family: folding, training through running statistics, BN inputs by name, the rest of a net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.nn import zoo
from qlab.nn.resnet import EPS, ResNetSize, norms, resnet
from qlab.nn.sites import capture, pick, sites

SIZE = ResNetSize(channels=2, widths=(3, 4), depth=2, classes=5)


@pytest.fixture(scope="module")
def family():
    return resnet(SIZE)


@pytest.fixture(scope="module")
def params(family):
    """Norms that are not the identity."""
    rng = np.random.default_rng(0)

    def wild(path, a):
        a = np.asarray(a)
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return jnp.asarray(2.0 ** rng.uniform(-2, 2, a.shape), jnp.float32)
        return jnp.asarray(a + 0.2 * rng.standard_normal(a.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(wild, family.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (6, 8, 8, 2))


@pytest.fixture(scope="module")
def logits(family, params, x):
    return jax.jit(family.apply)(params, x)


def test_both_nets_have_the_same_groups_and_the_same_function(family, params, x, logits):
    assert family.net.names == family.folded.names
    assert [g.n for g in family.net.groups] == [1, 2, 1, 1, 1]
    folded = family.fold(params)
    y = jax.jit(family.folded.apply)(folded, x)
    np.testing.assert_allclose(y, logits, atol=1e-5 * float(jnp.abs(logits).max()))
    made = jax.eval_shape(family.folded.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(lambda a: a.shape, made)


def test_norm_inputs_are_visible_by_name_and_products_have_sites(family, params, x):
    block, p = family.net.groups[0].block, pick(params[0], 0)
    y, seen = capture(block, p, x)
    assert set(norms(p)) == {"stem_bn"} <= set(seen)
    u, q = np.asarray(seen["stem_bn"], np.float64), jax.tree.map(np.float64, p["stem_bn"])
    want = (u - q["mean"]) / np.sqrt(q["var"] + EPS) * q["scale"] + q["bias"]
    np.testing.assert_allclose(y, np.maximum(want, 0), atol=1e-4)
    p = pick(family.fold(params)[2], 0)
    found = sites(family.folded.groups[2].block, p, jnp.zeros((1, 8, 8, 3)))
    assert [s.name for s in found] == ["conv1", "mid", "conv2", "short", "out"]
    assert [s.width for s in found if s.kind == "linear"] == [27, 36, 3]
    last = sites(
        family.folded.groups[3].block, pick(family.fold(params)[3], 0), jnp.zeros((1, 4, 4, 4))
    )
    assert [s.name for s in last if s.kind == "operand"] == ["mid", "features"]


def test_learning_uses_the_batchs_statistics_and_moves_the_running_ones(x):
    family = resnet(ResNetSize(channels=2, widths=(3,), classes=5))
    params = family.init(jax.random.key(0))
    learn = jax.jit(family.learn)
    logits, stats = learn(params, x, 0.9)
    # in float64, the stem by hand
    u = capture(family.net.groups[0].block, pick(params[0], 0), x)[1]["stem_bn"]
    u = np.asarray(u, np.float64).reshape(-1, 3)
    mean, var = (stats[0]["stem_bn"][k][0] for k in ("mean", "var"))
    np.testing.assert_allclose(mean, 0.1 * u.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(var, 0.9 + 0.1 * u.var(0, ddof=1), rtol=1e-4)
    # the logits do not depend on the running statistics
    moved = family.keep(params, stats)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    again, own = learn(moved, x, 0.0)
    np.testing.assert_allclose(again, logits, atol=1e-4 * float(jnp.abs(logits).max()))
    # where those are the batch's own, evaluation gives what training does (but for the unbiased variance)
    y = jax.jit(family.apply)(family.keep(params, own), x)
    np.testing.assert_allclose(y, logits, atol=1e-2 * float(jnp.abs(logits).max()))


def test_suffix_is_the_rest_of_the_net(family, params, x, logits):
    net = family.net

    @jax.jit
    def rests(params, x):
        out = []
        for g, group in enumerate(net.groups):
            for i in range(group.n):
                x = group.block(pick(params[g], i), x)
                out.append(net.suffix(params, g, jnp.int32(i), x))
        return out

    for rest in rests(params, x):
        np.testing.assert_allclose(rest, logits, atol=1e-5 * float(jnp.abs(logits).max()))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="at least one of each"):
        resnet(ResNetSize(widths=()))


@pytest.mark.slow
def test_the_zoo_trains_it_with_running_statistics(tmp_path):
    family, params = zoo.train("digits_resnet_small", jax.random.key(0), cache=tmp_path)
    d = zoo.examples("digits16")
    assert d.x_val.shape[1:] == (16, 16, 1)
    assert zoo.accuracy(family.apply(params, jnp.asarray(d.x_val)), d.y_val) > 70.0
    mean, var = norms(pick(params[0], 0))["stem_bn"]
    u = capture(family.net.groups[0].block, pick(params[0], 0), jnp.asarray(d.x_train))[1][
        "stem_bn"
    ]
    np.testing.assert_allclose(mean, u.mean((0, 1, 2)), rtol=0.1, atol=0.05)
    np.testing.assert_allclose(var, u.var((0, 1, 2)), rtol=0.2)
