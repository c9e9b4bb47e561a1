"""weight_only_matmul: every implementation against float64 NumPy on independently packed codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.kernels.common import dispatch, layout
from qlab.kernels.weight_only_matmul import api

KINDS = ("symmetric", "zero", "offset", "zero_offset")
# Of sum |x| |w|: rounding of x is in both, so what is left is one rounding of each weight and of y.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 2e-6}


def make(m, k, n, bits, group, kind, dtype, seed=0):
    rng = np.random.default_rng(seed)
    num = layout.num_groups(k, group)
    codes = rng.integers(0, 2**bits, (n, k))
    scale = rng.uniform(0.01, 0.1, (n, num)).astype(np.float32)
    zero = rng.integers(0, 2**bits, (n, num)).astype(np.float32) if "zero" in kind else None
    offset = rng.normal(size=(n, num)).astype(np.float32) if "offset" in kind else None
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    return x, codes, scale, zero, offset


def truth(x, codes, scale, zero, offset, bits, group):
    """float64; also sum |x| |w|, the yardstick of rounding."""
    g = group or x.shape[1]
    wide = [
        None if a is None else np.repeat(a.astype(np.float64), g, 1)[:, : x.shape[1]]
        for a in (scale, zero, offset)
    ]
    q = codes.astype(np.float64)
    q = q - (wide[1] if zero is not None else (0 if offset is not None else 2.0 ** (bits - 1)))
    w = q * wide[0] + (wide[2] if offset is not None else 0)
    x = np.asarray(x, np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


def check(run, m, k, n, bits, group, kind, dtype, **options):
    x, codes, scale, zero, offset = make(m, k, n, bits, group, kind, dtype)
    packed = layout.pack(jnp.asarray(codes), bits, group)
    arrays = [None if a is None else jnp.asarray(a) for a in (scale, zero, offset)]
    y = run(
        api.weight_only_matmul, api.IMPLS, x, packed, *arrays, bits=bits, group=group, **options
    )
    assert y.shape == (m, n)
    assert y.dtype == jnp.dtype(dtype)
    want, size = truth(x, codes, scale, zero, offset, bits, group)
    err = np.abs(np.asarray(y, np.float64) - want)
    assert (err <= TOLERANCE[dtype] * size + 1e-30).all(), (err / size).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_and_widths(run, bits, kind):
    check(run, 5, 256, 48, bits, 64, kind, "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("m", [1, 16, 130])
def test_dtypes_groups_and_rows(run, m, group, dtype):
    check(run, m, 384, 136, 4, group, "zero", dtype)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 127, 3), (2, 4097, 5), (127, 64, 1)])
@pytest.mark.parametrize("bits", [3, 4])
def test_awkward_sizes(run, m, k, n, bits):
    check(run, m, k, n, bits, 0, "zero", "float32")


def test_an_empty_batch_has_an_empty_result(run):
    check(run, 0, 64, 8, 4, 32, "symmetric", "bfloat16")
