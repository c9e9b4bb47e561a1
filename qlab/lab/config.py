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
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qlab.lab.errors import UserError, nearest

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
# What may change without making another study of it: these keys stay out of the hash.
UNHASHED = ("checkpoint_every_s", "keep_checkpoints", "log_points", "seeds")


def base(experiment: str, **values: Any) -> ConfigDict:
    """The keys every config has, with their defaults; `values` replaces or adds to them.

    Args:
      experiment: name of the module in experiments/ that builds the arms.
      **values: further keys; a dict becomes a nested ConfigDict.
    """
    c = ConfigDict()
    c.experiment = experiment
    c.seed = 0  # root of all keys; seed i of a study uses fold_in(key(seed), i)
    c.seeds = 3  # how many
    c.arms = ConfigDict()  # name -> overrides of this config for that arm
    c.log_points = 100  # points of a learning curve per phase
    c.checkpoint_every_s = 30.0
    c.keep_checkpoints = 2
    c.max_fallback_share = 0.2  # more than this share of sites fallen back: INCONCLUSIVE
    for name, value in values.items():
        c[name] = ConfigDict(value) if isinstance(value, dict) else value
    return c


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations of the axes, as override dicts.

    >>> list(grid({"bits": (2, 3), "optimizer.lr": (0.1,)}))
    [{'bits': 2, 'optimizer.lr': 0.1}, {'bits': 3, 'optimizer.lr': 0.1}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes.keys(), values, strict=True))
