"""Checkpoints of one arm: orbax arrays beside a small meta.json, strict on restore.

    <arm>/checkpoints/<step, 10 digits>/state/      the arrays, written by orbax
    <arm>/checkpoints/<step, 10 digits>/meta.json   tree, shapes, dtypes, crc32 a leaf, counters

A checkpoint is written into a temporary folder and renamed, so a kill leaves it whole or absent.
Orbax may restore part of a mismatched tree without a word; here the recorded tree is compared with
the expected one first, and each leaf's crc32 afterwards.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab import records
from qlab.lab.errors import UserError

SCHEMA = 1


class Restored(NamedTuple):
    """step: global step; state: pytree of host arrays (typed keys rebuilt); extra: the counters."""

    step: int
    state: Any
    extra: dict[str, Any]


class Leaf(NamedTuple):
    path: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def leaves(state: Any) -> tuple[list[Leaf], list[np.ndarray]]:
    """Names, dtypes and shapes of the leaves, and the leaves on the host (typed keys as their data)."""
    spec, host = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            dtype, leaf = str(leaf.dtype), jax.random.key_data(leaf)
            array = np.asarray(leaf)
            spec.append(Leaf(name, dtype, array.shape))
        else:
            array = np.asarray(leaf)
            spec.append(Leaf(name, str(array.dtype), array.shape))
        host.append(array)
    return spec, host


def save(
    folder: Path, step: int, state: Any, extra: dict[str, Any], config_hash: str, keep: int
) -> None:
    """Writes checkpoint `step` of an arm and removes all but the newest `keep`.

    Args:
      folder: <arm>/checkpoints.
      state: pytree of arrays, any sharding (gathered to the host).
      extra: JSON-able counters: bytes of metrics.jsonl, wall time, ...
    Raises:
      UserError: the disk is full or read-only.
    """
    spec, host = leaves(state)
    tmp, final = folder / f"tmp-{step:010d}", folder / f"{step:010d}"
    meta = {
        "schema": SCHEMA,
        "step": step,
        "config_hash": config_hash,
        "tree": [[*s[:2], list(s.shape), _crc(a)] for s, a in zip(spec, host, strict=True)],
        "extra": extra,
    }
    with records.guard(folder):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        # Orbax refuses arrays without elements; their shape in meta.json says all there is.
        # At least one array keeps the folder valid for a state that has none.
        arrays = {f"{i:05d}": a for i, a in enumerate(host) if a.size} or {"none": np.zeros(1)}
        _orbax().save((tmp / "state").resolve(), arrays)
        records.write_json(tmp / "meta.json", meta)
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        for old in steps(folder)[: -max(keep, 1)]:
            shutil.rmtree(folder / f"{old:010d}", ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, oldest first."""
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit())


def restore(
    folder: Path,
    like: Callable[[dict[str, Any]], Any],
    config_hash: str,
    say: Callable[[str], None] = print,
) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none.

    A damaged one is set aside as <step>.damaged, which is said, and the one before is tried.

    Args:
      like: extra -> pytree of arrays or ShapeDtypeStructs with the expected structure, and with a
        sharding where a leaf is to be put on a device.
    Raises:
      UserError: the checkpoint is of another config or has another tree; the first difference is
        named. Nothing is removed.
    """
    for step in reversed(steps(folder)):
        place = folder / f"{step:010d}"
        try:
            meta = json.loads((place / "meta.json").read_text())
            saved = [Leaf(p, d, tuple(s)) for p, d, s, _ in meta["tree"]]
            crcs = [c for *_, c in meta["tree"]]
            saved_hash, extra = meta["config_hash"], meta["extra"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            _set_aside(place, f"meta.json: {type(e).__name__}: {e}", say)
            continue
        if saved_hash != config_hash:
            raise UserError(
                f"checkpoint {place} belongs to config {saved_hash}, this run is {config_hash}; "
                "give another --workdir"
            )
        expected = like(extra)
        _compare(saved, expected, place)
        try:
            arrays = _orbax().restore((place / "state").resolve())
            host = [
                arrays[f"{i:05d}"] if 0 not in s.shape else np.zeros(s.shape, _np_dtype(s.dtype))
                for i, s in enumerate(saved)
            ]
            bad = [s.path for s, a, c in zip(saved, host, crcs, strict=True) if _crc(a) != c]
            if bad:
                raise ValueError(f"checksum of leaf {bad[0]} differs")
        except Exception as e:  # orbax and tensorstore raise many types for a damaged file
            _set_aside(
                place, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", say
            )
            continue
        return Restored(step, _rebuild(host, expected), extra)
    return None


def _set_aside(place: Path, why: str, say: Callable[[str], None]) -> None:
    say(f"checkpoint {place} is damaged ({why[:160]}); trying the one before")
    target = place.with_name(place.name + ".damaged")
    with records.guard(place):
        shutil.rmtree(target, ignore_errors=True)
        place.rename(target)


def _compare(saved: list[Leaf], like: Any, place: Path) -> None:
    expected = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        shape = tuple(leaf.shape)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape += jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype)).shape
        expected.append(Leaf(jax.tree_util.keystr(path), str(leaf.dtype), shape))
    fix = "it was written by other code; give another --workdir"
    for a, b in zip(saved, expected, strict=False):
        if a.path != b.path:
            raise UserError(
                f"checkpoint {place} has leaf {a.path} where this run has {b.path}; {fix}"
            )
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise UserError(f"checkpoint {place}: leaf {a.path} is {a}, this run has {b}; {fix}")
    if len(saved) != len(expected):
        extra = (saved if len(saved) > len(expected) else expected)[
            min(len(saved), len(expected))
        ].path
        who = "the checkpoint" if len(saved) > len(expected) else "this run"
        raise UserError(f"checkpoint {place}: only {who} has leaf {extra}; {fix}")


def _rebuild(host: list[np.ndarray], like: Any) -> Any:
    """Host arrays in the structure of `like`; a leaf with a sharding is put there, keys are wrapped."""
    out = []
    for array, leaf in zip(host, jax.tree.leaves(like), strict=True):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            array = jax.random.wrap_key_data(jnp.asarray(array), impl=_impl(leaf.dtype))
        sharding = getattr(leaf, "sharding", None)
        out.append(jax.device_put(array, sharding) if sharding is not None else array)
    return jax.tree.unflatten(jax.tree.structure(like), out)


_KEY_IMPLS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def _impl(dtype: Any) -> str:
    return _KEY_IMPLS[str(dtype)]


def _np_dtype(name: str) -> np.dtype:
    return np.dtype("uint32") if name.startswith("key<") else np.dtype(name)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)


def digest(state: Any) -> str:
    """sha256 over all leaves, wall-clock leaves ("wall" in their name) left out."""
    import hashlib

    h = hashlib.sha256()
    for spec, array in zip(*leaves(state), strict=True):
        if "wall" not in spec.path:
            h.update(f"{spec.path} {spec}".encode())
            h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells its every step otherwise
    return ocp.PyTreeCheckpointer()
