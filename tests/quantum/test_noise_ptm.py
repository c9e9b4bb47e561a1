import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import noise as nz
from qlab.quantum import ptm as pt
from qlab.quantum.pauli import PAULIS


def random_rho(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2**n, 2**n)) + 1j * rng.standard_normal((2**n, 2**n))
    rho = a @ a.conj().T
    return jnp.asarray(rho / np.trace(rho))


def random_unitary(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2**n, 2**n)) + 1j * rng.standard_normal((2**n, 2**n))
    return np.linalg.qr(a)[0]


@pytest.mark.parametrize("k", [1, 2])
def test_depolarizing_at_one_is_fully_mixed(k):
    rho = random_rho(1, k)
    np.testing.assert_allclose(
        nz.depolarize(rho, 1.0, tuple(range(k)), k), np.eye(2**k) / 2**k, atol=1e-14
    )


@pytest.mark.parametrize("k", [1, 2])
def test_depolarizing_at_its_maximum_is_a_uniform_error(k):
    """lam = 4^k / (4^k - 1): every non-identity Pauli with equal weight, the identity with none."""
    rho, basis = random_rho(2, k), pt.pauli_basis(k)
    want = sum(p @ rho @ p for p in basis[1:]) / (4**k - 1)
    got = pt.ptm_depolarizing(nz.lam_to_p(4**k / (4**k - 1), k), k) @ pt.ptm_of_density(rho)
    np.testing.assert_allclose(got, pt.ptm_of_density(want), atol=1e-14)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.03, 0.7])
def test_depolarizing_definition(k, lam):
    """(1 - lam) rho + lam Tr_Q[rho] (x) I / 2^k, on part of three qubits."""
    n, rho = 3, random_rho(3, 3)
    wires = (1,) if k == 1 else (0, 2)
    legs = np.asarray(rho).reshape((2,) * 6)
    reduced = legs
    letters = "abcdef"
    other = [q for q in range(3) if q not in wires]
    rows = list(letters[:3])
    cols = [rows[q] if q in wires else letters[3 + q] for q in range(3)]
    out = "".join(rows[q] for q in other) + "".join(cols[q] for q in other)
    reduced = np.einsum("".join(rows + cols) + "->" + out, legs)
    mixed = np.zeros_like(legs)
    for bits in np.ndindex(*(2,) * k):
        index: list = [slice(None)] * 6
        for w, b in zip(wires, bits, strict=True):
            index[w] = index[3 + w] = b
        mixed[tuple(index)] = reduced / 2**k
    want = (1 - lam) * legs + lam * mixed
    np.testing.assert_allclose(nz.depolarize(rho, lam, wires, n), want.reshape(8, 8), atol=1e-14)


@pytest.mark.parametrize("k", [1, 2])
def test_lam_and_p_are_inverse(k):
    assert nz.p_to_lam(nz.lam_to_p(0.37, k), k) == pytest.approx(0.37)
    assert nz.lam_to_p(1.0, k) == (0.75 if k == 1 else 0.9375)


def test_one_qubit_lam_is_pennylanes_p():
    qml = pytest.importorskip("pennylane")
    lam = 0.2
    want = np.array(qml.DepolarizingChannel(nz.lam_to_p(lam, 1), wires=0).kraus_matrices())
    got = pt.ptm_of_kraus(nz.depolarizing_kraus(lam, 1))
    np.testing.assert_allclose(got, pt.ptm_of_kraus(jnp.asarray(want)), atol=1e-12)


@pytest.mark.parametrize("kind", nz.NOISE_KINDS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.6])
def test_ptm_and_kraus_forms_agree_and_preserve_trace(kind, k, lam):
    kraus = nz.channel_kraus(kind, lam, k)
    np.testing.assert_allclose(
        jnp.einsum("mba,mbc->ac", kraus.conj(), kraus), np.eye(2**k), atol=1e-12
    )
    ptm = nz.channel(kind, lam, k)
    np.testing.assert_allclose(ptm, pt.ptm_of_kraus(kraus), atol=1e-12)
    np.testing.assert_allclose(ptm[0], np.eye(4**k)[0], atol=1e-15)


def test_thermal_against_pennylane():
    """T2 <= T1: the reset-and-flip form of the same relaxation."""
    qml = pytest.importorskip("pennylane")
    lam = 0.3
    duration = -np.log1p(-lam)
    op = qml.ThermalRelaxationError(0.0, 1.0, nz.T2_OVER_T1, duration, wires=0)
    want = pt.ptm_of_kraus(jnp.asarray(np.array(op.kraus_matrices(), complex)))
    np.testing.assert_allclose(nz.channel("thermal", lam, 1), want, atol=1e-12)


def test_cnot_ptm():
    cnot = pt.cnot_ptm()
    assert set(np.unique(cnot)) == {-1, 0, 1}
    np.testing.assert_array_equal(np.abs(cnot).sum(0), 1)
    np.testing.assert_array_equal(cnot @ cnot, np.eye(16))
    np.testing.assert_array_equal(cnot[0], np.eye(16)[0])


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_rotation_ptm(axis):
    angle = 0.7
    u = np.cos(angle / 2) * np.eye(2) - 1j * np.sin(angle / 2) * PAULIS[axis]
    np.testing.assert_allclose(
        pt.ptm_rotation(axis, jnp.float64(angle)), pt.ptm_of_unitary(jnp.asarray(u)), atol=1e-14
    )


def test_ptm_is_a_representation():
    u, v = random_unitary(1, 2), random_unitary(2, 2)
    left = pt.ptm_of_unitary(jnp.asarray(u @ v))
    right = pt.ptm_of_unitary(jnp.asarray(u)) @ pt.ptm_of_unitary(jnp.asarray(v))
    np.testing.assert_allclose(left, right, atol=1e-12)
    np.testing.assert_allclose(left[:, 0], np.eye(16)[0], atol=1e-12)  # unital


@pytest.mark.parametrize("wires", [(0,), (2,), (0, 1), (1, 2), (2, 0), (1, 0), (0, 2)])
def test_apply_ptm_is_apply_kraus(wires):
    n, k = 3, len(wires)
    rng = np.random.default_rng(5)
    a = rng.standard_normal((3, 2**k, 2**k)) + 1j * rng.standard_normal((3, 2**k, 2**k))
    rho = random_rho(6, n)
    want = pt.ptm_of_density(nz.apply_kraus(rho, jnp.asarray(a), wires, n))
    got = pt.apply_ptm(pt.ptm_of_density(rho), pt.ptm_of_kraus(jnp.asarray(a)), wires)
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_apply_kraus_against_full_matrices():
    """Operators written out on three qubits by Kronecker products."""
    rho = np.asarray(random_rho(7, 3))
    kraus = np.asarray(nz.damping_kraus(0.3))
    want = sum(
        np.kron(np.kron(np.eye(2), a), np.eye(2))
        @ rho
        @ np.kron(np.kron(np.eye(2), a), np.eye(2)).conj().T
        for a in kraus
    )
    np.testing.assert_allclose(
        nz.apply_kraus(jnp.asarray(rho), jnp.asarray(kraus), (1,), 3), want, atol=1e-14
    )


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.9])
def test_states_stay_states_and_lose_purity(lam):
    rho = random_rho(8, 2)
    out = np.asarray(nz.depolarize(rho, lam, (0, 1), 2))
    assert np.trace(out) == pytest.approx(1)
    assert np.linalg.eigvalsh(out).min() > -1e-14
    purity = [
        float(jnp.einsum("ij,ji->", a, a).real)
        for a in (nz.depolarize(rho, l, (0,), 2) for l in (lam, lam + 0.05))
    ]
    assert purity[1] < purity[0]


def test_damping_on_one():
    """<Z> = 1 - 2 (1 - gamma) p1."""
    gamma, p1 = 0.3, 0.8
    rho = jnp.diag(jnp.array([1 - p1, p1])).astype(complex)
    r = nz.channel("ampdamp", gamma, 1) @ pt.ptm_of_density(rho)
    assert float(r[3]) == pytest.approx(1 - 2 * (1 - gamma) * p1)


def test_readout_expectations_from_flipped_bits():
    """P(read 0) from the confusion matrix, in the Z and the X basis."""
    flip0, flip1, p0 = 0.02, 0.07, 0.9
    read0 = p0 * (1 - flip0) + (1 - p0) * flip1
    r = pt.ptm_readout(jnp.float64(flip0), jnp.float64(flip1)) @ jnp.array(
        [1, 2 * p0 - 1, 0, 2 * p0 - 1]
    )
    np.testing.assert_allclose(r[jnp.array([1, 3])], 2 * read0 - 1, atol=1e-15)


def test_coherent_cnot_at_pi_is_cnot():
    np.testing.assert_allclose(nz.cnot_power(np.pi), np.eye(4)[[0, 1, 3, 2]], atol=1e-15)


def test_float32_is_kept():
    assert nz.channel("thermal", jnp.float32(0.1), 2).dtype == jnp.float32
    noise = nz.gate_noise(
        "depol", jnp.float32(0.1), jnp.float32(0.1), nz.FixedErrors((0.1, 0.2), 0.3)
    )
    assert {x.dtype for x in jax.tree.leaves(noise)} == {jnp.dtype(jnp.float32)}


def test_unknown_noise_is_named():
    with pytest.raises(UserError, match="did you mean depol"):
        nz.channel("depo", 0.1, 1)


def test_pictures_are_inverse_and_marginals_are_partial_traces():
    rho = random_rho(9, 3)
    r = pt.ptm_of_density(rho)
    want = jnp.einsum("iab,ba->i", jnp.asarray(pt.pauli_basis(3)), rho).real
    np.testing.assert_allclose(r, want, atol=1e-12)
    np.testing.assert_allclose(pt.density_of_ptm(r), rho, atol=1e-12)
    np.testing.assert_allclose(pt.z_probabilities(r), jnp.diag(rho).real, atol=1e-12)
    legs = np.asarray(rho).reshape((2,) * 6)
    swapped = np.einsum("abcdbf->cafd", legs).reshape(4, 4)  # qubits (2, 0)
    np.testing.assert_allclose(pt.density_of_ptm(pt.marginal(r, (2, 0))), swapped, atol=1e-12)


def test_prepare_traces_out_and_puts_in():
    rho, new = random_rho(10, 3), random_rho(11, 2)
    got = pt.prepare(pt.ptm_of_density(rho), pt.ptm_of_density(new), (2, 0))
    np.testing.assert_allclose(pt.marginal(got, (2, 0)), pt.ptm_of_density(new), atol=1e-12)
    kept = pt.marginal(pt.ptm_of_density(rho), (1,))
    np.testing.assert_allclose(pt.marginal(got, (1,)), kept, atol=1e-12)
    want = jnp.kron(kept, pt.ptm_of_density(new))
    np.testing.assert_allclose(pt.marginal(got, (1, 2, 0)), want, atol=1e-12)


@pytest.mark.parametrize("wires", [(1,), (2, 0), (2, 0, 1), (1, 3, 0)])
def test_kraus_through_pauli_coordinates(wires):
    """Up to two qubits by the transfer matrix, three without it; both as on density matrices."""
    n, k = 4, len(wires)
    rng = np.random.default_rng(12)
    a = jnp.asarray(
        rng.standard_normal((2, 2**k, 2**k)) + 1j * rng.standard_normal((2, 2**k, 2**k))
    )
    rho = random_rho(13, n)
    want = pt.ptm_of_density(nz.apply_kraus(rho, a, wires, n))
    got = pt.apply_kraus_ptm(pt.ptm_of_density(rho), a, wires)
    np.testing.assert_allclose(got, want, atol=1e-9)
