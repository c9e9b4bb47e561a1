"""Cubes: DeepCubeA's stored solutions solve, published layer sizes, group identities, exact searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.data.puzzles import puzzles
from qlab.lab.errors import UserError
from qlab.search import nets, search_many
from qlab.search.domains import cube, domain, exact

# Positions of the 2 x 2 x 2 cube by quarter turns (OEIS A079761 up to symmetry: God's number 14).
LAYERS = [1, 6, 27, 120, 534, 2256, 8969, 33058, 114149, 360508, 930588, 1350852, 782536, 90280, 276]  # fmt: skip


def after(n, s, names):
    table, known = cube.turns(n), cube.move_names(n)
    for name in names:
        s = s[table[known.index(name)]]
    return s


@pytest.fixture(scope="module")
def stored():
    try:
        return puzzles("cube3")
    except UserError as e:
        pytest.skip(str(e))


def test_stored_solutions_solve_the_stored_states(stored):
    for state, solution in zip(stored.states, stored.solutions, strict=True):
        np.testing.assert_array_equal(after(3, state, solution), np.arange(54))


@pytest.mark.parametrize("n", [2, 3])
def test_turns_are_of_order_four_and_undo_each_other(n):
    table, goal = cube.turns(n).astype(int), np.arange(6 * n * n)
    for back, forth in zip(table[::2], table[1::2], strict=True):
        np.testing.assert_array_equal(back[forth], goal)
        quarter = goal
        for i in range(4):
            assert (quarter == goal).all() == (i == 0)
            quarter = quarter[forth]
        np.testing.assert_array_equal(quarter, goal)
        assert (forth != goal).sum() == (20 if n == 3 else 12)
    assert (table[:, 4::9] == goal[4::9]).all() or n == 2  # centres stay


def test_identities_of_the_group():
    goal = np.arange(54)
    sexy = ["R1", "U1", "R-1", "U-1"]
    assert (after(3, goal, sexy * 6) == goal).all()
    assert not (after(3, goal, sexy * 3) == goal).all()
    sune = ["R1", "U1", "R-1", "U1", "R1", "U1", "U1", "R-1"]
    assert (after(3, goal, sune * 6) == goal).all()
    assert (after(3, goal, ["U1", "D-1"]) == after(3, goal, ["D-1", "U1"])).all()
    # The order of R U is 105.
    state, count = after(3, goal, ["R1", "U1"]), 1
    while not (state == goal).all():
        state, count = after(3, state, ["R1", "U1"]), count + 1
    assert count == 105


def test_macros_are_words_or_what_they_do():
    assert [len(cube.macro_turns(3, d, dedup=False)) for d in (1, 2, 3)] == [12, 156, 1884]
    # Positions within 1, 2, 3 quarter turns: 12, 114, 1068 new ones.
    assert [len(cube.macro_turns(3, d, dedup=True)) for d in (1, 2, 3)] == [12, 126, 1194]
    p, base = cube.cube(3, 2, dedup=False), cube.cube(3)
    s = cube.scramble(jax.random.key(0), 3, jnp.int32(30), 30)
    two = p.next_state(s, 12 + 5 * 12 + 7)
    np.testing.assert_array_equal(two, base.next_state(base.next_state(s, 5), 7))


def test_layers_of_the_small_cube_are_the_published_ones():
    assert np.bincount(cube.distances2()).tolist() == LAYERS
    assert sum(LAYERS) == 3674160 == 5040 * 729


def test_numbers_of_the_small_cube():
    number = np.random.default_rng(0).integers(0, 3674160, 2000)
    states = cube.unrank2(number)
    np.testing.assert_array_equal(jax.vmap(cube.rank2)(jnp.asarray(states)), number)
    assert int(cube.rank2(cube.goal_state(2))) == 0
    d, table = cube.distances2()[number].astype(int), jnp.asarray(cube.turns(2))
    reached = np.asarray(jax.vmap(jax.vmap(cube.rank2))(jnp.asarray(states)[:, table]))
    near = cube.distances2()[reached].astype(int)
    assert (abs(near - d[:, None]) == 1).all()  # a quarter turn is an odd permutation of corners
    assert (near.min(1) == d - 1)[d > 0].all()


@pytest.mark.parametrize(("mode", "kind"), [("astar", "h"), ("qstar", "q")])
def test_exact_values_solve_the_small_cube_at_optimal_cost(mode, kind):
    d = domain("cube2", 2)
    problem, heuristic = exact(d, kind)
    starts = d.instances(1, 6)
    got = search_many(problem, heuristic, starts, jax.random.key(0), mode=mode, max_nodes=5000)
    np.testing.assert_array_equal(got.cost, d.distance(jnp.asarray(starts)))
    assert got.solved.all()


def test_the_linear_heuristic_never_overestimates(stored):
    for name, states, cost in (
        ("cube3", stored.states, stored.lengths),
        ("cube2", cube.unrank2(np.arange(0, 3674160, 997)), cube.distances2()[::997]),
    ):
        d = domain(name)
        h = nets.linear(
            (jnp.asarray(d.admissible), jnp.float32(d.offset)),
            jax.vmap(d.problem.encode)(jnp.asarray(states)),
        )
        assert (np.asarray(h) <= cost + 1e-4).all()
        assert h.max() > 1


def test_instances_and_names(stored):
    d = domain("cube3")
    np.testing.assert_array_equal(d.instances(0, 7), stored.states[:7])
    np.testing.assert_array_equal(d.optima(7), stored.lengths[:7])
    with pytest.raises(UserError, match="eval_states=501: cube3 has 500 test states"):
        d.instances(0, 501)
    with pytest.raises(ValueError, match="cube2, cube3 or lightsout<n>"):
        domain("cube4")
    assert domain("puzzle24").problem.num_actions == 4
    assert domain("puzzle24").instances(0, 2).shape == (2, 25)
