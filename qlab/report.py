"""python -m qlab.report RUN_OR_FOLDER... [--out page.html] [--open]

One run folder: rewrites its report.html from the files in it. Several, or a folder that holds many:
one page across runs, with the claims of all papers first. Also callable: `qlab.report("runs")`.
Never imports JAX.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlab.lab.errors import UserError


def report(paths: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of a run, or one page across runs.

    Args:
      paths: a run folder, or run folders and folders that hold some.
      out: the page across runs; report.html in the folder given if it is the only one, else in the
        working directory.
    Returns:
      The page written.
    Raises:
      UserError: a path does not exist, or no run was found.
    """
    from qlab.lab import pages, reading

    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise UserError("no run folder given; give a run folder or a folder that holds some")
    for p in given:
        if not p.is_dir():
            what = "is not a folder" if p.exists() else "does not exist"
            raise UserError(f"{p} {what}; give a run folder or a folder that holds some")
    single = len(given) == 1 and (given[0] / "manifest.json").is_file()
    if single and out is None:
        return pages.write_page(given[0])

    problems: list[str] = []
    runs = []
    for folder in dict.fromkeys(f for p in given for f in reading.find_runs(p)):
        try:
            runs.append(reading.load(folder))
        except UserError as e:
            problems.append(str(e))
    sweeps = []
    for folder in dict.fromkeys(f for p in given for f in reading.find_sweeps(p)):
        try:
            sweeps.append(reading.load_sweep(folder, runs))
        except UserError as e:
            problems.append(str(e))
    if not runs and not sweeps:
        why = problems[0] if problems else f"no run (manifest.json) in {', '.join(map(str, given))}"
        raise UserError(why)
    if out is None:
        out = (given[0] if len(given) == 1 else Path()) / "report.html"
    command = shlex.join(["python", "-m", "qlab.report", *map(str, given)])
    return pages.write_index(runs, out, sweeps=sweeps, command=command, problems=problems)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlab.report",
        description="Tables, plots and one HTML page from run folders.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN_OR_FOLDER",
        help="a run folder (rewrites its report.html), or folders that hold many (one page across runs)",
    )
    parser.add_argument(
        "--out",
        metavar="PAGE",
        help="where the page across runs goes (default: report.html in the folder)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.parse_args(argv)
    try:
        page = report(args.paths, args.out)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return e.code
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0


class _Callable(types.ModuleType):
    """Lets `qlab.report(...)` mean `qlab.report.report(...)`."""

    def __call__(
        self, paths: str | Path | Iterable[str | Path], out: str | Path | None = None
    ) -> Path:
        return report(paths, out)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
