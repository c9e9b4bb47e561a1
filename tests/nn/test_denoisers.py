"""Filters and linear maps against loops, certificates of optimality and other libraries."""

import numpy as np
import pytest
from scipy import ndimage

from qlab.lab.errors import UserError
from qlab.nn import denoisers as dn


def noisy_pair(rng, num=40, side=8):
    from qlab import data

    x = data.load("digits").x_train[:num].astype(np.float64)
    return np.clip(x + 0.3 * rng.standard_normal(x.shape), 0, 1), x


def test_median_and_gaussian_of_single_images(rng):
    y, _ = noisy_pair(rng, 5)
    for i in range(5):
        np.testing.assert_array_equal(
            dn.median(y[..., 0], 3)[i], ndimage.median_filter(y[i, ..., 0], 3)
        )
        np.testing.assert_allclose(
            dn.gaussian(y[..., 0], 0.8)[i], ndimage.gaussian_filter(y[i, ..., 0], 0.8), atol=1e-14
        )


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_total_variation_is_optimal(rng, weight):
    """Duality gap: for any |p| <= 1 the minimum is at least |y|^2/2 - |y + weight div p|^2/2."""
    y = rng.random((3, 8, 8))
    u = dn.total_variation(y, weight, 4000)
    # u = y + weight div p with a feasible p, so the dual value of that very p bounds the minimum
    dual = 0.5 * (y**2).sum((1, 2)) - 0.5 * (u**2).sum((1, 2))
    gap = dn.tv_energy(u, y, weight) - dual
    assert np.all(gap > -1e-12)
    assert np.all(gap < 1e-5)
    short = dn.tv_energy(dn.total_variation(y, weight), y, weight)
    np.testing.assert_allclose(short, dual, rtol=1e-3)  # the default number of rounds is enough


def test_total_variation_of_two_pixels():
    """Each pixel moves by `weight` towards the other until they meet."""
    y = np.array([[[0.1, 0.9]]])
    np.testing.assert_allclose(dn.total_variation(y, 0.15, 500)[0, 0], [0.25, 0.75], atol=1e-6)
    np.testing.assert_allclose(dn.total_variation(y, 0.6, 500)[0, 0], [0.5, 0.5], atol=1e-6)


def test_gradient_and_divergence_are_adjoint(rng):
    u, p = rng.random((2, 5, 6)), rng.random((2, 2, 5, 6))
    assert (dn._gradient(u) * p).sum() == pytest.approx(-(u * dn._divergence(p)).sum())


@pytest.mark.parametrize(("side", "reach"), [(6, 5), (9, 3)])
def test_nonlocal_means_by_loops(rng, side, reach):
    y, strength, out = rng.random((2, side, side)), 0.4, np.zeros((2, side, side))
    around = np.pad(y, [(0, 0), (1, 1), (1, 1)], mode="symmetric")
    for n, i, j in np.ndindex(y.shape):
        mine, total, norm = around[n, i : i + 3, j : j + 3], 0.0, 0.0
        for k, l in np.ndindex(side, side):
            if abs(k - i) <= reach and abs(l - j) <= reach:
                d2 = ((mine - around[n, k : k + 3, l : l + 3]) ** 2).mean()
                w = np.exp(-d2 / strength**2)
                total, norm = total + w * y[n, k, l], norm + w
        out[n, i, j] = total / norm
    np.testing.assert_allclose(dn.nonlocal_means(y, strength, reach=reach), out, atol=1e-12)


def test_ridge_is_the_normal_equations(rng):
    y, x = (z.reshape(len(z), -1) for z in noisy_pair(rng))
    yc = y - y.mean(0)
    w = np.linalg.solve(yc.T @ yc + 2.0 * np.eye(64), yc.T @ (x - x.mean(0)))
    new = rng.random((3, 64))
    want = x.mean(0) + (new - y.mean(0)) @ w
    np.testing.assert_allclose(dn.ridge(y, x, 2.0)(new), want, atol=1e-9)


def test_reduced_rank_is_the_best_of_its_rank(rng):
    """Full rank: ridge itself. Rank r: no worse than random bottlenecks and than descent from it."""
    y, x = (z.reshape(len(z), -1) for z in noisy_pair(rng, 60))
    y, x = y[:, 16:40], x[:, 16:40]
    alpha, rank = 3.0, 3
    new = rng.random((4, 24))
    full = dn.ridge(y, x, alpha)
    np.testing.assert_allclose(dn.reduced_rank(y, x, alpha, 24)(new), full(new), atol=1e-9)

    yc, xc = y - y.mean(0), x - x.mean(0)

    def objective(m):  # m f[24, 24]
        return ((yc @ m - xc) ** 2).sum() + alpha * (m**2).sum()

    fitted = dn.reduced_rank(y, x, alpha, rank)
    m = fitted(np.eye(24) + y.mean(0)) - x.mean(0)
    assert np.linalg.matrix_rank(m, tol=1e-8) == rank
    u, s, vt = np.linalg.svd(m)
    a, b = u[:, :rank] * s[:rank], vt[:rank]
    best = objective(m)
    for _ in range(200):
        da, db = (0.02 * rng.standard_normal(z.shape) for z in (a, b))
        assert objective((a + da) @ (b + db)) >= best - 1e-9
    gram = yc.T @ yc + alpha * np.eye(24)
    for _ in range(50):  # alternating least squares from random starts ends no lower
        b = rng.standard_normal((rank, 24))
        for _ in range(30):
            a = np.linalg.solve(gram, yc.T @ xc @ b.T) @ np.linalg.inv(b @ b.T)
            b = np.linalg.solve(a.T @ gram @ a, a.T @ yc.T @ xc)
        assert objective(a @ b) >= best - 1e-6


def test_pca_is_the_svd(rng):
    y, x = (z.reshape(len(z), -1) for z in noisy_pair(rng))
    v = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:5]
    want = x.mean(0) + (y - x.mean(0)) @ v.T @ v
    np.testing.assert_allclose(dn.pca(y, x, 0.0, 5)(y), want, atol=1e-9)


@pytest.mark.parametrize("name", [*dn.FILTERS, *dn.LINEAR])
def test_tuning_sees_validation_only_and_takes_the_best(rng, name):
    y, x = noisy_pair(rng, 120)
    train, val = (y[:80], x[:80]), (y[80:], x[80:])
    run, strength = dn.fit(name, train, val, rank=4)
    out = run(y)
    assert out.shape == y.shape
    assert out.min() >= 0
    assert out.max() <= 1
    choices = dn.FILTERS[name][1] if name in dn.FILTERS else dn.ALPHAS
    if name not in ("noisy", "pca"):
        assert strength in choices
        assert ((run(val[0]) - val[1]) ** 2).mean() <= ((val[0] - val[1]) ** 2).mean()
        for s in choices:
            if name in dn.FILTERS:
                other = np.clip(dn.FILTERS[name][0](val[0][..., 0], s), 0, 1)[..., None]
                assert ((other - val[1]) ** 2).mean() >= (
                    (run(val[0]) - val[1]) ** 2
                ).mean() - 1e-12


def test_filters_of_scikit_image(rng):
    restoration = pytest.importorskip("skimage.restoration")
    y = rng.random((8, 8))
    theirs = restoration.denoise_tv_chambolle(y, weight=0.2, eps=1e-12, max_num_iter=20_000)
    np.testing.assert_allclose(dn.total_variation(y[None], 0.2, 4000)[0], theirs, atol=2e-3)


def test_bad_names_are_one_line(rng):
    pair = noisy_pair(rng, 4)
    with pytest.raises(UserError, match="did you mean"):
        dn.fit("medain", pair, pair)
    with pytest.raises(UserError, match="rank"):
        dn.fit("pca", pair, pair)
