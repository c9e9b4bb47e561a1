"""Ground-state problems of architecture search, by name.

h2_2q, h2_3q, h2_4q   H2 in STO-3G at 0.7414 A: parity encoding with two and with one qubit removed; Jordan-Wigner.
h2_4q_r70             the same on four qubits at 0.70 A.
lih_4q[_r220, _r120]  LiH in STO-3G at 3.4 A (2.2, 1.2): Li 1s frozen, the pi pair of virtuals dropped, parity encoding with two
                      qubits removed. Integrals from PennyLane, computed on first use.
tfim_<n>q             Ising ring, sum ZZ + sum X.
Energies in hartree; qubit 0 leftmost.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum.hamiltonians import (
    BOHR,
    fix_qubits,
    h2_2q,
    h2_4q,
    jordan_wigner,
    parity_encoding,
    tfim_ring,
)
from qlab.quantum.noise_model import NoiseModel, read_noise
from qlab.quantum.pauli import PauliSum
from qlab.quantum.ptm_circuit import depolarizing_model

LIH_ORBITALS = (1, 2, 5)  # sigma, sigma* and the sigma virtual: 3 and 4 are the pi pair


def h2_3q() -> PauliSum:
    """H2 in the parity encoding without qubit 3, the parity of all electrons (even)."""
    return fix_qubits(parity_encoding(h2_4q()), {3: 0})


@functools.cache
def lih_4q(bond: float = 3.4) -> PauliSum:
    """LiH, two electrons in three orbitals; bond in angstrom.

    Parity qubits 2 (spin-up electrons: odd) and 5 (all: even) are constants.
    """
    from qlab.quantum.qml import pennylane

    chem = pennylane().qchem
    geometry = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, bond / BOHR]])
    molecule = chem.Molecule(["Li", "H"], geometry)
    integrals = chem.electron_integrals(molecule, core=[0], active=list(LIH_ORBITALS))
    constant, one, two = (np.asarray(x, np.float64) for x in integrals())
    chemists = two.transpose(
        0, 3, 1, 2
    )  # PennyLane: 1/2 sum g_pqrs a+_p a+_q a_r a_s, ours (ps|qr)
    obs = jordan_wigner(one, chemists, float(constant.ravel()[0]))
    return fix_qubits(parity_encoding(obs), {2: 1, 5: 0})


PROBLEMS = {
    "h2_2q": h2_2q,
    "h2_3q": h2_3q,
    "h2_4q": h2_4q,
    "h2_4q_r70": functools.partial(h2_4q, 0.70),
    "lih_4q": lih_4q,
    "lih_4q_r220": functools.partial(lih_4q, 2.2),
    "lih_4q_r120": functools.partial(lih_4q, 1.2),
}


def search_problem(name: str) -> PauliSum:
    """The Hamiltonian of a named problem.

    >>> search_problem("tfim_2q").num_qubits
    2
    """
    if name in PROBLEMS:
        return PROBLEMS[name]()
    if (found := re.fullmatch(r"tfim_(\d+)q", name)) and int(found[1]) >= 2:
        return tfim_ring(int(found[1]))
    raise UserError(f"problem {name!r} is not known{nearest(name, (*PROBLEMS, 'tfim_4q'))}")


def search_noise(noise: str) -> NoiseModel:
    """The model of "none", "depol:p1:p2" (`depolarizing_model`), a bundled noise model or a file (`read_noise`).

    >>> search_noise("depol:0.001:0.01").default[2][0].params
    {'p': 0.01}
    """
    kind, *numbers = noise.split(":")
    if kind != "depol":
        return read_noise(None if noise == "none" else noise)
    try:
        p1, p2 = map(float, numbers)
    except ValueError:
        raise UserError(
            f"noise={noise!r}: depolarizing noise is depol:p1:p2, two probabilities"
        ) from None
    return depolarizing_model(p1, p2)
