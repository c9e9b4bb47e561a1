"""Pauli-transfer matrices: states are real vectors, gates and noise are real matrices.

A state rho on n qubits is r f[4^n] with r_i = Tr(P_i rho) (P_0 = identity, qubit 0 most significant).
A map on k qubits is R f[4^k, 4^k], R_ij = Tr(P_i Map(P_j)) / 2^k, so maps compose by matrix products and
an energy is <H> = h . r with h from `pauli.to_coords`. Everything is jittable, differentiable and vmappable,
and follows the precision of its arguments.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.quantum.pauli import PAULIS


@functools.cache
def pauli_basis(k: int) -> np.ndarray:
    """c128[4^k, 2^k, 2^k], in the order of base-4 strings."""
    basis = np.ones((1, 1, 1))
    for _ in range(k):
        basis = np.einsum("aij,bkl->abikjl", basis, PAULIS).reshape(
            4 * len(basis), 2 * basis.shape[1], 2 * basis.shape[2]
        )
    return basis


def ptm_of_kraus(kraus: jax.Array) -> jax.Array:
    """R f[4^k, 4^k] of rho -> sum_m K_m rho K_m^dagger, from K c[m, 2^k, 2^k]."""
    dim = kraus.shape[-1]
    basis = jnp.asarray(pauli_basis(int(np.log2(dim))), kraus.dtype)
    image = jnp.einsum("mab,jbc,mdc->jad", kraus, basis, kraus.conj())
    return jnp.einsum("iab,jba->ij", basis, image).real / dim


def ptm_of_unitary(unitary: jax.Array) -> jax.Array:
    """R f[4^k, 4^k] of rho -> U rho U^dagger."""
    return ptm_of_kraus(unitary[None])


def fixed_ptm(unitary: np.ndarray) -> np.ndarray:
    """f64[4^k, 4^k] of a constant gate, on the host."""
    dim = unitary.shape[0]
    basis = pauli_basis(int(np.log2(dim)))
    return np.einsum("iab,jba->ij", basis, unitary @ basis @ unitary.conj().T).real / dim


def ptm_depolarizing(p: jax.Array, k: int) -> jax.Array:
    """f[4^k, 4^k]: with probability p a uniformly drawn non-identity Pauli on k qubits.

    >>> ptm_depolarizing(0.75, 1).round(6).tolist()[1]
    [0.0, 0.0, 0.0, 0.0]
    """
    dim = 4**k
    shrink = 1 - jnp.asarray(p) * dim / (dim - 1)
    return jnp.diag(jnp.where(jnp.arange(dim) == 0, 1.0, shrink))


def ptm_rotation(axis: int, angle: jax.Array) -> jax.Array:
    """f[4, 4] of exp(-i angle P_axis / 2), axis 1, 2, 3 = X, Y, Z.

    RX turns y into z, RY z into x, RZ x into y.
    """
    a, b = 1 + axis % 3, 1 + (axis + 1) % 3  # the pair that turns, a -> b
    c, s = jnp.cos(angle), jnp.sin(angle)
    plane = jnp.zeros((4, 4), c.dtype).at[[a, b], [a, b]].set(1.0)
    skew = jnp.zeros((4, 4), c.dtype).at[b, a].set(1.0).at[a, b].set(-1.0)
    return jnp.eye(4, dtype=c.dtype) - plane + c * plane + s * skew


def ptm_damping(gamma: jax.Array) -> jax.Array:
    """f[4, 4]: |1> decays to |0> with probability gamma."""
    gamma = jnp.asarray(gamma)
    one = jnp.ones_like(gamma)
    keep = jnp.sqrt(1 - gamma)
    return jnp.diag(jnp.stack([one, keep, keep, 1 - gamma])).at[3, 0].set(gamma)


def ptm_shrink(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """f[4, 4]: a unital diagonal channel; the Pauli expectations are multiplied by x, y, z."""
    return jnp.diag(jnp.stack([jnp.ones_like(x), x, y, z]))


@functools.cache
def cnot_ptm() -> np.ndarray:
    """f64[16, 16] of CNOT, control on the first of the two wires: a signed permutation."""
    return fixed_ptm(np.eye(4)[[0, 1, 3, 2]]).round()


def ptm_thermal(
    duration: jax.Array, t1: jax.Array, t2: jax.Array, excited: float = 0.0
) -> jax.Array:
    """f[4, 4]: relaxation to the population `excited` of |1> with T1, loss of coherence with T2 <= 2 T1."""
    keep_z = jnp.exp(-duration / t1)
    keep_xy = jnp.exp(-duration / t2)
    shift = (1 - keep_z) * (1 - 2 * excited)
    ptm = jnp.diag(jnp.stack([jnp.ones_like(keep_z), keep_xy, keep_xy, keep_z]))
    return ptm.at[3, 0].set(shift)


def ptm_readout(flip0: jax.Array, flip1: jax.Array) -> jax.Array:
    """f[4, 4] that turns Pauli expectations into those of a detector with errors.

    flip0 = P(read 1 | 0), flip1 = P(read 0 | 1), in the basis each Pauli is measured in, so the read
    value is (1 - flip0 - flip1) <P> + flip1 - flip0. It acts on expectations, last; it is no channel.
    """
    contrast = 1.0 - flip0 - flip1
    offset = jnp.asarray(flip1 - flip0)
    ptm = jnp.diag(jnp.stack([jnp.ones_like(offset), *[contrast + 0 * offset] * 3]))
    return ptm.at[1:, 0].set(offset)


def zero_state(n: int, dtype=None) -> jax.Array:
    """r f[4^n] of |0...0>."""
    r = jnp.ones((1,), dtype)
    for _ in range(n):
        r = jnp.kron(r, jnp.array([1, 0, 0, 1], r.dtype))
    return r


def apply_ptm(r: jax.Array, ptm: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    """Acts with R f[4^k, 4^k] on `wires` of r f[4^n]; only the touched legs are contracted."""
    n = round(np.log2(r.size) / 2)
    k = len(wires)
    if wires == tuple(
        range(wires[0], wires[0] + k)
    ):  # neighbours in order: one small matrix product
        block = r.reshape(4 ** wires[0], 4**k, -1)
        return jnp.einsum("ij,ajb->aib", ptm, block).reshape(r.shape)
    legs = r.reshape((4,) * n)
    out = jnp.tensordot(ptm.reshape((4,) * (2 * k)), legs, axes=(tuple(range(k, 2 * k)), wires))
    return jnp.moveaxis(out, tuple(range(k)), wires).reshape(r.shape)


def apply_kraus_ptm(r: jax.Array, kraus: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    """Acts with K c[m, 2^k, 2^k] on `wires` of r f[4^n].

    Up to two qubits go through their Pauli-transfer matrix. Wider maps would need 16^k numbers for it:
    there the touched legs alone become those of a density matrix, and K acts from both sides.
    """
    k = len(wires)
    if k <= 2:
        return apply_ptm(r, ptm_of_kraus(kraus).astype(r.dtype), wires)
    n, dim = round(np.log2(r.size) / 2), 2**k
    basis = jnp.asarray(PAULIS, kraus.dtype)
    legs = jnp.moveaxis(r.reshape((4,) * n), wires, tuple(range(k))).reshape((4,) * k + (-1,))
    legs = legs.astype(kraus.dtype)
    for _ in range(k):  # eats the first Pauli leg, appends a row and a column leg
        legs = jnp.tensordot(legs, basis / 2, axes=((0,), (0,)))
    rows, cols = tuple(range(1, 2 * k, 2)), tuple(range(2, 2 * k + 1, 2))
    block = legs.transpose(rows + cols + (0,)).reshape(dim, dim, -1)
    block = jnp.einsum("mab,bcr,mdc->adr", kraus, block, kraus.conj())
    legs = block.reshape((2,) * (2 * k) + (-1,))
    for q in range(k):
        legs = jnp.tensordot(legs, basis, axes=((0, k - q), (2, 1)))
    out = jnp.moveaxis(legs, 0, -1).real.astype(r.dtype).reshape((4,) * n)
    return jnp.moveaxis(out, tuple(range(k)), wires).reshape(r.shape)


# ---- From and to the other pictures -------------------------------------------------------------


def ptm_of_density(rho: jax.Array) -> jax.Array:
    """r f[4^n], r_i = Tr(P_i rho), of a Hermitian matrix rho c[2^n, 2^n], one qubit at a time."""
    n = round(np.log2(rho.shape[0]))
    legs = rho.reshape((2,) * (2 * n))
    basis = jnp.asarray(PAULIS, jnp.result_type(rho.dtype, jnp.complex64))
    for q in range(n):  # eats the first row and column leg, appends a Pauli leg
        legs = jnp.tensordot(legs, basis, axes=((0, n - q), (2, 1)))
    return legs.reshape(4**n).real


def density_of_ptm(r: jax.Array) -> jax.Array:
    """rho c[2^n, 2^n] = sum_i r_i P_i / 2^n.

    >>> density_of_ptm(zero_state(1)).real.tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    n = round(np.log2(r.size) / 2)
    basis = jnp.asarray(PAULIS / 2, jnp.result_type(r.dtype, jnp.complex64))
    legs = r.reshape((4,) * n).astype(basis.dtype)
    for _ in range(n):
        legs = jnp.tensordot(legs, basis, axes=((0,), (0,)))
    return legs.transpose((*range(0, 2 * n, 2), *range(1, 2 * n, 2))).reshape(2**n, 2**n)


def marginal(r: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    """r f[4^k] of `wires`, in that order: the partial trace over all others of r f[4^n]."""
    n = round(np.log2(r.size) / 2)
    legs = r.reshape((4,) * n)[tuple(slice(None) if q in wires else 0 for q in range(n))]
    kept = sorted(wires)
    return legs.transpose([kept.index(w) for w in wires]).reshape(-1)


def prepare(r: jax.Array, coords: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    """Puts `wires` of r f[4^n] into the state with coordinates f[4^k]; what they held is traced out."""
    n, k = round(np.log2(r.size) / 2), len(wires)
    rest = marginal(r, tuple(q for q in range(n) if q not in wires))
    legs = jnp.outer(coords, rest).reshape((4,) * n)
    return jnp.moveaxis(legs, tuple(range(k)), wires).reshape(r.shape)


def z_probabilities(r: jax.Array) -> jax.Array:
    """f[2^n] of the outcomes in the computational basis: a Hadamard transform of the Z strings."""
    n = round(np.log2(r.size) / 2)
    legs = r.reshape((4,) * n)[(slice(None, None, 3),) * n]
    turn = jnp.asarray([[0.5, 0.5], [0.5, -0.5]], r.dtype)
    for _ in range(n):
        legs = jnp.tensordot(legs, turn, axes=((0,), (0,)))
    return legs.reshape(2**n)
