import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import (
    QTensor,
    clip_ste,
    dequantize,
    pack,
    pack_qtensor,
    round_ste,
    unpack,
    unpack_qtensor,
)
from qlab.quantization.packing import packed_width
from qlab.quantization.qtensor import expand, row_bytes


def numpy_bits(codes, bits):
    """The bit stream written out bit by bit in plain Python."""
    rows = []
    for row in np.asarray(codes, int):
        stream = [(int(v) >> k) & 1 for v in row for k in range(bits)]
        stream += [0] * (-len(stream) % 8)
        rows.append(
            [sum(b << k for k, b in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]
        )
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 8, 13])
def test_packing_is_the_little_endian_bit_stream(bits, n):
    rng = np.random.default_rng(bits * 100 + n)
    codes = rng.integers(0, 2**bits, (3, n))
    packed = pack(jnp.asarray(codes, jnp.uint8), bits)
    np.testing.assert_array_equal(packed, numpy_bits(codes, bits))
    assert packed.shape == (3, packed_width(n, bits)) == (3, -(-n * bits // 8))
    back = unpack(packed, bits, n)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)
    low = -(2 ** (bits - 1))
    signed = jnp.asarray(codes + low, jnp.int8)
    back = unpack(pack(signed, bits, q_min=low), bits, n, q_min=low)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, signed)


def test_packing_refuses_widths_it_cannot_hold():
    with pytest.raises(ValueError, match="bits=9"):
        pack(jnp.zeros((1, 1), jnp.uint8), 9)


@pytest.mark.parametrize("kind", ["symmetric", "zero", "offset", "group"])
def test_dequantize_against_numpy_float64(kind):
    rng = np.random.default_rng(0)
    bits, rows, cols = 3, 4, 10
    groups = 2 if kind == "group" else 1
    scale = rng.uniform(0.1, 1, (rows, groups)).astype(np.float32)
    low = -4 if kind == "symmetric" else 0
    codes = rng.integers(low, low + 8, (rows, cols))
    zero = (
        rng.integers(0, 8, (rows, groups)).astype(np.float32) if kind in ("zero", "group") else None
    )
    offset = rng.standard_normal((rows, groups)).astype(np.float32) if kind == "offset" else None
    dtype = jnp.int8 if kind == "symmetric" else jnp.uint8
    as_jax = [None if a is None else jnp.asarray(a) for a in (zero, offset)]
    qt = QTensor(jnp.asarray(codes, dtype), jnp.asarray(scale), *as_jax, bits, (1,), (rows, cols))
    wide = [
        np.repeat(np.float64(0 if a is None else a) * np.ones((rows, groups)), cols // groups, 1)
        for a in (scale, zero, offset)
    ]
    expected = wide[0] * (codes - wide[1]) + wide[2]
    np.testing.assert_allclose(dequantize(qt), expected, rtol=1e-6, atol=1e-7)
    packed = pack_qtensor(qt)
    assert packed.codes.dtype == jnp.uint8
    assert packed.codes.shape == (rows, row_bytes(cols, bits, qt.group))
    np.testing.assert_array_equal(dequantize(packed), dequantize(qt))
    assert packed.nbytes == packed.codes.size + 4 * sum(
        a.size for a in (scale, zero, offset) if a is not None
    )


def planar(codes, bits, group):
    """The kernels' layout by its definition, code by code in plain Python (unsigned codes, 2-D)."""
    widths = [p for p in (8, 4, 2, 1) if bits & p]
    rows = []
    for row in np.asarray(codes, int):
        out, first = [], 0
        for p in widths:
            for start in range(0, len(row), group):
                cut = list(row[start : start + group])
                n = -(-group * p // 8)
                octets = [0] * n
                for c, v in enumerate(cut):
                    octets[c % n] |= ((int(v) >> first) & (2**p - 1)) << (p * (c // n))
                out += octets
            first += p
        rows.append(out)
    return np.array(rows, np.uint8)


CUTS = [(3, 1, 0), (7, 13, 0), (3, 24, 8), (4, 10, 5), *((b, 37, 16) for b in range(1, 9))]


@pytest.mark.parametrize(("bits", "n", "group"), CUTS)
def test_packed_codes_are_planar_and_come_back(bits, n, group):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (3, n))
    num = -(-n // group) if group else 1
    pad = (num * group - n) if group else 0
    wide = jnp.asarray(np.pad(codes, [(0, 0), (0, pad)]), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 1, (3, num)), jnp.float32)
    low = 2 ** (bits - 1)
    for zero, held in ((jnp.ones((3, num)), wide), (None, (wide.astype(int) - low).astype("int8"))):
        qt = QTensor(held, scale, zero, None, bits, (1,), (3, n))
        assert qt.group == (group if num > 1 else 0)
        packed = pack_qtensor(qt)
        cut = group if group and group % 8 == 0 and num > 1 else n
        np.testing.assert_array_equal(packed.codes, planar(codes, bits, cut))
        assert packed.group == qt.group
        back = unpack_qtensor(packed)
        assert jax.tree.structure(back) == jax.tree.structure(qt)
        assert back.codes.dtype == qt.codes.dtype
        np.testing.assert_array_equal(back.codes, qt.codes)
        np.testing.assert_array_equal(dequantize(packed), dequantize(qt))


def test_a_padded_group_axis_is_cut_off_and_packs():
    # 9 columns in groups of 4: three scales, which would also fit groups of 3
    codes = jnp.arange(24, dtype=jnp.uint8).reshape(2, 12) % 8
    scale = jnp.array([[1.0, 2.0, 4.0]] * 2)
    qt = QTensor(codes, scale, jnp.zeros((2, 3)), None, 3, (1,), (2, 9))
    want = np.asarray(codes[:, :9]) * np.repeat([1, 2, 4], 4)[:9]
    for q in (qt, pack_qtensor(qt)):
        assert q.group == 4
        np.testing.assert_array_equal(dequantize(q), want)


def test_codes_of_the_wrong_sign_are_refused():
    qt = QTensor(jnp.zeros((2, 3), jnp.uint8), jnp.ones((2, 1)), None, None, 3, (1,), (2, 3))
    with pytest.raises(ValueError, match="codes are uint8; int8 is expected"):
        pack_qtensor(qt)


@pytest.mark.parametrize(("cols", "groups"), [(10, 1), (9, 1), (64, 2)])
def test_stored_bits_are_those_of_the_packed_arrays(cols, groups):
    codes, ones = jnp.zeros((6, cols), jnp.uint8), jnp.ones((6, groups))
    qt = QTensor(codes, ones, ones, None, 3, (1,), (6, cols))
    packed = pack_qtensor(qt)
    # a zero point of at most 8 bits is one byte on disk, f32 in memory
    num_bytes = packed.codes.nbytes + packed.scale.nbytes + packed.zero.size
    assert qt.stored_bits == packed.stored_bits == 8 * num_bytes / (6 * cols)


def test_qtensor_is_a_pytree_with_static_layout():
    qt = QTensor(
        jnp.zeros((2, 3), jnp.uint8), jnp.ones((2, 1)), jnp.ones((2, 1)), None, 3, (1,), (2, 3)
    )
    leaves, tree = jax.tree.flatten(qt)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, leaves).bits == 3
    np.testing.assert_array_equal(jax.jit(dequantize)(qt), -np.ones((2, 3)))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), qt)
    assert jax.vmap(dequantize)(stacked).shape == (2, 2, 3)


def test_repr_tells_shape_bits_granularity_and_bytes():
    codes = jnp.zeros((4, 64), jnp.uint8)
    qt = QTensor(codes, jnp.ones((4, 2)), jnp.ones((4, 2)), None, 3, (1,), (4, 64))
    assert repr(qt) == "QTensor(4 x 64, 3 bits asymmetric, per group of 32, 320 bytes unpacked)"
    packed = repr(pack_qtensor(qt))
    assert packed == "QTensor(4 x 64, 3 bits asymmetric, per group of 32, 160 bytes packed)"
    one = QTensor(codes.astype(jnp.int8), jnp.ones((1, 1)), None, None, 8, (0, 1), (4, 64))
    assert repr(one) == "QTensor(4 x 64, 8 bits symmetric, per tensor, 260 bytes unpacked)"
    real = QTensor(codes, jnp.ones((4, 1)), None, jnp.ones((4, 1)), 2, (1,), (4, 64))
    assert "2 bits real offset, per channel" in repr(real)
    assert repr(jax.eval_shape(lambda: qt)) == repr(qt)
    assert "of str" in repr(jax.tree.map(lambda _: "x", qt))


def stack(num=3, group=16):
    """Packed layers of one shape, stacked on a leading axis, and the same unpacked."""
    rng = np.random.default_rng(0)
    qts = []
    for _ in range(num):
        codes = jnp.asarray(rng.integers(-4, 4, (8, 32)), jnp.int8)
        scale = jnp.asarray(rng.uniform(0.1, 1, (8, 32 // group)), jnp.float32)
        qts.append(QTensor(codes, scale, None, None, 3, (1,), (8, 32)))
    join = lambda *a: jnp.stack(a)  # noqa: E731
    return jax.tree.map(join, *map(pack_qtensor, qts)), jax.tree.map(join, *qts)


def test_packed_tensors_go_through_jit_vmap_scan_and_grad():
    packed, plain = stack()
    want = jax.vmap(dequantize)(plain)
    np.testing.assert_array_equal(jax.jit(jax.vmap(dequantize))(packed), want)
    _, scanned = jax.lax.scan(lambda c, qt: (c, dequantize(qt)), 0, packed)
    np.testing.assert_array_equal(scanned, want)
    again = jax.jit(jax.vmap(pack_qtensor))(plain)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    np.testing.assert_array_equal(again.codes, packed.codes)
    one = jax.tree.map(lambda a: a[0], packed)

    def total(scale):
        return (dequantize(dataclasses.replace(one, scale=scale)) ** 2).sum()

    grad = jax.grad(total)(one.scale)
    codes = np.asarray(plain.codes[0], np.float64).reshape(8, 2, 16)
    np.testing.assert_allclose(grad, 2 * one.scale * (codes**2).sum(-1), rtol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qlab.quantization import dequantize, pack_qtensor, quantize_matrix

assert jax.device_count() == 2, jax.devices()
mesh = Mesh(np.array(jax.devices()), ("rows",))
w = jax.random.normal(jax.random.key(0), (8, 32))
for granularity in ("tensor", "channel", "group:16"):
    qt = quantize_matrix(w, method="rtn", bits=3, granularity=granularity)
    for q in (qt, pack_qtensor(qt)):
        place = jax.tree.map(lambda a: NamedSharding(mesh, P("rows" if a.shape[0] > 1 else None)), q)
        split = jax.device_put(q, place)
        w_hat = jax.jit(dequantize)(split)
        assert len(w_hat.addressable_shards) == 2 and w_hat.addressable_shards[0].data.shape == (4, 32)
        np.testing.assert_array_equal(w_hat, dequantize(q))
        np.testing.assert_array_equal(jax.jit(pack_qtensor)(split).codes, pack_qtensor(q).codes)
"""


def test_rows_can_be_sharded():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_expand_repeats_groups_of_neighbours():
    np.testing.assert_array_equal(expand(jnp.array([[1.0, 2.0]]), (1, 6)), [[1, 1, 1, 2, 2, 2]])
    assert expand(jnp.ones((4, 1)), (4, 6)).shape == (4, 1)


def test_clip_ste_has_gradient_one_on_the_rails_and_zero_outside():
    r = jnp.array([-1.0, 0.0, 1.0, 7.0, 8.0])
    np.testing.assert_array_equal(clip_ste(r, 0, 7), jnp.clip(r, 0, 7))
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(lambda a: clip_ste(a, 0.0, 7.0)))(r), [0, 1, 1, 1, 0]
    )


@pytest.mark.parametrize("ties", ["half_even", "half_up"])
def test_round_ste_is_exact_with_gradient_one(ties):
    rng = np.random.default_rng(0)
    u = np.concatenate([rng.uniform(-300, 300, 10_000), [0.5, 1.5, -0.5, -1.5, 2.5, 1e-30]]).astype(
        np.float32
    )
    expected = np.round(u) if ties == "half_even" else np.floor(u.astype(np.float64) + 0.5)
    got = jax.jit(lambda a: round_ste(a, ties))(jnp.asarray(u))
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    grads = jax.vmap(jax.grad(lambda a: round_ste(a, ties)))(jnp.asarray(u[:50]))
    np.testing.assert_array_equal(grads, np.ones(50))
