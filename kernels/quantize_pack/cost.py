"""Work of one call from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

import jax.numpy as jnp

from qlab.kernels.common import layout

# Threefry-2x32-20: 20 rounds of add, two shifts, or, xor, and 5 key additions of 2 or 3 words.
OPS_STOCHASTIC = 20 * 5 + 5 * 3


def num_bytes(
    n: int, k: int, *, bits: int, group: int = 0, x: str = "bfloat16", zero: bool = False
) -> float:
    """Bytes that must move once: x in, packed codes, f32 scales and zero points out.

    >>> num_bytes(4096, 4096, bits=4, group=128)
    42467328.0
    """
    side = 4 * (1 + zero) * layout.num_groups(k, group)
    return float(n * (k * jnp.dtype(x).itemsize + layout.row_bytes(k, bits, group) + side))


def int_ops(n: int, k: int, *, rounding: str = "half_even") -> float:
    """32-bit integer operations of the random words; the rest (about ten an element) is not counted."""
    return float(n * k * OPS_STOCHASTIC) if rounding == "stochastic" else 0.0
