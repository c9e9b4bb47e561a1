"""What a code stands for: shared by every implementation so that their bits agree.

Base "log2": p = d 2^-q. Base "log_sqrt2": p = d 2^(-q/2) = d 2^-ceil(q/2) (1 + (q mod 2)(sqrt2 - 1)), so a
shift and, for odd q, a factor sqrt2 that the scale takes (RepQuant section 3).
The zero code (RepQuant: zero is an extra level):
  "reserve": code 2^b - 1 is 0, codes 0 .. 2^b - 2 are values; fits b bits.
  "repo": code 2^b is 0, codes 0 .. 2^b - 1 are values; 2^b + 1 codes, as in the published code.
  "clip": no zero; code 2^b - 1 is the smallest value and stands for everything below it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

STEPS = {"log2": 1, "log_sqrt2": 2}  # codes for one halving
ZERO_CODES = ("reserve", "repo", "clip")
LOG2E = math.log2(math.e)
SQRT2 = math.sqrt(2.0)
DIGIT = 7  # bits of a weight that a signed byte takes
MAX_FRACTION = 20


def top(bits: int, zero_code: str) -> int:
    """The largest code."""
    return 2**bits if zero_code == "repo" else 2**bits - 1


def largest_shift(bits: int, base: str, zero_code: str) -> int:
    """ceil(q / steps) of the largest code that is not zero.

    >>> largest_shift(4, "log2", "reserve"), largest_shift(4, "log_sqrt2", "repo")
    (14, 8)
    """
    return -(-(top(bits, zero_code) - (zero_code != "clip")) // STEPS[base])


def fraction_bits(bits: int, base: str, zero_code: str) -> int:
    """Bits below the point of the integer product: enough to be exact, at most 20."""
    return min(largest_shift(bits, base, zero_code), MAX_FRACTION)


def code(t: jax.Array, bits: int, zero_code: str) -> jax.Array:
    """i32 codes from t = -steps log2(p / d), f32: round half to even, below 0 to 0; NaN is the last code."""
    last = float(top(bits, zero_code))
    t = jnp.where(t < last, t, last)
    return jnp.maximum(jnp.round(t), 0.0).astype(jnp.int32)


def shift(q: jax.Array, base: str) -> jax.Array:
    """ceil(q / steps) of i32 codes."""
    return q if base == "log2" else (q + 1) >> 1


def power(e: jax.Array) -> jax.Array:
    """f32 2^-e, exact, from i32 e >= 0; below 2^-126 it is 0."""
    value = lax.bitcast_convert_type((127 - jnp.minimum(e, 126)) << 23, jnp.float32)
    return jnp.where(e <= 126, value, 0.0)


def weight(q: jax.Array, bits: int, base: str, zero_code: str) -> jax.Array:
    """f32 p / d of i32 codes."""
    p = power(shift(q, base))
    if base == "log_sqrt2":
        p = p * jnp.where((q & 1) == 1, jnp.float32(SQRT2), jnp.float32(1.0))
    return p if zero_code == "clip" else jnp.where(q < top(bits, zero_code), p, 0.0)


def parities(
    q: jax.Array, bits: int, base: str, zero_code: str
) -> list[tuple[jax.Array, jax.Array]]:
    """[(shift, whether the code counts)] of the even and odd codes ("log2": of all codes)."""
    e, counts = shift(q, base), q < top(bits, zero_code) + (zero_code == "clip")
    if base == "log2":
        return [(e, counts)]
    return [(e, counts & ((q & 1) == odd)) for odd in (0, 1)]


def num_digits(fraction: int) -> int:
    return fraction // DIGIT + 1


def digits(e: jax.Array, counts: jax.Array, fraction: int) -> list[jax.Array]:
    """i32 [0, 64] signed-byte digits of 2^(fraction - e), low first: sum_j digit_j 2^(7 j); 0 for e > fraction."""
    out = []
    for j in range(num_digits(fraction)):
        up = fraction - e - DIGIT * j
        here = counts & (up >= 0) & (up < DIGIT)
        out.append(jnp.where(here, jnp.int32(1) << jnp.clip(up, 0, DIGIT - 1), 0))
    return out
