"""What all implementations share around the integer product: token quantization, zero points, dequantization.

With codes q and zero points z, sum_k (xq - zx)(wq - zw) = sum xq wq - zx a - zw b, where
a = sum_k wq - K zw and b = sum_k xq. Everything is int32 and wraps modulo 2^32, so only the final sum
must fit, which `k_limit` guarantees. The order of the float operations is the same everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SCALE_FLOOR = 1e-8

# In primitives, because kernels and their interpreters take no calls; relu keeps NaN and has slope 0 at 0.
ACTIVATIONS = {
    "relu": lambda y: jnp.where(y <= 0.0, 0.0, y),
    "gelu": lambda y: 0.5 * y * (1.0 + lax.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y))),
    "silu": lambda y: y * lax.logistic(y),
}


class Operands(NamedTuple):
    """The arrays of a product in canonical form; None where a term is absent.

    Attributes:
      x: i8[M, K]. w: i8[N, K].
      x_scale: f32[M]. w_scale: f32[N]; both None when the integers are asked for.
      x_zero: i32[M] with w_part: i32[N] (a above). w_zero: i32[N] with x_part: i32[M] (b above).
      bias: f32[N].
    """

    x: jax.Array
    w: jax.Array
    x_scale: jax.Array | None
    w_scale: jax.Array | None
    x_zero: jax.Array | None
    w_part: jax.Array | None
    w_zero: jax.Array | None
    x_part: jax.Array | None
    bias: jax.Array | None


def k_limit(x_zero: bool, w_zero: bool, dynamic: bool = False) -> int:
    """The largest K whose sum fits into int32 whatever the codes: |q| <= 128, |q - z| <= 255.

    >>> k_limit(False, False), k_limit(True, False), k_limit(True, True)
    (131071, 65793, 33025)
    """
    x_most = 127 if dynamic else 255 if x_zero else 128
    return (2**31 - 1) // (x_most * (255 if w_zero else 128))


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes i8[M, K] in [-127, 127], scale f32[M]): scale = max(absmax / 127, 1e-8), half to even.

    A token that holds NaN or inf has scale NaN and codes 0, so its whole row of the product is NaN.

    >>> q, s = quantize_tokens(jnp.array([[127.0, -1.5, 0.5], [0.0, 0.0, 0.0]]))
    >>> q.tolist(), s.tolist()
    ([[127, -2, 0], [0, 0, 0]], [1.0, 9.99999993922529e-09])
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
    # Times 1/127, as XLA turns most / 127 into anyway: written so, every compiler gets the same bits.
    scale = jnp.maximum(most * jnp.float32(1 / 127), SCALE_FLOOR)
    finite = most < jnp.inf  # false for NaN too
    q = jnp.clip(jnp.round(x / scale[:, None]), -127, 127)
    q = jnp.where(finite[:, None], q, 0.0).astype(jnp.int8)
    return q, jnp.where(finite, scale, jnp.nan)


def operands(spec, x, w, x_scale, w_scale, x_zero, w_zero, bias, w_sum) -> Operands:
    """The canonical arrays; quantizes float x, and sums the codes a zero point needs."""
    if spec.options["dynamic"]:
        x, x_scale = quantize_tokens(x)
    w_part = x_part = None
    if x_zero is not None:
        x_zero = x_zero.astype(jnp.int32)
        w_part = jnp.sum(w, axis=1, dtype=jnp.int32) if w_sum is None else w_sum
        if w_zero is not None:
            w_part = w_part - w.shape[1] * w_zero.astype(jnp.int32)
    if w_zero is not None:
        w_zero = w_zero.astype(jnp.int32)
        x_part = jnp.sum(x, axis=1, dtype=jnp.int32)
    return Operands(x, w, x_scale, w_scale, x_zero, w_part, w_zero, x_part, bias)


def finish(acc, o: Operands, activation: str | None, dtype):
    """i32[M, N] -> the result; the vectors of o come shaped to broadcast against acc."""
    if o.x_zero is not None:
        acc = acc - o.x_zero * o.w_part
    if o.w_zero is not None:
        acc = acc - o.w_zero * o.x_part
    if jnp.issubdtype(dtype, jnp.integer):
        return acc
    y = acc.astype(jnp.float32) * o.x_scale * o.w_scale
    if o.bias is not None:
        y = y + o.bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y.astype(dtype)


ROWS = ("x_scale", "x_zero", "x_part")
COLUMNS = ("w_scale", "w_part", "w_zero", "bias")


def broadcast(o: Operands) -> Operands:
    """Row vectors as [M, 1], column vectors as [1, N]."""
    put = {n: getattr(o, n)[:, None] for n in ROWS if getattr(o, n) is not None}
    put |= {n: getattr(o, n)[None, :] for n in COLUMNS if getattr(o, n) is not None}
    return o._replace(**put)
