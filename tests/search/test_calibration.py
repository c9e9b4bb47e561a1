"""Heuristics with known errors, and depths by breadth-first search in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.search.calibration import calibration, probe
from qlab.search.domains import domain, exact


def breadth_first(goal, moves):
    """{state: fewest moves} from the goal, moves(state) -> its neighbours."""
    depth, layer, d = {goal: 0}, [goal], 0
    while layer:
        d += 1
        layer = list({s for at in layer for s in moves(at) if s not in depth})
        depth |= dict.fromkeys(layer, d)
    return depth


def slides(s):
    at = s.index(0)
    row, col = divmod(at, 3)
    for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
        if 0 <= r < 3 and 0 <= c < 3:
            t = bytearray(s)
            t[at], t[3 * r + c] = t[3 * r + c], 0
            yield bytes(t)


def presses(s):
    for cell in range(9):
        row, col = divmod(cell, 3)
        yield bytes(lit ^ (abs(i // 3 - row) + abs(i % 3 - col) <= 1) for i, lit in enumerate(s))


@pytest.mark.parametrize(
    ("name", "goal", "moves", "macro_depth", "most"),
    [
        ("puzzle8", bytes((1, 2, 3, 4, 5, 6, 7, 8, 0)), slides, 1, 4096),
        ("puzzle8", bytes((1, 2, 3, 4, 5, 6, 7, 8, 0)), slides, 3, 1000),
        ("lightsout3", bytes(9), presses, 2, 4096),
    ],
)
def test_depths_and_weights_by_breadth_first_search(name, goal, moves, macro_depth, most):
    found = breadth_first(goal, moves)
    counts = np.bincount([-(-d // macro_depth) for d in found.values()])
    p = probe(domain(name, macro_depth), most, 0)
    states = [s.tobytes() for s in p.states]
    assert len(set(states)) == len(states) <= most
    assert [-(-found[s] // macro_depth) for s in states] == p.depth.tolist()
    np.testing.assert_allclose(np.bincount(p.depth, p.weight), counts, rtol=1e-6)
    each = min(most // len(counts), counts.max()) if counts.sum() > most else counts.max()
    np.testing.assert_array_equal(np.bincount(p.depth), np.minimum(counts, each))


@pytest.mark.parametrize(("name", "depth"), [("puzzle8", 1), ("lightsout4", 2)])
@pytest.mark.parametrize("kind", ["h", "q"])
def test_the_exact_heuristic_is_the_identity(name, depth, kind):
    d = domain(name, depth)
    found = calibration(*exact(d, kind), probe(d, 2000, 1))
    first = int(kind == "q")  # Q of a goal's actions is never asked for
    np.testing.assert_array_equal(found["learned"][first:], found["exact"][first:])
    np.testing.assert_array_equal(found["spread"][first:], 0)
    assert np.isnan(found["learned"][:first]).all()
    assert (float(found["h_error"]), float(found["h_over"])) == (0, 0)


def test_half_the_exact_cost():
    d = domain("puzzle8", 1)
    problem, h = exact(d, "h")
    half = jax.tree_util.Partial(lambda _, enc: 0.5 * h(enc), ())
    found = calibration(problem, half, probe(d, 1000, 0))
    np.testing.assert_array_equal(found["learned"], np.arange(32) / 2)
    np.testing.assert_array_equal(found["spread"], 0)
    depth = np.asarray(d.distance(d.states), np.float64)
    np.testing.assert_allclose(found["h_error"], depth[1:].mean() / 2, rtol=1e-6)  # but the goal
    assert float(found["h_over"]) == 0


@pytest.mark.parametrize("edges", [False, True])
def test_an_error_of_every_state_against_numpy(edges):
    """Exact costs plus a weight for each lit cell, on all states; Q: the second of three actions is least."""
    d = domain("lightsout3", 2)
    problem, h = exact(d, "h")
    off = np.linspace(-0.4, 0.9, 9).astype(np.float32)

    def heuristic(_, enc):
        value = h(enc) + enc @ off
        return jnp.stack([value + 1, value, value + 0.5], 1) if edges else value

    found = calibration(problem, jax.tree_util.Partial(heuristic, ()), probe(d, 9999, 0))
    depth = np.asarray(d.distance(d.states), int)
    error = d.states.astype(np.float64) @ off.astype(np.float64)
    for k in range(int(edges), depth.max() + 1):
        np.testing.assert_allclose(found["learned"][k], k + error[depth == k].mean(), atol=1e-5)
        np.testing.assert_allclose(found["spread"][k], error[depth == k].std(), atol=1e-5)
    inner = error[depth > 0]
    np.testing.assert_allclose(found["h_error"], np.abs(inner).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["h_over"], 100 * (inner > 1e-4).mean(), rtol=1e-5)


def test_drawn_states_speak_for_all():
    """The Manhattan distance: mean error over 3086 weighted states against all 181,439; never above."""
    d = domain("puzzle8", 1)
    weights = jnp.asarray(d.admissible, jnp.float32)
    manhattan = jax.tree_util.Partial(lambda w, enc: enc @ w, weights)
    every, some = (calibration(d.problem, manhattan, probe(d, n, 0)) for n in (10**6, 4096))
    # Errors of one depth have a standard deviation below 3.4; the large depths have 128 states each.
    np.testing.assert_allclose(some["learned"], every["learned"], atol=4 * 3.4 / 128**0.5)
    np.testing.assert_allclose(some["h_error"], every["h_error"], rtol=0.02)
    assert float(every["h_over"]) == float(some["h_over"]) == 0
    assert float(every["h_error"]) > 5


def test_a_domain_without_a_list_says_so():
    with pytest.raises(ValueError, match="puzzle15 has no list of states"):
        probe(domain("puzzle15"), 10, 0)
