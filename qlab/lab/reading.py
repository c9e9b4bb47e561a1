"""Reads run folders for the report: finished, half done or damaged. Imports no JAX.

What cannot be read is left out and said in `problems`; only a folder without a readable manifest is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlab.lab import claims, stats
from qlab.lab.errors import UserError

_ROW = {"arm": str, "metric": str}  # what a result row cannot do without


class Run(NamedTuple):
    """One run folder.

    Attributes:
      curves: arm -> rows of its metrics.jsonl. arrays: arm -> name -> f[S, ...].
      verdicts: claims.json, or checked now where it is absent.
      problems: what could not be read, a line each.
    """

    path: Path
    command: str
    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    curves: dict[str, list[dict[str, Any]]]
    arrays: dict[str, dict[str, np.ndarray]]
    verdicts: list[dict[str, Any]]
    problems: list[str]

    @property
    def arms(self) -> list[str]:
        declared = [str(a) for a in self.manifest.get("arms") or ()]
        return declared or list(dict.fromkeys(str(r["arm"]) for r in self.rows))

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.get("metrics") or {}

    @property
    def diverged(self) -> dict[str, dict[Any, Any]]:
        return self.manifest.get("diverged") or {}

    @property
    def cells(self) -> stats.Cells:
        return stats.collect(self.rows, self.diverged)

    @property
    def name(self) -> str:
        variant = self.manifest.get("variant")
        return f"{self.manifest.get('paper', self.path.name)}{':' + variant if variant else ''}"


class Sweep(NamedTuple):
    """A sweep folder: sweep.json, and the runs of its trials that could be read."""

    path: Path
    record: dict[str, Any]
    runs: dict[str, Run]  # trial id -> run
    problems: list[str]


def load(workdir: Path | str) -> Run:
    """Reads a run folder.

    Raises:
      UserError: there is no folder, or no manifest.json that can be read.
    """
    path = Path(workdir)
    manifest = _manifest(path)
    problems: list[str] = []
    config = _json(path / "config.json", {}, dict, problems)
    arms = [str(a) for a in manifest.get("arms") or ()]
    folders = [a for a in arms if _inside(path, a)]
    rows = _rows(path / "results.jsonl", problems)
    if not rows:  # a run that has not come to its end: each finished arm has its own
        rows = [row for arm in folders for row in _rows(path / arm / "results.jsonl", problems)]
    run = Run(
        path=path,
        command=_text(path / "command.txt", str(manifest.get("command", "")), problems),
        manifest=manifest,
        config=config,
        rows=rows,
        curves={arm: _curve(path / arm / "metrics.jsonl", problems) for arm in folders},
        arrays={arm: _arrays(path / arm / "arrays.npz", problems) for arm in folders},
        verdicts=[],
        problems=problems,
    )
    verdicts = _json(path / "claims.json", None, list, problems, optional=True)
    if verdicts is None or not all(isinstance(v, Mapping) and "verdict" in v for v in verdicts):
        share = float(config.get("max_fallback_share", 0.2))
        checked = claims.check(
            manifest.get("claims") or (), rows, manifest, max_fallback_share=share
        )
        verdicts = [v._asdict() for v in checked]
        if verdicts:
            problems.append(
                "claims.json is absent or damaged: the claims were checked on what is here"
            )
    return run._replace(verdicts=verdicts)


def find_runs(folder: Path | str) -> list[Path]:
    """Run folders at or below a folder, in order of their paths; not inside another run."""
    root = Path(folder)
    if (root / "manifest.json").is_file():
        return [root]
    return sorted(p.parent for p in root.rglob("manifest.json") if "checkpoints" not in p.parts)


def find_sweeps(folder: Path | str) -> list[Path]:
    return sorted(p.parent for p in Path(folder).rglob("sweep.json"))


def load_sweep(folder: Path | str, known: Iterable[Run] = ()) -> Sweep:
    """Reads sweep.json and the run of each trial.

    Raises:
      UserError: sweep.json is absent or damaged.
    """
    path = Path(folder)
    problems: list[str] = []
    record = _json(path / "sweep.json", None, dict, problems)
    if record is None:
        raise UserError(problems[0])
    loaded = {run.path.resolve(): run for run in known}
    runs = {}
    for i, trial in enumerate(record.get("trials") or ()):
        trial_id = str(trial.get("id", i))
        place = _workdir(path, str(trial.get("workdir", "")), trial_id)
        if place is None:
            continue
        try:
            runs[trial_id] = loaded.get(place.resolve()) or load(place)
        except UserError as e:
            problems.append(f"trial {trial_id}: {e}")
    return Sweep(path, record, runs, problems)


def _workdir(sweep: Path, given: str, trial_id: str) -> Path | None:
    """A trial's folder as recorded, else under the sweep folder (which may have been moved)."""
    places = (Path(given), sweep / given, sweep / Path(given).name, sweep / trial_id)
    return next((p for p in places if (p / "manifest.json").is_file()), None)


def _inside(path: Path, arm: str) -> bool:
    """Arm names come from a file: they may not lead out of the run folder."""
    return arm not in ("", ".", "..") and "\0" not in arm and (path / arm).parent == path


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder or a folder that holds some")
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(
            f"{path} has no manifest.json; give a run folder or a folder that holds some"
        )
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, OSError) as e:
        raise UserError(
            f"{file} is damaged ({e}); run the command of {path / 'command.txt'} again"
        ) from None
    if not isinstance(manifest, dict):
        raise UserError(
            f"{file} is not a JSON object; run the command of {path / 'command.txt'} again"
        )
    return manifest


def _text(file: Path, default: str, problems: list[str]) -> str:
    try:
        return file.read_text(errors="replace").strip() or default
    except OSError:
        problems.append(f"{file.name} is absent")
        return default


def _json(
    file: Path, default: Any, kind: type, problems: list[str], *, optional: bool = False
) -> Any:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        if not optional:
            problems.append(f"{file} is absent")
        return default
    except (ValueError, OSError) as e:
        problems.append(f"{file} is damaged ({e})")
        return default
    if not isinstance(value, kind):
        problems.append(f"{file} is damaged (not a JSON {kind.__name__})")
        return default
    return value


def _jsonl(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; lines that cannot be parsed are counted and left out."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows, skipped = [], []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            skipped.append(i)
    if skipped:
        which = "its cut last line" if skipped == [len(lines)] else f"{len(skipped)} damaged lines"
        problems.append(f"{file.relative_to(file.parents[1])}: {which} left out")
    return rows


def _rows(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    rows = _jsonl(file, problems)
    good = [r for r in rows if all(isinstance(r.get(k), t) for k, t in _ROW.items())]
    if len(good) < len(rows):
        problems.append(
            f"{file.name}: {len(rows) - len(good)} rows without arm and metric left out"
        )
    return good


def _curve(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    return [r for r in _jsonl(file, problems) if isinstance(r.get("metrics"), dict) and "step" in r]


def _arrays(file: Path, problems: list[str]) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:  # zipfile, zlib and NumPy each raise their own on a cut file
        problems.append(
            f"{file.relative_to(file.parents[1])} is damaged ({e}): its figures are left out"
        )
        return {}
