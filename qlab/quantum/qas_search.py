"""Searches over a finite pool of circuits with embeddings: random, REINFORCE, evolution, and a supervised predictor.

Each is (key, ..., score_fn, spec) -> SearchResult: `queries` different circuits in order, with their scores.
Letters: P = pool, D = embedding, Q = queries, B = largest batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlab.lab.errors import UserError
from qlab.quantum import circuit_spec as cs
from qlab.quantum import qas_pool as qp
from qlab.quantum.circuit_spec import CircuitSpec
from qlab.quantum.qas_bo import SearchResult
from qlab.quantum.qas_vae import Gin


def check_queries(queries: int, size: int) -> int:
    """Raises: UserError: more queries than circuits, or none."""
    if not 1 <= queries <= size:
        raise UserError(
            f"queries={queries} on a pool of {size}; every query is another circuit, use 1..{size}"
        )
    return queries


def expected_hits(num_good: int, size: int, queries: int) -> float:
    """Mean of the hypergeometric distribution: hits of random search without replacement.

    >>> expected_hits(50, 1000, 100)
    5.0
    """
    return queries * num_good / size


@functools.partial(jax.jit, static_argnames=("size", "queries"))
def random_search(key: jax.Array, size: int, score_fn: Any, queries: int) -> SearchResult:
    """Without replacement."""
    order = jax.random.permutation(key, size)[:queries].astype(jnp.int32)
    return SearchResult(order, score_fn(order).astype(jnp.float32))


def _nearest(emb: jax.Array, point: jax.Array, visited: jax.Array) -> jax.Array:
    """i32[]: the unvisited row of emb f[P, D] nearest to point f[D]."""
    gap = ((emb - point) ** 2).sum(-1)
    return jnp.where(visited, jnp.inf, gap).argmin().astype(jnp.int32)


# ---- REINFORCE ----------------------------------------------------------------------------------


class Reward(NamedTuple):
    """What REINFORCE knows of a task; may be traced.

    baseline, decay: b0 and alpha of b <- alpha b + (1 - alpha) mean score. threshold: from which a circuit is good.
    """

    baseline: Any = 0.5
    decay: Any = 0.7
    threshold: Any = 0.95


ANY_TASK = Reward()


class ReinforceSpec(NamedTuple):
    """batches: sizes while the last batch's mean score is below steps[0], steps[1], the threshold, and beyond.

    first: size of the first batch.
    """

    queries: int = 300
    first: int = 16
    batches: tuple[int, int, int, int] = (8, 16, 24, 32)
    steps: tuple[float, float] = (0.5, 0.7)
    hidden: int = 128
    learning_rate: float = 1e-2


class Policy(nnx.Module):
    """LSTM cell D -> hidden and a linear map to the mean of the action, N(mean, I)."""

    def __init__(self, dim: int, hidden: int, rngs: nnx.Rngs):
        self.cell = nnx.OptimizedLSTMCell(dim, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, dim, rngs=rngs)
        self.hidden = hidden

    def start(self):
        return (jnp.zeros(self.hidden), jnp.zeros(self.hidden))

    def __call__(self, carry, x):
        carry, h = self.cell(carry, x)
        return carry, self.head(h)


@functools.partial(jax.jit, static_argnames="spec")
def reinforce_search(
    key: jax.Array, emb: jax.Array, score_fn: Any, spec: ReinforceSpec, task: Reward = ANY_TASK
) -> SearchResult:
    """A policy walks through the pool: from the last circuit's embedding it draws a point, and the nearest unvisited
    circuit is next. After a batch: one Adam step on mean_t[-(log pi(a_t) / D) (r_t - b)] (the source averages log pi
    over dimensions), the LSTM starts anew, b moves. Rewards are not discounted (the source computes returns and
    overwrites them). The random first circuit is a query too.

    Args:
      emb: f[P, D]. score_fn: i32[] -> f[], a jax.tree_util.Partial.
    """
    size, dim = emb.shape
    widest = max(spec.first, *spec.batches)
    k_net, k_start, k_act = jax.random.split(key, 3)
    graph, params = nnx.split(Policy(dim, spec.hidden, nnx.Rngs(params=k_net)))
    tx = optax.adam(spec.learning_rate)
    begin = jax.random.randint(k_start, (), 0, size).astype(jnp.int32)
    order = jnp.zeros(spec.queries + widest, jnp.int32).at[0].set(begin)
    score = jnp.zeros(spec.queries + widest, jnp.float32).at[0].set(score_fn(begin))
    visited = jnp.zeros(size, bool).at[begin].set(True)
    rooms = jnp.array(spec.batches, jnp.int32)
    levels = jnp.array([*spec.steps, task.threshold], jnp.float32)

    def batch(state):
        params, opt_state, order, score, visited, count, width, baseline = state
        net = nnx.merge(graph, params)

        room = jnp.minimum(width, spec.queries - count)

        def walk(t, carry):
            lstm, visited, order, score, here, action = carry
            x = emb[order[count + t - 1]]
            lstm, mean = net(lstm, x)
            point = mean + jax.random.normal(jax.random.fold_in(k_act, count + t), (dim,))
            to = _nearest(emb, point, visited)
            order = order.at[count + t].set(to)
            score = score.at[count + t].set(score_fn(to).astype(jnp.float32))
            return (
                lstm,
                visited.at[to].set(True),
                order,
                score,
                here.at[t].set(x),
                action.at[t].set(point),
            )

        blank = jnp.zeros((widest, dim), emb.dtype)
        carry = (net.start(), visited, order, score, blank, blank)
        _, visited, order, score, here, action = jax.lax.fori_loop(0, room, walk, carry)
        on = jnp.arange(widest) < room
        reward = jax.lax.dynamic_slice(score, (count,), (widest,))
        weight = on / jnp.maximum(on.sum(), 1)

        def loss(params):
            net = nnx.merge(graph, params)
            _, mean = jax.lax.scan(net, net.start(), here)
            log_pi = (-0.5 * (action - mean) ** 2 - 0.5 * jnp.log(2 * jnp.pi)).mean(-1)
            return (weight * -log_pi * (reward - baseline)).sum()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
        mean_score = (weight * reward).sum()
        baseline = task.decay * baseline + (1 - task.decay) * mean_score
        # the next batch grows with what the last one was worth
        next_width = rooms[(mean_score >= levels).sum()]
        return params, opt_state, order, score, visited, count + room, next_width, baseline

    state = (params, tx.init(params), order, score, visited, jnp.int32(1), jnp.int32(spec.first),
             jnp.asarray(task.baseline, jnp.float32))  # fmt: skip
    state = jax.lax.while_loop(lambda s: s[5] < spec.queries, batch, state)
    return SearchResult(state[2][: spec.queries], state[3][: spec.queries])


# ---- evolution ----------------------------------------------------------------------------------


class EvolutionSpec(NamedTuple):
    """population: the latest that may become parents. tournament: of whom the best does."""

    queries: int = 300
    population: int = 100
    tournament: int = 10
    start: int = 16


def mutate(
    key: jax.Array,
    spec: CircuitSpec,
    num_qubits: int,
    gate_set: tuple[str, ...] = cs.GATES[1:],
) -> CircuitSpec:
    """One used slot of a circuit becomes a random gate of gate_set on random qubits, drawn as pools are."""
    k_slot, k_gate, k_q, k_other = jax.random.split(key, 4)
    used = jnp.asarray(spec.gate) != cs.NOOP
    slot = jax.random.categorical(k_slot, jnp.where(used, 0.0, -jnp.inf))
    codes = jnp.array([cs.GATES.index(g) for g in gate_set], jnp.int32)
    gate = jax.random.choice(k_gate, codes)
    q0 = jax.random.randint(k_q, (), 0, num_qubits)
    hop = jnp.where(gate == cs.CNOT, 1, jax.random.randint(k_other, (), 1, max(num_qubits, 2)))
    q1 = jnp.where(jnp.asarray(cs.NUM_QUBITS)[gate] == 2, (q0 + hop) % num_qubits, q0)
    return spec._replace(
        gate=jnp.asarray(spec.gate).at[slot].set(gate),
        q0=jnp.asarray(spec.q0).at[slot].set(q0),
        q1=jnp.asarray(spec.q1).at[slot].set(q1),
    )


@functools.partial(jax.jit, static_argnames=("spec", "num_qubits", "mask", "gate_set"))
def evolution_search(
    key: jax.Array,
    raw: jax.Array,
    pool: CircuitSpec,
    score_fn: Any,
    spec: EvolutionSpec,
    *,
    num_qubits: int,
    mask: str = "unsigned",
    gate_set: tuple[str, ...] = cs.GATES[1:],
) -> SearchResult:
    """Regularised evolution inside the pool: the best of a tournament among the latest circuits is mutated in one
    gate, and the unvisited circuit whose encoding is nearest to the child's is evaluated.

    Args:
      raw: f[P, R], `flat_rows` of the pool's graphs.
    """
    size = raw.shape[0]
    start = min(spec.start, spec.queries)
    k_start, k_run = jax.random.split(key)
    first = jax.random.choice(k_start, size, (start,), replace=False).astype(jnp.int32)
    order = jnp.zeros(spec.queries, jnp.int32).at[:start].set(first)
    score = jnp.zeros(spec.queries, jnp.float32).at[:start].set(score_fn(first))
    visited = jnp.zeros(size, bool).at[first].set(True)

    def child(t, carry):
        order, score, visited = carry
        k_pick, k_change = jax.random.split(jax.random.fold_in(k_run, t))
        alive = jnp.minimum(t, spec.population)
        rivals = t - 1 - jax.random.randint(k_pick, (spec.tournament,), 0, alive)
        parent = order[rivals[score[rivals].argmax()]]
        born = mutate(k_change, jax.tree.map(lambda x: x[parent], pool), num_qubits, gate_set)
        graph = jax.tree.map(lambda x: x[None], qp.encode_graph(born, num_qubits, mask))
        to = _nearest(raw, qp.flat_rows(graph)[0], visited)
        score = score.at[t].set(score_fn(to).astype(jnp.float32))
        return order.at[t].set(to), score, visited.at[to].set(True)

    order, score, _ = jax.lax.fori_loop(start, spec.queries, child, (order, score, visited))
    return SearchResult(order, score)


# ---- supervised predictor -----------------------------------------------------------------------


class PredictorSpec(NamedTuple):
    """start random queries, then rounds of the circuits predicted best."""

    queries: int = 300
    start: int = 100
    rounds: int = 4
    hidden: int = 32
    hops: int = 3
    epochs: int = 50
    learning_rate: float = 1e-2


class Predictor(nnx.Module):
    """The VAE's encoder with a linear map of the mean over nodes to the score."""

    def __init__(self, row: int, spec: PredictorSpec, rngs: nnx.Rngs):
        self.body = Gin(row, spec.hidden, spec.hops - 1, rngs)
        self.head = nnx.Linear(spec.hidden, 1, rngs=rngs)

    def __call__(self, g: qp.Graph, train: bool = False):
        x = self.body(g, train).sum(-2)
        live = jnp.maximum(g.live.sum(-1, keepdims=True), 1.0)
        return self.head(x / live)[..., 0]


@functools.partial(jax.jit, static_argnames="spec")
def predictor_search(
    key: jax.Array, graphs: qp.Graph, score_fn: Any, spec: PredictorSpec
) -> SearchResult:
    """A graph net trained on scores alone: random queries, then in each round the net is trained anew on all pairs
    and the unvisited circuits it rates highest are evaluated."""
    size = graphs.ops.shape[0]
    start = min(spec.start, spec.queries)
    top = max(1, -(-(spec.queries - start) // spec.rounds))
    rounds = -(-(spec.queries - start) // top)
    total = start + rounds * top
    k_start, k_run = jax.random.split(key)
    order = jax.random.choice(k_start, size, (start,), replace=False).astype(jnp.int32)
    order = jnp.zeros(total, jnp.int32).at[:start].set(order)
    score = jnp.zeros(total, jnp.float32).at[:start].set(score_fn(order[:start]))
    visited = jnp.zeros(size, bool).at[order[:start]].set(True)
    tx = optax.adam(spec.learning_rate)

    def fit(key, order, score, num):
        graph, params, rest = nnx.split(
            Predictor(graphs.ops.shape[-1], spec, nnx.Rngs(params=key)), nnx.Param, ...
        )
        counts = (jnp.arange(total) < num).astype(jnp.float32)
        g = jax.tree.map(lambda x: x[order], graphs)
        g = g._replace(live=g.live * counts[:, None])  # padding is graphs without nodes

        def step(carry, _):
            params, rest, opt_state = carry

            def loss(params):
                net = nnx.merge(graph, params, rest, copy=True)
                gap = net(g, train=True) - score
                rest_new = nnx.split_state(nnx.state(net), nnx.Param, ...)[1]
                return (counts * gap**2).sum() / counts.sum(), rest_new

            grads, rest = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), rest, opt_state), None

        (params, rest, _), _ = jax.lax.scan(
            step, (params, rest, tx.init(params)), length=spec.epochs
        )
        return nnx.merge(graph, params, rest)

    def one_round(carry, r):
        order, score, visited = carry
        num = start + r * top
        rated = fit(jax.random.fold_in(k_run, r), order, score, num)(graphs)
        _, at = jax.lax.top_k(jnp.where(visited, -jnp.inf, rated), top)
        at = at.astype(jnp.int32)
        order = jax.lax.dynamic_update_slice(order, at, (num,))
        score = jax.lax.dynamic_update_slice(score, score_fn(at).astype(jnp.float32), (num,))
        return (order, score, visited.at[at].set(True)), None

    (order, score, _), _ = jax.lax.scan(one_round, (order, score, visited), jnp.arange(rounds))
    return SearchResult(order[: spec.queries], score[: spec.queries])
