"""Work of one call from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

import jax.numpy as jnp

from qlab.kernels.common import layout
from qlab.kernels.hadamard_quantize import matrices


def flops(n: int, k: int, *, block: int = 0) -> float:
    """Additions of the fast transform, one a stage and element, the base dense; the scaling counts one.

    >>> flops(1, 1024), flops(1, 5120)
    (11264.0, 143360.0)
    """
    m, stages = matrices.decompose(block or k)
    return float(n * k * (stages + (m - 1) + 1))


def num_bytes(n: int, k: int, *, bits: int = 8, x: str = "bfloat16") -> float:
    """Bytes that must move once: x in, codes and f32 scales out (bits 0: the plain transform, like x)."""
    out = layout.row_bytes(k, bits) + 4 if bits else k * jnp.dtype(x).itemsize
    return float(n * (k * jnp.dtype(x).itemsize + out))
