"""H psi and <psi|H|psi> for sums of Pauli strings, without the matrix.

A string flips the qubits that have X or Y and multiplies by a sign: (P psi)[k] = i^{#Y} (-1)^{(k ^ x) . z} psi[k ^ x] with
x the flipped qubits and z those that have Y or Z. Strings with the same x share one gather, so a Hamiltonian
costs one pass over the 2^n amplitudes for each distinct x. Qubit 0 is leftmost and the most significant bit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum.pauli import PauliSum


class Strings(NamedTuple):
    """The strings of one flip mask x. z: u32[J] masks of signs, coeff: c128[J] with the phase of the Ys."""

    x: int
    z: np.ndarray
    coeff: np.ndarray


def strings(obs: PauliSum) -> tuple[Strings, ...]:
    """The terms grouped by the qubits they flip.

    >>> from qlab.quantum.pauli import pauli_sum
    >>> [(s.x, s.z.tolist()) for s in strings(pauli_sum({"ZZ": 1.0, "IZ": 2.0, "XI": 3.0}))]
    [(0, [3, 1]), (2, [0])]
    """
    bit = 1 << np.arange(obs.num_qubits - 1, -1, -1)
    x = ((obs.paulis == 1) | (obs.paulis == 2)) @ bit
    z = ((obs.paulis == 2) | (obs.paulis == 3)) @ bit
    # Y = i X Z, and (X^x Z^z psi)[k] = (-1)^{(k ^ x) . z} psi[k ^ x].
    coeff = obs.coeffs * 1j ** (obs.paulis == 2).sum(1)
    return tuple(
        Strings(int(m), z[x == m].astype(np.uint32), coeff[x == m])
        for m in dict.fromkeys(x.tolist())
    )


def apply_pauli_sum(obs: PauliSum, psi: jax.Array) -> jax.Array:
    """H psi for psi c[2^n]; jit, vmap and grad with obs static.

    Raises:
      UserError: psi has not 2^n amplitudes.

    >>> from qlab.quantum.pauli import pauli_sum
    >>> apply_pauli_sum(pauli_sum({"Y": 2.0}), jnp.array([1.0, 0.0], jnp.complex64)).tolist()
    [0j, 2j]
    """
    n = obs.num_qubits
    if psi.shape != (2**n,):
        raise UserError(
            f"psi has shape {psi.shape}, but the observable is on {n} qubits: ({2**n},) is expected"
        )
    k = jnp.arange(2**n, dtype=jnp.uint32)
    out = jnp.zeros_like(psi)
    for group in strings(obs):
        source = k ^ jnp.uint32(group.x)
        # Real where no string has an odd number of Ys: half the memory.
        real, imag = np.real(group.coeff), np.imag(group.coeff)
        coeff = (
            jnp.asarray(group.coeff, psi.dtype) if imag.any() else jnp.asarray(real, psi.real.dtype)
        )
        odd = jax.lax.population_count(source & jnp.asarray(group.z)[:, None]) & 1
        phases = jnp.where(odd == 1, -coeff[:, None], coeff[:, None]).sum(0)  # fused, never J x 2^n
        out = out + phases * (psi if group.x == 0 else _flip(psi, group.x, n))
    return out


def _flip(psi: jax.Array, x: int, n: int) -> jax.Array:
    """psi[k ^ x]: the axes of the flipped qubits reversed, neighbours that stay melted into one axis."""
    shape, axes = [], []
    for q in range(n):
        if x >> (n - 1 - q) & 1:
            axes.append(len(shape))
            shape.append(2)
        elif shape and len(shape) - 1 not in axes:
            shape[-1] *= 2
        else:
            shape.append(2)
    return jnp.flip(psi.reshape(shape), axes).reshape(-1)


def expval(obs: PauliSum, psi: jax.Array) -> jax.Array:
    """<psi|H|psi> f[] for psi c[2^n] of norm 1; its gradient needs no second pass: it is 2 H psi.

    >>> from qlab.quantum.pauli import pauli_sum
    >>> round(float(expval(pauli_sum({"X": 2.0}), jnp.array([0.6, 0.8], jnp.complex64))), 3)
    1.92
    """

    @jax.custom_vjp
    def value(psi):
        return jnp.vdot(psi, apply_pauli_sum(obs, psi)).real

    def forward(psi):
        h_psi = apply_pauli_sum(obs, psi)
        return jnp.vdot(psi, h_psi).real, h_psi

    # JAX's cotangent of a complex number is the conjugate of the direction of steepest ascent.
    value.defvjp(forward, lambda h_psi, g: (2 * g * h_psi.conj(),))
    return value(psi)
