"""python -m qlab.sweep: one study over a grid of overrides, or one convention switch at a time."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlab.lab import launch, records, study, trials
from qlab.lab.console import Console, clock
from qlab.lab.errors import Preempted, UserError
from qlab.lab.signals import Stop, listen
from qlab.run import list_papers, split_overrides

_EPILOG = """\
examples:
  python -m qlab.sweep --config q_star:smoke                         the config's own sweep()
  python -m qlab.sweep --config flexround --grid bits=2,3,4 --grid optimizer.lr=1e-3,3e-3 --jobs 2
  python -m qlab.sweep --config my_config.py --grid "widths=(64,64),(128,128)" --retry 1
  python -m qlab.sweep --config flexround --explain                  each convention switch alone
  python -m qlab.sweep --config flexround --grid bits=2,3 --list     name the trials, start nothing

Grid values are separated by commas and have the type that the key has in the config. A tuple is
written in brackets, or the values are separated by semicolons: widths="64,64;128,128". One tuple
alone: widths="(64,64)". Several --grid are combined, every value with every value.

The same command resumes a stopped sweep and skips its finished trials.
Exit codes: 0 all trials done, 1 some failed, 2 bad input, 75 stopped and saved.
"""


class Result(NamedTuple):
    """What a sweep leaves.

    Attributes:
      workdir: the sweep folder. page: its report.html.
      trials: the records of sweep.json for this command's trials.
      skipped, retried: ids of trials that were finished before, and that took more than one attempt.
    """

    workdir: Path
    page: Path
    trials: list[dict[str, Any]]
    skipped: tuple[str, ...]
    retried: tuple[str, ...]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [t for t in self.trials if t["status"] != "done"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All result rows, each with its trial's id and overrides: ready for a data frame."""
        return [
            {"trial": t["id"], **t["overrides"], **row}
            for t in self.trials
            for row in records.read_jsonl(Path(t["workdir"]) / "results.jsonl")
        ]

    def __repr__(self) -> str:
        done = len(self.trials) - len(self.failed)
        return f"Result({done} of {len(self.trials)} trials done; page {self.page})"


def sweep(
    config: str,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    workdir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    explain: bool = False,
    jobs: int = 1,
    launcher: str = "local",
    retry: int = 0,
    device: str = "auto",
    deterministic: bool = False,
    quiet: bool = False,
    command: str = "",
) -> Result:
    """Runs a sweep, as `python -m qlab.sweep` does.

    Args:
      config: path or name of a config, with ":variant" if wanted.
      grid: {"optimizer.lr": (1e-3, 3e-3)}, dotted keys; not given: the config's own sweep().
      arms, seeds, overrides, device, deterministic: for every trial, as in qlab.run.
      workdir: sweep folder (default: runs/<paper>-<variant>-sweep-<hash>).
      explain: instead of a grid, flip each switch of the config's CONVENTIONS alone.
      jobs: trials at once. launcher: "local".
      retry: how often a failed trial is attempted again, unless its input is bad.
      quiet: print nothing.
    Returns:
      A Result. Trials that failed are in it, with the reason; they raise nothing.
    Raises:
      UserError: bad input, before anything is started or written. Preempted: by a signal, after
        the running trials have saved.
    """
    p = trials.plan(
        config,
        grid=grid,
        explain=explain,
        overrides=overrides,
        arms=arms,
        seeds=seeds,
        workdir=workdir,
        options=_options(device, deterministic),
    )
    start = launch.launcher(launcher, jobs)
    if retry < 0:
        raise UserError(f"--retry {retry}: give 0 or more")
    console = Console(quiet)
    with listen() as stop, records.lock(p.workdir):
        return _run(p, start, retry, command or p.command, console, stop)


def _options(device: str, deterministic: bool) -> list[str]:
    return (["--device", device] if device != "auto" else []) + ["--deterministic"] * deterministic


def _run(
    p: trials.Plan,
    launcher: launch.Launcher,
    retry: int,
    command: str,
    console: Console,
    stop: Stop,
) -> Result:
    book = trials.Book(p, command)
    skipped = [t.id for t in p.trials if book[t.id]["status"] == "done"]
    console.say(
        f"{p.base.label}  {len(p.trials)} trials, {launcher.slots} at once  {p.workdir}"
        + (f"  ({len(skipped)} finished before)" if skipped else "")
    )
    for note in p.notes:
        console.say(note)
    todo = {t.id: t.spec for t in p.trials if t.id not in skipped}
    logs = p.workdir / "logs"
    with records.guard(logs):
        logs.mkdir(exist_ok=True)
    book.save("running")
    try:
        retried = _drive(book, todo, launcher, retry, console, stop, logs)
    except BaseException:
        with contextlib.suppress(UserError):
            book.save("failed")
        raise
    states = {book[t.id]["status"] for t in p.trials}
    unfinished = not states <= {"done", "failed"}
    book.save("preempted" if unfinished else "failed" if "failed" in states else "done")
    page = _draw(p.workdir, command, console)
    result = Result(p.workdir, page, [book[t.id] for t in p.trials], tuple(skipped), retried)
    if not console.quiet:
        _digest(p, result, console)
    if unfinished:
        stop.check()
    return result


def _drive(
    book: trials.Book,
    todo: dict[str, launch.RunSpec],
    launcher: launch.Launcher,
    retry: int,
    console: Console,
    stop: Stop,
    logs: Path,
) -> tuple[str, ...]:
    """Runs the trials and keeps sweep.json and the screen up to date; gives the ids retried."""
    total, ended, running = len(todo), 0, 0
    took: list[float] = []
    retried: dict[str, None] = {}
    failed = 0
    events = launch.run_all(todo, launcher, logs, stop, retry=retry)
    with contextlib.closing(events), console.progress("trials", total, 0):
        for event in events:
            book.note(event)
            name = trials.shown(book[event.id]["overrides"])
            running += 1 if event.kind == "started" else -1
            ended += event.kind in ("done", "failed")
            failed += event.kind == "failed"
            if event.kind in ("retry", "resume"):
                retried[event.id] = None
            if event.outcome is not None:
                took.append(event.outcome.wall_s)
                line = f"[{ended}/{total}] {name}: {_ending(event)}"
                left = total - ended
                if left and not stop.why and not console.tty:
                    eta = sum(took) / len(took) * left / min(launcher.slots, left)
                    line += f"  ({failed} failed, ETA {clock(eta)})"
                console.say(line)
            elif not console.tty:
                console.say(f"started {name}")
            if console.tty:
                console.update(ended, total, f"{running} running, {failed} failed")
    return tuple(retried)


def _ending(event: launch.Event) -> str:
    assert event.outcome is not None
    words = {"retry": "failed, to be tried again", "resume": "was stopped, to be resumed"}
    text = f"{words.get(event.kind, event.kind)} after {clock(event.outcome.wall_s)}"
    return text + (f": {event.outcome.reason}" if event.kind in ("failed", "retry") else "")


def _draw(workdir: Path, command: str, console: Console) -> Path:
    """report.html. The numbers are on disk already, so a page that cannot be drawn is only said."""
    from qlab.lab import pages, reading

    page = workdir / "report.html"
    try:
        return pages.write_index([], page, sweeps=[reading.load_sweep(workdir)], command=command)
    except UserError:
        raise
    except Exception as e:
        console.say(
            f"the page could not be drawn ({type(e).__name__}: {e}); python -m qlab.report {workdir} tries again"
        )
        return page


def _digest(p: trials.Plan, result: Result, console: Console) -> None:
    """What came of it, one line for each trial that did not finish; --explain's table; the page."""
    if p.explain:
        from qlab.lab import explain

        try:
            found = explain.explain(p.workdir)
            explain.print_explained(found)
        except UserError as e:
            console.say(study.one_line(e))
    failed = [t for t in result.trials if t["status"] == "failed"]
    unfinished = [t for t in result.trials if t["status"] not in ("failed", "done")]
    done = len(result.trials) - len(failed) - len(unfinished) - len(result.skipped)
    console.say(
        f"{len(result.trials)} trials: {done} done, {len(result.skipped)} skipped (finished before), "
        f"{len(failed)} failed, {len(result.retried)} retried"
        + (f", {len(unfinished)} not finished" if unfinished else "")
    )
    for t in failed:
        console.say(
            f"failed  {trials.shown(t['overrides'])}: {t['reason']}; rerun: {t['command']}; log: {t['log']}"
        )
    console.say(f"page: {result.page}")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m qlab.sweep",
        description="Runs one study for every combination of a grid, and compares them on one page.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add("--config", metavar="FILE|NAME[:VARIANT]", help="the study: a path, or a name")
    add("--config.KEY=VALUE", dest="_", help="override one key of the config in every trial")
    add(
        "--grid",
        action="extend",
        nargs="+",
        metavar="KEY=V1,V2",
        help="an axis; default: the config's own sweep()",
    )
    add("--explain", action="store_true", help="flip each switch of the config's CONVENTIONS alone")
    add("--arms", help="run only these, comma separated")
    add("--seeds", type=int, help="number of seeds")
    add("--jobs", type=int, default=1, metavar="N", help="trials at once (default 1)")
    add("--launcher", default="local", help="where trials run: local (ray and slurm are to come)")
    add("--retry", type=int, default=0, metavar="N", help="attempt failed trials N more times")
    add("--workdir", help="sweep folder (default runs/<paper>-<variant>-sweep-<hash>)")
    add("--device", default="auto", help="auto, cpu, gpu or tpu")
    add("--deterministic", action="store_true", help="bitwise repeatable on a GPU too, slower")
    add(
        "--list",
        action="store_true",
        help="name the trials and their commands, start nothing; without --config: the papers",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        rest, overrides = split_overrides(given)
        args = parser().parse_args(rest)
        if not args.config:
            if args.list:
                print(list_papers())
                return 0
            raise UserError(
                "which study? give --config NAME (python -m qlab.sweep --list names them)"
            )
        arms = [a.strip() for a in args.arms.split(",") if a.strip()] if args.arms else None
        about: dict[str, Any] = {
            "grid": trials.split_axes(args.grid) if args.grid else None,
            "explain": args.explain,
            "overrides": overrides,
            "arms": arms,
            "seeds": args.seeds,
            "workdir": args.workdir,
        }
        if args.list:
            options = _options(args.device, args.deterministic)
            specs = [t.spec for t in trials.plan(args.config, **about, options=options).trials]
            states = ["done " if launch.is_done(spec) else "to do" for spec in specs]
            print(
                "\n".join(f"{a}  {launch.command(b)}" for a, b in zip(states, specs, strict=True))
            )
            return 0
        result = sweep(
            args.config,
            **about,
            jobs=args.jobs,
            launcher=args.launcher,
            retry=args.retry,
            device=args.device,
            deterministic=args.deterministic,
            quiet=args.quiet,
            command=shlex.join(["python", "-m", "qlab.sweep", *given]),
        )
    except (UserError, Preempted) as e:
        return study.exit_code(e)
    return 1 if result.failed else 0


class _Callable(types.ModuleType):
    """Lets `qlab.sweep(...)` be the function although `qlab.sweep` is this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return sweep(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
