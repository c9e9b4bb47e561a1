"""x and codes in the blocks that the Pallas kernels read.

A part of p bits of a group is n = group p / 8 bytes, plane j of it the columns j n ... (j + 1) n. Both are
padded to the columns that a kernel wants (`unit` a group); where nothing is padded the codes stay as they
are, and a part is an offset in them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common import layout


def planes(x: jax.Array, p: int, group: int, unit: int, num: int) -> jax.Array:
    """[M, num, v, unit p / 8]: x in the order of a part of p bits, zeros where a group was padded.

    >>> planes(jnp.arange(8)[None], 4, 4, 8, 3).tolist()
    [[[[0, 1, 0, 0], [2, 3, 0, 0]], [[4, 5, 0, 0], [6, 7, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]]
    """
    (m, k), v = x.shape, 8 // p
    have, n = layout.num_groups(k, group), -(-(group or k) * p // 8)
    a = jnp.moveaxis(layout.planes_of(x, p, group).reshape(m, v, have, n), 1, 2)
    return jnp.pad(a, [(0, 0), (0, num - have), (0, 0), (0, unit * p // 8 - n)])


def codes_by_part(
    codes: jax.Array, k: int, bits: int, group: int, unit: int, num: int, rows: int
) -> list[tuple[jax.Array, int]]:
    """(u8[rows, ...], first byte) of each part; one array for all if nothing but rows is padded.

    Padding copies the weights at every call: K, group and N that need none are faster.
    """
    below = (0, rows - codes.shape[0])
    have = layout.num_groups(k, group)
    if unit == (group or k) and num == have:
        whole = jnp.pad(codes, [below, (0, 0)]) if below[1] else codes
        out, at = [], 0
        for p, _ in layout.parts(bits):
            out.append((whole, at))
            at += num * unit * p // 8
        return out
    out = []
    split = layout.split(codes, k, bits, group)
    for (p, _), byte in zip(layout.parts(bits), split, strict=True):
        n = -(-(group or k) * p // 8)
        a = byte.reshape(-1, have, n)
        a = jnp.pad(a, [below, (0, num - have), (0, unit * p // 8 - n)])
        out.append((a.reshape(rows, -1), 0))
    return out
