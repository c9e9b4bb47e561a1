"""Configs: a Python file with `get_config(variant) -> ConfigDict` and, where it sweeps, `sweep()`.

Life of a config: load by path or name -> overrides -> freeze -> canonical JSON -> hash.
Imports no JAX, so that `--help` and `--list` are quick.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict

from qlab.lab.errors import UserError, nearest

# A ConfigDict; its attributes can be anything, which the library's own types do not let one say.
Config: TypeAlias = Any

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
# What may change without making another study of it: these keys stay out of the hash.
UNHASHED = ("checkpoint_every_s", "keep_checkpoints")


class _InOrder(ConfigDict):
    """Keeps the order in which a group was written: arms are shown baselines first."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(
            key, ConfigDict(value, sort_keys=False) if isinstance(value, dict) else value
        )

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(
            key, ConfigDict(value, sort_keys=False) if isinstance(value, dict) else value
        )


def base(experiment: str, **values: Any) -> Config:
    """The keys every config has, with their defaults; `values` replaces or adds to them.

    Args:
      experiment: name of the module in experiments/ that builds the arms.
      **values: further keys; a dict becomes a nested ConfigDict.
    """
    c: Config = _InOrder(sort_keys=False)
    c.experiment = experiment
    c.seed = 0  # root of all keys; seed i of a study uses fold_in(key(seed), i)
    c.seeds = 3  # how many
    c.arms = ConfigDict(sort_keys=False)  # name -> overrides of this config for that arm
    c.log_points = 100  # points of a learning curve per phase
    c.checkpoint_every_s = 30.0
    c.keep_checkpoints = 2
    c.max_fallback_share = 0.2  # more than this share of sites fallen back: INCONCLUSIVE
    for name, value in values.items():
        c[name] = value
    return c


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations of the axes, as override dicts.

    >>> list(grid({"bits": (2, 3), "optimizer.lr": (0.1,)}))
    [{'bits': 2, 'optimizer.lr': 0.1}, {'bits': 3, 'optimizer.lr': 0.1}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes.keys(), values, strict=True))


class Loaded(NamedTuple):
    """A config file after `load`: the config, its module, where it came from, and the variant."""

    config: Config
    module: ModuleType
    path: Path
    variant: str

    @property
    def paper(self) -> str:
        return self.path.stem


def config_files() -> dict[str, Path]:
    """name -> file of every config that can be named: ./configs first, then the packaged ones."""
    files: dict[str, Path] = {}
    for folder in (CONFIG_DIR, Path("configs")):
        files |= {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}
    return dict(sorted(files.items()))


def find(name: str) -> Path:
    """The config file for a path, or for a name in ./configs or among the packaged ones.

    Raises:
      UserError: there is no such file; the nearest name is given.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    files = config_files()
    if path.stem in files and (path.suffix in ("", ".py")) and path.parent.name in ("", "configs"):
        return files[path.stem].resolve()
    raise UserError(
        f"no config {name!r}: not a file and not a known paper{nearest(path.stem, list(files))}"
    )


def load(spec: str) -> Loaded:
    """Loads `path-or-name[:variant]`, for example "configs/flexround.py:smoke" or "q_star".

    Raises:
      UserError: unknown paper or variant, or the file cannot be run.
    """
    name, _, variant = spec.partition(":")
    path = find(name)
    module_spec = importlib.util.spec_from_file_location(f"qlab_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:  # whatever a user's file raises, they get one line with the place
        raise UserError(
            f"cannot read config {path}{_line_of(e, path)}: {type(e).__name__}: {e}"
        ) from e
    if not hasattr(module, "get_config"):
        raise UserError(
            f"config {path} has no get_config(variant); see CONTRIBUTING.md, 'Adding a paper'"
        )
    variants = getattr(module, "VARIANTS", ("", "smoke", "full"))
    if variant not in variants:
        named = [v for v in variants if v]
        raise UserError(f"{path.name} has no variant {variant!r}{nearest(variant, named)}")
    try:
        config = module.get_config(variant)
    except Exception as e:
        raise UserError(
            f"get_config({variant!r}) of {path}{_line_of(e, path)} failed: {type(e).__name__}: {e}"
        ) from e
    if not isinstance(config, ConfigDict) or "experiment" not in config:
        raise UserError(
            f"get_config of {path} must return base(experiment=..., ...) of qlab.lab.config"
        )
    return Loaded(config, module, path, variant)


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" line {error.lineno}"
    tb, line = error.__traceback__, 0
    while tb:
        if Path(tb.tb_frame.f_code.co_filename) == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return f" line {line}" if line else ""


def title(path: Path) -> str:
    """First line of a config's docstring, without running the file."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_text()))
    except (OSError, SyntaxError, ValueError):
        return "(cannot be read)"
    return (doc or "(no docstring)").strip().splitlines()[0]


def keys(config: Config, prefix: str = "") -> list[str]:
    """All dotted keys of a config, inner nodes included."""
    out = []
    for name in config:
        value = config[name]
        out.append(prefix + name)
        if isinstance(value, ConfigDict):
            out += keys(value, f"{prefix}{name}.")
    return out


def override(config: Config, key: str, value: Any) -> None:
    """Sets config.<key>; a string is parsed as the type that stands there now.

    Raises:
      UserError: unknown key (the nearest is named), or a value of another type.
    """
    *groups, name = key.split(".")
    node: Any = config
    for part in groups:
        node = _child(node, part, key, config)
    old = _child(node, name, key, config)
    if isinstance(old, ConfigDict):
        raise UserError(
            f"config key {key!r} is a group; set one of {', '.join(f'{key}.{k}' for k in old)}"
        )
    with node.ignore_type():
        node[name] = _parse(key, value, old)


def _child(node: Any, name: str, key: str, config: Config) -> Any:
    if not isinstance(node, ConfigDict) or name not in node:
        raise UserError(f"unknown config key {key!r}{nearest(key, keys(config))}")
    return node[name]


def _parse(key: str, value: Any, old: Any) -> Any:
    if isinstance(value, str) and not isinstance(old, str):
        text = value.strip()
        if isinstance(old, tuple | list) and text[:1] not in "([":
            text = f"({text},)"
        if isinstance(old, float) and text.lower() in ("inf", "-inf"):
            return float(text)
        if isinstance(old, bool):
            text = {"true": "True", "false": "False"}.get(text.lower(), text)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if old is not None:
                raise UserError(
                    f"config key {key!r} wants {type(old).__name__} (now {old!r}), got {value!r}"
                ) from None
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, tuple) and isinstance(value, tuple) and old and value:
        value = tuple(_parse(key, v, old[0]) for v in value)
    if old is not None and value is not None and type(value) is not type(old):
        raise UserError(
            f"config key {key!r} wants {type(old).__name__} (now {old!r}), got {value!r}"
        )
    return value


def arm_config(config: Config, arm: str) -> Config:
    """The config of one arm: `config` with config.arms[arm] laid over it, and `arm` = its name.

    Raises:
      UserError: no such arm, or the arm sets a key the config does not have.
    """
    if arm not in config.arms:
        raise UserError(f"unknown arm {arm!r}{nearest(arm, list(config.arms))}")
    merged: Config = ConfigDict(config.to_dict())
    for key, value in _leaves(config.arms[arm]):
        override(merged, key, value)
    merged.arm = arm
    merged.lock()
    return merged


def _leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def canonical(config: Config) -> str:
    """Canonical JSON of a config: sorted keys, tuples as lists."""
    return json.dumps(config.to_dict(), sort_keys=True, indent=1, default=list)


def config_hash(config: Config) -> str:
    """12 hex digits of the sha256 of the canonical config, less the keys that change no number."""
    d = {k: v for k, v in config.to_dict().items() if k not in UNHASHED}
    return hashlib.sha256(json.dumps(d, sort_keys=True, default=list).encode()).hexdigest()[:12]


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first key in which two canonical configs differ: "bits was 3, now 4"; "" if none does."""
    for name in sorted({*old, *new}):
        key, a, b = prefix + name, old.get(name, "(absent)"), new.get(name, "(absent)")
        if not prefix and name in UNHASHED:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := first_difference(a, b, f"{key}."):
                return inner
        elif a != b:
            return f"{key} was {a!r}, now {b!r}"
    return ""
