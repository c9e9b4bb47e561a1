"""The product written out: make the weights dense in float32, multiply in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.group_sparse_matmul.bsr import BSR, to_dense


def finish(y: jax.Array, bias, dtype) -> jax.Array:
    """f32[M, N] accumulator -> the result: bias, cast."""
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def run(spec: Spec, x, row_ptr, col_idx, codes, scale, zero, bias, *plan) -> jax.Array:
    o = spec.options
    bsr = BSR(row_ptr, col_idx, codes, scale, zero)
    w = to_dense(bsr, x.shape[1], bits=o["bits"], group=o["group"])
    y = jnp.matmul(x.astype(jnp.float32), w.T, precision=jax.lax.Precision.HIGHEST)
    return finish(y, bias, x.dtype)


IMPL = Impl("reference", lambda spec: "", run)
