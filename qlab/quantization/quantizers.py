"""Quantizers as pure transforms: (init, encode, decode, fake), for weights and activations alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.grid import Calibration, Grid, check_bits, make_grid, nearest_codes
from qlab.quantization.qtensor import Ties, clip_ste, expand, round_ste
from qlab.quantization.rounding import fake_grid


class Quantizer(NamedTuple):
    """Pure functions on x f32[out, in].

    Attributes:
      init: x -> params, a pytree. encode: (params, x) -> integer codes.
      decode: (params, codes) -> f32. fake: (params, x) -> f32, equal to decode(encode(x)) bit for
        bit, with straight-through gradient inside the range.
    """

    init: Callable[[jax.Array], Any]
    encode: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    fake: Callable[[Any, jax.Array], jax.Array]


def uniform(
    bits: int = 4,
    *,
    symmetric: bool = False,
    granularity: str = "channel",
    calibration: Calibration = "minmax",
    ties: Ties = "half_even",
) -> Quantizer:
    """Equally spaced levels.

    Args:
      bits: 1 to 8, or 32 for the identity. symmetric: no zero point, levels -2^(b-1) .. 2^(b-1)-1.
      granularity: "tensor", "channel" (a scale per row) or "group:g" (per g columns of a row).
      calibration: "minmax" or "searched" (least |error|^2.4). ties: "half_even" or "half_up".

    >>> q = uniform(2, symmetric=True)
    >>> w = jnp.array([[1.0, -2.0, 0.3]])
    >>> params = q.init(w)
    >>> q.decode(params, q.encode(params, w)).tolist()
    [[0.0, -2.0, 0.0]]
    """
    if bits == 32:
        return identity()
    check_bits(bits)

    def init(x) -> Grid:
        return make_grid(
            x, bits, granularity, symmetric=symmetric, calibration=calibration, ties=ties
        )

    def encode(params: Grid, x):
        return nearest_codes(x, params).astype(jnp.int8 if symmetric else jnp.uint8)

    def decode(params: Grid, codes):
        q = codes.astype(jnp.float32)
        zero = 0.0 if params.zero is None else expand(params.zero, q.shape)
        return expand(params.scale, q.shape) * (q - zero)

    def fake(params: Grid, x):
        scale = expand(params.scale, x.shape)
        return fake_grid(x / scale, scale, params)

    return Quantizer(init, encode, decode, fake)


def identity() -> Quantizer:
    """32 bits: nothing is rounded."""
    return Quantizer(lambda x: (), lambda params, x: x, lambda params, q: q, lambda params, x: x)


def lsq_step(
    x,
    scale,
    zero,
    q_min,
    q_max,
    *,
    clip: Literal["after", "before"] = "after",
    grad_scale: float = 1.0,
) -> jax.Array:
    """Fake quantization with a trainable step (LSQ, Esser et al., arXiv 1902.08153): x_hat like x.

    Args:
      zero: integer-valued, or None. clip: around the rounded code ("after", the gradient passes
        where the code lies in the range) or before it is rounded (as LSQ writes it).
      grad_scale: multiplies the gradient of the step, LSQ's 1 / sqrt(n q_max).

    >>> grad = jax.grad(lambda s: lsq_step(jnp.array(1.3), s, None, -4, 3))(jnp.array(1.0))
    >>> round(float(grad), 4)  # round(x / s) - x / s
    -0.3
    """
    scale = scale * grad_scale + jax.lax.stop_gradient(scale * (1.0 - grad_scale))
    zero = 0.0 if zero is None else zero
    u = x / scale
    if clip == "before":
        r = round_ste(clip_ste(u + zero, q_min, q_max))
    else:
        r = clip_ste(round_ste(u) + zero, q_min, q_max)
    return scale * (r - zero)


QUANTIZERS = {"uniform": uniform, "identity": identity}
