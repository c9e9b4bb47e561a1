"""Queue and table against sorting and dictionaries."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.search import queue as Q
from qlab.search import table as T


@pytest.mark.parametrize("lifo", [True, False])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_select_is_a_lexicographic_sort(k, lifo, rng):
    for n in (1, 7, 300):
        f = rng.integers(-3, 4, n).astype(np.float32)
        f[rng.random(n) < 0.2] = np.inf
        f[rng.random(n) < 0.1] = -0.0
        g = rng.integers(0, 3, n).astype(np.float32)
        at, exists = jax.jit(Q.select, static_argnums=(2, 3))(f + 0.0, g, k, lifo)
        index = np.arange(n)
        order = np.lexsort((-index, -g, f)) if lifo else np.lexsort((index, f))
        want = np.sort(order[np.isfinite(f[order])][:k])
        np.testing.assert_array_equal(np.asarray(at)[np.asarray(exists)], want)


@pytest.mark.parametrize("lifo", [True, False])
@pytest.mark.parametrize(
    ("width", "k", "rows"),
    [
        (1, 1, 700),
        pytest.param(1, 6, 5000, marks=pytest.mark.slow),
        pytest.param(1, 200, 9000, marks=pytest.mark.slow),
        pytest.param(5, 1, 3000, marks=pytest.mark.slow),
        (5, 50, 4000),
    ],
)
def test_queue_pops_like_a_heap(width, k, rows, lifo):
    """Interleaved pushes and pops, with ties in f and g, dead ends and rounds of fewer rows than K."""
    rng = np.random.default_rng(width * k)
    shape = Q.layout(rows, width, k)
    q = Q.queue_init(shape)
    push = jax.jit(Q.push, static_argnums=1)
    pop = jax.jit(Q.pop, static_argnums=(1, 2, 3))
    heap, written, sign = [], 0, -1 if lifo else 1
    batch = max(2, rows // 40)
    for _ in range(30):
        count = int(rng.integers(0, batch + 1))
        f = rng.integers(0, 9, (batch, width)).astype(np.float32)
        f[rng.random(f.shape) < 0.1] = np.inf
        g = rng.integers(0, 3, batch).astype(np.float32)
        node = rng.integers(0, 1000, batch).astype(np.int32)
        q = push(q, shape, f, g, node, jnp.int32(count))
        for i in range(count):
            for a in range(width):
                if np.isfinite(f[i, a]):
                    entry = (written + i) * width + a
                    heapq.heappush(
                        heap, (f[i, a], -g[i] if lifo else 0, sign * entry, entry, node[i])
                    )
        written += count
        for _ in range(2):
            q, at, exists, value = pop(q, shape, k, lifo)
            want = sorted(
                (heapq.heappop(heap) for _ in range(min(k, len(heap)))), key=lambda e: e[3]
            )
            n = int(exists.sum())
            assert np.asarray(at)[:n].tolist() == [e[3] for e in want]
            assert np.asarray(value)[:n].tolist() == [e[0] for e in want]
            np.testing.assert_array_equal(q.node[at[:n] // width], [e[4] for e in want])
            assert int(q.num_open) == len(heap)


def test_pack_is_invertible_and_hash_spreads(rng):
    for shape, dtype in (
        ((9,), np.uint8),
        ((3, 5), np.int16),
        ((2,), np.float32),
        ((7,), np.bool_),
        ((4,), np.int32),
    ):
        x = (rng.random((50, *shape)) * 200 - (0 if np.dtype(dtype).kind in "ub" else 100)).astype(
            dtype
        )
        spec = jax.ShapeDtypeStruct(shape, dtype)
        words = T.pack(jnp.asarray(x))
        assert words.shape == (50, T.num_words(spec))
        np.testing.assert_array_equal(T.unpack(words, spec), x)
    z = (rng.normal(size=(5, 2, 2)) + 1j * rng.normal(size=(5, 2, 2))).astype(np.complex64)
    np.testing.assert_array_equal(
        T.unpack(T.pack(jnp.asarray(z)), jax.ShapeDtypeStruct((2, 2), jnp.complex64)), z
    )
    for n in (1, 3, 20):  # counters differ in few bits
        words = np.zeros((1 << 16, n), np.uint32)
        words[:, -1] = np.arange(1 << 16)
        h, step = T.hash64(jnp.asarray(words))
        load = np.bincount(np.asarray(h) & 0xFFF, minlength=4096)
        assert abs(load.var() / 16 - 1) < 0.2  # Poisson: variance = mean
        assert (
            len(set(zip(np.asarray(h).tolist(), np.asarray(step).tolist(), strict=True))) == 1 << 16
        )


@pytest.mark.parametrize("batch", [1, 30, pytest.param(2000, marks=pytest.mark.slow)])
def test_table_is_a_dictionary(batch, rng):
    """Numbers in batch order, in-batch duplicates, invalid entries, lookups, clearing, a nearly full table."""
    spec = jax.ShapeDtypeStruct((2,), jnp.int32)
    max_nodes = 900
    t = T.table_init(max_nodes, batch, spec)
    insert, lookup, clear = jax.jit(T.insert), jax.jit(T.lookup), jax.jit(T.table_clear)
    for _ in range(3):
        t = clear(t)
        known: dict[tuple, int] = {}
        for _ in range({1: 150, 30: 40, 2000: 5}[batch]):
            x = rng.integers(0, 28, (batch, 2)).astype(np.int32)
            valid = rng.random(batch) < 0.8
            words = T.pack(jnp.asarray(x))
            t, node, is_new = insert(t, words, valid)
            for i in range(batch):
                if valid[i]:
                    name = tuple(x[i].tolist())
                    assert bool(is_new[i]) == (name not in known)
                    assert int(node[i]) == known.setdefault(name, len(known))
            assert int(t.size) == len(known)
            found = lookup(t, words, np.ones(batch, bool))
            assert np.asarray(found).tolist() == [known.get(tuple(v), -1) for v in x.tolist()]


def test_table_forgets_when_its_base_runs_out():
    """After very many searches the base passes the end of i32 and the slots are wiped."""
    spec = jax.ShapeDtypeStruct((1,), jnp.int32)
    t = T.table_init(8, 1, spec)
    t = t._replace(base=jnp.int32(-(2**31) + 30))
    words = T.pack(jnp.array([[5]], jnp.int32))
    valid = np.ones(1, bool)
    for _ in range(6):
        t = T.table_clear(t)
        assert int(T.lookup(t, words, valid)[0]) == -1
        t, node, is_new = T.insert(t, words, valid)
        assert (int(node[0]), bool(is_new[0])) == (0, True)
        assert int(T.lookup(t, words, valid)[0]) == 0


def test_collisions_never_prune(monkeypatch):
    """With a hash of one value all states still have their own node."""
    monkeypatch.setattr(
        T, "hash64", lambda w: (jnp.zeros(len(w), jnp.uint32), jnp.zeros(len(w), jnp.uint32))
    )
    t = T.table_init(64, 40, jax.ShapeDtypeStruct((1,), jnp.int32))
    words = T.pack(jnp.arange(40, dtype=jnp.int32)[:, None])
    t, node, is_new = T.insert(t, words, np.ones(40, bool))
    assert np.asarray(is_new).all()
    assert np.asarray(node).tolist() == list(range(40))
    assert np.asarray(T.lookup(t, words, np.ones(40, bool))).tolist() == list(range(40))


def test_relax_takes_the_cheapest_offer_and_the_first_of_equals():
    t = T.table_init(8, 4, jax.ShapeDtypeStruct((1,), jnp.int32))
    t, node, _ = T.insert(t, T.pack(jnp.array([[1], [2], [1], [1]], jnp.int32)), np.ones(4, bool))
    g = jnp.array([3.0, 5.0, 2.0, 2.0])
    at = jnp.arange(4)
    t, win = T.relax(t, node, g, at, at, np.ones(4, bool))
    assert np.asarray(win).tolist() == [False, True, True, False]
    assert np.asarray(t.g[:2]).tolist() == [2.0, 5.0]
    assert np.asarray(t.parent[:2]).tolist() == [2, 1]
    t, win = T.relax(t, node, g, at, at, np.ones(4, bool))  # equal is not better
    assert not np.asarray(win).any()
    assert not np.asarray(t.mark).any()
