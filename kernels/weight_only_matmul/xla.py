"""The product for XLA: the CPU default and the fallback everywhere.

The weights are dequantized in the dtype of x where a matrix unit takes it, accumulating in float32; one
weight then carries a relative rounding error of at most 2^-9 (bf16) or 2^-12 (f16), as much as x itself.
That is bf16 and f16 on accelerators and bf16 on CPUs with a bf16 unit; elsewhere, for f32 x and for a
single row, everything stays in float32, which is both exact and faster there.

Up to FEW rows multiply one plane of the layout after the other: a plane's weights are made in the order in
which its bytes lie (0.5 ms at 1024 x 1024 on two cores), where the weights as a whole must be interleaved
first (1.8 ms). With more rows the products and the sums of the planes cost as much again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common import layout
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.weight_only_matmul.reference import epilogue

FEW = 512  # rows of x up to which planes are multiplied one by one


def real(q, scale, zero, offset, bits: int, dtype) -> jax.Array:
    """Codes u8[N, G, C] -> weights in `dtype`, rounded once: code - zero is exact."""
    if zero is not None:
        q = q.astype(jnp.float32) - zero.astype(jnp.float32)[..., None]
    else:
        q = (q.astype(jnp.int32) - (0 if offset is not None else 2 ** (bits - 1))).astype(
            jnp.float32
        )
    w = q * scale[..., None]
    return (w if offset is None else w + offset[..., None]).astype(dtype)


def weights(codes, scale, zero, offset, k: int, bits: int, group: int, dtype) -> jax.Array:
    """[N, K] in `dtype`."""
    n, g = codes.shape[0], group or k
    q = layout.unpack(codes, k, bits, group).reshape(n, -1, g)
    return real(q, scale, zero, offset, bits, dtype).reshape(n, k)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """f32[M, N] = x[M, K] @ w[N, K].T."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def by_planes(x, codes, scale, zero, offset, bits: int, group: int) -> jax.Array:
    """f32[M, N], a width of one part only: the sum of the products of its planes."""
    byte = codes.reshape(codes.shape[0], scale.shape[1], -1)
    planes = layout.planes_of(x, bits, group)
    y = jnp.zeros((x.shape[0], codes.shape[0]), jnp.float32)
    for j in range(8 // bits):
        q = (byte >> jnp.uint8(bits * j)) & jnp.uint8(2**bits - 1)
        w = real(q, scale, zero, offset, bits, x.dtype).reshape(codes.shape)
        y = y + dot(planes[:, j], w)
    return y


def narrow(spec: Spec, m: int, dtype) -> bool:
    """Whether the product is done in the dtype of x rather than in float32."""
    if dtype == jnp.float32 or m == 1:
        return False
    return spec.platform != "cpu" or (dtype == jnp.bfloat16 and spec.device != "cpu")


def run(spec: Spec, x, codes, scale, zero, offset, bias) -> jax.Array:
    o, (m, k), dtype = spec.options, x.shape, x.dtype
    bits, group = o["bits"], o["group"]
    x = x if narrow(spec, m, dtype) else x.astype(jnp.float32)
    if m <= FEW and len(layout.parts(bits)) == 1:
        y = by_planes(x, codes, scale, zero, offset, bits, group)
    else:
        y = dot(x, weights(codes, scale, zero, offset, k, bits, group, x.dtype))
    return epilogue(y, bias, o["activation"], dtype)


IMPL = Impl("xla", lambda spec: "", run)
