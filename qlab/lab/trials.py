"""The trials of a sweep before it runs, and sweep.json, its record. Imports no JAX.

<sweep>/sweep.json  report.html  lock  logs/<trial>.txt
<sweep>/<trial>/    a run folder, see qlab.lab.records
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qlab.lab import config as configs
from qlab.lab import launch, records, study
from qlab.lab.errors import UserError

SCHEMA = 1
MAX_NAME = 100  # characters of a trial's folder name before the hash
_STATUS = {"started": "running", "retry": "pending", "resume": "pending", "stopped": "preempted"}


class Trial(NamedTuple):
    """overrides: what this trial sets beyond the base config. id: its name and its folder's."""

    id: str
    overrides: dict[str, Any]
    spec: launch.RunSpec
    config_hash: str


class Plan(NamedTuple):
    """A sweep before anything runs; all trials have been checked.

    Attributes:
      base: the study without the axes. axes: {key: values}. notes: what a person should know.
      command: that gives this sweep, for when it is called from Python.
    """

    base: study.Plan
    config: str
    explain: bool
    axes: dict[str, list[Any]]
    trials: tuple[Trial, ...]
    workdir: Path
    notes: tuple[str, ...]
    command: str


def plan(
    config: str,
    *,
    grid: Mapping[str, Sequence[Any] | str] | None = None,
    explain: bool = False,
    overrides: Mapping[str, Any] | None = None,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    workdir: str | Path | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """Works out the trials; see qlab.sweep.sweep for the arguments.

    Args:
      grid: values of an axis may be one string, as on the command line: {"bits": "2,3"}.
      options: further words for each trial's command.
    Raises:
      UserError: unknown key or arm, ill-typed value, nothing to sweep. Nothing has been written.
    """
    base = study.plan(config, overrides=overrides, arms=arms, seeds=seeds)
    overrides = dict(overrides or {})
    if explain and grid:
        raise UserError("--explain flips switches one at a time; give either --explain or --grid")
    taken = {*overrides, *(["seeds"] if seeds is not None else [])} if not explain else set()
    choices = _choices(base, grid, explain)
    axes = _axes(choices)
    for key in axes:
        if key in taken:
            raise UserError(
                f"{key} is an axis of the sweep and is also set for all trials; drop one"
            )
    notes = [note for key in axes if (note := _hidden(base, key))]
    digest = [base.config_hash, choices, explain]
    word = "explain" if explain else "sweep"
    variant = f"-{base.loaded.variant}" if base.loaded.variant else ""
    name = f"{base.loaded.paper}{variant}-{word}-{_hash8(digest)}"
    folder = Path(workdir) if workdir else Path("runs") / name
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds a single run; give another --workdir")

    fixed = {key: _leaf(base.config, key) for key in overrides}
    all_keys = configs.keys(base.config)
    trials: dict[str, Trial] = {}
    for choice in choices:
        spec = launch.RunSpec(
            config, {**fixed, **choice}, tuple(arms or ()), seeds, folder, tuple(options)
        )
        found = launch.plan(spec)
        typed = study.plan(config, overrides=spec.overrides, arms=arms, seeds=seeds)
        if found.config_hash != typed.config_hash:
            raise UserError(
                f"{shown(choice)} cannot be written on a command line; rename the value"
            )
        id = trial_name(choice, all_keys, found.config_hash)
        spec = spec._replace(workdir=folder / id)
        trials.setdefault(found.config_hash, Trial(id, choice, spec, found.config_hash))
    if len(trials) < len(choices):
        notes.append(f"{len(choices) - len(trials)} trials repeat another and are left out")
    words = ["--config", config, *(["--explain"] if explain else [])]
    for key, values in axes.items() if grid else ():
        words += ["--grid", f"{key}={_axis_text(values)}"]
    words += launch.words(
        launch.RunSpec(config, fixed, tuple(arms or ()), seeds, Path(), (*options,))
    )[2:-2]
    words += ["--workdir", str(workdir)] if workdir else []
    command = shlex.join(["python", "-m", "qlab.sweep", *words])
    return Plan(base, config, explain, axes, tuple(trials.values()), folder, tuple(notes), command)


def _choices(
    base: study.Plan, grid: Mapping[str, Sequence[Any] | str] | None, explain: bool
) -> list[dict[str, Any]]:
    """The overrides of each trial, typed as the config is."""
    module, path = base.loaded.module, base.loaded.path
    if explain:
        switches = getattr(module, "CONVENTIONS", None)
        if not switches:
            raise UserError(
                f"{path} names no CONVENTIONS, so there is nothing to explain; add "
                'CONVENTIONS = {"rounding": ("floor",)}: a config key and its other values'
            )
        flips = [{}]
        for key, values in switches.items():
            if not isinstance(values, list | tuple):
                raise UserError(
                    f"CONVENTIONS[{key!r}] of {path} wants a tuple of values, is {values!r}"
                )
            now = _now(base.config, key)
            flips += [{key: v} for v in (_typed(base.config, key, v) for v in values) if v != now]
        return flips
    if grid:
        return list(configs.grid({k: _values(base.config, k, v) for k, v in grid.items()}))
    if not hasattr(module, "sweep"):
        raise UserError(f"{path} has no sweep(), so name the axes: --grid KEY=V1,V2")
    try:
        given = list(module.sweep())
    except Exception as e:
        raise UserError(f"sweep() of {path} failed: {type(e).__name__}: {e}") from e
    if not given or not all(isinstance(choice, Mapping) for choice in given):
        raise UserError(f"sweep() of {path} must yield override dicts; see qlab.lab.config.grid")
    return [{k: _typed(base.config, k, v) for k, v in choice.items()} for choice in given]


def split_axes(texts: Sequence[str]) -> dict[str, str]:
    """["bits=2,3"] as {"bits": "2,3"}.

    Raises:
      UserError: a word without "=", no values, or a key twice.
    """
    axes: dict[str, str] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if not key or not values.strip():
            raise UserError(f"--grid {text!r}: write KEY=V1,V2")
        if key in axes:
            raise UserError(f"--grid {key} is given twice; write {key}={axes[key]},{values}")
        axes[key] = values
    return axes


def split_values(text: str, is_tuple: bool = False) -> list[str]:
    """The values of an axis: between semicolons if there are any, else between commas; not in brackets.

    >>> split_values("2, 3"), split_values("(1,2),(3,4)", True), split_values("1,2;3,4", True)
    (['2', '3'], ['(1,2)', '(3,4)'], ['1,2', '3,4'])
    """
    depth, cuts = 0, {",": [-1], ";": [-1]}
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if c in cuts and depth == 0:
            cuts[c].append(i)
    at = cuts[";"] if len(cuts[";"]) > 1 else cuts[","]
    if is_tuple and at is cuts[","] and text.strip()[:1] not in "([":
        raise UserError(
            f"a tuple goes in brackets, or tuples between semicolons: ({text}) or {text};..."
        )
    parts = [text[a + 1 : b].strip() for a, b in zip(at, [*at[1:], len(text)], strict=True)]
    return parts[:-1] if parts[-1] == "" and len(parts) > 1 else parts


def _values(config: ConfigDict, key: str, values: Sequence[Any] | str) -> list[Any]:
    if isinstance(values, str):
        values = split_values(values, isinstance(_now(config, key), list | tuple))
    try:
        listed: list[Any] = list(values)
    except TypeError:
        raise UserError(f"axis {key} wants a sequence of values, is {values!r}") from None
    if not listed:
        raise UserError(f"axis {key} has no values")
    plain = (v.item() if hasattr(v, "item") else v for v in listed)  # NumPy's numbers too
    return _unique(_typed(config, key, v) for v in plain)


def _unique(values: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    for value in values:
        if value not in out:
            out.append(value)
    return out


def _typed(config: ConfigDict, key: str, value: Any) -> Any:
    """The value as the key's type. Raises UserError: unknown key (the nearest is named), other type."""
    scratch = ConfigDict(config.to_dict())
    configs.override(scratch, key, value)
    return _leaf(scratch, key)


def _now(config: ConfigDict, key: str) -> Any:
    """What the key is now. Raises UserError as an override of it would."""
    _typed(config, key, None)  # any key takes None
    return _leaf(config, key)


def _leaf(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _axes(choices: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for choice in choices for key in choice)
    return {key: _unique(c[key] for c in choices if key in c) for key in keys}


def _axis_text(values: Sequence[Any]) -> str:
    texts = [launch.text(v) for v in values]
    if all(isinstance(v, str) for v in values) and any("," in t for t in texts):
        return ";".join(texts) + ";"
    return ",".join(texts)


def _hidden(base: study.Plan, key: str) -> str:
    """A note if some arms set the key themselves.

    Raises:
      UserError: all arms do, so that the axis would change nothing.
    """
    arms = [a for a in base.arms if key in configs.keys(_leaf(base.config, f"arms.{a}"))]
    if arms and len(arms) == len(base.arms):
        raise UserError(
            f"every arm sets {key} itself, so an axis of it changes nothing; sweep arms.{arms[0]}.{key}"
        )
    return f"{key} does not change in arm {', '.join(arms)}, which sets it itself" if arms else ""


def trial_name(overrides: Mapping[str, Any], all_keys: Sequence[str], config_hash: str) -> str:
    """A folder name: the overrides for people, the hash of the whole config for certainty.

    A key goes by its last part where no other key of the config ends in it; of a long tuple only the
    ends are shown.

    >>> trial_name({"bits": 2, "optimizer.lr": 1e-3}, ["bits", "optimizer", "optimizer.lr"], "0f1e2d3c4b5a")
    'bits=2,lr=0.001-0f1e2d3c'
    """
    ends = Counter(key.rsplit(".", 1)[-1] for key in all_keys)
    parts = []
    for key, value in overrides.items():
        last = key.rsplit(".", 1)[-1]
        if isinstance(value, list | tuple) and len(value) > 4:
            value = (value[0], "..", value[-1])
        parts.append(f"{last if ends[last] < 2 else key}={_show(value, 'x')}")
    name = re.sub(r"[^\w.+=,-]+", "_", ",".join(parts))[:MAX_NAME] or "base"
    return f"{name}-{config_hash[:8]}"


def shown(overrides: Mapping[str, Any]) -> str:
    """
    >>> shown({"bits": 2, "optimizer.lr": 1e-3}), shown({})
    ('bits=2, optimizer.lr=0.001', 'as it stands')
    """
    return ", ".join(f"{k}={_show(v)}" for k, v in overrides.items()) or "as it stands"


def _show(value: Any, between: str = ",") -> str:
    if isinstance(value, list | tuple):
        return between.join(_show(v, between) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hash8(value: Any) -> str:
    return hashlib.sha256(records.dumps(value).encode()).hexdigest()[:8]


class Book:
    """sweep.json: what each trial came to. Earlier trials of the same base stay in it."""

    def __init__(self, p: Plan, command: str):
        self._file = p.workdir / "sweep.json"
        earlier = _earlier(self._file, p)
        before = {t["id"]: t for t in earlier.get("trials", ())}
        self._trials = {t.id: _record(t, p.workdir, before.get(t.id, {})) for t in p.trials}
        self._trials |= {id: t for id, t in before.items() if id not in self._trials}
        axes: dict[str, list[Any]] = json.loads(records.dumps(p.axes))  # tuples as lists
        for key, values in earlier.get("axes", {}).items():
            axes[key] = _unique([*axes.get(key, ()), *values])
        self._head = {
            "schema": SCHEMA,
            "paper": p.base.loaded.paper,
            "title": configs.title(p.base.loaded.path),
            "config": p.config.partition(":")[0],
            "variant": p.base.loaded.variant,
            "command": command,
            "config_hash": p.base.config_hash,
            "arms": list(p.base.arms),
            "seeds": p.base.config.seeds,
            "axes": axes,
            "explain": p.explain,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def __getitem__(self, id: str) -> dict[str, Any]:
        return self._trials[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trials)

    def note(self, event: launch.Event) -> None:
        """Enters an event and saves."""
        trial = self._trials[event.id]
        trial["status"] = _STATUS.get(event.kind, event.kind)
        if event.outcome is None:
            trial["attempts"] += 1
        else:
            trial["wall_s"] = round(trial["wall_s"] + event.outcome.wall_s, 3)
            trial["reason"] = event.outcome.reason
        self.save("running")

    def save(self, status: str) -> None:
        head = {**self._head, "status": status}
        records.write_json(self._file, {**head, "trials": list(self._trials.values())})


def _record(t: Trial, folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": t.id,
        "overrides": t.overrides,
        "workdir": str(t.spec.workdir),
        "status": "done" if launch.is_done(t.spec) else "pending",
        "reason": "",
        "command": launch.command(t.spec),
        "attempts": before.get("attempts", 0),
        "wall_s": before.get("wall_s", 0.0),
        "config_hash": t.config_hash,
        "log": str(folder / "logs" / f"{t.id}.txt"),
    }


def _earlier(file: Path, p: Plan) -> dict[str, Any]:
    """The sweep.json there is; {} if there is none or it is damaged (the runs tell all it said).

    Raises:
      UserError: it is of another study.
    """
    try:
        found = records.read_json(file)
        whose = (found["config_hash"], found["explain"])
        assert all(isinstance(t, dict) and isinstance(t["id"], str) for t in found["trials"])
        assert isinstance(found.get("axes", {}), dict)
    except (UserError, KeyError, TypeError, AssertionError):
        return {}
    if whose != (p.base.config_hash, p.explain):
        raise UserError(f"{file.parent} holds a sweep of another config; give another --workdir")
    return found
