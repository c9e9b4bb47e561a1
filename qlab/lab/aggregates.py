"""Statistics of a few runs on several tasks (Agarwal et al. 2021, arXiv 2108.13264), with bootstrap intervals.

An algorithm's scores are a list of arrays, one a task, a number a run. What resamples them draws runs within each
task (the stratified bootstrap) and takes percentiles. Every statistic accepts leading axes of resamples.
Letters: T = tasks, N = runs of a task, R = resamples, K = thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qlab.lab.stats import LEVEL, Interval

Scores = Sequence[np.ndarray]  # T arrays f64[..., N]; N may differ from task to task
RESAMPLES = 2000


def iqm(scores: Scores) -> np.ndarray:
    """Interquartile mean f64[...]: the mean of all runs of all tasks without the lowest and the highest quarter.

    >>> float(iqm([np.array([0.0, 1.0, 2.0, 9.0])]))
    1.5
    """
    x = np.sort(np.concatenate(list(scores), -1), -1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def optimality_gap(scores: Scores, target: float = 1.0) -> np.ndarray:
    """How far runs stay below `target` on average, those above it counted as at it, f64[...].

    >>> float(optimality_gap([np.array([0.5, 2.0])]))
    0.25
    """
    return target - np.minimum(np.concatenate(list(scores), -1), target).mean(-1)


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold f64[K], mean over the tasks, f64[..., K].

    >>> performance_profile([np.array([0.0, 1.0])], np.array([-1.0, 0.5, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    shares = [(x[..., :, None] > thresholds).mean(-2) for x in scores]
    return np.mean(shares, 0)


def probability_of_improvement(scores: Scores, others: Scores) -> np.ndarray:
    """Probability that a run of the first is above a run of the second on the same task, f64[...]; a tie is half.

    >>> float(probability_of_improvement([np.array([1.0, 2.0])], [np.array([0.0, 2.0])]))
    0.625
    """
    wins = []
    for x, y in zip(scores, others, strict=True):
        a, b = x[..., :, None], y[..., None, :]
        wins.append((a > b).mean((-2, -1)) + 0.5 * (a == b).mean((-2, -1)))
    return np.mean(wins, 0)


def resample(scores: Scores, rng: np.random.Generator, resamples: int) -> list[np.ndarray]:
    """Runs drawn with replacement within each task, T arrays f64[R, N]."""
    return [x[rng.integers(0, len(x), (resamples, len(x)))] for x in scores]


def bootstrap(
    statistic: Callable[..., Any],
    *groups: Scores,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The statistic of the groups and the percentiles of its stratified bootstrap: estimate, low, high.

    Groups are resampled independently. With few runs the interval is narrower than it says: five runs hold no
    more than five values.

    Raises:
      ValueError: a group without runs.

    >>> [float(x) for x in bootstrap(iqm, [np.array([3.0, 3.0, 3.0])])]
    [3.0, 3.0, 3.0]
    """
    if any(not len(x) for g in groups for x in g) or not all(map(len, groups)):
        raise ValueError("a task without runs cannot be resampled")
    rng = np.random.default_rng(seed)
    drawn = [resample(g, rng, resamples) for g in groups]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(statistic(*drawn), (tail, 100 - tail), axis=0)
    return np.asarray(statistic(*groups)), low, high


def interval(statistic: Callable[..., Any], *groups: Scores, **options: Any) -> Interval:
    """The same of a single number, as the reports' Interval; n counts the runs of the first group.

    With a single run on some task there is nothing to resample: low and high are nan.
    """
    estimate, low, high = bootstrap(statistic, *groups, **options)
    if any(len(x) < 2 for g in groups for x in g):
        low = high = np.float64(np.nan)
    return Interval(sum(map(len, groups[0])), float(estimate), float(low), float(high))
