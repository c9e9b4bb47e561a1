"""Q* search (Agostinelli et al., arXiv 2102.04518) against A*, deferred A* and greedy search, as the
number of actions grows by macro-actions.

All arms search the same instances with the same tie rule, weight and limits. The h-net and the Q-net
have the same hidden layers, training states and updates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.search import nets
from qlab.search.benchmark import SearchTask, search_benchmark
from qlab.search.domains import Domain, domain
from qlab.search.learning import learner

METRICS = {
    "generated": Metric("nodes", "lower", "states made by next_state, mean over instances"),
    "time": Metric("s", "lower", "wall time an instance, without compilation"),
    "cost_gap": Metric("%", "lower", "path cost over the optimum, of the solved instances"),
    "solved": Metric("%", "higher", "instances solved within the limits"),
    "net_inputs": Metric("", "lower", "states shown to the heuristic"),
    "iterations": Metric("", "lower", "pops"),
    "generated_growth": Metric("x", "lower", "generated, largest over smallest action space"),
    "time_growth": Metric("s/s", "lower", "time, largest over smallest action space"),
}


def _claims(task: str, family: str, num_actions: int) -> tuple[Claim, ...]:
    return (
        Claim(
            f"A* generates at least A/4 = {num_actions // 4} times the nodes of Q* ({task})",
            "abstract: up to 1288 x fewer nodes", ("astar", f"{task}/generated"), ">=",
            ("qstar", f"{task}/generated"), margin=num_actions / 4, kind="ratio",
        ),
        Claim(
            f"With more actions the time of Q* grows at most a fifth as much as that of A* ({family})",
            "abstract: less than 4 x for 157 x the actions", ("qstar", f"{family}/time_growth"), "<=",
            ("astar", f"{family}/time_growth"), margin=0.2, kind="ratio",
        ),
        Claim(
            f"Q* paths are at most 5 points further from the optimum than those of A* ({task})",
            "section 5", ("qstar", f"{task}/cost_gap"), "<=", ("astar", f"{task}/cost_gap"), margin=5.0,
        ),
        Claim(
            f"Q* generates no more nodes than deferred A* ({task})", "ours: the lazy baseline",
            ("qstar", f"{task}/generated"), "<=", ("astar_deferred", f"{task}/generated"),
            margin=1.0, kind="ratio", note="deferred A* too pays one node and one net input a pop",
        ),
    )  # fmt: skip


CLAIMS = (*_claims("lightsout4_a696", "lightsout4", 696), *_claims("puzzle8_a52", "puzzle8", 52))
FIGURES = tuple(
    Figure(f"{what} against the number of actions ({family})", "line", f"{family}_{name}",
           f"{family}_num_actions", "actions", unit, logx=True, logy=True)
    for family in ("lightsout4", "puzzle8")
    for what, name, unit in (("Generated nodes", "generated", "nodes"), ("Time", "time", "s"))
) + (
    Figure("Distance from the optimal cost", "bars", "cost_gap"),
    Figure("Loss of the heuristic nets", "curve", "loss", logy=True),
)  # fmt: skip


def _exact(d: Domain, mode: str):
    """h* or Q* itself, read from the table of all distances through the encoding."""

    def decode(enc):  # the encodings are one-hot tiles, or -1 and 1 for a light
        one_hot = d.name.startswith("puzzle")
        side = round(enc.shape[-1] ** 0.5)
        bits = enc.reshape(-1, side, side).argmax(-1) if one_hot else enc > 0
        return bits.astype(jnp.uint8)

    def h(_, enc):
        return d.distance(decode(enc))  # pyright: ignore[reportOptionalCall]

    def q(_, enc):
        p, states = d.problem, decode(enc)
        every = jnp.arange(p.num_actions, dtype=jnp.int32)
        after = jax.vmap(lambda s: jax.vmap(lambda a: p.next_state(s, a))(every))(states)
        flat = after.reshape(-1, *states.shape[1:])
        cost = jax.vmap(lambda s: jax.vmap(lambda a: p.cost(s, a))(every))(states)
        return cost + d.distance(flat).reshape(after.shape[:2])  # pyright: ignore[reportOptionalCall]

    return q if mode == "qstar" else h


def make_task(c: Any, name: str, depth: int) -> SearchTask:
    d = domain(name, depth)
    num_actions = d.problem.num_actions
    net = None
    if c.heuristic == "net":
        net = learner(
            d, c.target, widths=c.net.widths, blocks=c.net.blocks, batch=c.batch_size, k_max=c.k_max[name],
            lr=c.lr, lr_decay=c.lr_decay, target_sync=c.target_sync, sync_loss=c.sync_loss, sync_every=c.sync_every,
        )  # fmt: skip
        values = {"value": nets.h_value, "q": nets.q_values, "min_q": nets.min_q}
        if c.read not in values:
            raise UserError(f"read={c.read!r}: expected {', '.join(values)}")
        partial = jax.tree_util.Partial
        heuristic = lambda params, f=values[c.read]: partial(f, params)  # noqa: E731
    elif c.heuristic == "exact":
        exact = jax.tree_util.Partial(_exact(d, c.mode), ())
        heuristic = lambda _: exact  # noqa: E731
    elif c.heuristic == "admissible":
        fixed = jax.tree_util.Partial(
            nets.linear, (jnp.asarray(d.admissible), jnp.float32(d.offset))
        )
        heuristic = lambda _: fixed  # noqa: E731
    else:
        raise UserError(f"heuristic={c.heuristic!r}: expected net, exact or admissible")
    options = dict(
        mode=c.mode, weight=c.w, batch=c.B, stop=c.stop, tie=c.tie, node_limit=c.node_limit,
        max_nodes=c.max_nodes[name], lookahead=c.lookahead,
    )  # fmt: skip
    if num_actions > 100:  # a row of OPEN holds A entries in the edge modes
        options["max_rows"] = c.max_nodes[name]
    starts = jnp.asarray(d.instances(c.instance_seed, c.eval_states))
    return SearchTask(f"{name}_a{num_actions}", name, d, starts, net, heuristic, options)


def build(config: Any) -> Experiment:
    tasks = [
        make_task(config, name, depth) for name in config.domain for depth in config.macro_depth
    ]
    return search_benchmark(tasks, train_steps=config.train_steps, num_blocks=config.num_blocks)
