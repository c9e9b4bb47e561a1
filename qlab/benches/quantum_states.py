"""The noiseless part of the quantum bench: value and gradient of an ansatz on a state vector.

Four layers of RY, RZ on every qubit and a chain of CNOTs, RY and RZ once more at the end; 20 Pauli strings; double
precision. theta f[5, 2, n]. Contestants: (n) -> theta -> (value, gradient)
    qlab           columns of gates and strings without a matrix: qlab.quantum.columns, matrix_free
    raw            a state vector by hand in plain JAX, gate after gate: the bound
    default.qubit  PennyLane with JAX backpropagation, rotations as QubitUnitary (compiles fastest)
    lightning      PennyLane's lightning.qubit with adjoint differentiation
    tensorcircuit  TensorCircuit-NG with its JAX backend
    qujax          a circuit of named gates
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.quantum import columns as col
from qlab.quantum import matrix_free
from qlab.quantum.pauli import PauliSum
from qlab.quantum.qml import pennylane

LAYERS, TERMS = 4, 20
Gradient = Callable[[Any], tuple[Any, Any]]


def observable(n: int) -> PauliSum:
    """20 strings on neighbouring pairs: as they stand in spin chains and small molecules."""
    rng = np.random.default_rng(n)
    paulis = np.zeros((TERMS, n), np.uint8)
    for row in paulis:
        at = rng.integers(0, n - 1)
        row[at : at + 2] = rng.integers(0, 4, 2)
        row[at] = max(row[at], 1)
    return PauliSum(rng.uniform(-1, 1, TERMS), paulis)


def chain(n: int) -> tuple[tuple[int, int], ...]:
    return tuple((q, q + 1) for q in range(n - 1))


def _matrices(theta: jax.Array) -> jax.Array:
    """c[5, n, 2, 2]: RZ RY of every qubit and layer."""
    c, s = jnp.cos(theta[:, 0] / 2), jnp.sin(theta[:, 0] / 2)
    up, down = jnp.exp(-0.5j * theta[:, 1]), jnp.exp(0.5j * theta[:, 1])
    rows = [jnp.stack([c * up, -s * up], -1), jnp.stack([s * down, c * down], -1)]
    return jnp.stack(rows, -2)


def qlab(n: int) -> Gradient:
    layer = (col.local("ry", n), col.local("rz", n))
    columns = (*layer, col.Column("cx", chain(n))) * LAYERS + layer
    obs = observable(n)

    def energy(theta):
        return matrix_free.expval(obs, col.state(columns, n, theta.reshape(-1)))

    return jax.jit(jax.value_and_grad(energy))


def raw(n: int) -> Gradient:
    """Gates on one axis of the state at a time, layers scanned, strings by reversed axes and signs."""
    obs, index = observable(n), np.arange(2**n)
    order = index
    for control, target in reversed(chain(n)):
        order = order ^ (((order >> (n - 1 - control)) & 1) << (n - 1 - target))
    order, back = jnp.asarray(order), jnp.asarray(np.argsort(order))

    @jax.custom_vjp
    def entangle(psi):
        return psi[order]

    entangle.defvjp(lambda psi: (psi[order], None), lambda _, g: (g[back],))

    def rotate(psi, angles):
        for q in range(n):
            psi = jnp.einsum("ab,ibj->iaj", angles[q], psi.reshape(2**q, 2, -1))
        return psi.reshape(-1)

    bit = 1 << np.arange(n - 1, -1, -1)
    flip, sign = (((obs.paulis == a) | (obs.paulis == 2)) @ bit for a in (1, 3))
    coeff = jnp.asarray(obs.coeffs * 1j ** (obs.paulis == 2).sum(1))
    terms = tuple(jnp.asarray(a, jnp.uint32) for a in (flip, sign))

    def expval(psi):
        """The gradient of <psi|H|psi> is 2 H psi: nothing is differentiated through the gathers."""

        def add(total, term):
            c, x, z = term
            source = jnp.asarray(index, jnp.uint32) ^ x
            odd = jax.lax.population_count(source & z) & 1
            return total + jnp.where(odd == 1, -c, c) * psi[source], None

        h_psi, _ = jax.lax.scan(add, jnp.zeros_like(psi), (coeff, *terms))
        h_psi = jax.lax.stop_gradient(h_psi)
        value = jnp.vdot(jax.lax.stop_gradient(psi), h_psi).real
        return 2 * jnp.vdot(h_psi, psi).real - value

    def energy(theta):
        psi = jnp.zeros(2**n, complex).at[0].set(1.0)
        body = lambda psi, angles: (entangle(rotate(psi, angles)), None)  # noqa: E731
        gates = _matrices(theta)
        psi, _ = jax.lax.scan(body, psi, gates[:-1])
        return expval(rotate(psi, gates[-1]))

    return jax.jit(jax.value_and_grad(energy))


def _pennylane_observable(qml: Any, obs: PauliSum) -> Any:
    letters = (qml.Identity, qml.X, qml.Y, qml.Z)
    words = [qml.prod(*(letters[p](q) for q, p in enumerate(string) if p)) for string in obs.paulis]
    return qml.dot([float(c) for c in obs.coeffs], words)


def _queue(qml: Any, n: int, rotate: Callable[[int, int], Any]) -> None:
    """Queues the ansatz; rotate: (layer, qubit) -> queues its rotations."""
    for layer in range(LAYERS + 1):
        for q in range(n):
            rotate(layer, q)
        for pair in chain(n) if layer < LAYERS else ():
            qml.CNOT(wires=pair)


def default_qubit(n: int) -> Gradient:
    qml = pennylane()
    h = _pennylane_observable(qml, observable(n))

    @qml.qnode(qml.device("default.qubit", wires=n), interface="jax", diff_method="backprop")
    def circuit(gates):
        _queue(qml, n, lambda layer, q: qml.QubitUnitary(gates[layer, q], wires=q))
        return qml.expval(h)

    def energy(theta):
        c, s = jnp.cos(theta[:, 0] / 2), jnp.sin(theta[:, 0] / 2)
        up, down = jnp.exp(-0.5j * theta[:, 1]), jnp.exp(0.5j * theta[:, 1])
        rows = jnp.stack(
            [jnp.stack([c * up, -s * up], -1), jnp.stack([s * down, c * down], -1)], -2
        )
        return circuit(rows)

    return jax.jit(jax.value_and_grad(energy))


def lightning(n: int) -> Gradient:
    qml = pennylane()
    h = _pennylane_observable(qml, observable(n))

    @qml.qnode(qml.device("lightning.qubit", wires=n), interface="jax", diff_method="adjoint")
    def circuit(theta):
        def rotate(layer, q):
            qml.RY(theta[layer, 0, q], wires=q)
            qml.RZ(theta[layer, 1, q], wires=q)

        _queue(qml, n, rotate)
        return qml.expval(h)

    return jax.jit(jax.value_and_grad(circuit))


def tensorcircuit(n: int) -> Gradient:
    import tensorcircuit as tc

    tc.set_backend("jax")
    tc.set_dtype("complex128")
    obs = observable(n)

    def rotated(psi, angles):
        c = tc.Circuit(n, inputs=psi)
        for q in range(n):
            c.ry(q, theta=angles[0, q])
            c.rz(q, theta=angles[1, q])
        return c

    def layer(psi, angles):
        c = rotated(psi, angles)
        for pair in chain(n):
            c.cnot(*pair)
        return c.state(), None

    def energy(theta):
        psi = jnp.zeros(2**n, complex).at[0].set(1.0)
        psi, _ = jax.lax.scan(layer, psi, theta[:-1])  # compiles in a twentieth of the time
        c, total = rotated(psi, theta[-1]), 0.0
        for coeff, string in zip(obs.coeffs, obs.paulis, strict=True):
            where = {
                w: [q for q, p in enumerate(string) if p == i] for i, w in enumerate("_xyz") if i
            }
            total = total + coeff * tc.backend.real(c.expectation_ps(**where))
        return total

    return jax.jit(jax.value_and_grad(energy))


def qujax(n: int) -> Gradient:
    import qujax as qj

    gates, wires, places = [], [], []
    at = lambda layer, axis, q: (layer * 2 + axis) * n + q  # noqa: E731
    for layer in range(LAYERS + 1):
        for q in range(n):
            gates += ["Ry", "Rz"]
            wires += [[q], [q]]
            places += [[at(layer, 0, q)], [at(layer, 1, q)]]
        for pair in chain(n) if layer < LAYERS else ():
            gates.append("CX")
            wires.append(list(pair))
            places.append([])
    to_state = qj.get_params_to_statetensor_func(gates, wires, places, n)
    obs = observable(n)
    names = [["IXYZ"[p] for p in string if p] for string in obs.paulis]
    where = [[q for q, p in enumerate(string) if p] for string in obs.paulis]
    to_value = qj.get_statetensor_to_expectation_func(names, where, list(map(float, obs.coeffs)))

    def energy(theta):
        return to_value(to_state(theta.reshape(-1) / jnp.pi)).real  # in half turns

    return jax.jit(jax.value_and_grad(energy))


CONTESTANTS: dict[str, Callable[[int], Gradient]] = {
    "qlab": qlab,
    "raw": raw,
    "default.qubit": default_qubit,
    "lightning": lightning,
    "tensorcircuit": tensorcircuit,
    "qujax": qujax,
}
NEEDS = {"tensorcircuit": "tensorcircuit", "qujax": "qujax"}
