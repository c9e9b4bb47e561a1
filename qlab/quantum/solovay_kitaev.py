"""Solovay-Kitaev recursion over any base approximator of one-qubit unitaries (Dawson and Nielsen 2005).

U_n = V W V^dagger W^dagger U_{n-1}, where V and W are approximations at level n - 1 of a balanced group
commutator of U U_{n-1}^dagger. Inverses are words reversed, so the gate set must be inverse-closed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum.gatesets import GateSet, word_matrix
from qlab.quantum.words import Enumeration, inverse_word, reduced, shortest_within

Word = tuple[int, ...]


def special(u: np.ndarray) -> np.ndarray:
    """The matrix of SU(2) nearer to the identity, of the two that are U up to a phase."""
    u = u / np.sqrt(np.linalg.det(u))
    return -u if np.trace(u).real < 0 else u


def _axes(u: np.ndarray) -> np.ndarray:
    """Orthonormal eigenvectors of U in SU(2), the eigenphase above zero first."""
    # Those of the Hermitian part of -i U; eigh orders upwards.
    return np.linalg.eigh((u - u.conj().T) / 2j)[1][:, ::-1]


def commutator(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V, W in SU(2) with V W V^dagger W^dagger = U (up to sign): rotations by one angle about orthogonal axes.

    sin(theta / 2) = 2 sin^2(phi / 2) sqrt(1 - sin^4(phi / 2)), theta the angle of U.
    """
    u = special(u)
    half = np.clip(u.trace().real / 2, -1.0, 1.0)  # cos(theta / 2) = 1 - 2 sin^4(phi / 2)
    s = ((1 - half) / 2) ** 0.25
    c = np.sqrt(1 - s * s)
    v = np.array([[c, -1j * s], [-1j * s, c]])
    w = np.array([[c, -s], [s, c]], complex)
    turn = _axes(u) @ _axes(special(v @ w @ v.conj().T @ w.conj().T)).conj().T
    return turn @ v @ turn.conj().T, turn @ w @ turn.conj().T


def solovay_kitaev(
    u: np.ndarray, base_fn: Callable[[np.ndarray], Word], depth: int, gates: GateSet
) -> Word:
    """A word for U c128[2, 2]; depth 0 is base_fn(U), each level turns an error e into about e^1.5.

    Converges where the base error is small enough (d below about 0.1); levels beyond that help nothing.

    Raises:
      ValueError: the set is not inverse-closed, or not on one qubit.
    """
    if gates.num_qubits != 1:
        raise ValueError(
            f"solovay_kitaev: gate set {gates.name!r} has {gates.num_qubits} qubits; it needs one"
        )
    inverse_word((), gates)
    if depth == 0:
        return tuple(int(a) for a in base_fn(u))
    last = solovay_kitaev(u, base_fn, depth - 1, gates)
    v, w = commutator(u @ word_matrix(last, gates).conj().T)
    v = solovay_kitaev(v, base_fn, depth - 1, gates)
    w = solovay_kitaev(w, base_fn, depth - 1, gates)
    return reduced((*v, *w, *inverse_word(v, gates), *inverse_word(w, gates), *last), gates)


def pennylane_words(u: np.ndarray, eps: float, gates: GateSet) -> Word | None:
    """A word within hs_distance eps of U over {H, T, Tdg} by PennyLane's Solovay-Kitaev, None if there is none.

    PennyLane measures an error of its own, so its tolerance goes down from 2 eps until the word fits.

    Raises:
      UserError: a set without one of these three gates, or on more qubits.
    """
    if not {"H", "T", "Tdg"} <= set(gates.labels) or gates.num_qubits != 1:
        raise UserError(
            f"gate set {gates.name!r}: PennyLane's Solovay-Kitaev compiles one qubit to H, T, Tdg; "
            "use ht_closed"
        )
    import pennylane as qml
    from pennylane.ops import sk_decomposition

    names = {"Hadamard": "H", "T": "T", "Adjoint(T)": "Tdg"}
    for tolerance in (2 * eps, eps, eps / 2, eps / 4, eps / 8):
        ops = sk_decomposition(
            qml.QubitUnitary(u, 0), tolerance, basis_set=("H", "T", "Adjoint(T)")
        )
        word = [gates.labels.index(names[op.name]) for op in ops if op.name != "GlobalPhase"]
        trace = np.abs(np.trace(word_matrix(word[::-1], gates).conj().T @ u))
        if 1 - trace / 2 < eps * eps:
            return tuple(word[::-1])
    return None


def known_lengths(
    us: np.ndarray, eps: float, gates: GateSet, table: Enumeration
) -> dict[str, np.ndarray]:
    """Lengths f64[T] of words within eps of c128[T, N, N] by other means, nan where they find none.

    "optimum": the shortest, by enumeration. "sk": PennyLane's Solovay-Kitaev, for the set that it takes.
    """
    known = {"optimum": shortest_within(table, us, eps)[0]}
    if gates.name == "ht_closed":
        found = [pennylane_words(u, eps, gates) for u in us]
        known["sk"] = np.array([np.nan if w is None else len(w) for w in found])
    return known
