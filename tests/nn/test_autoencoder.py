"""The autoencoder against lax convolutions, and its training: noise streams, order, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from qlab import data
from qlab.lab.errors import UserError
from qlab.nn import autoencoder as ae
from qlab.nn import denoising as dn

KEY = jax.random.key(0)
X = jnp.asarray(data.load("digits").x_train[:64])
NET = ae.denoiser(8, 4, ae.latent_tanh())


def conv(x, w, stride, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), dimension_numbers=dims, **options)


def kernel(p, num_in):
    return p["kernel"].reshape(3, 3, num_in, -1)


@pytest.mark.parametrize("side", [8, pytest.param(28, marks=pytest.mark.slow)])
def test_the_whole_net_by_lax_convolutions(side):
    x = jax.random.uniform(KEY, (3, side, side, 1))
    net = ae.denoiser(side, 5, ae.latent_tanh())
    w = net.init(jax.random.key(1))
    np.testing.assert_allclose(jax.jit(net.apply)(w, x, KEY), jax.jit(by_lax)(w, x), atol=2e-5)


def by_lax(w, x):
    enc, dec, side = w["encoder"], w["decoder"], x.shape[1]
    h = jax.nn.relu(conv(x, kernel(enc["conv1"], 1), 2, padding="SAME") + enc["conv1"]["bias"])
    h = jax.nn.relu(conv(h, kernel(enc["conv2"], 8), 2, padding="SAME") + enc["conv2"]["bias"])
    z = h.reshape(3, -1) @ enc["dense"]["kernel"] + enc["dense"]["bias"]
    h = jax.nn.relu(jnp.tanh(z) @ dec["dense"]["kernel"] + dec["dense"]["bias"])
    h = h.reshape(3, side // 4, side // 4, 16)
    up = {"padding": ((1, 2), (1, 2)), "lhs_dilation": (2, 2)}
    h = jax.nn.relu(conv(h, kernel(dec["up1"], 16), 1, **up) + dec["up1"]["bias"])
    return conv(h, kernel(dec["up2"], 8), 1, **up) + dec["up2"]["bias"]


def test_transposed_convolution_is_the_transpose_of_the_convolution():
    """<conv x, h> = <x, convT h> with one kernel, flipped by the definition of a transpose."""
    linear = nnx.Linear(9 * 2, 3, use_bias=False, rngs=nnx.Rngs(0))
    h = jax.random.normal(KEY, (1, 4, 4, 2))
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
    w = linear.kernel[...].reshape(3, 3, 2, 3)
    back = conv(x, w[::-1, ::-1].transpose(0, 1, 3, 2), 2, padding=((1, 1), (1, 1)))
    left, right = (ae.conv(h, linear, "up") * x).sum(), (h * back).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-4)


def test_skip_connections_pass_the_bottleneck():
    """With a dead latent a U-Net still sees the image, the autoencoder does not."""
    dead = ae.Latent(lambda key: {}, lambda w, z, key: 0 * z, 0)
    for skip in (False, True):
        net = ae.denoiser(8, 4, dead, skip=skip)
        w = net.init(KEY)
        out = jax.jit(net.apply)(w, X[:2], KEY)
        difference = jnp.abs(out[0] - out[1]).max()
        assert (float(difference) > 1e-3) == skip


def test_latents():
    z = jnp.array([0.5, -2.0, 0.1])
    for name in ae.CLASSICAL:
        latent = ae.classical_latent(name, 3)
        w = latent.init(KEY)
        assert sum(v.size for v in jax.tree.leaves(w)) == latent.num_params
        q = latent.apply(w, z, KEY)
        assert q.shape == (3,)
        assert (name == "linear") or float(jnp.abs(q).max()) < 1
    assert ae.latent_mlp(3).num_params == 24
    with pytest.raises(UserError, match="did you mean"):
        ae.classical_latent("tahn", 3)
    with pytest.raises(UserError, match="multiple of 4"):
        ae.denoiser(10, 3, ae.latent_tanh())


def test_noise_belongs_to_the_image():
    """Any order, any batch: image i of a part has one noise; parts, keys and epochs have others."""
    whole = dn.noisy_images(KEY, "train", X, jnp.arange(64), 0.3)
    pick = jnp.array([5, 60, 2])
    np.testing.assert_array_equal(
        dn.noisy_images(KEY, "train", X[pick], pick, 0.3), np.asarray(whole)[pick]
    )
    others = [
        dn.noisy_images(KEY, "test", X, jnp.arange(64), 0.3),
        dn.noisy_images(jax.random.key(1), "train", X, jnp.arange(64), 0.3),
        dn.noisy_images(KEY, "train", X, jnp.arange(64), 0.3, epoch=1),
    ]
    for other in others:
        assert float(jnp.abs(other - whole).mean()) > 0.05
    raw = (whole - X)[(whole > 0) & (whole < 1)]
    assert 0.2 < float(raw.std()) < 0.3  # clipped away at both ends


@functools.cache
def prepared(**options):
    settings = dict(sigma=0.3, epochs=60, batch=16, lr=3e-3) | options
    t = dn.training(NET, X, **settings)
    return t, jax.jit(t.step)


def run(steps, **options):
    (t, step), seen = prepared(**options), []
    state = t.init(KEY)
    for _ in range(steps):
        state, m = step(state)
        seen.append(float(m["loss"]))
    return state, seen


def test_every_image_once_an_epoch():
    x = jnp.arange(64.0).reshape(64, 1, 1, 1) * jnp.ones((1, 4, 4, 1)) / 64
    seen = []
    spy = ae.Denoiser(
        lambda key: {"w": jnp.zeros(())},
        lambda w, y, key: (
            jax.debug.callback(lambda v: seen.append(np.asarray(v)), y[:, 0, 0, 0])
            or y * 0 + w["w"]
        ),
        ae.latent_linear(),
    )
    t = dn.training(spy, x, sigma=0.0, epochs=2, batch=16)
    state = t.init(KEY)
    for _ in range(t.num_steps):
        state, _ = t.step(state)
    jax.effects_barrier()
    first, second = (np.concatenate(seen[i : i + 4]) for i in (0, 4))
    np.testing.assert_allclose(np.sort(first), np.arange(64) / 64)
    np.testing.assert_allclose(np.sort(second), np.arange(64) / 64)
    assert (first != second).any()


def test_it_learns_and_its_scores_do_not_depend_on_batches():
    assert prepared()[0].num_steps == 240
    state, seen = run(240)
    assert np.mean(seen[-4:]) < 0.6 * np.mean(seen[:4])
    out = jax.jit(lambda s: dn.evaluate(NET, s, {"train": X, "test": X[:7]}, 0.3))(state)
    assert float(out["train"]["mse"].mean()) == pytest.approx(np.mean(seen[-4:]), rel=0.2)
    assert out["test"]["ssim"].shape == (7,)

    @jax.jit
    def score(s, x, i):
        y = dn.noisy_images(s.k_noise, "test", x, i, 0.3)
        return dn.scores(x, jax.nn.sigmoid(NET.apply(s.params, y, KEY)))

    one = score(state, X[:7], jnp.arange(7))
    for name in one:
        np.testing.assert_allclose(out["test"][name], one[name], rtol=1e-3)
    some = dn.in_batches(lambda v: v * 2, (jnp.arange(10),), size=4)
    np.testing.assert_array_equal(some, 2 * np.arange(10))


def test_fresh_noise_comes_with_the_second_epoch():
    fixed, fresh = run(5)[1], run(5, noise_mode="fresh")[1]
    assert fresh[:4] == pytest.approx(fixed[:4], rel=1e-5)  # epoch 0 is the same draw
    assert abs(fresh[4] - fixed[4]) > 1e-6


@pytest.mark.slow
def test_bce_is_another_loss():
    assert run(1, loss="bce")[1][0] > 2 * run(1)[1][0]


def test_cells_share_nets():
    out = dn.over_cells({"a": "x", "b": "x", "c": "y"}, {"x": {"m": jnp.array(1.0)}, "y": {"m": jnp.array(4.0)}})  # fmt: skip
    assert {k: float(v) for k, v in out.items()} == {"a/m": 1, "b/m": 1, "c/m": 4, "mean/m": 2}


def test_bad_settings_are_one_line():
    net = ae.denoiser(8, 4, ae.latent_tanh())
    for options, match in (
        ({"noise_mode": "frsh"}, "did you mean"),
        ({"loss": "l2"}, "loss"),
        ({"sigma": -1.0}, "sigma"),
        ({"batch": 65}, r"1\.\.64"),
    ):
        with pytest.raises(UserError, match=match):
            dn.training(net, X, **({"sigma": 0.3, "epochs": 1} | options))
