"""The packed layout of all kernels: planar inside each group of columns.

A row of K codes is cut into G groups of g columns. A width b is a sum of powers of two (3 = 2 + 1), and
each such part of p bits is stored by itself, low bits first: with v = 8 / p values a byte and
n = ceil(g / v) bytes a group, byte r of a group holds the columns r, n + r, 2 n + r, ... of the group,
the first in its lowest bits. One shift and one mask so unpack a whole plane of neighbouring columns,
and a product needs no interleaving: `planes_of` brings x into the same order once.
Codes are unsigned; a symmetric code is stored plus 2^(b-1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def parts(bits: int) -> tuple[tuple[int, int], ...]:
    """(width p, first bit) of the parts of a code of `bits` bits, low bits first.

    >>> parts(4), parts(3), parts(7)
    (((4, 0),), ((2, 0), (1, 2)), ((4, 0), (2, 4), (1, 6)))
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} cannot be packed; use 1 to 8")
    out, first = [], 0
    for p in (8, 4, 2, 1):
        if bits - first >= p:
            out.append((p, first))
            first += p
    return tuple(out)


def num_groups(k: int, group: int) -> int:
    """Groups of a row; group 0 is one group of the whole row.

    >>> num_groups(100, 32), num_groups(100, 0)
    (4, 1)
    """
    return -(-k // group) if group else 1


def part_bytes(k: int, group: int, p: int) -> int:
    """Bytes that a part of p bits takes in a row of k codes."""
    g = group or k
    return num_groups(k, group) * -(-g * p // 8)


def row_bytes(k: int, bits: int, group: int = 0) -> int:
    """Bytes of a packed row of k codes.

    >>> row_bytes(4096, 4, 128), row_bytes(4096, 3, 128), row_bytes(13, 4), row_bytes(9, 3)
    (2048, 1536, 7, 5)
    """
    return sum(part_bytes(k, group, p) for p, _ in parts(bits))


def pack(codes: jax.Array, bits: int, group: int = 0) -> jax.Array:
    """u8[..., row_bytes] from unsigned codes [..., K] below 2^bits; a short last group is padded with 0.

    >>> pack(jnp.array([[1, 2, 3, 4]]), 4).tolist()  # 1 + 16 * 3, 2 + 16 * 4
    [[49, 66]]
    """
    k, lead = codes.shape[-1], codes.shape[:-1]
    g, num = group or k, num_groups(k, group)
    value = codes.astype(jnp.int32)
    value = jnp.pad(value, [(0, 0)] * len(lead) + [(0, num * g - k)]).reshape(*lead, num, g)
    out = []
    for p, first in parts(bits):
        v = 8 // p
        part = (value >> first) & (2**p - 1)
        n = -(-g // v)
        part = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, -g % v)])
        part = part.reshape(*lead, num, v, n) << (p * jnp.arange(v, dtype=jnp.int32)[:, None])
        out.append(part.sum(-2, dtype=jnp.int32).astype(jnp.uint8).reshape(*lead, num * n))
    return jnp.concatenate(out, -1)


def split(packed: jax.Array, k: int, bits: int, group: int = 0) -> list[jax.Array]:
    """The bytes of each part of `parts(bits)`: u8[..., part_bytes]."""
    ends, at = [], 0
    for p, _ in parts(bits):
        at += part_bytes(k, group, p)
        ends.append(at)
    return jnp.split(packed, ends[:-1], axis=-1)


def unpack(packed: jax.Array, k: int, bits: int, group: int = 0) -> jax.Array:
    """The exact inverse of `pack`: u8[..., K].

    >>> unpack(pack(jnp.arange(5) % 8, 3, 4), 5, 3, 4).tolist()
    [0, 1, 2, 3, 4]
    """
    lead, g, num = packed.shape[:-1], group or k, num_groups(k, group)
    code = jnp.zeros((), jnp.uint8)
    for (p, first), byte in zip(parts(bits), split(packed, k, bits, group), strict=True):
        v = 8 // p
        n = -(-g // v)
        if v == 1:
            plane = byte.reshape(*lead, num, n)
        else:
            shift = (p * jnp.arange(v, dtype=jnp.uint8))[:, None]
            plane = (byte.reshape(*lead, num, 1, n) >> shift) & jnp.uint8(2**p - 1)
            plane = plane.reshape(*lead, num, v * n)[..., :g]
        code = code | (plane << jnp.uint8(first))
    return code.reshape(*lead, num * g)[..., :k]


def planes_of(x: jax.Array, p: int, group: int = 0) -> jax.Array:
    """x [..., K] in the order of a part of p bits: [..., v, part_bytes], zero where the layout pads.

    sum_c x[c] part[c] = sum_j sum_r planes_of(x)[j, r] ((bytes[r] >> p j) & (2^p - 1)).

    >>> planes_of(jnp.arange(8), 4, 4).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    k, lead, v = x.shape[-1], x.shape[:-1], 8 // p
    g, num = group or k, num_groups(k, group)
    n = -(-g // v)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, num * g - k)]).reshape(*lead, num, g)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -g % v)]).reshape(*lead, num, v, n)
    return jnp.moveaxis(x, -2, -3).reshape(*lead, v, num * n)
