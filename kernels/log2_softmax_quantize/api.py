"""Softmax to logarithmic codes, and attention times value by shifts: dispatch, checks and gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, dispatch, layout
from qlab.kernels.log2_softmax_quantize import levels, pallas_gpu, pallas_tpu, reference, xla

OP = "log2_softmax_quantize"
IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)
ATTEND_IMPLS = (reference.ATTEND, xla.ATTEND, pallas_gpu.ATTEND, pallas_tpu.ATTEND)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
PACKED = (2, 4)


def spec_of(
    b: int,
    r: int,
    c: int,
    *,
    bits: int,
    base: str = "log2",
    zero_code: str = "reserve",
    causal: bool = False,
    mask: bool = False,
    dtype: str = "float32",
    d: int = 0,
    fraction: int = 0,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call on B matrices R x C, also for a device that is not at hand.

    d > 0: the product with values [C, d] of `dtype` (fraction: its bits below the point); else the
    quantizer of logits of `dtype`.
    """
    here = dispatch.here(platform, device)
    dims = {"b": b, "r": r, "c": c}
    options = {"bits": bits, "base": base, "zero_code": zero_code}
    if d:
        return dispatch.Spec(
            OP, dims | {"d": d}, {"v": dtype}, options | {"fraction": fraction}, *here, interpret
        )
    options |= {"causal": causal, "mask": mask}
    return dispatch.Spec(OP, dims, {"z": dtype}, options, *here, interpret)


def _check_code(bits: int, base: str, zero_code: str, packed: bool) -> None:
    checks.one_of(OP, "bits", bits, range(2, 9))
    checks.one_of(OP, "base", base, tuple(levels.STEPS))
    checks.one_of(OP, "zero_code", zero_code, levels.ZERO_CODES)
    if zero_code == "repo" and bits == 8:
        checks.fail(
            OP, "zero_code='repo' with bits=8 needs code 256; use at most 7 bits or 'reserve'"
        )
    if packed and (bits not in PACKED or zero_code == "repo"):
        fits = "bits 2 or 4 and zero_code 'reserve' or 'clip'"
        checks.fail(OP, f"packed=True with bits={bits}, zero_code={zero_code!r}; use {fits}")


def log2_softmax_quantize(
    logits: jax.Array,
    mask: jax.Array | None = None,
    scale: jax.Array | float = 1.0,
    *,
    bits: int,
    base: str = "log2",
    zero_code: str = "reserve",
    causal: bool = False,
    packed: bool = False,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Codes q = clip(round(-steps log2(softmax(logits) / d))) over the last axis, steps 1 or 2.

    Args:
      logits: f32, bf16 or f16 [..., R, C].
      mask: bool, broadcastable to logits; True: seen. causal: row i sees the columns up to i + C - R.
      scale: d > 0, one number; p > d becomes code 0.
      bits: 2 to 8. base: "log2" (steps 1) or "log_sqrt2" (steps 2).
      zero_code: "reserve" (code 2^b - 1 is 0), "repo" (code 2^b is 0) or "clip" (no zero: code 2^b - 1 is
        the smallest value; a masked element cannot be told, so no mask).
      packed: two or four codes a byte, `layout.pack(codes, bits)`; bits 2 or 4.
      impl: run this implementation or raise; None: the first that can. interpret: run Pallas kernels in
        their interpreter (tests).
    Returns:
      u8[..., R, C], or u8[..., R, layout.row_bytes(C, bits)]. Exact ties round to even; the float32
      exponent carries an error of some 1e-6, so a p that close to the middle of two codes may take
      either. Masked elements, logits of -inf and whole rows without a seen element take the last code; so
      do whole rows with a seen NaN or +inf, because codes cannot hold NaN.
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run here.

    Codes have no gradient; `log2_softmax` is the differentiable form.
    """
    checks.dtype(OP, "logits", logits, FLOATS)
    _check_code(bits, base, zero_code, packed)
    if logits.ndim < 2 or not logits.shape[-1]:
        checks.fail(OP, f"logits has shape {logits.shape}, expected (..., R, C) with C > 0")
    (r, c), num = logits.shape[-2:], int(np.prod(logits.shape[:-2]))
    if zero_code == "clip" and (mask is not None or causal):
        checks.fail(
            OP, "zero_code='clip' has no code for a masked element; use 'reserve' or 'repo'"
        )
    if mask is not None:
        checks.dtype(OP, "mask", mask, (jnp.bool_,))
        try:
            mask = jnp.broadcast_to(mask, logits.shape).reshape(num, r, c)
        except ValueError:
            checks.fail(
                OP, f"mask has shape {mask.shape}, which does not broadcast to {logits.shape}"
            )
    checks.shape(OP, "scale", scale, (), "one number")
    spec = spec_of(
        num, r, c, bits=bits, base=base, zero_code=zero_code, causal=causal,
        mask=mask is not None, dtype=logits.dtype.name, interpret=interpret,
    )  # fmt: skip
    z = jax.lax.stop_gradient(logits).reshape(num, r, c)
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    codes = dispatch.run(IMPLS, spec, z, mask, scale, impl=impl).reshape(logits.shape)
    return layout.pack(codes, bits) if packed else codes


def decode(
    codes: jax.Array, scale: jax.Array | float = 1.0, *, bits: int, base: str = "log2",
    zero_code: str = "reserve",
) -> jax.Array:  # fmt: skip
    """f32 probabilities d 2^(-q / steps) of unpacked codes; 2^-127 and less are 0."""
    _check_code(bits, base, zero_code, False)
    return levels.weight(codes.astype(jnp.int32), bits, base, zero_code) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake(logits, mask, scale, options):
    options = dict(options)
    kind = {name: options[name] for name in ("bits", "base", "zero_code")}
    return decode(log2_softmax_quantize(logits, mask, scale, **options), scale, **kind)


def _fake_forward(logits, mask, scale, options):
    return _fake(logits, mask, scale, options), (logits, mask, scale)


def _fake_backward(options, kept, dp):
    logits, mask, scale = kept
    r, c = logits.shape[-2:]
    seen = reference.allowed(r, c, mask, dict(options)["causal"])

    def softmax(z):
        z = z.astype(jnp.float32)
        return jax.nn.softmax(z, -1, where=seen) if seen is not None else jax.nn.softmax(z, -1)

    (dz,) = jax.vjp(softmax, logits)[1](dp)
    if seen is not None:  # a row without a seen element is constant
        dz = jnp.where(jnp.any(seen, -1, keepdims=True), dz, 0)
    no_mask = None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)
    return dz, no_mask, jnp.zeros_like(scale)


_fake.defvjp(_fake_forward, _fake_backward)


def log2_softmax(
    logits: jax.Array, mask: jax.Array | None = None, scale: jax.Array | float = 1.0, *, bits: int,
    base: str = "log2", zero_code: str = "reserve", causal: bool = False, impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """decode(log2_softmax_quantize(...)), f32[..., R, C], with the gradient of the plain softmax.

    Straight-through: what rounding and clipping do is ignored in the gradient with respect to logits,
    also for elements that became zero; scale gets none.
    """
    options = dict(bits=bits, base=base, zero_code=zero_code, causal=causal, impl=impl,
                   interpret=interpret)  # fmt: skip
    return _fake(logits, mask, jnp.asarray(scale, jnp.float32), tuple(options.items()))


def log2_attend(
    codes: jax.Array,
    v: jax.Array,
    scale: jax.Array | float = 1.0,
    *,
    bits: int,
    base: str = "log2",
    zero_code: str = "reserve",
    packed: bool = False,
    fraction: int | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y[..., r, :] = d sum_c 2^(-q[..., r, c] / steps) v[..., c, :].

    Args:
      codes: u8[..., R, C] as made by `log2_softmax_quantize` with the same bits, base, zero_code, packed.
      v: i8, bf16, f16 or f32 [..., C, D], the same leading axes.
      fraction: F, bits below the point for i8 v, up to 23; None: the largest shift, at most 20.
    Returns:
      i8 v: f32[..., R, D] from integers alone: v shifted left by F, then right by ceil(q / steps), summed
      in int32, even and odd log-sqrt2 codes apart; one float product at the end (sqrt2, 2^-F, d). With F
      the largest shift (log2 up to 4 bits, log_sqrt2 up to 5) nothing is lost; else terms with a shift
      beyond F are dropped, together less than 127 C 2^-(F+1). The sums do not overflow while the row's
      sum of 2^-ceil(q / steps) is below 2^(24 - F), at least 16 by default; rows of a softmax with d = 1
      stay below 1.5.
      float v: [..., R, D] in the dtype of v, exact powers of two times v, accumulated in float32. NaN and
      inf of v reach every row (0 inf is NaN).
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run here.

    Differentiable in a float v and in scale; codes and i8 values have no gradient.
    """
    _check_code(bits, base, zero_code, packed)
    checks.dtype(OP, "codes", codes, (jnp.uint8,))
    checks.dtype(OP, "v", v, (jnp.int8, *FLOATS))
    if codes.ndim < 2 or v.ndim != codes.ndim:
        checks.fail(
            OP, f"codes has shape {codes.shape} and v {v.shape}, expected (..., R, C), (..., C, D)"
        )
    (c, d), lead, r = v.shape[-2:], codes.shape[:-2], codes.shape[-2]
    width = layout.row_bytes(c, bits) if packed else c
    checks.shape(OP, "codes", codes, (*v.shape[:-2], None, width), f"v has C={c}, packed={packed}")
    if packed:
        codes = layout.unpack(codes, c, bits)
    if fraction is None:
        fraction = levels.fraction_bits(bits, base, zero_code)
    checks.one_of(OP, "fraction", fraction, range(24))
    num = int(np.prod(lead))
    spec = spec_of(num, r, c, bits=bits, base=base, zero_code=zero_code, d=d,
                   dtype=v.dtype.name, fraction=fraction, interpret=interpret)  # fmt: skip
    y = _attend(spec, impl, codes.reshape(num, r, c), v.reshape(num, c, d)).reshape(*lead, r, d)
    return (y * scale).astype(y.dtype)


_attend = dispatch.differentiable(ATTEND_IMPLS, gradient=xla.ATTEND)
