"""Kernel initialisers that hand out one draw in pieces: a net's many small draws take most of its compile time."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def pooled_init(pool: jax.Array) -> Callable[..., jax.Array]:
    """A kernel initialiser: the next entries of pool f32[num] times in^(-1/2), kernels being (in, out).

    >>> init = pooled_init(jnp.arange(10.0))
    >>> init(None, (4, 1)).ravel().tolist(), init(None, (1, 2)).ravel().tolist()
    ([0.0, 0.5, 1.0, 1.5], [4.0, 5.0])
    """
    num, at = len(pool), [0]

    def init(key, shape, dtype=jnp.float32):
        del key
        size = math.prod(shape)
        at[0] += size
        if at[0] > num:
            raise ValueError(f"{num} draws do not fill the kernels")
        return (pool[at[0] - size : at[0]].reshape(shape) * shape[0] ** -0.5).astype(dtype)

    return init
