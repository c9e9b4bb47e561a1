"""What a foreign checkpoint becomes, and the steps that all formats share.

Letters: out = rows, in = columns (inputs), G = groups of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import layout
from qlab.lab.errors import UserError
from qlab.quantization.formats.files import Tensors
from qlab.quantization.qtensor import QTensor, cut_of, dequantize, unpack_qtensor


class Checkpoint(NamedTuple):
    """A quantized checkpoint, its weights still packed.

    Attributes:
      qtensors: by layer name ("model.layers.0.mlp.up_proj"), of shape (out, in), packed.
      perms: i32[in] of the layers whose columns were sorted into groups (act-order): column c of the
        QTensor belongs to input perms[name][c]. Groups of such a layer lie scattered over the inputs, which
        no group layout holds, so the columns are stored sorted and x is permuted instead:
        y = ops.matmul(x, qtensors[name], perm=perms.get(name)).
      rest: every other tensor as it was stored (biases, norms, embeddings).
      config: the quantization config as it was found.
    """

    qtensors: dict[str, QTensor]
    perms: dict[str, np.ndarray]
    rest: dict[str, np.ndarray]
    config: dict[str, Any]

    def weight(self, name: str) -> jax.Array:
        """f32[out, in]: the weights of a layer, columns in the order of the inputs."""
        w = dequantize(self.qtensors[name])
        return w if name not in self.perms else w[:, np.argsort(self.perms[name])]


def layers(tensors: Tensors, suffix: str, match: str) -> Iterator[str]:
    """Names of the quantized layers that `match` (a regular expression) finds."""
    found = sorted(n.removesuffix(suffix) for n in tensors if n.endswith(suffix))
    if not found:
        raise UserError(
            f"{tensors.path}: no tensor ends in {suffix!r}; the checkpoint is of another format"
        )
    chosen = [n for n in found if re.search(match, n)]
    if not chosen:
        raise UserError(f"match={match!r} finds none of {len(found)} layers, e.g. {found[0]!r}")
    yield from chosen


def rest_of(tensors: Tensors, suffix: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """What belongs to no quantized layer, whether that was read or not."""
    owners = [n.removesuffix(suffix) for n in tensors if n.endswith(suffix)]
    taken = {f"{owner}.{name}" for owner in owners for name in names}
    return {n: tensors[n] for n in tensors if n not in taken}


@partial(jax.jit, static_argnums=(1, 2))
def _pack(codes: jax.Array, bits: int, group: int) -> jax.Array:
    return layout.pack(codes, bits, cut_of(group))


def packed(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int
) -> QTensor:
    """A packed QTensor from unsigned codes u8[..., out, in] and scales [..., out, G].

    A zero point that is 2^(b-1) everywhere is none: the grid is symmetric.
    """
    if zero is not None and (zero == 2 ** (bits - 1)).all():
        zero = None
    group = 0 if scale.shape[-1] == 1 else group
    axes = (codes.ndim - 1,)
    return QTensor(
        codes=_pack(jnp.asarray(codes), bits, group),
        scale=jnp.asarray(scale, jnp.float32),
        zero=None if zero is None else jnp.asarray(zero, jnp.float32),
        bits=bits,
        axes=axes,
        shape=codes.shape,
        packed=True,
        packed_group=group,
    )


def column_order(g_idx: np.ndarray, group: int, where: str) -> np.ndarray | None:
    """perm i32[in] that sorts columns into their groups, None if they already are.

    Raises:
      UserError: the groups are not of `group` columns each, which no QTensor holds.
    """
    num_in = len(g_idx)
    plain = np.arange(num_in) // (group or num_in)
    if (g_idx == -1).all() or (g_idx == plain).all():
        return None
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    if (g_idx[perm] != plain).any():
        counts = np.bincount(np.maximum(g_idx, 0), minlength=2)
        raise UserError(
            f"{where} puts {counts.min()} to {counts.max()} columns into a group, expected {group} in "
            "each; quantize again with equal groups, or load it with the library that wrote it"
        )
    return perm


def whole_rows(qt: QTensor, name: str, fmt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unsigned codes u8[out, in], scale f32[out, G], zero f32[out, G]) of a record, for a writer.

    Raises:
      UserError: the record is no matrix, has a real offset, or zero points that b bits do not hold.
    """
    if len(qt.shape) != 2:
        raise UserError(f"{name} has shape {qt.shape}; {fmt} stores matrices (out, in)")
    if qt.offset is not None:
        raise UserError(f"{name} has a real offset, which {fmt} cannot store; use save_qtensors")
    half = 2 ** (qt.bits - 1)
    plain = unpack_qtensor(qt)
    codes = np.asarray(plain.codes)[:, : qt.shape[1]].astype(np.int16) + (half if qt.signed else 0)
    num = qt.scale.shape[-1] if qt.scale.ndim else 1
    shape = (qt.shape[0], num)
    scale = np.broadcast_to(np.asarray(qt.scale, np.float32), shape)
    zero = np.full(shape, half) if qt.zero is None else np.broadcast_to(np.asarray(qt.zero), shape)
    if ((zero < 0) | (zero > 2**qt.bits - 1) | (zero != np.round(zero))).any():
        raise UserError(
            f"{name} has zero points outside 0 .. {2**qt.bits - 1}, which {fmt} cannot store; use "
            "save_qtensors, or quantize with a range that contains 0"
        )
    return codes.astype(np.uint8), scale, zero.astype(np.float32)


def half_scale(scale: np.ndarray, name: str, fmt: str) -> np.ndarray:
    """f16, rounded: off by at most 2^-11 of the largest scale of the layer."""
    with np.errstate(over="ignore"):
        out = scale.astype(np.float16)
    if not (np.abs(out - scale) <= 2.0**-11 * np.abs(scale).max()).all():
        raise UserError(
            f"{name} has scales from {scale.min():.3g} to {scale.max():.3g}, {fmt} stores f16 "
            "(6.1e-05 to 65504); rescale the layer, or use save_qtensors"
        )
    return out


def one_kind(qtensors: Mapping[str, QTensor], fmt: str) -> tuple[int, int]:
    """(bits, group) of all records, for a format that has one of each; group -1 is the whole row."""
    kinds = {(qt.bits, qt.group or -1) for qt in qtensors.values()}
    if len(kinds) != 1:
        raise UserError(
            f"{fmt} stores one width and one group for all layers, given (bits, group): "
            f"{sorted(kinds)}; use write_compressed_tensors"
        )
    return kinds.pop()


def number(config: Mapping[str, Any], names: tuple[str, ...], path: Path, default=None) -> Any:
    """The first of these entries of a config, an integer."""
    for n in names:
        if n in config and config[n] is not None:
            if isinstance(config[n], bool) or not isinstance(config[n], int):
                raise UserError(f"{path}: its config has {n}={config[n]!r}, expected an integer")
            return config[n]
    if default is None:
        raise UserError(
            f"{path}: its config has no {names[0]}; put config.json or quantize_config.json beside it, or "
            f"pass config={{{names[0]!r}: ...}}"
        )
    return default
