"""Safetensors files, one or many, and 32-bit words of packed codes. Every failure is one line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlab.lab.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Where configs of quantized checkpoints are found: the file, and the key within ("" is the whole file).
CONFIGS = (
    ("config.json", "quantization_config"),
    ("quantize_config.json", ""),
    ("quant_config.json", ""),
)


def library():
    """The safetensors package."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed; pip install 'qlab[formats]'") from None
    return safetensors


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file, or of all shards of a folder, each read when it is asked for."""

    def __init__(self, path: Path, where: dict[str, Any]):
        self.path, self._where = path, where

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise UserError(
                f"{self.path}: tensor {name!r} is missing; download the checkpoint again"
            )
        try:
            return self._where[name].get_tensor(name)
        except Exception as e:  # the library raises its own and the system's errors
            raise UserError(f"{self.path}: tensor {name!r} cannot be read: {_line(e)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def take(self, name: str, shape: tuple[int | None, ...], *kinds: str) -> np.ndarray:
        """A tensor that must have this shape (None: any size) and one of these dtypes."""
        a = self[name]
        if len(a.shape) != len(shape) or any(
            w not in (None, g) for g, w in zip(a.shape, shape, strict=True)
        ):
            want = "(" + ", ".join("*" if w is None else str(w) for w in shape) + ")"
            raise UserError(
                f"{self.path}: {name} has shape {a.shape}, expected {want}; the file is damaged or of "
                "another format"
            )
        if kinds and a.dtype.name not in kinds:
            raise UserError(
                f"{self.path}: {name} is {a.dtype.name}, expected {' or '.join(kinds)}; the file is of "
                "another format"
            )
        return a


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Tensors]:
    """The tensors of a .safetensors file or of a checkpoint folder."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in shards(path):
            handle = stack.enter_context(_open(file))
            where.update(dict.fromkeys(handle.keys(), handle))
        yield Tensors(path, where)


def shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; pass a .safetensors file or a checkpoint folder")
    if (path / INDEX).is_file():
        names = sorted(set(_json(path / INDEX).get("weight_map", {}).values()))
        lost = [n for n in names if not (path / n).is_file()]
        if lost or not names:
            what = f"shard {lost[0]} is missing" if lost else "its weight_map is empty"
            raise UserError(f"{path / INDEX}: {what}; download the checkpoint again")
        return [path / n for n in names]
    files = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no .safetensors file; pass a checkpoint folder")
    return files


def _open(file: Path):
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        return library().safe_open(str(file), "numpy")
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{file} is not a whole safetensors file ({_line(e)}); copy or download it again"
        ) from None


def metadata(file: Path) -> dict[str, str]:
    with _open(file) as handle:
        return dict(handle.metadata() or {})


def write(file: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str] | None = None):
    """Writes beside the file and renames, so that a kill leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    whole = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    library().numpy.save_file(whole, str(part), dict(meta or {}))
    os.replace(part, file)


def read_config(path: Path) -> dict[str, Any]:
    """The quantization config of a checkpoint folder, or of the folder of a file; {} if it has none."""
    folder = path if path.is_dir() else path.parent
    for name, key in CONFIGS:
        if (folder / name).is_file():
            whole = _json(folder / name)
            found = whole.get(key) if key else whole
            if found:
                return found
    return {}


def write_config(folder: Path, model: Mapping[str, Any] | None, quantization: dict[str, Any]):
    """config.json: the model's own config with the quantization_config put in."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**(model or {}), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n")


def _json(file: Path) -> dict[str, Any]:
    try:
        got = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as JSON ({_line(e)}); download it again") from None
    if not isinstance(got, dict):
        raise UserError(f"{file} holds a {type(got).__name__}, expected an object")
    return got


def _line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:160]


def from_words(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """u8[..., n] from i32[..., W]: code i is bits [i b, (i + 1) b) of the row's little-endian bit stream.

    >>> from_words(np.array([[0x21]], np.int32), 4, 3).tolist()
    [[1, 2, 0]]
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        shift = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (octets[..., None] >> shift) & np.uint8(2**bits - 1)
        return codes.reshape(*octets.shape[:-1], -1)[..., :n]
    stream = np.unpackbits(octets, axis=-1, bitorder="little")[..., : n * bits]
    stream = stream.reshape(*octets.shape[:-1], n, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `from_words`: i32[..., ceil(n b / 32)] from u8[..., n].

    >>> to_words(np.array([[1, 2, 0]], np.uint8), 4).tolist()
    [[33]]
    """
    n = codes.shape[-1]
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(*codes.shape[:-1], n * bits)
    pad = -n * bits % 32
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, pad)])
    octets = np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little"))
    return octets.view("<i4").astype(np.int32, copy=False)
