"""Work of one product from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

import jax.numpy as jnp

from qlab.kernels.common import layout


def flops(m: int, k: int, n: int) -> float:
    """Multiply-adds count twice; unpacking and scaling are not counted."""
    return 2.0 * m * k * n


def num_bytes(
    m: int, k: int, n: int, *, bits: int, group: int = 0, x: str = "bfloat16", per_group: int = 4
) -> float:
    """Bytes that must move once: packed codes, scales (per_group bytes a group), x in, y out.

    >>> num_bytes(1, 8192, 8192, bits=4, group=128)
    35684352.0
    """
    weights = n * layout.row_bytes(k, bits, group) + per_group * n * layout.num_groups(k, group)
    return float(weights + jnp.dtype(x).itemsize * (m * k + m * n))
