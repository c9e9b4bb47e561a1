"""The transform for XLA: products with small Kronecker factors, float32 throughout."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.hadamard_quantize import matrices, reference

MOST = 64  # columns of a factor, unless the base alone is wider


def factors(block: int) -> list[np.ndarray]:
    """Matrices of +-1, outermost first, whose Kronecker product is the transform; about equally wide."""
    m, k = matrices.decompose(block)
    inner = min(k, max(0, int(math.log2(MOST / m)))) if m <= MOST else 0
    rest = k - inner
    count = -(-rest // int(math.log2(MOST)))
    out = [rest // count + (i < rest % count) for i in range(count)] if count else []
    last = np.kron(matrices.sylvester(2**inner), matrices.base(m))
    return [matrices.sylvester(2**e) for e in out] + [last]


@functools.partial(jax.jit, static_argnames=("block", "inverse"))
def transform(x: jax.Array, *, block: int, inverse: bool) -> jax.Array:
    """f32[N, K] from any float x [N, K]."""
    shape, y = x.shape, x.astype(jnp.float32)
    right = 1
    for h in reversed(factors(block)):
        h = (h.T if inverse else h).astype(np.float32)
        if right == 1:
            y = jnp.matmul(y.reshape(-1, len(h)), h.T, precision=jax.lax.Precision.HIGHEST)
        else:
            y = jnp.matmul(h, y.reshape(-1, len(h), right), precision=jax.lax.Precision.HIGHEST)
        right *= len(h)
    return y.reshape(shape) * np.float32(block**-0.5)


def run(spec: Spec, x: jax.Array):
    o = spec.options
    return reference.finish(transform(x, block=o["block"], inverse=o["inverse"]), spec, x.dtype)


IMPL = Impl("xla", lambda spec: "", run)
