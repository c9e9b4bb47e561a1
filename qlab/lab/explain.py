"""What each convention switch does to the numbers: the table of `python -m qlab.sweep --explain`.

Every switch is flipped alone, so a trial differs from the base in one key and shares its seeds' keys:
changes are taken seed by seed. Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from qlab.lab import records, stats
from qlab.lab.errors import UserError

MAX_ROWS = 30


class Change(NamedTuple):
    """What one flipped switch did to one number of one arm.

    Attributes:
      switch, value: the config key and what it was set to. arm, key: the number ("task/metric").
      base: mean of the unflipped runs over the paired seeds.
      ci: of the paired difference, flipped less unflipped.
      size: |mean difference| in units of the largest |base| among the arms, to sort by.
      same: not one bit of it changed on any seed.
    """

    switch: str
    value: Any
    arm: str
    key: str
    base: float
    ci: stats.Interval
    size: float
    same: bool

    @property
    def clear(self) -> bool:
        """The interval leaves zero out."""
        return self.ci.low > 0 or self.ci.high < 0


class Flip(NamedTuple):
    """A claim whose verdict a switch changes."""

    switch: str
    value: Any
    claim: str
    before: str
    after: str


class Explained(NamedTuple):
    """changes: largest first. flips: of verdicts. missing: trials without numbers, "key=value (why)"."""

    changes: list[Change]
    flips: list[Flip]
    missing: list[str]


class _Run(NamedTuple):
    manifest: dict[str, Any]
    cells: stats.Cells
    verdicts: dict[str, str]


def explain(folder: Path) -> Explained:
    """Reads the trials of an --explain sweep.

    Args:
      folder: of the sweep, with sweep.json.
    Raises:
      UserError: it holds no such sweep, or its base trial has no numbers.
    """
    sweep = records.read_json(folder / "sweep.json")
    if not sweep.get("explain"):
        raise UserError(f"{folder} holds no --explain sweep")
    trials: list[dict[str, Any]] = sweep["trials"]
    base = next((_load(folder / t["id"]) for t in trials if not t["overrides"]), None)
    if base is None:
        raise UserError(
            f"the base trial of {folder} has no numbers, so there is nothing to compare"
        )
    changes: list[Change] = []
    flips: list[Flip] = []
    missing: list[str] = []
    for trial in trials:
        for switch, value in trial["overrides"].items():
            run = _load(folder / trial["id"])
            if run is None:
                missing.append(f"{switch}={_show(value)} ({trial['status']})")
                continue
            changes += _changes(switch, value, base, run)
            flips += [
                Flip(switch, value, claim, before, run.verdicts[claim])
                for claim, before in base.verdicts.items()
                if run.verdicts.get(claim, before) != before
            ]
    return Explained(sorted(changes, key=lambda c: -c.size), flips, missing)


def _load(run: Path) -> _Run | None:
    rows = records.read_jsonl(run / "results.jsonl")
    if not rows:
        return None
    manifest = records.read_json(run / "manifest.json")
    claims = records.read_json(run / "claims.json")
    verdicts = {c["text"]: c["verdict"] for c in claims}
    return _Run(manifest, stats.collect(rows, manifest.get("diverged")), verdicts)


def claimed(manifest: Mapping[str, Any], cells: stats.Cells) -> list[tuple[str, str]]:
    """The (arm, key) that the claims speak of; without claims, every arm's first metric."""
    found: dict[tuple[str, str], None] = {}
    for claim in manifest.get("claims", ()):
        for side in (claim["left"], claim["right"]):
            if isinstance(side, Sequence) and not isinstance(side, str):
                arms, key = side
                found |= dict.fromkeys(
                    (a, key) for a in ([arms] if isinstance(arms, str) else arms)
                )
    if not found:
        first = stats.ordered_keys(cells, manifest.get("metrics", {}))[:1]
        found = dict.fromkeys((a, k) for k in first for a in stats.arms_of(cells))
    return [where for where in found if where in cells]


def _changes(switch: str, value: Any, base: _Run, run: _Run) -> Iterable[Change]:
    places = claimed(base.manifest, base.cells)
    means = {where: stats.t_interval(base.cells[where].values.values()).mean for where in places}
    for arm, key in places:
        if (arm, key) not in run.cells:
            continue
        new, old = stats.paired(run.cells[arm, key], base.cells[arm, key])
        if not new.size:
            continue
        ci = stats.t_interval(new - old)
        scale = max(abs(m) for (_, k), m in means.items() if k == key and not math.isnan(m))
        size = abs(ci.mean) / (scale or abs(new).max() or 1.0)
        yield Change(switch, value, arm, key, float(old.mean()), ci, size, bool((new == old).all()))


def print_explained(
    found: Explained, *, file: TextIO | None = None, width: int | None = None
) -> None:
    """The table: one line per switch value, arm and claimed metric, the largest change first."""
    from rich.console import Console
    from rich.table import Table

    out = Console(file=file, width=width, highlight=False)
    moved = [c for c in found.changes if not c.same]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("switch", "arm", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("base", "change [95 % interval]", "relative"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in moved[:MAX_ROWS]:
        span = stats.format_span(c.ci.mean, c.ci.low, c.ci.high) + (" *" if c.clear else "  ")
        sign = "" if span.startswith("-") else "+"
        relative = f"{c.size:.1%}"
        table.add_row(
            _text(f"{c.switch}={_show(c.value)}"),
            _text(c.arm),
            _text(c.key),
            stats.format_number(c.base),
            _text(sign + span),
            relative,
        )

    def say(line: str) -> None:
        out.print(line, markup=False, soft_wrap=True)

    if moved:
        out.print(table)
        say("* the interval leaves zero out; relative to the largest base value among the arms")
    if len(moved) > MAX_ROWS:
        say(f"{len(moved) - MAX_ROWS} smaller changes are not shown")
    still = _unmoved(found.changes)
    if still:
        say(f"changes no claimed number: {', '.join(still)}")
    for f in found.flips:
        say(f"verdict: {f.switch}={_show(f.value)} turns {f.before} into {f.after}: {f.claim}")
    if found.missing:
        say(f"no numbers: {', '.join(found.missing)}")


def _unmoved(changes: Iterable[Change]) -> list[str]:
    """The switch values under which every number kept every bit."""
    same: dict[str, bool] = {}
    for c in changes:
        name = f"{c.switch}={_show(c.value)}"
        same[name] = same.get(name, True) and c.same
    return [name for name, all_same in same.items() if all_same]


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_show, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(s: str) -> Any:
    from rich.text import Text

    return Text(s)
