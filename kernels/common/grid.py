"""The arithmetic of one code, shared word for word by every implementation so that their bits agree.

Only operations that XLA and both Mosaic back ends take (no floor, no unsigned shifts), and none that a
compiler may change: XLA turns a division by a constant, or by one value a row, into a product with the
rounded reciprocal, so here it is written as that product; and a product is never added to, since some
compilers would fuse the two and round once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOOR = 1e-8
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(k0: jax.Array, k1: jax.Array, row: jax.Array, col: jax.Array) -> jax.Array:
    """i32: the first word of Threefry-2x32-20 (Salmon et al., SC 2011) of the counter (row, col).

    Words are held as i32 (addition wraps, shifts are logical), which every back end has. An element's
    bits depend on its row, its column and the key alone, never on tiles, bits or group.
    """
    keys = (k0, k1, k0 ^ k1 ^ np.int32(0x1BD11BDA))
    a, b = row + k0, col + k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            a = a + b
            b = (b << np.int32(r)) | lax.shift_right_logical(b, jnp.full_like(b, 32 - r))
            b = a ^ b
        a = a + keys[(i + 1) % 3]
        b = b + keys[(i + 2) % 3] + np.int32(i + 1)
    return a


def finite(x: jax.Array, other: float) -> jax.Array:
    """x, with `other` (an infinity) in place of NaN and inf: maxima then need no rule for NaN."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.float32(other))


def absmax_scale(amax: jax.Array, bits: int) -> jax.Array:
    """amax / (2^(b-1) - 1), at least FLOOR; one bit has the levels -1 and 0 and the step amax.

    With the maximum of its own group, the floor 1e-8 max(1, max |x|) is never more than 1e-8.
    """
    return jnp.maximum(amax * np.float32(1.0 / max(2 ** (bits - 1) - 1, 1)), np.float32(FLOOR))


def minmax_grid(lo: jax.Array, hi: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """(scale, zero) of the range [lo, hi] widened to contain 0; zero is integer-valued in [0, 2^b - 1]."""
    top = 2.0**bits - 1
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    scale = jnp.maximum((hi - lo) * np.float32(1.0 / top), np.float32(FLOOR))
    zero = jnp.minimum(jnp.maximum(jnp.round((0.0 - lo) * (1.0 / scale)), 0.0), top)
    return scale, jnp.where(scale < jnp.inf, zero, 0.0)


def floor(u: jax.Array) -> jax.Array:
    """floor by way of rounding, which every back end has."""
    r = jnp.round(u)
    return r - jnp.where(r > u, jnp.float32(1.0), jnp.float32(0.0))


def rounded(u: jax.Array, rounding: str, word: jax.Array | None) -> jax.Array:
    """u rounded to an integer; stochastic: up where u > floor(u) + (upper 24 bits of word) / 2^24."""
    if rounding == "half_even":
        return jnp.round(u)
    low = floor(u)
    if rounding == "half_up":
        step = np.float32(0.5)
    else:
        bits = lax.shift_right_logical(word, jnp.full_like(word, 8))
        step = bits.astype(jnp.float32) * np.float32(2**-24)  # exact
    up = u >= low + step if rounding == "half_up" else u > low + step
    return low + jnp.where(up, jnp.float32(1.0), jnp.float32(0.0))


def codes(
    x: jax.Array, inverse: jax.Array, zero: jax.Array | None, word: jax.Array | None, options: dict
) -> jax.Array:
    """i32 in [0, 2^b): round(x inverse) + zero, clipped; NaN (also of inf 0) is taken as 0.

    Args:
      x: f32. inverse: f32, 1 / scale; zero: f32; both broadcast against x; zero None: 2^(b-1).
      word: i32 like x or None. options: bits, rounding, levels.
    """
    bits = options["bits"]
    u = x * inverse
    u = jnp.where(u == u, u, jnp.float32(0.0))
    q = rounded(u, options["rounding"], word)
    q = q + (np.float32(2.0 ** (bits - 1)) if zero is None else zero)
    low = 1.0 if options["levels"] == "narrow" else 0.0
    return jnp.minimum(jnp.maximum(q, np.float32(low)), np.float32(2.0**bits - 1)).astype(jnp.int32)
