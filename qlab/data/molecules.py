"""Electronic Hamiltonians as sums of Pauli strings, with their exact ground energies.

Letters: J Pauli strings, n qubits. Energies are in hartree.
"""

import json
import re
from typing import NamedTuple

import numpy as np

from qlab.data.files import read
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError, nearest

MOLECULES = {
    "h2_sto3g": "H2_STO3g_4qubits",
    "h2_631g": "H2_6-31G_8qubits",
    "lih_sto3g": "LiH_STO3g_12qubits",
    "beh2_sto3g": "BeH2_STO3g_14qubits",
    "h2o_sto3g": "H2O_STO3g_14qubits",
}
ENCODINGS = ("jw", "parity", "bk")
# The published file gives LiH two electrons, 100000100000. LiH has four; the state with the
# published Hartree-Fock energy is this one (diagonal energy -8.888642 against -7.818425).
_CORRECTED = {("LiH_STO3g_12qubits", "jw"): "110000110000"}
_CODE = {"I": 0, "X": 1, "Y": 2, "Z": 3}


class Molecule(NamedTuple):
    """H = sum_j coeffs[j] * paulis[j]; its first two fields are those of a PauliSum.

    coeffs: f64[J].
    paulis: u8[J, n], 0..3 = I X Y Z, qubit 0 leftmost.
    exact_energy: ground energy of the electrons (without the repulsion of the nuclei).
    nuclear_repulsion: add it for the total energy; None where the source does not give it.
    hartree_fock_energy: of the electrons; None where the source does not give it.
    hartree_fock_bits: u8[n], the Hartree-Fock basis state; the source gives it for jw only.
    """

    coeffs: np.ndarray
    paulis: np.ndarray
    exact_energy: float
    nuclear_repulsion: float | None
    hartree_fock_energy: float | None
    hartree_fock_bits: np.ndarray | None


def _terms(text: str, where: str) -> list[tuple[str, complex]]:
    """(label, coefficient) pairs of either layout: lines in turn, or a JSON object."""
    try:
        if text.lstrip().startswith("{"):
            terms = json.loads(text)["paulis"]
            return [
                (str(t["label"]), complex(t["coeff"]["real"], t["coeff"]["imag"])) for t in terms
            ]
        lines = text.split()
        if len(lines) % 2:
            raise ValueError(f"{len(lines)} lines: the last Pauli string has no coefficient")
        return [(p, complex(c)) for p, c in zip(lines[::2], lines[1::2], strict=True)]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{where}: not a list of Pauli strings and coefficients ({' '.join(str(e).split())})"
        ) from e


def parse_paulis(text: str, where: str, num_qubits: int) -> tuple[np.ndarray, np.ndarray]:
    """Pauli strings and their real coefficients.

    Returns:
      (coeffs f64[J], paulis u8[J, n]).

    >>> parse_paulis("XZ (0.5+0j) II (-1+0j)", "h.txt", 2)[1].tolist()
    [[1, 3], [0, 0]]
    """
    terms = _terms(text, where)
    seen: set[str] = set()
    for label, c in terms:
        if len(label) != num_qubits or set(label) - set(_CODE):
            raise UserError(f"{where}: {label[:40]!r} is not {num_qubits} letters of I, X, Y, Z")
        if label in seen:
            raise UserError(f"{where}: {label} stands twice; add up its coefficients")
        if not np.isfinite(c) or c.imag != 0:
            raise UserError(f"{where}: coefficient {c} of {label} is not a finite real number")
        seen.add(label)
    if not terms:
        raise UserError(f"{where}: no Pauli strings; the file is empty or truncated")
    paulis = np.array([[_CODE[ch] for ch in label] for label, _ in terms], np.uint8)
    return np.array([c.real for _, c in terms], np.float64), paulis


def parse_energies(text: str, where: str) -> tuple[float, float | None, float | None]:
    """(exact electronic, nuclear repulsion or None, Hartree-Fock electronic or None)."""

    def value(pattern):
        found = re.search(pattern + r"[^:\n]*:\s*(-?\d+\.\d+)", text)
        return float(found[1]) if found else None

    exact = value(r"exact ground state energy \(electronic\)")
    if exact is None:
        exact = value(r"exact ground state electronic energy")
    if exact is None:
        raise UserError(f"{where}: no line 'exact ground state energy (electronic): <number>'")
    return exact, value(r"static Coulomb repulsion"), value(r"Hartree Fock energy \(electronic\)")


def molecule(name: str = "H2_STO3g_4qubits", encoding: str = "jw") -> Molecule:
    """One of the registered Hamiltonians.

    Args:
      name: a value (or key) of MOLECULES.
      encoding: of the fermions: "jw" (Jordan-Wigner), "parity" or "bk" (Bravyi-Kitaev).
    """
    folder = MOLECULES.get(name, name)
    if folder not in MOLECULES.values():
        known = tuple(MOLECULES.values())
        raise UserError(f"no molecule is called {name!r}{nearest(folder, known)}")
    if encoding not in ENCODINGS:
        raise UserError(f"no encoding is called {encoding!r}; one of {', '.join(ENCODINGS)}")
    dataset = DATASETS["molecule"]
    num_qubits = int(folder.rsplit("_", 1)[1].removesuffix("qubits"))

    def text(file):
        data, where = read(dataset, f"{folder}/{file}")
        return data.decode("ascii"), where

    coeffs, paulis = parse_paulis(*text(f"{encoding}.txt"), num_qubits)
    exact, repulsion, hf = parse_energies(*text("ExactEnergy.txt"))
    states, _ = text("hartree_fock_bitstrings.txt")
    found = re.search(rf"^{encoding}\n([01]{{{num_qubits}}})$", states, re.MULTILINE)
    state = _CORRECTED.get((folder, encoding), found[1] if found else None)
    bits = None if state is None else np.array([int(b) for b in state], np.uint8)
    return Molecule(coeffs, paulis, exact, repulsion, hf, bits)
