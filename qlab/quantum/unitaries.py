"""Distances, phases and coordinates of unitaries, up to the global phase.

N = 2^n, the dimension; qubit 0 is the leftmost factor. Everything is jittable and takes leading batch axes
unless it says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.quantum.ptm import ptm_of_unitary


def hs_distance(u: jax.Array, v: jax.Array) -> jax.Array:
    """d(U, V) = sqrt(1 - |Tr(U^dagger V)| / N): f32[...], 0 exactly where they agree up to a phase.

    Computed as min_phi |U - e^(i phi) V|_F / sqrt(2 N), which is the same number for unitaries and does not
    subtract two nearly equal ones: the trace form loses everything below 3e-4 in float32.

    >>> t = jnp.diag(jnp.exp(1j * jnp.array([0, jnp.pi / 4])))
    >>> round(float(hs_distance(t, jnp.eye(2))), 5), round(float((1 - jnp.cos(jnp.pi / 8)) ** 0.5), 5)
    (0.2759, 0.2759)
    """
    n = u.shape[-1]
    trace = jnp.sum(v.conj() * u, (-2, -1))
    size = jnp.abs(trace)
    phase = jnp.where(size > 1e-6, trace / jnp.maximum(size, 1e-6), 1.0)
    gap = u - phase[..., None, None] * v
    return jnp.sqrt(jnp.sum(gap.real**2 + gap.imag**2, (-2, -1)) / (2 * n))


def avg_fidelity(u: jax.Array, v: jax.Array) -> jax.Array:
    """Average gate fidelity (|Tr(U^dagger V)|^2 + N) / (N^2 + N): f32[...]."""
    n = u.shape[-1]
    trace = jnp.sum(u.conj() * v, (-2, -1))
    return (trace.real**2 + trace.imag**2 + n) / (n * n + n)


def phase_fix(u: jax.Array) -> jax.Array:
    """U times the phase that makes the largest entry of its first row real and positive: c[..., N, N].

    Two unitaries that differ by a phase go to the same matrix up to rounding. (Of entries of equal modulus
    rounding decides which is taken, so this is for features and not for telling states apart; the card's
    division by det^(1/N) before it changes nothing.)
    """
    row = u[..., 0, :]
    at = jnp.argmax(jnp.abs(row), -1)
    entry = jnp.take_along_axis(row, at[..., None], -1)[..., 0]
    return u * (entry.conj() / jnp.maximum(jnp.abs(entry), 1e-30))[..., None, None]


def ptm_features(u: jax.Array) -> jax.Array:
    """f32[(4^n - 1)^2]: the Pauli-transfer matrix without its constant row and column; blind to the phase."""
    return ptm_of_unitary(u)[1:, 1:].ravel()


def raw_features(u: jax.Array) -> jax.Array:
    """f32[2 N^2]: real and imaginary parts of the phase-fixed matrix (it jumps where the entry changes)."""
    fixed = phase_fix(u)
    return jnp.concatenate([fixed.real.ravel(), fixed.imag.ravel()])


FEATURES = {"ptm": ptm_features, "raw": raw_features}


def haar(key: jax.Array, dim: int, batch: tuple[int, ...] = ()) -> jax.Array:
    """Haar-random unitaries c64[*batch, N, N]: QR of a complex Gaussian, with the phases of R's diagonal moved out."""
    k_re, k_im = jax.random.split(key)
    shape = (*batch, dim, dim)
    q, r = jnp.linalg.qr(jax.random.normal(k_re, shape) + 1j * jax.random.normal(k_im, shape))
    d = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * (d / jnp.abs(d))[..., None, :]


def small_rotation(key: jax.Array, dim: int, size: jax.Array) -> jax.Array:
    """A unitary c64[N, N] at a distance of about size (at most, for size <= 0.3) from the identity.

    Cayley transform of a random traceless Hermitian H with |H|_F = size sqrt(2 N): d = size + O(size^3).
    """
    k_re, k_im = jax.random.split(key)
    a = jax.random.normal(k_re, (dim, dim)) + 1j * jax.random.normal(k_im, (dim, dim))
    h = a + a.conj().T
    h -= jnp.trace(h) / dim * jnp.eye(dim)
    h *= size * jnp.sqrt(2.0 * dim) / jnp.sqrt(jnp.sum(jnp.abs(h) ** 2))
    eye = jnp.eye(dim)
    return jnp.linalg.solve(eye + 0.5j * h, eye - 0.5j * h)


def rotation_within(key: jax.Array, eps: jax.Array, *, dim: int, share: float) -> jax.Array:
    """A `small_rotation` c64[N, N] of a size uniform in 0..share eps, drawn apart from its direction."""
    k_size, k_turn = jax.random.split(key)
    return small_rotation(k_turn, dim, share * eps * jax.random.uniform(k_size))
