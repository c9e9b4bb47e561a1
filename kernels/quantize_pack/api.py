"""Float -> packed low-bit codes, scales and zero points in one pass: dispatch and checks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.kernels.common import checks, dispatch, layout
from qlab.kernels.quantize_pack import pallas_gpu, pallas_tpu, reference, xla

OP = "quantize_pack"
IMPLS = (reference.IMPL, xla.IMPL, pallas_gpu.IMPL, pallas_tpu.IMPL)
ROUNDINGS = ("half_even", "half_up", "stochastic")
CALIBRATIONS = ("absmax", "minmax", "given")


class Packed(NamedTuple):
    """codes u8[N, row_bytes(K, bits, group)], scale f32[N, G], zero f32[N, G] or None (symmetric)."""

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


def spec_of(
    n: int,
    k: int,
    *,
    bits: int,
    group: int = 0,
    x_dtype: str = "bfloat16",
    calibration: str = "absmax",
    rounding: str = "half_even",
    levels: str = "full",
    zero: bool = False,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> dispatch.Spec:
    """The Spec of a call, also for a device that is not at hand. zero: there are (given) zero points."""
    here = dispatch.here(platform, device)
    options = {
        "bits": bits, "group": group, "calibration": calibration, "rounding": rounding,
        "levels": levels, "zero": zero or calibration == "minmax",
    }  # fmt: skip
    return dispatch.Spec(OP, {"n": n, "k": k}, {"x": x_dtype}, options, *here, interpret)


def quantize_pack(
    x: jax.Array,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
    key: jax.Array | None = None,
    *,
    bits: int,
    group: int = 0,
    calibration: str = "absmax",
    rounding: str = "half_even",
    levels: str = "full",
    impl: str | None = None,
    interpret: bool = False,
) -> Packed:
    """code = clip(round(x (1 / scale)) + zero, rails), packed by `kernels.common.layout`; x_hat = scale (code - zero).

    Args:
      x: bf16, f16 or f32 [N, K], K >= 1; N may be 0.
      scale, zero: f32[N, G], only with calibration "given" (zero optional); G = K / group or 1.
      key: with rounding "stochastic" only: a typed threefry key or u32[2].
      bits: 1 to 8. group: columns that share a scale, a multiple of 8 that divides K; 0: the whole row.
      calibration: per group.
        "absmax": symmetric, scale = max |x| / (2^(b-1) - 1) (one bit: max |x|), codes -2^(b-1) ..
          2^(b-1) - 1, stored plus 2^(b-1). The lowest level is only reached by stochastic rounding or
          with given scales; levels="narrow" leaves it out.
        "minmax": asymmetric, [min x, max x] widened to contain 0, scale = (max - min) / (2^b - 1), integer
          zero = round(-min / scale) in [0, 2^b - 1].
        "given": the caller's scale > 0, symmetric without zero. A scale of 0 puts x on a rail.
      rounding: "half_even", "half_up" or "stochastic": up with probability u - floor(u) to within half an
        ulp of u plus 2^-24, an integer never; drawn from the upper 24 bits of the first word of
        Threefry-2x32-20(key, (row, column)), so codes depend on no tile, width, group or implementation.
      levels: "full", or "narrow" (symmetric and bits > 1 only): -(2^(b-1) - 1) .. 2^(b-1) - 1.
      impl, interpret: as everywhere in qlab.kernels.
    Returns:
      Packed. The scale is at least 1e-8 max(1, max |x|), the maximum over its own group (that of the whole
      array would take a second pass).
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run here.

    NaN and inf: a group that holds one (or whose range overflows float32) has scale inf, zero 0 and
    codes of 0, so it decodes to NaN: never to plausible numbers. With given scales NaN takes the code of
    0 and inf the rail. Codes and scales are the same bits in every implementation; on a TPU, whose
    division is not correctly rounded, a scale may differ by an ulp and a code by one where it is at a tie.
    So may a code from that of x / scale, which rounds once where the product with 1 / scale rounds twice.
    Nothing here has a gradient: x, scale and zero are taken through stop_gradient.
    """
    checks.dtype(OP, "x", x, (jnp.bfloat16, jnp.float16, jnp.float32))
    checks.one_of(OP, "bits", bits, range(1, 9))
    checks.one_of(OP, "calibration", calibration, CALIBRATIONS)
    checks.one_of(OP, "rounding", rounding, ROUNDINGS)
    checks.one_of(OP, "levels", levels, ("full", "narrow"))
    checks.shape(OP, "x", x, (None, None), "rows that are quantized along the last axis")
    n, k = x.shape
    if not k:
        checks.fail(OP, f"x has shape {x.shape}; a row needs at least one column")
    checks.group(OP, group, k)
    _check_given(scale, zero, calibration, (n, layout.num_groups(k, group)))
    if levels == "narrow" and (bits == 1 or calibration == "minmax" or zero is not None):
        checks.fail(OP, "levels='narrow' needs a symmetric grid of 2 bits or more; use 'full'")
    words = _key_words(key, rounding)
    spec = spec_of(
        n, k, bits=bits, group=group, x_dtype=x.dtype.name, calibration=calibration,
        rounding=rounding, levels=levels, zero=zero is not None, interpret=interpret,
    )  # fmt: skip
    arrays = jax.lax.stop_gradient((x, scale, zero))
    if not n:  # a grid without blocks; the name is still checked
        dispatch.candidates(IMPLS, spec, impl)
        impl = "reference"
    return Packed(*dispatch.run(IMPLS, spec, *arrays, words, impl=impl))


def decode(packed: Packed, k: int, *, bits: int, group: int = 0) -> jax.Array:
    """f32[N, K] = scale (code - zero), zero = 2^(b-1) where there is none: what the codes stand for.

    >>> p = quantize_pack(jnp.array([[1.0, -0.4, 0.6]]), bits=2)
    >>> decode(p, 3, bits=2).tolist()
    [[1.0, 0.0, 1.0]]
    """
    q = layout.unpack(packed.codes, k, bits, group).astype(jnp.float32)
    wide = [None if a is None else reference.per_column(a, k, group) for a in packed[1:]]
    return wide[0] * (q - (2.0 ** (bits - 1) if wide[1] is None else wide[1]))


def _check_given(scale, zero, calibration: str, want: tuple[int, int]) -> None:
    if (scale is not None) != (calibration == "given"):
        what = "a scale is given" if scale is not None else "no scale is given"
        checks.fail(OP, f"calibration={calibration!r} but {what}; pass scale with 'given' only")
    if zero is not None and scale is None:
        checks.fail(
            OP, f"zero is given with calibration={calibration!r}; pass it with 'given' only"
        )
    for name, a in (("scale", scale), ("zero", zero)):
        if a is not None:
            checks.dtype(OP, name, a, (jnp.float32,))
            checks.shape(OP, name, a, want, "one for each group of each row")


def _key_words(key, rounding: str) -> jax.Array | None:
    """The key as i32[2]; None unless rounding is stochastic."""
    if (key is not None) != (rounding == "stochastic"):
        what = "a key is given" if key is not None else "no key is given"
        checks.fail(OP, f"rounding={rounding!r} but {what}; pass key with 'stochastic' only")
    if key is None:
        return None
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape != (2,) or data.dtype != jnp.uint32:
        checks.fail(
            OP, f"key is {data.dtype.name}{list(data.shape)}; use u32[2] or one threefry key"
        )
    return jax.lax.bitcast_convert_type(data, jnp.int32)
