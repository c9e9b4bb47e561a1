import os
from pathlib import Path

import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import hamiltonians as hm
from qlab.quantum import pauli


def random_hermitian(rng, n):
    a = rng.standard_normal((2**n, 2**n)) + 1j * rng.standard_normal((2**n, 2**n))
    return a + a.conj().T


@pytest.mark.parametrize("n", [1, 2, 3])
def test_dense_and_pauli_forms_are_inverse(n):
    rng = np.random.default_rng(n)
    a = random_hermitian(rng, n)
    np.testing.assert_allclose(pauli.to_dense(pauli.from_dense(a)), a, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_energy_is_a_dot_product_of_coordinates(n):
    rng = np.random.default_rng(n)
    obs = pauli.from_dense(random_hermitian(rng, n))
    psi = rng.standard_normal(2**n) + 1j * rng.standard_normal(2**n)
    rho = np.outer(psi, psi.conj()) / (psi.conj() @ psi)
    r = pauli.pauli_coords(rho).real
    assert pauli.to_coords(obs) @ r == pytest.approx(np.trace(pauli.to_dense(obs) @ rho).real)


def test_qubit_zero_is_leftmost():
    np.testing.assert_array_equal(
        np.diag(pauli.to_dense(pauli.pauli_sum({"ZI": 1.0}))), [1, 1, -1, -1]
    )
    assert pauli.flat_index(pauli.pauli_sum({"XZ": 1.0})).tolist() == [4 * 1 + 3]


def test_norms():
    obs = pauli.pauli_sum({"II": 2.0, "ZX": -0.5, "YY": 0.25})
    assert pauli.identity_part(obs) == 2.0
    assert pauli.weight_norm(obs) == 0.75


@pytest.mark.parametrize("terms", [{"Z": 1.0, "ZZ": 1.0}, {"AB": 1.0}, {}])
def test_bad_strings_are_named(terms):
    with pytest.raises(UserError, match="Pauli strings"):
        pauli.pauli_sum(terms)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_zn_ground_energy(n):
    assert pauli.ground_energy(hm.zn(n)) == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_tfim_ring_closed_form(n):
    assert pauli.ground_energy(hm.tfim_ring(n)) == pytest.approx(
        -2 / np.sin(np.pi / (2 * n)), abs=1e-10
    )


def test_tfim_ring_odd_by_kronecker_products():
    x, z, one = pauli.PAULIS[1], pauli.PAULIS[3], np.eye(2)
    kron3 = lambda a, b, c: np.kron(a, np.kron(b, c))  # noqa: E731
    want = kron3(z, z, one) + kron3(one, z, z) + kron3(z, one, z)
    want = want + kron3(x, one, one) + kron3(one, x, one) + kron3(one, one, x)
    np.testing.assert_allclose(pauli.to_dense(hm.tfim_ring(3)), want)


def test_h2_two_qubits_has_the_ground_energy_of_four():
    """FCI/STO-3G at 0.7414 angstrom is -1.137270 hartree."""
    full, reduced = hm.h2_4q(), hm.h2_2q()
    assert pauli.ground_energy(reduced) == pytest.approx(pauli.ground_energy(full), abs=1e-12)
    assert pauli.ground_energy(reduced) == pytest.approx(-1.13727017, abs=1e-7)
    # symmetric form a (ZI + IZ) + b XX + c ZZ + const
    named = {
        "".join("IXYZ"[p] for p in s): c
        for s, c in zip(reduced.paulis, reduced.coeffs, strict=True)
    }
    assert set(named) == {"II", "ZI", "IZ", "XX", "ZZ"}
    assert named["ZI"] == pytest.approx(named["IZ"], abs=1e-12)


def test_h2_two_qubit_spectrum_is_a_symmetry_sector_of_four():
    """Spin-up odd, total even: four of the sixteen levels, all of them levels of the full operator."""
    full = np.linalg.eigvalsh(pauli.to_dense(hm.h2_4q()))
    for level in np.linalg.eigvalsh(pauli.to_dense(hm.h2_2q())):
        assert np.abs(full - level).min() < 1e-10


def test_parity_encoding_keeps_the_spectrum():
    full = hm.h2_4q()
    np.testing.assert_allclose(
        np.linalg.eigvalsh(pauli.to_dense(hm.parity_encoding(full))),
        np.linalg.eigvalsh(pauli.to_dense(full)),
        atol=1e-12,
    )


def test_fixing_a_qubit_that_is_no_symmetry_is_refused():
    with pytest.raises(UserError, match="X or Y"):
        hm.fix_qubits(hm.tfim_ring(3), {0: 1})


def test_h2_against_pennylane_qchem():
    """An independent integral code: same spectrum at the same geometry."""
    qml = pytest.importorskip("pennylane")
    bond = 0.7414
    geometry = np.array([[0, 0, 0], [0, 0, bond / hm.BOHR]])
    h, _ = qml.qchem.molecular_hamiltonian(qml.qchem.Molecule(["H", "H"], geometry))
    want = np.linalg.eigvalsh(qml.matrix(h, wire_order=range(4)))
    got = np.linalg.eigvalsh(pauli.to_dense(hm.h2_4q(bond)))
    np.testing.assert_allclose(got, want, atol=1e-6)  # STO-3G digits differ in the 9th place


@pytest.mark.parametrize("encoding", ["jw", "parity"])
def test_h2_against_published_files(encoding):
    """Public files of the same molecule at 0.735 angstrom, without nuclear repulsion."""
    path = (
        Path(os.environ.get("QLAB_DATA", ""))
        / "molecular_hamiltonians/H2_STO3g_4qubits"
        / f"{encoding}.txt"
    )
    if not path.is_file():
        pytest.skip("set QLAB_DATA to a folder with molecular_hamiltonians")
    ours = hm.h2_4q(0.735)
    ours = hm.parity_encoding(ours) if encoding == "parity" else ours
    got, want = pauli.to_coords(ours), pauli.to_coords(hm.load_pauli_text(path))
    np.testing.assert_allclose(got[1:], want[1:], atol=1e-7)
    assert got[0] - want[0] == pytest.approx(hm.BOHR / 0.735, abs=1e-7)


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="h2_2q"):
        hm.hamiltonian("h2_2q", 3)
    bad = tmp_path / "h.txt"
    bad.write_text("ZZ\nnot a number\n")
    with pytest.raises(UserError, match="alternating lines"):
        hm.load_pauli_text(bad)
