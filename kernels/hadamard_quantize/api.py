"""Block Hadamard transform along the last axis, plain or fused with quantization of each token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, dispatch, layout
from qlab.kernels.hadamard_quantize import matrices, pallas_gpu, pallas_tpu, reference, xla

OP = "hadamard_quantize"
IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)


def spec_of(
    n: int,
    k: int,
    *,
    bits: int = 8,
    block: int = 0,
    inverse: bool = False,
    x_dtype: str = "bfloat16",
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call, also for a device that is not at hand. bits 0: the plain transform."""
    here = dispatch.here(platform, device)
    options = {"bits": bits, "block": block or k, "inverse": inverse}
    return dispatch.Spec(OP, {"n": n, "k": k}, {"x": x_dtype}, options, *here, interpret)


def hadamard(
    x: jax.Array,
    *,
    block: int = 0,
    inverse: bool = False,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = H x for each block of the last axis, H orthogonal (entries +-1 / sqrt(block)).

    H = S (x) B: Sylvester's matrix of order 2^k, base B innermost; B is 1 for a power of two, else Paley's
    (12, 20, 28, 36, ...: every order m 2^k of `matrices.decompose`).

    Args:
      x: bf16, f16 or f32 [..., K]. block: size of a block, a divisor of K; 0: K.
      inverse: H^T x, which undoes H x. impl, interpret: as everywhere in qlab.kernels.
    Returns:
      Like x, computed in float32 and rounded once. NaN or inf makes all of its block NaN or inf.
    Raises:
      ValueError: no Hadamard matrix of that order is known here (names the nearest), or another argument
      does not fit. NotImplementedError: the named implementation cannot run here.

    Differentiable, linear: the gradient is the transpose, that is the inverse, of the cotangent.

    >>> hadamard(jnp.array([[4.0, 0.0, 0.0, 0.0]])).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """
    _check(x, block)
    return _hadamard((block or x.shape[-1], bool(inverse), impl, interpret), x)


def hadamard_quantize(
    x: jax.Array,
    *,
    bits: int = 8,
    block: int = 0,
    impl: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scale of y = H x, one scale for each token (row of the last axis), without storing y.

    Args:
      x: bf16, f16 or f32 [..., K]. bits: 2 to 8. block: as in `hadamard`.
    Returns:
      (codes, scale f32[..., 1]), y_hat = scale * code with code in [-2^(b-1), 2^(b-1) - 1] and scale =
      max |y| / (2^(b-1) - 1), at least 1e-8, rounding half to even. 8 bits: codes i8[..., K]. Fewer:
      u8[..., row_bytes(K, bits)], code + 2^(b-1) packed by `kernels.common.layout` with group 0.
      y is not rounded to the dtype of x in between.
    Raises: as `hadamard`.

    Implementations add in different orders, so their scales agree to about 1e-6 and a code may differ by
    one where y / scale is within that of a tie. NaN or inf in a token: scale inf and codes of 0, so all of
    the token decodes to NaN. Codes have no gradient (x is taken through stop_gradient); for training use
    `hadamard_fake`.
    """
    _check(x, block)
    checks.one_of(OP, "bits", bits, range(2, 9))
    lead, k = x.shape[:-1], x.shape[-1]
    x = jax.lax.stop_gradient(x)
    codes, scale = _run(x, bits, block or k, False, impl, interpret)
    return codes.reshape(*lead, codes.shape[-1]), scale.reshape(*lead, 1)


def decode(codes: jax.Array, scale: jax.Array, k: int, *, bits: int = 8) -> jax.Array:
    """f32[..., K]: what the codes of `hadamard_quantize` stand for (still transformed)."""
    if bits < 8:
        codes = layout.unpack(codes, k, bits).astype(jnp.float32) - 2.0 ** (bits - 1)
    return scale * codes.astype(jnp.float32)


def hadamard_fake(
    x: jax.Array,
    *,
    bits: int = 8,
    block: int = 0,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """decode(hadamard_quantize(x)) in the dtype of x, for training: the gradient passes straight through.

    The grid spans the whole token, so no value is clipped; the rounding has the gradient of the identity
    and the scale is held constant, which leaves H^T dy.
    """
    _check(x, block)
    checks.one_of(OP, "bits", bits, range(2, 9))
    return _fake((bits, block or x.shape[-1], impl, interpret), x)


def _check(x: jax.Array, block: int) -> None:
    checks.dtype(OP, "x", x, (jnp.bfloat16, jnp.float16, jnp.float32))
    if x.ndim < 1 or not x.shape[-1]:
        checks.fail(OP, f"x has shape {x.shape}; a last axis of at least one column is needed")
    k = x.shape[-1]
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        checks.fail(OP, f"block={block!r}; use 0 for the whole axis or the size of a block")
    size, name = (block, f"block={block}") if block else (k, f"K={k}")
    if not matrices.decompose(size):
        below, above = matrices.nearest(size)
        fits = matrices.largest_block(k)
        checks.fail(
            OP,
            f"no Hadamard matrix of order {name} is known here; nearest {below} and {above}, or use "
            f"block={fits}, the largest that divides K={k}",
        )
    if k % size:
        fits = matrices.largest_block(k)
        checks.fail(
            OP, f"block={size} does not divide K={k}; the largest that does is block={fits}"
        )


def _run(x, bits: int, block: int, inverse: bool, impl, interpret: bool):
    lead, k = x.shape[:-1], x.shape[-1]
    n = int(np.prod(lead))
    spec = spec_of(
        n, k, bits=bits, block=block, inverse=inverse, x_dtype=x.dtype.name, interpret=interpret
    )
    if not n:  # a grid without blocks; the name is still checked
        dispatch.candidates(IMPLS, spec, impl)
        impl = "reference"
    return dispatch.run(IMPLS, spec, x.reshape(n, k), impl=impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hadamard(static, x):
    block, inverse, impl, interpret = static
    return _run(x, 0, block, inverse, impl, interpret).reshape(x.shape)


def _hadamard_backward(static, _, dy):
    block, inverse, impl, interpret = static
    return (_hadamard((block, not inverse, impl, interpret), dy),)


_hadamard.defvjp(lambda static, x: (_hadamard(static, x), None), _hadamard_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake(static, x):
    bits, block, impl, interpret = static
    codes, scale = _run(x, bits, block, False, impl, interpret)
    return decode(codes, scale, x.shape[-1], bits=bits).astype(x.dtype).reshape(x.shape)


def _fake_backward(static, _, dy):
    _, block, impl, interpret = static
    return (_hadamard((block, True, impl, interpret), dy),)


_fake.defvjp(lambda static, x: (_fake(static, x), None), _fake_backward)
