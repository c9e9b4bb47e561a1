"""CRLQAS's environment: E circuits grow side by side, their angles re-optimised after every gate.

A step: place the gate, re-optimise all angles from where they are, measure, reward, end or go on. The reward is
+5 if |E - e_ref| < xi, else -5 at the D-th gate, else clip((E_before - E) / |E_before - e_ref|, -1, 1). The threshold xi, the best
energy so far and the records are shared by the E episodes; an episode that ends starts the next one, numbered in
order of start, and the threshold counts episodes in order of their end (those of one step by place).
`lag_optimisation`: as CRLQAS's noiseless code, the circuit without the new gate is optimised, then measured with it
at angle 0.

Energies are the search's own: noisy and sampled where the problem is. What it never sees is the true ground energy
and the noiseless energy of its circuits; from them come the records (`Records`), of which an episode's success, a
noiseless error below 1.6e-3 hartree at any step, is one.
A random halt ends an episode without the -5. To the agent it is an end like the others (the paper's code), so that a
circuit is worth more the sooner it is good; `Switches.halt_ends` = False lets targets look beyond it instead.
Letters: E = episodes side by side, D = most gates, A = actions, F = features, L = episodes of the study.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum import moving_threshold as mt
from qlab.quantum import placement as pm
from qlab.quantum import ptm as pt
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.angle_search import Settings, angle_search
from qlab.quantum.noise_model import NoiseModel
from qlab.quantum.pauli import PauliSum, ground_energy, identity_part, to_coords, weight_norm

CHEMICAL_ACCURACY = 1.6e-3  # hartree
BONUS = 5.0
HALTING_DRAWS = 100  # of which the most frequent is taken

Obs = tuple[Any, jax.Array]  # ((grid i8[F], energy f32[]), legal bool[A])


class Task(NamedTuple):
    """What is searched, and how it is measured.

    Attributes:
      observable: H. max_gates: D. noise: after gates and at readout. shots: of one energy, 0 = exact.
      optimiser: of the angles. lag_optimisation: see the module.
    """

    observable: PauliSum
    max_gates: int
    noise: NoiseModel = NoiseModel()
    shots: int = 0
    optimiser: Settings = Settings()
    lag_optimisation: bool = False


class Switches(NamedTuple):
    """Parts of the method as numbers in the state, so that arms without one of them share the program.

    Attributes:
      masked: illegal actions are told and forbidden. halting: random lengths. halt_ends: they are terminal.
      table: f[D+1], `moving_threshold.halting_table`. threshold: before the first episode.
    """

    masked: Any
    halting: Any
    halt_ends: Any
    table: Any
    threshold: mt.Threshold


class Found(NamedTuple):
    """A circuit: its actions i32[D] and angles f[D] in order of insertion, gates, depth, cnots i32[], the energy the
    search saw and its noiseless error f[]."""

    action: jax.Array
    angles: jax.Array
    gates: jax.Array
    depth: jax.Array
    cnots: jax.Array
    energy: jax.Array
    error: jax.Array


class Records(NamedTuple):
    """Known to the report only.

    Attributes:
      solved: i32[L], by number of the episode: gates when it first came within chemical accuracy, 0 if it never
        did, -1 while it has not ended. length: i32[L], gates at its end.
      lowest: the circuit of lowest search energy. shortest: of fewest gates with a noiseless error below
        chemical accuracy, of those the lowest error; gates, depth and cnots are D + 1 where there is none.
      energies: f64[], energies the inner optimiser asked for, and one a step. least_error: f[], noiseless.
    """

    solved: jax.Array
    length: jax.Array
    lowest: Found
    shortest: Found
    energies: jax.Array
    least_error: jax.Array


class EnvState(NamedTuple):
    """circuit: Placed[E]. angles: f[E, D]. energy: f[E], before the next gate. cap, number: i32[E]. solved:
    i32[E], as in Records, of the circuit that grows. The rest is shared: best energy f[], next number i32[], switches, records."""

    circuit: pm.Placed
    angles: jax.Array
    energy: jax.Array
    cap: jax.Array
    number: jax.Array
    solved: jax.Array
    best: jax.Array
    upcoming: jax.Array
    switches: Switches
    records: Records


class Step(NamedTuple):
    """obs: the next ones. reward: f32[E]. terminated, truncated: bool[E]. final_obs: before any reset."""

    obs: Obs
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: Obs


class ArchitectureEnv(NamedTuple):
    """reset: (key, switches) -> (state, obs[E]). step: (state, action i32[E], key) -> (state, Step).
    num_actions, num_features: A, F + 1. num_envs: E. e_ref: the lower bound. e_true: the ground energy."""

    reset: Callable[[jax.Array, Switches], tuple[EnvState, Obs]]
    step: Callable[[EnvState, jax.Array, jax.Array], tuple[EnvState, Step]]
    num_actions: int
    num_features: int
    num_envs: int
    e_ref: float
    e_true: float


def lower_bound(observable: PauliSum) -> float:
    """Energy no state can go below: every Pauli string at its minimum (`fake_min_energy` in CRLQAS's code)."""
    return identity_part(observable) - weight_norm(observable)


def shot_sigma(observable: PauliSum, shots: int) -> float | None:
    """Standard deviation of a sampled energy, sqrt(sum w_j^2 / shots); None for exact ones (shots = 0)."""
    if shots < 0:
        raise UserError(f"shots={shots}; 0 is exact, otherwise a positive number")
    w = observable.coeffs[observable.paulis.any(1)]
    return float(np.sqrt((w**2).sum() / shots)) if shots else None


def reward_of(
    e: jax.Array, before: jax.Array, e_ref: jax.Array, success: jax.Array, last: jax.Array
) -> jax.Array:
    """f32[...], the incremental reward with fixed ends."""
    gain = jnp.clip((before - e) / jnp.abs(before - e_ref), -1.0, 1.0)
    return jnp.where(success, BONUS, jnp.where(last, -BONUS, gain)).astype(jnp.float32)


def architecture_env(task: Task, num_envs: int, num_episodes: int) -> ArchitectureEnv:
    """E = num_envs episodes side by side; the first num_episodes are recorded.

    Raises:
      UserError: sizes below one, an unknown optimiser, shots with one that has none.
    """
    if num_envs < 1 or num_episodes < 1:
        raise UserError(f"num_envs={num_envs}, episodes={num_episodes}; give at least 1 of each")
    obs_h, n, d = task.observable, task.observable.num_qubits, task.max_gates
    sigma = shot_sigma(obs_h, task.shots)
    search = angle_search(task.optimiser)
    if sigma is not None and task.optimiser.name == "adam":
        raise UserError("optimiser=adam differentiates exact energies; with shots use adam_spsa")
    noisy, clean = pc.noise_tables(task.noise, n), pc.noise_tables(NoiseModel(), n)
    h_noisy, h_clean = (pc.effective_observable(to_coords(obs_h), t) for t in (noisy, clean))
    e_true = ground_energy(obs_h)
    blank = pm.empty(d, n)
    same = all(np.array_equal(a, b) for a, b in zip(noisy, clean, strict=True))

    def wire(circuit: pm.Placed, tables: pc.NoiseTables) -> pc.Wiring:
        return jax.vmap(lambda c: pc.wiring(pm.sequence(c), tables, n))(circuit)

    def optimise(circuit: pm.Placed, wires: pc.Wiring, angles: jax.Array, key: jax.Array):
        order, keys = jax.vmap(pm.angle_order)(circuit), jax.random.split(key, num_envs)
        one = lambda w, a, o, k: search(w, a, o, h_noisy, sigma, k)  # noqa: E731
        angles, asked = jax.vmap(one)(wires, angles, order, keys)
        return jnp.where(wires.turns, angles, 0.0), asked

    def measure(wires: pc.Wiring, angles: jax.Array, h: jax.Array) -> jax.Array:
        return jax.vmap(lambda w, a: pc.energy(w, a, h))(wires, angles)

    def observe(circuit: pm.Placed, e: jax.Array, masked: jax.Array) -> Obs:
        legal = jax.vmap(pm.legal_mask)(circuit) | ~masked
        return (circuit.grid.reshape(num_envs, -1), e.astype(jnp.float32)), legal

    def caps(switches: Switches, key: jax.Array) -> jax.Array:
        drawn = mt.halting_cap(key, switches.table, HALTING_DRAWS, num_envs)
        return jnp.where(switches.halting, drawn, d)

    # |0..0>, measured: the energy before the first gate
    start = h_noisy @ pt.zero_state(max(n, 2), h_noisy.dtype)

    def fresh() -> tuple[pm.Placed, jax.Array, jax.Array]:
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_envs, *x.shape)), blank)
        return many, jnp.zeros((num_envs, d), h_noisy.dtype), jnp.full(num_envs, start)

    def nothing() -> Found:
        none, top = jnp.int32(d + 1), jnp.asarray(jnp.inf, h_noisy.dtype)
        empty_angles = jnp.zeros(d, h_noisy.dtype)
        return Found(blank.action, empty_angles, none, none, none, top, top)

    def reset(key: jax.Array, switches: Switches) -> tuple[EnvState, Obs]:
        circuit, angles, e = fresh()
        rule = switches.threshold.rule
        records = Records(
            jnp.full(num_episodes, -1, jnp.int32),
            jnp.zeros(num_episodes, jnp.int32),
            nothing(),
            nothing(),
            jnp.zeros((), h_noisy.dtype),
            jnp.asarray(jnp.inf, h_noisy.dtype),
        )
        state = EnvState(
            circuit,
            angles,
            e,
            caps(switches, key),
            jnp.arange(num_envs, dtype=jnp.int32),
            jnp.zeros(num_envs, jnp.int32),
            jnp.asarray(rule.e_ref + switches.threshold.xi, h_noisy.dtype),
            jnp.int32(num_envs),
            switches,
            records,
        )
        return state, observe(circuit, e, switches.masked)

    def better(old: Found, new: Found, rank: Callable[[Found], tuple], valid: jax.Array) -> Found:
        """The first in order of rank (lexicographic) of the old one and the valid ones of new[E]."""
        pool = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), old, new)
        ok = jnp.concatenate([jnp.ones(1, bool), valid])
        first, second = rank(pool)
        first = jnp.where(ok, first, jnp.inf)
        second = jnp.where(ok & (first == first.min()), second, jnp.inf)
        return jax.tree.map(lambda x: x[second.argmin()], pool)

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, Step]:
        sw, rule = state.switches, state.switches.threshold.rule
        k_angles, k_shots, k_caps = jax.random.split(key, 3)
        index = state.circuit.count
        grown = jax.vmap(pm.place)(state.circuit, action)
        wires = wire(grown, noisy)
        if task.lag_optimisation:
            old_wires = wire(state.circuit, noisy)
            angles, asked = optimise(state.circuit, old_wires, state.angles, k_angles)
        else:
            angles, asked = optimise(grown, wires, state.angles, k_angles)
        e = exact = measure(wires, angles, h_noisy)
        bare = exact if same else measure(wire(grown, clean), angles, h_clean)
        if sigma is not None:
            e = e + sigma * jax.random.normal(k_shots, e.shape, e.dtype)
        success = jnp.abs(e - rule.e_ref) < sw.threshold.xi
        last = grown.count >= d
        halted = index == state.cap
        terminated = success | last | (halted & sw.halt_ends)
        truncated = halted & ~terminated
        over = terminated | truncated
        reward = reward_of(e, state.energy, rule.e_ref, success, last)
        best = jnp.minimum(state.best, e.min())

        def end(cur, x):
            new = mt.moving_threshold_update(cur, x[1], best)
            return jax.tree.map(lambda a, b: jnp.where(x[0], a, b), new, cur), None

        threshold, _ = jax.lax.scan(end, sw.threshold, (over, success))
        error = jnp.abs(bare - e_true)
        hit = error < CHEMICAL_ACCURACY
        solved = jnp.where((state.solved == 0) & hit, grown.count, state.solved)
        cnots = (grown.action < n * (n - 1)).sum(1, dtype=jnp.int32)
        found = Found(
            grown.action, angles, grown.count, jax.vmap(lambda c: c.depth)(grown), cnots, e, error
        )
        old = state.records
        at = jnp.where(over, state.number, num_episodes)  # beyond the end: dropped
        counted = state.number < num_episodes  # later episodes only keep the others company
        records = Records(
            old.solved.at[at].set(solved, mode="drop"),
            old.length.at[at].set(grown.count, mode="drop"),
            better(old.lowest, found, lambda f: (f.energy, f.gates), counted),
            better(old.shortest, found, lambda f: (f.gates, f.error), counted & hit),
            old.energies + (counted * (asked + 1)).sum(),
            jnp.minimum(old.least_error, jnp.where(counted, error, jnp.inf).min()),
        )
        final_obs = observe(grown, e, sw.masked)
        blank_circuit, zero, first = fresh()

        def pick(new, old):
            return jnp.where(over.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        circuit = jax.tree.map(pick, blank_circuit, grown)
        energy = pick(first, e)
        rank = jnp.cumsum(over) - 1
        new = EnvState(
            circuit,
            pick(zero, angles),
            energy,
            pick(caps(sw, k_caps), state.cap),
            pick(state.upcoming + rank.astype(jnp.int32), state.number),
            jnp.where(over, 0, solved),
            best,
            state.upcoming + over.sum(dtype=jnp.int32),
            sw._replace(threshold=threshold),
            records,
        )
        obs = observe(circuit, energy, sw.masked)
        return new, Step(obs, reward, terminated, truncated, final_obs)

    features = d * n * (n + 3) + 1
    return ArchitectureEnv(
        reset, step, pm.num_actions(n), features, num_envs, lower_bound(obs_h), e_true
    )
