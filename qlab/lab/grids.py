"""The tables of the report pages, as plain records for the templates. Imports no JAX.

A table is {"title", "caption", "corner", "head": [{"name", "unit", "better"}], "rows": [{"name",
"cells": [cell or None]}]}; a cell is {"v": what it sorts by, "main", "pm", "lost", "cls", "title"}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qlab.lab import stats

if TYPE_CHECKING:
    from qlab.lab.reading import Run

MAX_SEED_ROWS = 400
Table = dict[str, Any]


def cell(
    value: float | str, main: str, *, pm: str = "", lost: str = "", cls: str = "", title: str = ""
) -> dict[str, Any]:
    return {"v": value, "main": main, "pm": pm, "lost": lost, "cls": cls, "title": title}


def column(key: str, metrics: Mapping[str, Any], *, name: str = "") -> dict[str, str]:
    """Head of a result column: unit and direction below the name."""
    declared = metrics.get(stats.metric_of(key))
    unit = stats.field(declared, "unit") if declared is not None else ""
    better = stats.field(declared, "better", "none") if declared is not None else "none"
    sense = {"higher": "higher is better", "lower": "lower is better"}.get(better, "")
    return {"name": name or key, "unit": ", ".join(x for x in (unit, sense) if x), "better": better}


def results(
    cells: stats.Cells, arms: Sequence[str], metrics: Mapping[str, Any], rows: Iterable[stats.Row]
) -> list[Table]:
    """One table a metric that has tasks (arms x tasks); metrics without tasks share one."""
    rows = list(rows)
    groups: dict[str, list[str]] = {}
    for key in stats.ordered_keys(cells, metrics):
        groups.setdefault(stats.metric_of(key) if "/" in key else "", []).append(key)
    tables = []
    for name, keys in groups.items():
        seeds = max(cells[a, k].num_seeds for a in arms for k in keys if (a, k) in cells)
        over = f"mean ± half of the 95 % t interval over {seeds} seeds" if seeds > 1 else "one seed"
        made = table(
            name or "Results",
            caption(name, metrics, over),
            [_head(k, metrics, grouped=bool(name)) for k in keys],
            [
                (a, [_number(cells, arms, a, k, stats.better_of(k, metrics, rows)) for k in keys])
                for a in arms
            ],
        )
        made["gaps"] = _gaps(cells, arms, keys, metrics, rows, name)
        tables.append(made)
    return tables


def _head(key: str, metrics: Mapping[str, Any], *, grouped: bool) -> dict[str, str]:
    """Of a result table: the task alone where the caption names the metric."""
    head = column(key, metrics, name=stats.task_of(key) if grouped else key)
    return {**head, "unit": ""} if grouped else head


def arm_heads(key: str, metrics: Mapping[str, Any], arms: Iterable[str]) -> list[dict[str, str]]:
    """One column an arm of one result; unit and direction belong in the caption."""
    return [{**column(key, metrics, name=a), "unit": ""} for a in arms]


def caption(name: str, metrics: Mapping[str, Any], over: str) -> str:
    """What a table of one metric shows, unit and direction included."""
    if not name:
        return over
    declared = metrics.get(stats.metric_of(name))
    text = stats.field(declared, "text") if declared is not None else ""
    return "; ".join(
        x for x in (f"{name}: {text}" if text else name, column(name, metrics)["unit"], over) if x
    )


def table(
    title: str,
    text: str,
    head: list[dict[str, str]],
    rows: Iterable[tuple[str, list[Any]]],
    corner: str = "arm",
) -> Table:
    body = [
        {"name": name, "cells": cells} for name, cells in rows if any(c is not None for c in cells)
    ]
    return {"title": title, "caption": text, "corner": corner, "head": head, "rows": body}


def _number(
    cells: stats.Cells, arms: Sequence[str], arm: str, key: str, better: str
) -> dict[str, Any] | None:
    found = cells.get((arm, key))
    if found is None:
        return None
    ci = stats.t_interval(found.values.values())
    main, _, pm = stats.format_interval(ci).partition(" ± ")
    best = len(arms) > 1 and stats.strongest(cells, arms, key, better) == arm
    return cell(
        ci.mean if ci.n else "",
        main if ci.n else "lost",
        pm=f"± {pm}" if pm else "",
        lost=f"{len(found.bad)} of {found.num_seeds} seeds non-finite" if found.bad else "",
        cls="best" if best else "",
        title=", ".join(
            f"seed {s}: {stats.format_number(v)}" for s, v in list(found.values.items())[:10]
        ),
    )


def _gaps(
    cells: stats.Cells,
    arms: Sequence[str],
    keys: Sequence[str],
    metrics: Mapping[str, Any],
    rows: list[Any],
    name: str,
) -> Table | None:
    """Paired difference of each arm to its strongest opponent."""
    columns, heads = [], []
    for key in keys:
        gaps = stats.to_strongest(cells, key, stats.better_of(key, metrics, rows), arms)
        if gaps:
            columns.append(
                {
                    a: change(ci, title=f"against {other}, {ci.n} pairs")
                    for a, (other, ci) in gaps.items()
                    if ci.n
                }
            )
            heads.append(_head(key, metrics, grouped=bool(name)))
    if not columns:
        return None
    body = [(a, [c.get(a) for c in columns]) for a in arms]
    return table(
        name or "Results",
        caption(
            name, {}, "arm minus the strongest other arm, seed by seed, with the 95 % t interval"
        ),
        heads,
        body,
    )


def change(ci: stats.Interval, *, title: str = "", mark: bool = False) -> dict[str, Any]:
    """A paired difference with its sign; marked where its interval excludes zero."""
    moves = mark and ci.n >= 3 and (ci.low > 0 or ci.high < 0)
    known = ci.n > 1
    text = stats.format_span(ci.mean, ci.low if known else None, ci.high if known else None)
    main, bracket, span = text.partition(" [")
    sign = "+" if main.strip("0.") and ci.mean > 0 else ""  # none where it rounds to zero
    return cell(
        ci.mean,
        sign + main,
        pm=f"[{span}" if bracket else "",
        cls="moves" if moves else "",
        title=title,
    )


def cost(rows: Iterable[stats.Row], arms: Sequence[str]) -> Table | None:
    """Wall time, memory and last step of each arm, as far as the rows say."""
    fields = {
        "wall_s": ("wall time", "s"),
        "peak_mem_mb": ("peak memory", "MB"),
        "step": ("steps", ""),
    }
    found: dict[str, dict[str, float]] = {a: {} for a in arms}
    for row in rows:
        for field in fields:
            value = row.get(field)
            if isinstance(value, int | float) and row["arm"] in found:
                mine = found[row["arm"]]
                mine[field] = max(mine.get(field, value), value)
    used = [f for f in fields if any(f in v for v in found.values())]
    if not used:
        return None
    head = [{"name": fields[f][0], "unit": fields[f][1], "better": "lower"} for f in used]
    body = [
        (a, [cell(v[f], stats.format_number(round(v[f], 1))) if f in v else None for f in used])
        for a, v in found.items()
    ]
    return table(
        "Cost", "Wall time, peak memory and steps of each arm, all seeds together", head, body
    )


def every_seed(cells: stats.Cells, arms: Sequence[str], metrics: Mapping[str, Any]) -> Table | None:
    """Each seed's number, a row an arm and key, with the standard deviation over seeds."""
    seeds = sorted({s for c in cells.values() for s in (*c.values, *c.bad)})
    keys = stats.ordered_keys(cells, metrics)
    places = [(a, k) for k in keys for a in arms if (a, k) in cells]
    if len(seeds) < 2 or not places:
        return None
    body = []
    for arm, key in places[:MAX_SEED_ROWS]:
        values = list(cells[arm, key].values.values())
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        line = [
            cell("", "", lost="non-finite")
            if s in cells[arm, key].bad
            else _plain(cells[arm, key].values.get(s))
            for s in seeds
        ]
        body.append((f"{key} · {arm}", [_plain(sd), *line]))
    left_out = len(places) - MAX_SEED_ROWS
    more = f"; {left_out} further rows are in results.jsonl" if left_out > 0 else ""
    head = [{"name": "sd", "unit": "", "better": "none"}] + [
        {"name": f"seed {s}", "unit": "", "better": "none"} for s in seeds
    ]
    return table(
        "Every seed",
        f"Standard deviation over seeds, and the number of every seed{more}",
        head,
        body,
        "result · arm",
    )


def _plain(value: float | None) -> dict[str, Any] | None:
    return None if value is None else cell(value, stats.format_number(value))


def across(runs: Mapping[str, Run]) -> list[Table]:
    """Runs down, arms across, for the results of the primary metric (at most four tasks)."""
    every = {name: run.cells for name, run in runs.items()}
    metrics = {k: v for run in runs.values() for k, v in run.metrics.items()}
    merged: stats.Cells = {where: c for cells in every.values() for where, c in cells.items()}
    tables = []
    for key in primary_keys(merged, metrics)[:4]:
        arms = [a for a in stats.arms_of(merged) if (a, key) in merged]
        body = [
            (name, [_number(cells, [a], a, key, "none") for a in arms])
            for name, cells in every.items()
        ]
        head = arm_heads(key, metrics, arms)
        text = caption(key, metrics, "mean ± half of the 95 % t interval")
        tables.append(table(key, text, head, body, "run"))
    return tables


def primary_keys(cells: stats.Cells, metrics: Mapping[str, Any]) -> list[str]:
    """The keys of the first metric that has numbers."""
    keys = stats.ordered_keys(cells, metrics)
    return [k for k in keys if stats.metric_of(k) == stats.metric_of(keys[0])] if keys else []
