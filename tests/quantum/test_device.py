"""qlab.ptm against default.mixed: gates, channels, measurements, gradients, jit and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pennylane as qml
import pytest

from qlab.quantum import noise as nz
from qlab.quantum.device import PTMDevice

WIRES = ("a", 3, "c", 0)

# (gate, number of parameters, number of wires)
GATES = [
    *((g, 0, 1) for g in ("Identity", "X", "Y", "Z", "Hadamard", "S", "T", "SX")),
    *((g, 1, 1) for g in ("RX", "RY", "RZ", "PhaseShift", "U1")),
    ("U2", 2, 1),
    ("Rot", 3, 1),
    ("U3", 3, 1),
    *((g, 0, 2) for g in ("CNOT", "CY", "CZ", "CH", "SWAP", "ISWAP", "SISWAP", "ECR")),
    *((g, 1, 2) for g in ("CRX", "CRY", "CRZ", "ControlledPhaseShift", "CPhaseShift10")),
    *((g, 1, 2) for g in ("IsingXX", "IsingYY", "IsingZZ", "IsingXY", "PSWAP", "MultiRZ")),
    *((g, 1, 2) for g in ("SingleExcitation", "SingleExcitationPlus", "FermionicSWAP")),
    ("CRot", 3, 2),
    *((g, 0, 3) for g in ("Toffoli", "CSWAP", "CCZ", "MultiControlledX", "QFT")),
    ("MultiRZ", 1, 3),
    ("DoubleExcitation", 1, 4),
    ("DoubleExcitationMinus", 1, 4),
    ("OrbitalRotation", 1, 4),
]
CHANNELS = [
    lambda p, w: qml.AmplitudeDamping(p, w[0]),
    lambda p, w: qml.GeneralizedAmplitudeDamping(p, 0.3, w[0]),
    lambda p, w: qml.PhaseDamping(p, w[0]),
    lambda p, w: qml.DepolarizingChannel(p, w[0]),
    lambda p, w: qml.BitFlip(p, w[0]),
    lambda p, w: qml.PhaseFlip(p, w[0]),
    lambda p, w: qml.ResetError(p / 2, p / 3, w[0]),
    lambda p, w: qml.PauliError("XZ", p, w[:2]),
    lambda p, w: qml.ThermalRelaxationError(0.2, 1.0, 0.7, p, w[0]),
    lambda p, w: qml.ThermalRelaxationError(0.2, 1.0, 1.6, p, w[0]),  # T2 > T1
    lambda p, w: qml.QubitChannel(np.asarray(nz.depolarizing_kraus(p, 2)), w[:2]),
]


def random_unitary(rng, k):
    a = rng.standard_normal((2, 2**k, 2**k))
    return np.linalg.qr(a[0] + 1j * a[1])[0]


# neighbours in order and not; few, since each place is a program to compile
PLACES = {1: ["a", "0"], 2: ["a3", "3c", "0a"], 3: ["a3c", "0ca"], 4: ["c0a3"]}


def random_ops(rng, gates, channels):
    """One of each, in random order; returned as a function that applies them."""
    ops = []

    def place(k):
        return [int(w) if w.isdigit() else w for w in rng.choice(PLACES[k])]

    for name, num_params, k in gates:
        ops.append(getattr(qml, name)(*rng.uniform(-np.pi, np.pi, num_params), wires=place(k)))
    for make in channels:
        ops.append(make(rng.uniform(0.05, 0.4), place(2)))
    for k in (1, 2, 3):
        ops.append(qml.QubitUnitary(random_unitary(rng, k), place(k)))
    ops.append(qml.adjoint(qml.S("a")))
    ops.append(qml.ctrl(qml.RX(0.3, 3), "c"))
    ops.append(qml.GlobalPhase(0.4))
    order = rng.permutation(len(ops))
    return lambda: [qml.apply(ops[i]) for i in order]


def both(circuit, *args, wires=WIRES, **device):
    """The circuit's value on qlab.ptm and on default.mixed."""
    return [
        qml.QNode(circuit, dev)(*args)
        for dev in (PTMDevice(wires, **device), qml.device("default.mixed", wires=wires))
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_gate_and_channel_equals_default_mixed(seed):
    apply = random_ops(np.random.default_rng(seed), GATES, CHANNELS)

    def circuit():
        apply()
        return qml.state()

    got, want = both(circuit)
    assert abs(want - np.diag(np.diag(want))).max() > 1e-3  # not driven to a trivial state
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_float32_is_good_to_1e_6():
    rng = np.random.default_rng(2)
    some = [GATES[i] for i in rng.permutation(len(GATES) - 8)[:15]]
    apply = random_ops(rng, some, CHANNELS[:3])

    def circuit():
        apply()
        return qml.state()

    with jax.enable_x64(False):
        got, want = both(circuit)
    assert got.dtype == np.complex64
    np.testing.assert_allclose(got, want, atol=1e-6)


def ansatz(theta, wires=(0, 1, 2)):
    """RY-RZ layers with entanglers and channels; theta f[2, 2, 3]."""
    for layer in theta:
        for q, w in enumerate(wires):
            qml.RY(layer[0, q], w)
            qml.RZ(layer[1, q], w)
        qml.CNOT([wires[0], wires[1]])
        qml.IsingXX(layer[0, 0] * layer[1, 1], [wires[2], wires[0]])
        qml.DepolarizingChannel(0.03, wires[1])
        qml.AmplitudeDamping(0.1, wires[2])


THETA = np.random.default_rng(3).uniform(-2, 2, (2, 2, 3))
MATRIX = np.array([[1, 0.3 - 0.2j], [0.3 + 0.2j, -0.5]])


def hamiltonian():
    return qml.Hamiltonian([0.5, -1.2, 0.7], [qml.X(0) @ qml.Z(2), qml.Y(1), qml.Z(0) @ qml.Z(1)])


def observables():
    two = np.kron(MATRIX, np.diag([1.0, 2])) + 0.1 * np.eye(4)[::-1]
    return [
        qml.Z(1),
        qml.X(2) @ qml.Y(0),
        qml.Identity(0),
        hamiltonian(),
        qml.X(0) @ (qml.Z(1) + 0.4 * qml.Y(2)),
        qml.Hadamard(1),
        qml.Hermitian(two, [2, 0]),
        qml.Projector([1, 0], [2, 1]),
        qml.Projector(np.array([0.6, 0.8j]), [1]),
        qml.Hadamard(2) @ qml.Y(1),
        qml.s_prod(0.3, qml.Hadamard(0)) + qml.Hermitian(MATRIX, 1) + qml.Z(2),
    ]


def test_measurements_equal_default_mixed():
    obs = observables()
    squared = [obs[i] for i in (1, 3, 6, 7, 10)]
    sparse = qml.SparseHamiltonian(hamiltonian().sparse_matrix([0, 1, 2]), [0, 1, 2])

    def circuit(theta):
        ansatz(theta)
        return (
            *(qml.expval(o) for o in [*obs, sparse]),
            *(qml.var(o) for o in squared),
            qml.probs(wires=[2, 0]),
            qml.probs(),
            qml.probs(op=qml.X(1) @ qml.Hadamard(0)),
            qml.density_matrix([2, 1]),
            qml.purity([1]),
            qml.vn_entropy([0, 2]),
            qml.mutual_info([0], [2]),
        )

    got, want = both(circuit, THETA, wires=3)
    assert len(got) == len(want) == len(obs) + len(squared) + 8
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(a, b, atol=1e-10, err_msg=f"measurement {i}")


def test_readout_errors_of_every_observable():
    """Turned into the eigenbasis on default.mixed, every wire's bit flipped there by a channel of its own.

    (default.mixed's own readout_prob raises in PennyLane 0.45.1: it iterates over the float.)
    """
    f0, f1 = 0.1, 0.25
    flips = [[1 - f0, f1], [f0, 1 - f1]]  # P(read i | j), as Kraus operators |i><j|
    kraus = [
        np.sqrt(flips[i][j]) * np.eye(2)[i][:, None] * np.eye(2)[j] for i in (0, 1) for j in (0, 1)
    ]

    def by_hand(obs):
        def circuit(theta):
            ansatz(theta)
            obs.diagonalizing_gates()
            for w in obs.wires:
                qml.QubitChannel(kraus, w)
            return qml.probs(wires=obs.wires)

        probs = qml.QNode(circuit, qml.device("default.mixed", wires=3))(THETA)
        mean = probs @ obs.eigvals()
        return mean.real, (probs @ obs.eigvals() ** 2 - mean**2).real

    single = [observables()[i] for i in (0, 1, 5, 6, 7, 8, 9)]

    def circuit(theta):
        ansatz(theta)
        return (
            qml.expval(hamiltonian()),
            *(qml.expval(o) for o in single),
            *(qml.var(o) for o in single),
        )

    total, *got = qml.QNode(circuit, PTMDevice(3, noise={"readout": [f0, f1]}))(THETA)
    want = [by_hand(o) for o in single]
    np.testing.assert_allclose(got, np.ravel(want, order="F"), atol=1e-10)
    coeffs, terms = hamiltonian().terms()
    by_terms = sum(c * by_hand(o)[0] for c, o in zip(coeffs, terms, strict=True))
    np.testing.assert_allclose(total, by_terms, atol=1e-10)


def test_states_are_prepared_and_replaced():
    """A state vector on part of the wires, a basis state, and a density matrix put in halfway."""
    psi = random_unitary(np.random.default_rng(4), 2)[0]
    rho = np.diag([0.3, 0.7]) + 0.1 * np.array([[0, 1j], [-1j, 0]])

    def circuit(first):
        qml.apply(first)
        qml.CNOT([0, 1])
        qml.IsingXX(0.7, [1, 2])
        qml.QubitDensityMatrix(rho, wires=1)
        qml.CRY(0.4, [1, 0])
        return qml.state()

    for first in (qml.StatePrep(psi, [2, 0]), qml.BasisState([1, 0, 1], [0, 1, 2])):
        got, want = both(circuit, first, wires=3)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_gradients():
    """Backprop is default.mixed's and the central difference's, through the parameters and an observable's."""

    def circuit(theta, c):
        ansatz(theta)
        return qml.expval(qml.Hamiltonian([c, 1.0], [qml.Z(0) @ qml.X(2), qml.Y(1)]))

    ours = jax.jit(jax.grad(qml.QNode(circuit, PTMDevice(3), interface="jax"), argnums=(0, 1)))
    mixed = qml.QNode(circuit, qml.device("default.mixed", wires=3), diff_method="parameter-shift")
    theta, c = jnp.asarray(THETA), jnp.asarray(0.8)
    got, got_c = ours(theta, c)
    value = jax.jit(qml.QNode(circuit, PTMDevice(3)))
    step, eps = jnp.zeros_like(theta).at[1, 1, 2].set(1e-5), 1e-5
    difference = (value(theta + step, c) - value(theta - step, c)) / (2 * eps)
    np.testing.assert_allclose(got[1, 1, 2], difference, atol=1e-8)
    np.testing.assert_allclose(got_c, value(theta, 1.0) - value(theta, 0.0), atol=1e-12)
    want = qml.grad(mixed, argnums=0)(qml.numpy.array(THETA, requires_grad=True), 0.8)
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_jit_traces_once_and_vmap_and_broadcasting_agree():
    traces = []
    dev = PTMDevice(2, noise="ourense")

    @qml.qnode(dev)
    def circuit(x, p):
        traces.append(None)
        qml.RX(x, 0)
        qml.Rot(x, p, 0.2, 1)  # one of three parameters in a batch
        qml.CRY(p, [0, 1])
        qml.AmplitudeDamping(p, 1)
        return qml.expval(qml.Z(1)), qml.probs(wires=[1, 0])

    run = jax.jit(circuit)
    xs, p = jnp.linspace(-1, 2, 4), jnp.asarray(0.3)
    one_by_one = [run(x, p) for x in xs]
    run(xs[0], jnp.asarray(0.1))
    assert len(traces) == 1
    mapped = jax.vmap(circuit, in_axes=(0, None))(xs, p)
    broadcast = circuit(xs, 0.3)
    for got in (mapped, broadcast):
        for i in range(2):
            np.testing.assert_allclose(got[i], jnp.stack([o[i] for o in one_by_one]), atol=1e-12)


def test_best_is_backprop_in_jax_and_parameter_shift_in_autograd():
    @qml.qnode(PTMDevice(1))
    def circuit(x):
        qml.RX(x, 0)
        return qml.expval(qml.Z(0))

    got = qml.grad(circuit)(qml.numpy.array(0.4, requires_grad=True))
    np.testing.assert_allclose(got, -np.sin(0.4), atol=1e-12)
    np.testing.assert_allclose(jax.grad(circuit)(0.4), -np.sin(0.4), atol=1e-12)
    refused = qml.QNode(circuit.func, PTMDevice(1), diff_method="backprop")
    with pytest.raises(qml.exceptions.QuantumFunctionError, match="does not support backprop"):
        refused(qml.numpy.array(0.4, requires_grad=True))


def test_wires_of_the_circuit():
    """Without wires the device takes the circuit's; of many it simulates those that are used."""

    def circuit():
        qml.RX(0.3, "q")
        qml.CNOT(["q", 7])
        return qml.probs(wires=[7, "q"])

    want = [np.cos(0.15) ** 2, 0, 0, np.sin(0.15) ** 2]
    for wires in (None, [7, *range(20, 28), "q"]):
        np.testing.assert_allclose(qml.QNode(circuit, PTMDevice(wires))(), want, atol=1e-12)


def test_mid_circuit_measurements_are_deferred():
    def circuit(x):
        qml.RX(x, 0)
        m = qml.measure(0)
        qml.cond(m, qml.RY)(0.4, 1)
        return qml.expval(qml.Z(1)), qml.probs(op=m), qml.expval(m)

    for got, want in zip(*both(circuit, 0.7, wires=3), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
