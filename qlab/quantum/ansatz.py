"""The RY-RZ ansatz under noise: E(theta, lam), on two simulators with one signature.

theta f[L+1, 2, n]: for l = 0..L every qubit gets RY(theta[l, 0, q]) then RZ(theta[l, 1, q]); after each
layer but the last come CNOTs (0,1), (1,2), ..., (n-2,n-1). Qubit 0 is leftmost. Noise follows every gate, on
its qubits: strength lam1 after rotations, lam2 after CNOTs. Precision follows theta.

"ptm" is the fast path (real vectors of length 4^n, rotations of a layer fused with their noise, layers
scanned). "default.mixed" is PennyLane's density-matrix simulator, gate by gate from the tape: the reference.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum import noise as nz
from qlab.quantum import ptm as pt
from qlab.quantum.pauli import PAULIS, PauliSum, to_coords
from qlab.quantum.qml import pennylane

MAX_SCALE = 7  # largest odd folding scale the fast path prepares


class Gate(NamedTuple):
    """One gate of a tape: "ry", "rz" (angle sign * theta[layer, 0 or 1, wire]) or "cx"."""

    name: str
    wires: tuple[int, ...]
    layer: int
    sign: int = 1


def ry_rz_tape(n: int, num_blocks: int) -> tuple[Gate, ...]:
    """The ansatz as a list of gates, in order; num_blocks = L entangling blocks.

    >>> [g.name for g in ry_rz_tape(2, 0)]
    ['ry', 'rz', 'ry', 'rz']
    """
    tape: list[Gate] = []
    for layer in range(num_blocks + 1):
        tape += [Gate(name, (q,), layer) for q in range(n) for name in ("ry", "rz")]
        if layer < num_blocks:
            tape += [Gate("cx", (q, q + 1), layer) for q in range(n - 1)]
    return tuple(tape)


def num_folds(scale: int) -> int:
    """k of G -> G (G^-1 G)^k for the odd scale 2k + 1.

    Raises:
      UserError: an even, negative or too large scale.
    """
    if scale not in range(1, MAX_SCALE + 1, 2):
        raise UserError(f"folding scale {scale}; use an odd number from 1 to {MAX_SCALE}")
    return (scale - 1) // 2


def fold_gates(tape: tuple[Gate, ...], scale: int) -> tuple[Gate, ...]:
    """Every gate G becomes G (G^-1 G)^k, scale = 2k + 1 (digital zero-noise extrapolation)."""
    inverse = [g._replace(sign=-g.sign) for g in tape]
    k = num_folds(scale)
    return tuple(h for g, g_inv in zip(tape, inverse, strict=True) for h in [g] + [g_inv, g] * k)


# ---- fast path: Pauli-transfer matrices ---------------------------------------------------------


def _noisy_gate(ptm: jax.Array, noise: jax.Array, folds: jax.Array | None) -> jax.Array:
    """Gate then noise; with folds, (noise gate noise gate^-1)^folds noise gate."""
    out = noise @ ptm
    if folds is None:
        return out
    powers = [out]
    for _ in range(num_folds(MAX_SCALE)):
        powers.append(out @ (noise @ ptm.T @ powers[-1]))  # PTMs of unitaries are orthogonal
    return jnp.stack(powers)[folds]


def noisy_state(theta: jax.Array, noise: nz.GateNoise, folds: jax.Array | None = None) -> jax.Array:
    """Pauli coordinates of the ansatz state before the detector.

    Args:
      theta: f[L+1, 2, n]
      noise: what follows each gate.
      folds: i32[], how often each gate is undone and redone (0..3); None = never, and cheaper.
    Returns:
      r f[4^n].
    """
    n = theta.shape[-1]
    cx = _noisy_gate(jnp.asarray(pt.cnot_ptm(), theta.dtype), noise.cx, folds)

    def rotate(r, angles):  # angles f[2, n]
        def fused(y, z):
            ry = _noisy_gate(pt.ptm_rotation(2, y), noise.ry, folds)
            return _noisy_gate(pt.ptm_rotation(3, z), noise.rz, folds) @ ry

        local = jax.vmap(fused)(angles[0], angles[1])
        for q in range(n):
            r = pt.apply_ptm(r, local[q], (q,))
        return r

    def block(r, angles):
        r = rotate(r, angles)
        for q in range(n - 1):
            r = pt.apply_ptm(r, cx, (q, q + 1))
        return r, None

    r, _ = jax.lax.scan(block, pt.zero_state(n, theta.dtype), theta[:-1])
    return rotate(r, theta[-1])


def read_out(r: jax.Array, readout: jax.Array) -> jax.Array:
    """Pauli expectations f[4^n] as a detector with error map f[4, 4] on each qubit reports them."""
    n = round(np.log2(r.size) / 2)
    for q in range(n):
        r = pt.apply_ptm(r, readout, (q,))
    return r


@functools.partial(jax.jit, static_argnames=("kind", "fixed"))
def state_of(
    theta: jax.Array,
    lam1: jax.Array,
    lam2: jax.Array,
    kind: str = "depol",
    fixed: nz.FixedErrors = nz.NO_FIXED_ERRORS,
    folds: jax.Array | None = None,
) -> jax.Array:
    """Read-out Pauli expectations f[4^n]: noise model, circuit and detector in one call."""
    lam1, lam2 = jnp.asarray(lam1, theta.dtype), jnp.asarray(lam2, theta.dtype)
    noise = nz.gate_noise(kind, lam1, lam2, fixed)
    r = noisy_state(theta, noise, folds)
    return read_out(r, noise.readout) if any(fixed.readout) else r


# ---- reference: PennyLane default.mixed ---------------------------------------------------------


@functools.cache
def _mixed_circuit(n: int, num_blocks: int, scale: int):
    """The QNode (rotations c[2, L+1, 2, n, 2, 2] by sign, CNOT and Kraus arrays) -> rho, built once."""
    qml = pennylane()

    tape = fold_gates(ry_rz_tape(n, num_blocks), scale)

    @qml.qnode(qml.device("default.mixed", wires=n), interface="jax", diff_method="backprop")
    def circuit(rotations, after):
        for g in tape:
            if g.name == "cx":
                qml.CNOT(wires=g.wires)
            else:
                axis = 0 if g.name == "ry" else 1
                unitary = rotations[0 if g.sign > 0 else 1, g.layer, axis, g.wires[0]]
                qml.QubitUnitary(unitary, wires=g.wires)
            over, kraus = after[g.name]
            qml.QubitUnitary(over, wires=g.wires)
            qml.QubitChannel(list(kraus), wires=g.wires)
        return qml.density_matrix(wires=range(n))

    return circuit


def _rotation_matrices(theta: jax.Array) -> jax.Array:
    """c[L+1, 2, n, 2, 2]: all RY and RZ matrices of the circuit as one array."""

    def one(axis, angle):
        generator = jnp.asarray(PAULIS)[axis]
        return jnp.cos(angle / 2) * jnp.eye(2) - 1j * jnp.sin(angle / 2) * generator

    over_qubits = jax.vmap(one, (None, 0))
    return jax.vmap(jax.vmap(over_qubits), (None, 0))(jnp.array([2, 3]), theta)


def _read_operator(obs: PauliSum, readout: tuple[float, float]) -> np.ndarray:
    """The operator whose expectation a detector with these errors reports for `obs`."""
    contrast, offset = 1 - sum(readout), readout[1] - readout[0]
    total = 0
    for coeff, string in zip(obs.coeffs, obs.paulis, strict=True):
        term = np.ones((1, 1))
        for p in string:
            factor = contrast * PAULIS[p] + offset * np.eye(2) if p else np.eye(2)
            term = np.kron(term, factor)
        total = total + coeff * term
    return np.asarray(total)


def _mixed_expval(theta, lam1, lam2, obs, kind, fixed, scale):
    blocks, _, n = theta.shape
    signed = jnp.stack([_rotation_matrices(theta), _rotation_matrices(-theta)])
    extra = jnp.full((1, 2, 1), fixed.coherent, theta.dtype)
    over = _rotation_matrices(extra)[0, :, 0]
    one, two = nz.channel_kraus(kind, lam1, 1), nz.channel_kraus(kind, lam2, 2)
    after = {
        "ry": (over[0], one),
        "rz": (over[1], one),
        "cx": (jnp.asarray(nz.cnot_power(fixed.coherent)), two),
    }
    rho = _mixed_circuit(n, blocks - 1, scale)(signed, after)
    return jnp.einsum("ij,ji->", jnp.asarray(_read_operator(obs, fixed.readout)), rho).real


# ---- one signature ------------------------------------------------------------------------------


def noisy_expval(
    theta: jax.Array,
    lam1: jax.Array,
    lam2: jax.Array,
    obs: PauliSum,
    *,
    backend: str = "ptm",
    kind: str = "depol",
    fixed: nz.FixedErrors = nz.NO_FIXED_ERRORS,
    scale: int = 1,
) -> jax.Array:
    """<obs> of the noisy ansatz; jit, vmap and grad over theta, lam1, lam2.

    Args:
      theta: f[L+1, 2, n]
      lam1, lam2: noise after one- and two-qubit gates (Qiskit's lam for "depol").
      obs: observable on n qubits.
      backend: "ptm" or "default.mixed".
      kind: noise kind, see `noise.channel`.
      fixed: read-out and coherent errors that do not scale with lam.
      scale: odd gate-folding scale.

    >>> from qlab.quantum.hamiltonians import zn
    >>> float(noisy_expval(jnp.zeros((1, 2, 1)), 0.5, 0.0, zn(1)))
    0.25
    """
    if theta.ndim != 3 or theta.shape[1] != 2 or theta.shape[2] != obs.num_qubits:
        raise UserError(
            f"theta has shape {theta.shape}; expected (L+1, 2, {obs.num_qubits}) for this observable"
        )
    if backend == "default.mixed":
        return _mixed_expval(theta, lam1, lam2, obs, kind, fixed, scale)
    if backend != "ptm":
        raise UserError(f"backend {backend!r}; use 'ptm' or 'default.mixed'")
    folds = None if num_folds(scale) == 0 else jnp.int32(num_folds(scale))
    r = state_of(theta, lam1, lam2, kind, fixed, folds)
    return jnp.asarray(to_coords(obs), r.dtype) @ r
