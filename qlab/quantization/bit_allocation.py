"""Which layer gets how many bits: the multiple-choice knapsack, solved exactly, and baselines for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from qlab.lab.errors import UserError

MOST_CELLS = 200_000_000  # of the table of the dynamic programme


def solve_bits(
    omega, cost, budget: float, ties: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """The columns of least total omega whose total cost is within the budget; exact.

    A dynamic programme over the cost in units of the greatest common divisor of its differences, in float64. Of
    equal totals one of least cost is returned.

    Args:
      omega: f[L, B], sensitivity of layer l in column k (its k-th width); inf forbids a column.
      cost: whole numbers [L, B] (n_l * bits). budget: of the sum of costs.
      ties: groups of layers that must take the same column.
    Returns:
      i32[L], COLUMN INDICES, not bits.
    Raises:
      UserError: no choice fits the budget, or the arrays are unfit.

    >>> solve_bits([[9.0, 1.0], [5.0, 4.0]], [[2, 4], [2, 4]], 6).tolist()
    [1, 0]
    """
    omega, cost = _checked(omega, cost)
    groups = _groups(len(omega), ties)
    w = np.stack([omega[g].sum(0) for g in groups])
    c = np.stack([cost[g].sum(0) for g in groups])
    allowed = np.isfinite(w)
    if not allowed.any(1).all():
        raise UserError("solve_bits: a layer has no column of finite omega")
    least = np.where(allowed, c, np.iinfo(np.int64).max).min(1)
    if not budget >= least.sum():
        raise UserError(
            f"solve_bits: the budget of {budget:g} is below {least.sum()}, the least cost of all layers; "
            "raise it or offer fewer bits"
        )
    extra = np.where(allowed, c - least[:, None], 0)
    room = min(math.floor(min(budget, 2.0**62)) - int(least.sum()), int(extra.max(1).sum()))
    unit = math.gcd(*extra.ravel().tolist()) or 1
    extra, room = extra // unit, room // unit
    if len(groups) * (room + 1) > MOST_CELLS:
        raise UserError(
            f"solve_bits: {len(groups)} layers times {room + 1} units of cost ({unit} each) are too many; "
            "round the costs to a coarser unit"
        )
    best = np.zeros(room + 1)  # least omega of the layers so far, at most so much cost
    choice = np.empty((len(groups), room + 1), np.int16)
    for i, (w_i, c_i, ok) in enumerate(zip(w, extra, allowed, strict=True)):
        new = np.full(room + 1, np.inf)
        taken = np.zeros(room + 1, np.int16)
        # the cheapest column first, so that it wins among equals
        for k in np.argsort(c_i, kind="stable"):
            if ok[k] and c_i[k] <= room:
                total = np.full(room + 1, np.inf)
                total[c_i[k] :] = best[: room + 1 - c_i[k]] + w_i[k]
                better = total < new
                new[better], taken[better] = total[better], k
        best, choice[i] = new, taken
    at = int(np.flatnonzero(best == best[-1])[0])  # the least cost of that omega
    columns = np.empty(len(omega), np.int32)
    for i in range(len(groups) - 1, -1, -1):
        columns[groups[i]] = choice[i, at]
        at -= int(extra[i, choice[i, at]])
    return columns


def greedy_bits(omega, cost, budget: float) -> np.ndarray:
    """A baseline: from the cheapest columns up, always the step that lowers omega most for its cost and fits.

    >>> greedy_bits([[9.0, 1.0], [5.0, 4.0]], [[2, 4], [2, 4]], 6).tolist()
    [1, 0]
    """
    omega, cost = _checked(omega, cost)
    order = np.argsort(cost, 1, kind="stable")
    place = np.zeros(len(omega), int)
    layers = np.arange(len(omega))
    now = order[:, 0]
    if cost[layers, now].sum() > budget:
        raise UserError(f"greedy_bits: the budget of {budget:g} is below the least cost")
    while True:
        left = budget - cost[layers, now].sum()
        steps = []
        for i in layers:
            for j in range(place[i] + 1, order.shape[1]):
                k = order[i, j]
                more, gain = cost[i, k] - cost[i, now[i]], omega[i, now[i]] - omega[i, k]
                if more <= left and gain > 0:
                    steps.append((gain / max(more, 1e-12), -i, -j))
        if not steps:
            return now.astype(np.int32)
        _, i, j = max(steps)
        place[-i], now[-i] = -j, order[-i, -j]


def random_bits(rng: np.random.Generator, cost, budget: float) -> np.ndarray:
    """A baseline: columns of a random order of preference, as many bits as the budget allows.

    Layers in random order; random single steps up are taken while one fits.

    >>> random_bits(np.random.default_rng(0), [[2, 4]], 4).tolist()
    [1]
    """
    _, cost = _checked(np.zeros_like(np.asarray(cost, float)), cost)
    order = np.argsort(cost, 1, kind="stable")
    place, layers = np.zeros(len(cost), int), np.arange(len(cost))
    if cost[layers, order[:, 0]].sum() > budget:
        raise UserError(f"random_bits: the budget of {budget:g} is below the least cost")
    while True:
        total = cost[layers, order[layers, place]].sum()
        able = [
            i
            for i in layers
            if place[i] + 1 < order.shape[1]
            and total + cost[i, order[i, place[i] + 1]] - cost[i, order[i, place[i]]] <= budget
        ]
        if not able:
            return order[layers, place].astype(np.int32)
        place[rng.choice(able)] += 1


def brute_force_bits(omega, cost, budget: float) -> np.ndarray:
    """The oracle of `solve_bits`: all B^L choices, for small L.

    >>> brute_force_bits([[9.0, 1.0], [5.0, 4.0]], [[2, 4], [2, 4]], 6).tolist()
    [1, 0]
    """
    omega, cost = _checked(omega, cost)
    layers = np.arange(len(omega))
    best: tuple[float, int, tuple[int, ...]] | None = None
    for columns in itertools.product(range(omega.shape[1]), repeat=len(omega)):
        total = int(cost[layers, columns].sum())
        key = (float(omega[layers, columns].sum()), total, columns)
        if total <= budget and (best is None or key < best):
            best = key
    if best is None:
        raise UserError(f"brute_force_bits: nothing fits the budget of {budget:g}")
    return np.array(best[2], np.int32)


def _checked(omega, cost) -> tuple[np.ndarray, np.ndarray]:
    omega, cost = np.asarray(omega, np.float64), np.asarray(cost)
    if omega.ndim != 2 or omega.shape != cost.shape or not omega.size:
        raise UserError(
            f"omega {omega.shape} and cost {cost.shape} must both be [layers, columns], and not empty"
        )
    if np.isnan(omega).any() or (omega == -np.inf).any():
        raise UserError("omega holds NaN or -inf; check the importances")
    whole = np.rint(cost).astype(np.int64)
    if (whole != cost).any() or (whole < 0).any():
        raise UserError("cost must hold whole numbers >= 0 (weights times bits)")
    return omega, whole


def _groups(num: int, ties: Sequence[Sequence[int]] | None) -> list[list[int]]:
    groups = [sorted(g) for g in ties or ()]
    tied = [i for g in groups for i in g]
    if len(set(tied)) != len(tied) or any(not 0 <= i < num for i in tied) or not all(groups):
        raise UserError(f"ties={ties}: disjoint groups of layers 0 to {num - 1} are expected")
    return [*groups, *([i] for i in range(num) if i not in tied)]
