"""The product for XLA: the CPU default and the fallback everywhere.

The weights are dequantized in the dtype of x where a matrix unit takes it (bf16, f16), so the CPU's
bf16 unit does the product, accumulating in float32; one weight then carries a relative rounding error
of at most 2^-8 (bf16) or 2^-11 (f16), as much as x itself. For f32 x, and for a single row, everything
stays in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common import layout
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.weight_only_matmul.reference import epilogue


def weights(codes, scale, zero, offset, k: int, bits: int, group: int, dtype) -> jax.Array:
    """[N, K] in `dtype`; code - zero is exact, the products are rounded once."""
    n, g = codes.shape[0], group or k
    num = layout.num_groups(k, group)
    q = layout.unpack(codes, num * g, bits, group).reshape(n, num, g)
    if zero is not None:
        w = (q.astype(jnp.float32) - zero.astype(jnp.float32)[..., None]) * scale[..., None]
    else:
        low = 0 if offset is not None else 2 ** (bits - 1)
        w = (q.astype(jnp.int32) - low).astype(jnp.float32) * scale[..., None]
    if offset is not None:
        w = w + offset[..., None]
    return w.astype(dtype).reshape(n, num * g)[:, :k]


def run(spec: Spec, x, codes, scale, zero, offset, bias) -> jax.Array:
    o, (m, k) = spec.options, x.shape
    narrow = x.dtype != jnp.float32 and m > 1
    dtype = x.dtype if narrow else jnp.float32
    w = weights(codes, scale, zero, offset, k, o["bits"], o["group"], dtype)
    y = jax.lax.dot_general(
        x.astype(dtype),
        w,
        (((1,), (1,)), ((), ())),
        precision=None if narrow else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return epilogue(y, bias, o["activation"], x.dtype)


IMPL = Impl("xla", lambda spec: "", run)
