"""Work of one product from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

OUT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
IN_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


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
    return float(m * k * IN_BYTES[x] + n * k + 4 * (m + n) + 4 * n * bias + m * n * OUT_BYTES[out])
