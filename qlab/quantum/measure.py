"""What a circuit gives to the net around it: <Z_q>, exact, sampled or noisy, and with which gradient.

"backprop" differentiates the simulator. "parameter-shift" asks only for values, as a device could give them: every
gate exp(-i phi_g P / 2) is shifted by itself,
    d q / d phi_g = (q(phi + pi/2 e_g) - q(phi - pi/2 e_g)) / 2,
and an angle that several gates share gets its derivative by the chain rule of the map into phi. (Shifting a shared
angle itself is wrong: on the ring of four it gives 0 where the derivative is 1.67.) That costs 2 G runs a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.quantum import columns as col

GRADS = ("backprop", "parameter-shift")
Measure = Callable[[jax.Array, jax.Array], jax.Array]


def shift_jacobian(f: Callable[[jax.Array, jax.Array], jax.Array], phi, key) -> jax.Array:
    """d f / d phi f[G, ...] by shifting each gate alone; f(phi, key), every run with a key of its own."""
    num = phi.shape[0]
    shifts = (jnp.pi / 2) * jnp.concatenate([jnp.eye(num), -jnp.eye(num)]).astype(phi.dtype)
    runs = jax.vmap(f)(phi + shifts, jax.random.split(key, 2 * num))
    return (runs[:num] - runs[num:]) / 2


def param_shift_grad(f: Callable[[jax.Array], jax.Array], phi: jax.Array) -> jax.Array:
    """The gradient f[G] of a scalar f of gate angles phi f[G], two runs a gate.

    >>> param_shift_grad(lambda phi: jnp.cos(phi[0]) * jnp.sin(phi[1]), jnp.zeros(2)).round(6).tolist()
    [0.0, 1.0]
    """
    return shift_jacobian(lambda x, _: f(x), phi, jax.random.key(0))


def sample_outcomes(key: jax.Array, probs: jax.Array, shots: int) -> jax.Array:
    """i[shots]: joint outcomes drawn from probs f[2^n], which need not be normalised."""
    total = jnp.cumsum(probs)
    drawn = jax.random.uniform(key, (shots,), probs.dtype) * total[-1]
    return jnp.minimum(jnp.searchsorted(total, drawn, side="right"), probs.size - 1)


def sample_bits(key: jax.Array, probs: jax.Array, n: int, shots: int) -> jax.Array:
    """f[n]: means of Z over `shots` joint outcomes drawn from probs f[2^n] (all qubits of one run together)."""
    outcome = sample_outcomes(key, probs, shots)
    return jnp.asarray(col.z_signs(n), probs.dtype)[:, outcome].mean(1)


def measure(
    columns: col.Columns, n: int, *, grad: str = "backprop", shots: int = 0, depol: float = 0.0
) -> Measure:
    """(phi f[G], key) -> q f[n], q_i = <Z_i>; one sample, batch with vmap.

    Args:
      grad: "backprop" or "parameter-shift". shots: outcomes a run, 0 = the exact expectation. With backprop the
        gradient is the exact one even where the value is sampled; with parameter-shift every shifted run is
        sampled too.
      depol: probability of a Pauli error after each gate; above 0 the Pauli-coordinate simulator runs.
    Raises:
      UserError: an unknown gradient, negative shots, or a probability outside [0, 1].
    """
    if grad not in GRADS:
        raise UserError(f"grad {grad!r} is unknown{nearest(grad, GRADS)}")
    if shots < 0:
        raise UserError(f"shots={shots}; give the number of runs, or 0 for exact expectations")
    if not 0.0 <= depol <= 1.0:
        raise UserError(f"depol={depol}; it is a probability, from 0 to 1")
    if depol:
        probs = functools.partial(col.noisy_probabilities, columns, n, depol=depol)
    else:
        probs = functools.partial(col.probabilities, columns, n)

    def value(phi, key):
        p = probs(phi)
        return sample_bits(key, p, n, shots) if shots else col.mean_z(p, n)

    if grad == "backprop":
        if not shots:
            return value

        def straight_through(phi, key):
            p = probs(phi)
            q = col.mean_z(p, n)
            return q + jax.lax.stop_gradient(sample_bits(key, p, n, shots) - q)

        return straight_through

    @jax.custom_vjp
    def shifted(phi, key):
        return value(phi, key)

    def forward(phi, key):
        return value(phi, jax.random.fold_in(key, 0)), (phi, key)

    def backward(saved, g):
        phi, key = saved
        return shift_jacobian(value, phi, jax.random.fold_in(key, 1)) @ g, None

    shifted.defvjp(forward, backward)
    return shifted
