"""Finds an experiment by name, so that the runner knows no paper."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from qlab.lab.errors import UserError, nearest

EXPERIMENT_DIR = Path(__file__).resolve().parent.parent / "experiments"


def names() -> list[str]:
    """All packaged experiments."""
    return sorted(p.stem for p in EXPERIMENT_DIR.glob("*.py") if not p.stem.startswith("_"))


def experiment(name: str, config_path: Path | None = None) -> ModuleType:
    """The module with `build(config)`.

    Args:
      name: a packaged experiment ("flexround"), a file relative to the config ("./mine.py"), or an
        importable module with a dot in its name ("my_package.mine").
      config_path: the config file that names it.
    Raises:
      UserError: nothing of that name, or it has no build().
    """
    if name.endswith(".py"):
        path = ((config_path.parent if config_path else Path.cwd()) / name).resolve()
        if not path.is_file():
            raise UserError(f"experiment file {path} does not exist (named by {config_path})")
        spec = importlib.util.spec_from_file_location(f"qlab_experiment_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = (
            module  # so that NamedTuples defined there can be pickled and typed
        )
        spec.loader.exec_module(module)
    elif "." in name:
        module = importlib.import_module(name)
    elif name in names():
        module = importlib.import_module(f"qlab.experiments.{name}")
    else:
        raise UserError(f"unknown experiment {name!r}{nearest(name, names())}")
    if not hasattr(module, "build"):
        raise UserError(f"experiment {name!r} has no build(config); see qlab.lab.experiment")
    return module
