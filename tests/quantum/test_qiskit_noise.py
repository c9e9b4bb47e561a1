"""Aer noise files against what Aer and Qiskit themselves computed from them (stored in aer_noise.json)."""

import copy
import json
from pathlib import Path

import numpy as np
import pennylane as qml
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import noise_model as nm
from qlab.quantum.device import PTMDevice
from qlab.quantum.qiskit_noise import NAMES, read_qiskit_noise

STORED = json.loads((Path(__file__).parent / "aer_noise.json").read_text())
GATES = [
    qml.H(1), qml.SX(0), qml.RZ(0.3, 0), qml.CNOT([0, 1]), qml.Y(0), qml.Z(1), qml.RZ(0.7, 1), qml.S(1),
    qml.CNOT([1, 0]), qml.X(0),
]  # fmt: skip


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("aer") / "model.json"
    path.write_text(json.dumps(STORED["model"]))
    return read_qiskit_noise(path)


def test_the_density_matrix_is_aers(noise):
    def circuit():
        for gate in GATES:
            qml.apply(gate)
        return qml.state()

    rho = qml.QNode(circuit, PTMDevice(2, noise=noise))()
    pairs = np.asarray(STORED["density"])
    np.testing.assert_allclose(rho, pairs[..., 0] + 1j * pairs[..., 1], atol=1e-6)


@pytest.mark.parametrize(("gate", "qubits", "fidelity"), STORED["fidelity"])
def test_each_gates_fidelity_is_qiskits(noise, gate, qubits, fidelity):
    k = max(len(qubits), 1)
    labels = tuple(map(str, qubits)) or ("7",)
    (channel,) = nm.channels_after(noise, NAMES[gate], k, labels)
    ops = channel.params["matrices"]
    d = ops.shape[-1]
    process = sum(abs(np.trace(op)) ** 2 for op in ops) / d**2
    np.testing.assert_allclose((d * process + 1) / (d + 1), fidelity, atol=1e-7)


def test_readout_and_wires(noise):
    assert noise.readout == (0.01, 0.03)
    assert noise.readout_wires == {"0": (0.02, 0.05)}
    assert nm.channels_after(noise, "RZ", 1, ("1",)) == ()  # only qubit 0 has noise after rz
    probs = qml.QNode(lambda: qml.probs(wires=[0, 1]), PTMDevice(2, noise=noise))()
    np.testing.assert_allclose(probs, np.kron([0.98, 0.02], [0.99, 0.01]), atol=1e-6)


def test_an_order_of_qubits_is_kept():
    """X on the second qubit of cx, written as Aer writes it: the label's first letter is the last qubit."""
    error = {"type": "qerror", "operations": ["cx"], "probabilities": [1.0],
             "instructions": [[{"name": "pauli", "qubits": [0, 1], "params": ["XI"]}]]}  # fmt: skip
    dev = PTMDevice(2, noise=read_qiskit_noise({"errors": [error]}))
    run = qml.QNode(lambda: (qml.CNOT([0, 1]), [qml.expval(qml.Z(w)) for w in (0, 1)])[1], dev)
    np.testing.assert_allclose(run(), [1.0, -1.0], atol=1e-6)
    matrix = np.kron(np.eye(2), [[0, 1], [1, 0]])  # Aer's own order: the right factor is qubit 0
    pairs = [[[float(v), 0.0] for v in row] for row in matrix]
    error["instructions"] = [[{"name": "unitary", "qubits": [0, 1], "params": [pairs]}]]
    dev = PTMDevice(2, noise=read_qiskit_noise({"errors": [error]}))
    run = qml.QNode(lambda: (qml.CNOT([0, 1]), [qml.expval(qml.Z(w)) for w in (0, 1)])[1], dev)
    np.testing.assert_allclose(run(), [-1.0, 1.0], atol=1e-6)


def _broken(change):
    model = copy.deepcopy(STORED["model"])
    change(model["errors"])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e[0].update(operations=["sxx"]),
            r"errors\[0\]: gate 'sxx' is not known; did you mean sx",
        ),
        (lambda e: e[0].update(type="error"), r"errors\[0\]: its type is neither"),
        (lambda e: e[0].update(probabilities=[0.5]), "not two lists of one length"),
        (lambda e: e[0].update(probabilities=[0.5, 0.1, 0.1, 0.1]), "the trace is not preserved"),
        (lambda e: e[0]["instructions"][0][0].update(name="foo"), "instruction 'foo' is not known"),
        (
            lambda e: e[2]["instructions"][0][0].update(params=[]),
            "instruction 'unitary' is malformed",
        ),
        (lambda e: e[-1].update(probabilities=[[0.9, 0.2], [0, 1]]), "no 2 x 2 table"),
    ],
)
def test_bad_files_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        read_qiskit_noise(_broken(change))
    assert "\n" not in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_qiskit_noise(tmp_path / "nothing.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_qiskit_noise(tmp_path / "a.json")
    with pytest.raises(UserError, match="no list of errors"):
        read_qiskit_noise({"gates": {}})
