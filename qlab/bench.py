"""python -m qlab.bench: speed side by side with peers and with the bound."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shlex
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlab.lab import config as configs
from qlab.lab import records
from qlab.lab.console import Console
from qlab.lab.errors import UserError, nearest
from qlab.lab.study import SCHEMA

BENCHES = ("runner", "startup", "search", "quantum", "kernels", "ptq", "rl")
FOLDER = Path(__file__).resolve().parent / "benches"

_EPILOG = """\
examples:
  python -m qlab.bench --list
  python -m qlab.bench runner                 two to eight minutes each
  python -m qlab.bench runner search --quick  at most 40 s each
  python -m qlab.bench kernels --tune         fills the table of block sizes of this device first

Contestants are timed in one process, a repetition of each in turn, so that what slows the machine
meets them all; ratios are taken repetition by repetition. Numbers go to runs/bench-<name>, in the
form of a run: python -m qlab.report runs/bench-<name> draws the page.
Exit codes: 0 measured, 2 bad input.
"""


class Result(NamedTuple):
    """What a bench leaves. rows: of results.jsonl. goals: verdict records. summary: its last line."""

    workdir: Path
    rows: list[dict[str, Any]]
    goals: list[Any]
    summary: str


def bench(
    name: str,
    *,
    quick: bool = False,
    workdir: str | Path | None = None,
    device: str = "auto",
    tune: bool = False,
    quiet: bool = False,
    command: str = "",
) -> Result:
    """Runs one bench, as `python -m qlab.bench NAME` does.

    Args:
      name: runner, startup, search, quantum, kernels, ptq or rl.
      quick: at most 40 s; fewer sizes and repetitions.
      workdir: default runs/bench-<name>; an earlier bench there is replaced.
      device: auto, cpu, gpu or tpu.
      tune: "kernels" only: first search the block sizes of this device and write them to tuned.json.
      quiet: print nothing.
    Raises:
      UserError: no such bench, or the folder is not free.
    """
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}{nearest(name, BENCHES)}")
    if tune and name != "kernels":
        raise UserError(f"--tune: {name} has nothing to tune; only kernels has")
    folder = Path(workdir) if workdir else Path("runs") / f"bench-{name}{'-quick' * quick}"
    console = Console(quiet)
    command = command or shlex.join(
        ["python", "-m", "qlab.bench", name, *["--quick"] * quick, "--workdir", str(folder)]
    )
    with records.lock(folder):
        _check_free(folder, name)
        return _bench(name, quick, folder, device, tune, console, command)


def _check_free(folder: Path, name: str) -> None:
    manifest = folder / "manifest.json"
    if manifest.is_file() and records.read_json(manifest).get("paper") != f"bench-{name}":
        raise UserError(f"{folder} holds another run; give another --workdir")


def _bench(
    name: str,
    quick: bool,
    folder: Path,
    device: str,
    tune: bool,
    console: Console,
    command: str,
) -> Result:
    from qlab.benches import measure
    from qlab.lab import claims
    from qlab.lab import device as devices

    start, cpu_load = time.monotonic(), measure.machine()
    module = importlib.import_module(f"qlab.benches.{name}")
    settings: dict[str, Any] = module.settings(quick)
    config = configs.base(f"bench_{name}", settings=settings)
    goals = module.goals(settings) if hasattr(module, "goals") else module.GOALS
    metrics = {**module.METRICS, **measure.MACHINE}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "paper": f"bench-{name}",
        "variant": "quick" if quick else "",
        "title": configs.title(FOLDER / f"{name}.py"),
        "seed": 0,
        "config_hash": configs.config_hash(config),
        "config": {},
        "commit": records.commit(),
        "versions": devices.versions(),
        "deterministic": False,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "status": "running",
        "processor": measure.processor(),
        "figures": [f._asdict() for f in getattr(module, "FIGURES", ())],
        "metrics": {k: m._asdict() for k, m in metrics.items()},
        "claims": [g._asdict() for g in goals],
        "diverged": {},
    }
    records.write_atomic(folder / "config.json", configs.canonical(config) + "\n")
    records.write_atomic(folder / "command.txt", command + "\n")
    old = os.environ.get("QLAB_COMPILATION_CACHE")
    os.environ["QLAB_COMPILATION_CACHE"] = "off"  # first calls are measured, not looked up
    try:
        with devices.session(device, bool(settings.get("x64", False))) as device_name:
            console.say(f"{name}: {manifest['title']}  ({device_name}, {folder})")
            if tune:
                module.tune(settings, console.say)
            numbers = [*module.measure(settings, console.say), *cpu_load]
            peak = devices.peak_memory_mb()
    finally:
        os.environ.pop("QLAB_COMPILATION_CACHE")
        if old is not None:
            os.environ["QLAB_COMPILATION_CACHE"] = old
    wall_s = time.monotonic() - start
    columns = {
        "paper": manifest["paper"],
        "variant": manifest["variant"],
        "split": "",
        "device": device_name,
        "deterministic": False,
        "config_hash": manifest["config_hash"],
        "commit": manifest["commit"],
        "claim": "",
        "claim_ref": "",
    }
    rows = measure.result_rows(numbers, metrics, columns, wall_s, peak)
    arms = list(dict.fromkeys(n.arm for n in numbers))
    lost = {n.arm: n.status for n in numbers if n.status != "ok"}
    manifest |= {
        "arms": arms,
        "arm_status": {a: lost.get(a, "done") for a in arms},
        "seeds": max(len(n.values) for n in numbers),
        "device": device_name,
        "status": "done",
        "wall_s": round(wall_s, 3),
    }
    verdicts = claims.check(goals, rows, manifest)
    records.write_atomic(folder / "results.jsonl", "".join(records.dumps(r) + "\n" for r in rows))
    records.write_json(folder / "claims.json", [v._asdict() for v in verdicts])
    summary = f"{name}: {module.summary(numbers)}{_verdicts(verdicts)}"
    records.write_json(folder / "manifest.json", manifest | {"summary": summary})
    console.say(measure.table(numbers, metrics))
    return Result(folder, rows, verdicts, summary)


def _verdicts(verdicts: Sequence[Any]) -> str:
    texts = [f"{v.text}: {v.verdict}" for v in verdicts]
    return f" | goals: {'; '.join(texts)}" if texts else ""


def list_benches() -> str:
    """One line a bench: name and title."""
    width = max(map(len, BENCHES))
    return "\n".join(f"{name:{width}}  {configs.title(FOLDER / f'{name}.py')}" for name in BENCHES)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m qlab.bench",
        description="Measures speed against peers and against the bound.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHES)}"
    )
    out.add_argument("--list", action="store_true", help="list all benches, one line each")
    out.add_argument("--quick", action="store_true", help="at most 40 s a bench")
    out.add_argument(
        "--workdir",
        metavar="DIR",
        help="run folder (default runs/bench-<name>[-quick]); one bench only",
    )
    out.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    out.add_argument(
        "--tune",
        action="store_true",
        help="kernels only: search this device's block sizes first, into kernels/<op>/tuned.json",
    )
    out.add_argument("--quiet", action="store_true", help="print only the summary lines")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    if args.list:
        print(list_benches())
        return 0
    try:
        if not args.names:
            raise UserError(f"which bench? give one or more of {', '.join(BENCHES)}")
        for name in args.names:  # a wrong name costs nothing
            if name not in BENCHES:
                raise UserError(f"unknown bench {name!r}{nearest(name, BENCHES)}")
        if args.workdir and len(args.names) > 1:
            raise UserError("--workdir is the folder of one bench; give one NAME, or no --workdir")
        done = [
            bench(
                name,
                quick=args.quick,
                workdir=args.workdir,
                device=args.device,
                tune=args.tune,
                quiet=args.quiet,
                command=shlex.join(["python", "-m", "qlab.bench", *words]),
            )
            for name in dict.fromkeys(args.names)
        ]
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return e.code
    print("\n".join(r.summary for r in done), flush=True)
    return 0


class _Callable(types.ModuleType):
    """Lets `qlab.bench(...)` be the function although `qlab.bench` is this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return bench(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
