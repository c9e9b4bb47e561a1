"""What architecture search has to beat: every short circuit, a hardware-efficient ansatz, unitary coupled cluster.

All on CRLQAS's gates (RX, RY, RZ, CNOT) and under the same noise; every one gets several starts, the search one warm start.
Letters: n = qubits, D = gates, C = circuits, R = starts.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum import placement as pm
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.architecture_env import CHEMICAL_ACCURACY, Task
from qlab.quantum.circuit_spec import CNOT, CircuitSpec, Op, circuit_spec
from qlab.quantum.hamiltonians import fix_qubits, parity_encoding
from qlab.quantum.noise_model import NoiseModel
from qlab.quantum.pauli import PauliSum, from_dense, ground_energy, to_coords
from qlab.quantum.vqe import minimise


class Scored(NamedTuple):
    """A circuit at its best angles: energy under the task's noise, noiseless error, gates, depth, cnots, and the
    number of circuits that were optimised to find it."""

    spec: CircuitSpec
    energy: float
    error: float
    gates: int
    depth: int
    cnots: int
    circuits: int = 1


def depth_of(spec: CircuitSpec) -> int:
    """Moments of one circuit, gates packed to the left.

    >>> depth_of(circuit_spec([("RX", [0]), ("RX", [1]), ("CNOT", [0, 1])]))
    2
    """
    free: dict[int, int] = {}
    for gate, a, b in zip(*(np.asarray(x).tolist() for x in spec[:3]), strict=True):
        if gate:
            free[a] = free[b] = max(free.get(a, 0), free.get(b, 0)) + 1
    return max([0, *free.values()])


class _Energies(NamedTuple):
    """Tables and observables of a task, with its noise and without."""

    noisy: pc.NoiseTables
    clean: pc.NoiseTables
    h: jax.Array
    h_clean: jax.Array
    e_true: float

    @classmethod
    def of(cls, task: Task) -> _Energies:
        n = task.observable.num_qubits
        noisy, clean = pc.noise_tables(task.noise, n), pc.noise_tables(NoiseModel(), n)
        h = to_coords(task.observable)
        seen, bare = (pc.effective_observable(h, t) for t in (noisy, clean))
        return cls(noisy, clean, seen, bare, ground_energy(task.observable))

    def optimise(self, specs: CircuitSpec, starts: np.ndarray, sweeps: int, block: int):
        """Best energies f[C] and angles f[C, D] over starts f[R, D], by Rotosolve; specs with leading axis C.

        One program whatever C is: `block` circuits a call, the last call filled up with the first circuit.
        """
        count = len(specs.gate)
        found = []
        for first in range(0, count, block):
            at = np.arange(first, first + block)
            some = jax.tree.map(lambda x, at=at: x[np.where(at < count, at, 0)], specs)
            found.append(_optimise_block(self.noisy, self.h, some, starts, sweeps))
        e, angles = (np.concatenate(x)[:count] for x in zip(*found, strict=True))
        return e, angles

    def score(self, spec: CircuitSpec, circuits: int = 1) -> Scored:
        e, bare = _two_energies(self, spec)
        gate = np.asarray(spec.gate)
        sizes = int((gate > 0).sum()), depth_of(spec), int((gate == CNOT).sum())
        return Scored(spec, float(e), abs(float(bare) - self.e_true), *sizes, circuits)


@jax.jit
def _two_energies(task: _Energies, spec: CircuitSpec) -> tuple[jax.Array, jax.Array]:
    """f[], f[]: with the noise and without."""
    angles, n = jnp.asarray(spec.angle)[:, 0], task.noisy.readout.shape[0]
    e = pc.energy(pc.wiring(spec, task.noisy, n), angles, task.h)
    return e, pc.energy(pc.wiring(spec, task.clean, n), angles, task.h_clean)


@functools.partial(jax.jit, static_argnames="sweeps")
def _optimise_block(
    tables: pc.NoiseTables, h: jax.Array, specs: CircuitSpec, starts: jax.Array, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    def one(spec: CircuitSpec):
        wires = pc.wiring(spec, tables, tables.readout.shape[0])

        def run(angles):
            angles = jax.lax.fori_loop(0, sweeps, lambda i, x: pc.descend(wires, x, h), angles)
            return pc.energy(wires, angles, h), angles

        e, x = jax.vmap(run)(starts)
        return e.min(), x[e.argmin()]

    return jax.vmap(one)(specs)


def every_circuit(num_gates: int, num_qubits: int) -> np.ndarray:
    """i32[C, D]: one action sequence for each distinct circuit of exactly D legal gates.

    Sequences that differ in the order of gates on different qubits only are one circuit: the kept one is sorted
    wherever two neighbours commute by acting on different qubits.
    """
    table, a = pm.actions(num_qubits), pm.num_actions(num_qubits)
    touches = np.stack([1 << q for q in (table.q0[:-1], table.q1[:-1])])
    touches = touches[0] | touches[1]
    rows = np.arange(a, dtype=np.int32)[:, None]
    for _ in range(num_gates - 1):
        if len(rows) * a > 4_000_000:
            raise UserError(
                f"exhaustive search over {num_gates} gates on {num_qubits} qubits: too many"
            )
        left, right = np.repeat(rows, a, 0), np.tile(np.arange(a, dtype=np.int32), len(rows))
        rows = np.concatenate([left, right[:, None]], 1)
        before = rows[:, -2]
        sorted_ = (touches[before] & touches[right] != 0) | (before < right)
        rows = rows[sorted_ & _legal(rows, table, num_qubits)]
    return rows


def _legal(rows: np.ndarray, table: pm.Actions, n: int) -> np.ndarray:
    """bool[C]: the last action of each row was legal after the others."""
    last = np.full((len(rows), n), -1)
    at = np.arange(len(rows))
    for a in rows[:, :-1].T:
        last[at, table.q0[a]] = last[at, table.q1[a]] = a
    new = rows[:, -1]
    return (last[at, table.q0[new]] != new) | (last[at, table.q1[new]] != new)


def exhaustive(
    task: Task, max_gates: int, num_starts: int = 2, sweeps: int = 12
) -> tuple[Scored, ...]:
    """The lowest energy of every number of gates from 1 to max_gates. Starts: zeros, then random ones."""
    energies, n, found = _Energies.of(task), task.observable.num_qubits, []
    rng = np.random.default_rng(0)
    table = pm.actions(n)
    starts = rng.uniform(0, 2 * np.pi, (num_starts, max_gates))
    starts[0] = 0.0
    for gates in range(1, max_gates + 1):
        rows = every_circuit(gates, n)
        padded = np.full((len(rows), max_gates), pm.num_actions(n))  # "no gate" behind the others
        padded[:, :gates] = rows
        zeros = np.zeros((*padded.shape, 3))
        specs = CircuitSpec(table.gate[padded], table.q0[padded], table.q1[padded], zeros)
        e, angles = energies.optimise(specs, starts, sweeps, 256)
        best = int(e.argmin())
        spec = jax.tree.map(lambda x, b=best: x[b], specs)
        spec.angle[:, 0] = angles[best]
        found.append(energies.score(spec, len(rows)))
    return tuple(found)


def hea_ops(num_qubits: int, layers: int) -> list[Op]:
    """RY on every qubit, then `layers` times a chain of CNOTs and RY on every qubit."""
    turns: list[Op] = [("RY", [q]) for q in range(num_qubits)]
    chain: list[Op] = [("CNOT", [q, q + 1]) for q in range(num_qubits - 1)]
    return turns + (chain + turns) * layers


def hardware_efficient(
    task: Task, max_layers: int = 3, num_starts: int = 16, sweeps: int = 200
) -> tuple[Scored, ...]:
    """The ansatz with 0..max_layers entangling layers, best of random starts."""
    energies, n, found = _Energies.of(task), task.observable.num_qubits, []
    slots = len(hea_ops(n, max_layers))
    starts = np.random.default_rng(0).uniform(0, 2 * np.pi, (num_starts, slots))
    for layers in range(max_layers + 1):
        spec = circuit_spec(hea_ops(n, layers), slots)
        one = jax.tree.map(lambda x: x[None], spec)
        _, angles = energies.optimise(one, starts, sweeps, 1)
        full = np.zeros((slots, 3))
        full[:, 0] = angles[0]
        found.append(energies.score(spec._replace(angle=full)))
    return tuple(found)


def shortest_good(scored: tuple[Scored, ...]) -> Scored | None:
    """Fewest gates with a noiseless error below chemical accuracy; None where none has it."""
    good = [s for s in scored if s.error < CHEMICAL_ACCURACY]
    return min(good, key=lambda s: (s.gates, s.error)) if good else None


# ---- Unitary coupled cluster for H2 -------------------------------------------------------------


def _excitation(create: tuple[int, ...], remove: tuple[int, ...]) -> PauliSum:
    """i (T - T^dagger), T = a+_create ... a_remove, on four qubits (Jordan-Wigner)."""
    lower = np.array([[0, 1], [0, 0]])
    ops = []
    for q in range(4):
        a = np.ones((1, 1))
        for k in range(4):
            a = np.kron(a, np.diag([1, -1]) if k < q else lower if k == q else np.eye(2))
        ops.append(a)
    t = np.eye(16)
    for q in create:
        t = t @ ops[q].T
    for q in remove:
        t = t @ ops[q]
    return from_dense(1j * (t - t.T))


def _encoded(obs: PauliSum, num_qubits: int) -> PauliSum:
    """From Jordan-Wigner to the encoding of h2_4q, h2_3q or h2_2q."""
    if num_qubits == 4:
        return obs
    out = fix_qubits(parity_encoding(obs), {3: 0} if num_qubits == 3 else {1: 1, 3: 0})
    if num_qubits == 3:
        return out
    flips = np.isin(out.paulis[:, 1], (2, 3))  # the second bit is complemented, as in h2_2q
    return PauliSum(np.where(flips, -out.coeffs, out.coeffs), out.paulis)


HARTREE_FOCK = {2: (1, 1), 3: (1, 1, 0), 4: (1, 0, 1, 0)}


def uccsd_h2(num_qubits: int) -> tuple[list[Op], np.ndarray, np.ndarray]:
    """First-order Trotter UCCSD for H2: two single excitations and the double one.

    Returns:
      ops without angles, and offset f[G], weight f[G, 3] of the angles offset + weight @ theta, theta f[3]. Each Pauli
      string is turned to Z (RY or RX of a quarter), gathered by a ladder of CNOTs, rotated by RZ, undone.
    """
    if num_qubits not in HARTREE_FOCK:
        raise UserError(f"UCCSD of H2 on {num_qubits} qubits; the encodings have 2, 3 or 4")
    ops: list[Op] = []
    offset: list[float] = []
    weight: list[list[float]] = []

    def add(name: str, wires: list[int], angle: float = 0.0, by: tuple[int, float] | None = None):
        ops.append((name, wires))
        offset.append(angle)
        weight.append([by[1] if by and by[0] == k else 0.0 for k in range(3)])

    for q, bit in enumerate(HARTREE_FOCK[num_qubits]):
        if bit:
            add("RX", [q], np.pi)
    for k, (create, remove) in enumerate((((1,), (0,)), ((3,), (2,)), ((1, 3), (2, 0)))):
        generator = _encoded(_excitation(create, remove), num_qubits)
        for coeff, string in zip(generator.coeffs, generator.paulis, strict=True):
            live = np.flatnonzero(string).tolist()
            turns = {1: ("RY", -np.pi / 2), 2: ("RX", np.pi / 2)}  # X, Y -> Z
            basis = [
                (turns[p][0], [q], turns[p][1]) for q in live if (p := int(string[q])) in turns
            ]
            ladder = [[a, b] for a, b in itertools.pairwise(live)]
            for name, wires, angle in basis:
                add(name, wires, angle)
            for wires in ladder:
                add("CNOT", wires)
            add("RZ", [live[-1]], by=(k, 2.0 * float(coeff)))  # exp(-i theta coeff P)
            for wires in ladder[::-1]:
                add("CNOT", wires)
            for name, wires, angle in basis:
                add(name, wires, -angle)
    return ops, np.array(offset), np.array(weight)


def coupled_cluster(task: Task, steps: int = 300, learning_rate: float = 0.05) -> Scored:
    """UCCSD of H2 at its best three angles, from zero (Hartree-Fock)."""
    energies = _Energies.of(task)
    n = task.observable.num_qubits
    ops, offset, weight = uccsd_h2(n)
    spec = circuit_spec(ops)
    wires = pc.wiring(spec, energies.noisy, n)

    def energy(theta: Any) -> jax.Array:
        return pc.energy(wires, jnp.asarray(offset) + jnp.asarray(weight) @ theta, energies.h)

    run = jax.jit(lambda x: minimise(energy, x, steps=steps, learning_rate=learning_rate)[0])
    theta = np.asarray(run(jnp.zeros(3)))
    full = np.zeros((spec.num_slots, 3))
    full[:, 0] = offset + weight @ theta
    return energies.score(spec._replace(angle=full))
