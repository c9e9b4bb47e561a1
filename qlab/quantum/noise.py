"""Noise: the two conventions of depolarizing, Kraus channels on density matrices, and noise models.

Convention. lam (Qiskit): D(rho) = (1 - lam) rho + lam Tr_Q[rho] (x) I / 2^k; every non-identity Pauli
shrinks by 1 - lam. p: total probability of a non-identity Pauli. p = lam (1 - 4^-k), so 3/4 and 15/16:
`lam_to_p` and `p_to_lam` are the only places where one becomes the other.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum import ptm as pt


def lam_to_p(lam, k: int):
    """p = lam (1 - 4^-k).

    >>> lam_to_p(0.1, 1), lam_to_p(0.1, 2)
    (0.07500000000000001, 0.09375)
    """
    return lam * (1 - 4.0**-k)


def p_to_lam(p, k: int):
    """lam = p / (1 - 4^-k)."""
    return p / (1 - 4.0**-k)


# ---- Kraus operators and density matrices -------------------------------------------------------


def depolarizing_kraus(lam: jax.Array, k: int) -> jax.Array:
    """c[4^k, 2^k, 2^k]: identity with weight 1 - p, every other Pauli with p / (4^k - 1)."""
    dim = 4**k
    p = lam_to_p(jnp.asarray(lam), k)
    weight = jnp.where(jnp.arange(dim) == 0, 1 - p, p / (dim - 1))
    return jnp.sqrt(weight)[:, None, None] * jnp.asarray(pt.pauli_basis(k))


def damping_kraus(gamma: jax.Array) -> jax.Array:
    """c[2, 2, 2]: |1> decays to |0> with probability gamma."""
    g = jnp.asarray(gamma)
    stay, flip = np.diag([1.0 + 0j, 0]), np.array([[0, 1.0 + 0j], [0, 0]])
    keep = jnp.asarray(stay) + jnp.sqrt(1 - g) * jnp.asarray(np.diag([0, 1.0 + 0j]))
    return jnp.stack([keep, jnp.sqrt(g) * jnp.asarray(flip)])


def dephasing_kraus(shrink: jax.Array) -> jax.Array:
    """c[2, 2, 2]: X and Y expectations are multiplied by `shrink`, by phase flips."""
    s = jnp.asarray(shrink)
    weight = jnp.stack([(1 + s) / 2, (1 - s) / 2])
    return jnp.sqrt(weight)[:, None, None] * jnp.asarray(pt.pauli_basis(1)[[0, 3]])


def apply_kraus(rho: jax.Array, kraus: jax.Array, wires: tuple[int, ...], n: int) -> jax.Array:
    """sum_m K_m rho K_m^dagger on `wires` of rho c[2^n, 2^n], kraus c[m, 2^k, 2^k]."""
    k = len(wires)
    legs = rho.reshape((2,) * (2 * n))
    ops = kraus.reshape(-1, *(2,) * (2 * k))
    cols = [n + w for w in wires]

    def one(op):
        left = jnp.tensordot(op, legs, axes=(tuple(range(k, 2 * k)), wires))
        left = jnp.moveaxis(left, tuple(range(k)), wires)
        both = jnp.tensordot(op.conj(), left, axes=(tuple(range(k, 2 * k)), cols))
        return jnp.moveaxis(both, tuple(range(k)), cols)

    return jax.vmap(one)(ops).sum(0).reshape(rho.shape)


def depolarize(rho: jax.Array, lam: jax.Array, wires: tuple[int, ...], n: int) -> jax.Array:
    """D_lam on `wires` of rho c[2^n, 2^n] (lam in Qiskit's convention)."""
    return apply_kraus(rho, depolarizing_kraus(lam, len(wires)), wires, n)


# ---- Noise models: what follows every gate ------------------------------------------------------


class GateNoise(NamedTuple):
    """The map after each gate, as Pauli-transfer matrices; `readout` acts on every qubit at the end."""

    ry: jax.Array  # f[4, 4]
    rz: jax.Array  # f[4, 4]
    cx: jax.Array  # f[16, 16]
    readout: jax.Array  # f[4, 4]


class FixedErrors(NamedTuple):
    """Errors that do not scale with lam: zero-noise extrapolation must keep them as a bias.

    Attributes:
      readout: (P(read 1 | 0), P(read 0 | 1)) of every qubit.
      coherent: angle added to every rotation, and to the CNOT as exp(-i angle (I-Z)(I-X) / 4).
    """

    readout: tuple[float, float] = (0.0, 0.0)
    coherent: float = 0.0


NO_FIXED_ERRORS = FixedErrors()
T2_OVER_T1 = 0.7  # of the thermal model: a typical superconducting qubit

NOISE_KINDS = ("depol", "ampdamp", "dephase", "thermal", "device")


def channel(kind: str, lam: jax.Array, k: int) -> jax.Array:
    """The PTM f[4^k, 4^k] of a noise kind at strength lam, on k = 1 or 2 qubits.

    depol: depolarizing, Qiskit's lam, on the k qubits together. The others act on each qubit alone:
    ampdamp with gamma = lam; dephase shrinks X and Y by 1 - lam; thermal relaxes for a time t with
    1 - exp(-t / T1) = lam and T2 = 0.7 T1; device is thermal and, after two-qubit gates, depol as well.
    """
    lam = jnp.asarray(lam)
    if kind == "device":
        thermal = channel("thermal", lam, k)
        return thermal if k == 1 else channel("depol", lam, k) @ thermal
    if kind == "depol":
        return pt.ptm_depolarizing(lam_to_p(lam, k), k)
    if kind == "ampdamp":
        one = pt.ptm_damping(lam)
    elif kind == "dephase":
        one = pt.ptm_shrink(1 - lam, 1 - lam, jnp.ones_like(lam))
    elif kind == "thermal":
        one = pt.ptm_thermal(-jnp.log1p(-lam), jnp.ones_like(lam), T2_OVER_T1 * jnp.ones_like(lam))
    else:
        raise UserError(f"noise {kind!r} is unknown{nearest(kind, NOISE_KINDS)}")
    return one if k == 1 else jnp.kron(one, one)


def channel_kraus(kind: str, lam: jax.Array, k: int) -> jax.Array:
    """The same channels as Kraus operators c[m, 2^k, 2^k]: the reference's form."""
    lam = jnp.asarray(lam)
    if kind == "device":
        thermal = channel_kraus("thermal", lam, k)
        if k == 1:
            return thermal
        both = jnp.einsum("aij,bjk->abik", depolarizing_kraus(lam, k), thermal)
        return both.reshape(-1, 2**k, 2**k)
    if kind == "depol":
        return depolarizing_kraus(lam, k)
    if kind == "ampdamp":
        one = damping_kraus(lam)
    elif kind == "dephase":
        one = dephasing_kraus(1 - lam)
    elif kind == "thermal":  # damping already shrinks X and Y by sqrt(1 - lam)
        extra = (1 - lam) ** (1 / T2_OVER_T1 - 0.5)
        one = jnp.einsum("aij,bjk->abik", dephasing_kraus(extra), damping_kraus(lam)).reshape(
            -1, 2, 2
        )
    else:
        raise UserError(f"noise {kind!r} is unknown{nearest(kind, NOISE_KINDS)}")
    return one if k == 1 else jnp.einsum("aij,bkl->abikjl", one, one).reshape(-1, 4, 4)


def cnot_power(angle: float) -> np.ndarray:
    """c128[4, 4]: exp(-i angle (I-Z)(I-X) / 4); angle = pi is the CNOT itself."""
    minus = np.full((2, 2), 0.5) * np.array([[1, -1], [-1, 1]])  # |-><-| = (I - X) / 2
    block = np.kron(np.diag([0, 1]), minus)
    return np.eye(4) + (np.exp(-1j * angle) - 1) * block


def gate_noise(
    kind: str, lam1: jax.Array, lam2: jax.Array, fixed: FixedErrors = NO_FIXED_ERRORS
) -> GateNoise:
    """A noise model: strength lam1 after one-qubit gates, lam2 after two-qubit gates."""
    one, two = channel(kind, lam1, 1), channel(kind, lam2, 2)
    if fixed.coherent:
        turn = [pt.ptm_rotation(axis, jnp.asarray(fixed.coherent, one.dtype)) for axis in (2, 3)]
        over = pt.ptm_of_unitary(jnp.asarray(cnot_power(fixed.coherent)))
        ry, rz, cx = one @ turn[0], one @ turn[1], two @ over.astype(two.dtype)
    else:
        ry, rz, cx = one, one, two
    readout = pt.ptm_readout(*(jnp.asarray(f, one.dtype) for f in fixed.readout))
    return GateNoise(ry, rz, cx, readout)
