"""AQ* against greedy, beam, A*, uninformed and brute-force compiling (Chen et al., arXiv 2204.06904).

Arms differ in the search over one gate-set problem, or replace it; counts and clock are those of Q* search.
A task is a gate set with Haar targets at one tolerance (<set>_e<eps>) or with random words to be found exactly
(<set>_words). A seed draws targets, nets, training states and random walks; its targets are the same for all arms,
its Haar targets also for all sets and tolerances. Every word found is multiplied out again in double precision.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.quantum import gatesets, unitaries, words
from qlab.quantum.solovay_kitaev import known_lengths, pennylane_words
from qlab.search import benchmark, nets
from qlab.search.beam import beam, random_walks
from qlab.search.domains import compiler
from qlab.search.driver import search_many
from qlab.search.learning import learner

HEURISTICS = {"q": nets.q_values, "h": nets.h_value, "min_q": nets.min_q}


@functools.cache
def parts(name: str, features: str, costs: tuple[float, ...]):
    """(gates, elements, problem) of a gate set, one object each, so that arms share what they compile."""
    gates = gatesets.gate_set(name)
    if why := words.why_not_universal(gates):
        raise UserError(why)
    e = compiler.Elements(*gatesets.arithmetic(gates))
    return gates, e, compiler.compiler_problem(e, unitaries.FEATURES[features], costs or None)


table_of = functools.cache(lambda name, n: words.enumerate_unitaries(gatesets.gate_set(name), n))


@functools.cache
def targets(name: str, eps: float, count: int, bits: bytes, lengths: tuple[int, int] | None, table_len: int):  # fmt: skip
    """A seed's targets c128[T, N, N], Haar or (with lengths) random words, and lengths f64[T] known of them."""
    gates, e, _ = parts(name, "ptm", ())
    key = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(bits, np.uint32)))
    if lengths is None:
        u = np.asarray(unitaries.haar(key, gates.dim, (count,)), np.complex128)
        return u, known_lengths(u, eps, gates, table_of(name, table_len))
    draw = jax.jit(lambda k: compiler.sample_words(e, k, count, lengths[1], lengths[0]))
    _, w, _ = draw(jax.random.fold_in(key, 1))
    x = np.stack([gatesets.word_element(row[row >= 0], gates) for row in np.asarray(w)])
    half = table_of(name, (lengths[1] + 1) // 2)
    return gatesets.matrix(x), {"optimum": words.shortest_exact(half, gates, x)}


def make_tasks(c: Any, name: str) -> list[benchmark.Task]:
    gates, e, problem = parts(name, c.features, c.costs)
    kinds: list[Any] = [(f"{name}_e{t:g}", t, None) for t in c.eps if gates.num_qubits == 1]
    solvers = {
        "best_first": search_many,
        "beam": compiler.bounded(beam, c.width, c.max_length),
        "random": compiler.bounded(random_walks, c.width, c.max_length),
        "sk": compiler.host_solver(e, lambda us, eps: ([pennylane_words(u, eps, gates) for u in us], 0)),
        "enumeration": compiler.host_solver(e, lambda us, eps: words.listed_words(table_of(name, c.table_len[name]), us, eps)),
    }  # fmt: skip
    if c.solver not in solvers:
        raise UserError(f"solver={c.solver!r}: expected {', '.join(solvers)}")
    if c.solver not in ("sk", "enumeration"):
        kinds.append((f"{name}_words", c.exact_eps, c.word_lengths[name]))
    if not kinds:
        raise UserError(f"arm {c.arm!r}: no task with the gate set {name!r}, eps={c.eps}; leave it out with --arms")  # fmt: skip
    noise = functools.partial(unitaries.rotation_within, dim=gates.dim, share=c.noise)
    tolerances = [eps for _, eps, _ in kinds]
    domain = compiler.compiler_domain(name, e, problem, tolerances, noise if c.noise else None)
    learn = None if c.net == "none" else learner(
        domain, c.net, widths=c.widths, blocks=c.blocks, batch=c.train_batch, k_max=c.k_max[name], lr=c.lr,
        lr_decay=c.lr_decay, target_sync=c.target_sync, sync_loss=c.sync_loss, sync_every=c.sync_every,
    )  # fmt: skip
    ones = jax.tree_util.Partial(compiler.ones_q(problem), ())
    limit = c.node_limit + c.B * problem.num_actions

    def instances(eps, lengths, key):
        bits = np.asarray(jax.random.key_data(key)).tobytes()
        u, known = targets(name, eps, c.num_targets, bits, lengths, c.table_len[name])
        return benchmark.Instances(compiler.start_states(e, u, eps), {} if c.costs else known)

    return [benchmark.Task(
        label=label, series="" if lengths else name, at=-np.log(eps), problem=problem,
        learner=learn if label == kinds[0][0] else None,
        heuristic=lambda p: ones if learn is None else jax.tree_util.Partial(HEURISTICS[c.heuristic], p),
        instances=functools.partial(instances, eps, lengths),
        options={"mode": c.mode, "weight": c.w, "batch": c.B, "node_limit": c.node_limit, "prune_stale": True,
                 "max_nodes": limit, "max_rows": 2 * limit, "max_length": 64},
        net=kinds[0][0], solve=compiler.verified(solvers[c.solver], e, lambda w, u: words.word_distance(w, gates, u)),
    ) for label, eps, lengths in kinds]  # fmt: skip


def build(config: Any) -> Experiment:
    c = config
    for key, allowed in (("heuristic", HEURISTICS), ("features", unitaries.FEATURES)):
        if c[key] not in allowed:
            raise UserError(f"{key}={c[key]!r}: expected {', '.join(allowed)}")
    for name in c.sets:
        gatesets.gate_set(name)  # says so if there is none of this name
        if missing := [key for key in ("k_max", "word_lengths", "table_len") if name not in c[key]]:
            raise UserError(f"{missing[0]} has no entry for the gate set {name!r}; add it")
    tasks = [t for name in c.sets for t in make_tasks(c, name)]
    pairs = [("v_free", "v_closed"), ("ht_free", "ht_closed")]
    return benchmark.search_benchmark(tasks, count=c.num_targets, train_steps=c.train_steps, block=c.block, slopes=pairs)  # fmt: skip


METRICS = benchmark.METRICS | {
    "vs_sk": Metric("x", "lower", "mean length over Solovay-Kitaev's, targets both compiled"),
    "with_sk": Metric("%", "higher", "targets that both compiled"),
}
AQ, CHECKED = "aqstar", "abstract, checked form"
ONE = ("v_closed", "v_free", "ht_closed", "ht_free")
EASY = "a search without a net (arm uninformed) shows how much of it the node limit alone gives"
# exact: a share of fresh targets that is the same on every seed (all, none) is a finding, not a lack of spread.
CLAIMS = (
    *(Claim(f"{n}: AQ* compiles 90 % of Haar targets to 0.05", CHECKED, (AQ, f"{n}_e0.05/solved"), ">=", 90.0,
            exact=True, note=EASY) for n in ONE),
    *(Claim(f"{n}: AQ* compiles 10 points more than a search without a net, eps 0.05", "ours", (AQ, f"{n}_e0.05/solved"),
            ">=", ("uninformed", f"{n}_e0.05/solved"), 10.0, exact=True) for n in ONE),
    *(Claim(f"{n}: length at most 1.2 times the optimum, eps {t:g}", CHECKED, (AQ, f"{n}_e{t:g}/cost_gap"), "<=", 20.0,
            exact=True, note="over those compiled (`solved`); breadth first has 0 % by nature") for n in ONE for t in (0.1, 0.05)),
    *(Claim(f"ht_closed: at most a third of Solovay-Kitaev's length, eps {t:g}", CHECKED, (AQ, f"ht_closed_e{t:g}/vs_sk"),
            "<=", 1 / 3, note="over those both compiled (with_sk); see what uninformed has") for t in (0.2, 0.1, 0.05)),
    *(Claim(f"V without inverses: {what} grows at most 1.6 times as fast as with them", CHECKED, (arm, "v_free/slope_ratio"),
            "<=", 1.6, note="counting alone: 1.465; over targets compiled at every eps with both (slope_on)")
      for arm, what in ((AQ, "AQ*'s length"), ("enumeration", "the optimum"))),
    Claim("Two qubits: AQ* finds 90 % of words of up to 6 gates", CHECKED, (AQ, "ht2_closed_words/solved"), ">=", 90.0,
          exact=True, note=EASY),
    Claim("Two qubits: 10 points more than a search without a net", "ours", (AQ, "ht2_closed_words/solved"), ">=",
          ("uninformed", "ht2_closed_words/solved"), 10.0, exact=True),
    Claim("v_closed: AQ* generates fewer nodes than A* with a value net, eps 0.05", "ours", (AQ, "v_closed_e0.05/generated"),
          "<=", ("astar", "v_closed_e0.05/generated"), note="targets not compiled count with the limit"),
)  # fmt: skip
FIGURES = (
    Figure("Haar targets compiled to 0.05", "bars", "solved", ylabel="%", tasks=tuple(f"{n}_e0.05" for n in ONE)),
    Figure("Random words found exactly", "bars", "solved", ylabel="%", tasks=tuple(f"{n}_words" for n in (*ONE, "ht2_closed"))),
    Figure("Length above the optimum, those compiled to 0.05", "bars", "cost_gap", ylabel="%", tasks=tuple(f"{n}_e0.05" for n in ONE), arms=(AQ, "beam", "astar")),
    Figure("Length over Solovay-Kitaev's, both compiled", "bars", "vs_sk", ylabel="x", arms=(AQ, "beam", "astar", "uninformed", "enumeration")),
    Figure("States made, mean over targets, eps 0.05", "bars", "generated", ylabel="nodes", logy=True, tasks=tuple(f"{n}_e0.05" for n in ONE), arms=(AQ, "beam", "astar", "uninformed")),
    *(Figure(f"{n}: length against tolerance, targets compiled at every eps", "line", f"{n}_cost", f"{n}_at", "log(1 / eps)", "gates", arms=(AQ, "astar", "enumeration")) for n in ONE),
    Figure("Training of the nets, one set after another", "curve", "loss", logy=True),
)  # fmt: skip
