"""Compiling as a search: exact Q from an enumerated group as the oracle of targets, searches and baselines."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantum import gatesets, unitaries, words
from qlab.quantum.ptm import ptm_of_unitary
from qlab.search import learning, search_many
from qlab.search.beam import beam, random_walks
from qlab.search.domains import compiler


@functools.cache
def setup(name):
    g = gatesets.gate_set(name)
    e = compiler.Elements(
        gatesets.identity(g), gatesets.compose(g, jnp), functools.partial(gatesets.matrix, xp=jnp),
        g.matrices, g.inverse, gatesets.COEF_LIMIT,
    )  # fmt: skip
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
    u = np.asarray(
        jax.vmap(lambda k: unitaries.haar(k, 2))(jax.random.split(jax.random.key(3), 12))
    )
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


@pytest.mark.parametrize(
    ("name", "size"), [("ht_closed", 3 + 1 + 6 + 12), ("v_free", 1 + 3 + 9 + 27)]
)
def test_equal_unitaries_are_one_state(name, size):
    """Breadth-first to depth 3 stores each distinct element once, for a target that is no group element."""
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
    table, q = exact_q(name, 5)
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
    noise = lambda k, t: unitaries.small_rotation(k, 2, 0.5 * t)  # noqa: E731
    d = compiler.compiler_domain("v", e, p, (0.2, 0.05), noise)
    s = jax.jit(lambda k: d.scrambles(k, 64, 0))(jax.random.key(0))
    r, eps = jax.jit(jax.vmap(lambda s: compiler.remaining(e, s)))(s)
    off = jnp.sqrt(jax.vmap(compiler.off_identity)(r))
    np.testing.assert_allclose(off, 0.5 * eps, rtol=0.02)
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
    r = random_walks(p, None, starts_of("v_closed", u), width=16, max_length=4, node_limit=20_000)
    assert np.asarray(r.solved).all()
    assert int(r.num_generated[2]) == 0
    for path, v, cost in zip(np.asarray(r.path), u, np.asarray(r.cost), strict=True):
        assert words.word_distance(path[path >= 0], g, v) < 1e-6
        assert (path >= 0).sum() == cost
    none = random_walks(p, None, starts_of("v_closed", u[:1]), width=16, max_length=4, node_limit=0)
    assert not bool(none.solved[0])


def test_costs_and_their_errors():
    """T dearer than H: the cheapest word may be longer; H T^2 H costs 2.2 here whatever the search finds first."""
    _, e, _ = setup("ht_closed")
    p = compiler.compiler_problem(e, unitaries.ptm_features, (0.1, 1.0, 1.0))
    zero = jax.tree_util.Partial(lambda _, enc: jnp.zeros((enc.shape[0], 3)), ())
    u = gatesets.word_matrix([0, 1, 1, 0], gatesets.gate_set("ht_closed"))[None]
    r = search_many(p, zero, starts_of("ht_closed", u), mode="qstar", stop="bound", max_nodes=512)
    np.testing.assert_allclose(r.cost, 2.2, rtol=1e-6)
    with pytest.raises(ValueError, match="3 positive"):
        compiler.compiler_problem(e, unitaries.ptm_features, (1.0, 0.0, 1.0))


def test_a_wrong_word_is_caught():
    g, e, p = setup("v_closed")
    solve = compiler.host_solver(e, lambda us: ([(0,), None], 5))
    u = np.stack([g.matrices[0], g.matrices[1]])
    check = compiler.verified(solve, e, lambda w, u: words.word_distance(w, g, u), 1e-3)
    r = check(p, None, np.asarray(starts_of("v_closed", u)))
    assert r.solved.tolist() == [True, False]
    with pytest.raises(RuntimeError, match="not within"):
        check(p, None, np.asarray(starts_of("v_closed", u[::-1])))
