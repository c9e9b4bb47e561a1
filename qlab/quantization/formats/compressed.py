"""compressed-tensors, format pack-quantized (vLLM, llm-compressor): read and write.

Per layer: weight_packed i32[out, ceil(in b / 32)], each row the little-endian stream of unsigned codes;
weight_scale f[out, G] (one scale of the tensor: [1]); weight_zero_point i32[ceil(out b / 32), G], packed
down the rows, or i8 where the strategy is per tensor; weight_shape i64[2]; weight_g_idx i32[in] with
activation order. Codes and zero points are signed there and stored plus 2^(b-1), which is how a QTensor
counts. Releases before the dense packing put 32 // b codes into a word and left the rest of it empty: for
3, 5, 6 and 7 bits such rows are wider, and are told by it (below 150 columns both may be equally
wide; then the dense form is taken).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlab.lab.errors import UserError
from qlab.quantization.formats import checkpoint as ckpt
from qlab.quantization.formats import files
from qlab.quantization.qtensor import QTensor

FMT = "compressed-tensors"
NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
FLOATS = ("float32", "float16", "bfloat16")


def read_compressed_tensors(
    path: str | os.PathLike, *, match: str = "", config: Mapping[str, Any] | None = None
) -> ckpt.Checkpoint:
    """A checkpoint in the pack-quantized format.

    Args:
      path: the folder, or one .safetensors file. match: read only layers whose name this regular
        expression finds. config: the quantization config; None: from config.json beside the weights.
    Raises:
      UserError: in one line, the file, the tensor, what was expected and what to do.
    """
    path = Path(path)
    config = dict(config or files.read_config(path))
    fmt = config.get("format", "pack-quantized")
    if config.get("quant_method", FMT) != FMT or fmt not in ("pack-quantized", "mixed-precision"):
        raise UserError(
            f"{path}: quant_method={config.get('quant_method')!r}, format={fmt!r}; "
            "read_compressed_tensors reads pack-quantized only"
        )
    qtensors, perms = {}, {}
    with files.open_tensors(path) as tensors:
        for name in ckpt.layers(tensors, ".weight_packed", match):
            qtensors[name], perm = _read(tensors, name, weight_args(config, name, path))
            if perm is not None:
                perms[name] = perm
        rest = ckpt.rest_of(tensors, ".weight_packed", NAMES)
    return ckpt.Checkpoint(qtensors, perms, rest, config)


def weight_args(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The `weights` of the config group of a layer: by its name, by a "re:" pattern, or the only group."""
    groups = [g for g in config.get("config_groups", {}).values() if g.get("weights")]
    named = [
        g for g in groups for t in g.get("targets", [])
        if t == name or (t.startswith("re:") and re.match(t[3:], name))
    ]  # fmt: skip
    found = named or (groups if len(groups) == 1 else [])
    if not found:
        raise UserError(
            f"{path}: {name} belongs to none of {len(groups)} config_groups by name; put the config.json "
            "of the checkpoint beside it, or pass config= with one group for it"
        )
    args = found[0]["weights"]
    if args.get("type", "int") != "int" or args.get("num_bits") not in range(1, 9):
        raise UserError(
            f"{path}: {name} has type={args.get('type')!r}, num_bits={args.get('num_bits')!r}; expected "
            "integers of 1 to 8 bits"
        )
    return args


def _read(tensors: files.Tensors, name: str, args: Mapping[str, Any]):
    bits = args["num_bits"]
    shape = tuple(int(n) for n in tensors.take(f"{name}.weight_shape", (None,), "int64", "int32"))
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{tensors.path}: {name} has shape {shape}, expected (out, in)")
    num_out, num_in = shape
    words = tensors.take(f"{name}.weight_packed", (num_out, None), "int32")
    codes = _unpack(tensors, f"{name}.weight_packed", words, bits, num_in)
    scale = tensors[f"{name}.weight_scale"]
    if scale.dtype.name not in FLOATS:
        raise UserError(
            f"{tensors.path}: {name}.weight_scale is {scale.dtype.name}, expected a float"
        )
    if scale.ndim < 2:  # one for the tensor, or one a row
        scale = scale.reshape(-1, 1)
    group, num = args.get("group_size") or 0, scale.shape[1]
    group = 0 if num == 1 else group
    if scale.shape[0] not in (1, num_out) or num != (-(-num_in // group) if group else 1):
        raise UserError(
            f"{tensors.path}: {name}.weight_scale has shape {scale.shape}, expected {num_out} rows and "
            f"groups of {group} in {num_in} columns; config.json does not belong to these weights"
        )
    zero = None
    if not args.get("symmetric", True):
        zero = _zero(tensors, f"{name}.weight_zero_point", bits, num_out, scale.shape)
    perm = None
    if f"{name}.weight_g_idx" in tensors:
        g_idx = tensors.take(f"{name}.weight_g_idx", (num_in,), "int32", "int64")
        perm = ckpt.column_order(g_idx, group, f"{tensors.path}: {name}.weight_g_idx")
        codes = codes if perm is None else codes[:, perm]
    return ckpt.packed(codes, scale, zero, bits, group), perm


def _unpack(tensors, name: str, words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """u8[rows, n] from either packing, told apart by the width of a row."""
    per_word = 32 // bits
    dense, sparse = -(-n * bits // 32), -(-n // per_word)
    if words.shape[1] == dense:
        return files.from_words(words, bits, n)
    if words.shape[1] != sparse:
        raise UserError(
            f"{tensors.path}: {name} has {words.shape[1]} words a row, expected {dense} for {n} codes of "
            f"{bits} bits; config.json does not belong to these weights"
        )
    fields = words.view(np.uint32)[..., None] >> (bits * np.arange(per_word, dtype=np.uint32))
    return (fields & (2**bits - 1)).astype(np.uint8).reshape(len(words), -1)[:, :n]


def _zero(tensors, name: str, bits: int, num_out: int, shape: tuple[int, ...]) -> np.ndarray:
    """f32 like the scales, in the unsigned count."""
    held = tensors[name]
    if held.dtype == np.int32:
        if held.ndim != 2 or held.shape[1] != shape[1]:
            raise UserError(f"{tensors.path}: {name} has shape {held.shape}, scales {shape}")
        return _unpack(tensors, name, np.ascontiguousarray(held.T), bits, num_out).T.astype(
            np.float32
        )
    if held.dtype != np.int8 or held.size not in (1, int(np.prod(shape))):
        raise UserError(
            f"{tensors.path}: {name} is {held.dtype}{held.shape}, expected i8 like the scales"
        )
    return np.broadcast_to(held.reshape(-1, shape[1]).astype(np.float32) + 2 ** (bits - 1), shape)


def write_compressed_tensors(
    path: str | os.PathLike,
    qtensors: Mapping[str, QTensor],
    *,
    rest: Mapping[str, np.ndarray] | None = None,
    model_config: Mapping[str, Any] | None = None,
    scale_dtype: str = "float32",
) -> None:
    """Writes model.safetensors and config.json into a folder.

    Args:
      qtensors: by layer name; widths, groups and symmetry may differ. rest: other tensors to store.
      model_config: the model's own config.json. scale_dtype: "float32" stores scales exactly; what serves
        the model may want "bfloat16" or "float16", which rounds them.
    Raises:
      UserError: a record has a real offset, or zero points that b bits do not hold.
    """
    if scale_dtype not in FLOATS:
        raise UserError(f"scale_dtype={scale_dtype!r}; use one of {', '.join(FLOATS)}")
    import ml_dtypes  # numpy's bfloat16; comes with jax

    dtype = np.dtype(getattr(ml_dtypes, scale_dtype, None) or scale_dtype)
    tensors, groups = dict(rest or {}), {}
    for name, qt in qtensors.items():
        codes, scale, zero = ckpt.whole_rows(qt, name, FMT)
        tensors[f"{name}.weight_packed"] = files.to_words(codes, qt.bits)
        tensors[f"{name}.weight_scale"] = scale.astype(dtype)
        tensors[f"{name}.weight_shape"] = np.array(qt.shape, np.int64)
        if qt.zero is not None:
            words = files.to_words(np.ascontiguousarray(zero.T).astype(np.uint8), qt.bits)
            tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(words.T)
        groups.setdefault((qt.bits, qt.group, qt.zero is None), []).append(name)
    config = {
        "quant_method": FMT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            f"group_{i}": {"targets": names, "weights": _weights(*kind)}
            for i, (kind, names) in enumerate(groups.items())
        },
    }
    path = Path(path)
    files.write(path / files.SINGLE, tensors, {"format": "pt"})
    files.write_config(path, model_config, config)


def _weights(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
