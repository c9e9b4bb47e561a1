"""Work of one product from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

import jax.numpy as jnp

from qlab.kernels.common import layout


def flops(m: int, nnz: int, group: int) -> float:
    """Multiply-adds of the kept groups count twice; unpacking and scaling are not counted."""
    return 2.0 * m * nnz * group


def num_bytes(
    m: int,
    k: int,
    n: int,
    nnz: int,
    *,
    bits: int,
    group: int,
    x: str = "bfloat16",
    per_group: int = 10,
) -> float:
    """Bytes that must move once: codes, per_group bytes a kept group, row_ptr, x in, y out.

    per_group: f32 scale, f32 zero and i16 column by default; GQSA stores 4.5 (f16, 4 bits, i16).

    >>> num_bytes(1, 4096, 4096, 524288, bits=4, group=16)
    9469956.0
    """
    weights = nnz * (layout.row_bytes(group, bits) + per_group) + 4 * (n + 1)
    return float(weights + jnp.dtype(x).itemsize * (m * k + m * n))
