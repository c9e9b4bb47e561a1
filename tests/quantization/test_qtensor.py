import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import QTensor, clip_ste, dequantize, pack, pack_qtensor, round_ste, unpack
from qlab.quantization.packing import packed_width
from qlab.quantization.qtensor import expand


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
    assert packed.codes.shape == (rows, packed_width(cols, bits))
    np.testing.assert_array_equal(dequantize(packed), dequantize(qt))
    assert packed.nbytes == packed.codes.size + 4 * sum(
        a.size for a in (scale, zero, offset) if a is not None
    )


def test_a_padded_group_axis_is_cut_off_and_packs():
    codes = jnp.arange(12, dtype=jnp.uint8).reshape(2, 6) % 8
    qt = QTensor(codes, jnp.ones((2, 2)), jnp.zeros((2, 2)), None, 3, (1,), (2, 5))
    assert dequantize(qt).shape == (2, 5)
    np.testing.assert_array_equal(dequantize(pack_qtensor(qt)), codes[:, :5])


def test_stored_bits_are_those_of_the_packed_arrays():
    qt = QTensor(
        jnp.zeros((6, 10), jnp.uint8), jnp.ones((6, 1)), jnp.zeros((6, 1)), None, 3, (1,), (6, 10)
    )
    packed = pack_qtensor(qt)
    # a zero point of at most 8 bits is one byte on disk, f32 in memory
    num_bytes = packed.codes.nbytes + packed.scale.nbytes + packed.zero.size
    assert qt.stored_bits == 8 * num_bytes / 60


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
    assert "2 x 3" in repr(qt)
    assert "3 bits" in repr(qt)


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
