"""Block sizes by device, shape bucket and dtypes, from an operation's tuned.json.

The table is a list of records {impl, device, bucket, dtypes, options, blocks, us, date, versions}, written by
`python -m qlab.bench kernels --tune`. A miss means the kernel's own stated heuristic, never a timing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlab.kernels.common.dispatch import Spec

ROOT = Path(__file__).resolve().parents[1]


def bucket(dims: dict[str, int]) -> dict[str, int]:
    """Each size rounded up to a power of two: shapes of one bucket share their blocks.

    >>> bucket({"m": 3, "k": 4096, "n": 4097})
    {'m': 4, 'k': 4096, 'n': 8192}
    """
    return {name: 1 << math.ceil(math.log2(n)) if n > 0 else 0 for name, n in dims.items()}


def path(op: str) -> Path:
    return ROOT / op / "tuned.json"


@functools.cache
def table(op: str) -> list[dict[str, Any]]:
    """The records of an operation; empty without a file."""
    file = path(op)
    return json.loads(file.read_text()) if file.is_file() else []


def lookup(spec: Spec, impl: str) -> dict[str, Any] | None:
    """The record tuned for this device, bucket, dtypes and options; None if there is none."""
    want = (impl, spec.device, bucket(spec.dims), spec.dtypes, spec.options)
    for r in table(spec.op):
        if (r["impl"], r["device"], r["bucket"], r["dtypes"], r["options"]) == want:
            return r
    return None


_trial: dict[str, Any] = {}  # of a `trial` under way: "blocks" to take, "default" seen


@contextlib.contextmanager
def trial(blocks: dict[str, int]) -> Iterator[dict[str, Any]]:
    """While tuning: kernels traced inside take these blocks; yields {"default": their heuristic's}."""
    _trial.update(blocks=blocks)
    try:
        yield _trial
    finally:
        _trial.clear()


def blocks(spec: Spec, impl: str, default: dict[str, int]) -> dict[str, int]:
    """The tuned block sizes, else `default`, the kernel's heuristic."""
    if _trial:
        _trial["default"] = default
        return {**default, **_trial["blocks"]}
    found = lookup(spec, impl)
    return {**default, **found["blocks"]} if found else default


def save(op: str, records: list[dict[str, Any]]) -> Path:
    """Merges records into tuned.json (same impl, device, bucket, dtypes, options: replaced)."""

    def key(r: dict[str, Any]) -> str:
        return json.dumps([r[k] for k in ("impl", "device", "bucket", "dtypes", "options")])

    merged = {key(r): r for r in [*table(op), *records]}
    lines = ",\n ".join(json.dumps(merged[k]) for k in sorted(merged))
    file = path(op)
    file.write_text(f"[{lines}]\n")
    table.cache_clear()
    return file
