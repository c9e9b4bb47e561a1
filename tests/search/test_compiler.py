"""Compiling as a search: exact Q from an enumerated group as the oracle of targets, searches and baselines."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab import claims
from qlab.lab.config import base
from qlab.lab.errors import UserError
from qlab.quantum import gatesets, unitaries, words
from qlab.quantum.ptm import ptm_of_unitary
from qlab.search import benchmark, learning, search_many
from qlab.search.beam import beam, random_walks
from qlab.search.domains import compiler


@functools.cache
def setup(name):
    g = gatesets.gate_set(name)
    e = compiler.Elements(*gatesets.arithmetic(g))
    return g, e, compiler.compiler_problem(e, unitaries.ptm_features)


def exact_q(name, max_len):
    """(table, enc -> Q*[E, A]) from the enumeration: the remaining unitary is looked up by its features."""
    g, _, _ = setup(name)
    table = words.enumerate_unitaries(g, max_len)
    ptms = jax.vmap(unitaries.ptm_features)(jnp.asarray(table.mats, jnp.complex64))
    m = int(np.sqrt(ptms.shape[1]))
    turn = jax.vmap(ptm_of_unitary)(jnp.asarray(g.matrices, jnp.complex64))[:, 1:, 1:]

    def q(_, enc):
        after = jnp.einsum("aji,bjk->baik", turn, enc[:, :-1].reshape(-1, m, m))  # g^dagger R
        score = after.reshape(-1, m * m) @ ptms.T
        length = jnp.where(score.max(-1) > m - 1e-3, jnp.asarray(table.lengths)[score.argmax(-1)], max_len + 1)  # fmt: skip
        return 1.0 + length.reshape(len(enc), -1).astype(jnp.float32)

    return table, jax.tree_util.Partial(q, ())


def starts_of(name, mats, eps=1e-3):
    return jnp.asarray(compiler.start_states(setup(name)[1], mats, eps))


@pytest.mark.parametrize("name", ["v_closed", "ht_closed"])
@pytest.mark.slow
def test_exact_q_compiles_optimally(name):
    """AQ* with the exact Q: the breadth-first length, one generated node a letter, and the word is the unitary."""
    g, _, p = setup(name)
    table, q = exact_q(name, 5)
    at = np.random.default_rng(0).choice(len(table.mats), 25)
    r = search_many(p, q, starts_of(name, table.mats[at]), mode="qstar", max_nodes=256)
    np.testing.assert_array_equal(r.cost, table.lengths[at])
    np.testing.assert_array_equal(r.num_generated, table.lengths[at])
    for path, i in zip(np.asarray(r.path), at, strict=True):
        assert words.word_distance(path[path >= 0], g, table.mats[i]) < 1e-6
    greedy = beam(p, q, starts_of(name, table.mats[at]), width=1, max_length=8)
    np.testing.assert_array_equal(greedy.cost, table.lengths[at])


@pytest.mark.slow
def test_no_heuristic_is_breadth_first():
    """Q = 1 with w = 1 finds shortest approximations of Haar targets, those of the enumeration."""
    name = "v_closed"
    _, _, p = setup(name)
    table = words.enumerate_unitaries(gatesets.gate_set(name), 4)
    u = np.asarray(unitaries.haar(jax.random.key(3), 2, (12,)))
    want, _ = words.shortest_within(table, u.astype(np.complex128), 0.25)
    assert np.isfinite(want).all()
    q = jax.tree_util.Partial(compiler.ones_q(p), ())
    s = starts_of(name, u, 0.25)
    r = search_many(p, q, s, mode="qstar", max_nodes=2048, tie="fifo")
    np.testing.assert_array_equal(r.cost, want)
    wide = beam(p, q, s, width=256, max_length=4)
    solved = np.asarray(wide.solved)
    assert solved.any()
    np.testing.assert_array_equal(np.asarray(wide.cost)[solved], want[solved])


def test_equal_unitaries_are_one_state():
    """Breadth-first to depth 3 stores each distinct element once, for a target that is no group element."""
    name, size = "ht_closed", 1 + 3 + 6 + 12
    _, _, p = setup(name)
    s = starts_of(name, np.asarray(unitaries.haar(jax.random.key(0), 2))[None], 1e-3)
    step = jax.jit(jax.vmap(lambda s: jax.vmap(lambda a: p.next_state(s, a))(jnp.arange(p.num_actions))))  # fmt: skip
    seen = {np.asarray(s[0]).tobytes()}
    for _ in range(3):
        s = step(s).reshape(-1, s.shape[1])
        seen |= {np.asarray(x).tobytes() for x in s}
    assert len(seen) == size


def test_targets_are_breadth_first_distances(monkeypatch):
    """Bootstrapping from the exact Q gives it back: 1 + length of g^dagger R, 0 at goals and just behind them."""
    name = "v_closed"
    _, e, p = setup(name)
    table, q = exact_q(name, 4)
    monkeypatch.setattr(learning, "net_apply", q.func)
    domain = compiler.compiler_domain(name, e, p, (1e-3,))
    states = starts_of(name, table.mats[:187])  # all of length <= 3
    y = jax.jit(lambda s: learning.all_targets(domain, q.args[0], s))(states)
    want = q(jax.jit(jax.vmap(p.encode))(states))
    np.testing.assert_array_equal(y[1:], want[1:])
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_array_equal(np.asarray(y[1:].min(-1)), table.lengths[1:187])
    one = jax.jit(lambda s: learning.q_target(domain, q.args[0], s, jnp.full(187, 2)))(states)
    np.testing.assert_array_equal(one, y[:, 2])


@pytest.mark.parametrize("name", ["v_closed", "ht_free", "ht2_closed"])
def test_sampled_words(name):
    g, e, _ = setup(name)
    u, w, lens = jax.jit(lambda k: compiler.sample_words(e, k, 300, 9, 2))(jax.random.key(0))
    w, lens = np.asarray(w), np.asarray(lens)
    assert set(lens) == set(range(2, 10))
    np.testing.assert_array_equal((w >= 0).sum(1), lens)
    for i in range(40):
        np.testing.assert_allclose(u[i], gatesets.word_matrix(w[i][: lens[i]], g), atol=3e-6)
    pairs = {(a, b) for row, n in zip(w, lens, strict=True) for a, b in itertools.pairwise(row[:n])}
    allowed = {
        (a, b) for a in range(len(e.gates)) for b in range(len(e.gates)) if g.inverse[a] != b
    }
    assert pairs == allowed


def test_noise_stays_within_its_tolerance():
    _, e, p = setup("v_closed")
    noise = functools.partial(unitaries.rotation_within, dim=2, share=0.5)
    d = compiler.compiler_domain("v", e, p, (0.2, 0.05), noise)
    s = jax.jit(lambda k: d.scrambles(k, 256, 0))(jax.random.key(0))
    r, eps = jax.jit(jax.vmap(lambda s: compiler.remaining(e, s)))(s)
    off = jnp.sqrt(jax.vmap(compiler.off_identity)(r)) / eps
    assert float(off.max()) < 0.505
    np.testing.assert_allclose(np.quantile(off, [0.25, 0.5, 0.75]), [0.125, 0.25, 0.375], atol=0.06)
    # Size and direction are drawn apart: the axis of the rotation does not tell its size.
    axis = (r - r.conj().swapaxes(-1, -2))[:, [0, 0, 1], [0, 1, 0]]
    axis = jnp.concatenate([axis[:, :2].real, axis[:, :2].imag], 1)
    axis /= jnp.linalg.norm(axis, axis=1, keepdims=True)
    assert np.abs(np.corrcoef(np.c_[off, jnp.abs(axis[:, 1:])].T)[0, 1:]).max() < 0.2
    assert set(np.asarray(eps).round(3).tolist()) == {
        np.float32(0.2).round(3),
        np.float32(0.05).round(3),
    }
    assert bool(jax.vmap(p.is_goal)(s).all())


@pytest.mark.slow
def test_training_bootstraps_h_as_the_least_q():
    _, e, p = setup("ht_free")
    d = compiler.compiler_domain("ht", e, p, (0.1,))
    for kind, heads in (("q_bootstrap_all", 2), ("h_bootstrap", 1)):
        lr = learning.learner(
            d, kind, widths=(16,), batch=32, k_max=3, target_sync="every", sync_every=20
        )
        state = jax.jit(lr.init)(jax.random.key(0))
        assert state.params["head"]["w"].shape == (16, heads)
        new, metrics = jax.jit(lr.step)(state)
        assert np.isfinite(metrics["loss"])

        def target(params, key):
            return learning.all_targets(d, params, learning.sample(d, key, 32, 3)[0])

        y = jax.jit(target)(state.params, jax.random.fold_in(state.key, 0))
        want = y.min(-1).mean() if heads == 1 else y.mean()
        np.testing.assert_allclose(metrics["label"], want, rtol=1e-5)
        assert int(new.since) == 1


def test_random_walks_end_where_they_say():
    g, _, p = setup("v_closed")
    u = np.stack([gatesets.word_matrix(w, g) for w in ([0, 1], [2], [], [3, 3, 1])])
    size = {"width": 16, "max_length": 4}
    s, key = starts_of("v_closed", u), jax.random.key(0)
    r = random_walks(p, None, s, key, **size, node_limit=20_000)
    other = random_walks(p, None, s, jax.random.key(1), **size, node_limit=20_000)
    assert (np.asarray(r.num_generated) != np.asarray(other.num_generated)).any()
    assert np.asarray(r.solved).all()
    assert int(r.num_generated[2]) == 0
    for path, v, cost in zip(np.asarray(r.path), u, np.asarray(r.cost), strict=True):
        assert words.word_distance(path[path >= 0], g, v) < 1e-6
        assert (path >= 0).sum() == cost
    none = random_walks(p, None, s, key, **size, node_limit=0)
    assert np.asarray(none.solved).tolist() == [False, False, True, False]


def test_costs_and_their_errors():
    """T dearer than H: the cheapest word may be longer; H T^2 H costs 2.2 here whatever the search finds first."""
    _, e, _ = setup("ht_closed")
    p = compiler.compiler_problem(e, unitaries.ptm_features, (0.1, 1.0, 1.0))
    zero = jax.tree_util.Partial(lambda _, enc: jnp.zeros((enc.shape[0], 3)), ())
    u = gatesets.word_matrix([0, 1, 1, 0], gatesets.gate_set("ht_closed"))[None]
    r = search_many(p, zero, starts_of("ht_closed", u), mode="qstar", stop="bound", max_nodes=512)
    np.testing.assert_allclose(r.cost, 2.2, rtol=1e-6)
    with pytest.raises(UserError, match="3 positive"):
        compiler.compiler_problem(e, unitaries.ptm_features, (1.0, 0.0, 1.0))


def test_host_solvers_pay_the_same_prices():
    _, e, _ = setup("ht_closed")
    p = compiler.compiler_problem(e, unitaries.ptm_features, (0.25, 1.0, 2.0))
    solve = compiler.host_solver(e, lambda us, eps: ([(0, 1, 0, 2), None], 5))
    r = solve(p, None, starts_of("ht_closed", np.stack([np.eye(2)] * 2)))
    assert r.cost.tolist() == [3.5, np.inf]


def test_a_wrong_word_is_caught():
    g, e, p = setup("v_closed")
    solve = compiler.host_solver(e, lambda us, eps: ([(0,), None] if eps < 0.01 else [], 5))
    u = np.stack([g.matrices[0], g.matrices[1]])
    check = compiler.verified(solve, e, lambda w, u: words.word_distance(w, g, u))
    r = check(p, None, np.asarray(starts_of("v_closed", u)))
    assert r.solved.tolist() == [True, False]
    with pytest.raises(RuntimeError, match="not within"):
        check(p, None, np.asarray(starts_of("v_closed", u[::-1])))


def test_compiled_circuits_by_pennylane():
    """What the search finds, exported as OpenQASM, is the target in another simulator's gates."""
    name = "ht2_closed"
    g, _, p = setup(name)
    rng = np.random.default_rng(1)
    u = np.stack([gatesets.word_matrix(rng.integers(0, len(g.labels), 3), g) for _ in range(4)])
    q = jax.tree_util.Partial(compiler.ones_q(p), ())
    r = search_many(p, q, starts_of(name, u), mode="qstar", max_nodes=2048, tie="fifo")
    assert np.asarray(r.solved).all()
    for path, v in zip(np.asarray(r.path), u, strict=True):
        out = words.simulate_qasm(words.to_qasm(path[path >= 0], g))
        assert abs(np.trace(out.conj().T @ v)) / g.dim > 1 - 1e-6


def test_start_states_hold_element_target_and_tolerance():
    g, e, _ = setup("v_closed")
    rows = compiler.start_states(e, g.matrices, 0.05)
    for row, u in zip(rows, g.matrices, strict=True):
        np.testing.assert_array_equal(row, compiler.start_state(e, u.astype(np.complex64), 0.05))
        x, v, eps = compiler.split(e, jnp.asarray(row))
        np.testing.assert_array_equal(x, e.identity)
        np.testing.assert_array_equal(v, u.astype(np.complex64))
        assert eps == np.float32(0.05)


def test_bad_input_of_a_problem():
    g, e, _ = setup("v_closed")
    for eps in (0.0, -0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"0 < eps < 1.*e\.g\. 0\.05"):
            compiler.start_states(e, g.matrices, eps)
    with pytest.raises(UserError, match=r"target 1 of 2 is not unitary.*nearest unitary"):
        compiler.start_states(e, np.stack([np.eye(2), np.ones((2, 2))]), 0.1)
    with pytest.raises(UserError, match="target 0 of 1 is not unitary"):
        compiler.start_states(e, np.full((1, 2, 2), np.nan), 0.1)
    with pytest.raises(UserError, match=r"shape \[1, 4, 4\].*\[T, 2, 2\]"):
        compiler.start_states(e, np.eye(4)[None], 0.1)
    with pytest.raises(UserError, match="gate 0 of 6 is not unitary"):
        compiler.compiler_problem(e._replace(gates=1.1 * e.gates), unitaries.ptm_features)


def study(variant="", arm="aqstar", **changes):
    module = importlib.import_module("qlab.experiments.aq_star_compiler")
    config = importlib.import_module("qlab.configs.aq_star_compiler").get_config(variant)
    config.update(config.arms[arm])
    config.update(changes)
    c = base("aq_star_compiler")
    c.update(config)
    c.arm = arm
    return module, c


def small(arm, name, **changes):
    sizes = {"eps": (0.3, 0.2), "num_targets": 6, "block": 3, "net": "none", "node_limit": 300}
    module, c = study(arm=arm, **{**sizes, "sets": (name,), **changes})
    c.table_len[name] = {"v_closed": 3, "ht_closed": 18}[name]
    c.word_lengths[name] = (1, 3)
    return module.build(c)


def test_seeds_draw_targets_and_arms_share_them():
    """Every seed has targets of its own, the same in all arms and, but for eps, at all tolerances."""
    a, b = (small("uninformed", "v_closed").init(jax.random.key(i)) for i in (0, 1))
    c = small("random", "v_closed").init(jax.random.key(0))
    for kind in ("v_closed_e0.3", "v_closed_words"):
        assert (np.asarray(a["starts"][kind]) != np.asarray(b["starts"][kind])).any(1).sum() > 3
        np.testing.assert_array_equal(a["starts"][kind], c["starts"][kind])
        np.testing.assert_array_equal(a["known"][kind]["optimum"], c["known"][kind]["optimum"])
    coarse, fine = (np.asarray(a["starts"][f"v_closed_e{t}"]) for t in (0.3, 0.2))
    np.testing.assert_array_equal(coarse[:, :-1], fine[:, :-1])
    assert (coarse[:, -1] != fine[:, -1]).all()
    assert (jax.random.key_data(a["key"]) != jax.random.key_data(b["key"])).any()


@pytest.mark.slow
def test_lengths_are_compared_over_what_both_compiled():
    """The library's words against the lengths that all arms know of it; breadth first against the optimum."""
    states, outs = {}, {}
    for arm in ("uninformed", "sk", "random"):
        exp = small(arm, "ht_closed")
        state = exp.init(jax.random.key(0))
        for _ in range(exp.phases[-1].num_steps):
            state, _ = exp.phases[-1].step(state)
        states[arm], outs[arm] = state, exp.evaluate(state)
    assert outs["sk"]["ht_closed_e0.2/vs_sk"] == 1
    assert outs["sk"]["ht_closed_e0.2/with_sk"] == 100
    out = outs["uninformed"]
    assert out["ht_closed_e0.3/solved"] > 0
    assert out["ht_closed_e0.3/cost_gap"] == 0
    cost = benchmark.costs(states["uninformed"], "ht_closed_e0.2")
    sk = np.asarray(states["random"]["known"]["ht_closed_e0.2"]["sk"])
    both = np.isfinite(cost)
    np.testing.assert_allclose(
        out["ht_closed_e0.2/vs_sk"], cost[both].mean() / sk[both].mean(), rtol=1e-6
    )
    np.testing.assert_allclose(out["ht_closed_e0.2/with_sk"], 100 * both.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sets": ("clifford",)}, "k_max has no entry for the gate set 'clifford'"),
        ({"sets": ("v_close",)}, "no gate or set 'v_close'.*v_closed"),
        ({"eps": (0.1, -0.1)}, "eps=-0.1: expected 0 < eps < 1"),
        ({"exact_eps": 0.0}, "eps=0.0: expected 0 < eps < 1"),
        ({"solver": "bfs"}, "solver='bfs': expected best_first, beam"),
        ({"heuristic": "v"}, "heuristic='v': expected q, h"),
        ({"features": "angles"}, "features='angles': expected ptm, raw"),
        ({"block": 7, "sets": ("ht_closed",)}, "block=7 does not divide the 50 instances"),
        ({"solver": "sk", "sets": ("ht2_closed",)}, "no task with the gate set 'ht2_closed'"),
    ],
)
def test_bad_configs_say_so(changes, part):
    module, c = study(arm="uninformed", **changes)
    with pytest.raises(UserError, match=part) as e:
        module.build(c)
    assert "\n" not in str(e.value)


def test_a_set_that_is_not_universal():
    module, c = study(arm="uninformed", sets=("H,S",))
    c.k_max["H,S"], c.word_lengths["H,S"], c.table_len["H,S"] = 4, (1, 2), 4
    with pytest.raises(UserError, match=r"'H,S' is not universal.*24 elements.*e\.g\. T"):
        module.build(c)


def test_metrics_over_what_both_solved():
    """By hand: means over common instances only, and growth over instances solved at every place."""
    cost, other = np.array([3.0, 5.0, np.nan, 8.0]), np.array([6.0, np.nan, 100.0, 16.0])
    assert benchmark.versus(cost, other) == (0.5, 50.0)
    assert np.isnan(benchmark.versus(cost, np.full(4, np.nan))[0])
    a = np.array([[1.0, 1.0, 9.0], [2.0, 4.0, np.nan]])  # two places, three instances
    b = np.array([[2.0, np.nan, 1.0], [6.0, 1.0, 1.0]])
    means, slopes, share = benchmark.growth(np.stack([a, b]), np.array([0.0, 2.0]))
    np.testing.assert_allclose(means, [[1, 2], [2, 6]])
    np.testing.assert_allclose(slopes, [0.5, 2.0])
    assert round(share, 3) == 33.333
    means, slopes, share = benchmark.growth(np.full((2, 3), np.nan), np.array([0.0, 2.0]))
    assert np.isnan(means).all()
    assert np.isnan(slopes)
    assert share == 0


def test_claims_can_fail():
    """The same miss on every seed FAILS, the same hit HOLDS: fresh targets each time, so no lack of spread."""
    module, _ = study()
    for value, verdict in ((40.0, "FAILS"), (100.0, "HOLDS")):
        rows = []
        for claim in (c for c in module.CLAIMS if c.left[1].endswith("/solved")):
            for arm, v in (("aqstar", value), ("uninformed", 35.0)):
                task = claim.left[1].rpartition("/")[0]
                rows += [
                    {"arm": arm, "task": task, "metric": "solved", "seed": s, "value": v}
                    for s in range(3)
                ]
        solved = [v for v in claims.check(module.CLAIMS, rows, {}) if v.n]
        assert len(solved) == 10
        assert {v.verdict for v in solved} == {verdict}
    assert all(c.left[1].rpartition("/")[2] in module.METRICS for c in module.CLAIMS)
