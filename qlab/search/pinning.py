"""Keeps XLA from copying large loop-carried arrays."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def pin(values: T, count: jax.Array) -> T:
    """`values`, computed here and once.

    Inside a loop a value read from a large array and used after that array's update makes XLA:CPU fuse
    the read into its users, so the old array lives on and is copied in every iteration; an optimization
    barrier is dropped before fusion there. A while loop is not: this one never runs (count >= 0 is
    known to us, not to the compiler), but its operands have to be ready.

    >>> pin(jnp.arange(3), jnp.int32(0)).tolist()
    [0, 1, 2]
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier(values)

    def change(x):
        return ~x if x.dtype == jnp.bool_ else x + jnp.ones((), x.dtype)

    def body(carry):
        return carry[0] + 1, jax.tree.map(change, carry[1])

    return jax.lax.while_loop(lambda c: c[0] < 0, body, (count, values))[1]
