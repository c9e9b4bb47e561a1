"""Codes as a little-endian bit stream: value i of a row occupies bits [i b, (i + 1) b) of the row.

Values are stored minus q_min (so unsigned); a row is padded to whole bytes, ceil(n b / 8) of them.
The codec for exchange: what other projects' files hold is this stream or a permutation of it. A QTensor
is packed in the planar layout of the kernels instead (qlab.kernels.common.layout).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def packed_width(n: int, bits: int) -> int:
    """Bytes of one row of n codes.

    >>> packed_width(8, 3), packed_width(9, 3)
    (3, 4)
    """
    return -(-n * bits // 8)


def pack(codes: jax.Array, bits: int, *, q_min: int = 0) -> jax.Array:
    """u8[..., ceil(n b / 8)] from integer codes [..., n] in [q_min, q_min + 2^b - 1].

    >>> pack(jnp.array([[1, 2, 3]]), 2).tolist()
    [[57]]
    """
    _check(bits)
    n = codes.shape[-1]
    value = (codes.astype(jnp.int32) - q_min).astype(jnp.uint32)
    stream = (value[..., None] >> jnp.arange(bits, dtype=jnp.uint32)) & 1
    stream = stream.reshape(*codes.shape[:-1], n * bits)
    pad = packed_width(n, bits) * 8 - n * bits
    stream = jnp.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, pad)])
    octets = stream.reshape(*codes.shape[:-1], -1, 8)
    return (octets << jnp.arange(8, dtype=jnp.uint32)).sum(-1).astype(jnp.uint8)


def unpack(packed: jax.Array, bits: int, n: int, *, q_min: int = 0) -> jax.Array:
    """The exact inverse of `pack`: u8 codes if q_min = 0, else i8, of shape [..., n]."""
    _check(bits)
    stream = (packed[..., None].astype(jnp.uint32) >> jnp.arange(8, dtype=jnp.uint32)) & 1
    stream = stream.reshape(*packed.shape[:-1], -1)[..., : n * bits]
    values = stream.reshape(*packed.shape[:-1], n, bits) << jnp.arange(bits, dtype=jnp.uint32)
    codes = values.sum(-1).astype(jnp.int32) + q_min
    return codes.astype(jnp.uint8 if q_min == 0 else jnp.int8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} cannot be packed; use 1 to 8")
