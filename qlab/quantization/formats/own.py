"""The lab's own file: QTensors as they are in memory, in a safetensors file that every device reads alike.

NAME.codes, NAME.scale, NAME.zero, NAME.offset are the arrays (a zero point that fits in a byte is
stored as one); the header holds the static fields as JSON, with a crc32 of every array.
Codes are u8 or i8, packed or not; jnp.int4, whose bytes differ between devices, is never written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.quantization.formats import files
from qlab.quantization.qtensor import QTensor, row_bytes

FORMAT, VERSION = "qlab-qtensors", 1
ARRAYS = ("codes", "scale", "zero", "offset")
STATIC = ("bits", "axes", "shape", "packed", "packed_group")


def as_arrays(qt: QTensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, static fields as plain JSON types): what any checkpoint library can store.

    With orbax: save the arrays with StandardSave and the static fields with JsonSave; `from_arrays` puts
    them together again. (Orbax also restores a QTensor directly into one of the same static fields.)
    """
    arrays = {name: a for name in ARRAYS if (a := getattr(qt, name)) is not None}
    static = {name: getattr(qt, name) for name in STATIC}
    return arrays, {k: list(v) if isinstance(v, tuple) else v for k, v in static.items()}


def from_arrays(arrays: Mapping[str, Any], static: Mapping[str, Any]) -> QTensor:
    """The inverse of `as_arrays`.

    Raises:
      UserError: a field is missing, or codes and scales do not fit the static fields.
    """
    lost = [n for n in ("codes", "scale") if n not in arrays] + [
        n for n in STATIC if n not in static
    ]
    if lost:
        raise UserError(f"{lost[0]} is missing; not a QTensor")
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in static.items() if k in STATIC
    }
    held: dict[str, Any] = {k: jnp.asarray(arrays[k]) for k in ARRAYS if k in arrays}
    held |= {k: held[k].astype(jnp.float32) for k in ("scale", "zero", "offset") if k in held}
    qt = QTensor(**held, **fields)
    if why := misfit(qt):
        raise UserError(why)
    return qt


def misfit(qt: QTensor) -> str:
    """ "" if the arrays fit the static fields, else what does not (leading batch axes are free)."""
    if not isinstance(qt.bits, int) or not 1 <= qt.bits <= 8 or not qt.shape:
        return f"bits={qt.bits!r}, shape={qt.shape!r}; expected 1 to 8 bits and a shape"
    dtype = "uint8" if qt.packed or not qt.signed else "int8"
    if qt.codes.dtype.name != dtype:
        return f"codes are {qt.codes.dtype.name}, expected {dtype}"
    k, num, group = qt.shape[-1], qt.scale.shape[-1] if qt.scale.ndim else 1, qt.group
    if num > 1 and (not group or num != -(-k // group)):
        return f"{num} scales a row do not fit groups of {group} in {k} columns"
    width = row_bytes(k, qt.bits, group) if qt.packed else (num * group if num > 1 else k)
    have = qt.codes.shape[-1] if qt.codes.ndim else 0
    if have != width if qt.packed else have < max(width, k):
        return f"a row of codes has {have} bytes, expected {width}"
    for name in ("zero", "offset"):
        a = getattr(qt, name)
        if a is not None and a.shape != qt.scale.shape:
            return f"{name} has shape {a.shape}, scale {qt.scale.shape}; they must agree"
    return ""


def save_qtensors(
    path: str | os.PathLike,
    qtensors: Mapping[str, QTensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes {name: QTensor} to one safetensors file; metadata: anything that JSON holds.

    Raises:
      UserError: codes of a type that is never written (jnp.int4), or safetensors is not installed.
    """
    tensors, static = {}, {}
    for name, qt in qtensors.items():
        if not isinstance(qt, QTensor):
            raise UserError(f"{name} is a {type(qt).__name__}; a QTensor is expected")
        if qt.codes.dtype.name not in ("uint8", "int8"):
            raise UserError(
                f"{name}: codes are {qt.codes.dtype.name}, whose bytes differ between devices; use "
                "codes.astype(jnp.int8), or pack_qtensor"
            )
        arrays, static[name] = as_arrays(qt)
        for field, a in arrays.items():
            a = np.asarray(a)
            if field == "zero" and (a == np.clip(np.round(a), 0, 255)).all():
                a = a.astype(np.uint8)
            tensors[f"{name}.{field}"] = a
            static[name].setdefault("crc32", {})[field] = _crc(a)
    head = {"format": FORMAT, "version": str(VERSION), "qtensors": json.dumps(static)}
    files.write(Path(path), tensors, {**head, "metadata": json.dumps(dict(metadata or {}))})


def load_qtensors(path: str | os.PathLike) -> dict[str, QTensor]:
    """{name: QTensor} as it was saved, bit for bit.

    Raises:
      UserError: in one line, what is wrong with the file.
    """
    path = Path(path)
    out = {}
    static = _header(path, "qtensors")
    with files.open_tensors(path) as tensors:
        for name, fields in static.items():
            arrays = {f: tensors[f"{name}.{f}"] for f in ARRAYS if f"{name}.{f}" in tensors}
            for field, crc in fields.get("crc32", {}).items():
                if field not in arrays or _crc(arrays[field]) != crc:
                    raise UserError(
                        f"{path}: the bytes of {name}.{field} are not those that were written; copy or "
                        "download the file again"
                    )
            try:
                out[name] = from_arrays(arrays, fields)
            except UserError as e:
                raise UserError(f"{path}: {name}: {e}; the file is damaged") from None
    return out


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata given to `save_qtensors`."""
    return _header(Path(path), "metadata")


def _header(path: Path, key: str) -> dict[str, Any]:
    head = files.metadata(path)
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by save_qtensors (its header says format="
            f"{head.get('format')!r}); for other projects' checkpoints use read_compressed_tensors, "
            "read_gptq or read_awq"
        )
    if head.get("version") != str(VERSION):
        raise UserError(
            f"{path} has version {head.get('version')!r}, this qlab reads {VERSION}; update qlab"
        )
    try:
        return dict(json.loads(head[key]))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: its header is damaged ({key}); copy the file again") from None


def _crc(a: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data)
