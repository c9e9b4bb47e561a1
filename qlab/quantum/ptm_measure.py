"""PennyLane's measurements on a state in Pauli coordinates r f[4^n] (qlab.ptm's second half).

`order` holds the labels of r's qubits. A Pauli string costs one look-up; other observables one product with the
marginal of their wires.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pennylane as qml
from jax.core import Tracer
from pennylane import measurements as pm
from pennylane.ops import SProd, Sum
from pennylane.pauli import PauliSentence
from pennylane.wires import Wires

from qlab.lab.errors import UserError
from qlab.quantum import noise_model as nm
from qlab.quantum import ptm as pt

HERMITIAN_TOL = 1e-5  # of an observable, relative to its largest entry: a float32 matrix passes

# One program per place instead of one per primitive, for circuits that run without jit.
apply_kraus = jax.jit(pt.apply_kraus_ptm, static_argnums=2)
apply_ptm = jax.jit(pt.apply_ptm, static_argnums=2)


@functools.partial(jax.jit, static_argnums=1)
def _probs(r: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    return pt.z_probabilities(pt.marginal(r, wires))


@functools.partial(jax.jit, static_argnums=1)
def _density(r: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    return pt.density_of_ptm(pt.marginal(r, wires))


@functools.partial(jax.jit, static_argnums=2)
def _mean(matrix: jax.Array, r: jax.Array, wires: tuple[int, ...]) -> jax.Array:
    """Tr(A rho) of a Hermitian A c[2^k, 2^k] on `wires`."""
    coords = pt.ptm_of_density(matrix) / matrix.shape[0]
    return coords.astype(r.dtype) @ pt.marginal(r, wires)


def is_measurable(obs) -> bool:
    """Whether an observable has a value without shots."""
    return obs.pauli_rep is not None or obs.has_matrix or getattr(obs, "has_sparse_matrix", False)


def is_sampled(obs) -> bool:
    """Whether an observable has an eigenbasis to turn into, for shots and readout errors."""
    if isinstance(obs, (Sum, SProd)) and obs.pauli_rep is None:
        return all(is_sampled(o) for o in (obs.operands if isinstance(obs, Sum) else (obs.base,)))
    return obs.pauli_rep is not None or obs.has_diagonalizing_gates


def places(wires, order: Wires) -> tuple[int, ...]:
    return tuple(order.index(w) for w in wires)


def readout(r: jax.Array, order: Wires, noise: nm.NoiseModel) -> jax.Array:
    """r as the detectors see it: every Pauli string measured in its own basis, each factor misread."""
    if nm.has_readout(noise):
        for q, wire in enumerate(order):
            r = apply_ptm(r, nm.readout_ptm(noise, wire).astype(r.dtype), (q,))
    return r


def rotate(mps: Any, r: jax.Array, order: Wires) -> jax.Array:
    """r in the basis in which the observables of `mps` (commuting qubit by qubit, or on separate wires) are diagonal."""
    letters, gates = {}, []
    for mp in mps:
        rep = None if mp.obs is None else mp.obs.pauli_rep
        if rep is not None and len(rep) == 1:
            letters.update(next(iter(rep)))
        else:
            gates += mp.diagonalizing_gates()
    for wire, letter in letters.items():
        gates += getattr(qml, letter)(wire).diagonalizing_gates()
    cplx = jnp.result_type(r.dtype, jnp.complex64)
    for gate in gates:
        matrix = jnp.asarray(gate.matrix(), cplx)
        r = apply_kraus(r, matrix[None], places(gate.wires, order))
    return r


def measure(mp: Any, r: jax.Array, read: jax.Array, order: Wires, noise: nm.NoiseModel):
    """The exact value of one measurement; `read` is `readout` of r."""
    noisy = nm.has_readout(noise)
    if isinstance(mp, pm.ExpectationMP) and mp.obs is not None:
        return expval(mp.obs, r, read, order, noise)
    if isinstance(mp, pm.VarianceMP) and mp.obs is not None:
        obs: Any = mp.obs
        rep = obs.pauli_rep
        if rep is not None and (len(rep) == 1 or not noisy):
            return _sentence(rep @ rep, read, order) - _sentence(rep, read, order) ** 2
        if not noisy:
            matrix = _matrix(obs)
            wires = places(obs.wires, order)
            return _mean(matrix @ matrix, r, wires) - _mean(matrix, r, wires) ** 2
    if isinstance(mp, (pm.ExpectationMP, pm.VarianceMP)):
        return _in_eigenbasis(mp, r, order, noise)
    if isinstance(mp, pm.ProbabilityMP):
        if mp.obs is not None:
            read = readout(rotate([mp], r, order), order, noise)
        return _probs(read, places(mp.wires or order, order))
    wires = mp.wires or order
    rho = _density(r, places(wires, order))
    if isinstance(mp, pm.StateMP):
        return rho
    number = {w: i for i, w in enumerate(wires)}  # PennyLane's entropies know no labels
    return mp.map_wires(number).process_density_matrix(rho, Wires(range(len(wires))))


def expval(
    obs: Any, r: jax.Array, read: jax.Array, order: Wires, noise: nm.NoiseModel
) -> jax.Array:
    """<obs>, of sums term by term."""
    if obs.pauli_rep is not None:
        return _sentence(obs.pauli_rep, read, order)
    if isinstance(obs, Sum):
        return jnp.stack([expval(term, r, read, order, noise) for term in obs.operands]).sum()
    if isinstance(obs, SProd):
        return jnp.asarray(obs.scalar) * expval(obs.base, r, read, order, noise)
    if nm.has_readout(noise):
        return _in_eigenbasis(qml.expval(obs), r, order, noise)
    return _mean(_matrix(obs), r, places(obs.wires, order))


def _in_eigenbasis(mp, r, order: Wires, noise: nm.NoiseModel) -> jax.Array:
    """Mean or variance of the eigenvalue that is read off after turning into the eigenbasis."""
    if mp.obs is not None:
        _matrix(mp.obs)  # checks that it is Hermitian
    read = readout(rotate([mp], r, order), order, noise)
    probs = _probs(read, places(mp.wires, order))
    values = jnp.asarray(mp.eigvals()).real.astype(probs.dtype)
    mean = probs @ values
    return probs @ values**2 - mean**2 if isinstance(mp, pm.VarianceMP) else mean


def _sentence(rep: PauliSentence, r: jax.Array, order: Wires) -> jax.Array:
    """sum_j c_j r[P_j]."""
    n, index = len(order), []
    for word in rep:
        digits = np.zeros(n, np.int64)
        for wire, letter in word.items():
            digits[order.index(wire)] = "IXYZ".index(letter)
        index.append(int(digits @ 4 ** np.arange(n - 1, -1, -1)))
    coeffs = [jnp.asarray(c) for c in rep.values()]
    if not coeffs:
        return jnp.zeros((), r.dtype)
    weights = jnp.stack(jnp.broadcast_arrays(*coeffs))
    if jnp.iscomplexobj(weights):
        _refuse_non_hermitian(weights, weights.conj(), rep)
        weights = weights.real
    return weights.astype(r.dtype) @ r[np.array(index)]


def _matrix(obs) -> jax.Array:
    """c[2^k, 2^k] on the observable's own wires, in their order."""
    dense = obs.has_matrix
    matrix = obs.matrix(wire_order=obs.wires) if dense else obs.sparse_matrix().toarray()
    matrix = jnp.asarray(matrix) + jnp.zeros((), complex)
    _refuse_non_hermitian(matrix, matrix.conj().T, obs)
    return matrix


def _refuse_non_hermitian(a: jax.Array, adjoint: jax.Array, obs) -> None:
    if isinstance(a, Tracer):
        return
    gap = float(abs(a - adjoint).max())
    if gap > HERMITIAN_TOL * max(float(abs(a).max()), 1.0):
        raise UserError(f"{obs!r:.80} is not Hermitian (off by {gap:.2g}); an observable must be")
