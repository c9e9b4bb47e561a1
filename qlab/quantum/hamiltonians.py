"""The Hamiltonians of the noise papers: Z on every qubit, the Ising ring, and molecular hydrogen.

H2 is computed, not copied: STO-3G integrals in closed form (s-type Gaussians), molecular orbitals by
symmetry, the 4-qubit Hamiltonian by Jordan-Wigner, its parity encoding by a CNOT cascade, and the
2-qubit form by fixing the two symmetry qubits (spin-up parity and total parity).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum.pauli import PauliSum, from_dense, pauli_sum, to_dense

BOHR = 0.529177210903  # angstrom (CODATA 2018)
H2_BOND = 0.7414  # angstrom, the experimental bond length
# STO-3G, hydrogen 1s: exponents and contraction weights of normalised primitives (Hehre et al. 1969)
_EXPONENTS = np.array([3.425250914, 0.6239137298, 0.1688554040])
_WEIGHTS = np.array([0.1543289673, 0.5353281423, 0.4446345422])


def zn(n: int) -> PauliSum:
    """Z on every qubit. Ground energy -1, reached by any basis state of odd parity."""
    return pauli_sum({"Z" * n: 1.0})


def tfim_ring(n: int, field: float = 1.0) -> PauliSum:
    """sum_i Z_i Z_{i+1} + field * sum_i X_i on a ring (n = 2 has its one bond twice, as a ring has).

    For even n and field 1 the ground energy is -2 / sin(pi / 2n).
    """
    terms: dict[str, float] = {}
    for i in range(n):
        bond = "".join("Z" if q in (i, (i + 1) % n) else "I" for q in range(n))
        terms[bond] = terms.get(bond, 0.0) + 1.0
        terms["".join("X" if q == i else "I" for q in range(n))] = field
    return pauli_sum(terms)


def _boys0(t: np.ndarray) -> np.ndarray:
    """F_0(t) = int_0^1 exp(-t u^2) du."""
    from scipy.special import erf

    safe = np.maximum(t, 1e-12)
    return np.where(t < 1e-12, 1 - t / 3, 0.5 * np.sqrt(np.pi / safe) * erf(np.sqrt(safe)))


def h2_integrals(bond: float = H2_BOND) -> tuple[np.ndarray, np.ndarray, float]:
    """Molecular-orbital integrals of H2 in STO-3G (hartree).

    Args:
      bond: internuclear distance in angstrom.
    Returns:
      h f64[2, 2] one-electron, g f64[2, 2, 2, 2] two-electron in chemists' order (pq|rs), and the
      nuclear repulsion. Orbital 0 is the bonding one.
    """
    distance = bond / BOHR
    centres = (0.0, distance)
    weights = _WEIGHTS * (2 * _EXPONENTS / np.pi) ** 0.75
    p = _EXPONENTS[:, None] + _EXPONENTS[None]
    mu = _EXPONENTS[:, None] * _EXPONENTS[None] / p
    core = np.zeros((2, 2))
    overlap = np.zeros((2, 2))
    pairs = {}
    for i, a in enumerate(centres):
        for j, b in enumerate(centres):
            r2 = (a - b) ** 2
            mid = (_EXPONENTS[:, None] * a + _EXPONENTS[None] * b) / p
            k = weights[:, None] * weights[None] * np.exp(-mu * r2)
            s = k * (np.pi / p) ** 1.5
            overlap[i, j] = s.sum()
            kinetic = (s * mu * (3 - 2 * mu * r2)).sum()
            attraction = sum(
                (2 * np.pi / p * k * _boys0(p * (mid - c) ** 2)).sum() for c in centres
            )
            core[i, j] = kinetic - attraction
            pairs[i, j] = (p.ravel(), mid.ravel(), k.ravel())
    repulsion = np.zeros((2,) * 4)
    for (i, j), (p1, m1, k1) in pairs.items():
        for (k, l), (p2, m2, k2) in pairs.items():
            a, b = p1[:, None], p2[None]
            f0 = _boys0(a * b / (a + b) * (m1[:, None] - m2[None]) ** 2)
            weight = 2 * np.pi**2.5 / (a * b * np.sqrt(a + b))
            repulsion[i, j, k, l] = (k1[:, None] * k2[None] * weight * f0).sum()
    s12 = overlap[0, 1]
    orbitals = np.array([[1, 1], [1, -1]]) / np.sqrt(2 * (1 + np.array([s12, -s12])))
    h = orbitals.T @ core @ orbitals
    g = np.einsum("pqrs,pi,qj,rk,sl->ijkl", repulsion, orbitals, orbitals, orbitals, orbitals)
    return h, g, 1.0 / distance


def jordan_wigner(h: np.ndarray, g: np.ndarray, constant: float) -> PauliSum:
    """sum h_pq a+_ps a_qs + 1/2 sum (pq|rs) a+_ps a+_rt a_st a_qs + constant, on 2M qubits.

    Qubits: spatial orbitals 0..M-1 with spin up, then 0..M-1 with spin down.
    """
    m = h.shape[0]
    lower = np.array([[0, 1], [0, 0]])  # |0><1|: removes an electron
    ops = []
    for q in range(2 * m):
        a = np.ones((1, 1))
        for k in range(2 * m):
            a = np.kron(a, np.diag([1, -1]) if k < q else lower if k == q else np.eye(2))
        ops.append(a)
    hop = [[[ops[p + s].T @ ops[q + s] for q in range(m)] for p in range(m)] for s in (0, m)]
    total = constant * np.eye(4**m)
    for p, q in np.ndindex(m, m):
        total += h[p, q] * (hop[0][p][q] + hop[1][p][q])
    for p, q, r, s in np.ndindex(m, m, m, m):
        for i, j in np.ndindex(2, 2):  # a+_p a+_r a_s a_q = (a+_p a_q)(a+_r a_s) - delta a+_p a_s
            pair = hop[i][p][q] @ hop[j][r][s]
            if i == j and q == r:
                pair = pair - hop[i][p][s]
            total += 0.5 * g[p, q, r, s] * pair
    return from_dense(total)


def parity_encoding(obs: PauliSum) -> PauliSum:
    """Occupation numbers -> running parities: basis state n becomes p_k = n_0 + ... + n_k mod 2."""
    n = obs.num_qubits
    bits = (np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) & 1
    target = (np.cumsum(bits, 1) % 2) @ (1 << np.arange(n - 1, -1, -1))
    matrix = np.zeros((2**n, 2**n), np.complex128)
    matrix[np.ix_(target, target)] = to_dense(obs)
    return from_dense(matrix)


def fix_qubits(obs: PauliSum, values: dict[int, int]) -> PauliSum:
    """Removes qubits on which `obs` acts as I or Z only, set to |0> or |1>: {qubit: bit}."""
    qubits = list(values)
    if np.isin(obs.paulis[:, qubits], (1, 2)).any():
        raise UserError(
            f"fix_qubits: the observable has X or Y on one of {qubits}; they are no symmetry"
        )
    sign = np.ones(len(obs.coeffs))
    for q, bit in values.items():
        sign = np.where((obs.paulis[:, q] == 3) & (bit == 1), -sign, sign)
    keep = [q for q in range(obs.num_qubits) if q not in values]
    return from_dense(to_dense(PauliSum(obs.coeffs * sign, obs.paulis[:, keep])))


def h2_4q(bond: float = H2_BOND) -> PauliSum:
    """H2 in STO-3G on four qubits (Jordan-Wigner), nuclear repulsion included."""
    return jordan_wigner(*h2_integrals(bond))


def h2_2q(bond: float = H2_BOND) -> PauliSum:
    """H2 in STO-3G on two qubits: a (ZI + IZ) + b XX + c ZZ + const, ground energy as with four.

    After the parity encoding, qubit 1 (parity of the spin-up electrons: odd) and qubit 3 (all
    electrons: even) are constants. What is left is n_0up and 1 - n_0down; the second bit is
    complemented, so both qubits read "bonding orbital occupied" and the form is symmetric.
    """
    two = fix_qubits(parity_encoding(h2_4q(bond)), {1: 1, 3: 0})
    flips = np.isin(two.paulis[:, 1], (2, 3))  # X (.) X: Y -> -Y, Z -> -Z
    return PauliSum(np.where(flips, -two.coeffs, two.coeffs), two.paulis)


def load_pauli_text(path: str | os.PathLike) -> PauliSum:
    """Reads a file of alternating lines: Pauli string, coefficient ("0.5", or "(0.5+0j)")."""
    lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    try:
        values = [complex(v).real for v in lines[1::2]]
        return pauli_sum(dict(zip(lines[0::2], values, strict=True)))
    except ValueError:
        raise UserError(
            f"{path}: expected alternating lines of a Pauli string and its coefficient"
        ) from None


HAMILTONIANS = {"zn": zn, "tfim": tfim_ring}


def hamiltonian(name: str, n: int) -> PauliSum:
    """ "zn" or "tfim" on n qubits, "h2_2q" (n = 2) or "h2_4q" (n = 4)."""
    fixed = {"h2_2q": (2, h2_2q), "h2_4q": (4, h2_4q)}
    if name in HAMILTONIANS:
        return HAMILTONIANS[name](n)
    if name in fixed and fixed[name][0] == n:
        return fixed[name][1]()
    sizes = {k: v[0] for k, v in fixed.items()}
    raise UserError(
        f"hamiltonian {name!r} on {n} qubits; one of {sorted(HAMILTONIANS)} on any n, or {sizes} (name: qubits)"
    )
