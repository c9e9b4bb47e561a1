import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlab.lab.errors import UserError
from qlab.nn import zoo
from qlab.nn.chain import forward, inject_outliers, patches
from qlab.nn.models import CNN, MLP, cnn, mlp

DEEP = (64,) + (24,) * 7 + (10,)


def images(num=6, seed=0, channels=1):
    return jax.random.uniform(jax.random.key(seed), (num, 8, 8, channels))


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_times_kernel_is_the_convolution(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    mine = patches(x, 3, stride) @ kernel.reshape(-1, 5)
    lax = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(mine, lax, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "module"),
    [(mlp(DEEP), lambda r: MLP(DEEP, rngs=r)), (cnn(), lambda r: CNN((8, 16, 16), rngs=r))],
)
@pytest.mark.slow
def test_pure_apply_chain_and_module_agree(model, module):
    params = model.init(jax.random.key(0))
    net = module(nnx.Rngs(params=jax.random.key(0)))
    x = images()
    np.testing.assert_array_equal(model.apply(params, x), net(x))
    np.testing.assert_allclose(forward(model.chain, model.layers(params), x), net(x), atol=1e-5)
    assert tuple(a.w.shape for a in model.layers(params)) == model.shapes
    stacked = jax.vmap(model.init)(jax.random.split(jax.random.key(1), 2))  # pure: vmaps over seeds
    assert jax.vmap(model.apply, (0, None))(stacked, x).shape == (2, 6, 10)


@pytest.mark.parametrize("model", [mlp(DEEP), cnn()])
def test_outlier_twin_computes_the_same_function(model):
    layers = model.layers(model.init(jax.random.key(0)))
    twin = inject_outliers(layers, 2.0, jax.random.key(1))
    x = images(32)
    want = np.asarray(forward(model.chain, layers, x))
    got = np.asarray(forward(model.chain, twin, x))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    ratio = np.asarray(twin[1].w / layers[1].w)
    assert ratio.max() / ratio.min() > 16  # the ranges of the weights did change
    assert ratio.max() <= 16 * 1.001  # rows times 2^2 at most, columns over 2^-2 at least
    again = inject_outliers(layers, 2.0, jax.random.key(1))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(twin), jax.tree.leaves(again), strict=True)
    )


def test_outlier_twin_refuses_layers_that_do_not_chain():
    a, b = (mlp((4, n)).layers(mlp((4, n)).init(jax.random.key(0)))[0] for n in (3, 2))
    with pytest.raises(ValueError, match="no multiple of the 3 channels"):
        inject_outliers((a, b), 1.0, jax.random.key(0))


def test_zoo_is_deterministic_in_the_key_and_cached(tmp_path, capsys):
    key = jax.random.key(3)
    net, params = zoo.train("digits_small", key, cache=tmp_path)
    (file,) = tmp_path.glob("*.npz")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = zoo.train("digits_small", key, cache=tmp_path)[1]  # read
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    anew = zoo.train("digits_small", key, cache=elsewhere)[1]  # trained
    other = zoo.train("digits_small", jax.random.key(4), cache=tmp_path)[1]
    for a, b, c in zip(*map(jax.tree.leaves, (params, again, anew)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert not np.array_equal(jax.tree.leaves(params)[1], jax.tree.leaves(other)[1])
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert not list(tmp_path.glob("*.tmp"))
    set_ = zoo.data.load("digits")
    assert float(zoo.accuracy(net.apply(params, jnp.asarray(set_.x_test)), set_.y_test)) > 93
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_cache_file_is_made_again_with_a_line(tmp_path, capsys, damage):
    key = jax.random.key(5)
    params = zoo.train("digits_small", key, cache=tmp_path)[1]
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    middle = len(whole) // 2
    broken = {
        "cut": whole[:middle],
        "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "text": b"not an archive",
    }[damage]
    file.write_bytes(broken)
    again = zoo.train("digits_small", key, cache=tmp_path)[1]
    assert "is damaged" in capsys.readouterr().out
    for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    zoo.train("digits_small", key, cache=tmp_path)
    assert capsys.readouterr().out == ""


def test_unknown_net_is_one_line():
    with pytest.raises(UserError, match="did you mean digits_deep"):
        zoo.train("digits_dep", jax.random.key(0))
