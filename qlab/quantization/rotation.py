"""Rotations that spread outliers over channels: random Hadamard, and KLT times Hadamard (MambaQuant's).

Row vectors are rotated from the right, x R, and the consumer's kernel (in, out) from the left, R^T W.
Letters: n = channels, N = samples.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.hadamard_quantize import api, matrices


def signs(n: int, key: jax.Array) -> jax.Array:
    """f32[n] of +-1."""
    return jax.random.rademacher(key, (n,), jnp.float32)


@partial(jax.jit, static_argnums=0)
def hadamard(n: int, key: jax.Array) -> jax.Array:
    """f32[n, n] orthogonal with entries +-1 / sqrt(n): the transpose of `fwht`'s matrix, signs by key on its rows.

    n = m 2^k of the orders that qlab.kernels.hadamard_quantize knows (1, 12, 20, 28, 36, ...).

    Raises:
      ValueError: no matrix of that order is known (the nearest are named). A block-diagonal or a random
        orthogonal matrix would not do instead: equal variance (`klt_rotation`) needs |entries| alike.

    >>> r = hadamard(12, jax.random.key(0))
    >>> bool(jnp.allclose(r @ r.T, jnp.eye(12), atol=1e-6)), bool(jnp.allclose(jnp.abs(r), 12**-0.5))
    (True, True)
    """
    if n < 1 or matrices.decompose(n) is None:
        near = matrices.nearest(n) if n > 0 else (1,)
        raise ValueError(
            f"no Hadamard matrix of order {n} is known here; use a width of "
            f"{' or '.join(map(str, near))}"
        )
    dense = matrices.dense(n).astype(np.float64) / np.sqrt(n)
    s = signs(n, key)
    return s[:, None] * jnp.asarray(dense.T, s.dtype)


def fwht(x: jax.Array) -> jax.Array:
    """x f32[..., n] times the Hadamard matrix in n log n steps; fwht(x * signs(n, key)) = x @ hadamard(n, key)."""
    return api.hadamard(x)


def covariance(x: jax.Array) -> jax.Array:
    """f[n, n], centred and biased, of the rows of x f[..., n]."""
    rows = x.reshape(-1, x.shape[-1])
    off = rows - rows.mean(0)
    return off.T @ off / len(rows)


def klt(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(K f[n, n], lam f[n]) with cov(x) = K diag(lam) K^T, lam ascending (Karhunen-Loeve, eq. 6).

    x f[..., n], of any rank. float32's eigh loses orthogonality with n, so K takes two steps towards the
    nearest orthogonal matrix, K (3 - K^T K) / 2, each of which squares what is missing; in x64 it is exact
    already.
    """
    lam, k = jnp.linalg.eigh(covariance(x))
    for _ in range(2):
        k = k @ (1.5 * jnp.eye(len(k), dtype=k.dtype) - 0.5 * k.T @ k)
    return k, lam


@jax.jit
def klt_rotation(x: jax.Array, key: jax.Array) -> jax.Array:
    """R = K H, f[n, n]: every channel of x R has the same variance, the mean of lam (eq. 9).

    >>> x = jax.random.normal(jax.random.key(0), (50, 4)) * jnp.array([1.0, 9.0, 0.1, 3.0])
    >>> v = (x @ klt_rotation(x, jax.random.key(1))).var(0)
    >>> bool(v.max() / v.min() < 1.001)
    True
    """
    k, _ = klt(x)
    return k @ hadamard(x.shape[-1], key).astype(k.dtype)


def variance_ratio(x: jax.Array) -> jax.Array:
    """f[]: largest over least variance of the channels of x f[..., n]; 1e12 where a channel is constant."""
    var = x.reshape(-1, x.shape[-1]).var(0)
    return var.max() / jnp.maximum(var.min(), jnp.maximum(1e-12 * var.max(), 1e-30))
