"""Exact properties of the search driver, against closed forms, brute force and a host heap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.search import search, search_many, status_name
from qlab.search.domains import domain, exact, graphs, lights_out, sliding
from qlab.search.driver import trace
from qlab.search.oracle import oracle_search

Partial = jax.tree_util.Partial
MODES = ("astar", "astar_deferred", "qstar")


def slow(*case):
    """A search compiles in three seconds or more: most combinations take turns."""
    return pytest.param(*case, marks=pytest.mark.slow)


def table_heuristic(mode, h, costs, to):
    """Exact h or exact Q of a table graph."""
    values = h if mode != "qstar" else costs + h[to]
    return Partial(graphs.lookup, jnp.asarray(values, jnp.float32))


@functools.cache
def puzzle_starts(max_depth, count):
    """States of the 8-puzzle in breadth-first order up to a depth, and their distances."""
    dist, states = sliding.distances()
    d = dist[sliding.ranks(states)]
    pick = np.flatnonzero(d <= max_depth)
    if len(pick) > count:
        pick = np.random.default_rng(0).choice(pick, count, replace=False)
    return states[pick], d[pick]


@pytest.mark.parametrize(
    ("mode", "stop"),
    [
        ("astar", "first"),
        ("qstar", "bound"),
        *(slow(m, s) for m, s in [("astar", "bound"), ("qstar", "first")]),
        *(slow("astar_deferred", s) for s in ("first", "bound")),
    ],
)
def test_exact_values_give_optimal_costs_up_to_depth_12(mode, stop):
    """Every state at depth <= 12 (1145 of them): cost, a legal path of that cost, and the goal test at the root."""
    starts, dist = puzzle_starts(12, 10**6)
    problem, heuristic = exact(domain("puzzle8"), "q" if mode == "qstar" else "h")
    r = search_many(problem, heuristic, starts, mode=mode, stop=stop, max_nodes=1 << 12)
    assert np.asarray(r.solved).all()
    np.testing.assert_array_equal(r.cost, dist)
    path = np.asarray(r.path)
    np.testing.assert_array_equal((path >= 0).sum(1), dist)
    s = jnp.asarray(starts)
    for i in range(12):
        s = jnp.where((path[:, i] >= 0)[:, None], jax.vmap(problem.next_state)(s, path[:, i]), s)
    assert np.asarray(jax.vmap(problem.is_goal)(s)).all()
    assert int(r.num_generated[0]) == 0  # the first state is the goal
    assert int(r.num_net_inputs[0]) == 0


@pytest.mark.parametrize(("length", "num_actions"), [slow(1, 1), (7, 3), slow(40, 5)])
def test_path_graph_counts(length, num_actions):
    """Exact values on a path: Q* generates L nodes, A* L A, and both evaluate what they must."""
    p, h = graphs.path_graph(length, num_actions)
    v = np.arange(length + 1)
    to = np.asarray(
        jax.vmap(lambda s: jax.vmap(lambda a: p.next_state(s, a)[0])(jnp.arange(num_actions)))(
            v[:, None]
        )
    )
    for mode, want in (("astar", length * num_actions), ("qstar", length)):
        heuristic = table_heuristic(mode, h, np.ones_like(to, np.float32), to)
        r = search(p, heuristic, jnp.array([0], jnp.int32), mode=mode, max_nodes=64)
        assert (status_name(r.status), float(r.cost), int(r.num_generated)) == (
            "solved",
            length,
            want,
        )
        # A* also evaluates the goal before it pops it; Q* stops at it.
        assert int(r.num_net_inputs) == (length + 1 if mode == "astar" else length)


@pytest.mark.parametrize("batch", [slow(1), 7])
@pytest.mark.parametrize("mode", MODES)
def test_no_heuristic_is_dijkstra(mode, batch):
    """h = 0 (for edges Q = c) with the rule that is right for it reproduces Bellman-Ford costs."""
    p, _, costs, h = graphs.random_graph(3, 60, 4)
    zero = np.zeros(60) if mode != "qstar" else costs
    heuristic = Partial(graphs.lookup, jnp.asarray(zero, jnp.float32))
    # Deferred edges carry the parent's f, so "first" needs the bound there, and so does every batch.
    stop = "bound" if mode == "astar_deferred" or batch > 1 else "first"
    starts = jnp.arange(60, dtype=jnp.int32)[:, None]
    r = search_many(
        p, heuristic, starts, mode=mode, batch=batch, stop=stop, max_nodes=64, max_rows=512
    )
    np.testing.assert_array_equal(r.cost, h)
    assert {status_name(s) for s in r.status[~np.isfinite(h)]} <= {"exhausted"}


@pytest.mark.parametrize("unit", [slow(True), False])
def test_zero_q_needs_the_bound(unit):
    """Q = 0 never overestimates: "bound" is optimal on unit and weighted graphs; "first" is not on weighted ones."""
    p, _, costs, h = graphs.random_graph(5, 60, 4, max_cost=1 if unit else 9)
    heuristic = Partial(graphs.lookup, jnp.zeros(costs.shape))
    starts = jnp.arange(60, dtype=jnp.int32)[:, None]
    kw = {"mode": "qstar", "max_nodes": 64, "max_rows": 512}
    np.testing.assert_array_equal(search_many(p, heuristic, starts, stop="bound", **kw).cost, h)
    first = np.asarray(search_many(p, heuristic, starts, stop="first", **kw).cost)
    assert (first >= h).all()
    assert (first > h).any() != unit


def noisy(mode, h, costs, to, seed, low=0.0, high=2.0):
    """Inadmissible multiples of a quarter, so that f is exact in f32 and ties abound."""
    base = np.where(np.isfinite(h), h, 9.0)
    values = base if mode != "qstar" else costs + base[to]
    factor = np.random.default_rng(seed).choice(np.arange(low, high, 0.5), values.shape)
    return Partial(graphs.lookup, jnp.asarray(values * factor, jnp.float32))


SMALL = graphs.random_graph(0, 80, 3, max_cost=4)


@pytest.mark.parametrize(
    ("mode", "batch", "tie", "stop"),
    [
        ("astar", 1, "lifo", "bound"),
        ("astar_deferred", 1, "lifo", "bound"),
        ("qstar", 1, "fifo", "first"),
        ("qstar", 5, "fifo", "bound"),
        *(slow(m, 1, "fifo", "first") for m in ("astar", "astar_deferred")),
        slow("qstar", 1, "lifo", "bound"),
        *(slow(m, 5, "lifo", "first") for m in ("astar", "qstar")),
    ],
)
def test_same_pops_as_a_heap(mode, batch, tie, stop):
    """Sequence of pops, cost, path and every counter equal those of heapq, with ties and re-openings."""
    p, to, costs, h = SMALL
    for seed, weight in ((0, 1.0), (1, 0.5), (2, 1.0)):
        heuristic = noisy(mode, h, costs, to, seed)
        kw = {"mode": mode, "weight": weight, "batch": batch, "stop": stop, "tie": tie}
        start = np.array([7 * seed], np.int32)
        sizes = {"max_nodes": 96, "max_rows": 1024, "record": 4096}
        ours, (nodes, actions, count) = trace(p, heuristic, start[None], **sizes, **kw)
        ours = jax.tree.map(lambda x: x[0], ours)
        want = oracle_search(p, heuristic, start, **kw)
        nodes, actions = np.asarray(nodes)[: int(count)], np.asarray(actions)[: int(count)]
        got = list(zip(nodes.tolist(), actions.tolist(), strict=True))
        if (
            stop == "bound"
        ):  # what was popped last, before the search stopped, is not in the oracle's list
            got = got[: len(want.popped)]
        assert got == want.popped
        assert status_name(ours.status) == want.status
        assert float(ours.cost) == want.cost
        assert ours.path[ours.path >= 0].tolist() == want.path
        assert int(ours.num_generated) == want.num_generated
        assert int(ours.num_net_inputs) == want.num_net_inputs
        assert int(ours.num_iters) == want.num_iters + (int(count) > len(want.popped))
        assert int(ours.max_open) == want.max_open


def test_stale_entries_are_expanded_unless_pruned():
    """Both counts equal the heap's, and pruning saves nodes."""
    p, to, costs, h = graphs.random_graph(7, 400, 2)
    totals = []
    for prune in (False, True):
        totals.append(0)
        for seed in (0, 1):
            heuristic = noisy(
                "qstar", h, costs, to, seed, high=6.0
            )  # misleading: much is re-opened
            start = np.array([seed], np.int32)
            kw = {"mode": "qstar", "stop": "bound", "prune_stale": prune}
            ours = search(p, heuristic, start, max_nodes=512, max_rows=1024, **kw)
            want = oracle_search(p, heuristic, start, **kw)
            assert (int(ours.num_generated), float(ours.cost)) == (want.num_generated, want.cost)
            totals[-1] += want.num_generated
    assert totals[1] < totals[0]


def test_lookahead_counts_its_nodes_and_keeps_costs():
    starts, dist = puzzle_starts(16, 60)
    problem, heuristic = exact(domain("puzzle8"), "q")
    plain = search_many(problem, heuristic, starts, mode="qstar", max_nodes=1 << 12)
    ahead = search_many(problem, heuristic, starts, mode="qstar", lookahead=True, max_nodes=1 << 12)
    np.testing.assert_array_equal(ahead.cost, dist)
    # With exact Q and LIFO ties both walk straight to the goal: d pops, and d states looked ahead from.
    np.testing.assert_array_equal(plain.num_generated, dist)
    np.testing.assert_array_equal(ahead.num_generated, dist * (1 + 4))
    assert (np.asarray(ahead.max_open) <= np.asarray(plain.max_open)).all()


@pytest.mark.parametrize(
    ("depth", "tie", "low", "high"),
    [
        slow(1, "fifo", 4.5, 6.5),
        (1, "lifo", 16, 16),
        (2, "fifo", 28, 42),
        slow(2, "lifo", 136, 136),
    ],
)
@pytest.mark.slow
def test_node_ratio_with_exact_values_on_lights_out(depth, tie, low, high):
    """A*/Q* generated nodes with exact values: A with LIFO ties; with FIFO 5.2 and 31 over all states."""
    d = domain("lightsout4", depth)
    starts = d.instances(0, 300)
    generated = {}
    for mode in ("astar", "qstar"):
        problem, heuristic = exact(d, "q" if mode == "qstar" else "h")
        r = search_many(problem, heuristic, starts, mode=mode, tie=tie, max_nodes=4096)
        np.testing.assert_array_equal(r.cost, d.distance(jnp.asarray(starts)))
        generated[mode] = float(r.num_generated.mean())
    assert low * 0.999 <= generated["astar"] / generated["qstar"] <= high * 1.001


@pytest.mark.slow
def test_batches_and_weights_stay_optimal_with_the_bound():
    """Admissible heuristic, w = 1, any batch: "bound" is optimal; w < 1 costs at most 1 / w times as much."""
    d = domain("puzzle8")
    starts, dist = puzzle_starts(20, 40)
    h = Partial(lambda w, enc: enc @ w, jnp.asarray(d.admissible))
    for mode in ("astar", "astar_deferred"):
        for batch in (1, 300):
            r = search_many(
                d.problem, h, starts, mode=mode, batch=batch, stop="bound", max_nodes=1 << 15
            )
            np.testing.assert_array_equal(r.cost, dist)
    r = search_many(d.problem, h, starts, mode="astar", weight=0.5, max_nodes=1 << 15)
    assert (np.asarray(r.cost) <= 2 * dist).all()
    assert (np.asarray(r.cost) > dist).any()


def test_start_is_goal():
    for mode in MODES:
        problem, heuristic = exact(domain("puzzle8"), "q" if mode == "qstar" else "h")
        r = search(problem, heuristic, sliding.goal_state(3), mode=mode, max_nodes=64)
        assert (bool(r.solved), float(r.cost), int(r.num_generated), int(r.path[0])) == (
            True,
            0,
            0,
            -1,
        )


@pytest.mark.slow
def test_every_way_to_fail_has_a_name():
    d = domain("puzzle8")
    h = Partial(lambda w, enc: enc @ w, jnp.asarray(d.admissible))
    hard = jnp.array([8, 6, 7, 2, 5, 4, 3, 0, 1], jnp.uint8)  # 31 moves
    run = functools.partial(search, d.problem)

    def status(r):
        assert bool(r.solved) == (status_name(r.status) == "solved")
        if not r.solved:
            assert np.isinf(r.cost)
            assert (np.asarray(r.path) == -1).all()
        return status_name(r.status)

    small = functools.partial(run, h, hard, mode="astar")
    assert status(small(max_nodes=500)) == "table_full"
    assert status(small(max_nodes=5000, max_rows=300)) == "queue_full"
    assert status(small(max_nodes=5000, batch=50, max_rows=300)) == "queue_full"
    assert status(small(max_nodes=5000, batch=50, node_limit=500)) == "node_limit"
    nan = Partial(lambda _, enc: jnp.full(enc.shape[0], jnp.nan), ())
    assert status(run(nan, hard, mode="astar", max_nodes=500)) == "bad_heuristic"
    wall = Partial(lambda _, enc: jnp.full(enc.shape[0], jnp.inf), ())
    assert status(run(wall, hard, mode="astar", max_nodes=500)) == "exhausted"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 50])
def test_a_whole_component_is_exhausted(batch):
    d = domain("puzzle8")
    h = Partial(lambda w, enc: enc @ w, jnp.asarray(d.admissible))
    odd = jnp.array([2, 1, 3, 4, 5, 6, 7, 8, 0], jnp.uint8)  # other parity: no way to the goal
    kw = {"mode": "astar", "max_nodes": 181440, "prune_stale": True}
    r = search(d.problem, h, odd, batch=batch, **kw)
    assert status_name(r.status) == "exhausted"
    assert int(r.num_nodes) == 181440  # all states of that parity, none lost to a collision
    if batch == 1:  # the heuristic is consistent: every state is expanded once
        assert int(r.num_generated) == 4 * 181440
    hard = jnp.array([8, 6, 7, 2, 5, 4, 3, 0, 1], jnp.uint8)  # 31 moves
    r = search(d.problem, h, hard, batch=batch, max_length=30, **kw)
    assert status_name(r.status) == "path_cut"


def test_bad_arguments_are_named():
    d = domain("puzzle8")
    h = Partial(lambda w, enc: enc @ w, jnp.asarray(d.admissible))
    start = sliding.goal_state(3)
    with pytest.raises(ValueError, match=r"mode='bfs'.*astar"):
        search(d.problem, h, start, mode="bfs")
    with pytest.raises(ValueError, match="max_nodes"):
        search(d.problem, h, start, mode="astar", max_nodes=1 << 27, max_bytes=1 << 20)
    with pytest.raises(ValueError, match="heuristic of shape"):
        search(d.problem, h, start, mode="qstar", max_nodes=64)
    with pytest.raises(ValueError, match="lookahead"):
        search(d.problem, h, start, mode="astar", lookahead=True)


def test_new_params_and_weights_do_not_recompile():
    from qlab.search.driver import _search_all

    d = domain("puzzle8")
    starts = puzzle_starts(8, 4)[0]
    apply = lambda w, enc: enc @ w  # noqa: E731
    run = lambda scale, w: search_many(  # noqa: E731
        d.problem,
        Partial(apply, jnp.asarray(scale * d.admissible)),
        starts,
        mode="astar",
        weight=w,
        max_nodes=256,
    )
    run(1.0, 1.0)
    before = _search_all._cache_size()
    run(2.0, 0.5)
    assert _search_all._cache_size() == before


@pytest.mark.slow
def test_many_starts_equal_single_searches_and_vmap():
    d = domain("puzzle8")
    starts, _ = puzzle_starts(14, 5)
    h = Partial(lambda w, enc: enc @ w, jnp.asarray(d.admissible))
    kw = {"mode": "astar", "max_nodes": 512, "max_rows": 600}
    many = search_many(d.problem, h, starts, **kw)
    mapped = jax.vmap(lambda s: search(d.problem, h, s, **kw))(jnp.asarray(starts))
    for i, s in enumerate(starts):
        one = search(d.problem, h, s, **kw)
        for a, b, c in zip(one, many, mapped, strict=True):
            np.testing.assert_array_equal(a, b[i])
            np.testing.assert_array_equal(a, c[i])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts copies in XLA:CPU code")
@pytest.mark.parametrize(
    ("mode", "options"), [("astar", {"stop": "bound"}), ("qstar", {"prune_stale": True})]
)
def test_no_iteration_copies_the_table_or_the_queue(mode, options):
    """The compiled loops hold no copy of anything as long as the table."""
    import re

    from qlab.search.driver import _search_all
    from qlab.search.plan import make_plan

    problem, heuristic = exact(domain("puzzle8"), "q" if mode == "qstar" else "h")
    plan = make_plan(
        problem, jax.ShapeDtypeStruct((9,), jnp.uint8), mode, max_nodes=50_000, **options
    )
    args = (jnp.zeros((3, 9), jnp.uint8), jnp.float32(1), jnp.int32(10))
    text = _search_all.lower(problem, plan, heuristic, *args).compile().as_text()
    body = text.partition("\nENTRY ")[0]
    assert "while(" in body
    sizes = [
        np.prod([int(x) for x in m.split(",") if x])
        for m in re.findall(r"\[([\d,]*)\]\S* copy\(", body)
    ]
    assert max(sizes, default=0) < 10_000


def test_states_of_any_dtype():
    """A counter as f32, bool, i8, u16 and complex states: same search."""
    from qlab.search import Problem

    for dtype in (jnp.float32, jnp.int8, jnp.uint16):
        p = Problem(
            next_state=lambda s, a: s + jnp.where(a == 0, 1, 3).astype(s.dtype),
            cost=lambda s, a: jnp.float32(1),
            is_goal=lambda s: s[0] == 17,
            encode=lambda s: s.astype(jnp.float32),
            num_actions=2,
        )
        zero = Partial(lambda _, enc: jnp.zeros(enc.shape[0]), ())
        r = search(p, zero, jnp.zeros(3, dtype), mode="astar", max_nodes=64)
        assert float(r.cost) == 7  # 5 threes and 2 ones


@pytest.mark.slow
def test_lights_out_5x5_optimum():
    """Q* with h = 0 and the bound agrees with elimination over GF(2) on light boards."""
    n = 5
    p = lights_out.lights_out(n)
    keys = jax.random.split(jax.random.key(4), 6)
    starts = np.asarray(jax.vmap(lambda k: lights_out.scramble(k, n, jnp.int32(3), 3))(keys))
    one = Partial(lambda _, enc: jnp.ones((enc.shape[0], 25)), ())
    r = search_many(p, one, starts, mode="qstar", stop="bound", batch=64, max_nodes=1 << 14)
    np.testing.assert_array_equal(r.cost, lights_out.solve(starts, n))


@pytest.mark.parametrize("mode", [*map(slow, MODES[:2]), "qstar"])
def test_float64_mode_changes_nothing(mode):
    """The search is written for 32 bits: a caller who switches float64 on gets the same counts."""
    starts, _ = puzzle_starts(8, 20)
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            problem, heuristic = exact(domain("puzzle8"), "q" if mode == "qstar" else "h")
            r = search_many(problem, heuristic, starts, mode=mode, max_nodes=1 << 12, batch=3)
            results.append(jax.tree.map(np.asarray, r))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert [x.dtype for x in jax.tree.leaves(results[0])] == [
        x.dtype for x in jax.tree.leaves(results[1])
    ]
