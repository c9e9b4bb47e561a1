"""int8 activations times int8 weights, exact in int32, dequantized in the epilogue: checks, dispatch, gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, dispatch
from qlab.kernels.int8_matmul import pallas_gpu, pallas_tpu, reference, xla
from qlab.kernels.int8_matmul.epilogue import ACTIVATIONS, k_limit

OP = "int8_matmul"
IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)
OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def spec_of(
    m: int,
    k: int,
    n: int,
    *,
    x_dtype: str = "int8",
    out: str = "bfloat16",
    zeros: str = "",
    activation: str | None = None,
    bias: bool = False,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call, also for a device that is not at hand.

    Args:
      x_dtype: "int8" for the static entry, a float for the dynamic one.
      zeros: which operands have zero points: "", "x", "w" or "xw".
    """
    here = dispatch.here(platform, device)
    dynamic = x_dtype != "int8"
    options = {
        "dynamic": dynamic, "zeros": zeros, "activation": activation, "bias": bias, "out": out,
    }  # fmt: skip
    dims = {"m": m, "k": k, "n": n}
    return dispatch.Spec(OP, dims, {"x": x_dtype, "w": "int8"}, options, *here, interpret)


def int8_matmul(
    x_codes: jax.Array,
    w_codes: jax.Array,
    x_scale: jax.Array | float | None,
    w_scale: jax.Array | None,
    x_zero: jax.Array | None = None,
    w_zero: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    out_dtype=jnp.float32,
    w_sum: jax.Array | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = activation(x_scale w_scale sum_k (x_codes - x_zero)(w_codes - w_zero) + bias), the sum in int32.

    Args:
      x_codes: i8[..., K]. w_codes: i8[N, K]. Unsigned codes: subtract 128 from them and their zero point.
      x_scale: f32[..., 1], one a token, or a scalar. w_scale: f32[N] or f32[N, 1], one a channel.
      x_zero: i8[..., 1] or a scalar, or None. w_zero: i8[N] or i8[N, 1], or None.
      bias: f32[N] or None. activation: None, "relu", "gelu" (tanh form) or "silu".
      out_dtype: bf16, f16 or f32; or int32 for the integer sum itself, with both scales None.
      w_sum: i32[N] = w_codes.sum(1), if known: x_zero needs it, and it costs a pass over the weights.
      impl: run this implementation or raise; None: the first that can. interpret: run Pallas kernels in
        their interpreter (tests).
    Returns:
      [..., N] in out_dtype. The integer sum is exact, the same bits from every implementation; then it
      is rounded to f32, multiplied by x_scale, by w_scale, plus bias. NaN and inf in a scale or in the
      bias go where float arithmetic takes them; codes cannot hold either.
    Raises:
      ValueError: an argument does not fit, or K is so long that int32 could overflow: more than 131071
        without zero points, 65793 with one, 33025 with both.
      NotImplementedError: the named implementation cannot run here.

    Differentiable in x_scale, w_scale and bias (the gradient of the XLA form). Codes, zero points and
    w_sum are integers and have none (JAX's float0).
    """
    checks.dtype(OP, "x_codes", x_codes, (jnp.int8,))
    lead = x_codes.shape[:-1]
    x_zero = _per_token("x_zero", x_zero, lead, (jnp.int8,))
    integer = jnp.dtype(out_dtype) == jnp.int32
    if integer:
        for name, a in (("x_scale", x_scale), ("w_scale", w_scale), ("bias", bias)):
            if a is not None:
                checks.fail(
                    OP, f"{name} is given with out_dtype=int32, which is the bare sum; use None"
                )
        if activation is not None:
            checks.fail(OP, f"activation={activation!r} with out_dtype=int32; use None")
    else:
        x_scale = _per_token("x_scale", _given("x_scale", x_scale), lead, (jnp.float32,))
    args = (x_codes, w_codes, x_scale, w_scale, x_zero, w_zero, bias, w_sum)
    return _prepare_and_call(_static, args, activation, out_dtype, impl, interpret)


def int8_dynamic_matmul(
    x: jax.Array,
    w_codes: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    out_dtype=None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`int8_matmul` of x quantized token by token: scale = max(absmax / 127, 1e-8), half to even.

    Args:
      x: bf16, f16 or f32 [..., K]; quantized in float32.
      out_dtype: bf16, f16 or f32; None: that of x. The rest as in `int8_matmul`.
    Returns:
      [..., N]. A token that holds NaN or inf gives a row of NaN; other tokens do not see it. A token of
      zeros (or all below 5e-9) has codes 0 and gives activation(bias).
    Raises:
      as `int8_matmul`; K is at most 132104, or 66311 with w_zero.

    Differentiable in x, straight through the rounding and with the scale held: dx = dy @ w_hat, w_hat =
    w_scale (w_codes - w_zero); absmax never clips, so no element is cut off. Also in w_scale and bias.
    Codes and zero points have no gradient (float0).
    """
    checks.dtype(OP, "x", x, OUT_DTYPES)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if jnp.dtype(out_dtype) == jnp.int32:
        checks.fail(OP, "out_dtype=int32 loses the token scales; use bfloat16, float16 or float32")
    args = (x, w_codes, None, w_scale, None, w_zero, bias, None)
    return _prepare_and_call(_dynamic, args, activation, out_dtype, impl, interpret)


def _given(name: str, a):
    if a is None:
        checks.fail(OP, f"{name} is None; only out_dtype=int32 goes without scales")
    return a


def _per_token(name: str, a, lead: tuple[int, ...], dtypes):
    """A scalar or [..., 1] as [M]; differentiably, so that a scalar's gradient is the sum."""
    if a is None:
        return None
    if np.ndim(a) == 0 and not hasattr(a, "dtype"):
        a = jnp.asarray(a, dtypes[0])
    checks.dtype(OP, name, a, dtypes)
    if np.ndim(a) != 0:
        checks.shape(OP, name, a, (*lead, 1), "one a token, or a scalar")
    return jnp.broadcast_to(a, (*lead, 1)).reshape(-1)


def _per_channel(name: str, a, n: int, dtypes):
    if a is None:
        return None
    checks.dtype(OP, name, a, dtypes)
    if np.shape(a) not in ((n,), (n, 1)):
        checks.fail(
            OP, f"{name} has shape {np.shape(a)}, expected ({n},) or ({n}, 1), one a channel"
        )
    return jnp.reshape(a, (n,))


def _prepare_and_call(call, args, activation, out_dtype, impl, interpret):
    x, w, x_scale, w_scale, x_zero, w_zero, bias, w_sum = args
    if x.ndim < 1:
        checks.fail(OP, "x has no axis, expected [..., K]")
    k, lead = x.shape[-1], x.shape[:-1]
    checks.dtype(OP, "w_codes", w, (jnp.int8,))
    checks.shape(OP, "w_codes", w, (None, k), f"[N, K], K={k} as in x")
    n = w.shape[0]
    checks.one_of(OP, "activation", activation, (None, *ACTIVATIONS))
    out = jnp.dtype(out_dtype).name
    names = [jnp.dtype(d).name for d in OUT_DTYPES]
    checks.one_of(OP, "out_dtype", out, (*names, "int32"))
    if out != "int32":
        w_scale = _per_channel("w_scale", _given("w_scale", w_scale), n, (jnp.float32,))
    w_zero = _per_channel("w_zero", w_zero, n, (jnp.int8,))
    if bias is not None:
        checks.dtype(OP, "bias", bias, (jnp.float32,))
        checks.shape(OP, "bias", bias, (n,))
    if w_sum is not None:
        checks.dtype(OP, "w_sum", w_sum, (jnp.int32,))
        checks.shape(OP, "w_sum", w_sum, (n,))
    most = k_limit(x_zero is not None, w_zero is not None, x.dtype != jnp.int8)
    if k > most:
        checks.fail(
            OP, f"K={k} could overflow int32 here; use K <= {most} and add the parts in float"
        )
    m = int(np.prod(lead))
    spec = spec_of(
        m, k, n, x_dtype=x.dtype.name, out=out,
        zeros="x" * (x_zero is not None) + "w" * (w_zero is not None),
        activation=activation, bias=bias is not None, interpret=interpret,
    )  # fmt: skip
    y = call(spec, impl, x.reshape(m, k), w, x_scale, w_scale, x_zero, w_zero, bias, w_sum)
    return y.reshape(*lead, n)


_static = dispatch.differentiable(IMPLS, gradient=xla.IMPL)
_dynamic = dispatch.differentiable(IMPLS, gradient=xla.GRADIENT)
