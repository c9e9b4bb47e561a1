"""One driver for A*, deferred A* and Q* search (Agostinelli et al., arXiv 2102.04518).

mode            OPEN holds     priority            per popped entry
astar           nodes s        w g(s) + h(s)       all A children generated, new ones evaluated
astar_deferred  edges (s, a)   w g(s) + h(s)       one child generated; evaluated if new
qstar           edges (s, a)   w g(s) + Q(s, a)    one child generated; evaluated if new

In the edge modes g is that of the parent: the transition cost is inside Q. Everything that is
counted is counted here, once, so the modes compare.
Letters: A actions, B entries popped at once, K children of a batch (B, or B A for "astar").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qlab.search import problem as P
from qlab.search.pinning import pin
from qlab.search.plan import Plan, make_plan
from qlab.search.problem import Problem, SearchResult
from qlab.search.queue import Queue, pop, push, queue_init
from qlab.search.table import Table, insert, lookup, pack, relax, table_clear, table_init, unpack

Heuristic = Callable[[jax.Array], jax.Array]
Mode = Literal["astar", "astar_deferred", "qstar"]
INF = jnp.inf


class Work(NamedTuple):
    """Everything a running search changes."""

    table: Table
    queue: Queue
    status: jax.Array  # i32[]
    generated: jax.Array  # i32[]
    inputs: jax.Array  # i32[]
    iters: jax.Array  # i32[]
    max_open: jax.Array  # i32[]
    lower: jax.Array  # f32[], running maximum of the smallest f popped
    upper: jax.Array  # f32[], cost of the best goal found
    goal: jax.Array  # i32[], its node
    log_node: jax.Array  # i32[record]: nodes popped, in order
    log_action: jax.Array  # i32[record]: and their actions (0 in mode "astar")
    logged: jax.Array  # i32[]


def _expand(p: Problem, plan: Plan, words: jax.Array):
    """All children of states u32[b, n]: packed u32[b * A, n] and costs f32[b * A]."""
    children, cost = jax.vmap(lambda s: P.expand(p, s))(unpack(words, plan.state))
    return pack(children.reshape(-1, *plan.state.shape)), cost.astype(jnp.float32).ravel()


def _rows(p: Problem, heuristic: Heuristic, plan: Plan, table: Table, words, g, valid, weight):
    """Priorities f32[E, W] of the rows of new states u32[E, n], whether one is NaN, and nodes generated."""
    value = heuristic(jax.vmap(p.encode)(unpack(words, plan.state)))
    want = (words.shape[0], p.num_actions) if plan.mode == "qstar" else (words.shape[0],)
    if value.shape != want:
        raise ValueError(f"mode {plan.mode!r} needs a heuristic of shape {want}, got {value.shape}")
    f = weight * g[:, None] + value.astype(jnp.float32).reshape(words.shape[0], -1)
    nan = (jnp.isnan(f) & valid[:, None]).any()
    f = jnp.broadcast_to(f, (words.shape[0], plan.queue.width))
    if not plan.lookahead:
        return f, nan, jnp.int32(0)
    children, cost = _expand(p, plan, words)
    node = lookup(table, children, jnp.repeat(valid, p.num_actions)).reshape(f.shape)
    known = (node >= 0) & (table.g[node] <= g[:, None] + cost.reshape(f.shape))
    return jnp.where(known, INF, f), nan, jnp.sum(valid, dtype=jnp.int32) * p.num_actions


def _push_new(p, heuristic, plan: Plan, w: Work, words, g, node, new, weight) -> Work:
    """Evaluates the states marked `new` in pieces of plan.chunk and pushes their rows."""
    k, e = words.shape[0], plan.chunk
    total = jnp.sum(new, dtype=jnp.int32)
    if k > 1:
        (order,) = jnp.nonzero(new, size=-(-k // e) * e, fill_value=0)
    else:
        order = jnp.zeros(e, jnp.int32)

    def piece(i, carry):
        queue, status, generated, inputs, max_open = carry
        at = jax.lax.dynamic_slice(order, (i * e,), (e,))
        count = jnp.minimum(total - i * e, e)
        valid = jnp.arange(e) < count
        f, nan, extra = _rows(p, heuristic, plan, w.table, words[at], g[at], valid, weight)
        queue = push(queue, plan.queue, f, g[at], node[at], count)
        full = queue.rows > plan.max_rows
        status = jnp.where(full, P.QUEUE_FULL, status)
        # Once full, the next piece overwrites from where it was: the result is void anyway.
        queue = queue._replace(rows=jnp.minimum(queue.rows, plan.max_rows))
        status = jnp.where(nan, P.BAD_HEURISTIC, status)
        return (
            queue,
            status,
            generated + extra,
            inputs + count,
            jnp.maximum(max_open, queue.num_open),
        )

    carry = (w.queue, w.status, w.generated, w.inputs, w.max_open)
    carry = jax.lax.fori_loop(0, -(-total // e), piece, carry)
    queue, status, generated, inputs, max_open = carry
    return w._replace(
        queue=queue, status=status, generated=generated, inputs=inputs, max_open=max_open
    )


def _iteration(p: Problem, heuristic, plan: Plan, weight, node_limit, w: Work) -> Work:
    edges, b = plan.mode != "astar", plan.batch
    queue, entry, valid, f = pop(w.queue, plan.queue, b, plan.tie == "lifo")
    row, action = entry // plan.queue.width, entry % plan.queue.width
    parent, g = queue.node[row], queue.levels_g[0][row]
    words = w.table.words[parent]
    stale = g > w.table.g[parent] if plan.prune_stale else ~valid
    parent, g, words, stale = pin((parent, g, words, stale), queue.rows)
    found = valid.any()
    status = jnp.where(found, w.status, jnp.where(w.upper < INF, P.SOLVED, P.EXHAUSTED))
    lower = jnp.where(found, jnp.maximum(w.lower, jnp.where(valid, f, INF).min()), w.lower)
    if plan.stop == "bound":  # after popping, before generating
        proven = (w.upper < INF) & (lower >= weight * w.upper)
        status = jnp.where(proven, P.SOLVED, status)
    w = w._replace(queue=queue, lower=lower, iters=w.iters + found)
    if plan.record:
        at = w.logged + jnp.cumsum(valid.astype(jnp.int32)) - 1
        at = jnp.where(valid, at, plan.record)
        w = w._replace(
            log_node=w.log_node.at[at].set(parent, mode="drop"),
            log_action=w.log_action.at[at].set(action, mode="drop"),
            logged=w.logged + jnp.sum(valid, dtype=jnp.int32),
        )
    if plan.prune_stale:
        valid &= ~stale
    if not edges and plan.stop == "first":
        w, stop = _note_goals(p, plan, w, words, parent, g, valid)
        status = jnp.where((status == P.RUNNING) & stop, P.SOLVED, status)
    valid &= status == P.RUNNING
    w = w._replace(status=status)

    if edges:
        states = unpack(words, plan.state)
        children = pack(jax.vmap(p.next_state)(states, action))
        g = g + jax.vmap(p.cost)(states, action).astype(jnp.float32)
    else:
        a = p.num_actions
        children, cost = _expand(p, plan, words)
        g = jnp.repeat(g, a) + cost
        valid, parent = jnp.repeat(valid, a), jnp.repeat(parent, a)
        action = jnp.tile(jnp.arange(a, dtype=jnp.int32), b)
    children, g, valid = pin((children, g, valid), queue.rows)
    table, node, _ = insert(w.table, children, valid)
    table, win = relax(table, node, g, parent, action, valid)
    generated = w.generated + jnp.sum(valid, dtype=jnp.int32)
    w = w._replace(table=table, generated=generated)
    if edges or plan.stop == "bound":
        w, stop = _note_goals(p, plan, w, children, node, g, valid)
        if plan.stop == "first":
            w = w._replace(status=jnp.where(stop, P.SOLVED, w.status))
    over = jnp.where(table.size > plan.max_nodes, P.TABLE_FULL, w.status)
    over = jnp.where(generated >= node_limit, P.NODE_LIMIT, over)
    w = w._replace(status=jnp.where(w.status == P.RUNNING, over, w.status))
    win &= w.status == P.RUNNING
    return _push_new(p, heuristic, plan, w, children, g, node, win, weight)


def _note_goals(p: Problem, plan: Plan, w: Work, words, node, g, valid) -> tuple[Work, jax.Array]:
    """Keeps the cheapest goal among states u32[k, n]; also whether there was one."""
    cost = jnp.where(valid & jax.vmap(p.is_goal)(unpack(words, plan.state)), g, INF)
    if cost.shape[0] == 1:
        best, at = cost[0], 0
    else:
        best = cost.min()
        at = jnp.argmax(cost == best)
    better = best < w.upper
    w = w._replace(upper=jnp.minimum(best, w.upper), goal=jnp.where(better, node[at], w.goal))
    return w, best < INF


def _path(p: Problem, plan: Plan, t: Table, goal: jax.Array):
    """(actions i32[L], number of them, sum of their costs) on the way from the root to a node."""

    def count(carry):
        node, n = carry
        return t.parent[node], n + 1

    _, length = jax.lax.while_loop(lambda c: t.parent[c[0]] >= 0, count, (goal, jnp.int32(0)))

    def back(i, carry):
        node, path, total = carry
        up, a = t.parent[node], t.action[node]
        state = unpack(t.words[up][None], plan.state)[0]
        path = path.at[length - 1 - i].set(a, mode="drop")
        return up, path, total + jnp.asarray(p.cost(state, a), jnp.float32)

    empty = jnp.full(plan.max_length, -1, jnp.int32)
    _, path, total = jax.lax.fori_loop(0, length, back, (goal, empty, jnp.float32(0)))
    return path, length, total


def new_work(plan: Plan) -> Work:
    zero = jnp.int32(0)
    return Work(
        table=table_init(plan.max_nodes, plan.slack, plan.state),
        queue=queue_init(plan.queue),
        status=zero,
        generated=zero,
        inputs=zero,
        iters=zero,
        max_open=zero,
        lower=jnp.float32(-INF),
        upper=jnp.float32(INF),
        goal=zero,
        log_node=jnp.zeros(plan.record, jnp.int32),
        log_action=jnp.zeros(plan.record, jnp.int32),
        logged=zero,
    )


def run(
    p: Problem, plan: Plan, heuristic, weight, node_limit, w: Work, start
) -> tuple[Work, SearchResult]:
    """One search in the arrays of `w`, whatever an earlier search left in them."""
    zero = jnp.int32(0)
    table = table_clear(w.table)
    words = pack(start[None])
    table, node, new = insert(table, jnp.repeat(words, plan.slack, 0), jnp.arange(plan.slack) < 1)
    none = jnp.full(1, -1, jnp.int32)
    table, _ = relax(table, node[:1], jnp.zeros(1, jnp.float32), none, none, new[:1])
    at_goal = p.is_goal(start)
    w = w._replace(
        table=table,
        queue=w.queue._replace(
            rows=jnp.minimum(w.queue.rows, 0), num_open=zero
        ),  # 0; see table_clear
        status=jnp.where(at_goal, P.SOLVED, P.RUNNING).astype(jnp.int32),
        generated=zero,
        inputs=zero,
        iters=zero,
        max_open=zero,
        lower=jnp.float32(-INF),
        upper=jnp.where(at_goal, 0.0, INF).astype(jnp.float32),
        goal=zero,
        logged=zero,
    )
    w = _push_new(
        p, heuristic, plan, w, words, jnp.zeros(1, jnp.float32), zero[None], ~at_goal[None], weight
    )
    step = functools.partial(_iteration, p, heuristic, plan, weight, node_limit)
    w = jax.lax.while_loop(lambda w: w.status == P.RUNNING, step, w)
    solved = w.status == P.SOLVED
    path, length, cost = _path(p, plan, w.table, jnp.where(solved, w.goal, 0))
    cut = solved & (length > plan.max_length)
    solved &= ~cut
    return w, SearchResult(
        path=jnp.where(solved, path, -1),
        cost=jnp.where(solved, cost, INF),
        solved=solved,
        num_generated=w.generated,
        num_net_inputs=w.inputs,
        num_iters=w.iters,
        max_open=w.max_open,
        status=jnp.where(cut, P.PATH_CUT, w.status),
        num_nodes=jnp.minimum(w.table.size, plan.max_nodes),
    )


@functools.partial(jax.jit, static_argnames=("p", "plan"))
def _search_all(p: Problem, plan: Plan, heuristic, starts, weight, node_limit):
    def one(w, start):
        return run(p, plan, heuristic, weight, node_limit, w, start)

    w, results = jax.lax.scan(one, new_work(plan), starts)
    return results, (w.log_node, w.log_action, w.logged)


def search(
    problem: Problem,
    heuristic: Heuristic,
    start: jax.Array,
    key: jax.Array | None = None,
    *,
    mode: Mode,
    weight: float | jax.Array = 1.0,
    batch: int = 1,
    stop: Literal["first", "bound"] = "first",
    tie: Literal["lifo", "fifo"] = "lifo",
    max_nodes: int = 1 << 16,
    **options: Any,
) -> SearchResult:
    """Searches from one state to the nearest goal.

    Args:
      problem: see `Problem`. Build it once and reuse it: another Problem object compiles anew.
      heuristic: enc f32[E, m] -> h f32[E], or Q f32[E, A] with the transition cost inside in mode
        "qstar"; give `jax.tree_util.Partial(apply, params)` so that new params do not recompile.
        +inf marks a dead end.
      start: the state.
      key: not used, search is deterministic; in the signature for searches that draw.
      weight: w >= 0 of f = w g + h; 0 is greedy best-first search. Not compiled in.
      batch: B, entries popped at once; all of them are generated before stopping is considered.
      stop: "first": the first goal popped (A*) or generated from a popped edge (edge modes), the
        cheapest of its batch; with w = 1 and B = 1 optimal if h <= h*, or c <= Q <= c + h*.
        "bound": the best goal found, once w times its cost is at most the largest of the smallest
        priorities popped; with w = 1 optimal for every B if h <= h*, or Q <= c + h*.
      tie: of equal f, "lifo" pops larger g first and then the latest entry, "fifo" the earliest entry.
      max_nodes: distinct states stored before the search ends as "table_full".
      **options: of `plan.make_plan`: max_rows, max_length, eval_chunk, lookahead, prune_stale,
        max_bytes; and node_limit, generated nodes before it ends as "node_limit".

    A state is re-opened when it is reached at strictly smaller cost. An entry whose node was
    meanwhile reached more cheaply is still expanded unless prune_stale.
    """
    result = search_many(
        problem, heuristic, jnp.asarray(start)[None], key,
        mode=mode, weight=weight, batch=batch, stop=stop, tie=tie, max_nodes=max_nodes, **options,
    )  # fmt: skip
    return jax.tree.map(lambda x: x[0], result)


def search_many(
    problem: Problem,
    heuristic: Heuristic,
    starts: jax.Array,
    key: jax.Array | None = None,
    *,
    mode: Mode,
    weight: float | jax.Array = 1.0,
    node_limit: int | jax.Array = 2**31 - 1,
    **options: Any,
) -> SearchResult:
    """`search` from many states [N, ...], one after another in the same arrays and one program.

    (vmap of `search` also works, but then every search copies its arrays until the last is done.)
    """
    return trace(
        problem, heuristic, starts, key, mode=mode, weight=weight, node_limit=node_limit, **options
    )[0]


def trace(
    problem: Problem,
    heuristic: Heuristic,
    starts: jax.Array,
    key: jax.Array | None = None,
    *,
    mode: Mode,
    weight: float | jax.Array = 1.0,
    node_limit: int | jax.Array = 2**31 - 1,
    **options: Any,
):
    """`search_many`, and the entries the last search popped: (nodes i32[record], actions, how many).

    Nodes are numbered in the order they were met; asks for `record=` places.
    """
    del key
    starts = jnp.asarray(starts)
    plan = make_plan(problem, jax.ShapeDtypeStruct(starts.shape[1:], starts.dtype), mode, **options)
    limit = jnp.minimum(
        jnp.asarray(node_limit, jnp.int32), 2**31 - 1 - 2 * plan.slack * problem.num_actions
    )
    return _search_all(problem, plan, heuristic, starts, jnp.float32(weight), limit)
