"""The allocator against brute force, and an integer programme of SciPy."""

import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantization.bit_allocation import (
    brute_force_bits,
    greedy_bits,
    random_bits,
    solve_bits,
)

BITS = np.array([2, 3, 4, 6, 8])


def table(rng, num, falling=True):
    omega = rng.random((num, len(BITS)))
    omega = -np.sort(-omega, 1) if falling else omega
    return omega, rng.integers(1, 9, num)[:, None] * 8 * BITS


def total(omega, columns):
    return omega[np.arange(len(omega)), columns].sum()


@pytest.mark.parametrize("num", range(1, 7))
@pytest.mark.parametrize("falling", [True, False])
def test_equals_brute_force(num, falling):
    rng = np.random.default_rng(num)
    for _ in range(8 if num < 6 else 2):
        omega, cost = table(rng, num, falling)
        budget = rng.uniform(cost.min(1).sum(), cost.max(1).sum() * 1.1)
        got, want = solve_bits(omega, cost, budget), brute_force_bits(omega, cost, budget)
        assert total(cost, got) <= budget
        np.testing.assert_allclose(total(omega, got), total(omega, want), rtol=1e-12)
        np.testing.assert_array_equal(got, want)  # omegas are all different


def test_equals_an_integer_programme_at_size():
    from scipy.optimize import Bounds, LinearConstraint, milp

    rng = np.random.default_rng(3)
    omega, cost = table(rng, 40)
    budget = int(cost[:, 2].sum())
    rows = np.kron(np.eye(40), np.ones(len(BITS)))
    found = milp(
        omega.ravel(), integrality=np.ones(omega.size), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(rows, 1, 1), LinearConstraint(cost.reshape(1, -1), 0, budget)],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    got = solve_bits(omega, cost, budget)
    np.testing.assert_allclose(total(omega, got), found.fun, rtol=1e-9)
    assert total(cost, got) <= budget


def test_a_budget_of_most_bits_gives_most_bits_and_the_least_gives_least():
    rng = np.random.default_rng(0)
    omega, cost = table(rng, 6)
    assert solve_bits(omega, cost, cost[:, -1].sum()).tolist() == [4] * 6
    assert solve_bits(omega, cost, np.inf).tolist() == [4] * 6
    assert solve_bits(omega, cost, cost[:, 0].sum()).tolist() == [0] * 6


def test_of_equal_omegas_the_cheaper_is_taken():
    assert solve_bits([[1.0, 1.0, 0.5, 0.5]], [[2, 3, 4, 8]], 100).tolist() == [2]
    assert solve_bits([[1.0, 0.5]], [[4, 2]], 10).tolist() == [1]  # costs need not rise


def test_ties_share_a_column():
    rng = np.random.default_rng(5)
    omega, cost = table(rng, 4)
    budget = cost[:, 2].sum()
    got = solve_bits(omega, cost, budget, ties=[(0, 3)])
    assert got[0] == got[3]
    merged = np.stack([omega[0] + omega[3], omega[1], omega[2]])
    merged_cost = np.stack([cost[0] + cost[3], cost[1], cost[2]])
    want = brute_force_bits(merged, merged_cost, budget)
    np.testing.assert_array_equal(got, [want[0], want[1], want[2], want[0]])


def test_infinite_omega_forbids_a_column():
    omega = [[np.inf, 5.0], [1.0, np.inf]]
    assert solve_bits(omega, [[1, 9], [1, 9]], 10).tolist() == [1, 0]
    with pytest.raises(UserError, match="budget of 9"):
        solve_bits(omega, [[1, 9], [1, 9]], 9)


@pytest.mark.parametrize(
    ("omega", "cost", "budget", "ties", "message"),
    [
        ([[1.0, 0.0]], [[2, 4]], 1, None, "budget of 1 is below 2"),
        ([[1.0, np.nan]], [[2, 4]], 9, None, "NaN"),
        ([[1.0, 0.0]], [[2.5, 4]], 9, None, "whole numbers"),
        ([[1.0, 0.0]], [[2, 4, 6]], 9, None, "omega"),
        ([[1.0, 0.0]] * 2, [[2, 4]] * 2, 9, [(0, 2)], "ties"),
        ([[1.0, 0.0]], [[2, 4]], np.nan, None, "budget"),
    ],
)
def test_bad_input_is_one_line(omega, cost, budget, ties, message):
    with pytest.raises(UserError, match=message):
        solve_bits(omega, cost, budget, ties)


def test_baselines_stay_within_the_budget_and_greedy_can_be_beaten():
    rng = np.random.default_rng(1)
    worse = 0
    for _ in range(50):
        omega, cost = table(rng, 5)
        budget = cost[:, 2].sum()
        got = {
            "greedy": greedy_bits(omega, cost, budget),
            "random": random_bits(rng, cost, budget),
        }
        best = total(omega, solve_bits(omega, cost, budget))
        for columns in got.values():
            assert total(cost, columns) <= budget
            assert total(omega, columns) >= best - 1e-12
        worse += total(omega, got["greedy"]) > best + 1e-9
        left = budget - total(cost, got["random"])
        step = np.diff(cost, axis=1)[np.arange(5), np.minimum(got["random"], 3)]
        assert (step[got["random"] < 4] > left).all()  # nothing more would have fitted
    assert worse
