"""A circuit that grows gate by gate, as CRLQAS sees it: actions, their left-packed place, and which are legal.

Actions: n(n-1) CNOTs, then 3n rotations; for c = 0..n-1, for off = 1..n-1: CNOT(c, (c + off) mod n); then for every qubit
RX, RY, RZ. Number A = n(n+2) is "no gate". A gate goes to the first moment at which its qubits are free, so what
the agent sees, grid[m, row, column], is depth and not the order of insertion: grid[m, t, c] = 1 is CNOT(c, t), grid[m,
n + axis, q] = 1 a rotation. Angles are not shown.
Everything here is about one circuit of at most D gates, jittable; vmap it for many.
Letters: D = most gates, n = qubits, A = n(n+2) actions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum.circuit_spec import CNOT, RX, CircuitSpec


class Placed(NamedTuple):
    """A circuit under construction.

    Attributes:
      grid: i8[D, n+3, n]. action: i32[D] in order of insertion, A where there is none yet.
      moment: i32[D], where each went. free: i32[n], first free moment of each qubit.
      last: i32[n], the last action that touched each qubit, A for none. count: i32[], gates so far.
    """

    grid: jax.Array
    action: jax.Array
    moment: jax.Array
    free: jax.Array
    last: jax.Array
    count: jax.Array

    @property
    def depth(self) -> jax.Array:
        return self.free.max(-1)


class Actions(NamedTuple):
    """gate, q0, q1: i32[A+1], as in a CircuitSpec (q1 = q0 for rotations); the last one is empty."""

    gate: np.ndarray
    q0: np.ndarray
    q1: np.ndarray


@functools.cache
def actions(num_qubits: int) -> Actions:
    """All actions on n qubits, in order.

    >>> [x.tolist() for x in actions(2)]
    [[8, 8, 5, 6, 7, 5, 6, 7, 0], [0, 1, 0, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1, 1, 1, 0]]
    """
    n = num_qubits
    if n < 1:
        raise UserError(f"num_qubits={n}; a circuit has at least one")
    rows = [(CNOT, c, (c + off) % n) for c in range(n) for off in range(1, n)]
    rows += [(RX + axis, q, q) for q in range(n) for axis in range(3)]
    return Actions(*np.array([*rows, (0, 0, 0)], np.int32).T.copy())


def num_actions(num_qubits: int) -> int:
    """A = n (n + 2)."""
    return num_qubits * (num_qubits + 2)


def empty(max_gates: int, num_qubits: int) -> Placed:
    """No gate yet."""
    d, n = max_gates, num_qubits
    if d < 1:
        raise UserError(f"max_gates={d}; an episode places at least one gate")
    a = num_actions(n)
    return Placed(
        jnp.zeros((d, n + 3, n), jnp.int8),
        jnp.full(d, a, jnp.int32),
        jnp.zeros(d, jnp.int32),
        jnp.zeros(n, jnp.int32),
        jnp.full(n, a, jnp.int32),
        jnp.int32(0),
    )


def place(circuit: Placed, action: jax.Array) -> Placed:
    """The circuit with one more gate. A full circuit, and the action A, change nothing.

    >>> c = place(place(empty(3, 2), 3), 0)  # RY on qubit 0, then CNOT(0, 1)
    >>> c.moment.tolist(), int(c.depth), c.grid[1, 1].tolist()
    ([0, 1, 0], 2, [1, 0])
    """
    d, _, n = circuit.grid.shape
    action = jnp.asarray(action, jnp.int32)
    gate, c, t = (jnp.asarray(x)[action] for x in actions(n))
    works = (gate > 0) & (circuit.count < d)
    m = jnp.maximum(circuit.free[c], circuit.free[t])
    row = jnp.where(gate == CNOT, t, n + gate - RX)
    touched = works & ((jnp.arange(n) == c) | (jnp.arange(n) == t))
    slot = jnp.where(works, circuit.count, d)  # beyond the end: dropped
    return Placed(
        circuit.grid.at[jnp.where(works, m, d), row, c].set(1, mode="drop"),
        circuit.action.at[slot].set(action, mode="drop"),
        circuit.moment.at[slot].set(m, mode="drop"),
        jnp.where(touched, m + 1, circuit.free),
        jnp.where(touched, action, circuit.last),
        circuit.count + works,
    )


def legal_mask(circuit: Placed) -> jax.Array:
    """bool[A]: all but a direct repetition of the last gate on the same qubits.

    A rotation is illegal where the last gate on its qubit is that rotation; a CNOT where the last gate on both of
    its qubits is that very CNOT. At most n of n(n+2) actions are illegal.
    """
    n = circuit.last.shape[-1]
    table = actions(n)
    every = jnp.arange(num_actions(n))
    before = circuit.last[jnp.asarray(table.q0[:-1])], circuit.last[jnp.asarray(table.q1[:-1])]
    return (before[0] != every) | (before[1] != every)


def sequence(circuit: Placed) -> CircuitSpec:
    """Its gates in order of insertion, angles zero: the same map as `to_circuit_spec`, without sorting."""
    n = circuit.last.shape[-1]
    gate, q0, q1 = (jnp.asarray(x)[circuit.action] for x in actions(n))
    return CircuitSpec(gate, q0, q1, jnp.zeros((*gate.shape, 3)))


def angle_order(circuit: Placed) -> jax.Array:
    """i32[D]: place of each rotation in the order (moment, axis, qubit); -1 for other slots."""
    n = circuit.last.shape[-1]
    gate, q0, _ = (jnp.asarray(x)[circuit.action] for x in actions(n))
    turns = (gate >= RX) & (gate < CNOT)
    return jnp.where(turns, (circuit.moment * 3 + gate - RX) * n + q0, -1)


def to_circuit_spec(circuit: Placed, angles: jax.Array | None = None) -> CircuitSpec:
    """The circuit as data in order of moments, within a moment CNOTs before rotations; empty slots last.

    Args:
      angles: f[D] in order of insertion; None: zeros.
    """
    d = circuit.action.shape[-1]
    spec = sequence(circuit)
    angles = jnp.zeros(d) if angles is None else jnp.asarray(angles)
    key = (circuit.moment * 2 + (spec.gate != CNOT)) * (d + 1) + jnp.arange(d)
    order = jnp.argsort(jnp.where(spec.gate > 0, key, 2 * (d + 1) * (d + 1)))
    full = jnp.zeros((d, 3), angles.dtype).at[:, 0].set(angles)
    return CircuitSpec(spec.gate[order], spec.q0[order], spec.q1[order], full[order])
