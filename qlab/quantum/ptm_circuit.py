"""Noisy circuits as data, in Pauli coordinates: one program for all circuits of one size, and their exact slices.

A slot of a CircuitSpec is a map on two legs, const + cos(t) cos + sin(t) sin, read from tables: a rotation is
N (K + cos t B + sin t S) with N the noise after it, so it is computed once and for every angle (CRLQAS's R_I, R_P,
R_comm: cos^2 = (1 + cos) / 2 and so on). Only the legs that a gate touches are contracted; a permutation brings
them to the front, and from one slot to the next the two permutations are one.

Along one angle the energy is a sinusoid, E = a + b cos t + c sin t. A pass back (the observable, through the
transposed maps) and a pass forth (the state) give a, b, c of every slot for the price of one gradient, and, if each
angle moves to its minimum as the pass arrives there, an exact coordinate descent.
Letters: G = slots, n = qubits, m = 4^(n-2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlab.lab.errors import UserError
from qlab.quantum import noise_model as nm
from qlab.quantum import ptm as pt
from qlab.quantum.circuit_spec import _FIXED, CNOT, CZ, GATES, NUM_QUBITS, RX, SWAP, U3, CircuitSpec

RZ = RX + 2
_TWO = {CNOT: np.eye(4)[[0, 1, 3, 2]], CZ: np.diag([1, 1, 1, -1]), SWAP: np.eye(4)[[0, 2, 1, 3]]}
_NAMES = ("", "PauliX", "PauliY", "PauliZ", "Hadamard", *GATES[5:])  # as noise models call them


class NoiseTables(NamedTuple):
    """Every gate with the noise after it: const + cos(t) cos + sin(t) sin on the legs (q0, q1).

    Attributes:
      gates: f[12, 3, 16, 16] by gate code; gates on one qubit leave the second leg alone.
      readout: f[n, 4, 4] of each qubit, last.
    """

    gates: Any
    readout: Any


def depolarizing_model(p1: float, p2: float) -> nm.NoiseModel:
    """A non-identity Pauli with probability p1 after one-qubit gates, p2 after two-qubit gates (on both together)."""
    for name, p in (("p1", p1), ("p2", p2)):
        if not 0 <= p <= 1:
            raise UserError(f"{name}={p}: a depolarizing probability is from 0 to 1")
    rate = {1: p1, 2: p2}
    return nm.NoiseModel(
        default={k: (nm.Channel("depolarizing", {"p": p}),) for k, p in rate.items()}
    )


def noise_tables(model: nm.NoiseModel, num_qubits: int) -> NoiseTables:
    """The tables of a noise model (`depolarizing_model`, `noise_model.read_noise`), float64, on the host."""
    eye = np.eye(4)
    gates = np.zeros((len(GATES), 3, 16, 16))
    gates[0, 0] = np.eye(16)
    for code in range(1, len(GATES)):
        k = int(NUM_QUBITS[code])
        after = nm.ptm_after(model, _NAMES[code], k)
        after = np.eye(4**k) if after is None else np.asarray(after, np.float64)
        if k == 2:
            gates[code, 0] = after @ pt.fixed_ptm(_TWO[code])
        elif code in (RX, RX + 1, RZ):
            angles = jnp.arange(3) * (np.pi / 2)
            turned = [np.asarray(pt.ptm_rotation(code - RX + 1, t)).round(6) for t in angles]
            const = (turned[0] + turned[2]) / 2  # R(0), R(pi/2), R(pi): const + cos, + sin, - cos
            parts = (const, turned[0] - const, turned[1] - const)
            gates[code] = [np.kron(after @ part, eye) for part in parts]
        elif code != U3:
            gates[code, 0] = np.kron(after @ pt.fixed_ptm(_FIXED[code]), eye)
    readout = np.stack([np.asarray(nm.readout_ptm(model, q)) for q in range(num_qubits)])
    return NoiseTables(gates, readout)


class Wiring(NamedTuple):
    """A circuit without its angles, ready to run: compute it once where many angles are tried.

    Attributes:
      maps: f[G, 3, 16, 16]. turns: bool[G], the slot has an angle.
      into: i32[G+1, 4^n], from the order of legs of the slot before (at the ends: qubit order) to that of this slot.
      back: i32[G+1, 4^n], their inverses.
    """

    maps: jax.Array
    turns: jax.Array
    into: jax.Array
    back: jax.Array


def _leg_orders(n: int) -> np.ndarray:
    """i32[n, n, 4^n]: the permutation that brings legs (q0, q1) to the front; q0 = q1 takes another as q1."""
    index = np.arange(4**n).reshape((4,) * n)
    orders = np.zeros((n, n, 4**n), np.int32)
    for q0, q1 in np.ndindex(n, n):
        second = (q0 + 1) % n if q1 == q0 else q1
        orders[q0, q1] = np.moveaxis(index, (q0, second), (0, 1)).reshape(-1)
    return orders


def check_slots(spec: CircuitSpec) -> None:
    """Raises where a known (not traced) spec has a gate that is no sinusoid in one angle."""
    if not isinstance(spec.gate, Tracer) and (np.asarray(spec.gate) == U3).any():
        raise UserError("U3 has three angles; write it as RZ(d), RY(t), RZ(p) in three slots")


def wiring(spec: CircuitSpec, tables: NoiseTables, num_qubits: int) -> Wiring:
    """Of one circuit (vmap for many), on max(n, 2) qubits; precision follows the tables."""
    check_slots(spec)
    gate, q0, q1 = (jnp.asarray(x) for x in spec[:3])
    n = max(num_qubits, 2)
    orders = _leg_orders(n)
    inverse = np.argsort(orders, axis=-1).astype(np.int32)
    here, undo = jnp.asarray(orders)[q0, q1], jnp.asarray(inverse)[q0, q1]
    plain = jnp.arange(4**n, dtype=jnp.int32)[None]
    old, new = jnp.concatenate([plain, undo]), jnp.concatenate([here, plain])
    old_order, undo_new = jnp.concatenate([plain, here]), jnp.concatenate([undo, plain])

    def compose(first, then):
        return jnp.take_along_axis(first, then, axis=-1)

    turns = (gate >= RX) & (gate <= RZ)
    return Wiring(
        jnp.asarray(tables.gates)[gate], turns, compose(old, new), compose(undo_new, old_order)
    )


def effective_observable(h: Any, tables: NoiseTables) -> jax.Array:
    """h f[4^n] with the readout errors in it, on max(n, 2) qubits."""
    n = tables.readout.shape[0]
    h = jnp.asarray(h)
    for q in range(n):
        h = pt.apply_ptm(h, jnp.asarray(tables.readout[q].T, h.dtype), (q,))
    return jnp.kron(h, jnp.eye(4, dtype=h.dtype)[0]) if n == 1 else h


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index]; its transpose is the gather by the inverse, where autodiff would scatter."""
    del inverse
    return x.at[index].get(mode="promise_in_bounds")


_permute.defvjp(
    lambda x, index, inverse: (_permute(x, index, inverse), (index, inverse)),
    lambda res, g: (_permute(g, res[1], res[0]), None, None),
)


def _parts(maps: jax.Array, x: jax.Array) -> jax.Array:
    """f[3, 4^n]: const x, cos x, sin x."""
    return jnp.einsum("cij,jm->cim", maps, x.reshape(16, -1)).reshape(3, -1)


def _at(parts: jax.Array, angle: jax.Array) -> jax.Array:
    return parts[0] + jnp.cos(angle) * parts[1] + jnp.sin(angle) * parts[2]


def _start(h: jax.Array) -> jax.Array:
    """|0..0>, the same in every order of legs."""
    return pt.zero_state(round(np.log2(h.size) / 2), h.dtype)


def energy(wires: Wiring, angles: jax.Array, h: jax.Array) -> jax.Array:
    """<H> f[] of one circuit with angles f[G], h from `effective_observable`."""

    def slot(x, xs):
        maps, into, back, angle = xs
        return _at(_parts(maps, _permute(x, into, back)), angle), None

    x, _ = jax.lax.scan(slot, _start(h), (wires.maps, wires.into[:-1], wires.back[:-1], angles))
    return h @ _permute(x, wires.into[-1], wires.back[-1])


def ptm_energy(spec: CircuitSpec, angles: jax.Array, tables: NoiseTables, h: Any) -> jax.Array:
    """<H> f[] of one noisy circuit.

    Args:
      spec: any gates of `circuit_spec.GATES` but U3. angles: f[G], or f[G, 3] of which the first is read.
      tables: `noise_tables` for as many qubits as h has. h: f[4^n], `pauli.to_coords`.

    >>> from qlab.quantum.circuit_spec import circuit_spec
    >>> tables = noise_tables(depolarizing_model(0.03, 0.0), 1)
    >>> spec = circuit_spec([("RX", [0], [np.pi])])
    >>> round(float(ptm_energy(spec, spec.angle, tables, np.array([0.0, 0.0, 0.0, 1.0]))), 4)
    -0.96
    """
    angles = jnp.asarray(angles)
    angles = angles if angles.ndim == 1 else angles[:, 0]
    n = tables.readout.shape[0]
    return energy(wiring(spec, tables, n), angles, effective_observable(h, tables))


def _observables(wires: Wiring, angles: jax.Array, h: jax.Array) -> jax.Array:
    """f[G, 4^n]: the observable as seen right after each slot, in that slot's order of legs."""

    def slot(y, xs):
        maps, into, back, angle = xs
        m = maps[0] + jnp.cos(angle) * maps[1] + jnp.sin(angle) * maps[2]
        earlier = (m.T @ y.reshape(16, -1)).reshape(-1)
        return _permute(earlier, back, into), y

    last = _permute(h, wires.back[-1], wires.into[-1])
    xs = (wires.maps, wires.into[:-1], wires.back[:-1], angles)
    return jax.lax.scan(slot, last, xs, reverse=True)[1]


def slices(wires: Wiring, angles: jax.Array, h: jax.Array) -> jax.Array:
    """f[G, 3]: a, b, c of E = a + b cos t + c sin t along each angle, the others fixed.

    E is a + b cos t + c sin t of any slot, its gradient c cos t - b sin t.
    """

    def slot(x, xs):
        maps, into, back, angle, seen = xs
        parts = _parts(maps, _permute(x, into, back))
        return _at(parts, angle), parts @ seen

    seen = _observables(wires, angles, h)
    xs = (wires.maps, wires.into[:-1], wires.back[:-1], angles, seen)
    return jax.lax.scan(slot, _start(h), xs)[1]


def descend(
    wires: Wiring, angles: jax.Array, h: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """One sweep of Rotosolve: each angle in turn to the minimum of its slice, f[G].

    Three energies an angle on a quantum computer, at t = 0, pi/2 and -pi/2. An angle without influence stays.

    Args:
      noise: f[G, 3], what shots add to these three; None adds nothing.
    """
    if noise is None:
        noise = jnp.zeros((*angles.shape, 3), h.dtype)

    def slot(x, xs):
        maps, into, back, angle, turns, seen, shots = xs
        parts = _parts(maps, _permute(x, into, back))
        _, b, c = parts @ seen
        # E(0) = a + b, E(+-pi/2) = a +- c: their errors reach b and c like this
        b, c = b + shots[0] - (shots[1] + shots[2]) / 2, c + (shots[1] - shots[2]) / 2
        flat = b**2 + c**2 <= jnp.finfo(h.dtype).eps ** 2 * 100
        new = jnp.where(turns & ~flat, jnp.arctan2(-c, -b), angle)
        return _at(parts, new), new

    seen = _observables(wires, angles, h)
    xs = (wires.maps, wires.into[:-1], wires.back[:-1], angles, wires.turns, seen, noise)
    return jax.lax.scan(slot, _start(h), xs)[1]
