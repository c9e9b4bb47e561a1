"""Work of one product from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

import jax.numpy as jnp


def flops(m: int, k: int, n: int) -> float:
    """int8 multiply-adds count twice; quantization and the epilogue are not counted."""
    return 2.0 * m * k * n


def num_bytes(
    m: int, k: int, n: int, *, x: str = "int8", out: str = "bfloat16", bias: bool = False
) -> float:
    """Bytes that must move once: both operands, one f32 scale a token and a channel, bias, y.

    >>> num_bytes(1, 8192, 8192)
    67166212.0
    """
    return float(
        m * k * jnp.dtype(x).itemsize
        + n * k
        + 4 * (m + n)
        + 4 * n * bias
        + m * n * jnp.dtype(out).itemsize
    )
