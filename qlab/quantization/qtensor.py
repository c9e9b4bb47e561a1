"""The one low-bit record of the lab, its only reader, and the straight-through pieces under every fake.

Letters: out = rows (output channels), in = columns (inputs); G = groups of a row.
Weights are seen through the canonical view W f32[out, in]; a flax kernel is (in, out), so pass kernel.T.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from qlab.kernels.common import layout

Ties = Literal["half_even", "half_up"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "offset"],
    meta_fields=["bits", "axes", "shape", "packed", "packed_group"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """x_hat = scale * (codes - zero) + offset, for every kind of uniform grid.

    Attributes:
      codes: u8 (asymmetric) or i8 (symmetric) integers of shape `shape`, its last axis padded to a
        multiple of the group; packed: u8[..., row_bytes], the planar layout that the kernels read
        (qlab.kernels.common.layout), a symmetric code stored plus 2^(b-1).
      scale: f32, broadcasts against codes; an axis may also hold one entry per group of neighbours.
      zero: integer-valued f32 like scale, or None (symmetric). offset: real f32 like scale, or None.
      bits: width of a code, 1 to 8. axes: axes of `shape` over which one scale is shared.
      shape: true shape of x_hat, without batch axes added by vmap. packed: codes are packed.
      packed_group: `group` of a packed tensor, whose arrays do not tell it; 0 unpacked.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    offset: jax.Array | None = None
    bits: int = 8
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    packed: bool = False
    packed_group: int = 0

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        kind = "asymmetric" if self.zero is not None else "symmetric"
        kind = "real offset" if self.offset is not None else kind
        try:
            form = "packed" if self.packed else "unpacked"
            tail = f"{_granularity(self)}, {self.nbytes} bytes {form}"
        except (AttributeError, TypeError):  # a tree of something other than arrays
            tail = f"of {type(self.codes).__name__}"
        return f"QTensor({shape}, {self.bits} bits {kind}, {tail})"

    @property
    def group(self) -> int:
        """Columns (of the last axis) that share a scale; 0: all of a row."""
        if self.packed:
            return self.packed_group
        num = self.scale.shape[-1] if self.scale.ndim else 1
        return 0 if num == 1 else self.codes.shape[-1] // num

    @property
    def signed(self) -> bool:
        """Neither zero point nor offset: unpacked codes are i8, centred on 0."""
        return self.zero is None and self.offset is None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are held now (packed or not)."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def stored_bits(self) -> float:
        """Bits per weight once packed and saved: codes, scales (f32), integer zeros (one byte), offsets."""
        num = math.prod(self.shape[:-1]) * row_bytes(self.shape[-1], self.bits, self.group)
        num += 4 * self.scale.size
        num += self.zero.size if self.zero is not None else 0
        num += 4 * self.offset.size if self.offset is not None else 0
        return 8 * num / math.prod(self.shape)


def _granularity(qt: QTensor) -> str:
    own = qt.scale.shape[max(qt.scale.ndim - len(qt.shape), 0) :]
    if qt.group:
        return f"per group of {qt.group}"
    return "per channel" if math.prod(own) > 1 else "per tensor"


def expand(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`scale` made broadcastable to `shape`: an axis with fewer entries is repeated group-wise.

    >>> expand(jnp.array([[1.0, 2.0]]), (3, 4)).tolist()
    [[1.0, 1.0, 2.0, 2.0]]
    """
    for axis in range(-1, -min(scale.ndim, len(shape)) - 1, -1):
        if scale.shape[axis] not in (1, shape[axis]):
            scale = jnp.repeat(scale, shape[axis] // scale.shape[axis], axis)
    return scale


def dequantize(qt: QTensor) -> jax.Array:
    """f32[shape]: the values a QTensor stands for. The only reader of the record.

    >>> qt = QTensor(jnp.array([[0, 3]], jnp.uint8), jnp.array([[0.5]]), jnp.array([[1.0]]), shape=(1, 2))
    >>> dequantize(qt).tolist(), dequantize(pack_qtensor(qt)).tolist()
    ([[-0.5, 1.0]], [[-0.5, 1.0]])
    """
    qt = unpack_qtensor(qt)
    q = qt.codes.astype(jnp.float32)
    shape = q.shape
    if qt.zero is not None:
        q = q - expand(qt.zero, shape)
    x = q * expand(qt.scale, shape)
    if qt.offset is not None:
        x = x + expand(qt.offset, shape)
    return x[..., : qt.shape[-1]] if qt.shape else x


def cut_of(group: int) -> int:
    """Columns by which a packed row is cut: the group if its planes fill bytes, else the whole row (0).

    >>> cut_of(128), cut_of(5)
    (128, 0)
    """
    return 0 if group % 8 else group


def row_bytes(k: int, bits: int, group: int = 0) -> int:
    """Bytes of a packed row of k codes.

    >>> row_bytes(4096, 4, 128), row_bytes(13, 3)
    (2048, 6)
    """
    return layout.row_bytes(k, bits, cut_of(group))


def pack_qtensor(qt: QTensor) -> QTensor:
    """The same tensor with its codes packed as the kernels read them; `dequantize` reads both alike.

    Raises:
      ValueError: bits is not 1 to 8, or the codes are neither u8 nor i8.
    """
    if qt.packed:
        return qt
    want = jnp.int8 if qt.signed else jnp.uint8
    if qt.codes.dtype != want:
        raise ValueError(
            f"codes are {qt.codes.dtype}; {jnp.dtype(want).name} is expected of a grid "
            f"{'without' if qt.signed else 'with'} zero point or offset"
        )
    codes = qt.codes[..., : qt.shape[-1]].astype(jnp.int32)
    codes = codes + 2 ** (qt.bits - 1) if qt.signed else codes
    codes = layout.pack(codes, qt.bits, cut_of(qt.group))
    return dataclasses.replace(qt, codes=codes, packed=True, packed_group=qt.group)


def unpack_qtensor(qt: QTensor) -> QTensor:
    """The inverse of `pack_qtensor`; columns that only pad the last group come back as code 0 (of u8)."""
    if not qt.packed:
        return qt
    k, group = qt.shape[-1], qt.packed_group
    codes = layout.unpack(qt.codes, k, qt.bits, cut_of(group))
    if group:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -k % group)])
    if qt.signed:
        codes = (codes.astype(jnp.int32) - 2 ** (qt.bits - 1)).astype(jnp.int8)
    return dataclasses.replace(qt, codes=codes, packed=False, packed_group=0)


def clip_ste(r: jax.Array, q_min, q_max) -> jax.Array:
    """clip(r, q_min, q_max) with gradient 1 on [q_min, q_max], rails included, and 0 outside.

    jnp.clip has gradient 1/2 exactly at a bound, and after rounding every code on a rail sits there.

    >>> jax.vmap(jax.grad(lambda r: clip_ste(r, 0.0, 3.0)))(jnp.array([-1.0, 0.0, 3.0, 4.0])).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    inside = (r >= q_min) & (r <= q_max)
    return jnp.where(inside, r, jax.lax.stop_gradient(jnp.clip(r, q_min, q_max)))


def round_ties(u: jax.Array, ties: Ties = "half_even") -> jax.Array:
    """Nearest integer; a tie goes to the even neighbour or up.

    >>> round_ties(jnp.array([0.5, 1.5])).tolist(), round_ties(jnp.array([0.5, 1.5]), "half_up").tolist()
    ([0.0, 2.0], [1.0, 2.0])
    """
    return jnp.floor(u + 0.5) if ties == "half_up" else jnp.round(u)


def round_ste(u: jax.Array, ties: Ties = "half_even") -> jax.Array:
    """round(u) with gradient 1. Exact: round(u) - u and its sum with u are representable in f32."""
    return u + jax.lax.stop_gradient(round_ties(u, ties) - u)
