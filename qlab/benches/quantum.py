"""Gradients of a noisy VQE on 3 to 6 qubits and of a noiseless ansatz on 8 to 16, against other simulators.

Noiseless (tasks s8, s12, s16): see qlab.benches.quantum_states. Learning (zne6, latent4, latent8, grow, label): see
qlab.benches.quantum_learning. Noisy (n3 ... n6), one circuit for all: the RY-RZ ansatz with two entangling blocks, depolarizing noise after every gate,
the Ising ring as observable, value and gradient in double precision. Contestants:
    ptm            qlab.quantum.noisy_expval, its fast path
    default.mixed  PennyLane with JAX backpropagation, rotations as QubitUnitary (the form that
                   compiles fastest), noise as QubitChannel
    density        a density matrix by hand in plain JAX, rotations fused with their noise: the yardstick
                   (no bound: Pauli-transfer matrices move half the bytes)
    aer            Qiskit Aer's density-matrix method with the parameter-shift rule, where installed
All must agree with the first contestant in value and gradient; one that does not is reported as failed.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches import quantum_learning, quantum_states
from qlab.benches.measure import Number, Tell, find, interleave, ratio, seconds_per_call
from qlab.lab.experiment import Claim, Figure, Metric
from qlab.quantum import ansatz, hamiltonians, noise, pauli
from qlab.quantum.qml import pennylane

METRICS = {
    "call_ms": Metric("ms", "lower", "value and gradient, steady"),
    "first_call_s": Metric(
        "s", "lower", "the first call at this size: tracing, compiling, running"
    ),
    "to_density": Metric("times", "lower", "call_ms over that of the density matrix by hand"),
    "to_ptm": Metric("times", "lower", "call_ms over that of ptm"),
    "to_raw": Metric("times", "lower", "call_ms over that of a state vector by hand"),
    "to_qlab": Metric("times", "lower", "call_ms over qlab's"),
    "max_error": Metric("", "none", "largest difference from the first in value and gradient"),
    **quantum_learning.METRICS,
}


def goals(s: dict[str, Any]) -> tuple[Claim, ...]:
    """Of the sizes that are measured."""
    peers = [arm for arm in quantum_states.CONTESTANTS if arm not in ("qlab", "raw")]

    def goal(text: str, arm: Any, name: str, relation: Any, target: float) -> Claim:
        return Claim(text, "goal", (arm, name), relation, target)

    found = []
    for n in s["states"]:
        found += [
            goal(f"{n} qubits: first call within 3 s", "qlab", f"s{n}/first_call_s", "<=", 3.0),
            goal(f"{n} qubits: 1.1 times the time by hand", "qlab", f"s{n}/to_raw", "<=", 1.1),
            *(goal(f"{n} qubits: faster than {p}", p, f"s{n}/to_qlab", ">=", 1.0) for p in peers),
        ]
    for n in (4, 6):
        if n in s["qubits"]:
            found += [
                goal(
                    f"noisy, {n} qubits: 10 times default.mixed",
                    "default.mixed",
                    f"n{n}/to_ptm",
                    ">=",
                    10.0,
                ),
                goal(f"noisy, {n} qubits: 200 times Aer", "aer", f"n{n}/to_ptm", ">=", 200.0),
            ]
    return (*found, *quantum_learning.goals(s))


FIGURES = (
    Figure("Value and gradient", "bars", "call_ms", ylabel="ms", logy=True),
    Figure("First call", "bars", "first_call_s", ylabel="s", logy=True),
)
TOLERANCE = 1e-8  # all compute in double precision
Gradient = Callable[[Any], tuple[Any, Any]]


def settings(quick: bool) -> dict[str, Any]:
    return {
        "x64": True,
        "qubits": (3,) if quick else (3, 4, 5, 6),
        "states": (8,) if quick else (8, 12, 16),
        "blocks": 2,
        "lam": 0.02,
        "repetitions": 7 if quick else 21,
        "budget_s": 6.0 if quick else 60.0,
        **quantum_learning.settings(quick),
    }


# ---- contestants: (number of qubits, blocks, lam) -> theta -> (value, gradient) -----------------


def ptm(n: int, blocks: int, lam: float) -> Gradient:
    obs = hamiltonians.tfim_ring(n)
    return jax.jit(
        jax.value_and_grad(
            lambda theta: ansatz.noisy_expval(theta, jnp.asarray(lam), jnp.asarray(lam), obs)
        )
    )


def default_mixed(n: int, blocks: int, lam: float) -> Gradient:
    qml = pennylane()

    h = jnp.asarray(pauli.to_dense(hamiltonians.tfim_ring(n)))
    one, two = (list(np.asarray(noise.depolarizing_kraus(jnp.asarray(lam), k))) for k in (1, 2))

    @qml.qnode(qml.device("default.mixed", wires=n), interface="jax", diff_method="backprop")
    def circuit(rotations):
        for layer in range(blocks + 1):
            for q in range(n):
                for axis in range(2):
                    qml.QubitUnitary(rotations[layer, axis, q], wires=q)
                    qml.QubitChannel(one, wires=q)
            for q in range(n - 1 if layer < blocks else 0):
                qml.CNOT(wires=(q, q + 1))
                qml.QubitChannel(two, wires=(q, q + 1))
        return qml.density_matrix(wires=range(n))

    def energy(theta):
        rotations = jnp.stack([_rotation(0, theta[:, 0]), _rotation(1, theta[:, 1])], 1)
        return jnp.einsum("ij,ji->", h, circuit(rotations)).real

    return jax.jit(jax.value_and_grad(energy))


def _rotation(axis: int, angle: jax.Array) -> jax.Array:
    """c[..., 2, 2]: RY (axis 0) or RZ (axis 1) of every angle."""
    generator = jnp.asarray([[[0, -1j], [1j, 0]], [[1, 0], [0, -1]]][axis])
    half = angle[..., None, None] / 2
    return jnp.cos(half) * jnp.eye(2) - 1j * jnp.sin(half) * generator


def density(n: int, blocks: int, lam: float) -> Gradient:
    """rho c[2^n, 2^n]; D(rho) = (1 - lam) rho + lam Tr_q rho (x) I / 2^k, twice for RY and RZ.

    Depolarizing commutes with rotations of its qubit, so the two become one with (1 - lam)^2.
    """
    h = jnp.asarray(pauli.to_dense(hamiltonians.tfim_ring(n)))
    keep = (1 - lam) ** 2
    index = np.arange(2**n)
    flips = [index ^ (((index >> (n - 1 - q)) & 1) << (n - 2 - q)) for q in range(n - 1)]

    def rotate(rho, angles):
        u = _rotation(1, angles[1]) @ _rotation(0, angles[0])
        maps = keep * jnp.einsum("qij,qlk->qiljk", u, u.conj())
        maps += (1 - keep) / 2 * jnp.einsum("il,jk->iljk", jnp.eye(2), jnp.eye(2))
        for q in range(n):
            legs = rho.reshape(2**q, 2, 2 ** (n - q - 1), 2**q, 2, 2 ** (n - q - 1))
            rho = jnp.einsum("iljk,ajbckd->aibcld", maps[q], legs).reshape(rho.shape)
        return rho

    def block(rho, angles):
        rho = rotate(rho, angles)
        for q in range(n - 1):
            rho = rho[flips[q]][:, flips[q]]  # CNOT permutes the basis
            legs = rho.reshape(2**q, 4, 2 ** (n - q - 2), 2**q, 4, 2 ** (n - q - 2))
            mixed = jnp.einsum("ajbcjd,il->aibcld", legs, jnp.eye(4) / 4)
            rho = ((1 - lam) * legs + lam * mixed).reshape(rho.shape)
        return rho, None

    def energy(theta):
        zero = jnp.zeros((2**n, 2**n), complex).at[0, 0].set(1.0)
        rho, _ = jax.lax.scan(block, zero, theta[:-1])
        return jnp.einsum("ij,ji->", h, rotate(rho, theta[-1])).real

    return jax.jit(jax.value_and_grad(energy))


def aer(n: int, blocks: int, lam: float) -> Gradient:
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector
    from qiskit.quantum_info import SparsePauliOp
    from qiskit_aer import AerSimulator
    from qiskit_aer.noise import NoiseModel, depolarizing_error

    model = NoiseModel(basis_gates=["ry", "rz", "cx"])
    model.add_all_qubit_quantum_error(depolarizing_error(lam, 1), ["ry", "rz"])
    model.add_all_qubit_quantum_error(depolarizing_error(lam, 2), ["cx"])
    obs = hamiltonians.tfim_ring(n)
    terms = [
        ("".join("IXYZ"[p] for p in string)[::-1], float(c))  # Qiskit writes qubit 0 last
        for c, string in zip(obs.coeffs, obs.paulis, strict=True)
    ]
    x = ParameterVector("x", (blocks + 1) * 2 * n)
    circuit = QuantumCircuit(n)
    for layer in range(blocks + 1):
        for q in range(n):
            circuit.ry(x[(layer * 2) * n + q], q)
            circuit.rz(x[(layer * 2 + 1) * n + q], q)
        for q in range(n - 1 if layer < blocks else 0):
            circuit.cx(q, q + 1)
    circuit.save_expectation_value(SparsePauliOp.from_list(terms), list(range(n)))
    simulator = AerSimulator(method="density_matrix", noise_model=model)

    def value_and_grad(theta):
        """One job of 1 + 2 P circuits: the value, and each angle shifted by +-pi/2."""
        flat = np.asarray(theta).ravel()
        shifts = np.concatenate([np.eye(len(flat)), -np.eye(len(flat))]) * np.pi / 2
        points = flat + np.concatenate([np.zeros((1, len(flat))), shifts])
        binds = {x[i]: list(points[:, i]) for i in range(len(flat))}
        result = simulator.run(circuit, parameter_binds=[binds], shots=1).result()
        e = np.array([result.data(i)["expectation_value"] for i in range(len(points))])
        plus, minus = np.split(e[1:], 2)
        return e[0], ((plus - minus) / 2).reshape(theta.shape)

    return value_and_grad


CONTESTANTS: dict[str, Callable[[int, int, float], Gradient]] = {
    "ptm": ptm,
    "default.mixed": default_mixed,
    "density": density,
    "aer": aer,
}
NEEDS = {"aer": "qiskit_aer", **quantum_states.NEEDS}


def why_not(arm: str) -> str:
    """ "" if a contestant can run here, else what is missing."""
    package = NEEDS.get(arm, "")
    if not package or importlib.util.find_spec(package):
        return ""
    return f"{package} is not installed (extra qlab[peers])"


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    tell("quantum: 2 qubits first, uncounted: what each does once in a process")
    noisy(2, s | {"repetitions": 1})
    numbers: list[Number] = []
    for n in s["qubits"]:
        tell(f"quantum: {n} qubits with noise")
        numbers += [x._replace(name=f"n{n}/{x.name}") for x in noisy(n, s)]
    if s["states"]:
        pure(2, s | {"repetitions": 1})
    for n in s["states"]:
        tell(f"quantum: {n} qubits without noise")
        numbers += [x._replace(name=f"s{n}/{x.name}") for x in pure(n, s)]
    return numbers + quantum_learning.measure(s, tell)


def noisy(n: int, s: dict[str, Any]) -> list[Number]:
    theta = jnp.asarray(np.random.default_rng(n).uniform(-np.pi, np.pi, (s["blocks"] + 1, 2, n)))
    makers = {arm: lambda m=m: m(n, s["blocks"], s["lam"]) for arm, m in CONTESTANTS.items()}
    numbers = contest(makers, theta, s)
    numbers.append(ratio(numbers, "ptm", "density", "call_ms", "to_density"))
    return numbers + [
        ratio(numbers, arm, "ptm", "call_ms", "to_ptm") for arm in CONTESTANTS if arm != "ptm"
    ]


def pure(n: int, s: dict[str, Any]) -> list[Number]:
    shape = (quantum_states.LAYERS + 1, 2, n)
    theta = jnp.asarray(np.random.default_rng(n).uniform(-np.pi, np.pi, shape))
    makers = {arm: lambda m=m: m(n) for arm, m in quantum_states.CONTESTANTS.items()}
    numbers = contest(makers, theta, s)
    numbers.append(ratio(numbers, "qlab", "raw", "call_ms", "to_raw"))
    return numbers + [
        ratio(numbers, arm, "qlab", "call_ms", "to_qlab") for arm in makers if arm != "qlab"
    ]


def contest(
    makers: Mapping[str, Callable[[], Gradient]], theta: jax.Array, s: dict[str, Any]
) -> list[Number]:
    """First calls one after another, then all that agree with the first of them in turn."""
    numbers, ready, truth = [], {}, None
    for arm, make in makers.items():
        if why := why_not(arm):
            numbers.append(Number(arm, "call_ms", status="absent", note=why))
            continue
        package = {
            "default.mixed": "pennylane",
            "default.qubit": "pennylane",
            "lightning": "pennylane",
        }
        importlib.import_module({**package, **NEEDS}.get(arm, "jax"))
        start = time.perf_counter()
        f = make()
        value, grad = jax.block_until_ready(f(theta))
        numbers.append(Number(arm, "first_call_s", (time.perf_counter() - start,)))
        got = np.append(np.asarray(grad).ravel(), float(value))
        truth = got if truth is None else truth
        error = float(np.abs(got - truth).max())
        numbers.append(Number(arm, "max_error", (error,)))
        if not error <= TOLERANCE:
            note = f"differs from {next(iter(makers))} by {error:.2g}"
            numbers.append(Number(arm, "call_ms", status="failed", note=note))
            continue
        ready[arm] = lambda f=f: {"call_ms": 1e3 * seconds_per_call(f, theta)}
    return numbers + interleave(ready, s["repetitions"], s["budget_s"])


def summary(numbers: list[Number]) -> str:
    """The largest size of each kind."""
    texts = []
    for kind, arms in (("n", CONTESTANTS), ("s", quantum_states.CONTESTANTS)):
        sizes = {
            int(n.name.split("/")[0][1:])
            for n in numbers
            if n.name[0] == kind and n.name[1].isdigit() and n.name.endswith("/call_ms")
        }
        if not sizes:
            continue
        task, parts = f"{kind}{max(sizes)}", []
        for arm in arms:
            call = find(numbers, arm, f"{task}/call_ms")
            first = find(numbers, arm, f"{task}/first_call_s")
            parts.append(
                f"{arm} {call.median:.3g} ms (first call {first.median:.2g} s)"
                if call.status == "ok"
                else f"{arm} {call.status}: {call.note}"
            )
        texts.append(f"{task[1:]} qubits{' with noise' * (kind == 'n')}: {', '.join(parts)}")
    kinds = ("zne", "latent", "grow", "label")
    learning = quantum_learning.summary([n for n in numbers if n.name.startswith(kinds)])
    return "; ".join([*texts, *[learning] * bool(learning)])
