"""Means and intervals over seeds, from the rows of results.jsonl.

A row's key is "task/metric", or "metric" where there is no task. Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
RESERVED = ("fallbacks", "sites_total")  # bookkeeping of an arm, not results
Row = Mapping[str, Any]


class Interval(NamedTuple):
    """A mean and its two-sided interval; low and high are nan with fewer than two values."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


class Cell(NamedTuple):
    """One arm's numbers for one key: finite values by seed, and the seeds without one."""

    values: dict[int, float]
    bad: tuple[int, ...]

    @property
    def num_seeds(self) -> int:
        return len(self.values) + len(self.bad)


Cells = dict[tuple[str, str], Cell]  # (arm, key) -> Cell


def t_interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Mean and Student t interval of independent values.

    >>> t_interval([1.0, 2.0, 3.0])._replace(low=0, high=0)
    Interval(n=3, mean=2.0, low=0, high=0)
    >>> round(t_interval([1.0, 2.0, 3.0]).high, 4)  # 2 + 4.3027 / sqrt(3)
    4.4841
    """
    x = np.asarray(list(values), np.float64)
    n = x.size
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan)
    mean = float(x[0]) if np.ptp(x) == 0 else float(x.mean())  # no rounding where nothing varies
    if n == 1:
        return Interval(1, mean, math.nan, math.nan)
    from scipy.special import stdtrit  # the t quantile; scipy.stats is slow to import

    with np.errstate(over="ignore", invalid="ignore"):
        spread = 0.0 if np.ptp(x) == 0 else float(x.std(ddof=1))
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * spread / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def key_of(row: Row) -> str:
    """
    >>> key_of({"task": "w3", "metric": "accuracy"}), key_of({"task": "", "metric": "loss"})
    ('w3/accuracy', 'loss')
    """
    return f"{row['task']}/{row['metric']}" if row.get("task") else str(row["metric"])


def metric_of(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def task_of(key: str) -> str:
    return key.rsplit("/", 1)[0] if "/" in key else ""


def field(metric: Any, name: str, default: str = "") -> str:
    """A field of a Metric, which may be the record or its dict from a manifest."""
    value = metric.get(name) if isinstance(metric, Mapping) else getattr(metric, name, None)
    return default if value is None else str(value)


def better_of(key: str, metrics: Mapping[str, Any], rows: Iterable[Row] = ()) -> str:
    """ "higher", "lower" or "none" for a key; the declared metric wins over the rows."""
    declared = metrics.get(metric_of(key))
    if declared is not None:
        return field(declared, "better", "none")
    return next((r.get("better") or "none" for r in rows if key_of(r) == key), "none")


def collect(rows: Iterable[Row], diverged: Mapping[str, Mapping[Any, Any]] | None = None) -> Cells:
    """Rows by (arm, key), in order of appearance; a later row replaces an earlier one of its seed.

    Args:
      rows: of results.jsonl. A value that is not finite or a status other than "ok" makes the
        seed bad.
      diverged: the manifest's {arm: {seed: step}}; these seeds are bad whatever their rows say.
    """
    lost = {arm: {int(seed) for seed in seeds} for arm, seeds in (diverged or {}).items()}
    found: dict[tuple[str, str], dict[int, float | None]] = {}
    for row in rows:
        arm, seed, value = str(row["arm"]), int(row.get("seed") or 0), row.get("value")
        ok = row.get("status", "ok") == "ok" and seed not in lost.get(arm, ())
        ok = ok and isinstance(value, (int, float)) and math.isfinite(value)
        by_seed = found.setdefault((arm, key_of(row)), dict.fromkeys(lost.get(arm, ())))
        by_seed[seed] = float(value) if ok and value is not None else None
    return {
        where: Cell(
            {s: v for s, v in sorted(by_seed.items()) if v is not None},
            tuple(s for s, v in sorted(by_seed.items()) if v is None),
        )
        for where, by_seed in found.items()
    }


def arms_of(cells: Cells, arms: Sequence[str] = ()) -> list[str]:
    """The arms that have numbers: first in the declared order, then the others."""
    present = dict.fromkeys(arm for arm, _ in cells)
    return [a for a in arms if a in present] + [a for a in present if a not in arms]


def ordered_keys(cells: Cells, metrics: Mapping[str, Any]) -> list[str]:
    """Result keys: metrics in declared order, undeclared ones after them; tasks as they came."""
    rank = {name: i for i, name in enumerate(metrics)}
    keys = [k for k in dict.fromkeys(key for _, key in cells) if metric_of(k) not in RESERVED]
    return sorted(keys, key=lambda k: rank.get(metric_of(k), len(rank)))  # sorted() is stable


def summarize(cells: Cells) -> dict[tuple[str, str], Interval]:
    """Mean and 95 % interval over the finite seeds of each cell."""
    return {where: t_interval(cell.values.values()) for where, cell in cells.items()}


def strongest(cells: Cells, arms: Iterable[str], key: str, better: str) -> str | None:
    """The arm with the best mean of `key`; the first of equals, None if no arm has a value."""
    sign = {"higher": 1.0, "lower": -1.0}.get(better)
    means = {
        a: t_interval(cells[a, key].values.values()).mean
        for a in arms
        if (a, key) in cells and cells[a, key].values
    }
    return max(means, key=lambda a: sign * means[a]) if sign and means else None


def paired(left: Cell, right: Cell) -> tuple[np.ndarray, np.ndarray]:
    """The values of the seeds that both cells have: f64[n], f64[n]."""
    seeds = [s for s in left.values if s in right.values]
    return np.array([left.values[s] for s in seeds]), np.array([right.values[s] for s in seeds])


def to_strongest(
    cells: Cells, key: str, better: str, arms: Sequence[str] = ()
) -> dict[str, tuple[str, Interval]]:
    """For each arm: its strongest opponent (best mean among the others) and the paired difference."""
    names = [a for a in (arms or arms_of(cells)) if (a, key) in cells]
    out = {}
    for arm in names:
        other = strongest(cells, [a for a in names if a != arm], key, better)
        if other is not None:
            left, right = paired(cells[arm, key], cells[other, key])
            out[arm] = (other, t_interval(left - right))
    return out


def fallback_share(cells: Cells, arm: str, task: str = "") -> float | None:
    """Share of an arm's sites where the method could not do its work; None if it counts none.

    Counts of the task are used where the arm has them, else those of the whole arm. Fallbacks
    without `sites_total` give inf: their share is unknown.
    """
    for prefix in (f"{task}/", "") if task else ("",):
        fell = cells.get((arm, prefix + "fallbacks"))
        if fell is not None:
            total = cells.get((arm, prefix + "sites_total"), Cell({}, ()))
            count, sites = sum(fell.values.values()), sum(total.values.values())
            return 0.0 if count == 0 else count / sites if sites else math.inf
    return None


def format_number(x: float | None) -> str:
    """
    >>> [format_number(x) for x in (0.91234567, 1234567.0, 3.0, 1.5e-7, None)]
    ['0.91235', '1.235e+06', '3', '1.5e-07', '–']
    """
    if x is None or math.isnan(x):
        return "–"
    if x == 0 or 1e-4 <= abs(x) < 1e6:
        return f"{x:.5g}" if x != round(x) else f"{x:.0f}"
    return f"{x:.4g}"


def _fixed(x: float, digits: int) -> str:
    """Without the sign of a number that rounds to zero.

    >>> _fixed(-0.004, 2), _fixed(-0.006, 2)
    ('0.00', '-0.01')
    """
    return f"{round(x, digits) + 0.0:.{digits}f}"


def format_interval(ci: Interval, pm: str = "±") -> str:
    """Mean ± half-width, cut at two digits of the half-width.

    >>> format_interval(Interval(5, 0.912345, 0.90, 0.924)), format_interval(Interval(3, 2.0, 2.0, 2.0))
    ('0.912 ± 0.012', '2 ± 0')
    """
    if ci.n == 0 or math.isnan(ci.low):
        return format_number(ci.mean)
    half = ci.half
    if half <= 1e-9 * abs(ci.mean):
        return f"{format_number(ci.mean)} {pm} {'0' if half == 0 else f'{half:.0e}'}"
    scale = max(abs(ci.mean), half)
    if not 1e-3 <= scale < 1e6:
        return f"{ci.mean:.3g} {pm} {half:.2g}"
    digits = min(max(1 - math.floor(math.log10(half)), 0), 6)
    return f"{_fixed(ci.mean, digits)} {pm} {half:.{digits}f}"


def format_span(estimate: float | None, low: float | None, high: float | None) -> str:
    """Estimate [low, high], cut at two digits of the half-width.

    >>> format_span(0.15499, 0.13027, 0.17972), format_span(1.5, None, None), format_span(2.0, 2.0, 2.0)
    ('0.155 [0.130, 0.180]', '1.5', '2 [2, 2]')
    """
    if estimate is None or low is None or high is None or math.isnan(low):
        return format_number(estimate)
    half, scale = (high - low) / 2, max(abs(low), abs(high))
    if half <= 1e-9 * scale or not 1e-3 <= scale < 1e6:
        shown = [format_number(x) for x in (estimate, low, high)]
    else:
        digits = min(max(1 - math.floor(math.log10(half)), 0), 6)
        shown = [_fixed(x, digits) for x in (estimate, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
