import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import ansatz, pauli
from qlab.quantum import hamiltonians as hm
from qlab.quantum import noise as nz
from qlab.quantum import ptm as pt
from qlab.quantum.pauli import PAULIS

THETA = jax.random.uniform(jax.random.key(0), (3, 2, 3), jnp.float32, -np.pi, np.pi)


def theta64():
    return THETA.astype(jnp.float64)


def statevector_energy(theta, obs):
    """Dense NumPy, one Kronecker product a gate."""
    blocks, _, n = theta.shape
    psi = np.eye(2**n)[0].astype(complex)
    for g in ansatz.ry_rz_tape(n, blocks - 1):
        if g.name == "cx":
            c, t = g.wires
            bits = (np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) & 1
            bits[:, t] ^= bits[:, c]
            full = np.eye(2**n)[:, bits @ (1 << np.arange(n - 1, -1, -1))]
        else:
            axis = {"ry": 2, "rz": 3}[g.name]
            a = g.sign * theta[g.layer, axis - 2, g.wires[0]] / 2
            u = np.cos(a) * np.eye(2) - 1j * np.sin(a) * PAULIS[axis]
            full = np.kron(np.kron(np.eye(2 ** g.wires[0]), u), np.eye(2 ** (n - 1 - g.wires[0])))
        psi = full @ psi
    return (psi.conj() @ pauli.to_dense(obs) @ psi).real


@pytest.mark.parametrize("backend", ["ptm", "default.mixed"])
def test_one_qubit_closed_form(backend):
    """<Z> = (1 - lam)^2 cos t after RY(t), RZ(f)."""
    theta = jnp.array([[[0.7], [0.3]]])
    got = ansatz.noisy_expval(theta, 0.1, 0.0, hm.zn(1), backend=backend)
    assert float(got) == pytest.approx(0.9**2 * np.cos(0.7), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_without_noise_it_is_the_statevector(n):
    theta = jax.random.normal(jax.random.key(n), (3, 2, n))
    obs = hm.tfim_ring(n)
    want = statevector_energy(np.asarray(theta), obs)
    assert float(ansatz.noisy_expval(theta, 0.0, 0.0, obs)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "scale", "n"),
    [
        ("depol", 1, 3),
        pytest.param("depol", 3, 2, marks=pytest.mark.slow),
        ("ampdamp", 1, 2),
        ("dephase", 1, 2),
        ("thermal", 1, 2),
        ("device", 3, 2),
    ],
)
def test_ptm_equals_default_mixed(kind, scale, n):
    """Every noise kind, with read-out and coherent errors, folded and not, to 1e-9."""
    options = {"kind": kind, "scale": scale, "fixed": nz.FixedErrors((0.01, 0.03), 0.05)}
    theta = theta64()[3 - n :, :, :n]
    args = (0.013, 0.041, hm.tfim_ring(n))
    fast = ansatz.noisy_expval(theta, *args, **options)
    reference = ansatz.noisy_expval(theta, *args, backend="default.mixed", **options)
    assert float(fast) == pytest.approx(float(reference), abs=1e-9)
    low = ansatz.noisy_expval(theta.astype(jnp.float32), *args, **options)
    assert low.dtype == jnp.float32
    assert float(low) == pytest.approx(float(reference), abs=1e-5)


def test_gradients_of_both_backends_and_of_the_shift_rule():
    """Noise does not depend on the angles, so every gate obeys the two-point shift rule exactly."""
    obs, theta = hm.tfim_ring(2), theta64()[1:, :, :2]

    def energy(theta, backend="ptm"):
        return ansatz.noisy_expval(theta, 0.01, 0.05, obs, backend=backend)

    grad = jax.grad(energy)(theta)
    np.testing.assert_allclose(jax.grad(energy)(theta, "default.mixed"), grad, atol=1e-9)
    shifts = (np.pi / 2) * jnp.eye(theta.size).reshape(-1, *theta.shape)
    energies = jax.jit(jax.vmap(energy))
    rule = (energies(theta + shifts) - energies(theta - shifts)) / 2
    np.testing.assert_allclose(rule.reshape(grad.shape), grad, atol=1e-9)
    low = jax.grad(energy)(theta.astype(jnp.float32))
    np.testing.assert_allclose(low, grad, atol=1e-5)


def test_tied_angles_need_one_shift_per_gate():
    """One angle t in all 18 gates: the rule summed over gates is the derivative, a joint shift is not."""
    obs = hm.zn(3)
    energy = jax.jit(lambda theta: ansatz.noisy_expval(theta, 0.01, 0.02, obs))
    ones = jnp.ones((3, 2, 3))
    t = 0.4
    derivative = jax.grad(lambda s: energy(s * ones))(t)
    eye = jnp.eye(18).reshape(18, 3, 2, 3) * np.pi / 2
    each = sum((energy(t * ones + e) - energy(t * ones - e)) / 2 for e in eye)
    joint = (energy((t + np.pi / 2) * ones) - energy((t - np.pi / 2) * ones)) / 2
    assert float(each) == pytest.approx(float(derivative), abs=1e-10)
    assert abs(float(joint - derivative)) > 1e-2


def test_it_maps_over_circuits_and_noise_and_compiles_once():
    calls = []

    @jax.jit
    def table(thetas, lams):
        calls.append(0)
        one = lambda t, l: ansatz.noisy_expval(t, l, l, hm.zn(2))  # noqa: E731
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(thetas, lams)

    thetas = jax.random.normal(jax.random.key(1), (4, 2, 2, 2))
    lams = jnp.array([0.0, 0.1, 0.2])
    out = table(thetas, lams)
    table(thetas + 1, lams)
    assert out.shape == (4, 3)
    assert len(calls) == 1
    assert float(out[2, 1]) == pytest.approx(
        float(ansatz.noisy_expval(thetas[2], 0.1, 0.1, hm.zn(2))), abs=1e-12
    )


def test_energy_is_a_polynomial_of_the_survival_probability():
    """Degree at most the number of gates in 1 - lam; with lam1 = lam / 10 still one in lam."""
    theta = jax.random.normal(jax.random.key(3), (2, 2, 2))
    num_gates = len(ansatz.ry_rz_tape(2, 1))
    lams = jnp.linspace(0.0, 1.0, num_gates + 4)
    for ratio in (1.0, 0.1):
        e = jax.vmap(lambda l: ansatz.noisy_expval(theta, ratio * l, l, hm.tfim_ring(2)))(lams)
        fit = np.polynomial.Chebyshev.fit(lams, e, num_gates)
        np.testing.assert_allclose(fit(np.asarray(lams)), e, atol=1e-9)
        short = np.polynomial.Chebyshev.fit(lams, e, 3)  # and no lower degree would do
        assert np.abs(short(np.asarray(lams)) - e).max() > 1e-4


def test_noise_kills_everything_but_the_identity():
    obs = pauli.PauliSum(np.array([0.5, 1.0]), np.array([[0, 0, 0], [3, 3, 3]], np.uint8))
    assert float(ansatz.noisy_expval(theta64(), 1.0, 1.0, obs)) == pytest.approx(0.5, abs=1e-14)


def test_states_are_physical_and_purity_falls_with_lam():
    basis = pt.pauli_basis(3)
    purities = []
    for lam in (0.0, 0.05, 0.1, 0.3, 0.8):
        r = np.asarray(ansatz.state_of(theta64(), lam, lam))
        rho = np.einsum("i,iab->ab", r, basis) / 8
        assert np.trace(rho).real == pytest.approx(1, abs=1e-12)
        assert np.linalg.eigvalsh(rho).min() > -1e-12
        purities.append((r @ r) / 8)
    assert purities[0] == pytest.approx(1)
    assert sorted(purities, reverse=True) == purities


def test_dephasing_after_the_last_gate_leaves_z_alone():
    """Dephasing of RZ (one layer: the last gate) is invisible to Z; before an RY it is not."""
    theta = jax.random.normal(jax.random.key(2), (1, 2, 2))
    r = pt.zero_state(2)
    for q in range(2):
        for axis in (0, 1):
            r = pt.apply_ptm(r, pt.ptm_rotation(axis + 2, theta[0, axis, q]), (q,))
    dephased = pt.apply_ptm(r, nz.channel("dephase", 0.3, 2), (0, 1))
    z = pauli.to_coords(hm.zn(2))
    assert float(z @ dephased) == pytest.approx(float(z @ r), abs=1e-14)
    deep = jax.random.normal(jax.random.key(2), (2, 2, 2))
    clean, noisy = (
        float(ansatz.noisy_expval(deep, l, l, hm.zn(2), kind="dephase")) for l in (0.0, 0.3)
    )
    assert abs(clean - noisy) > 1e-3


def test_folding_with_scale_one_is_the_identity():
    tape = ansatz.ry_rz_tape(3, 2)
    assert ansatz.fold_gates(tape, 1) == tape
    assert len(ansatz.fold_gates(tape, 5)) == 5 * len(tape)
    assert [g.sign for g in ansatz.fold_gates(tape, 3)[:3]] == [1, -1, 1]


@pytest.mark.parametrize("scale", [3, 5, 7])
def test_folding_without_noise_changes_nothing(scale):
    obs = hm.tfim_ring(3)
    want = float(ansatz.noisy_expval(theta64(), 0.0, 0.0, obs))
    assert float(ansatz.noisy_expval(theta64(), 0.0, 0.0, obs, scale=scale)) == pytest.approx(
        want, abs=1e-12
    )


def test_folding_amplifies_a_one_qubit_circuit_exactly():
    """RY then RZ, each s times, every copy with its own (1 - lam): (1 - lam)^(2 s) cos t."""
    theta = jnp.array([[[0.7], [0.3]]])
    for scale in (1, 3, 5):
        got = ansatz.noisy_expval(theta, 0.1, 0.0, hm.zn(1), scale=scale)
        assert float(got) == pytest.approx(0.9 ** (2 * scale) * np.cos(0.7), abs=1e-12)


@pytest.mark.parametrize("scale", [0, 2, -1, 9])
def test_bad_scales_are_refused(scale):
    with pytest.raises(UserError, match="odd number"):
        ansatz.fold_gates(ansatz.ry_rz_tape(2, 1), scale)


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="theta has shape"):
        ansatz.noisy_expval(jnp.zeros((2, 2, 3)), 0.1, 0.1, hm.zn(2))
    with pytest.raises(UserError, match="backend"):
        ansatz.noisy_expval(jnp.zeros((2, 2, 2)), 0.1, 0.1, hm.zn(2), backend="aer")


def test_against_qiskit_aer():
    pytest.importorskip("qiskit_aer")
    from qiskit import QuantumCircuit
    from qiskit_aer import AerSimulator
    from qiskit_aer.noise import NoiseModel, depolarizing_error

    theta, lam = np.asarray(theta64()), 0.03
    circuit = QuantumCircuit(3)
    for g in ansatz.ry_rz_tape(3, 2):
        if g.name == "cx":
            circuit.cx(*g.wires)
        else:
            angle = float(theta[g.layer, 0 if g.name == "ry" else 1, g.wires[0]])
            getattr(circuit, g.name)(angle, g.wires[0])
    circuit.save_density_matrix()
    model = NoiseModel()
    model.add_all_qubit_quantum_error(depolarizing_error(lam, 1), ["ry", "rz"])
    model.add_all_qubit_quantum_error(depolarizing_error(lam, 2), ["cx"])
    sim = AerSimulator(method="density_matrix", noise_model=model)
    rho = sim.run(circuit).result().data()["density_matrix"].data
    want = np.trace(
        pauli.to_dense(hm.zn(3)) @ rho
    ).real  # Z on all: the order of qubits is no matter
    assert float(ansatz.noisy_expval(theta64(), lam, lam, hm.zn(3))) == pytest.approx(
        want, abs=1e-9
    )
