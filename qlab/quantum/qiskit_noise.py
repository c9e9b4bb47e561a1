"""Noise models of Qiskit Aer files: NoiseModel.to_dict(serializable=True), each error as one Kraus set.

    noise = read_qiskit_noise("backend.json")            # json.dump(aer_noise_model.to_dict(serializable=True), f)
    dev = qml.device("qlab.ptm", wires=5, noise=noise)

An error of a gate is a mixture of short circuits (Pauli, Kraus, unitary, reset); its channel is formed as a Choi
matrix, and its Kraus operators are the eigenvectors of that. Aer numbers the qubits of a matrix from the right;
here the first qubit of a gate is the leftmost factor, as in PennyLane. Errors of particular qubits replace the
error of all qubits, as in Aer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum.noise_model import Channel, NoiseModel

NAMES = {
    "id": "Identity", "x": "PauliX", "y": "PauliY", "z": "PauliZ", "h": "Hadamard", "s": "S", "t": "T",
    "sdg": "Adjoint(S)", "tdg": "Adjoint(T)", "sx": "SX", "sxdg": "Adjoint(SX)", "rx": "RX", "ry": "RY",
    "rz": "RZ", "p": "PhaseShift", "u1": "PhaseShift", "u2": "U2", "u3": "U3", "u": "U3", "cx": "CNOT",
    "cy": "CY", "cz": "CZ", "ch": "CH", "swap": "SWAP", "iswap": "ISWAP", "ecr": "ECR", "crx": "CRX",
    "cry": "CRY", "crz": "CRZ", "cp": "ControlledPhaseShift", "cu1": "ControlledPhaseShift",
    "rxx": "IsingXX", "ryy": "IsingYY", "rzz": "IsingZZ",
}  # fmt: skip
PAULI = {
    "I": np.eye(2, dtype=complex),
    "X": np.array([[0, 1], [1, 0]], complex),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1.0 + 0j, -1.0]),
}
UNITARY = {
    "id": PAULI["I"], "x": PAULI["X"], "y": PAULI["Y"], "z": PAULI["Z"],
    "h": np.array([[1, 1], [1, -1]], complex) / np.sqrt(2), "s": np.diag([1, 1j]), "sdg": np.diag([1, -1j]),
}  # fmt: skip
RESET = np.array([[[1, 0], [0, 0]], [[0, 1], [0, 0]]], complex)


def read_qiskit_noise(source: str | Path | Mapping[str, Any]) -> NoiseModel:
    """The NoiseModel of an Aer file or dictionary.

    Raises:
      UserError: no such file, no JSON, a gate or an instruction that is not known, numbers that are no
        channel; always with the place.
    """
    name, data = "noise", source
    if not isinstance(source, Mapping):
        path, name = Path(source), str(source)
        if not path.is_file():
            raise UserError(
                f"{name}: no such file; write it with json.dump(model.to_dict(serializable=True))"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise UserError(f"{name}: not JSON ({e})") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("errors"), Sequence):
        raise UserError(
            f"{name}: no list of errors; an Aer noise model's to_dict(serializable=True) is expected"
        )
    gates: dict[str, tuple[Channel, ...]] = {}
    on_wires: dict[tuple[str, tuple[str, ...]], tuple[Channel, ...]] = {}
    readout, readout_wires = (0.0, 0.0), {}
    for i, error in enumerate(data["errors"]):
        where = f"{name}: errors[{i}]"
        if not isinstance(error, Mapping) or error.get("type") not in ("qerror", "roerror"):
            raise UserError(f"{where}: its type is neither 'qerror' nor 'roerror'")
        groups = [tuple(str(q) for q in g) for g in error.get("gate_qubits", [])]
        if error["type"] == "roerror":
            flips = _flips(error, where)
            readout_wires |= {g[0]: flips for g in groups}
            readout = readout if groups else flips
            continue
        channel = (Channel("kraus", {"matrices": _kraus(error, where)}),)
        for operation in error.get("operations", []):
            if operation not in NAMES:
                raise UserError(
                    f"{where}: gate {operation!r} is not known{nearest(str(operation), tuple(NAMES))}"
                )
            if groups:
                on_wires |= {(NAMES[operation], g): channel for g in groups}
            else:
                gates[NAMES[operation]] = channel
    return NoiseModel(gates, {}, readout, readout_wires, name, on_wires)


def _flips(error: Mapping[str, Any], where: str) -> tuple[float, float]:
    try:
        rows = np.asarray(error["probabilities"], float)
    except (KeyError, TypeError, ValueError):
        rows = np.zeros(0)
    if rows.shape != (2, 2) or not np.allclose(rows.sum(1), 1) or rows.min() < 0:
        raise UserError(
            f"{where}: probabilities are no 2 x 2 table of P(read | prepared); one qubit at a time"
        )
    return float(rows[0, 1]), float(rows[1, 0])


def _kraus(error: Mapping[str, Any], where: str) -> np.ndarray:
    """c[m, 2^k, 2^k] of a mixture of circuits, first qubit leftmost; sum K^dagger K = 1."""
    circuits, probabilities = error.get("instructions"), error.get("probabilities")
    if (
        not isinstance(circuits, list)
        or not isinstance(probabilities, list)
        or len(circuits) != len(probabilities)
    ):
        raise UserError(f"{where}: instructions and probabilities are not two lists of one length")
    groups = error.get("gate_qubits") or [[]]
    k = max(
        [len(g) for g in groups] + [1 + q for c in circuits for s in c for q in s.get("qubits", [])]
    )
    choi = np.zeros((4**k, 4**k), complex)
    for circuit, share in zip(circuits, probabilities, strict=True):
        ops = np.eye(2**k, dtype=complex)[None]
        for step in circuit:
            new = _step(step, k, where)
            ops = np.einsum("mab,nbc->mnac", new, ops).reshape(-1, 2**k, 2**k)
        flat = ops.reshape(len(ops), -1)  # row-major vectors of K
        choi += share * np.einsum("ma,mb->ab", flat, flat.conj())
    values, vectors = np.linalg.eigh(choi)
    kept = values > 1e-14 * max(values.max(), 1.0)
    made = (vectors[:, kept] * np.sqrt(values[kept])).T.reshape(-1, 2**k, 2**k)
    gap = np.abs(np.einsum("mba,mbc->ac", made.conj(), made) - np.eye(2**k)).max()
    if not gap < 1e-6:
        raise UserError(f"{where}: the trace is not preserved (off by {gap:.2g})")
    return made


def _step(step: Mapping[str, Any], k: int, where: str) -> np.ndarray:
    """Kraus operators c[m, 2^k, 2^k] of one instruction of an error's circuit."""
    name, qubits = step.get("name"), list(step.get("qubits", []))
    try:
        if name == "pauli":  # the label's last letter is its first qubit
            small = functools.reduce(np.kron, [PAULI[c] for c in reversed(step["params"][0])])[None]
        elif name in ("kraus", "unitary"):
            raw = np.asarray(step["params"], float)
            small = _reverse(raw[..., 0] + 1j * raw[..., 1], len(qubits))
        elif name == "reset":
            small = RESET
        elif name in UNITARY:
            small = UNITARY[name][None]
        else:
            raise UserError(
                f"{where}: instruction {name!r} is not known{nearest(str(name), tuple(UNITARY))}"
            )
        if small.shape[1:] != (2 ** len(qubits),) * 2:
            raise ValueError(f"matrices of shape {small.shape[1:]} for {len(qubits)} qubits")
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise UserError(f"{where}: instruction {name!r} is malformed ({e})") from None
    return _spread(small, qubits, k)


def _reverse(matrices: np.ndarray, k: int) -> np.ndarray:
    """Between Aer's order of qubits (first one rightmost) and ours."""
    axes = [0, *range(k, 0, -1), *range(2 * k, k, -1)]
    return matrices.reshape(-1, *([2] * 2 * k)).transpose(axes).reshape(-1, 2**k, 2**k)


def _spread(small: np.ndarray, qubits: list[int], k: int) -> np.ndarray:
    """Operators on some qubits as operators on all k."""
    rest = [q for q in range(k) if q not in qubits]
    big = np.einsum("mab,cd->macbd", small, np.eye(2 ** len(rest)))
    big = big.reshape(len(small), *([2] * 2 * k))
    order = np.argsort([*qubits, *rest])
    axes = [0, *(1 + order), *(1 + k + order)]
    return big.transpose(axes).reshape(-1, 2**k, 2**k)
