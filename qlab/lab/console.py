"""What a person sees while a study runs: phases, a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINE_EVERY_S = 10.0


class Console:
    """Prints to standard output; `quiet` prints nothing."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.tty = sys.stdout.isatty() and not quiet
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = 0.0
        self._what, self._first = "", 0

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    @contextlib.contextmanager
    def waiting(self, what: str, memory: Path | None = None) -> Iterator[None]:
        """A wait of unknown length: says what for, and how long it took the last time."""
        known = _recall(memory)
        last = f" (last time {known[what]:.1f} s)" if what in known else ""
        start = time.monotonic()
        if self.tty:
            from rich.console import Console as Rich

            with Rich().status(f"{what}{last}"):
                yield
        else:
            self.say(f"{what}{last} ...")
            yield
        took = time.monotonic() - start
        if took > 1.0:
            self.say(f"{what}: {took:.1f} s")
        if memory is not None:
            _remember(memory, {**known, what: round(took, 2)})

    @contextlib.contextmanager
    def progress(self, what: str, total: int, done: int) -> Iterator[None]:
        """A bar over `total` steps, `done` of them from before."""
        self._what, self._first = what, done
        self._start = self._last = time.monotonic()
        if self.tty:
            from rich import progress as rp

            columns = (
                rp.TextColumn("{task.description}"),
                rp.BarColumn(),
                rp.MofNCompleteColumn(),
                rp.TimeElapsedColumn(),
                rp.TextColumn("ETA"),
                rp.TimeRemainingColumn(),
                rp.TextColumn("{task.fields[note]}"),
            )
            with rp.Progress(*columns, transient=True) as bar:
                self._bar, self._task = (
                    bar,
                    bar.add_task(what, total=total, completed=done, note=""),
                )
                try:
                    yield
                finally:
                    self._bar = None
        else:
            yield

    def update(self, done: int, total: int, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.quiet or now - self._last < LINE_EVERY_S:
            return
        self._last = now
        eta = (now - self._start) / max(done - self._first, 1) * (total - done)
        self.say(
            f"{self._what}: {done}/{total} steps, ETA {clock(eta)}{'  ' + note if note else ''}"
        )


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3725)
    ('1:15', '1:02:05')
    """
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
    return f"{s // 60}:{s % 60:02d}"


def _recall(memory: Path | None) -> dict[str, float]:
    if memory is None:
        return {}
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: dict[str, float]) -> None:
    with contextlib.suppress(OSError):  # a hint for people; never worth failing for
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(dict(list(known.items())[-500:])))
