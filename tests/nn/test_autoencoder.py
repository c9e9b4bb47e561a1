"""The autoencoder against lax convolutions, and its training: noise streams, order, learning."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qlab import data
from qlab.lab.errors import UserError
from qlab.nn import autoencoder as ae
from qlab.nn import denoising as dn

KEY = jax.random.key(0)
X = jnp.asarray(data.load("digits").x_train[:64])
NET = ae.denoiser(8, 4, ae.latent_tanh())


def some_params(net, rng):
    """Of the net's shapes, without compiling its init."""
    shapes = jax.eval_shape(net.init, KEY)
    return jax.tree.map(lambda s: np.float32(0.3 * rng.standard_normal(s.shape)), shapes)


def conv(x, w, stride, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), dimension_numbers=dims, **options)


def kernel(p, num_in):
    return p["kernel"].reshape(3, 3, num_in, -1)


@pytest.mark.parametrize("side", [8, pytest.param(28, marks=pytest.mark.slow)])
def test_the_whole_net_by_lax_convolutions(rng, side):
    net = ae.denoiser(side, 5, ae.latent_tanh())

    w, x = some_params(net, rng), np.float32(rng.random((3, side, side, 1)))
    ours, theirs = jax.jit(lambda w, x: (net.apply(w, x, KEY), by_lax(w, x)))(w, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


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


def test_transposed_convolution_is_the_transpose_of_the_convolution(rng):
    """<conv x, h> = <x, convT h> with one kernel, flipped by the definition of a transpose."""

    @jax.jit
    def both(h, x, w):
        back = conv(x, w[::-1, ::-1].transpose(0, 1, 3, 2), 2, padding=((1, 1), (1, 1)))
        up = ae.conv(h, w.reshape(18, 3), "up")
        return (up * x).sum(), (h * back).sum()

    shapes = (1, 4, 4, 2), (1, 8, 8, 3), (3, 3, 2, 3)
    left, right = both(*(np.float32(rng.standard_normal(s)) for s in shapes))
    assert float(left) == pytest.approx(float(right), rel=1e-4)


def test_skip_connections_pass_the_bottleneck(rng):
    """With a dead latent a U-Net still sees the image, the autoencoder does not."""
    dead = ae.Latent(lambda key: {}, lambda w, z, key: 0 * z, 0)
    for skip in (False, True):
        net = ae.denoiser(8, 4, dead, skip=skip)
        out = jax.jit(net.apply)(some_params(net, rng), X[:2], KEY)
        difference = np.abs(out[0] - out[1]).max()
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


def spy(seen=None, sign=1):
    """A net of one number w, logits = sign * noisy pixel + w; what it is given goes to `seen`."""

    def apply(w, y, key):
        if seen is not None:
            jax.debug.callback(lambda v: seen.append(np.asarray(v)), y)
        return sign * y + w["w"]

    return ae.Denoiser(lambda key: {"w": jnp.zeros(())}, apply, ae.latent_linear())


def test_noise_belongs_to_the_image():
    """Any order, any batch: image i of a part has one noise; parts, keys and epochs have others."""

    @jax.jit
    def train(key, index, epoch):
        return dn.noisy_images(key, "train", X[index], index, 0.3, epoch)

    every = np.arange(64)
    whole, pick = np.asarray(train(KEY, every, 0)), np.roll(every[::-1], 5)
    np.testing.assert_array_equal(train(KEY, pick, 0), whole[pick])
    test = np.asarray(jax.jit(lambda: dn.noisy_images(KEY, "test", X, every, 0.3))())
    later = [np.asarray(train(KEY, every, epoch)) for epoch in range(1, 7)]
    draws = [whole, test, np.asarray(train(jax.random.key(1), every, 0)), *later]
    for one, other in itertools.combinations(draws, 2):
        assert np.abs(one - other).mean() > 0.05
    raw = (whole - np.asarray(X))[(whole > 0) & (whole < 1)]
    assert 0.2 < float(raw.std()) < 0.3  # clipped away at both ends

    # the evaluation sees the same: two parts through one loop, the second not a full batch
    state = dn.Train({"spy": {"w": jnp.zeros(())}}, None, jnp.int32(0), KEY, KEY)
    parts = {"train": X, "test": X[:7]}
    out = jax.jit(lambda s: dn.evaluate({"spy": spy()}, s, parts, 0.3))(state)
    for part, noisy in (("train", whole), ("test", test[:7])):
        want = ((1 / (1 + np.exp(-noisy)) - np.asarray(parts[part])) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(out[part]["spy"]["mse"], want, rtol=1e-4)
        np.testing.assert_allclose(out[part]["spy"]["psnr"], -10 * np.log10(want), rtol=1e-4)
        assert {k: v.shape for k, v in out[part]["spy"].items()} == dict.fromkeys(
            ("mse", "psnr", "ssim", "bce"), want.shape
        )


def test_in_batches():
    some = dn.in_batches(lambda v: v * 2, (jnp.arange(10),), size=4)
    np.testing.assert_array_equal(some, 2 * np.arange(10))


GREYS = np.arange(64.0, dtype=np.float32).reshape(64, 1, 1, 1) * np.ones((1, 4, 4, 1), "f") / 64


@functools.cache
def watched(**options):
    """Two epochs of two nets on 64 images of one grey each, under a little noise: batches, losses, params."""
    seen, losses = [], []
    nets = {"a": spy(seen), "b": spy(sign=-1)}
    t = dn.training(nets, jnp.asarray(GREYS), sigma=1e-3, epochs=2, batch=16, lr=0.1, **options)
    assert t.num_steps == 8
    step, state = jax.jit(t.step), t.init(KEY)
    for _ in range(8):
        state, m = step(state)
        losses.append(float(m["loss"]))
        jax.effects_barrier()
    return np.stack(seen).reshape(2, 64, 4, 4, 1), losses, state.params


def test_every_image_once_an_epoch():
    first, second = np.round(64 * watched()[0][:, :, 1, 1, 0]).astype(int)
    np.testing.assert_array_equal(np.sort(first), np.arange(64))
    np.testing.assert_array_equal(np.sort(second), np.arange(64))
    assert (first != second).any()


def test_fresh_noise_comes_with_the_second_epoch():
    fixed, fresh = (v[0][:, :, 1, 1, 0] for v in (watched(), watched(noise_mode="fresh")))
    np.testing.assert_array_equal(fresh[0], fixed[0])  # epoch 0 is the same draw
    np.testing.assert_array_equal(np.sort(fixed[1]), np.sort(fixed[0]))  # an image keeps its noise
    np.testing.assert_array_equal(np.round(64 * fresh[1]), np.round(64 * fixed[1]))
    assert np.mean(fresh[1] != fixed[1]) > 0.95  # black stays black where noise is clipped


def test_nets_side_by_side_train_as_if_alone():
    """Adam by hand, for each net alone, on the batches seen; "loss" is the mean over the nets."""
    seen, losses, params = watched()
    want = np.zeros(8)
    for name, sign in (("a", 1), ("b", -1)):
        w, m, v = 0.0, 0.0, 0.0
        for i, y in enumerate(seen.astype(np.float64).reshape(8, 16, 4, 4, 1)):
            x = np.round(64 * y) / 64
            q = 1 / (1 + np.exp(-(sign * y + w)))
            want[i] += ((q - x) ** 2).mean() / 2
            g = (2 * (q - x) * q * (1 - q)).mean()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w -= 0.1 * (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
        assert float(params[name]["w"]) == pytest.approx(w, abs=1e-5)
    np.testing.assert_allclose(losses, want, rtol=1e-5)


@pytest.mark.slow
def test_it_learns():
    t = dn.training({"net": NET}, X, sigma=0.3, epochs=45, batch=16, lr=3e-3)
    _, m = jax.jit(lambda: jax.lax.scan(lambda s, _: t.step(s), t.init(KEY), length=180))()
    assert np.mean(m["loss"][-4:]) < 0.7 * np.mean(m["loss"][:4])


@pytest.mark.slow
def test_bce_is_another_loss():
    losses = [
        float(t.step(t.init(KEY))[1]["loss"])
        for t in (dn.training({"a": NET}, X, sigma=0.3, epochs=1, loss=k) for k in ("bce", "mse"))
    ]
    assert losses[0] > 2 * losses[1]


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
            dn.training({"a": net}, X, **({"sigma": 0.3, "epochs": 1} | options))
