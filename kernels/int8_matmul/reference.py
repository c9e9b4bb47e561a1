"""The product written out: widen the codes to int32, subtract the zero points, multiply. Slow, exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.int8_matmul.epilogue import ACTIVATIONS, quantize_tokens


def run(spec: Spec, x, w, x_scale, w_scale, x_zero, w_zero, bias, w_sum) -> jax.Array:
    if spec.options["dynamic"]:
        x, x_scale = quantize_tokens(x)
    xi, wi = x.astype(jnp.int32), w.astype(jnp.int32)
    if x_zero is not None:
        xi = xi - x_zero.astype(jnp.int32)[:, None]
    if w_zero is not None:
        wi = wi - w_zero.astype(jnp.int32)[:, None]
    acc = jnp.matmul(xi, wi.T)
    dtype = jnp.dtype(spec.options["out"])
    if dtype == jnp.int32:
        return acc
    y = acc.astype(jnp.float32) * x_scale[:, None] * w_scale[None, :]
    if bias is not None:
        y = y + bias
    if spec.options["activation"] is not None:
        y = ACTIVATIONS[spec.options["activation"]](y)
    return y.astype(dtype)


IMPL = Impl("reference", lambda spec: "", run)
