"""x @ w_hat.T for group-sparse quantized weights: dispatch, checks and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, dispatch, layout
from qlab.kernels.group_sparse_matmul import pallas_gpu, pallas_tpu, reference, xla
from qlab.kernels.group_sparse_matmul.bsr import (
    BSR,
    OP,
    Plan,
    bits_per_weight,
    from_dense,
    make_plan,
    partition_tasks,
    to_dense,
)

__all__ = [
    "BSR",
    "IMPLS",
    "Plan",
    "bits_per_weight",
    "from_dense",
    "group_sparse_matmul",
    "make_plan",
    "partition_tasks",
    "spec_of",
    "to_dense",
]

IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def spec_of(
    m: int,
    k: int,
    n: int,
    nnz: int,
    *,
    bits: int,
    group: int,
    chunk: int = 0,
    x_dtype: str = "bfloat16",
    zero: bool = True,
    bias: bool = False,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call, also for a device that is not at hand. chunk: that of a given plan, 0 without."""
    here = dispatch.here(platform, device)
    options = {"bits": bits, "group": group, "zero": zero, "bias": bias, "chunk": chunk}
    dims = {"m": m, "k": k, "n": n, "nnz": nnz}
    return dispatch.Spec(OP, dims, {"x": x_dtype}, options, *here, interpret)


def group_sparse_matmul(
    x: jax.Array,
    bsr: BSR,
    bias: jax.Array | None = None,
    *,
    bits: int,
    group: int,
    plan: Plan | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = x @ w_hat.T + bias, w_hat = scale (code - zero) in the kept 1 x G groups, 0 elsewhere.

    The Pallas kernels cut the flat list of kept groups into equal contiguous chunks whatever the row
    lengths (task-centric, GQSA section "engine"); rows that a cut splits are added up afterwards.

    Args:
      x: bf16, f16 or f32 [..., K].
      bsr: row_ptr i32[N + 1] rising from 0 to nnz; col_idx i16 or i32[nnz] below K / G; codes
        u8[nnz, layout.row_bytes(G, bits)]; scale float[nnz]; zero float[nnz], or None: code 2^(bits - 1)
        stands for 0. What row_ptr and col_idx hold cannot be checked at trace time: indices out of range
        give unspecified numbers.
      bias: f32[N] or None.
      bits: 1 to 8. group: G, a multiple of 8 that divides K.
      plan: `make_plan(row_ptr, nnz, chunk)`, built once. None: built in the call, and with an abstract
        row_ptr (under jit) for the worst case of rows a chunk.
      impl: run this implementation or raise; None: the first that can. interpret: run Pallas kernels in
        their interpreter (tests).
    Returns:
      [..., N] in the dtype of x, accumulated in float32. A row of x with NaN or inf gives NaN or inf
      where its group is kept; the other results of that row are unspecified (0 * inf), other rows of x
      are untouched. A row of w without groups gives the bias.
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run here.

    Differentiable in x, scale, zero and bias (the gradient of the XLA form); codes and indices are
    integers and have no gradient.
    """
    checks.dtype(OP, "x", x, FLOATS)
    checks.one_of(OP, "bits", bits, range(1, 9))
    k, lead = x.shape[-1], x.shape[:-1]
    checks.group(OP, group, k)
    if not group:
        checks.fail(OP, "group=0; a group-sparse weight needs a group, e.g. 16")
    checks.dtype(OP, "row_ptr", bsr.row_ptr, (jnp.int32,))
    checks.shape(OP, "row_ptr", bsr.row_ptr, (None,), "N + 1 entries")
    if not bsr.row_ptr.shape[0]:
        checks.fail(OP, "row_ptr is empty; it has N + 1 entries, the first is 0")
    checks.dtype(OP, "col_idx", bsr.col_idx, (jnp.int16, jnp.int32))
    checks.shape(OP, "col_idx", bsr.col_idx, (None,), "one column group for each kept group")
    n, nnz = bsr.row_ptr.shape[0] - 1, bsr.col_idx.shape[0]
    checks.dtype(OP, "codes", bsr.codes, (jnp.uint8,))
    width = layout.row_bytes(group, bits)
    checks.shape(OP, "codes", bsr.codes, (nnz, width), f"{bits} bits, group={group}")
    for name, a in (("scale", bsr.scale), ("zero", bsr.zero)):
        if a is not None:
            checks.shape(OP, name, a, (nnz,), "one for each kept group")
            checks.dtype(OP, name, a, FLOATS)
    if bias is not None:
        checks.shape(OP, "bias", bias, (n,))
    if plan is not None:
        p, chunk = plan.slot.shape
        if p != max(1, -(-nnz // chunk)) or plan.row.shape != (1, p * chunk):
            checks.fail(
                OP, f"plan is for {p} chunks of {chunk}; build it with make_plan for nnz={nnz}"
            )
    spec = spec_of(
        int(np.prod(lead)), k, n, nnz, bits=bits, group=group, chunk=plan.slot.shape[1] if plan else 0,
        x_dtype=x.dtype.name, zero=bsr.zero is not None, bias=bias is not None, interpret=interpret,
    )  # fmt: skip
    y = _call(spec, impl, x.reshape(-1, k), *bsr, bias, *(plan or (None, None, None)))
    return y.reshape(*lead, n)


_call = dispatch.differentiable(IMPLS, gradient=xla.IMPL)
