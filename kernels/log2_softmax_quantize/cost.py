"""Work from shapes alone; the bound is the slower of arithmetic and traffic."""

from __future__ import annotations

from qlab.kernels.log2_softmax_quantize import levels

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}


def num_bytes(b: int, r: int, c: int, *, z: str = "bfloat16", mask: bool = False) -> float:
    """Bytes of the quantizer that must move once: logits in, a mask in, codes out.

    >>> num_bytes(1, 4096, 4096)
    50331648.0
    """
    return float(b * r * c * (BYTES[z] + mask + 1))


def attend_bytes(b: int, r: int, c: int, d: int, *, v: str = "int8") -> float:
    """Bytes of the product that must move once: codes and values in, f32 (int8 v) or v's type out."""
    return float(b * (r * c + c * d * BYTES[v] + r * d * (4 if v == "int8" else BYTES[v])))


def attend_flops(
    b: int,
    r: int,
    c: int,
    d: int,
    *,
    bits: int,
    base: str,
    zero_code: str = "reserve",
    v: str = "int8",
) -> float:
    """Multiply-adds of the matrix products count twice: one product a byte of the weights (int8 v), one a
    parity (log-sqrt2).

    >>> attend_flops(1, 1, 1, 1, bits=4, base="log2"), attend_flops(1, 1, 1, 1, bits=4, base="log_sqrt2")
    (6.0, 8.0)
    """
    num = levels.STEPS[base]
    if v == "int8":
        num *= levels.num_digits(levels.fraction_bits(bits, base, zero_code))
    elif v == "float32":
        num = 1
    return 2.0 * num * b * r * c * d
