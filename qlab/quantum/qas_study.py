"""What the arms of the QAS comparison share: pools, labels, embeddings, and the numbers of a search.

All are functions of (key, spec) alone and kept for the next arm of the same process, so that within a seed every arm
sees the same pool, scores, targets and trained VAE. Sub-keys of a seed: 0 pool, 1 targets, 2 the VAE (start, order,
noise), 3 searches, 4 the untrained net, 5 pairs of the latent measures and generated circuits. Labels are computed for
the whole pool first, so counts of good circuits and optima are known and a search only looks up.
Letters: P = pool, T = tasks (with each fidelity target one), R = runs, Q = queries, D = embedding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum import qas_bo as bo
from qlab.quantum import qas_pool as qp
from qlab.quantum import qas_search as qs
from qlab.quantum import qas_tasks as qt
from qlab.quantum import qas_vae as qv
from qlab.quantum.circuit_spec import CircuitSpec

EMBEDDINGS = ("learnt", "untrained", "raw", "pca", "counts")
SEARCHES = ("random", "reinforce", "bo", "evo", "predictor")
NUM_PAIRS = 100_000  # of circuits, for the correlation of distance and score
TOP, NEIGHBOURS = 50, 10
CHEMICAL = 1.6e-3  # hartree


class StudySpec(NamedTuple):
    """Everything that decides data and embeddings; hashable. tasks: of qas_tasks.TASKS."""

    pool: qp.PoolSpec
    vae: qv.VaeSpec
    tasks: tuple[str, ...] = qt.TASKS
    num_targets: int = 2
    steps: int = 50
    vqe_steps: int = 100
    step_size: float = 0.5
    mask: str = "unsigned"
    terminals: bool = True
    val_share: float = 0.1


class Pool(NamedTuple):
    """specs: CircuitSpec[P] on the host. graphs: Graph[P]."""

    specs: CircuitSpec
    graphs: qp.Graph


def task_names(spec: StudySpec) -> tuple[str, ...]:
    """One name a label row: fidelity_0, fidelity_1, tfim ...

    Raises:
      UserError: an unknown task, or none.
    """
    bad = [t for t in spec.tasks if t not in qt.TASKS]
    if bad or not spec.tasks or spec.num_targets < 1:
        raise UserError(f"tasks={spec.tasks}, num_targets={spec.num_targets}"
                        + (nearest(bad[0], qt.TASKS) if bad else "; give at least one of each"))  # fmt: skip
    many = {"fidelity": [f"fidelity_{i}" for i in range(spec.num_targets)]}
    return tuple(name for t in spec.tasks for name in many.get(t, [t]))


def _data(key: jax.Array) -> tuple[int, ...]:
    return tuple(int(k) for k in np.asarray(jax.random.key_data(key)).ravel())


def _key(seed: tuple[int, ...], use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(jnp.array(seed, jnp.uint32)), use)


@functools.lru_cache(maxsize=16)
def _pool(seed: tuple[int, ...], pool: qp.PoolSpec, mask: str, terminals: bool) -> Pool:
    specs = qp.sample_circuits(_key(seed, 0), pool)
    return Pool(specs, qp.encode_pool(specs, pool.num_qubits, mask, terminals))


def pool_of(key: jax.Array, spec: StudySpec) -> Pool:
    """The seed's circuits and their graphs."""
    return _pool(_data(key), spec.pool, spec.mask, spec.terminals)


@functools.lru_cache(maxsize=128)
def _label(seed: tuple[int, ...], pool: qp.PoolSpec, task: str, spec: tuple) -> np.ndarray:
    steps, vqe_steps, step_size = spec
    specs, n = _pool(seed, pool, "unsigned", True).specs, pool.num_qubits
    name, _, number = task.partition("_")
    if name == "fidelity":
        k_target = jax.random.fold_in(_key(seed, 1), int(number))
        objective = qt.fidelity_objective(qt.draw_target(k_target, specs, pool), steps)
    else:
        objective = qt.energy_objective(name, n, steps, vqe_steps)
    return qt.label_pool(specs, objective, num_qubits=n, learning_rate=step_size)


def labels_of(key: jax.Array, spec: StudySpec) -> np.ndarray:
    """f32[T, P]: every circuit's score on every task."""
    inner = (spec.steps, spec.vqe_steps, spec.step_size)
    return np.stack([_label(_data(key), spec.pool, t, inner) for t in task_names(spec)])


class Embedded(NamedTuple):
    """points f32[P, D]; of a trained net the mean loss of each epoch and its `quality`, else empty."""

    points: np.ndarray
    losses: np.ndarray
    quality: dict[str, float]


@functools.lru_cache(maxsize=32)
def _embedding(seed: tuple[int, ...], kind: str, spec: StudySpec) -> Embedded:
    graphs = _pool(seed, spec.pool, spec.mask, spec.terminals).graphs
    none = np.zeros(0, np.float32)
    if kind == "counts":
        return Embedded(np.asarray(qp.mean_rows(graphs)), none, {})
    if kind in ("raw", "pca"):
        raw = np.asarray(qp.flat_rows(graphs))
        return Embedded(raw if kind == "raw" else pca(raw, spec.vae.latent_dim), none, {})
    if kind == "untrained":
        k_init, k_norms = jax.random.split(_key(seed, 4))
        vae = qv.gin_vae_init(k_init, graphs.ops.shape[-1], spec.vae)
        vae = qv.settle_norms(k_norms, vae, graphs)
        return Embedded(np.asarray(qv.embed_pool(vae, graphs, spec.vae.pool_nodes)), none, {})
    held = max(1, round(spec.val_share * spec.pool.size))
    train, val = (
        jax.tree.map(lambda x, s=s: x[s], graphs) for s in (slice(held, None), slice(held))
    )
    vae, losses = qv.train_vae(_key(seed, 2), train, spec.vae)
    quality = qv.quality(vae, val) | qv.generation_quality(vae, train, _key(seed, 5))
    points = qv.embed_pool(vae, graphs, spec.vae.pool_nodes)
    return Embedded(
        np.asarray(points), np.asarray(losses), {k: float(v) for k, v in quality.items()}
    )


def embedding_of(key: jax.Array, kind: str, spec: StudySpec) -> Embedded:
    """The pool in an embedding of EMBEDDINGS.

    learnt: the VAE's, trained on all but the first val_share of the pool. untrained: the same net as it starts, its
    batch norms settled on the pool. raw: rows and edges, flat. pca: its leading latent_dim axes. counts: `mean_rows`.
    """
    if kind not in EMBEDDINGS:
        raise UserError(f"embedding={kind!r}{nearest(kind, EMBEDDINGS)}")
    return _embedding(_data(key), kind, spec._replace(tasks=(), num_targets=0))


def pca(x: np.ndarray, dim: int) -> np.ndarray:
    """f32[P, min(dim, rank)]: coordinates along the leading principal axes of x f[P, K]."""
    x = x.astype(np.float64) - x.mean(0)
    _, axes = np.linalg.eigh(x.T @ x)
    return (x @ axes[:, ::-1][:, :dim]).astype(np.float32)


# ---- one task's search --------------------------------------------------------------------------


class SearchSpec(NamedTuple):
    """search, embedding: of SEARCHES, EMBEDDINGS. scale: "none" as in the paper, or "unit": centred, mean variance 1.

    thresholds: (task, score from which a circuit counts as good).
    """

    search: str
    embedding: str
    runs: int
    thresholds: tuple[tuple[str, float], ...]
    scale: str
    dngo: bo.DngoSpec
    reinforce: qs.ReinforceSpec
    evolution: qs.EvolutionSpec
    predictor: qs.PredictorSpec


def _look_up(scores, index):
    return scores[index]


def check_search(spec: SearchSpec, pool: qp.PoolSpec) -> SearchSpec:
    """Raises: UserError: an unknown name, or more queries than circuits."""
    if spec.search not in SEARCHES:
        raise UserError(f"search={spec.search!r}{nearest(spec.search, SEARCHES)}")
    if spec.scale not in ("none", "unit") or spec.runs < 1:
        raise UserError(
            f"scale={spec.scale!r}, runs={spec.runs}; use none or unit, and a run at least"
        )
    if bad := [t for t, _ in spec.thresholds if t not in qt.TASKS]:
        raise UserError(f"threshold of {bad[0]!r}{nearest(bad[0], qt.TASKS)}")
    # DNGO and the predictor fill their last round, which may go beyond the queries
    qs.check_queries(spec.dngo.queries, pool.size - max(spec.dngo.top, spec.predictor.rounds))
    return spec


@functools.partial(jax.jit, static_argnames=("spec", "drawn", "mask"))
def _runs(
    keys: jax.Array,
    points: Any,
    pool: Pool,
    score_fn: Any,
    task: qs.Reward,
    spec: SearchSpec,
    drawn: qp.PoolSpec,
    mask: str,
) -> jax.Array:
    """order i32[R, Q] of one search from every key i[R]."""

    def one(key):
        if spec.search == "random":
            size = pool.graphs.ops.shape[0]
            return qs.random_search(key, size, score_fn, spec.dngo.queries).order
        if spec.search == "bo":
            return bo.dngo_search(key, points, score_fn, spec.dngo).order
        if spec.search == "reinforce":
            return qs.reinforce_search(key, points, score_fn, spec.reinforce, task).order
        if spec.search == "evo":
            return qs.evolution_search(key, points, pool.specs, score_fn, spec.evolution,
                                       num_qubits=drawn.num_qubits, mask=mask,
                                       gate_set=drawn.gate_set).order  # fmt: skip
        return qs.predictor_search(key, pool.graphs, score_fn, spec.predictor).order

    return jax.lax.map(one, keys)


def threshold_of(task: str, search: SearchSpec) -> float:
    """Raises: UserError: the task has none."""
    known = dict(search.thresholds)
    if task not in known:
        raise UserError(f"task {task} has no threshold; give config.threshold.{task}")
    return known[task]


def prepare(key: jax.Array, spec: StudySpec, search: SearchSpec) -> None:
    """Computes what the seed's searches look up, so that a study's time left is told from searches alone."""
    labels_of(key, spec)
    if search.search in ("bo", "reinforce"):
        embedding_of(key, search.embedding, spec)


def run_task(key: jax.Array, task: int, spec: StudySpec, search: SearchSpec) -> np.ndarray:
    """i32[R, Q]: the circuits each run evaluates on task number `task`, in order; keys do not depend on the arm."""
    name = task_names(spec)[task].partition("_")[0]
    pool, scores = pool_of(key, spec), labels_of(key, spec)[task]
    kind = "raw" if search.search == "evo" else search.embedding
    points = jnp.zeros(0)
    if search.search in ("bo", "reinforce", "evo"):
        points = jnp.asarray(embedding_of(key, kind, spec).points)
        if search.scale == "unit":
            points = (points - points.mean(0)) / jnp.sqrt(points.var(0).mean())
    keys = jax.random.split(jax.random.fold_in(_key(_data(key), 3), task), search.runs)
    # b0 and alpha are the source's
    about = qs.Reward(
        0.9 if name == "maxcut" else 0.5,
        0.8 if name == "fidelity" else 0.7,
        threshold_of(name, search),
    )
    table = jax.tree_util.Partial(_look_up, jnp.asarray(scores))
    data = pool._replace(specs=jax.tree.map(jnp.asarray, pool.specs))
    # what the program does not depend on stays out of its name
    bare = search._replace(embedding="", runs=0, scale="", thresholds=())
    order = _runs(keys, points, data, table, about, bare, spec.pool, spec.mask)
    return np.asarray(order)


# ---- numbers ------------------------------------------------------------------------------------


def search_numbers(order: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """Of order i[R, Q] on scores f[P], means over runs.

    hits: scores >= threshold. expected_hits: of random search. ceiling: most hits over expected_hits. first: queries to
    the first hit (Q + 1 where none came). regret: best of the pool minus best found. hits_curve, regret_curve f[Q].
    """
    found = scores[order]
    queries = order.shape[1]
    good = found >= threshold
    num_good = int((scores >= threshold).sum())
    expected = qs.expected_hits(num_good, scores.size, queries)
    regret = scores.max() - np.maximum.accumulate(found, 1)
    return {
        "hits": good.sum(1).mean(),
        "expected_hits": expected,
        "base_rate": 100 * num_good / scores.size,
        "most_hits": float(min(queries, num_good)),
        "mean_score": found.mean(),
        "first": np.where(good.any(1), good.argmax(1) + 1, queries + 1).mean(),
        "regret": regret[:, -1].mean(),
        "pool_best": scores.max(),
        "hits_curve": np.cumsum(good, 1).mean(0),
        "regret_curve": regret.mean(0),
    }


def latent_numbers(
    key: jax.Array, points: np.ndarray, labels: np.ndarray
) -> list[dict[str, float]]:
    """How smooth the scores of each task, labels f[T, P], are over points f[P, D].

    corr: Pearson correlation of distance and |score difference| over random pairs. neighbour_gain: mean score of
    the 10 nearest neighbours of the 50 best circuits, minus the pool's mean.
    """
    size = labels.shape[1]
    i, j = np.random.default_rng(_data(key)).integers(0, size, (2, NUM_PAIRS))
    i, j = i[i != j], j[i != j]
    distance = np.sqrt(((points[i] - points[j]) ** 2).sum(1, dtype=np.float64))
    square = (points.astype(np.float64) ** 2).sum(1)
    out = []
    for scores in labels:
        gap = np.abs(scores[i] - scores[j]).astype(np.float64)
        spread = distance.std() * gap.std()
        both = ((distance - distance.mean()) * (gap - gap.mean())).mean()
        best = np.argsort(-scores, kind="stable")[: min(TOP, size)]
        around = square - 2 * (points[best] @ points.T)
        around[np.arange(best.size), best] = np.inf
        near = np.argsort(around, 1, kind="stable")[:, : min(NEIGHBOURS, size - 1)]
        gain = scores[near].mean() - scores.mean() if near.size else 0.0
        out.append({"corr": float(both / spread) if spread else 0.0, "neighbour_gain": float(gain)})
    return out


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several targets, and `lift` = hits over expected hits, `ceiling` = the most that can be."""
    out = {k: np.mean([p[k] for p in parts], 0) for k in parts[0]}
    if "hits" in out:
        expected = max(out["expected_hits"], 1e-9)
        out["lift"] = out["hits"] / expected if out["most_hits"] else 1.0
        out["ceiling"] = out.pop("most_hits") / expected
    return out


def study_numbers(
    key: jax.Array, orders: np.ndarray, spec: StudySpec, search: SearchSpec
) -> dict[str, Any]:
    """{"task/metric": number, name: curve}: what an arm reports, from orders i[T, R, Q]."""
    names, labels = task_names(spec), labels_of(key, spec)
    embedded = None
    smooth: list[dict[str, float]] = [{} for _ in names]
    if search.search == "bo":  # REINFORCE's arms would give the same
        embedded = embedding_of(key, search.embedding, spec)
        smooth = latent_numbers(_key(_data(key), 5), embedded.points, labels)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for name, order, scores, more in zip(names, orders, labels, smooth, strict=True):
        task = name.partition("_")[0]
        numbers = search_numbers(order, scores, threshold_of(task, search)) | more
        by_task.setdefault(task, []).append(numbers)
    out: dict[str, Any] = {"queries": np.arange(1, orders.shape[-1] + 1, dtype=np.float32)}
    for task, parts in by_task.items():
        for k, v in pooled(parts).items():
            out[f"{task}_{k}" if np.ndim(v) else f"{task}/{k}"] = np.asarray(v, np.float32)
    if "h2" in by_task:
        error = (1 - labels[names.index("h2")]) * abs(qt.energy_objective("h2", 4, 1, 1).best)
        chemical = (error <= CHEMICAL)[orders[names.index("h2")]].sum(1).mean()
        out["h2/chemical_hits"] = np.float32(chemical)
    if embedded is not None and embedded.quality:
        out |= {f"vae/{k}": np.float32(v) for k, v in embedded.quality.items()}
        out |= {"epoch": np.arange(1, len(embedded.losses) + 1), "vae_loss": embedded.losses}
    return out
