"""The product for XLA: one int8 x int8 -> int32 dot and a fused epilogue; and the gradient of both entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.int8_matmul.epilogue import (
    ACTIVATIONS,
    broadcast,
    finish,
    operands,
    quantize_tokens,
)


def run(spec: Spec, *arrays) -> jax.Array:
    o = operands(spec, *arrays)
    acc = jax.lax.dot_general(o.x, o.w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return finish(acc, broadcast(o), spec.options["activation"], jnp.dtype(spec.options["out"]))


IMPL = Impl("xla", lambda spec: "", run)


def straight_through(spec: Spec, x, w, x_scale, w_scale, x_zero, w_zero, bias, w_sum) -> jax.Array:
    """x_hat @ w_hat.T in float32 with d x_hat / dx = 1: what the dynamic entry is differentiated as."""
    del x_scale, x_zero, w_sum
    q, scale = quantize_tokens(jax.lax.stop_gradient(x))
    x32 = x.astype(jnp.float32)
    x_hat = x32 + jax.lax.stop_gradient(q * scale[:, None] - x32)
    q_w = w.astype(jnp.float32)
    if w_zero is not None:
        q_w = q_w - w_zero.astype(jnp.float32)[:, None]
    y = jax.lax.dot_general(
        x_hat,
        q_w * w_scale[:, None],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y = y + bias
    if spec.options["activation"] is not None:
        y = ACTIVATIONS[spec.options["activation"]](y)
    return y.astype(jnp.dtype(spec.options["out"]))


GRADIENT = Impl("straight_through", lambda spec: "", straight_through)
