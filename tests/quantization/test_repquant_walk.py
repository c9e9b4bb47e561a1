"""RepQuant over blocks and nets: norms rewritten on the way, against the plain walk, the float net and packed execution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.configs.repquant import get_config
from qlab.experiments.repquant import cells, rewrite
from qlab.lab.errors import UserError
from qlab.nn.outliers import norm_outliers, norm_twin
from qlab.nn.sites import capture, pick
from qlab.nn.vit import LINKS
from qlab.quantization.blocks import (
    fake_run,
    nearest_weight,
    packed_run,
    quantize_block,
    run_blocks,
)
from qlab.quantization.norm_links import LinkInput, Rewrite, linked_block, norm_transform, smooth
from qlab.quantization.qtensor import dequantize
from qlab.quantization.quantile_ranges import calib_affine_quantile
from qlab.quantization.repquant import (
    quantize_vit,
    reparam,
    reparam_factors,
    repquant,
    site_acts,
    weight_error,
)
from qlab.quantization.transforms import affine_norm, chain

GRID = {"calibration": "shares", "n_grid": 10}
apply = jax.jit(lambda net, params, x: net.apply(params, x), static_argnums=0)
run_block = jax.jit(lambda block, params, x: block(params, x), static_argnums=0)


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (12, 8, 8, 1))


@pytest.fixture(scope="module")
def twin(params):
    return norm_twin(params, LINKS, 2.5, jax.random.key(3))


def test_transforms_keep_the_function_and_chain(net, params, twin, x):
    y = apply(net, params, x)
    bound = 1e-4 * float(jnp.abs(y).max())
    np.testing.assert_allclose(apply(net, twin, x), y, atol=bound)
    spread = np.ptp(np.log2(np.abs(twin[1]["norm1"]["scale"] / params[1]["norm1"]["scale"])))
    assert 3.0 < spread <= 5.0
    t1, t2 = (norm_transform(net, LINKS, f, 4) for f in (smooth(), reparam("quantile")))
    for transform in (t1, t2, chain(t1, t2)):
        new = transform(twin, x, jax.random.key(0))
        np.testing.assert_allclose(apply(net, new, x), y, atol=bound)
        assert not np.allclose(new[1]["fc1"]["kernel"], twin[1]["fc1"]["kernel"])
    # any t of the right form, and its inverse
    r, c = 2.0 ** jax.random.normal(jax.random.key(5), (2, 2, 16))
    block = affine_norm(twin[1], "norm1", ("qkv",), r, c)
    np.testing.assert_allclose(apply(net, (twin[0], block, twin[2]), x), y, atol=bound)
    back = affine_norm(block, "norm1", ("qkv",), 1 / r, -c * r)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(twin[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_shift_needs_a_bias_and_rms_norms_go_symmetric():
    block = {"norm": {"scale": jnp.ones(3)}, "fc": {"kernel": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="'norm' has no bias"):
        affine_norm(block, "norm", ("fc",), jnp.ones(3), jnp.ones(3))
    rng = np.random.default_rng(8)
    x = np.float32(rng.standard_normal((400, 12)) * 2.0 ** np.linspace(-2, 2, 12) + 1.0)
    made = jax.jit(reparam("none", symmetric=True))(
        LinkInput(x, np.ones((2, 12)), jnp.float32(4), jax.random.key(0))
    )
    assert made.c is None
    assert float(made.record.zero) == 0.0
    peak = np.abs(x).max(0)
    np.testing.assert_allclose(made.r, peak / peak.mean(), rtol=1e-5)


class Walk:
    """One encoder block by `linked_block`, compiled once; which sites it asked for weights."""

    def __init__(self, block):
        self.seen = []
        self.block = block
        weight = nearest_weight(max_bits=4, **GRID)

        def counted(i):
            self.seen.append(i.site)
            return weight(i)

        self.run = jax.jit(
            partial(
                linked_block, block, links=LINKS[::-1], fit=reparam("quantile"),
                act=site_acts(), weight=counted,
            )
        )  # fmt: skip

    def __call__(self, p, x_q, x_fp):
        q, failed = self.run(p, x_q, x_fp, 4.0, 4.0, jax.random.key(0))
        assert float(failed) == 0
        return q


@pytest.fixture(scope="module")
def walk(net):
    return Walk(net.groups[1].block)


@pytest.fixture(scope="module")
def inputs(net, params, x):
    """(x_q, x_fp) of the encoder's blocks."""
    x_fp = run_block(net.groups[0].block, pick(params[0], 0), x)
    return x_fp + 0.01 * jax.random.normal(jax.random.key(4), x_fp.shape), x_fp


def test_the_walk_rewrites_each_norm_once_and_quantizes_each_site_once(walk, params, inputs):
    p = norm_outliers(pick(params[1], 1), LINKS, 2.5, jax.random.key(3))
    q = walk(p, *inputs)
    assert walk.seen == ["qkv", "proj", "fc1", "fc2"]
    y = run_block(walk.block, p, inputs[0])
    np.testing.assert_allclose(
        run_block(walk.block, q.params, inputs[0]), y, atol=1e-4 * float(jnp.abs(y).max())
    )
    # the first norm sees the block's input itself: its grid is the one of its float outputs
    _, inside = jax.jit(partial(capture, walk.block))(p, inputs[0])
    s, z = jax.jit(partial(calib_affine_quantile, axis=-1))(inside["qkv"], 4.0)
    r, _, s_all, z_all = reparam_factors(s, z)
    np.testing.assert_allclose(q.acts["qkv"].scale, s_all, rtol=1e-5)
    assert float(q.acts["qkv"].zero) == float(z_all)
    np.testing.assert_allclose(q.params["norm1"]["scale"], p["norm1"]["scale"] / r, rtol=1e-5)
    # weights are calibrated on the rewritten matrix
    w = q.params["qkv"]["kernel"].T
    assert float(jnp.abs(dequantize(q.weights["qkv"]) - w).max()) < float(
        q.weights["qkv"].scale.max()
    )


def test_the_twin_of_a_block_is_quantized_to_the_same_block(walk, params, inputs):
    """Reparameterisation undoes any factors per channel: what a twin cannot show about it."""
    p = pick(params[1], 1)
    plain = walk(p, *inputs)
    twin = walk(norm_outliers(p, LINKS, 2.5, jax.random.key(3)), *inputs)
    for site in ("qkv", "proj", "fc1", "fc2"):
        same = plain.weights[site].codes == twin.weights[site].codes
        assert (
            np.mean(same) > 0.99
        )  # a weight on the edge between two codes may fall to either side
    for site in ("qkv", "fc1"):
        assert float(plain.acts[site].zero) == float(twin.acts[site].zero)


@pytest.mark.slow
def test_a_rewrite_of_nothing_is_the_plain_walk(net, params, inputs):
    p, block = pick(params[1], 0), net.groups[1].block
    ways = {"act": site_acts("uniform"), "weight": nearest_weight(max_bits=4, **GRID)}
    args = (p, *inputs, 4.0, 4.0, jax.random.key(0))
    plain, _ = jax.jit(partial(quantize_block, block, **ways))(*args)
    nothing = partial(linked_block, block, links=LINKS, fit=lambda i: Rewrite(jnp.ones(16)))
    linked, _ = jax.jit(partial(nothing, **ways))(*args)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(linked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no site is called 'fc3'; the block has qkv"):
        linked_block(block, *args, links=(("norm1", ("fc3",)),), fit=smooth(), **ways)


@pytest.mark.slow
def test_packed_execution_is_the_fake_one(net, twin, x):
    method = repquant(reparam("dual", steps=5), site_acts(), max_bits=4, **GRID)
    for a_bits in (4, 8):
        q, failed = quantize_vit(net, twin, x, a_bits=a_bits, method=method)
        assert float(failed) == 0
        y = jax.jit(partial(run_blocks, net))(q, x)
        packed = jax.jit(lambda x, q=q: run_blocks(net, q, x, packed_run))(x)
        gap = np.abs(packed - y) / np.abs(y).max()
        # a value on the edge between two codes may fall to either side
        assert np.median(gap) < 1e-4
        assert gap.max() < 0.1


@pytest.mark.slow
def test_block_rounding_lowers_the_blocks_error(net, params):
    block, p = net.groups[1].block, pick(params[1], 0)
    # Correlated inputs (on white ones nearest is near the best) and fine activations: what is left is the weights'.
    rng = np.random.default_rng(5)
    x = rng.standard_normal((12, 16, 3)) @ rng.standard_normal((3, 16))
    x = np.float32(x + 0.05 * rng.standard_normal(x.shape))

    def error(reconstruction):
        method = repquant(
            reparam("quantile"), site_acts("uniform"), reconstruction=reconstruction, num_iters=150,
            max_bits=3, **GRID,
        )  # fmt: skip

        @jax.jit
        def quantized(p):
            q, _ = method(block, p, x, x, 3.0, 8.0, jax.random.key(0))
            return q, ((block(q.params, x, fake_run(q)) - block(p, x)) ** 2).mean()

        q, found = quantized(p)
        assert q.weights["fc1"].codes.max() <= 7
        return float(found)

    assert error("adaround") < 0.85 * error("none")  # measured: 0.76


def test_weight_error_is_of_the_linked_weights(params):
    error = jax.jit(lambda p, bits: weight_error(p, LINKS, bits, calibration="minmax"))
    p = pick(params[1], 0)
    assert 0 < error(p, 4.0) < error(p, 3.0)
    scaled = affine_norm(p, "norm1", ("qkv",), 2.0 ** jnp.linspace(-3, 3, 16))
    assert float(error(scaled, 4.0)) != float(error(p, 4.0))


def test_quantize_vit_refuses_what_it_cannot_use(net, params, x):
    for bad in ({"w_bits": 1}, {"a_bits": 9}, {"a_bits": 4.0}):
        with pytest.raises(UserError, match=r"a width from 2 to 8"):
            quantize_vit(net, params, x, **bad)
    with pytest.raises(UserError, match="empty or not finite"):
        quantize_vit(net, params, x.at[0, 0, 0, 0].set(jnp.nan))
    with pytest.raises(UserError, match="empty or not finite"):
        quantize_vit(net, params, x[:0])
    with pytest.raises(ValueError, match="norm1 or norm2"):
        norm_twin(({"norm": {}},), LINKS, 1.0, jax.random.key(0))


def test_cells_are_read_from_their_names_and_the_anchor_comes_again():
    c = get_config()
    names = [cell.name for cell in cells(c)]
    assert names == [c.anchor, *c.cells]
    assert [cell[1:] for cell in cells(c)][-2:] == [(4, 4, "plain", 0, 0), (4, 4, "twin", 0, 0)]
    assert cells(c)[0][1:] == (4, 4, "twin", 1, 1)
    c.cells = ("w4a4_twn",)
    with pytest.raises(UserError, match="'w4a4_twn'"):
        cells(c)
    c.rewrite = "reparm"
    with pytest.raises(UserError, match='use "none", "smooth" or "reparam"'):
        rewrite(c)
