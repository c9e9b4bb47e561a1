"""One self-contained HTML page for a run, and one across runs.

A page holds everything it shows: no script, style, font or picture is fetched. What comes from files
is escaped by the templates. The same files give the same bytes. Imports no JAX.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qlab.lab import ablation, claims, figures, grids, plots, stats, svg
from qlab.lab.errors import UserError
from qlab.lab.experiment import Figure
from qlab.lab.reading import Run, Sweep, load
from qlab.lab.records import write_atomic

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAX_CURVES = 6
MAX_COMPARED = 12  # runs of one paper side by side


def write_page(workdir: Path | str) -> Path:
    """Writes report.html into a run folder from the files in it.

    Raises:
      UserError: no manifest.json that can be read, or the page cannot be written.
    """
    run = load(workdir)
    out = run.path / "report.html"
    write_atomic(out, render_run(run))
    return out


def write_index(
    runs: Iterable[Run | Path | str],
    out: Path | str,
    *,
    sweeps: Sequence[Sweep] = (),
    title: str = "",
    command: str = "",
    problems: Sequence[str] = (),
) -> Path:
    """Writes one page across runs: claims of all papers, sweeps, the runs, comparisons.

    Args:
      runs: loaded, or their folders. out: the page to write.
      sweeps: sweep folders to show as ablations; their trials need not be among `runs`.
    """
    loaded = [r if isinstance(r, Run) else load(r) for r in runs]
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; give another page") from None
    write_atomic(path, render_index(loaded, path, sweeps, title, command, problems))
    return path


def render_run(run: Run) -> str:
    """The HTML of a run's page."""
    manifest, cells, metrics = run.manifest, run.cells, run.metrics
    arms = stats.arms_of(cells, run.arms) or run.arms
    style = plots.styles(run.arms)
    drawn, notes, curve_plots, curves_left_out = _plots(run, cells, style)
    return _render(
        "run.html",
        title=manifest.get("title") or run.name,
        eyebrow=" · ".join(
            x
            for x in (
                run.name,
                f"{manifest.get('seeds', '?')} seeds",
                str(manifest.get("device", "")),
            )
            if x
        ),
        command=run.command,
        counts=claims.counts(run.verdicts),
        claims=[_claim(v) for v in run.verdicts],
        any_paper=any(v.get("paper") is not None for v in run.verdicts),
        method=claims.METHOD,
        unfinished=_unfinished(manifest),
        failed=[
            f"{arm}: {', '.join(f'seed {s} at step {step}' for s, step in seeds.items())}"
            for arm, seeds in run.diverged.items()
            if seeds
        ],
        problems=run.problems,
        tables=grids.results(cells, arms, metrics, run.rows),
        fallbacks=_fallbacks(cells, arms),
        curves=curve_plots,
        curves_left_out=curves_left_out,
        figures=drawn,
        figure_notes=notes,
        cost=grids.cost(run.rows, arms),
        seeds=grids.every_seed(cells, arms, metrics),
        facts=_facts(run),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )


def render_index(
    runs: Sequence[Run],
    out: Path,
    sweeps: Sequence[Sweep],
    title: str,
    command: str,
    problems: Sequence[str],
) -> str:
    """The HTML of the page across runs."""
    in_sweeps = {r.path.resolve() for s in sweeps for r in s.runs.values()}
    alone = [r for r in runs if r.path.resolve() not in in_sweeps]
    everything = [*alone, *(r for s in sweeps for r in s.runs.values())]
    papers: dict[str, list[Run]] = {}
    for run in alone:
        papers.setdefault(str(run.manifest.get("paper", run.name)), []).append(run)
    heads = {paper: _head(of_paper) for paper, of_paper in sorted(papers.items())}
    return _render(
        "index.html",
        title=title or _index_title(len(papers), len(everything), sweeps),
        command=command or "python -m qlab.report",
        counts=claims.counts(v for r in heads.values() for v in r.verdicts),
        problems=[*problems, *(f"{r.path}: {p}" for r in everything for p in r.problems)],
        papers=[
            {
                "title": r.manifest.get("title") or paper,
                "name": r.name,
                "href": _link(r, out),
                "claims": [_claim(v) for v in r.verdicts],
            }
            for paper, r in heads.items()
        ],
        method=claims.METHOD,
        sweeps=[ablation.view(s, lambda r: _link(r, out)) for s in sweeps],
        runs=[_run_row(r, out) for r in sorted(alone, key=lambda r: (r.name, _started(r)))],
        comparisons=[
            _comparison(p, of_paper) for p, of_paper in sorted(papers.items()) if len(of_paper) > 1
        ],
    )


def _render(template: str, **context: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["num"] = stats.format_number
    env.filters["own_ids"] = svg.own_ids
    return env.get_template(template).render(**context)


def _plots(
    run: Run, cells: stats.Cells, style: Mapping[str, tuple[int, int]]
) -> tuple[list[plots.Plot], list[str], list[plots.Plot], list[str]]:
    """Declared figures, notes on those that cannot be drawn, learning curves, curves left out."""
    drawn, notes, shown = [], [], set()
    curves: list[plots.Plot] = []
    for record in run.manifest.get("figures") or ():
        try:
            figure = Figure(
                **{
                    **record,
                    "arms": tuple(record.get("arms") or ()),
                    "tasks": tuple(record.get("tasks") or ()),
                }
            )
            made, note = figures.figure_plots(
                figure, run.curves, run.arrays, cells, run.arms, run.metrics
            )
        except Exception as e:  # one bad figure must not cost the page
            made, note = (
                [],
                f"{record.get('title', 'a figure') if isinstance(record, Mapping) else record}: {e}",
            )
        (curves if made and figure.kind == "curve" else drawn).extend(made)
        notes += [note] if note else []
        if made and figure.kind == "curve":
            shown.add(figure.y)
    names = list(
        dict.fromkeys(n for rows in run.curves.values() for row in rows for n in row["metrics"])
    )
    names = [n for n in names if n not in shown]
    for name in names[:MAX_CURVES]:
        lines = {
            a: line for a in run.arms if (line := figures.curve_line(run.curves.get(a, ()), name))
        }
        if lines:
            curves.append(plots.lines_plot(name, lines, style, xlabel="step"))
    return drawn, notes, curves, names[MAX_CURVES:]


def _claim(v: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict with its formula in words, its interval as text and as a strip."""
    out = {**claims.Verdict._field_defaults, "source": "", "note": "", "paper": None, **v}
    sign = {">=": "≥", "<=": "≤"}.get(str(out.get("op")), str(out.get("op")))
    right = out.get("right")
    left = " ".join(map(str, out.get("left") or ()))
    if isinstance(right, (list, tuple)) and len(right) == 2:
        names, key = right
        many = not isinstance(names, str)
        chosen = f" (here {out['opponent']})" if many and out.get("opponent") else ""
        side = (f"strongest of {', '.join(names)}{chosen}" if many else names) + f" {key}"
    else:
        side = str(right)
    join = "/" if out.get("kind") == "ratio" else "−"
    against = "" if right == 0 else f" {join} {side}"
    out["formula"] = f"{left}{against} {sign} {stats.format_number(out.get('margin'))}"
    out["op_sign"] = sign
    reason = str(out.get("reason", "")).replace(">=", "≥").replace("<=", "≤")
    out["reason_text"] = "The " + reason[4:] if reason.startswith("the ") else reason
    out["unmeasured"] = claims.unmeasured(out)
    out["span"] = stats.format_span(out["estimate"], out["low"], out["high"])
    out["strip"] = _strip(out)
    return out


def _strip(v: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positions (0 to 220) of the interval, the margin and the paper's number."""
    points = [v.get(k) for k in ("estimate", "low", "high", "margin", "paper")]
    known = [float(x) for x in points if x is not None]
    if v.get("estimate") is None or max(known) == min(known):
        return None
    low, high = min(known), max(known)
    pad = 0.12 * (high - low)

    def at(x: Any) -> float | None:
        return (
            None if x is None else round(220 * (float(x) - low + pad) / (high - low + 2 * pad), 1)
        )

    margin = at(v["margin"]) or 0.0
    up = v.get("op") == ">="
    return {
        "estimate": at(v["estimate"]),
        "low": at(v.get("low")) if v.get("high") is not None else None,
        "high": at(v.get("high")),
        "margin": margin,
        "paper": at(v.get("paper")),
        "side_x": margin if up else 0,
        "side_w": round(220 - margin if up else margin, 1),
    }


def _unfinished(manifest: Mapping[str, Any]) -> list[str]:
    status = str(manifest.get("status", "unknown"))
    lines = [] if status == "done" else [f"status: {status}"]
    known = manifest.get("arm_status") or {}
    states = {arm: known.get(arm, "not run") for arm in manifest.get("arms") or ()} | known
    lines += [f"{arm}: {s}" for arm, s in states.items() if s != "done"]
    return lines


def _fallbacks(cells: stats.Cells, arms: Sequence[str]) -> list[str]:
    out = []
    for arm in arms:
        tasks = [
            stats.task_of(k) for a, k in cells if a == arm and stats.metric_of(k) == "fallbacks"
        ]
        for task in tasks:
            share = stats.fallback_share(cells, arm, task)
            if share:
                where = f" on {task}" if task else ""
                out.append(
                    f"{arm} fell back at {share:.1%} of its sites{where}."
                    if share < 2
                    else f"{arm} fell back at some sites{where}."
                )
    return out


def _facts(run: Run) -> list[tuple[str, str]]:
    m = run.manifest
    layouts = sorted({str(r["seed_layout"]) for r in run.rows if r.get("seed_layout")})
    versions = m.get("versions") or {}
    facts = [
        ("Paper", run.name),
        ("Started", _started(run)),
        ("Wall time", duration(m.get("wall_s"))),
        ("Commit", m.get("commit") or "not from a checkout"),
        ("Config hash", m.get("config_hash")),
        ("Seeds", f"{m.get('seeds')} (root seed {m.get('seed')})"),
        ("Device", m.get("device")),
        ("Platform", m.get("platform")),
        (
            "Deterministic",
            {"True": "yes", "False": "no"}.get(str(m.get("deterministic")), ""),
        ),
        ("Seeds ran", ", ".join(layouts)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def duration(seconds: Any) -> str:
    """
    >>> duration(3.21), duration(75), duration(7300), duration(None)
    ('3.2 s', '1 min 15 s', '2 h 1 min', '')
    """
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes} min {s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _started(run: Run) -> str:
    started = run.manifest.get("started")
    if isinstance(started, int | float):
        return datetime.datetime.fromtimestamp(started, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(started or "")[:19].replace("T", " ")


def _head(runs: Sequence[Run]) -> Run:
    """The run whose claims count: the latest finished standard run, else the latest."""

    def rank(r: Run) -> tuple[bool, bool, str]:
        return (not r.manifest.get("variant"), r.manifest.get("status") == "done", _started(r))

    return max(runs, key=rank)


def _index_title(papers: int, runs: int, sweeps: Sequence[Sweep]) -> str:
    if sweeps and not papers:
        return (
            f"Sweep of {sweeps[0].record.get('config', sweeps[0].path.name)}"
            if len(sweeps) == 1
            else f"{len(sweeps)} sweeps"
        )
    return f"{papers} paper{'s' * (papers != 1)}, {runs} run{'s' * (runs != 1)}"


def _link(run: Run, out: Path) -> str:
    page = run.path / "report.html"
    if not page.is_file():
        return ""
    return quote(Path(os.path.relpath(page.resolve(), out.resolve().parent)).as_posix())


def _run_row(run: Run, out: Path) -> dict[str, Any]:
    m = run.manifest
    wall = m.get("wall_s")
    return {
        "name": f"{run.name} ({run.path.name})",
        "href": _link(run, out),
        "counts": claims.counts(run.verdicts),
        "status": str(m.get("status", "unknown")),
        "seeds": m.get("seeds", ""),
        "started": _started(run),
        "commit": str(m.get("commit", "")),
        "device": str(m.get("device", "")),
        "wall": duration(wall),
        "wall_s": wall if isinstance(wall, int | float) else "",
        "config_hash": str(m.get("config_hash", ""))[:10],
    }


def _comparison(paper: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Runs of one paper side by side: verdicts, and each arm's primary results."""
    runs = sorted(runs, key=_started)[-MAX_COMPARED:]
    names = [f"{r.name} ({r.path.name})" for r in runs]
    texts = list(dict.fromkeys(str(v.get("text")) for r in runs for v in r.verdicts))
    by_text = [{str(v.get("text")): _claim(v) for v in r.verdicts} for r in runs]
    flat = [ablation.flatten(r.config) for r in runs]
    keys = sorted({k for f in flat for k in f if any(f.get(k) != g.get(k) for g in flat)})
    differs = "; ".join(f"{k}: {', '.join(str(f.get(k, '–')) for f in flat)}" for k in keys[:12])
    return {
        "title": runs[-1].manifest.get("title") or paper,
        "runs": names,
        "differs": differs + (f" and {len(keys) - 12} more keys" if len(keys) > 12 else ""),
        "claims": [{"text": t, "verdicts": [by.get(t) for by in by_text]} for t in texts],
        "tables": grids.across(dict(zip(names, runs, strict=True))),
    }
