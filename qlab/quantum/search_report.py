"""Results of architecture search, one dictionary a task, for the search and for the circuits it is compared with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Metric
from qlab.quantum import placement as pm
from qlab.quantum.architecture_env import EnvState, Found, Records, Task
from qlab.quantum.circuit_spec import CircuitSpec, drawing_rows, pennylane_state
from qlab.quantum.pauli import ground_energy, to_dense
from qlab.quantum.reference_circuits import Scored, shortest_good

METRICS = {
    "min_error": Metric("Ha", "lower", "least noiseless error of any circuit on the way"),
    "lowest_error": Metric("Ha", "lower", "noiseless error of the circuit with the lowest energy the search saw"),
    "search_energy": Metric("Ha", "lower", "that energy, with noise and shots where the task has them"),
    "gates": Metric("", "lower", "of the shortest circuit within 1.6 mHa (one more than allowed: none)"),
    "depth": Metric("", "lower", "of that circuit"),
    "cnots": Metric("", "lower", "of that circuit"),
    "first_success": Metric("", "lower", "number of the first episode that came within 1.6 mHa"),
    "success_rate": Metric("%", "higher", "of the last episodes, within 1.6 mHa at any step"),
    "solved_at": Metric("", "lower", "gates at which these came within 1.6 mHa, mean (one more than allowed: none did)"),
    "length": Metric("", "none", "gates of an episode, mean of the last ones"),
    "energies": Metric("", "lower", "energies measured, by the inner optimiser and one a gate"),
    "circuits": Metric("", "lower", "circuits whose angles were optimised"),
    "pennylane_gap": Metric("Ha", "lower", "our error of the lowest circuit against PennyLane's"),
}  # fmt: skip


def found_circuit(found: Found, task: Task) -> CircuitSpec:
    """The recorded circuit as data, angles included."""
    empty = pm.empty(task.max_gates, task.observable.num_qubits)
    circuit = functools.reduce(jax.jit(pm.place), np.asarray(found.action), empty)
    return jax.jit(pm.to_circuit_spec)(circuit, jnp.asarray(found.angles))


def pennylane_gap(task: Task, spec: CircuitSpec, error: float) -> float:
    """How far PennyLane's default.qubit is from our noiseless error of the same circuit."""
    psi = pennylane_state(spec, task.observable.num_qubits)
    e = np.vdot(psi, to_dense(task.observable) @ psi).real
    return float(abs(abs(e - ground_energy(task.observable)) - error))


def unfinished(records: Records, upto: jax.Array) -> jax.Array:
    """bool[]: some episode numbered below `upto` has not ended."""
    return ((records.solved < 0) & (jnp.arange(records.solved.size) < upto)).any()


def round_metrics(state: EnvState, first: jax.Array, count: int) -> dict[str, jax.Array]:
    """Scalars of the `count` episodes from number `first`, and where threshold and errors stand."""
    r, number = state.records, jnp.arange(state.records.solved.size)
    mine = (number >= first) & (number < first + count)
    return {
        "success": (mine & (r.solved > 0)).sum() / count,
        "length": (mine * r.length).sum() / count,
        "threshold": state.switches.threshold.xi,
        "error": r.least_error,
        "lowest_error": r.lowest.error,
    }


def search_results(records: Records, task: Task, last: int) -> dict[str, Any]:
    """Of a finished search; success is over its last `last` episodes.

    first_success is the number of the first successful episode, counted from 1 (episodes + 1: none); gates, depth and
    cnots those of the shortest circuit within chemical accuracy (all max_gates + 1: none). circuit: f64[G, 6], that one
    as a page draws it, or the one with the lowest energy where there is none.
    """
    r = jax.tree.map(np.asarray, records)
    solved = r.solved > 0
    last = min(last, solved.size)
    at = r.solved[-last:][solved[-last:]]
    low = found_circuit(r.lowest, task)
    best = found_circuit(r.shortest, task) if r.shortest.gates <= task.max_gates else low
    return {
        "min_error": r.least_error,
        "lowest_error": r.lowest.error,
        "search_energy": r.lowest.energy,
        "gates": r.shortest.gates,
        "depth": r.shortest.depth,
        "cnots": r.shortest.cnots,
        "first_success": int(solved.argmax()) + 1 if solved.any() else solved.size + 1,
        "success_rate": 100 * solved[-last:].mean(),
        "solved_at": at.mean() if at.size else task.max_gates + 1,
        "length": r.length[-last:].mean(),
        "energies": r.energies,
        "circuits": r.length.sum(),
        "circuit": drawing_rows(best),
        "pennylane_gap": pennylane_gap(task, low, float(r.lowest.error)),
    }


def reference_results(task: Task, found: tuple[Scored, ...]) -> dict[str, Any]:
    """Of the circuits of `reference_circuits`: the same numbers, as far as they apply."""
    low, short = min(found, key=lambda s: s.energy), shortest_good(found)
    none = (max(s.gates for s in found) + 1,) * 3
    gates, depth, cnots = (short.gates, short.depth, short.cnots) if short else none
    return {
        "min_error": min(s.error for s in found),
        "lowest_error": low.error,
        "search_energy": low.energy,
        "gates": gates,
        "depth": depth,
        "cnots": cnots,
        "circuits": sum(s.circuits for s in found),
        "num_gates": np.array([s.gates for s in found]),
        "error_by_gates": np.array([s.error for s in found]),
        "circuit": drawing_rows((short or low).spec),
        "pennylane_gap": pennylane_gap(task, low.spec, low.error),
    }
