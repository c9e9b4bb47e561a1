"""Sums of Pauli strings: the observables of every quantum paper.

n = qubits (qubit 0 is the leftmost factor and the most significant bit), J = terms.
Pauli coordinates: an operator A is the vector Tr(P_i A), i counting strings in base 4 with I X Y Z = 0..3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlab.lab.errors import UserError

# c128[4, 2, 2]: I, X, Y, Z
PAULIS = np.array(
    [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], np.complex128
)


class PauliSum(NamedTuple):
    """sum_j coeffs[j] * paulis[j], on the host (NumPy), so that it may be a static argument.

    Attributes:
      coeffs: f64[J]
      paulis: u8[J, n], 0..3 = I X Y Z, qubit 0 leftmost.
    """

    coeffs: np.ndarray
    paulis: np.ndarray

    @property
    def num_qubits(self) -> int:
        return int(self.paulis.shape[1])


def pauli_sum(terms: dict[str, float]) -> PauliSum:
    """From {"ZZI": 0.5, ...}.

    >>> pauli_sum({"ZX": 2.0}).paulis.tolist()
    [[3, 1]]
    """
    lengths = {len(s) for s in terms}
    bad = sorted({ch for s in terms for ch in s} - set("IXYZ"))
    if len(lengths) != 1 or bad:
        raise UserError(
            f"Pauli strings of lengths {sorted(lengths)} with letters {bad or 'IXYZ'}; "
            "expected strings over I, X, Y, Z, all of one length"
        )
    paulis = np.array([["IXYZ".index(ch) for ch in s] for s in terms], np.uint8)
    return PauliSum(np.array(list(terms.values()), np.float64), paulis)


def to_dense(obs: PauliSum) -> np.ndarray:
    """c128[2^n, 2^n]."""
    dim = 2**obs.num_qubits
    total = np.zeros((dim, dim), np.complex128)
    for coeff, string in zip(obs.coeffs, obs.paulis, strict=True):
        term = np.ones((1, 1))
        for p in string:
            term = np.kron(term, PAULIS[p])
        total += coeff * term
    return total


def pauli_coords(matrix: np.ndarray) -> np.ndarray:
    """Tr(P_i A) for all 4^n strings: c128[4^n] from A c[2^n, 2^n], one qubit at a time."""
    n = int(np.log2(matrix.shape[0]))
    a = np.asarray(matrix, np.complex128).reshape((2,) * (2 * n))
    # a[r_0..r_{n-1}, c_0..c_{n-1}]; Tr(P A) = sum P[c, r] A[r, c]; each pass eats the first row and
    # column leg and appends one Pauli leg, so the legs end in qubit order
    for q in range(n):
        a = np.tensordot(a, PAULIS, axes=([0, n - q], [2, 1]))
    return a.reshape(4**n)


def from_dense(matrix: np.ndarray, tol: float = 1e-12) -> PauliSum:
    """The Pauli sum of a Hermitian matrix c[2^n, 2^n], without the terms below `tol`."""
    dim = matrix.shape[0]
    n = int(np.log2(dim))
    coeffs = pauli_coords(matrix) / dim
    if np.abs(coeffs.imag).max() > 1e-9:
        raise UserError("from_dense: the matrix is not Hermitian; an observable must be")
    keep = np.flatnonzero(np.abs(coeffs) > tol)
    digits = (keep[:, None] // 4 ** np.arange(n - 1, -1, -1)[None]) % 4
    return PauliSum(coeffs.real[keep], digits.astype(np.uint8))


def flat_index(obs: PauliSum) -> np.ndarray:
    """i64[J]: the place of each term in a Pauli-coordinate vector of length 4^n."""
    return obs.paulis.astype(np.int64) @ (4 ** np.arange(obs.num_qubits - 1, -1, -1))


def to_coords(obs: PauliSum) -> np.ndarray:
    """h f64[4^n] with <H> = h . r, where r_i = Tr(P_i rho)."""
    h = np.zeros(4**obs.num_qubits)
    np.add.at(h, flat_index(obs), obs.coeffs)
    return h


def identity_part(obs: PauliSum) -> float:
    """Tr(H) / 2^n: the value every unital noise drives <H> to."""
    return float(obs.coeffs[~obs.paulis.any(1)].sum())


def weight_norm(obs: PauliSum) -> float:
    """sum_j |c_j| over the terms that are not the identity; |<H> - Tr(H)/2^n| is at most this."""
    return float(np.abs(obs.coeffs[obs.paulis.any(1)]).sum())


def ground_energy(obs: PauliSum) -> float:
    """Smallest eigenvalue, by dense diagonalisation (n <= 12 or so).

    >>> round(ground_energy(pauli_sum({"ZZ": 1.0, "XI": 0.0})), 12)
    -1.0
    """
    return float(np.linalg.eigvalsh(to_dense(obs))[0])
