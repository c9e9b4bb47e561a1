"""The terminal's view of a run: a result table (mean ± 95 % interval) and a claim table.

Plain text without colour when the output is not a terminal. Wide studies are cut to what can be
read, primary metric first, and the line below says what was left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from qlab.lab import stats
from qlab.lab.claims import NOT_MEASURED, Verdict, counts, unmeasured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_BLOCKS = 3  # tables of arms x columns, one below the other
MAX_ROWS = 40
STYLES = {"HOLDS": "bold green", "FAILS": "bold red", "INCONCLUSIVE": "bold yellow"}


def print_results(
    rows: Iterable[stats.Row],
    metrics: Mapping[str, Any],
    *,
    diverged: Mapping[str, Mapping[Any, Any]] | None = None,
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """Arms down, results across: the metrics in declared order, each over its tasks.

    Args:
      rows: of results.jsonl. metrics: name -> Metric or its dict, in order of importance.
      diverged: the manifest's {arm: {seed: step}}.
      file, width: of the output; standard output and its width if not given.
    """
    rows = list(rows)
    cells = stats.collect(rows, diverged)
    keys, arms = stats.ordered_keys(cells, metrics), stats.arms_of(cells)
    out, pm = _console(file, width)
    if not keys:
        out.print("No results.")
        return
    text = _cell_texts(cells, arms, keys, metrics, rows, pm)
    blocks, left_out = _layout(arms, keys, text, metrics, out.width)
    for block in blocks:
        out.print(_result_table(block, arms, text, metrics))
    for line in _footnotes(cells, arms, keys, left_out, pm):
        out.print(line, style="dim", markup=False, highlight=False)


def print_claims(
    verdicts: Iterable[Verdict | Mapping[str, Any]],
    *,
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """One row per claim: verdict, claim, what was measured, why."""
    from rich.table import Table
    from rich.text import Text

    records = [v._asdict() if isinstance(v, Verdict) else dict(v) for v in verdicts]
    out, _ = _console(file, width)
    if not records:
        out.print("No claims.")
        return
    table = Table(box=_box(), pad_edge=False)
    table.add_column("verdict", no_wrap=True)
    table.add_column("claim, measured [95 % interval], why", ratio=1)
    shown = [r for r in records if not unmeasured(r)]
    for r in shown:
        claim = Text(f"{r['text']} ({r['source']})" if r.get("source") else str(r["text"]))
        claim.append("\n" + f"{measured(r)}: {r.get('reason', '')}", "dim")
        table.add_row(Text(r["verdict"], STYLES.get(r["verdict"], "")), claim)
    if shown:
        out.print(table)
    if left_out := len(records) - len(shown):
        plural = "s" * (left_out > 1)
        out.print(f"{left_out} claim{plural} {NOT_MEASURED}: see report.html", markup=False)
    tally = ", ".join(f"{n} {name}" for name, n in counts(records).items() if n)
    out.print(f"{len(records)} claims: {tally}", markup=False, highlight=False)


def measured(record: Mapping[str, Any]) -> str:
    """The estimate of a verdict, its seeds, the margin and the paper's own number.

    >>> v = {"estimate": 0.11, "low": 0.085, "high": 0.135, "op": ">=", "margin": 0.0, "paper": 0.2, "n": 3}
    >>> measured(v)
    '0.110 [0.085, 0.135] over 3 seeds, claimed >= 0, paper 0.2'
    """
    parts = [f"claimed {record['op']} {stats.format_number(record['margin'])}"]
    if record.get("estimate") is not None:
        span = stats.format_span(record["estimate"], record.get("low"), record.get("high"))
        times = " times" if record.get("kind") == "ratio" else ""
        n = record.get("n", 0)
        parts.insert(0, f"{span}{times} over {n} seed{'s' * (n != 1)}")
    if record.get("paper") is not None:
        parts.append(f"paper {stats.format_number(record['paper'])}")
    return ", ".join(parts)


class _Writable:
    """A stream that writes what its encoding can and "?" for the rest."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        text = text.replace("–", "-") if not self.unicode else text
        return self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))

    @property
    def unicode(self) -> bool:
        return self.encoding.lower().startswith(("utf-8", "utf8"))

    def __getattr__(self, name: str) -> Any:  # flush, isatty, fileno
        return getattr(self._stream, name)


def _console(file: TextIO | None, width: int | None) -> tuple[Console, str]:
    """A console, and the plus-minus sign its encoding can write."""
    from rich.console import Console

    stream = _Writable(file or sys.stdout)
    out = Console(file=cast(TextIO, stream), width=width, soft_wrap=False, highlight=False)
    return out, "±" if stream.unicode else "+-"


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def _cell_texts(
    cells: stats.Cells,
    arms: Sequence[str],
    keys: Sequence[str],
    metrics: Mapping[str, Any],
    rows: list[Any],
    pm: str,
) -> dict[tuple[str, str], str]:
    """Text of each cell; the best arm of a column ends in *, lost seeds show as !1/5."""
    text = {}
    for key in keys:
        best = (
            stats.strongest(cells, arms, key, stats.better_of(key, metrics, rows))
            if len(arms) > 1
            else None
        )
        for arm in arms:
            cell = cells.get((arm, key))
            if cell is None:
                text[arm, key] = ""
                continue
            lost = f" !{len(cell.bad)}/{cell.num_seeds}" if cell.bad else ""
            number = (
                stats.format_interval(stats.t_interval(cell.values.values()), pm)
                if cell.values
                else "lost"
            )
            text[arm, key] = number + lost + (" *" if arm == best else "")
    return text


def _layout(
    arms: Sequence[str],
    keys: Sequence[str],
    text: Mapping[tuple[str, str], str],
    metrics: Mapping[str, Any],
    width: int,
) -> tuple[list[list[str]], list[str]]:
    """Columns packed into at most MAX_BLOCKS tables (and MAX_ROWS lines), and the columns left out."""
    room = width - max(map(len, (*arms, "arm"))) - 2
    blocks: list[list[str]] = [[]]
    used, allowed = 0, max(1, min(MAX_BLOCKS, MAX_ROWS // (len(arms) + 4)))
    for i, key in enumerate(keys):
        need = 2 + max(
            *(len(text[a, key]) for a in arms), *map(len, _title(key, metrics).split("\n"))
        )
        if blocks[-1] and used + need > room:
            if len(blocks) == allowed:
                return blocks, list(keys[i:])
            blocks.append([])
            used = 0
        blocks[-1].append(key)
        used += need
    return blocks, []


def _title(key: str, metrics: Mapping[str, Any]) -> str:
    """Column head: task above metric, unit and direction."""
    name, task = stats.metric_of(key), stats.task_of(key)
    declared = metrics.get(name)
    unit = stats.field(declared, "unit") if declared is not None else ""
    better = stats.field(declared, "better", "none") if declared is not None else "none"
    sense = {"higher": "max", "lower": "min"}.get(better, "")
    extra = ", ".join(x for x in (unit, sense) if x)
    if task:
        return f"{task}\n{name}" + (f"\n({extra})" if extra else "")
    return name + (f" ({extra})" if extra else "")


def _result_table(
    block: Sequence[str],
    arms: Sequence[str],
    text: Mapping[tuple[str, str], str],
    metrics: Mapping[str, Any],
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=_box(), pad_edge=False, padding=(0, 1))
    table.add_column("arm", no_wrap=True, vertical="bottom")
    for key in block:
        table.add_column(
            Text(_title(key, metrics)), justify="right", no_wrap=True, vertical="bottom"
        )
    for arm in arms:
        line = [Text(text[arm, k], "bold" if text[arm, k].endswith("*") else "") for k in block]
        table.add_row(Text(arm), *line)
    return table


def _footnotes(
    cells: stats.Cells, arms: Sequence[str], keys: Sequence[str], left_out: Sequence[str], pm: str
) -> list[str]:
    shown = [cells[a, k] for a in arms for k in keys if (a, k) in cells]
    seeds = max(cell.num_seeds for cell in shown)
    lines = [
        f"mean {pm} half of the 95 % t interval over {seeds} seeds; * best mean"
        if seeds > 1
        else "one seed; * best"
    ]
    if any(cell.bad for cell in shown):
        lines[0] += "; !1/5 = 1 of 5 seeds non-finite, left out of the mean"
    if left_out:
        names = list(dict.fromkeys(stats.metric_of(k) for k in left_out))
        what = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(
            f"left out here: {len(left_out)} of {len(keys)} columns ({what}); all are in report.html"
        )
    for arm in arms:
        found = {
            k: c for (a, k), c in cells.items() if a == arm and stats.metric_of(k) == "fallbacks"
        }
        count = sum(sum(c.values.values()) for c in found.values())
        if count:
            total = sum(
                sum(cells[arm, t].values.values())
                for k in found
                if (arm, t := k[: -len("fallbacks")] + "sites_total") in cells
            )
            lines.append(
                f"{arm}: {count:g} of {total:g} sites fell back"
                if total
                else f"{arm}: {count:g} sites fell back"
            )
    return lines
