"""Q* search against A* as the action space grows (Agostinelli et al., arXiv 2102.04518).

Arms differ in what stands in OPEN (nodes or edges) and in the heuristic; the driver that counts and the
clock that times it are one. A task is a domain with macro-actions of up to so many base moves.
A seed draws the nets and their training states; the instances are fixed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure
from qlab.search import nets
from qlab.search.benchmark import METRICS, Instances, Task, search_benchmark
from qlab.search.calibration import probe
from qlab.search.domains import domain, exact
from qlab.search.learning import learner

VALUES = {"h": nets.h_value, "q": nets.q_values, "min_q": nets.min_q}
KNOWN = {
    "heuristic": (*VALUES, "admissible", "exact_h", "exact_q"),
    "net": ("h", "q", "q_taken", "q_bootstrap", "none"),
}


__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]


def make_task(c: Any, name: str, depth: int) -> Task:
    d = domain(name, depth, c.dedup)
    learn = None
    if c.net != "none":
        learn = learner(
            d, c.net, widths=c.widths, blocks=c.blocks, batch=c.train_batch, k_max=c.k_max[name],
            lr=c.lr, lr_decay=c.lr_decay, target_sync=c.target_sync, sync_loss=c.sync_loss,
            sync_every=c.sync_every,
        )  # fmt: skip
    problem, fixed = d.problem, None
    if c.heuristic.startswith("exact_"):
        problem, fixed = exact(d, c.heuristic.removeprefix("exact_"))
    elif c.heuristic == "admissible":
        weights = (jnp.asarray(d.admissible, jnp.float32), jnp.float32(d.offset))
        fixed = jax.tree_util.Partial(nets.linear, weights)
    instances = d.instances(c.instance_seed, c.eval_states)
    optimum = d.optima(c.eval_states) if d.optima else None
    if d.distance:
        optimum = np.asarray(d.distance(jnp.asarray(instances)))
    fixed_instances = Instances(instances, {} if optimum is None else {"optimum": optimum})
    max_nodes = min(c.max_nodes, d.num_states or c.max_nodes)
    max_rows = 2 * max_nodes
    if c.max_entries:  # a row of OPEN holds one entry, or one an action
        max_rows = min(max_rows, c.max_entries // (1 if c.mode == "astar" else problem.num_actions))
    return Task(
        label=f"{name}_a{d.problem.num_actions}",
        series=name,
        at=d.problem.num_actions,
        problem=problem,
        learner=learn,
        heuristic=lambda params: fixed or jax.tree_util.Partial(VALUES[c.heuristic], params),
        instances=lambda _: fixed_instances,
        options={
            "mode": c.mode, "weight": c.w, "batch": c.B, "stop": c.stop, "tie": c.tie,
            "node_limit": c.node_limit, "max_nodes": max_nodes, "max_rows": max_rows,
            "lookahead": c.lookahead and c.mode != "astar", "prune_stale": c.prune_stale,
        },
        probe=None if d.states is None else probe(d, c.probe_states, c.instance_seed),
    )  # fmt: skip


def build(config: Any) -> Experiment:
    c = config
    for key, names in KNOWN.items():
        if c[key] not in names:
            raise UserError(f"{key}={c[key]!r}: expected {', '.join(names)}")
    if c.net == "none" and c.heuristic in VALUES:
        raise UserError(
            f"heuristic={c.heuristic!r} needs a net: set net to h, q, q_taken or q_bootstrap"
        )
    tasks = [make_task(c, name, depth) for name in c.domain for depth in c.macro_depth]
    return search_benchmark(tasks, count=c.eval_states, train_steps=c.train_steps, block=c.block)


SCALE = "a perfect Q would give A; what is measured here is how well a small net ranks A actions"


def _claims(name: str, few: int, most: int) -> tuple[Claim, ...]:
    task, grown = f"{name}_a{most}", f"{name}, {most / few:.3g}-fold actions"

    def claim(
        text: str, source: str, metric: str, op, other, margin=0.0, left="qstar", **kw
    ) -> Claim:
        right = (other, metric) if isinstance(other, str) else other
        return Claim(text, source, (left, metric), op, right, margin, **kw)

    return (
        claim(f"{task}: A* generates at least A/4 = {most / 4:g} times the nodes of Q*",
              "abstract: up to 1288 times", f"{task}/generated", ">=", "qstar", most / 4, "astar",
              kind="ratio", paper=1288.0, note=SCALE),
        claim(f"{grown}: the time of Q* grows at most a fifth as much as that of A*",
              "abstract: up to 129 times faster", f"{name}/time_growth", "<=", "astar", 0.2, kind="ratio"),
        claim(f"{task}: mean cost gap of Q* at most 5 points above that of A*",
              "path costs at equal weight", f"{task}/cost_gap", "<=", "astar", 5.0),
        claim(f"{grown}: the time of Q* grows less than 4-fold", "abstract: 157-fold actions",
              f"{name}/time_growth", "<=", 4.0),
        claim(f"{grown}: the nodes of Q* grow less than 3-fold", "abstract: 157-fold actions",
              f"{name}/generated_growth", "<=", 3.0),
    )  # fmt: skip


CLAIMS = _claims("lightsout4", 16, 696) + _claims("puzzle8", 4, 52)
HEURISTICS = ("astar", "qstar", "qstar_bootstrap", "admissible")  # the other arms use one of theirs
FIGURES = (
    *(
        Figure(f"{title}: {what}", "line", f"{name}_{y}", f"{name}_at", "actions", unit, True, True)
        for name, title in (("lightsout4", "Lights Out"), ("puzzle8", "8-puzzle"))
        for what, y, unit in (("generated nodes", "generated", "nodes"), ("time", "wall", "s a search"))
    ),
    Figure("Cost above the optimum", "bars", "cost_gap", ylabel="%"),
    Figure("Heuristic against exact cost", "line", "learned", "exact", "exact cost", "mean over states",
           arms=HEURISTICS, diagonal=True),
    Figure("Spread of the heuristic at one exact cost", "line", "spread", "exact", "exact cost",
           "standard deviation", arms=HEURISTICS),
    Figure("States overestimated", "bars", "h_over", ylabel="%", arms=HEURISTICS),
    Figure("Training of the heuristic nets", "curve", "loss", logy=True),
)  # fmt: skip
