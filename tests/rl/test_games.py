"""Entropy-regularised zero-sum games against linear programming, enumeration and hand-derived fixed points."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from qlab.rl import games as g

GIVEN = np.array([[2.0, -1.0], [-1.0, 1.0]])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def lp_value(a):
    """The game's value as the row player's linear program, written out apart from the module's."""
    m, k = a.shape
    shift = 1 - a.min()  # all payoffs positive: minimise sum z, z^T A >= 1, value = 1 / sum z
    out = linprog(np.ones(m), A_ub=-(a + shift).T, b_ub=-np.ones(k), bounds=[(0, None)] * m)
    return 1 / out.fun - shift


@pytest.mark.parametrize(
    ("tx", "ty"), [(1.0, 1.0), (0.1, 3.0), (0.01, 0.01), (5.0, 0.02), (1e-3, 1e-3)]
)
@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (6, 2)])
def test_both_players_answer_with_their_softmax(shape, tx, ty, rng):
    a = rng.normal(size=shape)
    eq = g.qre_matrix(a, tx, ty)
    np.testing.assert_allclose(eq.x, softmax(a @ eq.y / tx), atol=1e-9)
    np.testing.assert_allclose(eq.y, softmax(-a.T @ eq.x / ty), atol=1e-8)
    assert eq.residual < 1e-8
    np.testing.assert_allclose(eq.value, eq.x @ a @ eq.y, atol=1e-12)

    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum()

    np.testing.assert_allclose(
        eq.soft_value, eq.value + tx * entropy(eq.x) - ty * entropy(eq.y), atol=1e-9
    )


def test_the_saddle_point_beats_every_deviation(rng):
    a, tx, ty = rng.normal(size=(3, 4)), 0.3, 0.7
    eq = g.qre_matrix(a, tx, ty)

    def payoff(x, y):
        return x @ a @ y - tx * (x * np.log(x)).sum() + ty * (y * np.log(y)).sum()

    for _ in range(200):
        assert payoff(rng.dirichlet(np.ones(3)), eq.y) <= eq.soft_value + 1e-10
        assert payoff(eq.x, rng.dirichlet(np.ones(4))) >= eq.soft_value - 1e-10


def test_equals_a_damped_fixed_point_where_that_converges(rng):
    a, tx, ty = rng.normal(size=(3, 4)), 0.5, 0.8
    x, y = np.full(3, 1 / 3), np.full(4, 1 / 4)
    for _ in range(20_000):
        x, y = x + 0.05 * (softmax(a @ y / tx) - x), y + 0.05 * (softmax(-a.T @ x / ty) - y)
    eq = g.qre_matrix(a, tx, ty)
    np.testing.assert_allclose(eq.x, x, atol=1e-10)
    np.testing.assert_allclose(eq.y, y, atol=1e-10)


@pytest.mark.parametrize("tx", [0.01, 0.3, 2.0])
def test_a_symmetric_game_has_value_zero(tx, rng):
    b = rng.normal(size=(4, 4))
    eq = g.qre_matrix(b - b.T, tx, tx)
    assert abs(eq.value) < 1e-8
    np.testing.assert_allclose(eq.x, eq.y, atol=1e-7)


def test_a_hot_adversary_is_uniform_and_the_protagonist_answers_it(rng):
    a = rng.normal(size=(3, 4))
    eq = g.qre_matrix(a, 0.2, 1e7)
    np.testing.assert_allclose(eq.y, 0.25, atol=1e-6)
    np.testing.assert_allclose(eq.x, softmax(a @ np.full(4, 0.25) / 0.2), atol=1e-5)


def test_a_cold_equilibrium_is_nash_and_the_path_leads_there(rng):
    for _ in range(5):
        a = rng.normal(size=(4, 3))
        np.testing.assert_allclose(g.nash_matrix(a).value, lp_value(a), atol=1e-8)
        gaps = [g.exploitability(g.qre_matrix(a, t, t).x, a) for t in (1.0, 1e-1, 1e-2, 1e-4)]
        # Each player gives up at most t log(actions) at temperature t.
        assert all(
            -1e-9 <= x <= t * np.log(4 * 3) + 1e-9
            for x, t in zip(gaps, (1.0, 1e-1, 1e-2, 1e-4), strict=True)
        )
        assert abs(g.qre_matrix(a, 1e-4, 1e-4).value - lp_value(a)) < 1e-3


def test_the_given_game():
    """[[2, -1], [-1, 1]]: equalising gives x = y = (2/5, 3/5) and value 1/5."""
    eq = g.qre_matrix(GIVEN, 0.01, 0.01)
    np.testing.assert_allclose(eq.x, [0.4, 0.6], atol=2e-3)
    np.testing.assert_allclose(g.nash_matrix(GIVEN).x, [0.4, 0.6], atol=1e-9)
    path = [g.qre_matrix(GIVEN, 0.01, t) for t in np.geomspace(100, 0.01, 30)]
    least = [g.worst_case(e.x, GIVEN) for e in path]
    assert np.diff(least).min() >= -1e-12
    assert least[0] < -0.99
    assert least[-1] > 0.19


def markov(rng, s=3, m=2, k=2):
    return rng.dirichlet(np.ones(s), size=(s, m, k)), rng.normal(size=(s, m, k))


def test_soft_markov_game_is_a_fixed_point_and_one_action_gives_soft_value_iteration(rng):
    p, r = markov(rng)
    eq = g.soft_minimax_vi(p, r, 0.8, 0.1, 0.5)
    for s in range(3):
        stage = g.qre_matrix(r[s] + 0.8 * p[s] @ eq.soft_value, 0.1, 0.5)
        np.testing.assert_allclose(stage.soft_value, eq.soft_value[s], atol=1e-8)
    # An adversary with one action leaves an entropy-regularised decision process.
    p, r = markov(rng, k=1)
    eq, v = g.soft_minimax_vi(p, r, 0.8, 0.3, 0.5), np.zeros(3)
    for _ in range(300):
        v = 0.3 * np.logaddexp.reduce((r + 0.8 * p @ v)[..., 0] / 0.3, axis=1)
    np.testing.assert_allclose(eq.soft_value, v, atol=1e-8)


def test_shapley_and_the_worst_case_against_enumeration(rng):
    """Every deterministic reply of the adversary, tried: none does better than the policy iteration."""
    p, r = markov(rng)
    gamma = 0.7
    nash = g.soft_minimax_vi(p, r, gamma, 0.0, 0.0)
    np.testing.assert_allclose(
        nash.soft_value,
        [lp_value(r[s] + gamma * p[s] @ nash.soft_value) for s in range(3)],
        atol=1e-8,
    )

    def by_enumeration(x):
        best = np.full(3, np.inf)
        for reply in itertools.product(range(2), repeat=3):
            flow = np.stack([x[s] @ p[s, :, reply[s]] for s in range(3)])
            pay = np.array([x[s] @ r[s, :, reply[s]] for s in range(3)])
            best = np.minimum(best, np.linalg.solve(np.eye(3) - gamma * flow, pay))
        return best

    for x in (nash.x, np.full((3, 2), 0.5), g.soft_minimax_vi(p, r, gamma, 0.01, 5.0).x):
        np.testing.assert_allclose(
            g.markov_worst_case(p, r, gamma, x), by_enumeration(x), atol=1e-9
        )
    np.testing.assert_allclose(by_enumeration(nash.x), nash.value, atol=1e-7)
    cold = g.soft_minimax_vi(p, r, gamma, 1e-3, 1e-3)
    np.testing.assert_allclose(cold.value, nash.value, atol=2e-2)


def test_an_adversary_who_cools_is_feared_more(rng):
    p, r = markov(rng)
    least = [
        g.markov_worst_case(p, r, 0.7, g.soft_minimax_vi(p, r, 0.7, 1e-3, t).x).mean()
        for t in (50.0, 1e-3)
    ]
    nash = g.soft_minimax_vi(p, r, 0.7, 0.0, 0.0).value.mean()
    assert least[0] <= least[1] + 1e-6
    assert abs(least[1] - nash) < 1e-2


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: g.qre_matrix(GIVEN, 0.0, 1.0), "temperatures"),
        (lambda: g.qre_matrix(GIVEN, 1.0, np.inf), "temperatures"),
        (lambda: g.qre_matrix(GIVEN[0], 1.0, 1.0), "shape"),
        (lambda: g.soft_minimax_vi(np.ones((2, 2, 2, 2)), np.ones((2, 2, 2)), 0.9, 1, 1), "rows of P"),
        (lambda: g.soft_minimax_vi(np.ones((2, 2, 2, 3)) / 3, np.ones((2, 2, 2)), 0.9, 1, 1), "expected"),
        (lambda: g.soft_minimax_vi(np.ones((2, 2, 2, 2)) / 2, np.ones((2, 2, 2)), 1.0, 1, 1), "gamma"),
    ],
)  # fmt: skip
def test_bad_games_name_what_is_wrong(call, word):
    with pytest.raises(ValueError, match=word):
        call()
