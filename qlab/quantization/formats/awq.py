"""AWQ checkpoints (AutoAWQ, version "gemm", 4 bits): read and write.

Per layer: qweight i32[in, out / 8] and qzeros i32[G, out / 8], eight outputs a word, the fields of a word
holding its outputs in the order 0 2 4 6 1 3 5 7; scales f16[G, out].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlab.lab.errors import UserError
from qlab.quantization.formats import checkpoint as ckpt
from qlab.quantization.formats import files
from qlab.quantization.qtensor import QTensor

FMT = "AWQ"
NAMES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output held by each field of a word


def read_awq(
    path: str | os.PathLike, *, match: str = "", config: Mapping[str, Any] | None = None
) -> ckpt.Checkpoint:
    """An AWQ checkpoint.

    Args:
      path: the folder, or one .safetensors file. match: read only layers whose name this regular
        expression finds. config: {"bits", "group_size", "version"}; None: from config.json or
        quant_config.json beside the weights.
    Raises:
      UserError: in one line, the file, the tensor, what was expected and what to do.
    """
    path = Path(path)
    config = dict(config or files.read_config(path))
    version = str(config.get("version", "gemm")).lower()
    bits = ckpt.number(config, ("bits", "w_bit"), path, 4)
    if config.get("quant_method", "awq") != "awq" or version != "gemm" or bits != 4:
        raise UserError(
            f"{path}: quant_method={config.get('quant_method')!r}, version={version!r}, bits={bits}; read_awq "
            'reads version "gemm" of 4 bits'
        )
    group = max(ckpt.number(config, ("group_size", "q_group_size"), path), 0)
    qtensors = {}
    with files.open_tensors(path) as tensors:
        for name in ckpt.layers(tensors, ".qweight", match):
            if f"{name}.g_idx" in tensors:
                raise UserError(f"{path}: {name} has a g_idx, so it is GPTQ; use read_gptq")
            qtensors[name] = _read(tensors, name, group)
        rest = ckpt.rest_of(tensors, ".qweight", NAMES)
    return ckpt.Checkpoint(qtensors, {}, rest, config)


def _read(tensors: files.Tensors, name: str, group: int) -> QTensor:
    words = tensors.take(f"{name}.qweight", (None, None), "int32")
    num_in, num_out = words.shape[0], words.shape[1] * 8
    num = -(-num_in // group) if group else 1
    scale = tensors.take(f"{name}.scales", (num, num_out), "float16", "bfloat16", "float32")
    zeros = tensors.take(f"{name}.qzeros", (num, num_out // 8), "int32")
    codes, zero = (_fields(a, num_out).T for a in (words, zeros))
    return ckpt.packed(np.ascontiguousarray(codes), scale.T, zero.astype(np.float32), 4, group)


def _fields(words: np.ndarray, num_out: int) -> np.ndarray:
    """u8[rows, out] in the order of the outputs."""
    fields = files.from_words(words, 4, num_out).reshape(len(words), -1, 8)
    return fields[..., np.argsort(ORDER)].reshape(len(words), num_out)


def write_awq(
    path: str | os.PathLike,
    qtensors: Mapping[str, QTensor],
    *,
    rest: Mapping[str, np.ndarray] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and config.json into a folder. Scales are rounded to f16.

    Args:
      qtensors: by layer name, all of 4 bits and one group that divides their columns.
    Raises:
      UserError: the format cannot hold a record, in one line with what can.
    """
    bits, group = ckpt.one_kind(qtensors, FMT)
    if bits != 4:
        raise UserError(f"{FMT} stores 4 bits, given {bits}; use write_compressed_tensors")
    tensors = dict(rest or {})
    for name, qt in qtensors.items():
        codes, scale, zero = ckpt.whole_rows(qt, name, FMT)
        if qt.shape[0] % 8 or (group > 0 and qt.shape[1] % group):
            raise UserError(
                f"{name} has shape {qt.shape}; {FMT} stores multiples of 8 outputs, and of group={group} "
                "inputs; use write_compressed_tensors"
            )
        tensors[f"{name}.qweight"] = _words(codes.T)
        tensors[f"{name}.qzeros"] = _words(zero.T.astype(np.uint8))
        tensors[f"{name}.scales"] = ckpt.half_scale(scale, name, FMT).T
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True,
    }  # fmt: skip
    path = Path(path)
    files.write(path / files.SINGLE, tensors, {"format": "pt"})
    files.write_config(path, model_config, config)


def _words(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_fields`: i32[rows, out / 8]."""
    fields = codes.reshape(len(codes), -1, 8)[..., list(ORDER)]
    return files.to_words(fields.reshape(len(codes), -1), 4)
