"""Inner optimisers of architecture search: the angles of a circuit under construction, from where they are.

rotosolve    each angle in turn to the exact minimum of its sinusoid, until nothing moves (Ostaszewski et al. 2021);
             with shots, from three noisy energies. Three energies an angle and sweep. From a warm start alone it often
             stays at a saddle (all angles 0 or pi are one), so it may also try `restarts` random starts, one more
             energy each, and keep the best end.
adam         exact gradients (parameter shift on a device: two energies an angle and step); no shots.
adam_spsa    `vqe.adam_spsa`; three_stage: the same three times, with N/100, N/10 and N shots and 10 : 3 : 1 of the budget;
             spsa: plain gradient steps with the same gains.
cobyla       SciPy, on the host, one circuit after another.

A new angle is 0. SPSA and Adam first set the last one, in the order (moment, axis, qubit), to U(0, 0.1), as CRLQAS's
code does: at 0 a gradient often vanishes by symmetry. Shots add sigma g to every energy, g ~ N(0, 1): a Gaussian
surrogate, sigma = sqrt(sum w_j^2 / N_shots), w the Pauli weights.
Letters: G = slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.errors import UserError, nearest
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.vqe import DEFAULT_SPSA, SPSA, adam_spsa

OPTIMISERS = ("rotosolve", "adam", "adam_spsa", "three_stage", "spsa", "cobyla")
STAGES = ((10.0, 10), (10.0**0.5, 3), (1.0, 1))  # sigma's factor, share of the evaluations
TINY = 1e-8  # radians: less than this is no move
TIE = 1e-9  # hartree: a fresh start has to be better by this


class Settings(NamedTuple):
    """name: one of OPTIMISERS. steps: sweeps of rotosolve, steps of adam. restarts: of rotosolve. learning_rate: of adam.
    max_evals: of adam_spsa, three_stage, spsa and cobyla. spsa: gains."""

    name: str = "rotosolve"
    steps: int = 20
    restarts: int = 0
    learning_rate: float = 0.1
    max_evals: int = 100
    spsa: SPSA = DEFAULT_SPSA


# (wires, angles f[G], order i32[G], h, sigma f[] or None: exact, key) -> angles f[G], energies asked for i32[]
Search = Callable[..., tuple[jax.Array, jax.Array]]


def plain_spsa(f, x0, key, hp: SPSA) -> tuple[jax.Array, jax.Array, int]:
    """x - a_k g_k with simultaneous perturbations; interface and count as in `vqe.adam_spsa`."""
    steps = max(hp.max_evals // 3, 1)

    def body(carry, k):
        x, best_x, best = carry
        k_sign, k_plus, k_minus, k_new = jax.random.split(jax.random.fold_in(key, k), 4)
        a, c = hp.a / (k + 1.0) ** hp.alpha, hp.c / (k + 1.0) ** hp.gamma
        d = jax.random.rademacher(k_sign, x.shape, x.dtype)
        x = x - a * (f(x + c * d, k_plus) - f(x - c * d, k_minus)) / (2 * c * d)
        value = f(x, k_new)
        return (
            x,
            jnp.where(value < best, x, best_x),
            jnp.minimum(value, best),
        ), None

    start = (x0, x0, jnp.asarray(jnp.inf, x0.dtype))
    (_, best_x, best), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return best_x, best, 3 * steps


def _rotosolve(s: Settings) -> Search:
    def one(wires, angles, h, sigma, key):
        def sweep(carry):
            angles, _, i = carry
            draw = jax.random.fold_in(key, i), (*angles.shape, 3), h.dtype
            shots = None if sigma is None else sigma * jax.random.normal(*draw)
            new = pc.descend(wires, angles, h, shots)
            moved = jnp.abs(jnp.sin((new - angles) / 2)).max()
            return new, moved, i + 1

        def goes_on(carry):
            return (carry[2] < s.steps) & (carry[1] > TINY)

        start = (angles, jnp.asarray(jnp.inf, h.dtype), jnp.int32(0))
        angles, _, sweeps = jax.lax.while_loop(goes_on, sweep, start)
        return angles, 3 * sweeps * wires.turns.sum()

    def run(wires, angles, order, h, sigma, key):
        del order
        if not s.restarts:
            return one(wires, angles, h, sigma, key)
        k_starts, k_shots, k_pick = jax.random.split(key, 3)
        shape = (s.restarts, *angles.shape)
        fresh = jax.random.uniform(k_starts, shape, angles.dtype, 0.0, 2 * np.pi)
        starts = jnp.concatenate([angles[None], fresh])
        keys = jax.random.split(k_shots, len(starts))
        ends, asked = jax.vmap(lambda x, k: one(wires, x, h, sigma, k))(starts, keys)
        e = jax.vmap(lambda x: pc.energy(wires, x, h))(ends)
        if sigma is not None:
            e = e + sigma * jax.random.normal(k_pick, e.shape, e.dtype)
        first = jnp.arange(len(starts)) == 0  # of equal ones the warm start
        return ends[jnp.where(first, e - TIE, e).argmin()], asked.sum() + len(starts)

    return run


def _nudge(angles, order, key):
    """The last rotation's angle becomes U(0, 0.1)."""
    fresh = 0.1 * jax.random.uniform(key, (), angles.dtype)
    return jnp.where((order == order.max()) & (order >= 0), fresh, angles)


def _adam(s: Settings) -> Search:
    tx = optax.adam(s.learning_rate)

    def run(wires, angles, order, h, sigma, key):
        if sigma is not None:
            raise UserError(
                "optimiser='adam' differentiates exact energies; with shots use adam_spsa"
            )

        def body(carry, _):
            x, opt_state, best_x, best = carry
            _, b, c = pc.slices(wires, x, h).T
            updates, opt_state = tx.update(
                (c * jnp.cos(x) - b * jnp.sin(x)) * wires.turns, opt_state
            )
            x = x + updates
            value = pc.energy(wires, x, h)
            better = value < best
            return (x, opt_state, jnp.where(better, x, best_x), jnp.minimum(value, best)), None

        x = _nudge(angles, order, key)
        start = (x, tx.init(x), x, pc.energy(wires, x, h))
        (_, _, x, _), _ = jax.lax.scan(body, start, None, length=s.steps)
        return x, s.steps * (2 * wires.turns.sum() + 1)

    return run


def _spsa(s: Settings) -> Search:
    stages = STAGES if s.name == "three_stage" else ((1.0, 1),)
    whole = sum(share for _, share in stages)
    method = plain_spsa if s.name == "spsa" else adam_spsa

    def run(wires, angles, order, h, sigma, key):
        x, total = _nudge(angles, order, jax.random.fold_in(key, 0)), 0
        for i, (factor, share) in enumerate(stages):

            def f(x, k, factor=factor):
                e = pc.energy(wires, x, h)
                return (
                    e if sigma is None else e + factor * sigma * jax.random.normal(k, (), e.dtype)
                )

            hp = s.spsa._replace(max_evals=s.max_evals * share // whole)
            x, _, spent = method(f, x, jax.random.fold_in(key, i + 1), hp)
            total += spent
        return x, jnp.int32(total)

    return run


def host_energy(maps: Any, into: Any, h: Any, angles: Any) -> float:
    """`ptm_circuit.energy` in NumPy float64."""
    x = np.ones(1)
    while x.size < h.size:
        x = np.kron(x, [1.0, 0.0, 0.0, 1.0])
    for m, p, t in zip(maps, into[:-1], angles, strict=True):
        x = ((m[0] + np.cos(t) * m[1] + np.sin(t) * m[2]) @ x[p].reshape(16, -1)).reshape(-1)
    return float(h @ x[into[-1]])


def _cobyla(s: Settings) -> Search:
    def solve(maps, into, turns, angles, h, sigma, seed):
        from scipy.optimize import minimize

        maps, into, turns, angles, h = (np.asarray(a) for a in (maps, into, turns, angles, h))
        rng, live = np.random.default_rng(int(seed)), np.flatnonzero(turns)
        if not live.size:
            return angles, np.int32(0)

        def f(x):
            full = angles.astype(np.float64)
            full[live] = x
            return host_energy(maps, into, h, full) + float(sigma) * rng.standard_normal()

        found: Any = minimize(f, angles[live], method="COBYLA", options={"maxiter": s.max_evals})
        out = angles.copy()
        out[live] = found.x
        return out, np.int32(found.nfev)

    def run(wires, angles, order, h, sigma, key):
        del order
        seed = jax.random.randint(key, (), 0, 2**31 - 1)
        shapes = (
            jax.ShapeDtypeStruct(angles.shape, angles.dtype),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        noise = jnp.zeros((), h.dtype) if sigma is None else sigma
        given = (wires.maps, wires.into, wires.turns, angles, h, noise, seed)
        return jax.pure_callback(solve, shapes, *given, vmap_method="sequential")

    return run


def angle_search(s: Settings) -> Search:
    """The optimiser as a function of one circuit; jittable, vmappable.

    Raises:
      UserError: an unknown name, or a budget below one step.
    """
    makers = {"rotosolve": _rotosolve, "adam": _adam, "cobyla": _cobyla}
    if s.name not in OPTIMISERS:
        raise UserError(f"optimiser={s.name!r} is not known{nearest(s.name, OPTIMISERS)}")
    least = {"three_stage": 42, "cobyla": 1}.get(s.name, 3)
    if s.name in ("rotosolve", "adam"):
        if s.steps < 1 or s.restarts < 0:
            raise UserError(
                f"steps={s.steps}, restarts={s.restarts} of {s.name}: give at least 1 and 0"
            )
    elif s.max_evals < least:
        raise UserError(f"max_evals={s.max_evals} of {s.name}: one step needs {least}")
    return makers.get(s.name, _spsa)(s)
