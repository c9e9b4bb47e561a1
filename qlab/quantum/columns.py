"""Circuits as columns of equal gates, on two simulators: state vectors, and Pauli coordinates with noise.

A column is one gate on every wire ("rx", "ry", "rz", "h") or one on every pair of a list ("zz", "cz", "cx"). The
angles of all gates of all columns stand in one vector phi f[G], in order; tying angles, or feeding data into
them, is a map into phi. rx, ry, rz are exp(-i phi P / 2); zz is exp(-i phi Z Z / 2). Qubit 0 is leftmost and the
most significant bit. Precision follows phi. Everything takes one sample: batch with vmap.

Columns keep the program small, and quick to compile: neighbouring one-qubit columns melt into one 2x2 matrix a
wire, all wires into two Kronecker products (two matrix products on the state), zz and cz into a phase, cx into a
permutation. Letters: n = qubits, G = parametrised gates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.quantum import ptm as pt
from qlab.quantum.pauli import PAULIS

LOCAL = ("rx", "ry", "rz", "h")
ROTATIONS = {"rx": 1, "ry": 2, "rz": 3}
_H = np.array([[1, 1], [1, -1]]) / np.sqrt(2)


class Column(NamedTuple):
    """kind: see above. wires: the wire, or the pair of wires, of each gate."""

    kind: str
    wires: tuple[tuple[int, ...], ...]

    @property
    def num_angles(self) -> int:
        return len(self.wires) if self.kind in ("rx", "ry", "rz", "zz") else 0


Columns = tuple[Column, ...]


def local(kind: str, n: int) -> Column:
    """One gate of this kind on every wire.

    >>> local("rx", 2)
    Column(kind='rx', wires=((0,), (1,)))
    """
    return Column(kind, tuple((q,) for q in range(n)))


def num_gates(columns: Columns) -> int:
    """G, the parametrised gates."""
    return sum(c.num_angles for c in columns)


def split_angles(columns: Columns, phi: jax.Array) -> list[jax.Array]:
    """phi f[G] cut into one f[num_angles] for each column."""
    at = np.cumsum([0] + [c.num_angles for c in columns])
    return [phi[a:b] for a, b in itertools.pairwise(at)]


@functools.cache
def z_signs(n: int) -> np.ndarray:
    """f64[n, 2^n]: the eigenvalue of Z_q on each basis state.

    >>> z_signs(1).tolist()
    [[1.0, -1.0]]
    """
    bits = (np.arange(2**n)[None] >> np.arange(n - 1, -1, -1)[:, None]) & 1
    return 1.0 - 2.0 * bits


@functools.cache
def zz_signs(pairs: tuple[tuple[int, ...], ...], n: int) -> np.ndarray:
    """f64[pairs, 2^n]: the eigenvalue of Z_i Z_j."""
    z = z_signs(n)
    return np.stack([z[i] * z[j] for i, j in pairs])


# ---- state vectors ------------------------------------------------------------------------------


def _complex(dtype) -> jnp.dtype:
    return jnp.result_type(dtype, jnp.complex64)


def _rotation(kind: str, angles: jax.Array) -> jax.Array:
    """c[n, 2, 2]."""
    c, s = jnp.cos(angles / 2)[:, None, None], jnp.sin(angles / 2)[:, None, None]
    axis = jnp.asarray(PAULIS[ROTATIONS[kind]], _complex(angles.dtype))
    return c * jnp.eye(2, dtype=angles.dtype) - 1j * s * axis


def _kron(matrices: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.kron, matrices)


def apply_local(psi: jax.Array, matrices: jax.Array) -> jax.Array:
    """matrices[q] on every wire q: psi c[2^n], matrices c[n, 2, 2], as two products of 2^(n/2) rows."""
    n = matrices.shape[0]
    one = jnp.ones((1, 1), matrices.dtype)
    top, bottom = _kron([one, *matrices[: n // 2]]), _kron([one, *matrices[n // 2 :]])
    return (top @ psi.reshape(top.shape[0], -1) @ bottom.T).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def permute(psi: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """psi[order]; its gradient is a gather too, not a scatter."""
    return psi[np.array(order)]


permute.defvjp(
    lambda psi, order: (permute(psi, order), None), lambda order, _, g: (g[np.argsort(order)],)
)


@functools.cache
def _cx_order(pairs: tuple[tuple[int, ...], ...], n: int) -> tuple[int, ...]:
    """Where each new amplitude comes from, after CNOTs (control, target) in order."""
    source = np.arange(2**n)
    for control, target in reversed(pairs):
        flip = (source >> (n - 1 - control)) & 1
        source = source ^ (flip << (n - 1 - target))
    return tuple(source.tolist())


def state(columns: Columns, n: int, phi: jax.Array) -> jax.Array:
    """psi c[2^n] after the columns, from |0...0>."""
    dtype = _complex(phi.dtype)
    psi: Any = None  # still |0...0>
    pending: Any = None  # c[n, 2, 2] of one-qubit gates that wait

    def flush(psi, pending):
        if psi is None:
            eye = jnp.broadcast_to(jnp.eye(2, dtype=dtype), (n, 2, 2))
            kets = (eye if pending is None else pending)[:, :, 0]
            return functools.reduce(jnp.kron, list(kets))
        return psi if pending is None else apply_local(psi, pending)

    for column, angles in zip(columns, split_angles(columns, phi), strict=True):
        if column.kind in LOCAL:
            if column.kind == "h":
                gates = jnp.broadcast_to(jnp.asarray(_H, dtype), (n, 2, 2))
            else:
                gates = _rotation(column.kind, angles)
            pending = gates if pending is None else gates @ pending
            continue
        psi, pending = flush(psi, pending), None
        if column.kind == "zz":
            turn = angles @ jnp.asarray(zz_signs(column.wires, n), phi.dtype) / 2
            psi = psi * jax.lax.complex(jnp.cos(turn), -jnp.sin(turn))
        elif column.kind == "cz":
            both = np.stack(
                [(1 - z_signs(n)[i]) * (1 - z_signs(n)[j]) / 4 for i, j in column.wires]
            )
            psi = psi * jnp.asarray((-1.0) ** both.sum(0), phi.dtype)
        else:
            psi = permute(psi, _cx_order(column.wires, n))
    return flush(psi, pending)


def probabilities(columns: Columns, n: int, phi: jax.Array) -> jax.Array:
    """f[2^n] of the outcomes in the computational basis."""
    psi = state(columns, n, phi)
    return psi.real**2 + psi.imag**2


def mean_z(probs: jax.Array, n: int) -> jax.Array:
    """<Z_q> f[n] from outcome probabilities f[2^n]."""
    return jnp.asarray(z_signs(n), probs.dtype) @ probs


# ---- Pauli coordinates with noise ---------------------------------------------------------------


def _fixed_ptm(kind: str) -> np.ndarray:
    """f64 Pauli-transfer matrix of h (4 x 4), cz or cx (16 x 16)."""
    if kind == "cx":
        return pt.cnot_ptm()
    return pt.fixed_ptm(_H if kind == "h" else np.diag([1.0, 1, 1, -1]))


@functools.cache
def _zz_planes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64[16, 16] each: R(phi) = rest + cos(phi) plane + sin(phi) skew of the zz gate."""
    basis = pt.pauli_basis(2)
    zz = np.diag([1.0, -1, -1, 1])
    commutes = np.array([np.allclose(zz @ b, b @ zz) for b in basis])
    # exp(-i phi Q/2) P exp(i phi Q/2) = cos(phi) P - i sin(phi) Q P for P that anticommutes with Q
    skew = np.einsum("iab,jba->ij", basis, -1j * zz @ basis).real / 4 * ~commutes[None]
    return np.diag(1.0 * commutes), np.diag(1.0 * ~commutes), skew


def noisy_coordinates(columns: Columns, n: int, phi: jax.Array, depol: float) -> jax.Array:
    """r f[4^n], the Pauli coordinates of the state; after every gate a depolarizing channel on its wires.

    Args:
      depol: total probability of a non-identity Pauli after each gate, one- or two-qubit (p, not Qiskit's lam).
    """
    dtype = phi.dtype
    noise = {k: pt.ptm_depolarizing(jnp.asarray(depol, dtype), k) for k in (1, 2)}
    r = pt.zero_state(n, dtype)
    for column, angles in zip(columns, split_angles(columns, phi), strict=True):
        for g, wires in enumerate(column.wires):
            if column.kind in ROTATIONS:
                gate = pt.ptm_rotation(ROTATIONS[column.kind], angles[g])
            elif column.kind == "zz":
                rest, plane, skew = (jnp.asarray(m, dtype) for m in _zz_planes())
                gate = rest + jnp.cos(angles[g]) * plane + jnp.sin(angles[g]) * skew
            else:
                gate = jnp.asarray(_fixed_ptm(column.kind), dtype)
            r = pt.apply_ptm(r, noise[len(wires)] @ gate, wires)
    return r


def noisy_probabilities(columns: Columns, n: int, phi: jax.Array, depol: float) -> jax.Array:
    """f[2^n] of the outcomes of the noisy circuit."""
    return pt.z_probabilities(noisy_coordinates(columns, n, phi, depol))
