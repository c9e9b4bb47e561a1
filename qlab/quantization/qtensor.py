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

Ties = Literal["half_even", "half_up"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "offset"],
    meta_fields=["bits", "axes", "shape", "packed"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """x_hat = scale * (codes - zero) + offset, for every kind of uniform grid.

    Attributes:
      codes: u8 (asymmetric) or i8 (symmetric) integers of shape `shape`, its last axis padded to a
        multiple of the group; packed: u8 bit stream, see qlab.quantization.packing.
      scale: f32, broadcasts against codes; an axis may also hold one entry per group of neighbours.
      zero: integer-valued f32 like scale, or None (symmetric). offset: real f32 like scale, or None.
      bits: width of a code. axes: axes of `shape` over which one scale is shared.
      shape: true shape of x_hat, without batch axes added by vmap. packed: codes are a bit stream.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    offset: jax.Array | None = None
    bits: int = 8
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    packed: bool = False

    def __repr__(self) -> str:
        grid = "symmetric" if self.zero is None and self.offset is None else "asymmetric"
        store = "packed" if self.packed else str(getattr(self.codes, "dtype", "?"))
        shape = " x ".join(map(str, self.shape))
        scales = getattr(self.scale, "shape", "?")
        return f"QTensor({shape}, {self.bits} bits {grid}, scales {scales}, codes {store})"

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are held now (packed or not)."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def stored_bits(self) -> float:
        """Bits per weight once packed: codes, scales (f32), integer zeros (one byte), offsets (f32)."""
        rows = math.prod(self.shape[:-1])
        num = rows * math.ceil(self.shape[-1] * self.bits / 8)
        num += 4 * self.scale.size
        num += self.zero.size if self.zero is not None else 0
        num += 4 * self.offset.size if self.offset is not None else 0
        return 8 * num / math.prod(self.shape)


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
    >>> dequantize(qt).tolist()
    [[-0.5, 1.0]]
    """
    codes = qt.codes
    if qt.packed:
        from qlab.quantization.packing import unpack

        low = 0 if qt.zero is not None or qt.offset is not None else -(2 ** (qt.bits - 1))
        width = -(-qt.shape[-1] // (g := _group(qt))) * g
        codes = unpack(codes, qt.bits, width, q_min=low)
    q = codes.astype(jnp.float32)
    shape = codes.shape
    if qt.zero is not None:
        q = q - expand(qt.zero, shape)
    x = q * expand(qt.scale, shape)
    if qt.offset is not None:
        x = x + expand(qt.offset, shape)
    return x[..., : qt.shape[-1]] if qt.shape else x


def _group(qt: QTensor) -> int:
    """Columns per scale, from the number of scales of a row."""
    groups = qt.scale.shape[-1]
    return 1 if groups == 1 else -(-qt.shape[-1] // groups)


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
