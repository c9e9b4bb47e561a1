"""x @ dequantize(w).T with packed low-bit weights: dispatch, checks and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, dispatch, layout
from qlab.kernels.weight_only_matmul import pallas_gpu, pallas_tpu, reference, xla

OP = "weight_only_matmul"
IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)


def spec_of(
    m: int,
    k: int,
    n: int,
    *,
    bits: int,
    group: int = 0,
    x_dtype: str = "bfloat16",
    kind: str = "symmetric",
    activation: str | None = None,
    bias: bool = False,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call, also for a device that is not at hand. kind: symmetric, zero, offset or both."""
    here = dispatch.here(platform, device)
    options = {"bits": bits, "group": group, "kind": kind, "activation": activation, "bias": bias}
    dims = {"m": m, "k": k, "n": n}
    return dispatch.Spec(OP, dims, {"x": x_dtype}, options, *here, interpret)


def weight_only_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    offset: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    bits: int,
    group: int = 0,
    activation: str | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = activation(x @ w_hat.T + bias), w_hat = scale (code - zero) + offset per group of columns.

    Args:
      x: bf16, f16 or f32 [..., K].
      codes: u8[N, layout.row_bytes(K, bits, group)], unsigned codes packed by `kernels.common.layout`.
      scale: f32[N, G], G = K / group or 1. zero, offset: f32 like scale or None. Without both the grid is
        symmetric and code 2^(b-1) stands for 0.
      bias: f32[N] or None.
      bits: 1 to 8. group: columns that share a scale, a multiple of 8 that divides K; 0: the whole row.
      activation: None, "relu", "gelu" (tanh form) or "silu".
      impl: run this implementation or raise; None: the first that can. interpret: run Pallas kernels in
        their interpreter (tests).
    Returns:
      [..., N] in the dtype of x, accumulated in float32. A NaN in x makes its row of y NaN, an infinity
      makes it infinite or NaN (which of the two may differ between implementations); other rows are as
      without it. Codes cannot hold either.
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run here.

    Differentiable in x, scale, zero, offset and bias (the gradient of the XLA form); codes are integers
    and have no gradient.
    """
    checks.dtype(OP, "x", x, (jnp.bfloat16, jnp.float16, jnp.float32))
    checks.dtype(OP, "codes", codes, (jnp.uint8,))
    checks.one_of(OP, "bits", bits, range(1, 9))
    checks.one_of(OP, "activation", activation, (None, *reference.ACTIVATIONS))
    k, lead = x.shape[-1], x.shape[:-1]
    checks.group(OP, group, k)
    width = layout.row_bytes(k, bits, group)
    checks.shape(OP, "codes", codes, (None, width), f"{bits} bits, K={k}, group={group}")
    n, num = codes.shape[0], layout.num_groups(k, group)
    for name, a in (("scale", scale), ("zero", zero), ("offset", offset)):
        if a is not None:
            checks.shape(OP, name, a, (n, num), f"one for each of {num} groups of K={k}")
    if bias is not None:
        checks.shape(OP, "bias", bias, (n,))
    kind = "_".join(["zero"] * (zero is not None) + ["offset"] * (offset is not None))
    spec = spec_of(
        int(np.prod(lead)), k, n, bits=bits, group=group, x_dtype=x.dtype.name,
        kind=kind or "symmetric", activation=activation, bias=bias is not None, interpret=interpret,
    )  # fmt: skip
    y = _call(spec, impl, x.reshape(-1, k), codes, scale, zero, offset, bias)
    return y.reshape(*lead, n)


_call = dispatch.differentiable(IMPLS, gradient=xla.IMPL)
