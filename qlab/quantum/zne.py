"""Zero-noise extrapolation of one curve: E measured at noise levels lam_1 < ... < lam_m, wanted at 0.

Every estimator is a pure function of (lams f[m], energies f[m]) evaluated at `at` (0 by default, any shape), so
the same function draws the fitted curve. None of them sees E(0). Those that can fail return (value, ok).
vmap over `energies` alone keeps everything that depends on lams only (QR, Cholesky) out of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from qlab.lab.errors import UserError


class Fit(NamedTuple):
    """value f[*at.shape] and ok bool[]: False where the stated fallback took the estimator's place."""

    value: jax.Array
    ok: jax.Array


# ---- linear estimators: value = weights . energies ----------------------------------------------


def richardson_weights(lams: jax.Array, at: jax.Array = 0.0) -> jax.Array:  # type: ignore[assignment]
    """f[*at.shape, m]: Lagrange weights; at 0, w_j = prod_{i != j} lam_i / (lam_i - lam_j).

    >>> richardson_weights(jnp.array([1.0, 2.0, 3.0])).round(4).tolist()
    [3.0, -3.0, 1.0]
    """
    m = lams.shape[0]
    away = lams - jnp.asarray(at, lams.dtype)[..., None]  # f[..., m]
    same = jnp.eye(m, dtype=bool)
    gap = jnp.where(same, 1.0, lams[None] - lams[:, None])
    ratio = jnp.where(same, 1.0, away[..., None, :] / gap)
    return ratio.prod(-1)


def richardson(lams: jax.Array, energies: jax.Array, at: jax.Array = 0.0) -> jax.Array:  # type: ignore[assignment]
    """The polynomial through all m points: no bias on degree < m, noise gain sum_j w_j^2."""
    return richardson_weights(lams, at) @ energies


def _poly_basis(lams: jax.Array, deg: int, at: jax.Array):
    """Orthonormal columns Q f[m, deg+1] on the points, and the rows f[..., deg+1] that predict at `at`."""
    if not 0 <= deg < lams.shape[0]:
        raise UserError(
            f"a polynomial of degree {deg} needs {deg + 1} points or more; got {lams.shape[0]}"
        )
    mid, half = (lams[0] + lams[-1]) / 2, (lams[-1] - lams[0]) / 2
    powers = jnp.arange(deg + 1)
    vander = ((lams - mid) / half)[:, None] ** powers
    q, r = jnp.linalg.qr(vander)
    rows = ((jnp.asarray(at, lams.dtype) - mid) / half)[..., None] ** powers
    return q, solve_triangular(
        r, jnp.moveaxis(rows, -1, 0).reshape(deg + 1, -1), trans=1
    ).T.reshape(rows.shape)


def poly_zne(lams: jax.Array, energies: jax.Array, deg: int, at: jax.Array = 0.0) -> jax.Array:  # type: ignore[assignment]
    """Least-squares polynomial of degree `deg` through the m points."""
    q, rows = _poly_basis(lams, deg, at)
    return rows @ (q.T @ energies)


def loo_residuals(lams: jax.Array, energies: jax.Array, deg: int) -> jax.Array:
    """f[m]: each energy minus its prediction by the polynomial fitted to the others (exact shortcut)."""
    q, _ = _poly_basis(lams, deg, jnp.zeros((), lams.dtype))
    leverage = (q**2).sum(1)
    return (energies - q @ (q.T @ energies)) / (1 - leverage)


def loo_candidates(
    m: int, ranges: tuple[int, ...] = (3, 5, 0), max_deg: int = 4
) -> tuple[tuple[int, int], ...]:
    """(degree, number of first points) pairs with at least one point to spare; range 0 = all.

    >>> loo_candidates(5)
    ((1, 3), (1, 5), (2, 5), (3, 5))
    """
    counts = sorted({min(r or m, m) for r in ranges})
    return tuple((d, c) for c in counts for d in range(1, max_deg + 1) if d <= c - 2)


def poly_loo(lams: jax.Array, energies: jax.Array, at: jax.Array = 0.0) -> jax.Array:  # type: ignore[assignment]
    """Polynomial whose degree and range are chosen by leave-one-out on the given points.

    All candidates are scored on the first three points, which every range contains; leaving out the
    first of them is an extrapolation towards zero. E(0) plays no part.
    """
    scores, values = [], []
    for deg, count in loo_candidates(lams.shape[0]):
        x, y = lams[:count], energies[:count]
        scores.append((loo_residuals(x, y, deg)[:3] ** 2).mean())
        values.append(poly_zne(x, y, deg, at))
    return jnp.stack(values)[jnp.argmin(jnp.stack(scores))]


# ---- exponential --------------------------------------------------------------------------------

_RATES = np.geomspace(1e-2, 60.0, 40)  # |c| * (lam_m - lam_1) that the first pass tries, both signs


def exp_zne(
    lams: jax.Array,
    energies: jax.Array,
    asymptote: jax.Array | None = None,
    at: jax.Array = 0.0,  # type: ignore[assignment]
    *,
    survival: bool = False,
) -> Fit:
    """Least squares of a + b exp(-c x); for each c, (a and) b are solved exactly, and c by search.

    Args:
      asymptote: a, e.g. Tr(H) / 2^n; None fits it too.
      survival: x = -log(1 - lam), exact for energies a + b (1 - lam)^K; else x = lam.
    Returns:
      Fit. Not ok (the rate runs away: one point explains all, or a value is not finite): the linear
      fit takes its place.
    """
    change = (lambda v: -jnp.log1p(-v)) if survival else (lambda v: v)
    x, query = change(lams), change(jnp.asarray(at, lams.dtype))
    width = x[-1] - x[0]
    x, query = (x - x[0]) / width, (query - x[0]) / width
    shift = jnp.zeros((), x.dtype) if asymptote is None else asymptote
    y = energies - shift

    def solve(c):
        u = jnp.exp(-c * x)
        if asymptote is None:
            du = u - u.mean()
            b = (du @ y) / (du @ du)
            return y.mean() - b * u.mean(), b
        return jnp.zeros_like(c), (u @ y) / (u @ u)

    def rss(c):
        a, b = solve(c)
        return ((y - a - b * jnp.exp(-c * x)) ** 2).sum()

    grid = jnp.asarray(np.concatenate([-_RATES[::-1], _RATES]), x.dtype)
    best = jnp.argmin(jax.vmap(rss)(grid))
    inside = (best > 0) & (best < grid.size - 1)
    low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, grid.size - 1)]

    def shrink(bracket, _):  # golden section brings Newton's start close
        lo, hi = bracket
        left, right = hi - 0.6180339887 * (hi - lo), lo + 0.6180339887 * (hi - lo)
        keep_left = rss(left) < rss(right)
        return (jnp.where(keep_left, lo, left), jnp.where(keep_left, right, hi)), None

    (lo, hi), _ = jax.lax.scan(shrink, (low, high), None, length=24)
    slope = jax.grad(rss)

    def newton(c, _):  # the root of the slope is sharp where the minimum of rss is flat
        step = slope(c) / jax.grad(slope)(c)
        new = c - step
        return jnp.where(jnp.isfinite(new) & (new >= low) & (new <= high), new, c), None

    c, _ = jax.lax.scan(newton, (lo + hi) / 2, None, length=4)
    a, b = solve(c)
    value = shift + a + b * jnp.exp(-c * query)
    ok = inside & jnp.isfinite(value).all()
    return Fit(jnp.where(ok, value, poly_zne(lams, energies, 1, at)), ok)


# ---- Gaussian process ---------------------------------------------------------------------------

GP_LENGTHS = np.geomspace(0.3, 30.0, 25)  # in units of the range of lam
GP_NOISES = np.concatenate([[0.0], np.geomspace(1e-10, 1.0, 21)])  # noise / signal variance


class GPTables(NamedTuple):
    """What a GP needs of the noise levels alone, for every (length, noise) pair: G = pairs."""

    chol: jax.Array  # f[G, m, m]
    cross: jax.Array  # f[G, Q, m]
    logdet: jax.Array  # f[G], NaN where the kernel matrix is numerically singular


def gp_tables(lams: jax.Array, at: jax.Array) -> GPTables:
    """RBF kernels of the standardised noise levels at every hyper-parameter pair."""
    x, query = lams / (lams[-1] - lams[0]), at.reshape(-1) / (lams[-1] - lams[0])
    lengths = jnp.asarray(np.repeat(GP_LENGTHS, len(GP_NOISES)), lams.dtype)
    floor = 20 * lams.shape[0] * jnp.finfo(lams.dtype).eps
    noises = jnp.asarray(np.tile(GP_NOISES, len(GP_LENGTHS)), lams.dtype) + floor

    def one(length, noise):
        def kernel(u, v):
            return jnp.exp(-0.5 * ((u[:, None] - v[None]) / length) ** 2)

        chol = jnp.linalg.cholesky(kernel(x, x) + noise * jnp.eye(x.size, dtype=x.dtype))
        return GPTables(chol, kernel(query, x), 2 * jnp.log(jnp.diag(chol)).sum())

    return jax.vmap(one)(lengths, noises)


def gp_zne(lams: jax.Array, energies: jax.Array, at: jax.Array = 0.0) -> Fit:  # type: ignore[assignment]
    """Posterior mean of a zero-mean RBF Gaussian process on standardised energies.

    Length and noise maximise the marginal likelihood over a grid, the signal variance in closed form.
    Not ok (no kernel could be factored): the linear fit.
    """
    at = jnp.asarray(at, lams.dtype)
    tables = gp_tables(lams, at)
    mean, std = energies.mean(), energies.std()
    y = (energies - mean) / jnp.where(std > 0, std, 1.0)
    alpha = jax.vmap(lambda chol: cho_solve((chol, True), y))(tables.chol)
    m = y.size
    fit = jnp.maximum(alpha @ y, jnp.finfo(y.dtype).tiny)
    evidence = -0.5 * (m * jnp.log(fit / m) + tables.logdet + m * (1 + jnp.log(2 * jnp.pi)))
    evidence = jnp.where(jnp.isfinite(evidence), evidence, -jnp.inf)
    best = jnp.argmax(evidence)
    value = (mean + std * (tables.cross[best] @ alpha[best])).reshape(at.shape)
    ok = jnp.isfinite(evidence[best]) & jnp.isfinite(value).all()
    return Fit(jnp.where(ok, value, poly_zne(lams, energies, 1, at)), ok)


# ---- by name ------------------------------------------------------------------------------------


def _sure(value: jax.Array) -> Fit:
    """A fit that cannot fail."""
    return Fit(value, jnp.array(True))


# name -> (lams f[m], energies f[m], asymptote f[], at f[Q]) -> Fit
ESTIMATORS: dict[str, Callable[..., Fit]] = {
    "raw": lambda x, y, a, at: _sure(jnp.interp(at, x, y)),  # the points; flat below the first
    "linear": lambda x, y, a, at: _sure(poly_zne(x, y, 1, at)),
    "quadratic": lambda x, y, a, at: _sure(poly_zne(x, y, 2, at)),
    "cubic": lambda x, y, a, at: _sure(poly_zne(x, y, 3, at)),
    "richardson": lambda x, y, a, at: _sure(richardson(x, y, at)),
    "exp_fixed": lambda x, y, a, at: exp_zne(x, y, a, at),
    "exp_survival": lambda x, y, a, at: exp_zne(x, y, a, at, survival=True),
    "exp_free": lambda x, y, a, at: exp_zne(x, y, None, at),
    "poly_loo": lambda x, y, a, at: _sure(poly_loo(x, y, at)),
    "gp": lambda x, y, a, at: gp_zne(x, y, at),
}


def _always(value: jax.Array) -> Fit:
    return Fit(value, jnp.array(True))


# name -> (lams f[m], energies f[m], asymptote f[], at f[Q]) -> Fit
ESTIMATORS: dict[str, Callable[..., Fit]] = {
    "raw": lambda x, y, a, at: _always(jnp.interp(at, x, y)),  # the points; flat below the first
    "linear": lambda x, y, a, at: _always(poly_zne(x, y, 1, at)),
    "quadratic": lambda x, y, a, at: _always(poly_zne(x, y, 2, at)),
    "cubic": lambda x, y, a, at: _always(poly_zne(x, y, 3, at)),
    "richardson": lambda x, y, a, at: _always(richardson(x, y, at)),
    "exp_fixed": lambda x, y, a, at: exp_zne(x, y, a, at),
    "exp_survival": lambda x, y, a, at: exp_zne(x, y, a, at, survival=True),
    "exp_free": lambda x, y, a, at: exp_zne(x, y, None, at),
    "poly_loo": lambda x, y, a, at: _always(poly_loo(x, y, at)),
    "gp": lambda x, y, a, at: gp_zne(x, y, at),
}


def estimator(name: str) -> Callable[..., Fit]:
    """(lams f[m], energies f[m], asymptote f[], at f[Q]) -> Fit, by its name in `ESTIMATORS`."""
    if name not in ESTIMATORS:
        raise UserError(f"estimator {name!r} is unknown; one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


@functools.partial(jax.jit, static_argnames="name")
def fit_curves(
    name: str, lams: jax.Array, energies: jax.Array, asymptote: jax.Array, at: jax.Array
) -> Fit:
    """An estimator by name on many curves: energies f[B, m], asymptote f[] -> value f[B, Q], ok bool[B]."""
    fit = estimator(name)
    return jax.vmap(lambda e: fit(lams, e, asymptote, at))(energies)
