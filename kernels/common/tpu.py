"""Pieces of TPU kernels that several operations share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def row_bytes_of(code: jax.Array, p: int, first: int, num: int) -> jax.Array:
    """u8[R, num]: the bytes of a part of p bits, for rows that are one group of the packed layout.

    Args:
      code: i32[R, W], W a multiple of LANES; columns beyond the row are 0. num: ceil(K p / 8), the
        columns of a plane; planes are brought to lane 0 by rotation.
    """
    width = code.shape[1]
    wide = -(-num // LANES) * LANES
    part = (code >> first) & (2**p - 1)
    byte = part[:, :wide]
    for j in range(1, 8 // p):
        plane = pltpu.roll(part, (-j * num) % width, 1) if j * num % width else part
        byte = byte | (plane[:, :wide] << (p * j))
    return byte[:, :num].astype(jnp.uint8)
