"""Hamiltonians against exact diagonalisation; the parsers on made-up text."""

import json
import os
from functools import reduce

import numpy as np
import pytest

import qlab.data
from qlab.data.files import find
from qlab.data.molecules import ENCODINGS, MOLECULES, molecule, parse_energies, parse_paulis
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError

PAULI = np.array(
    [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], np.complex128
)


@pytest.fixture
def real():
    d = DATASETS["molecule"]
    if not os.environ.get("QLAB_DATA") or not all(find(d, f) for f in d.files):
        pytest.skip("the Hamiltonians are not under QLAB_DATA")


def one_line(call, *parts):
    with pytest.raises(UserError) as e:
        call()
    line = str(e.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def dense(m):
    """c128[2^n, 2^n], qubit 0 the leftmost factor."""
    return sum(c * reduce(np.kron, PAULI[p]) for c, p in zip(m.coeffs, m.paulis, strict=True))


def ground_sparse(m):
    """The lowest eigenvalue, by Lanczos on the matrix built term by term as X and Z bit masks."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import eigsh

    n = m.paulis.shape[1]
    weights = 1 << np.arange(n)[::-1]
    index = np.arange(2**n)
    by_flip = {}
    for c, p in zip(m.coeffs, m.paulis, strict=True):
        flip = int(((p == 1) | (p == 2)) @ weights)
        sign = int(((p == 2) | (p == 3)) @ weights)
        parity = np.bitwise_count(index & sign) % 2
        # Y = i X Z: each Y brings a factor i, and all of them together a real number here.
        value = c * (1j ** int((p == 2).sum())) * np.where(parity, -1.0, 1.0)
        by_flip[flip] = by_flip.get(flip, 0) + value
    cols = np.concatenate([index] * len(by_flip))
    rows = np.concatenate([index ^ f for f in by_flip])
    values = np.concatenate(list(by_flip.values()))
    assert np.abs(values.imag).max() < 1e-12
    h = sp.csr_matrix((values.real, (rows, cols)))
    start = np.random.default_rng(0).standard_normal(2**n)
    return eigsh(h, k=1, which="SA", tol=1e-10, v0=start, return_eigenvectors=False)[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("name", "n"), [("h2_sto3g", 4), ("h2_631g", 8)])
def test_exact_diagonalisation_gives_the_stored_energy(real, name, n, encoding):
    m = qlab.data.load(f"{name}_{encoding}")
    assert m.coeffs.dtype == np.float64
    assert m.paulis.dtype == np.uint8
    assert m.paulis.shape == (len(m.coeffs), n)
    h = dense(m)
    np.testing.assert_allclose(h, h.conj().T, atol=1e-14)
    assert abs(np.linalg.eigvalsh(h)[0] - m.exact_energy) < 1e-8


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["lih_sto3g", "beh2_sto3g", "h2o_sto3g"])
def test_large_molecules_have_the_stored_energy(real, name, encoding):
    m = qlab.data.load(f"{name}_{encoding}")
    assert abs(ground_sparse(m) - m.exact_energy) < 1e-8


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sparse_oracle_agrees_with_the_dense_one(real, encoding):
    m = qlab.data.load(f"h2_631g_{encoding}")
    assert abs(ground_sparse(m) - np.linalg.eigvalsh(dense(m))[0]) < 1e-10


@pytest.mark.parametrize("name", MOLECULES)
def test_hartree_fock_bits_have_the_hartree_fock_energy(real, name):
    """Holds for LiH with the corrected bits only; this also fixes which qubit is leftmost."""
    m = qlab.data.load(f"{name}_jw")
    assert m.hartree_fock_bits is not None
    assert m.hartree_fock_bits.shape == (m.paulis.shape[1],)
    # <b|P|b> is 0 if P flips a bit, else the product of (-1)^b over its Z's.
    diagonal = ~((m.paulis == 1) | (m.paulis == 2)).any(1)
    signs = np.where(m.paulis == 3, 1 - 2 * m.hartree_fock_bits.astype(float), 1.0).prod(1)
    energy = (m.coeffs * signs)[diagonal].sum()
    if m.hartree_fock_energy is None:  # BeH2: the source gives only the exact energy
        assert m.exact_energy < energy < m.exact_energy + 0.1
    else:
        assert abs(energy - m.hartree_fock_energy) < 1e-8


def test_encodings_share_one_spectrum(real):
    spectra = [np.linalg.eigvalsh(dense(molecule("H2_STO3g_4qubits", e))) for e in ENCODINGS]
    np.testing.assert_allclose(spectra[1], spectra[0], atol=1e-10)
    np.testing.assert_allclose(spectra[2], spectra[0], atol=1e-10)


def test_h2_against_an_independent_library(real):
    """Total ground energy of H2 at 0.735 angstrom in STO-3G, made from scratch by PennyLane."""
    qml = pytest.importorskip("pennylane")
    m = qlab.data.load("molecule", name="H2_STO3g_4qubits", encoding="jw")
    assert m.nuclear_repulsion is not None
    bohr = 0.735 / 0.529177210903
    geometry = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, bohr]])
    h, _ = qml.qchem.molecular_hamiltonian(["H", "H"], geometry, unit="bohr")
    total = np.linalg.eigvalsh(qml.matrix(h, wire_order=range(4)))[0]
    # The source prints R to ten digits and the basis constants differ in the last ones.
    assert abs(m.nuclear_repulsion - 1 / bohr) < 1e-8
    assert abs(m.exact_energy + m.nuclear_repulsion - total) < 1e-5


def test_load_options(real):
    a, b = molecule("h2_sto3g", "bk"), qlab.data.load("h2_sto3g_bk")
    np.testing.assert_array_equal(a.paulis, b.paulis)
    np.testing.assert_array_equal(a.coeffs, b.coeffs)
    assert b.hartree_fock_bits is None
    assert qlab.data.load("beh2_sto3g_jw").nuclear_repulsion is None


def test_unknown_molecule_and_encoding():
    one_line(lambda: molecule("H3_STO3g_4qubits"), "did you mean H2_STO3g_4qubits")
    one_line(lambda: molecule(encoding="xx"), "jw, parity, bk")


def test_both_layouts_of_the_terms():
    lines = "XYZI\n(-0.25+0j)\nIIII\n(1.5e-3+0j)\n"
    as_json = json.dumps(
        {
            "paulis": [
                {"label": "XYZI", "coeff": {"real": -0.25, "imag": 0.0}},
                {"label": "IIII", "coeff": {"real": 1.5e-3, "imag": 0.0}},
            ]
        }
    )
    for text in (lines, as_json):
        coeffs, paulis = parse_paulis(text, "h.txt", 4)
        assert coeffs.tolist() == [-0.25, 0.0015]
        assert paulis.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("XX\n(1+0j)\nZZ\n", "no coefficient"),
        ("XX\n(1+0j\n", "not a list"),
        ("XXX\n(1+0j)\n", "not 2 letters"),
        ("XA\n(1+0j)\n", "'XA' is not 2 letters"),
        ("XX\n(1+0j)\nXX\n(2+0j)\n", "XX stands twice"),
        ("XX\n(1+1j)\n", "not a finite real"),
        ("XX\n(nan+0j)\n", "not a finite real"),
        ("", "no Pauli strings"),
        ('{"paulis": [{"label": "XX"}]}', "not a list"),
        ('{"paulis": [', "not a list"),
        ('{"terms": []}', "not a list"),
        ('{"paulis": [{"label": 3, "coeff": {"real": 1, "imag": 0}}]}', "'3' is not 2 letters"),
    ],
)
def test_bad_terms(text, says):
    one_line(lambda: parse_paulis(text, "h.txt", 2), "h.txt", says)


def test_energies():
    text = "The exact ground state electronic energy is: -1.25\n"
    assert parse_energies(text, "e.txt") == (-1.25, None, None)
    text += "The static Coulomb repulsion: 0.5\nThe exact ground state energy (electronic): -1.5\n"
    text += "The Hartree Fock energy (electronic): -1.0\n"
    text += "The total ground state energy (including Coulomb repulsion): -9.0\n"
    assert parse_energies(text, "e.txt") == (-1.5, 0.5, -1.0)
    one_line(lambda: parse_energies("The total energy: -1.0", "e.txt"), "e.txt", "exact ground")
