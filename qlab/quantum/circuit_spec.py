"""Circuits as data: arrays that a program takes as input, so that thousands of circuits share one compiled program.

A circuit is G slots; slot g holds a gate of GATES on q0[g] (and q1[g]), with up to three angles. Gate 0 does
nothing and fills up short circuits. `apply_spec` is one program for all circuits of one G and one number of qubits:
vmap it over circuits, differentiate it by the angles. Qubit 0 is leftmost and the most significant bit.

Every gate here sends the amplitude of basis state k to at most one partner: psi'[k] = keep[k] psi[k] + mix[k] psi[r(k)]
with r an involution (a flipped qubit, a flipped target, two swapped qubits). So a slot costs a gather of 2^n
amplitudes and no matrix, and the gradient of the gather is a gather again.
    RX, RY, RZ (t) = exp(-i t P / 2); U3(t, p, d) = e^(i (p + d) / 2) RZ(p) RY(t) RZ(d); CNOT: q0 controls q1.
Letters: G = slots, n = qubits, A = angles of a gate (at most 3).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum.pauli import PAULIS
from qlab.quantum.qml import pennylane

# fmt: off
GATES = ("", "X", "Y", "Z", "H", "RX", "RY", "RZ", "CNOT", "CZ", "U3", "SWAP")  # code = place
NUM_ANGLES = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 3, 0], np.int32)
NUM_QUBITS = np.array([0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 2], np.int32)
# fmt: on
NOOP, RX, CNOT, CZ, U3, SWAP = 0, 5, 8, 9, 10, 11
_PENNYLANE = ("", "PauliX", "PauliY", "PauliZ", "Hadamard", *GATES[5:])
# c128[12, 2, 2]: the matrix of a gate without angles (identity elsewhere), and the generator of a rotation
_FIXED = np.stack([np.eye(2, dtype=complex)] * len(GATES))
_FIXED[1:4], _FIXED[4] = PAULIS[1:], np.array([[1, 1], [1, -1]]) / np.sqrt(2)
_AXIS = np.zeros_like(_FIXED)
_AXIS[5:8] = PAULIS[1:]


class CircuitSpec(NamedTuple):
    """One circuit, or a batch with leading axes.

    Attributes:
      gate: i32[G], 0 = nothing, else the place in GATES.
      q0, q1: i32[G]; q1 is the target or partner of CNOT, CZ, SWAP, and q0 again elsewhere.
      angle: f[G, 3], unused ones ignored.
    """

    gate: Any
    q0: Any
    q1: Any
    angle: Any

    @property
    def num_slots(self) -> int:
        return int(self.gate.shape[-1])


Op = tuple[str, Sequence[int]] | tuple[str, Sequence[int], Sequence[float]]


def circuit_spec(ops: Iterable[Op], num_slots: int | None = None) -> CircuitSpec:
    """A circuit (NumPy, on the host) from ("H", [0]), ("CNOT", [0, 1]), ("RX", [1], [0.3]) ...

    Args:
      num_slots: G; what is left over stays empty. None: as many as there are ops.
    Raises:
      UserError: an unknown gate, a wrong number of qubits or angles, or more ops than slots.

    >>> circuit_spec([("H", [0]), ("CNOT", [0, 1])], 3).gate.tolist()
    [4, 8, 0]
    """
    rows = list(ops)
    size = len(rows) if num_slots is None else num_slots
    if len(rows) > size:
        raise UserError(f"{len(rows)} gates in a circuit of {size} slots; raise num_slots")
    gate, q0, q1 = (np.zeros(size, np.int32) for _ in range(3))
    angle = np.zeros((size, 3), np.float32)
    for i, (name, qubits, *rest) in enumerate(rows):
        if name not in GATES[1:]:
            raise UserError(f"gate {i}: {name!r} is not known{nearest(name, GATES[1:])}")
        code = GATES.index(name)
        angles = tuple(rest[0]) if rest else ()
        if len(qubits) != NUM_QUBITS[code] or len(angles) not in (0, NUM_ANGLES[code]):
            raise UserError(
                f"gate {i}: {name} on qubits {list(qubits)} with {len(angles)} angles; it takes "
                f"{NUM_QUBITS[code]} qubits and {NUM_ANGLES[code]} angles (or none: zeros)"
            )
        gate[i], q0[i], q1[i] = code, qubits[0], qubits[-1]
        angle[i, : len(angles)] = angles
    return check_spec(CircuitSpec(gate, q0, q1, angle), max([0, *q0, *q1]) + 1)  # pyright: ignore[reportArgumentType]


def check_spec(spec: CircuitSpec, num_qubits: int) -> CircuitSpec:
    """The spec, if every slot is a gate on qubits that exist; host only, any leading axes.

    Raises:
      UserError: shapes that do not fit, an unknown code, a missing qubit, CNOT, CZ or SWAP on one qubit.
    """
    gate, q0, q1, angle = (np.asarray(x) for x in spec)
    if not (gate.shape == q0.shape == q1.shape and angle.shape == (*gate.shape, 3)):
        shapes = ", ".join(f"{k} {v.shape}" for k, v in zip(spec._fields, spec, strict=True))
        raise UserError(
            f"circuit arrays {shapes}; expected three of [..., G] and angle [..., G, 3]"
        )
    if gate.size and not 0 <= gate.min() <= gate.max() < len(GATES):
        raise UserError(
            f"gate codes {gate.min()}..{gate.max()}; use 0..{len(GATES) - 1}, see GATES"
        )
    used, two = gate != NOOP, NUM_QUBITS[gate] == 2
    wires = np.concatenate([q0[used], q1[used & two]])
    if wires.size and not 0 <= wires.min() <= wires.max() < num_qubits:
        raise UserError(
            f"gates on qubits {wires.min()}..{wires.max()} of a register of {num_qubits}; "
            f"qubits are 0..{num_qubits - 1}"
        )
    if (two & (q0 == q1)).any():
        raise UserError("a two-qubit gate acts on one qubit; q0 and q1 must differ there")
    return spec


def gate_matrices(gate: jax.Array, angle: jax.Array) -> jax.Array:
    """The 2 x 2 matrix on q0: c[..., 2, 2] from gate i32[...], angle f[..., 3]; identity for two-qubit gates."""
    dtype = jnp.result_type(angle.dtype, jnp.complex64)
    half = angle[..., :1, None] / 2
    c, s = jnp.cos(half), jnp.sin(half)
    turn = c * jnp.eye(2, dtype=angle.dtype) - 1j * s * jnp.asarray(_AXIS, dtype)[gate]
    p, d = (jnp.exp(1j * angle[..., k].astype(dtype))[..., None, None] for k in (1, 2))
    top, bottom = jnp.concatenate([c + 0 * d, -d * s], -1), jnp.concatenate([p * s, p * d * c], -1)
    u3 = jnp.concatenate([top, bottom], -2)
    kind = gate[..., None, None]
    rotates = (kind >= RX) & (kind < CNOT)
    return jnp.where(
        kind == U3, u3, jnp.where(rotates, turn, jnp.asarray(_FIXED, dtype)[gate])
    ).astype(dtype)


@jax.custom_vjp
def _partner(psi: jax.Array, r: jax.Array) -> jax.Array:
    """psi[r] for an involution r, whose transpose is itself."""
    return psi[r]


_partner.defvjp(lambda psi, r: (psi[r], r), lambda r, g: (g[r], None))


class Slots(NamedTuple):
    """What the gates do besides their angles: partner r, and which rule makes keep and mix. All [G, 2^n]."""

    partner: jax.Array  # i32
    bit: jax.Array  # i32, of q0
    sign: jax.Array  # f32, keep of a two-qubit gate
    swaps: jax.Array  # f32, its mix


def slots(spec: CircuitSpec, num_qubits: int) -> Slots:
    """The integer part of the simulation: compute it once where many angles are tried."""
    gate, q0, q1 = (x[..., None] for x in spec[:3])
    k = jnp.arange(2**num_qubits, dtype=jnp.int32)
    m0, m1 = (jnp.left_shift(1, num_qubits - 1 - q) for q in (q0, q1))
    b0, b1 = (((k & m) != 0).astype(jnp.int32) for m in (m0, m1))
    moves_target, swapped = (gate == CNOT) & (b0 == 1), (gate == SWAP) & (b0 != b1)
    partner = jnp.where(gate == CNOT, k ^ m1, jnp.where(gate == SWAP, k ^ m0 ^ m1, k ^ m0))
    # a partner must be an involution also where the amplitude stays
    partner = jnp.where((gate == CNOT) & ~moves_target | (gate == SWAP) & ~swapped, k, partner)
    moves = (moves_target | swapped).astype(jnp.float32)
    sign = (1 - moves) * jnp.where((gate == CZ) & (b0 * b1 == 1), -1.0, 1.0)
    return Slots(partner, b0, sign, moves)


def run_slots(
    gate: jax.Array, angles: jax.Array, plan: Slots, psi: jax.Array | None = None
) -> jax.Array:
    """psi c[2^n] after one circuit, from `psi` (None: |0...0>); see `apply_spec`."""
    u = gate_matrices(gate, angles)  # c[G, 2, 2]
    two = (gate >= CNOT) & (gate != U3)
    bit = plan.bit.astype(bool)
    keep = jnp.where(bit, u[:, 1, 1, None], u[:, 0, 0, None])
    mix = jnp.where(bit, u[:, 1, 0, None], u[:, 0, 1, None])
    keep = jnp.where(two[:, None], plan.sign, keep)
    mix = jnp.where(two[:, None], plan.swaps, mix)
    if psi is None:
        psi = jnp.zeros(plan.bit.shape[-1], u.dtype).at[0].set(1)
    psi = psi.astype(jnp.result_type(psi, u))

    def slot(psi, xs):
        keep, mix, r = xs
        return (keep * psi + mix * _partner(psi, r)).astype(psi.dtype), None

    return jax.lax.scan(slot, psi, (keep, mix, plan.partner))[0]


@functools.partial(jax.jit, static_argnames="num_qubits")
def apply_spec(
    spec: CircuitSpec, angles: jax.Array, num_qubits: int, psi: jax.Array | None = None
) -> jax.Array:
    """The state after one circuit.

    Args:
      spec: one circuit (vmap for many); its own `angle` is not read.
      angles: f[G, 3]; with float64, or psi of complex128, the result is complex128.
      num_qubits: n, static. Qubits of the spec beyond it are not looked for here: see `check_spec`.
      psi: c[2^n], the state to start from; None: |0...0>.
    Returns:
      c[2^n].

    >>> bell = circuit_spec([("H", [0]), ("CNOT", [0, 1])])
    >>> apply_spec(bell, bell.angle, 2).real.round(3).tolist()
    [0.7070000171661377, 0.0, 0.0, 0.7070000171661377]
    """
    return run_slots(spec.gate, angles, slots(spec, num_qubits), psi)


def angle_mask(spec: CircuitSpec) -> jax.Array:
    """f32[..., G, 3]: 1 where an angle does something."""
    return (jnp.arange(3) < jnp.asarray(NUM_ANGLES)[spec.gate][..., None]).astype(jnp.float32)


def queue_gates(qml: Any, spec: CircuitSpec, angles: Any) -> None:
    """Queues the gates of one circuit in a PennyLane function; angles[g, k] may be traced by it."""
    for g, code in enumerate(np.asarray(spec.gate)):
        if code != NOOP:
            wires = [int(spec.q0[g]), int(spec.q1[g])][: NUM_QUBITS[code]]
            values = [angles[g, k] for k in range(NUM_ANGLES[code])]
            getattr(qml, _PENNYLANE[code])(*values, wires=wires)


def drawing_rows(spec: CircuitSpec) -> np.ndarray:
    """f64[G, 6] of one circuit as a page draws it (qlab.lab.circuit_plot): gate, q0, q1, three angles.

    >>> drawing_rows(circuit_spec([("CNOT", [0, 1])])).tolist()
    [[8.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    """
    places = np.stack([np.asarray(a, float) for a in (spec.gate, spec.q0, spec.q1)], -1)
    return np.concatenate([places, np.asarray(spec.angle, float)], -1)


def pennylane_state(spec: CircuitSpec, num_qubits: int, angles: Any = None) -> np.ndarray:
    """c128[2^n] of one circuit from PennyLane's default.qubit, gate by gate: the reference."""
    qml = pennylane()
    angles = np.asarray(spec.angle if angles is None else angles, np.float64)

    @qml.qnode(qml.device("default.qubit", wires=num_qubits))
    def run():
        queue_gates(qml, spec, angles)
        return qml.state()

    return np.asarray(run())
