"""group_sparse_matmul: every implementation against float64 NumPy and scipy's block-sparse rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from qlab.kernels.common import dispatch, layout
from qlab.kernels.group_sparse_matmul import api, bsr, cost
from qlab.kernels.weight_only_matmul.api import weight_only_matmul

# Of sum |x| scale 2^bits over the kept columns: rounding of the weight (bf16, f16) and of y.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 2e-6}


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def make(n, k, bits, group, *, rho=0.5, symmetric=False, seed=0):
    """(BSR, f64[N, K] weight, f64[N, K] bound on what a code can stand for)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n, k))
    scale = rng.uniform(0.01, 0.1, (n, k // group)).astype(np.float32)
    zero = None if symmetric else rng.integers(0, 2**bits, scale.shape).astype(np.float32)
    mask = rng.random(scale.shape) >= rho
    w = codes - np.repeat(np.full(scale.shape, 2.0 ** (bits - 1)) if symmetric else zero, group, 1)
    wide = np.repeat(scale.astype(np.float64) * mask, group, 1)
    return (
        api.from_dense(codes, scale, zero, mask, bits=bits, group=group),
        w * wide,
        2**bits * wide,
    )


def product(run, x, b, bits=4, group=16, plan=None):
    """The operation in one compiled piece (the plan stays concrete: its shape depends on row_ptr)."""
    f = lambda x, b, plan: run(  # noqa: E731
        api.group_sparse_matmul, api.IMPLS, x, b, bits=bits, group=group, plan=plan
    )
    return jax.jit(f)(x, b, plan)


def check(run, m, n, k, bits, group, dtype="float32", *, plan_chunk=128, case=None, **options):
    b, w, size = case or make(n, k, bits, group, **options)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(m, k)), dtype)
    plan = plan_chunk and api.make_plan(b.row_ptr, b.col_idx.shape[0], plan_chunk)
    y = product(run, x, b, bits, group, plan)
    assert y.shape == (m, n)
    assert y.dtype == jnp.dtype(dtype)
    x = np.asarray(x, np.float64)
    err = np.abs(np.asarray(y, np.float64) - x @ w.T)
    assert (err <= TOLERANCE[dtype] * (np.abs(x) @ size.T) + 1e-30).all(), err.max()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group"), [slow(2, 16), (3, 32), (4, 16), slow(4, 8), slow(8, 128)]
)
def test_widths_groups_and_grids(run, bits, group, symmetric):
    check(run, 2, 40, 512, bits, group, symmetric=symmetric)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", [1, slow(9), slow(64)])
def test_dtypes_and_rows(run, m, dtype):
    check(run, m, 24, 256, 4, 16, dtype)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 8), (3, 127, 8), slow(1, 3, 4104), slow(2, 4097, 8)]
)
def test_awkward_sizes(run, m, n, k):
    check(run, m, n, k, 4, 8)


def test_x_of_more_column_groups_than_lanes(run):
    check(run, 2, 5, 4096, 4, 8)  # 512 groups: four tiles of the lane gather


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_all_groups_and_no_group(run, rho):
    check(run, 2, 33, 64, 4, 16, rho=rho, plan_chunk=None)  # planned inside jit


def test_all_groups_kept_equals_the_dense_product(run):
    rng = np.random.default_rng(3)
    n, k, group = 16, 128, 32
    codes = rng.integers(0, 16, (n, k))
    scale, zero = rng.random((2, n, k // group)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(3, k)), jnp.float32)
    b = api.from_dense(codes, scale, zero, np.ones(scale.shape, bool), bits=4, group=group)
    packed = layout.pack(jnp.asarray(codes), 4, group)
    want = weight_only_matmul(
        x, packed, jnp.asarray(scale), jnp.asarray(zero), bits=4, group=group, impl="reference"
    )
    got = product(run, x, b, 4, group)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("n", [1, 4])
def test_rows_split_over_many_chunks_are_completed(run, n):
    """One long row, and a long row between empty ones, in chunks of 128 groups: fails without a fix-up."""
    rng = np.random.default_rng(4)
    k, group = 8 * 640, 8
    mask = np.zeros((n, k // group), bool)
    mask[n // 2] = True
    codes = rng.integers(0, 16, (n, k))
    scale = rng.uniform(0.01, 0.1, mask.shape).astype(np.float32)
    b = api.from_dense(codes, scale, None, mask, bits=4, group=group)
    wide = np.repeat(scale * mask, group, 1).astype(np.float64)
    case = (b, (codes - 8.0) * wide, 16 * wide)
    assert api.make_plan(b.row_ptr, 640, 128).chunk_rows.shape == (5, 1)
    check(run, 1, n, k, 4, group, plan_chunk=128, case=case)


def test_empty_rows_and_rows_of_every_length(run):
    n, k, group = 300, 256, 8
    rng = np.random.default_rng(5)
    length = rng.integers(0, 33, n) * (rng.random(n) < 0.4)  # more than half of the rows are empty
    mask = rng.permuted(np.arange(k // group)[None] < length[:, None], axis=1)
    codes = rng.integers(0, 16, (n, k))
    scale = rng.uniform(0.01, 0.1, mask.shape).astype(np.float32)
    b = api.from_dense(codes, scale, None, mask, bits=4, group=group)
    wide = np.repeat(scale * mask, group, 1).astype(np.float64)
    check(run, 2, n, k, 4, group, plan_chunk=256, case=(b, (codes - 8.0) * wide, 16 * wide))


def test_two_cores_share_the_chunks():
    """v4 and v5p: each core sums its own part, an odd number of chunks included."""
    b, w, _ = make(64, 512, 4, 8, rho=0.3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 512)), jnp.float32)
    plan = api.make_plan(b.row_ptr, b.col_idx.shape[0], 1024)
    assert plan.chunk_rows.shape[0] == 3
    spec = api.spec_of(1, 512, 64, b.col_idx.shape[0], bits=4, group=8, chunk=1024, platform="tpu",
                       x_dtype="float32", device="TPU v5", interpret=True)  # fmt: skip
    y = api.pallas_tpu.run(spec, x, *b, None, *plan)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w.T, atol=1e-4)


def test_bias_batch_axes_jit_and_the_dispatched_default():
    b, w, _ = make(24, 64, 4, 16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), jnp.float32)
    bias = jnp.arange(24, dtype=jnp.float32)
    y = jax.jit(lambda *a: api.group_sparse_matmul(*a, bits=4, group=16))(x, b, bias)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w.T + np.arange(24), atol=1e-4)


def test_empty_batch_and_non_contiguous_x(run):
    b, w, _ = make(8, 64, 4, 16)
    assert run.impl.startswith("pallas") or api.group_sparse_matmul(
        jnp.zeros((0, 64)), b, bits=4, group=16, impl=run.impl
    ).shape == (0, 8)
    x = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32).T[::2]
    y = product(run, jnp.asarray(x), b)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, slow(np.inf)])
def test_not_finite_x_reaches_the_rows_that_keep_its_group_and_no_other_row_of_x(run, bad):
    b, w, _ = make(8, 64, 4, 16)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    x[1, 20] = bad
    y = np.asarray(product(run, jnp.asarray(x), b))
    kept = np.asarray(
        bsr.to_dense(b._replace(scale=b.scale * 0 + 1, zero=b.zero * 0 - 1), 64, bits=4, group=16)
    )
    assert not np.isfinite(y[1][kept[:, 20] != 0]).any()
    np.testing.assert_allclose(y[[0, 2]], x[[0, 2]].astype(np.float64) @ w.T, atol=1e-4)


def test_gradient_in_x_scale_zero_and_bias_against_the_dense_product():
    b, w, _ = make(8, 64, 4, 16)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    bias, dy = jnp.zeros(8), jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)

    def loss(x, scale, zero, bias):
        y = api.group_sparse_matmul(
            x, b._replace(scale=scale, zero=zero), bias, bits=4, group=16, impl="reference"
        )
        return (y * dy).sum()

    gx, gs, gz, gb = jax.grad(loss, (0, 1, 2, 3))(x, b.scale, b.zero, bias)
    dw = np.asarray(dy, np.float64).T @ np.asarray(x, np.float64)
    row = np.asarray(bsr.rows(b.row_ptr, len(b.col_idx)))
    group = dw.reshape(8, 4, 16)[row, np.asarray(b.col_idx)]  # [nnz, G]
    code = np.asarray(layout.unpack(b.codes, 16, 4), np.float64)
    np.testing.assert_allclose(gx, np.asarray(dy, np.float64) @ w, atol=1e-4)
    np.testing.assert_allclose(gs, (group * (code - np.asarray(b.zero)[:, None])).sum(1), atol=1e-3)
    np.testing.assert_allclose(gz, -np.asarray(b.scale) * group.sum(1), atol=1e-4)
    np.testing.assert_allclose(gb, np.asarray(dy).sum(0), atol=1e-5)


def test_dense_and_back_and_scipy():
    b, w, _ = make(20, 96, 3, 8)
    dense = np.asarray(api.to_dense(b, 96, bits=3, group=8))
    np.testing.assert_allclose(dense, w, rtol=1e-6)
    data = np.asarray(bsr.values(b, bits=3, group=8))[:, None]
    peer = scipy.sparse.bsr_matrix(
        (data, np.asarray(b.col_idx, np.int32), np.asarray(b.row_ptr)), shape=(20, 96)
    )
    np.testing.assert_array_equal(
        peer.toarray(), dense
    )  # exact: the same numbers in the same places
    assert b.col_idx.dtype == jnp.int16


def test_plan_against_a_loop():
    rng = np.random.default_rng(6)
    length = rng.integers(0, 9, 40) * (rng.random(40) < 0.6)
    ptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    nnz, chunk = int(ptr[-1]), 16
    row = np.repeat(np.arange(40), length)
    parts = [row[i : i + chunk] for i in range(0, nnz, chunk)]
    most = max(len(set(p)) for p in parts)
    plan = api.make_plan(jnp.asarray(ptr), nnz, chunk)
    assert plan.chunk_rows.shape == (len(parts), most)
    for p, want in enumerate(parts):
        distinct = sorted(set(want))
        assert plan.chunk_rows[p].tolist() == distinct + [40] * (most - len(distinct))
        got = np.asarray(plan.slot[p])
        assert np.array_equal(np.asarray(distinct)[got[: len(want)]], want)
        assert (got[len(want) :] == -1).all()
    assert plan.row[0, :nnz].tolist() == row.tolist()


def test_partition_of_tasks():
    rng = np.random.default_rng(0)
    for workers in (1, 3, 4, 16):
        ptr = np.concatenate([[0], np.cumsum(rng.integers(0, 30, 50))])
        starts, makespan = api.partition_tasks(ptr, workers)
        assert starts[0] == 0
        assert starts[-1] == ptr[-1]
        assert makespan == -(-ptr[-1] // workers)
        rows, longest = api.partition_tasks(ptr, workers, "data")
        assert set(rows) <= set(ptr)
        assert rows[-1] == ptr[-1]
        assert makespan <= longest
    even = np.arange(0, 65, 2)  # 32 rows of 2 groups over 8 workers
    assert api.partition_tasks(even, 8)[1] == api.partition_tasks(even, 8, "data")[1] == 8


def test_bits_per_weight_is_gqsas_number_and_counts_real_bytes():
    n, k, group, rho = 32, 128, 16, 0.5
    mask = np.zeros((n, k // group), bool)
    mask[:, ::2] = True
    codes, ones = np.zeros((n, k), int), np.ones(mask.shape, np.float32)
    b = api.from_dense(codes, ones, ones, mask, bits=4, group=group)
    paper = (1 - rho) * (4 + (16 + 4 + 16) / group) + 32 * (n + 1) / n / k
    assert api.bits_per_weight(b, k, scale_bits=16, zero_bits=4) == pytest.approx(paper)
    real = sum(np.asarray(a).nbytes for a in b)
    assert api.bits_per_weight(b, k) == real * 8 / (n * k)
    flow = cost.num_bytes(1, k, n, int(mask.sum()), bits=4, group=group, x="float32")
    assert flow == real + 4 * (k + n)


def test_bad_input_is_named():
    b, _, _ = make(8, 64, 4, 16)
    x = jnp.zeros((2, 64))

    def call(x=x, b=b, bits=4, group=16, **o):
        return api.group_sparse_matmul(x, b, bits=bits, group=group, **o)

    for error, why in (
        (lambda: call(x.astype(jnp.int32)), r"x has dtype int32; use bfloat16 or float16"),
        (lambda: call(bits=9), r"bits=9; use one of 1, 2"),
        (lambda: call(bits=2), r"codes has shape .* expected .*4\); 2 bits, group=16"),
        (lambda: call(group=48), r"group=48 does not divide K=64; use 64, 32, 16, 8"),
        (lambda: call(group=0), r"group=0; a group-sparse weight needs a group"),
        (lambda: call(b=b._replace(scale=b.scale[1:])), r"scale has shape .*one for each kept"),
        (lambda: call(b=b._replace(col_idx=b.col_idx.astype(jnp.uint8))), r"col_idx has dtype uint8"),
        (lambda: call(bias=jnp.zeros(9)), r"bias has shape \(9,\), expected \(8\)"),
        (lambda: call(plan=api.make_plan(b.row_ptr, 1, 128)._replace(row=b.row_ptr[None])), "plan is for"),
        (lambda: call(impl="cuda"), r"impl='cuda'"),
        (lambda: api.from_dense(np.zeros((8, 64)), np.ones((8, 3)), None, np.ones((8, 4), bool), bits=4, group=16),
         r"scale has shape \(8, 3\), expected \(8, 4\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            error()
    with pytest.raises(NotImplementedError, match="pallas_tpu: needs a TPU"):
        call(impl="pallas_tpu")


def refused(name, m=1, k=4096, n=4096, nnz=1000, **o):
    spec = api.spec_of(m, k, n, nnz, **{"bits": 4, "group": 16, **o}, interpret=True)
    return dispatch.choose(api.IMPLS, spec, name).refused


def test_what_the_kernels_take_and_refuse():
    for name in ("pallas_gpu", "pallas_tpu"):
        assert not refused(name)
        assert "dense once" in refused(name, m=65)[0][1]
        assert "empty" in refused(name, nnz=0)[0][1]
    assert "power of two" in refused("pallas_gpu", group=48, k=4800)[0][1]
    assert "power of two" in refused("pallas_gpu", chunk=96)[0][1]
    assert "128 lanes" in refused("pallas_tpu", chunk=96)[0][1]
    assert "bytes of VMEM" in refused("pallas_tpu", m=64, n=65536)[0][1]
