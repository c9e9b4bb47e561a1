"""Aggregates of a few runs: against rliable 1.2.0 (with arch 7.2.0), brute force, and coverage on known distributions."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qlab.lab import aggregates as ag

# Six runs on three tasks each; what follows them was printed by rliable with 50,000 (20,000) resamples.
A = np.array([[0.5, 0.59, 0.418], [0.233, 0.364, 0.203], [0.518, 0.902, 0.352],
              [0.314, 0.647, 0.607], [0.532, 0.221, 0.491], [0.709, 0.097, 0.363]])  # fmt: skip
B = np.array([[-0.17, 0.013, -0.153], [0.329, 0.02, 0.481], [0.447, 0.344, -0.355],
              [0.238, 0.385, 0.434], [-0.059, 0.257, 0.106], [0.157, 0.718, 0.158]])  # fmt: skip
THRESHOLDS = np.array([0, 0.25, 0.5, 0.75, 1.0])
PROFILE = [1.0, 0.7777777777777778, 0.3888888888888889, 0.05555555555555555, 0.0]
PROFILE_LOW = [1.0, 0.5555555555555556, 0.16666666666666666, 0.0, 0.0]
PROFILE_HIGH = [1.0, 0.9444444444444444, 0.6111111111111112, 0.16666666666666666, 0.0]


def tasks(x):
    return list(x.T)


def test_estimates_are_rliables():
    assert ag.iqm(tasks(A)) == pytest.approx(0.4442, abs=1e-12)
    assert ag.iqm(tasks(B)) == pytest.approx(0.2007, abs=1e-12)
    assert ag.optimality_gap(tasks(A)) == pytest.approx(0.5521666666666667)
    assert ag.probability_of_improvement(tasks(A), tasks(B)) == pytest.approx(0.7685185185185185)
    np.testing.assert_allclose(ag.performance_profile(tasks(A), THRESHOLDS), PROFILE)


def test_intervals_are_rliables_up_to_resampling():
    got = ag.interval(ag.iqm, tasks(A), resamples=20_000)
    assert (got.n, got.mean) == (18, pytest.approx(0.4442))
    np.testing.assert_allclose([got.low, got.high], [0.3383, 0.5396], atol=0.006)
    got = ag.interval(ag.probability_of_improvement, tasks(A), tasks(B), resamples=20_000)
    np.testing.assert_allclose([got.low, got.high], [0.59259, 0.91667], atol=0.006)
    _, low, high = ag.bootstrap(
        lambda s: ag.performance_profile(s, THRESHOLDS), tasks(A), resamples=20_000
    )
    np.testing.assert_allclose(low, PROFILE_LOW, atol=1 / 18 + 1e-9)  # shares come in eighteenths
    np.testing.assert_allclose(high, PROFILE_HIGH, atol=1 / 18 + 1e-9)
    assert np.abs(low - PROFILE_LOW).sum() + np.abs(high - PROFILE_HIGH).sum() < 0.12


@pytest.mark.parametrize("n", [1, 3, 4, 5, 10])
def test_iqm_is_scipys_trimmed_mean(n, rng):
    scores = [rng.normal(size=n), rng.normal(size=n + 2)]
    want = scipy_stats.trim_mean(np.concatenate(scores), 0.25)
    assert ag.iqm(scores) == pytest.approx(want)


def test_probability_of_improvement_is_mann_whitneys_u_over_all_pairs(rng):
    x, y = rng.integers(0, 5, 7).astype(float), rng.integers(0, 5, 4).astype(float)
    u = scipy_stats.mannwhitneyu(x, y).statistic
    assert ag.probability_of_improvement([x], [y]) == pytest.approx(u / 28)
    assert ag.probability_of_improvement([x], [x]) == pytest.approx(0.5)


def test_the_bootstrap_is_the_enumeration_of_all_resamples_within_tasks():
    """Two runs on two tasks: 16 equally likely resamples, no run ever leaves its task."""
    scores = [np.array([0.0, 1.0]), np.array([10.0, 30.0])]
    mean = lambda s: np.mean([x.mean(-1) for x in s], 0)  # noqa: E731
    every = [
        (np.mean(a) + np.mean(b)) / 2
        for a in itertools.product(scores[0], repeat=2)
        for b in itertools.product(scores[1], repeat=2)
    ]
    drawn = mean(ag.resample(scores, np.random.default_rng(0), 40_000))
    values, counts = np.unique(np.round(drawn, 9), return_counts=True)
    want = {round(v, 9): every.count(v) / 16 for v in every}
    assert set(values) == set(want)
    np.testing.assert_allclose(counts / 40_000, [want[v] for v in values], atol=0.01)


def test_intervals_cover_the_mean_of_a_normal_about_as_often_as_they_say(rng):
    hit = 0
    for _ in range(200):
        c = ag.interval(lambda s: s[0].mean(-1), [rng.normal(size=30)], resamples=500)
        hit += c.low <= 0 <= c.high
    assert 0.88 <= hit / 200 <= 0.99


def test_resamples_are_the_same_every_time_and_empty_tasks_are_refused():
    assert ag.interval(ag.iqm, tasks(A)) == ag.interval(ag.iqm, tasks(A))
    for empty in ([], [np.array([])], [np.ones(3), np.array([])]):
        with pytest.raises(ValueError, match="without runs"):
            ag.bootstrap(ag.iqm, empty)


def test_a_single_run_has_no_interval():
    got = ag.interval(ag.iqm, [np.array([1.0]), np.array([2.0, 3.0])])
    assert (got.n, got.mean) == (3, 2.0)
    assert np.isnan([got.low, got.high]).all()
