"""The data and the scores of a zero-noise-extrapolation study: what every estimator is given and judged by.

Letters: T = tasks (problem x shots), C = circuits, m = points of a curve, s = folding scales.
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
from qlab.quantum.vqe import optimise_ansatz


class Problem(NamedTuple):
    """A Hamiltonian on n qubits and an ansatz depth."""

    name: str
    hamiltonian: str
    n: int
    depth: int


class StudySpec(NamedTuple):
    """Everything that decides the data (hashable)."""

    problems: tuple[str, ...]  # "tfim_n3", or "zn_n3_L4" with its own depth
    depth: int  # entangling blocks of the others
    shots: tuple[int, ...]  # of every problem; 0 = exact
    curve_problem: str  # measured at curve_shots too; "" = none
    curve_shots: tuple[int, ...]
    lams: tuple[float, ...]  # swept noise levels, two-qubit gates
    scales: tuple[int, ...]  # folding scales
    amplify: str = (
        "lam"  # the curve's points: "lam" = the levels, "fold" = scales at the first level
    )
    lam1_over_lam2: float = 1.0
    noise: str = "depol"
    noise_convention: str = "qiskit"
    fixed: FixedErrors = NO_FIXED_ERRORS
    num_random: int = 10
    num_vqe: int = 10
    theta_mode: str = "fixed"
    restarts: int = 3
    vqe_steps: int = 200
    vqe_lr: float = 0.1


class Curves(NamedTuple):
    """What the estimators see (energies, folded), and what judges them (the others)."""

    energies: jax.Array  # f[T, C, m]
    folded: jax.Array  # f[T, C, s]
    exact: jax.Array  # f[T, C, m], infinite shots
    ideal: jax.Array  # f[T, C], no noise


class Training(NamedTuple):
    """Random circuits with known E(0) for the amortised net."""

    features: jax.Array  # f[B, F]
    raw: jax.Array  # f[B]
    target: jax.Array  # f[B]


class Points(NamedTuple):
    """Where a circuit is run: noise after one- and two-qubit gates, and how often gates are folded."""

    lam1: np.ndarray  # f64[Q]
    lam2: np.ndarray  # f64[Q]
    folds: np.ndarray  # i32[Q]


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
        known = spec.shots if spec.curve_problem in spec.problems else ()
        curve = parse_problem(spec.curve_problem, spec.depth)
        rows += [(curve, s) for s in spec.curve_shots if s not in known]
    return tuple(rows)


def coordinates(spec: StudySpec) -> tuple[float, ...]:
    """The m noise levels an estimator is told: the swept ones, or scale times the first."""
    return spec.lams if spec.amplify == "lam" else tuple(spec.lams[0] * s for s in spec.scales)


def _levels(spec: StudySpec) -> tuple[np.ndarray, np.ndarray]:
    """(lam1, lam2) f64 of the swept levels, in Qiskit's convention."""
    lam2 = np.asarray(spec.lams)
    lam1 = lam2 * spec.lam1_over_lam2
    if spec.noise_convention == "pauli_p":  # the swept number is the Pauli error probability
        return p_to_lam(lam1, 1), p_to_lam(lam2, 2)
    if spec.noise_convention != "qiskit":
        raise UserError(f"noise_convention {spec.noise_convention!r}; use 'qiskit' or 'pauli_p'")
    return lam1, lam2


def _points(spec: StudySpec) -> Points:
    """The noise-free point, the m points of the curve, the s folded ones."""
    lam1, lam2 = _levels(spec)
    folds = np.array([num_folds(s) for s in spec.scales], np.int32)
    fold = Points(np.full(len(folds), lam1[0]), np.full(len(folds), lam2[0]), folds)
    if spec.amplify not in ("lam", "fold"):
        raise UserError(f"amplify {spec.amplify!r}; use 'lam' or 'fold'")
    swept = Points(lam1, lam2, np.zeros(len(lam1), np.int32)) if spec.amplify == "lam" else fold
    zero = Points(np.zeros(1), np.zeros(1), np.zeros(1, np.int32))
    return Points(*(np.concatenate(parts) for parts in zip(zero, swept, fold, strict=True)))


@functools.partial(jax.jit, static_argnames=("kind", "fixed"))
def _states(thetas, points, *, kind, fixed):
    """Read-out Pauli expectations f[C, Q, 4^n] of thetas f[C, Q, L+1, 2, n]."""

    def one(theta, point):
        return state_of(theta, point.lam1, point.lam2, kind, fixed, point.folds)

    return jax.vmap(jax.vmap(one), (0, None))(thetas, points)


def _run(thetas: np.ndarray, points: Points, spec: StudySpec) -> np.ndarray:
    """f[C, Q, 4^n], the first point without any error (fixed ones must not enter the target)."""
    r = np.asarray(_states(thetas, points, kind=spec.noise, fixed=spec.fixed))
    if spec.fixed == NO_FIXED_ERRORS:
        return r
    first = Points(*(a[:1] for a in points))
    clean = _states(thetas[:, :1], first, kind=spec.noise, fixed=NO_FIXED_ERRORS)
    return np.concatenate([clean, r[:, 1:]], 1)


def _angles(key: jax.Array, *shape: int) -> np.ndarray:
    """U(-pi, pi) f[*shape], cut from draws of a round size so that few programs serve all shapes."""
    size = int(np.prod(shape))
    draws = jax.random.uniform(key, (_round_size(size),), minval=-np.pi, maxval=np.pi)
    return np.asarray(draws)[:size].reshape(shape)


def _round_size(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 4096)


def _thetas(key: jax.Array, problem: Problem, spec: StudySpec, points: Points) -> np.ndarray:
    """f[C, Q, L+1, 2, n]: the circuit of each point; the first one is the noise-free target's."""
    shape = (problem.depth + 1, 2, problem.n)
    k_random, k_start = jax.random.split(key)
    num = len(points.folds)
    random = np.repeat(_angles(k_random, spec.num_random, *shape)[:, None], num, 1)
    if not spec.num_vqe:
        return random
    h = pauli.to_coords(hamiltonians.hamiltonian(problem.hamiltonian, problem.n))
    starts = _angles(k_start, spec.num_vqe, spec.restarts, *shape)

    def optimise(lam1, lam2):
        theta, _ = optimise_ansatz(
            starts,
            h.astype(starts.dtype),
            lam1,
            lam2,
            kind=spec.noise,
            fixed=spec.fixed,
            steps=spec.vqe_steps,
            learning_rate=spec.vqe_lr,
        )
        return np.asarray(theta)

    if (
        spec.theta_mode == "fixed"
    ):  # trained where a device would be: at its own, the smallest, noise
        best = np.repeat(optimise(points.lam1[1], points.lam2[1])[:, None], num, 1)
    elif spec.theta_mode == "reopt":  # every level trained from the same starts
        levels = list(zip(points.lam1.tolist(), points.lam2.tolist(), strict=True))
        each = {level: optimise(*level) for level in dict.fromkeys(levels)}
        best = np.stack([each[level] for level in levels], 1)
    else:
        raise UserError(f"theta_mode {spec.theta_mode!r}; use 'fixed' or 'reopt'")
    return np.concatenate([random, best])


def _terms(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of the non-identity terms, and their weights c_j / sum |c|."""
    obs = hamiltonians.hamiltonian(problem.hamiltonian, problem.n)
    keep = obs.paulis.any(1)
    return pauli.flat_index(obs)[keep], obs.coeffs[keep] / pauli.weight_norm(obs)


_BLOCK = 1 << 15  # draws at a time: one compiled program samples every shape


@jax.jit
def _hits(key, count, probability):
    return jax.random.binomial(key, count, probability)


def measure(key: jax.Array, terms: np.ndarray, weights: np.ndarray, shots: int) -> np.ndarray:
    """sum_j weights[j] * (mean of +-1 outcomes with expectation terms[..., j]), f[...].

    The shots (0 = infinitely many) are split evenly over the terms, each measured in runs of its own,
    so Z^n has variance (1 - E^2) / shots.
    """
    if not shots:
        return terms @ weights
    count = max(shots // len(weights), 1)
    probability = np.clip((1 + terms.reshape(-1)) / 2, 0.0, 1.0)
    padded = np.resize(probability, -(-probability.size // _BLOCK) * _BLOCK).reshape(-1, _BLOCK)
    hits = [
        np.asarray(_hits(jax.random.fold_in(key, i), float(count), block))
        for i, block in enumerate(padded)
    ]
    mean = 2 * np.concatenate(hits)[: probability.size].reshape(terms.shape) / count - 1
    return mean @ weights


def _named(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))  # the same whatever else is studied


def make_curves(key: jax.Array, spec: StudySpec) -> Curves:
    """Circuits, exact curves and sampled curves of all tasks; random circuits first, then VQE's."""
    rows, points = tasks(spec), _points(spec)
    m = len(coordinates(spec))
    terms, weights, ideal = {}, {}, {}
    for name, p in {p.name: p for p, _ in rows}.items():
        places, weights[name] = _terms(p)
        r = _run(_thetas(_named(key, name), p, spec, points), points, spec)[..., places]
        ideal[name], terms[name] = r[:, 0] @ weights[name], r[:, 1:]
    k_shots = jax.random.fold_in(key, 1)

    def sample(p, shots):
        k = jax.random.fold_in(_named(k_shots, p.name), shots)
        return measure(k, terms[p.name], weights[p.name], shots)

    sampled = np.stack([sample(p, s) for p, s in rows])
    exact = np.stack([measure(key, terms[p.name], weights[p.name], 0) for p, _ in rows])
    target = np.stack([ideal[p.name] for p, _ in rows])
    arrays = (sampled[..., :m], sampled[..., m:], exact[..., :m], target)
    return Curves(*(jnp.asarray(a) for a in arrays))


@functools.lru_cache(maxsize=32)
def _cached(spec: StudySpec, seed: tuple[int, ...], dtype: str) -> Curves:
    del dtype  # part of the name under which the result is kept
    return make_curves(jax.random.wrap_key_data(jnp.array(seed, jnp.uint32)), spec)


def curves_of(key: jax.Array, spec: StudySpec) -> Curves:
    """`make_curves`, kept for the next arm of the same process: it depends on (key, spec) alone."""
    seed = tuple(int(k) for k in jax.random.key_data(key))
    return _cached(spec, seed, str(jnp.zeros(()).dtype))


def amortised_features(
    energies: np.ndarray | jax.Array, spec: StudySpec, n: int, depth: int, shots: int
) -> np.ndarray:
    """f32[..., 2m + 3]: the noisy values, their noise levels, n, L and 1 / sqrt(shots)."""
    e = np.asarray(energies)
    about = np.array([n, depth, shots**-0.5 if shots else 0.0])
    rest = np.concatenate([coordinates(spec), about])
    return np.concatenate([e, np.broadcast_to(rest, (*e.shape[:-1], rest.size))], -1).astype(
        np.float32
    )


def curve_features(curves: Curves, spec: StudySpec) -> np.ndarray:
    """f32[T C, F]: the features of every curve of the study."""
    rows = zip(curves.energies, tasks(spec), strict=True)
    return np.concatenate([amortised_features(e, spec, p.n, p.depth, s) for e, (p, s) in rows])


def make_training(
    key: jax.Array, spec: StudySpec, num_circuits: int, depths: tuple[int, ...]
) -> Training:
    """Random circuits of the study's Hamiltonians and noise, at every number of shots it uses.

    Problems with a depth of their own are left out: they test the net outside its training set.
    """
    key = jax.random.fold_in(key, 2)
    base = [parse_problem(p, spec.depth) for p in spec.problems]
    base = [p for p in base if p.depth == spec.depth]
    points = Points(*(a[: 1 + len(coordinates(spec))] for a in _points(spec)))
    sizes = sorted({p.n for p in base})
    each = max(num_circuits // (len(sizes) * len(depths)), 1)
    shots = sorted({s for _, s in tasks(spec)})
    parts = []
    for n in sizes:
        for depth in depths:
            k_theta = _named(key, f"n{n}_L{depth}")
            thetas = _angles(k_theta, each, 1, depth + 1, 2, n)
            r = _run(np.repeat(thetas, len(points.folds), 1), points, spec)
            for p in (p for p in base if p.n == n):
                places, weights = _terms(p)
                for s in shots:
                    k_shots = jax.random.fold_in(_named(k_theta, p.name), s)
                    energies = measure(k_shots, r[:, 1:, places], weights, s)
                    x = amortised_features(energies, spec, n, depth, s)
                    parts.append((x, energies[:, 0], r[:, 0, places] @ weights))
    return Training(*(jnp.asarray(np.concatenate(a)) for a in zip(*parts, strict=True)))


def _statistics(
    error: np.ndarray, raw: np.ndarray, at_inf: np.ndarray | None
) -> dict[str, np.ndarray]:
    """{metric: f[G]} of errors f[G, circuits] of an estimator and of the raw points."""
    size, raw_size = np.abs(error), np.abs(raw)
    out = {
        "median_error": np.median(size, 1),
        "p90_error": np.quantile(size, 0.9, axis=1),
        "p90_ratio": np.quantile(size / np.maximum(raw_size, 1e-300), 0.9, axis=1),
        "mse": (error**2).mean(1),
        "win_share": 100.0 * (size < raw_size).mean(1),
    }
    if at_inf is not None:
        out["bias"] = np.sqrt((at_inf**2).mean(1))
        out["spread"] = np.sqrt(((error - at_inf) ** 2).mean(1))
    return out


def score(estimates: jax.Array, curves: Curves, spec: StudySpec) -> dict[str, Any]:
    """Result metrics of estimates f[T, C], by task and pooled over the problems of the standard depth.

    On the host, in NumPy. median_error, p90_error: of |estimate - ideal| over circuits. bias: rms over
    circuits of the error at infinite shots. spread: rms over circuits of (estimate - the estimate at
    infinite shots). mse: mean squared error. win_share: % of circuits with a smaller error than the raw
    point of the same curve; p90_ratio <= 1 says the same as win_share >= 90, on a continuous scale.
    Arrays: error_by_shots over shots.
    """
    rows = tasks(spec)
    num, levels = len(spec.problems), len(spec.shots)
    ideal = np.asarray(curves.ideal, np.float64)
    error = np.asarray(estimates, np.float64) - ideal
    raw = np.asarray(curves.energies[..., 0], np.float64) - ideal
    grid, raw_grid = (a[: num * levels].reshape(num, levels, -1) for a in (error, raw))
    at_inf = grid[:, [spec.shots.index(0)] * levels] if 0 in spec.shots else None
    labels = [shots_label(s) for s in spec.shots]
    metrics: dict[str, Any] = {}

    def add(names, pick):
        stats = _statistics(pick(grid), pick(raw_grid), None if at_inf is None else pick(at_inf))
        for metric, values in stats.items():
            metrics.update({f"{name}/{metric}": values[i] for i, name in enumerate(names)})

    by_task = [f"{p}_{label}" for p in spec.problems for label in labels]
    add(by_task, lambda a: a.reshape(num * levels, -1))
    depths = [parse_problem(p, spec.depth).depth for p in spec.problems]
    base = [i for i, depth in enumerate(depths) if depth == spec.depth]
    parts = {"random": slice(0, spec.num_random), "vqe": slice(spec.num_random, None)}
    for kind in ["random"] * bool(spec.num_random) + ["vqe"] * bool(spec.num_vqe):
        part = parts[kind]
        pooled = [f"{kind}_{label}" for label in labels]
        add(pooled, lambda a: np.moveaxis(a[base][..., part], 1, 0).reshape(levels, -1))
    curve = sorted((s, i) for i, (p, s) in enumerate(rows) if p.name == spec.curve_problem and s)
    if len(curve) > 1:
        metrics["shots"] = np.array([float(s) for s, _ in curve])
        metrics["error_by_shots"] = np.median(np.abs(error[[i for _, i in curve]]), 1)
    return metrics
