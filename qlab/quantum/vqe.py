"""Variational loops: Adam by autodiff for simulators, Adam-SPSA for sampled energies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.quantum.ansatz import state_of
from qlab.quantum.noise import NO_FIXED_ERRORS, FixedErrors


def minimise(
    energy: Callable[[jax.Array], jax.Array],
    theta: jax.Array,
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Adam on `energy` from theta: the last theta and its energy.

    >>> x, e = minimise(lambda t: (t - 2.0) ** 2, jnp.array(0.0))
    >>> round(float(x), 2)
    2.0
    """
    tx = optax.adam(learning_rate)

    def body(carry, _):
        theta, opt_state = carry
        updates, opt_state = tx.update(jax.grad(energy)(theta), opt_state)
        return (theta + updates, opt_state), None

    (theta, _), _ = jax.lax.scan(body, (theta, tx.init(theta)), None, length=steps)
    return theta, energy(theta)


@functools.partial(jax.jit, static_argnames=("kind", "fixed", "steps", "learning_rate"))
def optimise_ansatz(
    starts: jax.Array,
    h: jax.Array,
    lam1: jax.Array,
    lam2: jax.Array,
    *,
    kind: str = "depol",
    fixed: FixedErrors = NO_FIXED_ERRORS,
    steps: int = 200,
    learning_rate: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """The RY-RZ VQE under noise, best of several restarts.

    Args:
      starts: f[C, restarts, L+1, 2, n]
      h: f[4^n], see `pauli.to_coords`; one compiled program serves every Hamiltonian on n qubits.
      lam1, lam2: noise during the optimisation.
    Returns:
      theta f[C, L+1, 2, n] and the noisy energies f[C] that chose it.
    """

    def energy(theta):
        return h @ state_of(theta, lam1, lam2, kind, fixed)

    run = functools.partial(minimise, energy, steps=steps, learning_rate=learning_rate)
    thetas, energies = jax.vmap(jax.vmap(run))(starts)
    best = energies.argmin(1)
    return jax.vmap(lambda t, b: t[b])(thetas, best), energies.min(1)


class SPSA(NamedTuple):
    """Gains of Adam-SPSA: a_k = a / (k+1)^alpha, c_k = c / (k+1)^gamma, beta1 / (k+1)^lam."""

    a: float = 1.4934
    alpha: float = 0.9931
    c: float = 0.0612
    gamma: float = 0.0253
    lam: float = 0.6104
    beta1: float = 0.8804
    beta2: float = 0.9979
    max_evals: int = 200


DEFAULT_SPSA = SPSA()


def adam_spsa(
    f: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    key: jax.Array,
    hp: SPSA = DEFAULT_SPSA,
) -> tuple[jax.Array, jax.Array, int]:
    """Gradient-free minimisation of a noisy f(x, key) by simultaneous perturbation with Adam moments.

    The first step uses the raw gradient; the moments start after it. Each step asks for three values,
    f(x + c d), f(x - c d) and f at the new point, all counted; the best point seen is returned.

    Returns:
      x of the lowest value seen, that value, and the number of evaluations.
    """
    steps = max(hp.max_evals // 3, 1)

    def body(carry, k):
        x, m, v, best_x, best = carry
        k_sign, k_plus, k_minus, k_new = jax.random.split(jax.random.fold_in(key, k), 4)
        a, c = hp.a / (k + 1.0) ** hp.alpha, hp.c / (k + 1.0) ** hp.gamma
        d = jax.random.rademacher(k_sign, x.shape, x.dtype)
        g = (f(x + c * d, k_plus) - f(x - c * d, k_minus)) / (2 * c * d)
        b1 = hp.beta1 / (k + 1.0) ** hp.lam
        m_new, v_new = b1 * m + (1 - b1) * g, hp.beta2 * v + (1 - hp.beta2) * g**2
        m_hat, v_hat = m_new / (1 - b1 ** (k + 1.0)), v_new / (1 - hp.beta2 ** (k + 1.0))
        first = k == 0
        x = x - a * jnp.where(first, g, m_hat / (jnp.sqrt(v_hat) + 1e-8))
        m, v = jnp.where(first, m, m_new), jnp.where(first, v, v_new)
        value = f(x, k_new)
        better = value < best
        return (x, m, v, jnp.where(better, x, best_x), jnp.where(better, value, best)), None

    start = (x0, jnp.zeros_like(x0), jnp.zeros_like(x0), x0, jnp.asarray(jnp.inf, x0.dtype))
    (_, _, _, best_x, best), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return best_x, best, 3 * steps
