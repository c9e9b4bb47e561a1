"""What the benches share: interleaved repetitions, medians with their spread, and result rows.

A bench module has a docstring (its first line is shown by --list) and
    METRICS   dict[str, Metric]
    GOALS     tuple[Claim, ...]     judged over repetitions like a paper's claims over seeds; or
              goals(settings) -> tuple[Claim, ...] where the device decides
    settings(quick) -> dict         every size that decides its numbers; "x64" sets the precision
    measure(settings, tell) -> list[Number]
    summary(numbers) -> str         one line
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlab.lab.experiment import Metric

Tell = Callable[[str], None]
Sample = Mapping[str, float]  # metric ("task/metric" allowed) -> what one repetition measured

MACHINE = {
    "cores": Metric("", "none", "cores this process may use"),
    "load": Metric("", "none", "load average over the last minute, when the bench began"),
}


class Number(NamedTuple):
    """What one contestant did in one metric: a value a repetition, or why there is none.

    status: "ok", "absent" (not installed) or "failed"; note says why. A name may start with a task.
    """

    arm: str
    name: str
    values: tuple[float, ...] = ()
    status: str = "ok"
    note: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.values)) if self.values else math.nan


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles: half of the repetitions lie between.

    >>> spread([1.0, 2.0, 3.0, 4.0, 100.0])
    (2.0, 4.0)
    """
    low, high = np.percentile(values, (25, 75)) if len(values) else (math.nan, math.nan)
    return float(low), float(high)


def interleave(
    contestants: Mapping[str, Callable[[], Sample]],
    repetitions: int,
    budget_s: float = math.inf,
    at_least: int = 3,
) -> list[Number]:
    """Every contestant once a round: A B, B A, A B ... so that what slows the machine meets all.

    Args:
      contestants: arm -> one repetition.
      budget_s: after it no round is begun, but `at_least` rounds are made.
    """
    found: dict[tuple[str, str], list[float]] = {}
    names, start = list(contestants), time.perf_counter()
    for i in range(repetitions):
        if i >= at_least and (time.perf_counter() - start) * (i + 1) / i > budget_s:
            break
        for arm in names if i % 2 == 0 else names[::-1]:
            for name, value in contestants[arm]().items():
                found.setdefault((arm, name), []).append(float(value))
    rank = {arm: i for i, arm in enumerate(names)}
    return [
        Number(arm, name, tuple(v))
        for (arm, name), v in sorted(found.items(), key=lambda kv: rank[kv[0][0]])
    ]


def find(numbers: Iterable[Number], arm: str, name: str) -> Number:
    """The number of a contestant; one without values if it was not measured."""
    same = [n for n in numbers if n.arm == arm and n.name == name]
    return same[0] if same else Number(arm, name, status="absent")


def ratio(numbers: Sequence[Number], arm: str, other: str, name: str, to: str) -> Number:
    """`name` of arm over that of other, repetition by repetition, as metric `to` of arm.

    >>> ratio([Number("a", "s", (2.0, 9.0)), Number("b", "s", (1.0, 3.0))], "a", "b", "s", "times")
    Number(arm='a', name='times', values=(2.0, 3.0), status='ok', note='')
    """
    a, b = find(numbers, arm, name), find(numbers, other, name)
    bad = next((n for n in (a, b) if n.status != "ok"), None)
    if bad is not None:
        return Number(arm, to, status=bad.status, note=bad.note or f"{bad.arm} was not measured")
    return Number(arm, to, tuple(x / y for x, y in zip(a.values, b.values, strict=True)))


def percent_over(numbers: Sequence[Number], arm: str, other: str, name: str, to: str) -> Number:
    """100 (ratio - 1): how much longer arm took than other, in percent, a value a repetition."""
    r = ratio(numbers, arm, other, name, to)
    return r._replace(values=tuple(100 * (x - 1) for x in r.values))


def seconds_per_call(f: Callable[..., Any], *args: Any, at_least_s: float = 0.02) -> float:
    """Wall time of a call with its result ready, averaged over as many calls as fill at_least_s."""
    import jax

    calls, start = 0, time.perf_counter()
    while True:
        jax.block_until_ready(f(*args))
        calls += 1
        took = time.perf_counter() - start
        if took >= at_least_s:
            return took / calls


def bind(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A jitted f with its arguments, as contestants are called."""
    import jax

    compiled = jax.jit(f)
    return lambda: compiled(*args)


def machine() -> list[Number]:
    """Cores and load, so that numbers can be read for what they are."""
    count = getattr(os, "sched_getaffinity", None)
    cores = len(count(0)) if count else (os.cpu_count() or 1)
    return [
        Number("machine", "cores", (float(cores),)),
        Number("machine", "load", (os.getloadavg()[0],)),
    ]


def result_rows(
    numbers: Iterable[Number],
    metrics: Mapping[str, Metric],
    columns: Mapping[str, Any],
    wall_s: float,
    peak_mem_mb: float,
) -> list[dict[str, Any]]:
    """Rows of results.jsonl, one a repetition (in the column seed), as a study writes them.

    columns: what all rows share (paper, variant, device, commit, ...).
    """
    rows = []
    for n in numbers:
        task, _, metric = n.name.rpartition("/")
        spec = metrics.get(metric, Metric())
        for i, value in enumerate(n.values if n.status == "ok" else (None,)):
            rows.append(
                {
                    **columns,
                    "arm": n.arm,
                    "task": task,
                    "metric": metric,
                    "unit": spec.unit,
                    "better": spec.better,
                    "value": value,
                    "seed": i,
                    "step": 0,
                    "wall_s": round(wall_s, 3),
                    "peak_mem_mb": peak_mem_mb,
                    "seed_layout": "",
                    "status": n.status,
                    "fallbacks": 0,
                    "note": n.note,
                }
            )
    return rows


def table(numbers: Iterable[Number], metrics: Mapping[str, Metric]) -> str:
    """One line a number: median, quartiles, repetitions; or why there is none."""
    from qlab.lab.stats import format_number as text

    lines = []
    for n in numbers:
        unit = metrics.get(n.name.rpartition("/")[2], Metric()).unit
        if n.status != "ok":
            lines.append((n.name, n.arm, n.status, n.note))
        elif len(n.values) == 1:
            lines.append((n.name, n.arm, f"{text(n.values[0])} {unit}".strip(), ""))
        else:
            low, high = spread(n.values)
            span = f"{text(low)} .. {text(high)}, {len(n.values)} repetitions"
            lines.append((n.name, n.arm, f"{text(n.median)} {unit}".strip(), span))
    if not lines:
        return "nothing was measured"
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines
    )


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                line.split(":", 1)[1].strip() for line in f if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
