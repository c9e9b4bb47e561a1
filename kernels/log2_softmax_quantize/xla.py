"""Codes and their product for XLA: the CPU default and the fallback everywhere.

A sum of shifted integers is a product with powers of two. A power up to 2^20 is cut into signed bytes, so
the shifts become two or three int8 matrix products with int32 sums, equal to the shifts bit for bit.
Float values multiply exact powers of two; for bf16 and f16 even and odd log-sqrt2 codes are two products,
so that no weight is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.log2_softmax_quantize import levels, reference

_BATCHED = (((2,), (1,)), ((0,), (0,)))


def integer_product(q, v, o) -> jax.Array:
    """f32[B, R, D] from i32 codes [B, R, C] and i8 values [B, C, D]."""
    f, total = o["fraction"], 0.0
    for odd, (e, counts) in enumerate(levels.parities(q, o["bits"], o["base"], o["zero_code"])):
        part = 0
        for j, digit in enumerate(levels.digits(e, counts, f)):
            dot = jax.lax.dot_general(
                digit.astype(jnp.int8), v, _BATCHED, preferred_element_type=jnp.int32
            )
            part = part + (dot << (levels.DIGIT * j))
        total = total + part.astype(jnp.float32) * (levels.SQRT2 if odd else 1.0)
    return total * 2.0**-f


def attend(spec: Spec, codes, v) -> jax.Array:
    o, q = spec.options, codes.astype(jnp.int32)
    if v.dtype == jnp.int8:
        return integer_product(q, v, o)
    if v.dtype == jnp.float32:
        p = levels.weight(q, o["bits"], o["base"], o["zero_code"])
        return jax.lax.dot_general(
            p, v, _BATCHED, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    total = 0.0
    for odd, (e, counts) in enumerate(levels.parities(q, o["bits"], o["base"], o["zero_code"])):
        p = jnp.where(counts, levels.power(e), 0.0).astype(v.dtype)
        dot = jax.lax.dot_general(p, v, _BATCHED, preferred_element_type=jnp.float32)
        total = total + dot * (levels.SQRT2 if odd else 1.0)
    return total.astype(v.dtype)


IMPL = Impl("xla", lambda spec: "", reference.run)  # XLA fuses the written-out form into two passes
ATTEND = Impl("xla", lambda spec: "", attend)
