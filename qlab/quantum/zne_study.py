"""The data and the scores of a zero-noise-extrapolation study: what every estimator is given and judged by.

Letters: T = tasks (problem x shots), C = circuits, m = noise levels, s = folding scales.
All energies are (E - Tr H / 2^n) / sum_j |c_j| (identity left out of the sum): 0 is the fully mixed value, and
errors of different Hamiltonians can be pooled. For Z^n this changes nothing.
"""

from __future__ import annotations

import functools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantum import hamiltonians, pauli
from qlab.quantum.ansatz import num_folds, state_of
from qlab.quantum.noise import NO_FIXED_ERRORS, FixedErrors, p_to_lam
from qlab.quantum.vqe import optimise_ansatz, sample_energy
from qlab.quantum.zne_nn import features


class Problem(NamedTuple):
    """A Hamiltonian on n qubits and an ansatz depth."""

    name: str
    hamiltonian: str
    n: int
    depth: int


class StudySpec(NamedTuple):
    """Everything that decides the data (hashable). Fields as in configs/vqe_zne.py."""

    problems: tuple[str, ...]
    depth: int
    shots: tuple[int, ...]
    curve_problem: str
    curve_shots: tuple[int, ...]
    lams: tuple[float, ...]
    scales: tuple[int, ...]
    lam1_over_lam2: float
    noise: str
    noise_convention: str
    fixed: FixedErrors
    num_random: int
    num_vqe: int
    theta_mode: str
    restarts: int
    vqe_steps: int
    vqe_lr: float


class Curves(NamedTuple):
    """What the estimators see (energies, folded), and what judges them (ideal)."""

    energies: jax.Array  # f[T, C, m]
    folded: jax.Array  # f[T, C, s]
    exact: jax.Array  # f[T, C, m], infinite shots
    ideal: jax.Array  # f[T, C]


class Training(NamedTuple):
    """Random circuits with known E(0) for the amortised net."""

    features: jax.Array  # f[B, F]
    raw: jax.Array  # f[B]
    target: jax.Array  # f[B]


def parse_problem(name: str, depth: int) -> Problem:
    """ "tfim_n3" or, with its own depth, "zn_n3_L4".

    >>> parse_problem("zn_n3_L4", 2)
    Problem(name='zn_n3_L4', hamiltonian='zn', n=3, depth=4)
    """
    match = re.fullmatch(r"(\w+?)_n(\d+)(?:_L(\d+))?", name)
    if not match:
        raise UserError(
            f"problem {name!r}; expected <hamiltonian>_n<qubits>, e.g. zn_n3 or tfim_n4_L3"
        )
    return Problem(name, match[1], int(match[2]), int(match[3] or depth))


def shots_label(shots: int) -> str:
    """0 -> "inf", 10000 -> "1e4", 1500 -> "1500"."""
    if shots == 0:
        return "inf"
    power = round(np.log10(shots))
    return f"1e{power}" if 10**power == shots else str(shots)


def tasks(spec: StudySpec) -> tuple[tuple[Problem, int], ...]:
    """The T rows: every problem at every number of shots, then the shots curve of one problem."""
    rows = [(parse_problem(p, spec.depth), s) for p in spec.problems for s in spec.shots]
    if spec.curve_problem:
        extra = [
            s
            for s in spec.curve_shots
            if s not in spec.shots or spec.curve_problem not in spec.problems
        ]
        rows += [(parse_problem(spec.curve_problem, spec.depth), s) for s in extra]
    return tuple(rows)


def levels(spec: StudySpec) -> tuple[np.ndarray, np.ndarray]:
    """(lam1, lam2) f64[m] of the swept points, in Qiskit's convention."""
    lam2 = np.asarray(spec.lams)
    lam1 = lam2 * spec.lam1_over_lam2
    if spec.noise_convention == "pauli_p":  # the swept number is the Pauli error probability
        return p_to_lam(lam1, 1), p_to_lam(lam2, 2)
    if spec.noise_convention != "qiskit":
        raise UserError(f"noise_convention {spec.noise_convention!r}; use 'qiskit' or 'pauli_p'")
    return lam1, lam2


@functools.partial(jax.jit, static_argnames=("kind", "fixed"))
def _states(thetas, lam1, lam2, folds, *, kind, fixed):
    """Read-out Pauli expectations f[C, Q, 4^n] of thetas f[C, Q, L+1, 2, n] at the Q points."""

    def one(theta, l1, l2, k):
        return state_of(theta, l1, l2, kind, fixed, k)

    return jax.vmap(jax.vmap(one), (0, None, None, None))(thetas, lam1, lam2, folds)


def _thetas(key: jax.Array, problem: Problem, spec: StudySpec, h: jax.Array) -> jax.Array:
    """f[C, 1 + m + s, L+1, 2, n]: the circuit of each point; the first one is the noise-free target's."""
    shape = (problem.depth + 1, 2, problem.n)
    k_random, k_start = jax.random.split(key)

    def uniform(k, *lead):
        return jax.random.uniform(k, (*lead, *shape), minval=-np.pi, maxval=np.pi)

    lam1, lam2 = levels(spec)
    points = 1 + len(spec.lams) + len(spec.scales)
    random = jnp.repeat(uniform(k_random, spec.num_random)[:, None], points, 1)
    if not spec.num_vqe:
        return random
    starts = uniform(k_start, spec.num_vqe, spec.restarts)
    optimise = functools.partial(
        optimise_ansatz,
        starts,
        h,
        kind=spec.noise,
        fixed=spec.fixed,
        steps=spec.vqe_steps,
        learning_rate=spec.vqe_lr,
    )
    if spec.theta_mode == "fixed":  # trained where a device would: at its own, the smallest, noise
        best = jnp.repeat(optimise(lam1[0], lam2[0])[0][:, None], points, 1)
    elif (
        spec.theta_mode == "reopt"
    ):  # every level trained from the same starts; folding at the smallest
        each = [optimise(a, b)[0] for a, b in zip([0.0, *lam1], [0.0, *lam2], strict=True)]
        best = jnp.stack(each + [each[1]] * len(spec.scales), 1)
    else:
        raise UserError(f"theta_mode {spec.theta_mode!r}; use 'fixed' or 'reopt'")
    return jnp.concatenate([random, best])


def _observables(problem: Problem) -> tuple[pauli.PauliSum, np.ndarray, np.ndarray]:
    """The Hamiltonian, the flat places of its non-identity terms and their weights c_j / sum |c|."""
    obs = hamiltonians.hamiltonian(problem.hamiltonian, problem.n)
    keep = obs.paulis.any(1)
    return obs, pauli.flat_index(obs)[keep], obs.coeffs[keep] / pauli.weight_norm(obs)


def _pad(values: np.ndarray | jax.Array, width: int) -> jax.Array:
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


_sample = jax.jit(sample_energy)


def _problem_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))  # the same whatever else is studied


def make_curves(key: jax.Array, spec: StudySpec) -> Curves:
    """Circuits, exact curves and sampled curves of all tasks; random circuits first, then VQE's."""
    rows = tasks(spec)
    lam1, lam2 = levels(spec)
    m, num_scales = len(spec.lams), len(spec.scales)
    folds = np.array([0] * (1 + m) + [num_folds(s) for s in spec.scales], np.int32)
    point1 = np.concatenate([[0.0], lam1, np.full(num_scales, lam1[0])])
    point2 = np.concatenate([[0.0], lam2, np.full(num_scales, lam2[0])])
    width = max(len(_observables(p)[1]) for p, _ in rows)
    terms, coeffs, ideal = {}, {}, {}
    for p in {p.name: p for p, _ in rows}.values():
        obs, places, weights = _observables(p)
        thetas = _thetas(_problem_key(key, p.name), p, spec, jnp.asarray(pauli.to_coords(obs)))
        r = _states(thetas, point1, point2, folds, kind=spec.noise, fixed=spec.fixed)[..., places]
        ideal[p.name] = r[:, 0] @ weights
        if spec.fixed != NO_FIXED_ERRORS:  # errors that stay at lam = 0 must not enter the target
            clean = _states(
                thetas[:, :1],
                point1[:1],
                point2[:1],
                folds[:1],
                kind=spec.noise,
                fixed=NO_FIXED_ERRORS,
            )
            ideal[p.name] = clean[:, 0, places] @ weights
        terms[p.name], coeffs[p.name] = _pad(r[:, 1:], width), _pad(weights, width)
    sampled, exact = [], []
    for p, shots in rows:
        k_shots = jax.random.fold_in(_problem_key(jax.random.fold_in(key, 1), p.name), shots)
        exact.append(terms[p.name] @ coeffs[p.name])
        sampled.append(
            _sample(k_shots, terms[p.name], coeffs[p.name], float(shots)) if shots else exact[-1]
        )
    energies, target = jnp.stack(sampled), jnp.stack([ideal[p.name] for p, _ in rows])
    return Curves(energies[..., :m], energies[..., m:], jnp.stack(exact)[..., :m], target)


def make_training(
    key: jax.Array, spec: StudySpec, num_circuits: int, depths: tuple[int, ...]
) -> Training:
    """Random circuits of the study's Hamiltonians and noise, at every number of shots it uses."""
    key = jax.random.fold_in(key, 2)
    base = [parse_problem(p, spec.depth) for p in spec.problems]
    base = [p for p in base if p.depth == spec.depth]
    lam1, lam2 = levels(spec)
    q1, q2 = np.concatenate([[0.0], lam1]), np.concatenate([[0.0], lam2])
    sizes = sorted({p.n for p in base})
    each = max(num_circuits // (len(sizes) * len(depths)), 1)
    width = max(len(_observables(p)[1]) for p in base)
    shots = sorted({s for _, s in tasks(spec)})
    parts = []
    for n in sizes:
        for depth in depths:
            k_theta = _problem_key(key, f"train_n{n}_L{depth}")
            shape = (each, 1, depth + 1, 2, n)
            thetas = jax.random.uniform(k_theta, shape, minval=-np.pi, maxval=np.pi)
            thetas = jnp.repeat(thetas, len(q1), 1)
            r = _states(
                thetas, q1, q2, np.zeros(len(q1), np.int32), kind=spec.noise, fixed=spec.fixed
            )
            clean = r[:, 0]
            if spec.fixed != NO_FIXED_ERRORS:
                zero = np.zeros(1, np.int32)
                clean = _states(
                    thetas[:, :1], q1[:1], q2[:1], zero, kind=spec.noise, fixed=NO_FIXED_ERRORS
                )[:, 0]
            for p in (p for p in base if p.n == n):
                _, places, weights = _observables(p)
                terms, coeffs = _pad(r[:, 1:, places], width), _pad(weights, width)
                for s in shots:
                    k_shots = jax.random.fold_in(_problem_key(k_theta, p.name), s)
                    energies = _sample(k_shots, terms, coeffs, float(s)) if s else terms @ coeffs
                    parts.append(
                        Training(
                            amortised_features(energies, spec, n, depth, s),
                            energies[:, 0],
                            clean[:, places] @ weights,
                        )
                    )
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def amortised_features(
    energies: jax.Array, spec: StudySpec, n: int, depth: int, shots: int
) -> jax.Array:
    """f[..., 2m + 3]: see `zne_nn.features`, and 1 / sqrt(shots)."""
    out = features(energies, jnp.asarray(spec.lams), jnp.asarray(n), jnp.asarray(depth))
    noise = jnp.full((*out.shape[:-1], 1), shots**-0.5 if shots else 0.0, out.dtype)
    return jnp.concatenate([out, noise], -1)


def score(estimates: jax.Array, curves: Curves, spec: StudySpec) -> dict[str, Any]:
    """Result metrics of estimates f[T, C], by task and pooled over the problems of the standard depth.

    median_error, p90_error: of |estimate - ideal| over circuits. bias: rms over circuits of the error at
    infinite shots. spread: rms over circuits of (estimate - the estimate at infinite shots). mse: mean
    squared error. win_share: % of circuits with a smaller error than the raw point of the same curve.
    """
    rows = tasks(spec)
    error = estimates - curves.ideal
    raw_error = curves.energies[..., 0] - curves.ideal
    exact_row = {p.name: i for i, (p, s) in enumerate(rows) if s == 0}
    partner = [exact_row.get(p.name, -1) for p, _ in rows]
    groups: dict[str, tuple[list[int], slice]] = {}
    standard = len(spec.problems) * len(spec.shots)  # the rows before the shots curve
    for i, (p, s) in enumerate(rows[:standard]):
        groups[f"{p.name}_{shots_label(s)}"] = ([i], slice(None))
        if p.depth != spec.depth:
            continue
        for kind, part in (
            ("random", slice(0, spec.num_random)),
            ("vqe", slice(spec.num_random, None)),
        ):
            if part != slice(0, 0) and (kind == "random" or spec.num_vqe):
                groups.setdefault(f"{kind}_{shots_label(s)}", ([], part))[0].append(i)
    metrics: dict[str, Any] = {}
    for name, (picked, part) in groups.items():
        e, raw = (
            error[jnp.array(picked), part].reshape(-1),
            raw_error[jnp.array(picked), part].reshape(-1),
        )
        metrics |= {
            f"{name}/median_error": jnp.median(jnp.abs(e)),
            f"{name}/p90_error": jnp.quantile(jnp.abs(e), 0.9),
            f"{name}/mse": (e**2).mean(),
            f"{name}/win_share": 100.0 * (jnp.abs(e) < jnp.abs(raw)).mean(),
        }
        if all(partner[i] >= 0 for i in picked):
            at_inf = error[jnp.array([partner[i] for i in picked]), part].reshape(-1)
            metrics[f"{name}/bias"] = jnp.sqrt((at_inf**2).mean())
            metrics[f"{name}/spread"] = jnp.sqrt(((e - at_inf) ** 2).mean())
    on_curve = [i for i, (p, s) in enumerate(rows) if p.name == spec.curve_problem and s]
    on_curve.sort(key=lambda i: rows[i][1])
    if len(on_curve) > 1:
        metrics["shots"] = jnp.array([float(rows[i][1]) for i in on_curve])
        metrics["error_by_shots"] = jnp.median(jnp.abs(error[jnp.array(on_curve)]), 1)
    return metrics
