"""AQ* against greedy, beam, A*, uninformed and brute-force compiling (Chen et al., arXiv 2204.06904).

Arms differ in the search over one gate-set problem, or replace it; counts and clock are those of Q* search.
A task is a gate set with Haar targets at one tolerance (<set>_e<eps>) or with random words to be found exactly
(<set>_words). A seed draws nets and training states; the targets are fixed. Every word found is multiplied out
again in double precision from its letters.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment
from qlab.quantum import gatesets, unitaries, words
from qlab.quantum.solovay_kitaev import pennylane_words
from qlab.search import nets
from qlab.search.beam import beam, random_walks
from qlab.search.benchmark import Task, search_benchmark
from qlab.search.compiler_claims import CLAIMS, FIGURES, METRICS
from qlab.search.domains import compiler
from qlab.search.driver import search_many
from qlab.search.learning import learner

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]

SOLVERS = ("best_first", "beam", "random", "enumeration", "sk")
HEURISTICS = {"q": nets.q_values, "h": nets.h_value, "min_q": nets.min_q}


@functools.cache
def parts(name: str, features: str, costs: tuple[float, ...]):
    """(gates, elements, problem) of a gate set, one object each, so that arms share what they compile."""
    gates = gatesets.gate_set(name)
    if why := words.why_not_universal(gates):
        raise UserError(why)
    e = compiler.Elements(
        gatesets.identity(gates), gatesets.compose(gates, jnp),
        functools.partial(gatesets.matrix, xp=jnp), gates.matrices, gates.inverse, gatesets.COEF_LIMIT,
    )  # fmt: skip
    return gates, e, compiler.compiler_problem(e, unitaries.FEATURES[features], costs or None)


table_of = functools.cache(lambda name, n: words.enumerate_unitaries(gatesets.gate_set(name), n))


@functools.cache
def targets(
    name: str, eps: float, count: int, seed: int, lengths: tuple[int, int] | None, table_len: int
):
    """Fixed targets c128[T, N, N], Haar or (with lengths) random words, and their optima f64[T] at unit costs."""
    gates, e, _ = parts(name, "ptm", ())
    key = jax.random.key(seed)
    if lengths is None:
        u = jax.vmap(lambda k: unitaries.haar(k, gates.dim))(jax.random.split(key, count))
        u = np.asarray(u, np.complex128)
        return u, words.shortest_within(table_of(name, table_len), u, eps)[0]
    _, w, _ = compiler.sample_words(e, key, count, lengths[1], lengths[0])
    x = np.stack([gatesets.word_element(row[row >= 0], gates) for row in np.asarray(w)])
    half = table_of(name, (lengths[1] + 1) // 2)
    return gatesets.matrix(x), words.shortest_exact(half, gates, x)


def make_solve(c: Any, name: str, e: compiler.Elements, gates, eps: float):
    """What stands in place of `search_many`, its words multiplied out again."""
    runs = {
        "best_first": search_many,
        "beam": compiler.bounded(beam, c.width, c.max_length),
        "random": compiler.bounded(random_walks, c.width, c.max_length),
        "sk": compiler.host_solver(e, lambda us: ([pennylane_words(u, eps, gates) for u in us], 0)),
        "enumeration": compiler.host_solver(e, lambda us: words.listed_words(table_of(name, c.table_len[name]), us, eps)),
    }  # fmt: skip
    return compiler.verified(runs[c.solver], e, lambda w, u: words.word_distance(w, gates, u), eps)


def make_tasks(c: Any, name: str) -> list[Task]:
    gates, e, problem = parts(name, c.features, c.costs)
    kinds: list[Any] = [(f"{name}_e{t:g}", t, None) for t in c.eps if gates.num_qubits == 1]
    if c.solver not in ("sk", "enumeration"):
        kinds.append((f"{name}_words", c.exact_eps, c.word_lengths[name]))
    noise = lambda k, t: unitaries.small_rotation(k, gates.dim, c.noise * t * jax.random.uniform(k))  # noqa: E731
    domain = compiler.compiler_domain(
        name, e, problem, [t for _, t, _ in kinds], noise if c.noise else None
    )
    learn = None
    if c.net != "none":
        learn = learner(
            domain, c.net, widths=c.widths, blocks=c.blocks, batch=c.train_batch, k_max=c.k_max[name], lr=c.lr,
            lr_decay=c.lr_decay, target_sync=c.target_sync, sync_loss=c.sync_loss, sync_every=c.sync_every,
        )  # fmt: skip
    ones = jax.tree_util.Partial(compiler.ones_q(problem), ())
    limit = c.node_limit + c.B * problem.num_actions
    out = []
    for label, eps, lengths in kinds:
        u, optimum = targets(name, eps, c.num_targets, c.instance_seed, lengths, c.table_len[name])
        out.append(Task(
            label=label,
            domain=domain._replace(name=label),
            problem=problem,
            learner=None if out else learn,
            heuristic=lambda p: ones if learn is None else jax.tree_util.Partial(HEURISTICS[c.heuristic], p),
            instances=compiler.start_states(e, u, eps),
            optimum=None if c.costs else optimum,
            options={"mode": c.mode, "weight": c.w, "batch": c.B, "node_limit": c.node_limit, "prune_stale": True,
                     "max_nodes": limit, "max_rows": 2 * limit, "max_length": 64},
            net=out[0].label if out else "",
            solve=make_solve(c, name, e, gates, eps),
        ))  # fmt: skip
    return out


def build(config: Any) -> Experiment:
    c = config
    known = {"solver": SOLVERS, "heuristic": HEURISTICS, "features": unitaries.FEATURES}
    for key, allowed in known.items():
        if c[key] not in allowed:
            raise UserError(f"{key}={c[key]!r}: expected {', '.join(allowed)}")
    if c.num_targets % c.block:
        raise UserError(f"block={c.block} does not divide num_targets={c.num_targets}")
    names = list(c.sets)
    if c.solver == "sk":  # the library compiles to {H, T, T+}
        names = [n for n in names if n == "ht_closed"]
    if c.solver == "enumeration":
        names = [n for n in names if gatesets.gate_set(n).num_qubits == 1]
    if not names:
        raise UserError(f"arm {c.arm!r} has no task among sets={c.sets}; leave it out with --arms")
    for key in ("k_max", "word_lengths", "table_len"):
        if missing := [n for n in names if n not in c[key]]:
            raise UserError(f"{key} has no entry for the gate set {missing[0]!r}; add it")
    tasks = [t for n in names for t in make_tasks(c, n)]
    base = search_benchmark(tasks, train_steps=c.train_steps, block=c.block)

    def evaluate(state):
        out = dict(base.evaluate(state))
        for n in names:
            mean = [out.get(f"{n}_e{t:g}/cost", np.nan) for t in c.eps]
            x = np.log(1 / np.asarray(c.eps))
            if len(x) > 1 and np.isfinite(mean).all():
                out[f"{n}/slope"] = np.polyfit(x, mean, 1)[0]
                out |= {f"{n}_log_inv_eps": x, f"{n}_length": np.asarray(mean)}
        return {k: np.asarray(v, np.float32) for k, v in out.items()}

    return base._replace(evaluate=evaluate)
