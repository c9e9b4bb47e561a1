"""3 x 3 convolutions of small images as matrix products, which inside lax.scan on a CPU are several times faster, and
quick to compile. The places of a tap are products with constant matrices of 0 and 1.

Letters: N = images, H, W, C = height, width, channels.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# stride 2; its transpose; stride 1; stride 1 on the image doubled by nearest neighbours
Kind = Literal["down", "up", "same", "nearest"]


@functools.cache
def _taps(size: int, kind: Kind) -> np.ndarray:
    """f32[size, out, 3]: which input row each of 3 taps of an output row reads, as 0 and 1 (0: beyond the edge).

    kind "down": stride 2, "same" padding, out = size / 2. "up": transposed, stride 2 (padding 1, output padding 1).
    "same": stride 1. "nearest": stride 1 after each row is doubled, out = 2 size.
    """
    out = {"down": size // 2, "same": size}.get(kind, 2 * size)
    pick = np.zeros((size, out, 3), np.float32)
    for row in range(out):
        for tap in range(3):
            # down: XLA's "same" pads behind the last row; the others are padded by one.
            # up: rows with zeros between them; nearest: rows twice
            at, odd = (2 * row + tap, 0) if kind == "down" else (row + tap - 1, 0)
            if kind in ("up", "nearest"):
                at, odd = at // 2, at % 2 if kind == "up" else 0
            if not odd and 0 <= at < size:
                pick[at, row, tap] = 1
    return pick


def conv(x: jax.Array, kernel: jax.Array, kind: Kind) -> jax.Array:
    """3 x 3 convolution of one of the kinds: f[N, H', W', out] from f[N, H, W, C].

    The two places of a tap are products with constant matrices of 0 and 1; kernel f[9 C, out] maps the 9 C numbers
    of a patch to out. It acts on the smaller image: after the taps are read on the way down, before they are added
    otherwise.

    >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((9, 1))
    >>> conv(x, kernel, "same").ravel().tolist(), conv(x, kernel, "nearest")[0, 1, :, 0].tolist()
    ([4.0, 4.0, 4.0, 4.0], [6.0, 9.0, 9.0, 6.0])
    """
    rows, cols = (jnp.asarray(_taps(s, kind), x.dtype) for s in x.shape[1:3])
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if kind == "down":
        patches = exact("niwpc,wjq->nijpqc", exact("nhwc,hip->niwpc", x, rows), cols)
        return patches.reshape(*patches.shape[:3], -1) @ kernel
    taps = jnp.einsum("nhwc,pqcd->nhwpqd", x, kernel.reshape(3, 3, x.shape[-1], -1))
    return exact("niwqd,wjq->nijd", exact("nhwpqd,hip->niwqd", taps, rows), cols)
