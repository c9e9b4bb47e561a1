"""Domains against closed forms, brute force and published counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.search.domains import domain, exact, exact_q, lights_out, sliding
from qlab.search.problem import macro_words, with_macros

LAYERS = (1, 2, 4, 8, 16, 20, 39, 62, 116, 152, 286)


def test_8_puzzle_layers():
    dist, states = sliding.distances()
    counts = np.bincount(dist[dist >= 0])
    assert tuple(counts[:11]) == LAYERS
    assert tuple(counts[-2:]) == (221, 2)
    assert len(counts) == 32
    assert counts.sum() == len(states) == 181440


def brute_force(problem, goal, max_layers=99):
    """Distances from the goal by a set search with the JAX moves (the graph is symmetric)."""
    step = jax.jit(jax.vmap(jax.vmap(problem.next_state, (None, 0)), (0, None)))
    dist, layer, d = {goal.tobytes(): 0}, goal[None], 0
    actions = jnp.arange(problem.num_actions)
    while len(layer) and d < max_layers:
        d += 1
        width = 1 << (len(layer) - 1).bit_length()  # few shapes to compile
        padded = np.concatenate([layer, np.repeat(layer[:1], width - len(layer), 0)])
        out = []
        for s in np.asarray(step(padded, actions)).reshape(-1, goal.size):
            if s.tobytes() not in dist:
                dist[s.tobytes()] = d
                out.append(s)
        layer = np.array(out)
    return dist


def test_moves_of_the_8_puzzle_give_the_table():
    dist, _ = sliding.distances()
    found = brute_force(sliding.sliding(3), np.asarray(sliding.goal_state(3)), 12)
    for name, d in found.items():
        s = np.frombuffer(name, np.uint8)
        assert dist[int(sliding.ranks(s[None])[0])] == d
    assert len(found) == (dist[dist >= 0] <= 12).sum()


def test_the_law_of_scrambles_is_that_of_walking():
    """Every word of <= 4 moves by hand, and 4000 walked scrambles against the law at k_max = 60."""
    move = jax.jit(jax.vmap(sliding.sliding(3).next_state))
    dist, states = sliding.distances()
    want = np.zeros(len(states))
    row = {s.tobytes(): i for i, s in enumerate(states[:100])}
    for k in range(5):
        words = np.array(list(itertools.product(range(4), repeat=k)), np.int32).reshape(4**k, k)
        at = jnp.tile(sliding.goal_state(3), (len(words), 1))
        for a in words.T:
            at = move(at, jnp.asarray(a))
        for s in np.asarray(at):
            want[row[s.tobytes()]] += 1 / len(words) / 5
    np.testing.assert_allclose(sliding.walk_law(4), want, atol=1e-15)

    law, n = sliding.walk_law(60), 4000
    assert law.sum() == pytest.approx(1)
    ks = jax.random.randint(jax.random.key(0), (n,), 0, 61)
    keys = jax.random.split(jax.random.key(1), n)
    walked = jax.vmap(lambda key, k: sliding.scramble(key, 3, k, 60))(keys, ks)
    drawn = domain("puzzle8").scrambles(jax.random.key(2), n, 60)
    depth = dist[sliding.ranks(states)]
    p = np.bincount(depth, law)
    for sample in (walked, drawn):
        count = np.bincount(dist[sliding.ranks(np.asarray(sample))], minlength=32)
        chi2 = ((count - n * p) ** 2 / np.maximum(n * p, 1e-9))[n * p > 5].sum()
        assert chi2 < 55  # 99.9 % point of chi-square with about 25 degrees of freedom


@pytest.mark.parametrize(("name", "depth"), [("puzzle8", 1), ("lightsout3", 2)])
def test_listed_states_and_the_table_of_q(name, depth):
    d = domain(name, depth)
    np.testing.assert_array_equal(d.number(jnp.asarray(d.states)), np.arange(d.num_states))
    rows = np.random.default_rng(0).choice(d.num_states, 50)
    s = jnp.asarray(d.states[rows])
    want = exact(d, "q")[1](s.astype(jnp.float32))
    np.testing.assert_array_equal(exact_q(d)[rows], want)


def test_rank_is_the_lexicographic_index():
    for m in (3, 5):
        states = np.array(list(itertools.permutations(range(m))), np.uint8)
        np.testing.assert_array_equal(sliding.ranks(states), np.arange(len(states)))
        np.testing.assert_array_equal(
            jax.vmap(sliding.rank)(jnp.asarray(states)), np.arange(len(states))
        )


@pytest.mark.parametrize("depth", [2, 3])
def test_macro_distances_of_the_8_puzzle_are_divided_and_rounded_up(depth):
    d = domain("puzzle8", depth)
    found = brute_force(d.problem, np.asarray(sliding.goal_state(3)), 3)
    states = np.array([np.frombuffer(s, np.uint8) for s in found])
    np.testing.assert_array_equal(d.distance(jnp.asarray(states)), list(found.values()))
    assert (
        len(found)
        == (np.ceil(sliding.distances()[0] / depth)[sliding.distances()[0] >= 0] <= 3).sum()
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_lights_out_distances_by_brute_force(depth):
    d = domain("lightsout4", depth)
    found = brute_force(d.problem, np.zeros(16, np.uint8))
    assert len(found) == 4096 == d.num_states
    states = np.array([np.frombuffer(s, np.uint8) for s in found])
    np.testing.assert_array_equal(d.distance(jnp.asarray(states)), list(found.values()))


def test_lights_out_3x3_all_solvable_and_5x5_kernel():
    dist, states = lights_out.distances(3)
    assert len(states) == 512  # the 3 x 3 matrix is invertible
    assert dist.max() == 9
    assert [len(lights_out.kernel(n)) for n in (2, 3, 4, 5, 6)] == [0, 0, 4, 2, 0]
    unsolvable = np.zeros((1, 25), np.uint8)
    unsolvable[0, 0] = 1
    assert lights_out.solve(unsolvable, 5)[0] == -1


def test_macros_are_the_words_they_say(rng):
    p = sliding.sliding(3)
    m = with_macros(p, 3, undo=sliding.UNDO, sum_costs=True)
    words = macro_words(4, 3, undo=sliding.UNDO)
    s = jnp.asarray(sliding.distances()[1][rng.integers(0, 181440, 52)])
    for i, word in enumerate(words):
        want = s[i]
        for a in word[word >= 0]:
            want = p.next_state(want, a)
        np.testing.assert_array_equal(m.next_state(s[i], i), want)
        assert float(m.cost(s[i], i)) == (word >= 0).sum()
    assert with_macros(p, 3, dedup=False).num_actions == 4 + 16 + 64
    # All macros of Lights Out are different and none does nothing.
    flips = jax.vmap(lambda a: lights_out.lights_out(4, 3).next_state(jnp.zeros(16, jnp.uint8), a))(
        jnp.arange(696)
    )
    assert len(np.unique(np.asarray(flips), axis=0)) == 696
    assert np.asarray(flips).any(1).all()


@pytest.mark.parametrize(("name", "depth"), [("puzzle8", 1), ("puzzle8", 3), ("lightsout4", 2)])
def test_admissible_and_exact_heuristics(name, depth):
    d = domain(name, depth)
    s = jnp.asarray(d.instances(5, 400))
    dist = np.asarray(d.distance(s))
    enc = jax.vmap(d.problem.encode)(s)
    h = np.asarray(enc @ jnp.asarray(d.admissible) + d.offset)
    assert (h <= dist + 1e-4).all()
    assert h.mean() > 0.2 * dist.mean()
    problem, exact_h = exact(d, "h")
    np.testing.assert_array_equal(exact_h(jax.vmap(problem.encode)(s)), dist)
    problem, exact_q = exact(d, "q")
    q = np.asarray(exact_q(jax.vmap(problem.encode)(s)))
    np.testing.assert_array_equal(q.min(1), dist)  # Bellman


def test_manhattan_by_hand():
    s = jnp.array([8, 1, 2, 3, 4, 5, 6, 7, 0], jnp.uint8)
    want = sum(
        abs(i // 3 - (t - 1) // 3) + abs(i % 3 - (t - 1) % 3) for i, t in enumerate(s.tolist()) if t
    )
    assert float(sliding.sliding(3).encode(s) @ sliding.manhattan(3)) == want


def test_scrambles_reach_what_they_should():
    keys = jax.random.split(jax.random.key(0), 200)
    for name, n in (("puzzle8", 9), ("lightsout4", 16), ("puzzle15", 16)):
        d = domain(name)
        goal = d.scramble(keys[0], jnp.int32(0), 20)
        assert bool(d.problem.is_goal(goal))
        s = jax.vmap(lambda k: d.scramble(k, jnp.int32(3), 20))(keys)
        assert s.shape == (200, n)
        if d.distance is not None:
            dist = np.asarray(d.distance(s))
            assert dist.max() == 3
            assert dist.min() >= 0


def test_unknown_domain():
    with pytest.raises(ValueError, match="puzzle8, puzzle15"):
        domain("cube")
