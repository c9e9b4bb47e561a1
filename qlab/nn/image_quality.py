"""How good an image is: PSNR and SSIM, in JAX; and the noise that makes it bad.

Letters: N = images, H, W, C = height, width, channels. Pixels lie in [0, 1].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError

K1, K2 = 0.01, 0.03  # Wang et al. 2004


def add_noise(key: jax.Array, x: jax.Array, sigma: float) -> jax.Array:
    """clip(x + sigma eps, 0, 1), eps ~ N(0, 1), same shape and dtype as x."""
    return jnp.clip(x + sigma * jax.random.normal(key, x.shape, x.dtype), 0.0, 1.0)


def mse(x: jax.Array, y: jax.Array) -> jax.Array:
    """f[N]: mean squared error of each image f[N, H, W, C]."""
    return ((x - y) ** 2).mean((1, 2, 3))


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """f[N] in dB: 10 log10(1 / MSE) of each image; inf where the two are equal.

    >>> psnr(jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), 0.1)).round(3).tolist()
    [20.0]
    """
    return -10.0 * jnp.log10(mse(x, y))


@functools.cache
def window(win: int, sigma: float | None) -> np.ndarray:
    """f64[win]: weights of the SSIM window along one axis, of sum 1."""
    if win < 1 or win % 2 == 0:
        raise UserError(f"SSIM window of {win} pixels; use an odd number")
    if sigma is None:
        return np.full(win, 1 / win)
    at = np.arange(win) - win // 2
    w = np.exp(-0.5 * (at / sigma) ** 2)
    return w / w.sum()


def _bands(size: int, win: int, sigma: float | None) -> np.ndarray:
    """f64[size - win + 1, size]: row i averages over the window that starts at pixel i."""
    out = np.zeros((size - win + 1, size))
    for i in range(len(out)):
        out[i, i : i + win] = window(win, sigma)
    return out


def ssim(
    x: jax.Array, y: jax.Array, *, win: int = 11, sigma: float | None = 1.5, span: float = 1.0
) -> jax.Array:
    """Structural similarity of each image, mean over the places where the whole window fits.

    Wang, Bovik, Sheikh, Simoncelli 2004, with population covariance: scikit-image's structural_similarity with
    use_sample_covariance=False, gaussian_weights=True, sigma=1.5 (and win_size=win, gaussian_weights=False for
    sigma=None). On 8 x 8 images the 11-pixel window does not fit: use win=7, sigma=None.

    Args:
      x, y: f[N, H, W, C], channels averaged. win: odd, at most H and W. sigma: of the Gaussian, None = uniform.
      span: largest value minus smallest (L).
    Returns:
      f[N], 1 for equal images.

    >>> x = jnp.linspace(0, 1, 64).reshape(1, 8, 8, 1)
    >>> ssim(x, x, win=7, sigma=None).round(6).tolist()
    [1.0]
    """
    if x.shape != y.shape or x.ndim != 4:
        raise UserError(f"ssim of {x.shape} and {y.shape}; expected two equal shapes (N, H, W, C)")
    if min(x.shape[1:3]) < win:
        raise UserError(f"SSIM window of {win} pixels on images of {x.shape[1]} x {x.shape[2]}; "
                        "use win=7, sigma=None for small images")  # fmt: skip
    exact = jax.lax.Precision.HIGHEST
    rows, cols = (jnp.asarray(_bands(n, win, sigma), x.dtype) for n in x.shape[1:3])
    moments = jnp.stack([x, y, x * x, y * y, x * y])
    over = jnp.einsum("mnhwc,ih->mniwc", moments, rows, precision=exact)
    mx, my, xx, yy, xy = jnp.einsum("mniwc,jw->mnijc", over, cols, precision=exact)

    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    top = (2 * mx * my + c1) * (2 * cov + c2)
    return (top / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


def ssim_for(side: int) -> dict[str, Any]:
    """The window for square images: Gaussian 11 x 11 where it fits, else uniform 7 x 7.

    >>> ssim_for(8)
    {'win': 7, 'sigma': None}
    """
    return {"win": 11, "sigma": 1.5} if side >= 11 else {"win": 7, "sigma": None}
