"""The page of a sweep: each metric over each axis, and which switch moves the number.

Imports no JAX.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qlab.lab import claims, grids, plots, stats
from qlab.lab.reading import Run, Sweep

MAX_AXIS_PLOTS = 4
MAX_AXIS_TABLES = 12
CHANGE = (
    "change against the config as it stands, paired by seed, with the 95 % t interval; "
    "marked where the interval excludes zero"
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flatten({"optimizer": {"lr": 0.1}, "bits": 4})
    {'optimizer.lr': 0.1, 'bits': 4}
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def view(sweep: Sweep, link: Callable[[Run], str]) -> dict[str, Any]:
    """What the template shows of one sweep.

    Args:
      link: run -> address of its page, "" if it has none.
    """
    record = sweep.record
    trials = [t for t in record.get("trials") or () if isinstance(t, Mapping)]
    done = {
        _id(t, i): sweep.runs[_id(t, i)] for i, t in enumerate(trials) if _id(t, i) in sweep.runs
    }
    overrides = {_id(t, i): dict(t.get("overrides") or {}) for i, t in enumerate(trials)}
    metrics = {k: v for run in done.values() for k, v in run.metrics.items()}
    arms = list(dict.fromkeys(a for run in done.values() for a in run.arms))
    cells = {i: run.cells for i, run in done.items()}
    explain = _explain(overrides, cells, arms, metrics) if record.get("explain") else None
    axes = {} if explain else dict(record.get("axes") or {})
    failed = [
        f"{_id(t, i)}: {t.get('status', 'unknown')}{': ' + str(t['reason']) if t.get('reason') else ''}"
        f"{' · ' + str(t['command']) if t.get('command') else ''}"
        for i, t in enumerate(trials)
        if t.get("status") not in ("done", "ok") or _id(t, i) not in done
    ]
    kind = "One switch at a time" if explain else f"{len(axes)} axes"
    return {
        "title": f"Sweep of {record.get('config', sweep.path.name)}",
        "summary": f"{kind}, {len(trials)} trials, {len(done)} with results.",
        "problems": [*failed, *sweep.problems],
        "explain": explain,
        "axes": [
            _axis(n, name, values, overrides, done, cells, arms, metrics)
            for n, (name, values) in enumerate(axes.items())
        ],
        "trials": _trials(trials, overrides, cells, arms, metrics, done, link),
    }


def _id(trial: Mapping[str, Any], i: int) -> str:
    return str(trial.get("id", i))


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a) == json.dumps(b) or a == b


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _merged(cells: Mapping[str, stats.Cells]) -> stats.Cells:
    return {where: c for of_trial in cells.values() for where, c in of_trial.items()}


def pooled(cells: Sequence[stats.Cells], arm: str, key: str) -> stats.Interval:
    """Mean over trials for each seed, then mean and interval over the seeds."""
    by_seed: dict[int, list[float]] = {}
    for of_trial in cells:
        for seed, value in of_trial.get((arm, key), stats.Cell({}, ())).values.items():
            by_seed.setdefault(seed, []).append(value)
    return stats.t_interval(float(np.mean(v)) for v in by_seed.values())


def _axis(
    number: int, name: str, values: Sequence[Any], overrides: Mapping[str, Mapping[str, Any]], done: Mapping[str, Run],
    cells: Mapping[str, stats.Cells], arms: Sequence[str], metrics: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Plots of the primary results over one axis, tables of all of them."""

    def value_of(trial: str) -> Any:
        if name in overrides[trial]:
            return overrides[trial][name]
        return flatten(done[trial].config).get(name)

    at = [[i for i in cells if _same(value_of(i), v)] for v in values]
    merged = _merged(cells)
    keys = stats.ordered_keys(merged, metrics)
    sizes = {len(t) for t in at}
    text = (
        ""
        if sizes == {1}
        else "Each number is the mean over the trials with that value, over all other axes."
    )
    if len(sizes) > 1:
        text += (
            " The values do not have equally many trials: "
            + ", ".join(f"{_shown(v)}: {len(t)}" for v, t in zip(values, at, strict=True))
            + "."
        )
    drawn = []
    for key in grids.primary_keys(merged, metrics)[:MAX_AXIS_PLOTS]:
        drawn.append(_axis_plot(name, key, values, at, cells, arms, metrics))
    tables = []
    for key in keys[:MAX_AXIS_TABLES]:
        have = [a for a in arms if (a, key) in merged]
        rows = [
            (_shown(v), [_interval_cell(pooled([cells[i] for i in trials], a, key)) for a in have])
            for v, trials in zip(values, at, strict=True)
        ]
        head = grids.arm_heads(key, metrics, have)
        tables.append(
            grids.table(key, grids.caption(key, metrics, f"over {name}"), head, rows, name)
        )
    if len(keys) > MAX_AXIS_TABLES:
        text += f" Tables show {MAX_AXIS_TABLES} of {len(keys)} results; the others are on the pages of the trials."
    return {"name": name, "number": number, "text": text.strip(), "plots": drawn, "tables": tables}


def _axis_plot(
    name: str, key: str, values: Sequence[Any], at: Sequence[Sequence[str]], cells: Mapping[str, stats.Cells],
    arms: Sequence[str], metrics: Mapping[str, Any],
) -> plots.Plot:  # fmt: skip
    numeric = (
        all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and len(values) > 1
    )
    x = np.array(values, float) if numeric else np.arange(len(values), dtype=float)
    logx = numeric and len(values) > 2 and x.min() > 0 and x.max() / x.min() >= 20
    lines = {}
    for arm in arms:
        ci = [pooled([cells[i] for i in trials], arm, key) for trials in at]
        if any(c.n for c in ci):
            low, mean, high = (np.array([c[k] for c in ci]) for k in (2, 1, 3))
            lines[arm] = plots.Line(x, mean, low, high)
    ticks = () if numeric else [_shown(v) for v in values]
    unit = grids.column(key, metrics)["unit"].split(",")[0]
    return plots.lines_plot(
        f"{key} over {name}",
        lines,
        plots.styles(arms),
        xlabel=name,
        ylabel=unit or key,
        logx=logx,
        markers=True,
        xticks=ticks,
    )


def _interval_cell(ci: stats.Interval) -> dict[str, Any] | None:
    if not ci.n:
        return None
    main, _, pm = stats.format_interval(ci).partition(" ± ")
    return grids.cell(ci.mean, main, pm=f"± {pm}" if pm else "")


def _explain(
    overrides: Mapping[str, Mapping[str, Any]],
    cells: Mapping[str, stats.Cells],
    arms: Sequence[str],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Change of each result against the trial without overrides, one switch at a time."""
    base = next((i for i in cells if not overrides[i]), None)
    if base is None:
        return {
            "text": "The trial without overrides has no results, so nothing can be compared.",
            "tables": [],
            "plots": [],
        }
    flips = {
        i: ", ".join(f"{k} = {_shown(v)}" for k, v in overrides[i].items())
        for i in cells
        if overrides[i]
    }
    keys = stats.ordered_keys(cells[base], metrics)
    tables = []
    for key in keys[:MAX_AXIS_TABLES]:
        have = [a for a in arms if (a, key) in cells[base]]
        effects = {i: {a: _change(cells[i], cells[base], a, key) for a in have} for i in flips}
        effects = dict(
            sorted(
                effects.items(),
                key=lambda e: -max((abs(c.mean) for c in e[1].values() if c.n), default=0.0),
            )
        )
        rows = [
            (
                flips[i],
                [
                    grids.change(by[a], title=f"{by[a].n} pairs", mark=True) if by[a].n else None
                    for a in have
                ],
            )
            for i, by in effects.items()
        ]
        head = grids.arm_heads(key, metrics, have)
        tables.append(
            grids.table(
                key,
                grids.caption(key, metrics, CHANGE),
                head,
                rows,
                "switch",
            )
        )
    drawn = []
    for key in grids.primary_keys(cells[base], metrics)[:MAX_AXIS_PLOTS]:
        effects = {
            flips[i]: {a: c for a in arms if (c := _change(cells[i], cells[base], a, key)).n}
            for i in flips
        }
        effects = dict(
            sorted(
                ((k, e) for k, e in effects.items() if e),
                key=lambda e: -max(abs(c.mean) for c in e[1].values()),
            )
        )
        if effects:
            drawn.append(
                plots.effects_plot(
                    f"Change of {key}", effects, plots.styles(arms), xlabel=f"change of {key}"
                )
            )
    text = "Each row flips one switch of the config and keeps everything else; the largest change comes first."
    return {"text": text, "tables": tables, "plots": drawn}


def _change(trial: stats.Cells, base: stats.Cells, arm: str, key: str) -> stats.Interval:
    none = stats.Cell({}, ())
    new, old = stats.paired(trial.get((arm, key), none), base.get((arm, key), none))
    return stats.t_interval(new - old)


def _trials(
    trials: Sequence[Mapping[str, Any]], overrides: Mapping[str, Mapping[str, Any]], cells: Mapping[str, stats.Cells],
    arms: Sequence[str], metrics: Mapping[str, Any], done: Mapping[str, Run], link: Callable[[Run], str],
) -> dict[str, Any]:  # fmt: skip
    """One row a trial: status, overrides and the first primary result of each arm."""
    keys = grids.primary_keys(_merged(cells), metrics)[:1]
    rows = []
    for i, trial in enumerate(trials):
        at = _id(trial, i)
        status = str(trial.get("status", "unknown"))
        changed = ", ".join(f"{k} = {_shown(v)}" for k, v in overrides[at].items())
        changed = changed or "as it stands"
        line: list[Any] = [
            grids.cell(status, status, cls="left"),
            grids.cell(changed, changed, cls="left"),
        ]
        found = claims.counts(done[at].verdicts) if at in done else None
        line.append(
            grids.cell(found["HOLDS"], " · ".join(map(str, found.values()))) if found else None
        )
        for key in keys:
            for a in arms:
                number = cells.get(at, {}).get((a, key))
                line.append(
                    _interval_cell(stats.t_interval(number.values.values())) if number else None
                )
        rows.append((at, line))
    head = [{"name": n, "unit": "", "better": "lower"} for n in ("status", "overrides")]
    head.append({"name": "verdicts", "unit": "hold · fail · inconclusive", "better": "higher"})
    head += [h for key in keys for h in grids.arm_heads(key, metrics, arms)]
    text = grids.caption(keys[0], metrics, "") if keys else "Trials"
    made = grids.table("Trials", text, head, rows, "trial")
    for row in made["rows"]:
        row["href"] = link(done[row["name"]]) if row["name"] in done else ""
    return made
