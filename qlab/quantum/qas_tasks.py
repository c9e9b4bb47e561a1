"""What a circuit is worth: the score its angles reach in a short Adagrad run, for thousands of circuits at once.

Every task is an observable M: fidelity to a state t has M = |t><t| and is maximised; the energy tasks minimise
<H> and score <H> / E0. So one compiled program labels a pool for every task. Scores lie in [0, 1].
    fidelity  |<t|psi>|^2 for the state t of a circuit drawn like the pool's, but not in it
    maxcut    H = 1/2 sum over edges (Z Z - 1): -<H> is the expected cut; E0 = minus the largest cut
    tfim      H = sum Z Z + sum X on a ring
    h2        H2 in STO-3G at 1.3228 bohr, Jordan-Wigner on four qubits (Hartree-Fock alone scores .983)
The paper's source scores MaxCut by sums over nodes with other normalisers; <H> / E0 is used here.
Letters: P = circuits, G = slots, n = qubits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.errors import UserError, nearest
from qlab.quantum import circuit_spec as cs
from qlab.quantum import hamiltonians as ham
from qlab.quantum import pauli
from qlab.quantum.circuit_spec import CircuitSpec
from qlab.quantum.qas_pool import PoolSpec, sample_circuits

TASKS = ("fidelity", "maxcut", "tfim", "h2")
H2_BOHR = 1.3228  # the distance of the H2 task
STOP = 1e-6  # an angle run ends at a smaller change of the objective
# 8 nodes, 15 edges, largest cut 12: the paper's size and cut; its edges are not printed
_GRAPH8 = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (0, 7),
           (0, 3), (1, 4), (2, 5), (3, 6), (0, 2), (3, 5), (1, 7))  # fmt: skip


class Objective(NamedTuple):
    """score = clip(<M> / best, 0, 1); the angles go up or down the slope of <M>: sign = +1 or -1.

    matrix: c64[2^n, 2^n], Hermitian. best: <M> of a perfect circuit. steps: Adagrad steps.
    """

    matrix: np.ndarray
    best: float
    sign: float
    steps: int


def maxcut_edges(num_qubits: int) -> tuple[tuple[int, int], ...]:
    """The ring, but for 8 qubits a graph of 15 edges with a largest cut of 12."""
    if num_qubits == 8:
        return _GRAPH8
    ring = [(q, (q + 1) % num_qubits) for q in range(num_qubits)]
    return tuple(sorted({(min(e), max(e)) for e in ring if e[0] != e[1]}))


def maxcut(num_qubits: int) -> pauli.PauliSum:
    """H = 1/2 sum (Z_i Z_j - 1)."""
    edges = maxcut_edges(num_qubits)
    terms = {"I" * num_qubits: -len(edges) / 2}
    for edge in edges:
        terms["".join("Z" if q in edge else "I" for q in range(num_qubits))] = 0.5
    return pauli.pauli_sum(terms)


def _energy(obs: pauli.PauliSum, steps: int) -> Objective:
    matrix = pauli.to_dense(obs)
    best = float(np.linalg.eigvalsh(matrix)[0])
    return Objective(matrix.astype(np.complex64), best, -1.0, steps)


@functools.lru_cache(maxsize=32)
def energy_objective(task: str, num_qubits: int, steps: int, vqe_steps: int) -> Objective:
    """The objective of a task other than fidelity.

    Raises:
      UserError: an unknown task, or h2 on another number of qubits than four.
    """
    if task == "maxcut" and num_qubits > 1:
        return _energy(maxcut(num_qubits), steps)
    if task == "tfim" and num_qubits > 1:
        return _energy(ham.tfim_ring(num_qubits), vqe_steps)
    if task == "h2" and num_qubits == 4:
        return _energy(ham.h2_4q(H2_BOHR * ham.BOHR), vqe_steps)
    if task in TASKS:
        raise UserError(f"task {task} on {num_qubits} qubits; h2 takes 4, the others at least 2")
    raise UserError(f"task {task!r} is unknown{nearest(task, TASKS)}")


def fidelity_objective(state: np.ndarray | jax.Array, steps: int) -> Objective:
    """To be the state c[2^n]."""
    t = np.asarray(state, np.complex128)
    return Objective(np.outer(t, t.conj()).astype(np.complex64), 1.0, 1.0, steps)


def draw_target(key: jax.Array, pool: CircuitSpec, spec: PoolSpec) -> np.ndarray:
    """c64[2^n]: the state of a circuit drawn like the pool's, with its own angles, that is not in the pool."""
    rows = {np.stack(r).tobytes() for r in zip(*(np.asarray(x) for x in pool[:3]), strict=True)}
    drawn = sample_circuits(key, spec._replace(size=min(256, spec.size)))
    for i, row in enumerate(zip(*drawn[:3], strict=True)):
        if np.stack(row).tobytes() not in rows:
            one = CircuitSpec(*(x[i] for x in drawn))
            return np.asarray(cs.apply_spec(one, one.angle, spec.num_qubits))
    raise UserError(
        f"the pool of {spec.size} holds every circuit that was drawn as a target; "
        "use a smaller pool or more gates"
    )


def score_of(mean: jax.Array, best: jax.Array | float) -> jax.Array:
    """<M> / best, clipped to [0, 1]: float32 would give 1 + 1e-6."""
    return jnp.clip(mean / best, 0.0, 1.0)


def optimise_angles(
    spec: CircuitSpec,
    objective: Objective,
    num_qubits: int,
    *,
    learning_rate: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """The inner run on one circuit: Adagrad (no initial accumulator, as PennyLane's) from the stored angles.

    Ends after objective.steps or at a change of <M> below STOP. vmap over circuits; the objective may be traced.

    Returns:
      score f32[], angles f[G, 3].
    """
    plan = cs.slots(spec, num_qubits)
    matrix = jnp.asarray(objective.matrix)
    tx = optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=1e-8)

    def mean(angles):
        psi = cs.run_slots(spec.gate, angles, plan)
        return (psi.conj() @ (matrix @ psi)).real

    def step(_, carry):
        angles, opt_state, before, done = carry
        now, slope = jax.value_and_grad(mean)(angles)
        done = done | (jnp.abs(now - before) < STOP)
        move, after = tx.update(-objective.sign * slope, opt_state)
        new = jax.tree.map(
            lambda a, b: jnp.where(done, a, b),
            (angles, opt_state),
            (optax.apply_updates(angles, move), after),
        )
        return (*new, now, done)

    angles = jnp.asarray(spec.angle)
    start = (angles, tx.init(angles), jnp.asarray(jnp.inf, angles.dtype), jnp.asarray(False))
    angles = jax.lax.fori_loop(0, objective.steps, step, start)[0]
    return score_of(mean(angles), objective.best), angles


@functools.partial(jax.jit, static_argnames=("num_qubits", "learning_rate"))
def _label(pool: CircuitSpec, objective: Objective, num_qubits: int, learning_rate: float):
    def one(spec):
        return optimise_angles(spec, objective, num_qubits, learning_rate=learning_rate)[0]

    return jax.vmap(one)(pool)


def label_pool(
    pool: CircuitSpec,
    objective: Objective,
    *,
    num_qubits: int,
    learning_rate: float = 0.5,
    chunk: int = 8192,
) -> np.ndarray:
    """f[P]: the score of every circuit, in chunks of one shape. One compilation for all objectives and steps."""
    size = pool.gate.shape[0]
    width = min(chunk, size)
    parts = []
    for at in range(0, size, width):
        rows = np.minimum(np.arange(at, at + width), size - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows], pool)
        parts.append(np.asarray(_label(part, objective, num_qubits, learning_rate)))
    return np.concatenate(parts)[:size]


def reference_score(
    spec: CircuitSpec, objective: Objective, num_qubits: int, learning_rate: float = 0.5
) -> float:
    """The same inner run with PennyLane's simulator, gradients and AdagradOptimizer: slow, for one circuit."""
    qml = cs.pennylane()
    from pennylane import numpy as pnp

    matrix = np.asarray(objective.matrix, np.complex128)

    @qml.qnode(qml.device("default.qubit", wires=num_qubits), interface="autograd")
    def mean(angles):
        cs.queue_gates(qml, spec, angles)
        return qml.expval(qml.Hermitian(matrix, wires=range(num_qubits)))

    # the optimiser descends
    opt = qml.AdagradOptimizer(stepsize=learning_rate, eps=1e-8)
    angles = pnp.array(np.asarray(spec.angle, np.float64), requires_grad=True)
    before = np.inf
    for _ in range(objective.steps):
        new, cost = opt.step_and_cost(lambda a: -objective.sign * mean(a), angles)
        if abs(cost - before) < STOP:
            break
        angles, before = new, cost
    return float(np.clip(mean(angles) / objective.best, 0, 1))
