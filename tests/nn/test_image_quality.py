"""SSIM and PSNR against float64 loops over windows, closed forms and scikit-image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.nn import image_quality as iq

ssim = jax.jit(iq.ssim, static_argnames=("win", "sigma"))
CASES = [(8, 7, None), (28, 11, 1.5), (16, 7, None), (13, 11, 1.5), (9, 5, 1.0)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def images(rng, side, num=3):
    x = rng.random((num, side, side, 1))
    return x, np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)


def ssim_by_windows(x, y, win, sigma):
    """One window at a time, covariances about the weighted means."""
    at = np.arange(win) - win // 2
    one = np.ones(win) if sigma is None else np.exp(-0.5 * (at / sigma) ** 2)
    w = np.outer(one, one) / one.sum() ** 2
    values = []
    for i in range(x.shape[0] - win + 1):
        for j in range(x.shape[1] - win + 1):
            a, b = x[i : i + win, j : j + win], y[i : i + win, j : j + win]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize(("side", "win", "sigma"), CASES)
def test_ssim_window_by_window(rng, side, win, sigma):
    x, y = images(rng, side)
    want = [ssim_by_windows(a, b, win, sigma) for a, b in zip(x[..., 0], y[..., 0], strict=True)]
    np.testing.assert_allclose(ssim(x, y, win=win, sigma=sigma), want, atol=1e-12)
    if side in (8, 28):  # the sizes in use
        low = ssim(np.float32(x), np.float32(y), win=win, sigma=sigma)
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, want, atol=1e-4)  # variances by subtraction


@pytest.mark.parametrize(("side", "win", "sigma"), [c for c in CASES if c[1] != 5])
def test_ssim_is_scikit_images(rng, side, win, sigma):
    metrics = pytest.importorskip("skimage.metrics")
    x, y = images(rng, side)
    options = (
        {"gaussian_weights": True, "sigma": sigma}
        if sigma
        else {"win_size": win, "gaussian_weights": False}
    )
    want = [
        metrics.structural_similarity(
            a, b, data_range=1, use_sample_covariance=False, full=False, **options
        )
        for a, b in zip(x[..., 0], y[..., 0], strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y, win=win, sigma=sigma), want, atol=1e-12)


def test_ssim_closed_forms(rng):
    x, y = images(rng, 12)
    np.testing.assert_allclose(ssim(x, x), 1, atol=1e-12)
    one_way = ssim(x, y)
    np.testing.assert_allclose(one_way, ssim(y, x), atol=1e-12)
    assert np.all(one_way < 1)
    c, d = 0.3, 0.8
    flat = [np.full((3, 12, 12, 1), v) for v in (c, d)]
    want = (2 * c * d + 1e-4) / (c * c + d * d + 1e-4)
    np.testing.assert_allclose(ssim(*flat), want, atol=1e-12)


def test_psnr_and_mse(rng):
    x, y = images(rng, 8)
    error = ((x - y) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(iq.mse(x, y), error, atol=1e-14)
    np.testing.assert_allclose(iq.psnr(x, y), 10 * np.log10(1 / error), atol=1e-10)


def test_noise_is_clipped_and_has_its_spread():
    x = np.full((1, 200, 200, 1), 0.5)
    add = jax.jit(lambda sigma: iq.add_noise(jax.random.key(0), x, sigma))
    y, z = np.asarray(add(0.1)), np.asarray(add(5.0))
    assert float(y.std()) == pytest.approx(0.1, rel=0.02)
    assert float(y.mean()) == pytest.approx(0.5, abs=0.003)
    assert float(z.min()) == 0.0
    assert float(z.max()) == 1.0
    np.testing.assert_array_equal(add(0.0), x)


def test_window_for_a_side():
    assert iq.ssim_for(28) == {"win": 11, "sigma": 1.5}
    assert iq.ssim_for(8) == {"win": 7, "sigma": None}


def test_bad_input_is_one_line():
    x = jnp.zeros((1, 8, 8, 1))
    with pytest.raises(UserError, match="win=7"):
        iq.ssim(x, x)
    with pytest.raises(UserError, match="equal shapes"):
        iq.ssim(x, x[0])
    with pytest.raises(UserError, match="odd"):
        iq.ssim(x, x, win=4)
