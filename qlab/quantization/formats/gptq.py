"""GPTQ checkpoints (AutoGPTQ, GPTQModel, transformers), with and without activation order: read and write.

Per layer: qweight i32[in b / 32, out], each column the little-endian stream of codes; qzeros
i32[G, out b / 32], each row a stream; scales f16[G, out]; g_idx i32[in], the group of each input.
Version 1 ("gptq") stores zero - 1, version 2 ("gptq_v2") the zero point itself. In version 1 zero
point 0 borrows from the neighbours within a word; for 2, 4 and 8 bits it is read back by adding 1 to
every field of the word at once, for 3 bits field by field modulo 8, as GPTQModel does.
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

FMT = "GPTQ"
NAMES = ("qweight", "qzeros", "scales", "g_idx")
WIDTHS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")


def read_gptq(
    path: str | os.PathLike, *, match: str = "", config: Mapping[str, Any] | None = None
) -> ckpt.Checkpoint:
    """A GPTQ checkpoint; layers with activation order come with their perm (see Checkpoint).

    Args:
      path: the folder, or one .safetensors file. match: read only layers whose name this regular
        expression finds. config: {"bits", "group_size", "checkpoint_format"}; None: from config.json or
        quantize_config.json beside the weights.
    Raises:
      UserError: in one line, the file, the tensor, what was expected and what to do.
    """
    path = Path(path)
    config = dict(config or files.read_config(path))
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("quant_method", "gptq") != "gptq" or version not in VERSIONS:
        raise UserError(
            f"{path}: quant_method={config.get('quant_method')!r}, format={version!r}; read_gptq reads "
            f"{' and '.join(VERSIONS)}"
        )
    if config.get("dynamic"):
        raise UserError(
            f"{path}: its config has `dynamic` widths per layer, which read_gptq does not read"
        )
    bits = ckpt.number(config, ("bits",), path)
    group = max(ckpt.number(config, ("group_size",), path, -1), 0)
    if bits not in WIDTHS:
        raise UserError(f"{path}: its config has bits={bits}; read_gptq reads {WIDTHS}")
    qtensors, perms = {}, {}
    with files.open_tensors(path) as tensors:
        for name in ckpt.layers(tensors, ".qweight", match):
            qtensors[name], perm = _read(tensors, name, bits, group, version)
            if perm is not None:
                perms[name] = perm
        rest = ckpt.rest_of(tensors, ".qweight", NAMES)
    return ckpt.Checkpoint(qtensors, perms, rest, config)


def _read(tensors: files.Tensors, name: str, bits: int, group: int, version: str):
    words = tensors.take(f"{name}.qweight", (None, None), "int32")
    num_in, num_out = words.shape[0] * 32 // bits, words.shape[1]
    num = -(-num_in // group) if group else 1
    scale = tensors.take(f"{name}.scales", (num, num_out), "float16", "bfloat16", "float32")
    zeros = tensors.take(f"{name}.qzeros", (num, -(-num_out * bits // 32)), "int32")
    zero = files.from_words(_plus_one(zeros, bits) if version == "gptq" else zeros, bits, num_out)
    if version == "gptq" and bits == 3:
        zero = (zero + 1) % 8
    codes = files.from_words(np.ascontiguousarray(words.T), bits, num_in)
    perm = None
    if f"{name}.g_idx" in tensors:
        g_idx = tensors.take(f"{name}.g_idx", (num_in,), "int32", "int64")
        perm = ckpt.column_order(g_idx, group, f"{tensors.path}: {name}.g_idx")
        codes = codes if perm is None else codes[:, perm]
    return ckpt.packed(codes, scale.T, zero.T.astype(np.float32), bits, group), perm


def _plus_one(words: np.ndarray, bits: int) -> np.ndarray:
    """1 added to every field of a word, with carries, modulo 2^32; 3 bits straddle words and wait."""
    if bits == 3:
        return words
    ones = sum(1 << i for i in range(0, 32, bits))
    return (words.view(np.uint32) + np.uint32(ones)).view(np.int32)


def write_gptq(
    path: str | os.PathLike,
    qtensors: Mapping[str, QTensor],
    *,
    perms: Mapping[str, np.ndarray] | None = None,
    rest: Mapping[str, np.ndarray] | None = None,
    model_config: Mapping[str, Any] | None = None,
    version: str = "gptq",
) -> None:
    """Writes model.safetensors and config.json into a folder. Scales are rounded to f16.

    Args:
      qtensors: by layer name, all of one width (2, 3, 4 or 8) and group. perms: as in Checkpoint.
      version: "gptq", which most loaders expect, or "gptq_v2", which also holds zero point 0.
    Raises:
      UserError: the format cannot hold a record, in one line with what can.
    """
    if version not in VERSIONS:
        raise UserError(f"version={version!r}; use {' or '.join(VERSIONS)}")
    bits, group = ckpt.one_kind(qtensors, FMT)
    if bits not in WIDTHS:
        raise UserError(
            f"{FMT} stores 2, 3, 4 or 8 bits, given {bits}; use write_compressed_tensors"
        )
    tensors = dict(rest or {})
    for name, qt in qtensors.items():
        codes, scale, zero = ckpt.whole_rows(qt, name, FMT)
        num_out, num_in = qt.shape
        if num_in * bits % 32 or num_out * bits % 32:
            raise UserError(
                f"{name} has shape {qt.shape}; {FMT} stores {bits}-bit matrices whose sides are multiples "
                f"of {32 if bits == 3 else 32 // bits}; use write_compressed_tensors"
            )
        g_idx = np.arange(num_in) // (group if group > 0 else num_in)
        if perms and name in perms:
            order = np.argsort(perms[name])
            codes, g_idx = codes[:, order], g_idx[order]
        if version == "gptq":
            if (zero == 0).any():
                raise UserError(
                    f'{name} has zero points of 0, which version "gptq" cannot store; use '
                    'version="gptq_v2"'
                )
            zero = zero - 1
        tensors[f"{name}.qweight"] = files.to_words(codes, bits).T
        tensors[f"{name}.qzeros"] = files.to_words(zero.T.astype(np.uint8), bits)
        tensors[f"{name}.scales"] = ckpt.half_scale(scale, name, FMT).T
        tensors[f"{name}.g_idx"] = g_idx.astype(np.int32)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": bool(perms),
        "sym": all(qt.zero is None for qt in qtensors.values()), "checkpoint_format": version,
        "lm_head": False,
    }  # fmt: skip
    path = Path(path)
    files.write(path / files.SINGLE, tensors, {"format": "pt"})
    files.write_config(path, model_config, config)
