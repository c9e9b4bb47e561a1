"""Denoisers that train no net: filters tuned on validation images, and linear maps from noisy to clean.

On the host, NumPy in float64, all images at once. Letters: N = images, S = side, D = S * S pixels.
A filter is f(y f[N, S, S], strength) -> f[N, S, S]; a linear method is fitted on noisy and clean training images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from qlab.lab.errors import UserError, nearest

Array = np.ndarray


def median(y: Array, size: float) -> Array:
    """Median over size x size pixels, edges reflected."""
    from scipy.ndimage import median_filter

    return median_filter(y, size=(1, int(size), int(size)), mode="reflect")


def gaussian(y: Array, sd: float) -> Array:
    """Gaussian blur of standard deviation `sd` pixels, edges reflected."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(y, sigma=(0, sd, sd), mode="reflect")


def _gradient(u: Array) -> Array:
    """Forward differences f[2, N, S, S], 0 behind the last row and column."""
    g = np.zeros((2, *u.shape))
    g[0, :, :-1] = u[:, 1:] - u[:, :-1]
    g[1, :, :, :-1] = u[:, :, 1:] - u[:, :, :-1]
    return g


def _divergence(p: Array) -> Array:
    """The negative adjoint of `_gradient`."""
    d = np.zeros(p.shape[1:])
    d[:, :-1] += p[0, :, :-1]
    d[:, 1:] -= p[0, :, :-1]
    d[:, :, :-1] += p[1, :, :, :-1]
    d[:, :, 1:] -= p[1, :, :, :-1]
    return d


def tv_energy(u: Array, y: Array, weight: float) -> Array:
    """f[N]: |u - y|^2 / 2 + weight * sum of |gradient u| (isotropic)."""
    smooth = np.sqrt((_gradient(u) ** 2).sum(0)).sum((1, 2))
    return 0.5 * ((u - y) ** 2).sum((1, 2)) + weight * smooth


def total_variation(y: Array, weight: float, num_iters: int = 200) -> Array:
    """argmin_u `tv_energy`: Chambolle 2004's dual projection u = y + weight div p, |p| <= 1, accelerated (FISTA)."""
    p = np.zeros((2, *y.shape))
    ahead, t = p, 1.0
    if weight == 0:
        return y.copy()
    for _ in range(num_iters):
        step = ahead + _gradient(_divergence(ahead) + y / weight) / 8  # |gradient|^2 <= 8
        new = step / np.maximum(1.0, np.sqrt((step**2).sum(0)))
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_new * (new - p)
        p, t = new, t_new
    return y + weight * _divergence(p)


def nonlocal_means(y: Array, strength: float, patch: int = 3, reach: int = 5) -> Array:
    """Buades, Coll, Morel 2005: each pixel becomes the mean of pixels whose surroundings look like its own.

    Weights exp(-d^2 / strength^2), d^2 = mean squared difference of two patch x patch surroundings; candidates lie
    at most `reach` pixels away inside the image; surroundings reflect at the edge.
    """
    half, side_h, side_w = patch // 2, y.shape[1], y.shape[2]
    around = np.pad(y, [(0, 0), (half, half), (half, half)], mode="symmetric")
    views = np.stack(
        [
            around[:, i : i + side_h, j : j + side_w]
            for i, j in itertools.product(range(patch), repeat=2)
        ]
    )
    total, norm = np.zeros_like(y), np.zeros_like(y)
    offsets_h = range(-min(reach, side_h - 1), min(reach, side_h - 1) + 1)
    offsets_w = range(-min(reach, side_w - 1), min(reach, side_w - 1) + 1)
    for i, j in itertools.product(offsets_h, offsets_w):
        here = (slice(max(0, -i), side_h - max(0, i)), slice(max(0, -j), side_w - max(0, j)))
        there = (slice(max(0, i), side_h + min(0, i)), slice(max(0, j), side_w + min(0, j)))
        d2 = ((views[:, :, *here] - views[:, :, *there]) ** 2).mean(0)
        w = np.exp(-d2 / strength**2)
        total[:, *here] += w * y[:, *there]
        norm[:, *here] += w
    return total / norm


def noisy(y: Array, strength: float = 0.0) -> Array:
    """The image as it came."""
    return y


# ---- linear maps --------------------------------------------------------------------------------


def ridge(y: Array, x: Array, alpha: float) -> Callable[[Array], Array]:
    """Ridge regression of clean pixels x f[N, D] on noisy ones y f[N, D], with intercept."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=alpha).fit(y, x)
    return lambda new: np.asarray(model.predict(new))


def reduced_rank(y: Array, x: Array, alpha: float, rank: int) -> Callable[[Array], Array]:
    """Ridge regression whose matrix has at most `rank`: the best linear bottleneck of that width.

    The full fit is projected on the leading right singular vectors of its ridge-augmented fitted values, which
    minimises the penalised training error among all matrices of the rank.
    """
    full = ridge(y, x, alpha)
    middle = x.mean(0)
    coef = full(np.eye(y.shape[1])) - full(np.zeros((1, y.shape[1])))  # f[D, D]: rows of W^T
    centred = np.concatenate([(y - y.mean(0)) @ coef, np.sqrt(alpha) * coef])
    basis = np.linalg.svd(centred, full_matrices=False)[2][:rank]
    return lambda new: middle + (full(new) - middle) @ basis.T @ basis


def pca(y: Array, x: Array, alpha: float, rank: int) -> Callable[[Array], Array]:
    """Projection of a noisy image on the first principal components of the clean ones (alpha is not used)."""
    from sklearn.decomposition import PCA

    model = PCA(n_components=rank, svd_solver="full").fit(x)
    return lambda new: np.asarray(model.inverse_transform(model.transform(new)))


# ---- by name, tuned -----------------------------------------------------------------------------

FILTERS: dict[str, tuple[Callable[..., Array], tuple[float, ...]]] = {
    "noisy": (noisy, (0.0,)),
    "median": (median, (1, 3, 5)),
    "gaussian": (gaussian, tuple(np.arange(0.3, 1.55, 0.1).round(2).tolist())),
    "tv": (total_variation, tuple((0.025 * 1.4 ** np.arange(11)).round(3).tolist())),
    "nlm": (nonlocal_means, tuple((0.08 * 1.3 ** np.arange(11)).round(3).tolist())),
}
LINEAR: dict[str, Any] = {"ridge": ridge, "reduced_rank": reduced_rank, "pca": pca}
ALPHAS = tuple((10.0 ** np.arange(-1, 3.1, 0.5)).round(3).tolist())


def fit(
    name: str,
    train: tuple[Array, Array],
    val: tuple[Array, Array],
    *,
    rank: int = 0,
) -> tuple[Callable[[Array], Array], float]:
    """A denoiser f[N, S, S, 1] -> f[N, S, S, 1] whose one strength has the least squared error on `val`.

    Args:
      name: a key of FILTERS or LINEAR. train, val: (noisy, clean) images f[N, S, S, 1]; filters see only `val`.
      rank: of reduced_rank and pca.
    Returns:
      (denoiser, the chosen strength).
    Raises:
      UserError: an unknown name, or a rank that is not in 1..D.
    """
    if name not in FILTERS and name not in LINEAR:
        raise UserError(f"no denoiser is called {name!r}{nearest(name, (*FILTERS, *LINEAR))}")
    size = train[1][0].size
    if name in ("reduced_rank", "pca") and not 0 < rank <= size:
        raise UserError(f"{name} of rank {rank}; give 1..{size}")

    def rows(z):
        return np.asarray(z, np.float64).reshape(len(z), -1)

    def build(strength: float) -> Callable[[Array], Array]:
        if name in FILTERS:
            run = FILTERS[name][0]
            return lambda y: np.clip(run(np.asarray(y, np.float64)[..., 0], strength), 0, 1)[
                ..., None
            ]
        extra = (rank,) if name != "ridge" else ()
        model = LINEAR[name](rows(train[0]), rows(train[1]), strength, *extra)
        return lambda y: np.clip(model(rows(y)), 0, 1).reshape(y.shape)

    choices = FILTERS[name][1] if name in FILTERS else (ALPHAS if name != "pca" else (0.0,))
    built = [build(s) for s in choices]
    if len(built) == 1:
        return built[0], choices[0]
    errors = [((f(val[0]) - val[1]) ** 2).mean() for f in built]
    best = int(np.argmin(errors))
    return built[best], float(choices[best])
