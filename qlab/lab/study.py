"""One study: every arm over its seeds, then claims and the page. What `qlab.run` calls."""

from __future__ import annotations

import contextlib
import datetime
import html
import importlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from qlab.lab import config as configs
from qlab.lab import records, registry
from qlab.lab.console import Console
from qlab.lab.errors import AllSeedsDiverged, Preempted, UserError, nearest
from qlab.lab.signals import Stop, listen

SCHEMA = 1


class Plan(NamedTuple):
    """A study before anything runs. arms: to run now; the config names all of them."""

    loaded: configs.Loaded
    config: configs.Config
    arms: tuple[str, ...]
    workdir: Path
    config_hash: str

    @property
    def label(self) -> str:
        variant = self.loaded.variant
        return self.loaded.paper + (f":{variant}" if variant else "")


class Result(NamedTuple):
    """What a study leaves.

    Attributes:
      workdir: the run folder. page: its report.html.
      rows: of results.jsonl. claims: verdict records, see qlab.lab.claims.
    """

    workdir: Path
    page: Path
    rows: list[dict[str, Any]]
    claims: list[Any]

    def __repr__(self) -> str:
        verdicts = ", ".join(f"{c.verdict}: {c.text}" for c in self.claims) or "no claims"
        return f"Result({len(self.rows)} numbers, {verdicts}; page {self.page})"

    def _repr_html_(self) -> str:
        """The page itself, where a notebook shows the result of a cell."""
        if not self.page.is_file():
            return f"<pre>{html.escape(repr(self))}</pre>"
        page = html.escape(self.page.read_text(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:800px;border:0"></iframe>'


def plan(
    spec: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    workdir: str | Path | None = None,
) -> Plan:
    """Loads and checks everything that can be checked without JAX.

    Raises:
      UserError: unknown paper, variant, key, arm; a value of the wrong type or out of range.
    """
    loaded = configs.load(spec)
    config = loaded.config
    for key, value in (overrides or {}).items():
        configs.override(config, key, value)
    if seeds is not None:
        configs.override(config, "seeds", seeds)
    if config.seeds < 1:
        raise UserError(f"seeds={config.seeds} runs nothing; give 1 or more (claims need 3)")
    names = list(config.arms)
    for arm in arms or ():
        if arm not in names:
            raise UserError(f"{loaded.paper} has no arm {arm!r}{nearest(arm, names)}")
    chosen = tuple(a for a in names if not arms or a in arms)
    for arm in chosen:
        _check_arm(arm)
        configs.arm_config(config, arm)
    digest = configs.config_hash(config)
    variant = f"-{loaded.variant}" if loaded.variant else ""
    folder = Path(workdir) if workdir else Path("runs") / f"{loaded.paper}{variant}-{digest[:8]}"
    return Plan(loaded, config, chosen, folder, digest)


def _check_arm(arm: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", arm):
        raise UserError(f"arm name {arm!r} cannot be a folder name; use letters, digits, . _ + -")


def run_study(
    p: Plan,
    *,
    device: str = "auto",
    deterministic: bool = False,
    fresh: bool = False,
    time_limit_s: float = 0.0,
    command: str = "",
    quiet: bool = False,
) -> Result:
    """Runs, resumes or (if all is done) only re-reads a study, and writes claims and page.

    Raises:
      Preempted: by a signal or the time limit, after saving. AllSeedsDiverged: after the other
        arms have run. UserError: anything else a person can mend.
    """
    console = Console(quiet)
    with listen(time_limit_s) as stop:
        if fresh:
            _move_away(p.workdir, console)
        with records.lock(p.workdir), _arrange(p, console) as manifest:
            return _run(p, manifest, console, stop, device, deterministic, command)


def try_study(p: Plan, *, device: str = "auto", quiet: bool = False) -> list[Any]:
    """What each arm would take (`qlab.lab.trial`): a few steps at full shapes, memory, time; nothing is written."""
    from qlab.lab import device as devices

    console = Console(quiet)
    with devices.session(device, bool(p.config.get("x64", False))), listen(0.0) as stop:
        from qlab.lab import trial

        module = registry.experiment(p.config.experiment, p.loaded.path)
        found = []
        for i, name in enumerate(p.arms):
            label = f"[{i + 1}/{len(p.arms)}] {name}"
            found.append(
                trial.try_arm(module.build, configs.arm_config(p.config, name), console, label)
            )
            stop.check()
    if not quiet:
        print(trial.table(found, p.config.seeds), flush=True)
    return found


def _move_away(workdir: Path, console: Console) -> None:
    if not workdir.exists():
        return
    n = 1
    while (old := workdir.with_name(f"{workdir.name}.old{n}")).exists():
        n += 1
    with records.guard(workdir), records.lock(workdir):
        workdir.rename(old)
    console.say(f"earlier run kept in {old}")


@contextlib.contextmanager
def _arrange(p: Plan, console: Console) -> Iterator[dict[str, Any]]:
    """Checks that the folder is free or of this very config, and keeps its manifest up to date."""
    manifest_file, config_file = p.workdir / "manifest.json", p.workdir / "config.json"
    manifest: dict[str, Any] = {"arm_status": {}, "diverged": {}, "wall_s": 0.0}
    text = configs.canonical(p.config)
    if config_file.exists():
        difference = configs.first_difference(records.read_json(config_file), json.loads(text))
        if difference:
            raise UserError(
                f"{p.workdir} holds a run of another config: {difference}; give another --workdir "
                "(or --fresh to set the old one aside)"
            )
        if manifest_file.exists():
            manifest |= records.read_json(manifest_file)
    records.write_atomic(config_file, text + "\n")
    start, before = time.monotonic(), float(manifest["wall_s"])
    try:
        yield manifest
    except BaseException as e:
        manifest["status"] = {Preempted: "preempted", AllSeedsDiverged: "diverged"}.get(
            type(e), "failed"
        )
        raise
    finally:
        manifest["wall_s"] = round(before + time.monotonic() - start, 3)
        with contextlib.suppress(UserError):  # a full disk was reported already
            records.write_json(manifest_file, manifest)


def _run(
    p: Plan,
    manifest: dict[str, Any],
    console: Console,
    stop: Stop,
    device: str,
    deterministic: bool,
    command: str,
) -> Result:
    from qlab.lab import device as devices

    console.say(f"{p.label}  config {p.config_hash}  {p.workdir}")
    devices.set_flags(deterministic, p.workdir / "autotune.txt" if deterministic else None)
    with console.waiting("importing JAX"):
        importlib.import_module("jax")
    with devices.session(device, bool(p.config.get("x64", False))) as device_name:
        stop.check()
        with console.waiting("importing the experiment"):
            module = registry.experiment(p.config.experiment, p.loaded.path)
        return _run_arms(p, module, manifest, console, stop, device_name, deterministic, command)


def _run_arms(
    p: Plan,
    module: ModuleType,
    manifest: dict[str, Any],
    console: Console,
    stop: Stop,
    device_name: str,
    deterministic: bool,
    command: str,
) -> Result:
    from qlab.lab import arm as arms
    from qlab.lab import device as devices
    from qlab.lab.experiment import Metric

    metrics = {k: Metric(*v) for k, v in getattr(module, "METRICS", {}).items()}
    claims = tuple(getattr(module, "CLAIMS", ()))
    commit = records.commit()
    command = command or shlex.join(["python", "-m", "qlab.run", "--config", str(p.loaded.path)])
    manifest |= {
        "schema": SCHEMA,
        "paper": p.loaded.paper,
        "variant": p.loaded.variant,
        "title": configs.title(p.loaded.path),
        "arms": list(p.config.arms),
        "seeds": p.config.seeds,
        "seed": p.config.seed,
        "config_hash": p.config_hash,
        "config": {"max_fallback_share": p.config.max_fallback_share},
        "commit": commit,
        "versions": devices.versions(),
        "device": device_name,
        # XLA on a CPU splits reductions over its threads: equal bits need an equal number of cores.
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "deterministic": deterministic,
        "started": manifest.get("started") or _now(),
        "command": command,
        "status": "running",
        "claims": [c._asdict() for c in claims],
        "figures": [f._asdict() for f in getattr(module, "FIGURES", ())],
        "metrics": {k: m._asdict() for k, m in metrics.items()},
    }
    records.write_atomic(p.workdir / "command.txt", command + "\n")
    records.write_json(p.workdir / "manifest.json", manifest)
    columns = {
        "paper": p.loaded.paper,
        "variant": p.loaded.variant,
        "split": str(p.config.get("split", "test")),
        "device": device_name,
        "deterministic": deterministic,
        "config_hash": p.config_hash,
        "commit": commit,
        "claim": "",
        "claim_ref": "",
    }
    lost = []
    for i, name in enumerate(p.arms):
        label = f"[{i + 1}/{len(p.arms)}] {name}"
        context = arms.Context(p.workdir, p.config_hash, columns, metrics, console, stop, label)
        manifest["arm_status"][name] = "running"
        try:
            outcome = arms.run_arm(module.build, configs.arm_config(p.config, name), context)
        except Preempted:
            manifest["arm_status"][name] = "preempted"
            raise
        except BaseException:
            manifest["arm_status"][name] = "failed"
            raise
        manifest["arm_status"][name] = "done"
        manifest["diverged"].pop(name, None)
        if outcome.diverged:
            manifest["diverged"][name] = outcome.diverged
        if len(outcome.diverged) == p.config.seeds:
            lost.append(f"{name} (last at step {max(outcome.diverged.values())})")
        records.write_json(p.workdir / "manifest.json", manifest)
    done = all(manifest["arm_status"].get(a) == "done" for a in p.config.arms)
    manifest["status"] = "diverged" if lost else ("done" if done else "partial")
    result = finish(p.workdir, claims, manifest, console)
    if lost:
        raise AllSeedsDiverged(
            f"all seeds became non-finite in arm {', '.join(lost)}; lower its learning rate or look at "
            f"{p.workdir}/<arm>/metrics.jsonl"
        )
    return result


def finish(
    workdir: Path, claims: Sequence[Any], manifest: dict[str, Any], console: Console
) -> Result:
    """results.jsonl of all finished arms, claims.json, report.html, and the printed tables."""
    from qlab.lab import claims as claim_table
    from qlab.lab import tables

    rows = []
    for name in manifest["arms"]:
        if (workdir / name / "done.json").is_file():
            rows += records.read_jsonl(workdir / name / "results.jsonl")
    verdicts = claim_table.check(claims, rows, manifest)
    for row in rows:
        about = [c for c in verdicts if _concerns(c, row)]
        row["claim"] = "; ".join(c.text for c in about)
        row["claim_ref"] = "; ".join(c.source for c in about)
    records.write_atomic(workdir / "results.jsonl", "".join(records.dumps(r) + "\n" for r in rows))
    records.write_json(workdir / "claims.json", [v._asdict() for v in verdicts])
    records.write_json(workdir / "manifest.json", manifest)
    page = _draw(workdir, console)
    if not console.quiet:
        tables.print_results(rows, manifest["metrics"])
        tables.print_claims(verdicts)
        print(f"\npage: {page}", flush=True)
    return Result(workdir, page, rows, verdicts)


def _draw(workdir: Path, console: Console) -> Path:
    """report.html. The numbers are on disk already, so a page that cannot be drawn is only said."""
    try:
        from qlab.lab import pages

        return pages.write_page(workdir)
    except UserError:
        raise
    except Exception as e:
        console.say(
            f"the page could not be drawn ({type(e).__name__}: {e}); python -m qlab.report {workdir} tries again"
        )
        return workdir / "report.html"


def _concerns(claim: Any, row: Mapping[str, Any]) -> bool:
    key = f"{row['task']}/{row['metric']}" if row["task"] else row["metric"]
    sides = [claim.left] + ([claim.right] if isinstance(claim.right, tuple) else [])
    return any(key == k and row["arm"] in ((a,) if isinstance(a, str) else a) for a, k in sides)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def one_line(error: BaseException) -> str:
    """An error as the single line a person reads."""
    return " ".join(str(error).split())


def exit_code(error: BaseException) -> int:
    """Prints the one line of a UserError or Preempted to stderr and gives its exit code."""
    if isinstance(error, Preempted):
        print(f"stopped by {error}; everything is saved, the same command resumes", file=sys.stderr)
        return Preempted.code
    assert isinstance(error, UserError)
    print(f"error: {one_line(error)}", file=sys.stderr)
    return error.code
