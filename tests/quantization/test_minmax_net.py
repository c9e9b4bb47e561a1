"""Min/max fake quantization against the published formula in float64, running ranges, and whole nets on their grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.nn.resnet import ResNetSize, resnet
from qlab.quantization.blocks import packed_run, run_blocks
from qlab.quantization.minmax_net import (
    apply_minmax,
    calibrate_ranges,
    fake_quant_minmax,
    init_ranges,
    minmax_blocks,
)
from qlab.quantization.observers import ema
from qlab.quantization.timed_study import narrowed


def published(x, bits, lo, hi):
    """S, Z, clip and back, as the paper's code writes them."""
    x, lo, hi = (np.asarray(a, np.float64) for a in (x, lo, hi))
    s = (2**bits - 1) / (hi - lo)
    z = np.round(s * lo) + 2 ** (bits - 1)
    q = np.clip(np.round(s * x - z), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q + z) / s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 2.0, -3.0])  # ranges around, above and below 0
def test_values_are_the_published_ones(bits, shift, rng):
    x = (rng.standard_normal((40, 6)) + shift).astype(np.float32)
    for axis in (None, 0):
        lo, hi = x.min(axis), x.max(axis)
        wide = (1.3 * x).astype(np.float32)  # some of it outside
        ours, theirs = fake_quant_minmax(wide, bits, lo, hi), published(wide, bits, lo, hi)
        step = (hi - lo) / (2**bits - 1)
        off = np.abs(ours - theirs) / step
        # float32 may send a number beside a tie to the other side
        assert (off > 1e-3).mean() < 0.01
        assert off.max() < 1.001


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_error_is_at_most_half_a_step_inside_the_range(bits, rng):
    for lo, hi in ((-1.0, 2.0), (0.0, 0.7), (3.0, 5.0), (-0.013, 1.9)):
        x = rng.uniform(lo, hi, 2000).astype(np.float32)
        x[:2] = lo, hi
        half = (hi - lo) / (2**bits - 1) / 2
        assert np.abs(fake_quant_minmax(x, bits, lo, hi) - x).max() <= half * (1 + 1e-3)


def test_gradients_by_convention():
    x = jnp.array([-2.0, -0.2, 0.1, 0.9, 1.4, 5.0])  # 1.4 rounds onto the last level of [0, 1.5]
    inside = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]

    def grad(ste):
        return jax.grad(lambda x: fake_quant_minmax(x, 2, 0.0, 1.5, ste=ste).sum())(x)

    assert grad("repo").tolist() == [1.0] * 6
    assert grad("clipped").tolist() == inside
    # ranges that follow the weights are constants: no gradient through min and max
    for ste in ("repo", "clipped"):
        own = jax.grad(lambda x, s=ste: fake_quant_minmax(x, 3, x.min(), x.max(), ste=s).sum())(x)
        assert own.tolist() == [1.0] * 6
    with pytest.raises(UserError, match="ste='soft'"):
        fake_quant_minmax(x, 2, 0.0, 1.0, ste="soft")


def test_running_ranges(rng):
    batches = rng.standard_normal((160, 8, 2)).astype(np.float32)
    lows, highs = batches.min((1, 2)), batches.max((1, 2))
    for correction in ("end", "repo"):
        o = ema(0.9, correction=correction)
        state, lo, hi = o.init(2), 0.0, 0.0
        update = jax.jit(o.update)
        for t, x in enumerate(batches, 1):
            state = update(state, x)
            lo, hi = 0.9 * lo + 0.1 * lows[t - 1], 0.9 * hi + 0.1 * highs[t - 1]
            if correction == "repo":
                lo, hi = lo / (1 - 0.9**t), hi / (1 - 0.9**t)
            by = 1 - 0.9**t if correction == "end" else 1.0
            found = o.finalize(state)
            np.testing.assert_allclose(found, (lo / by, hi / by), rtol=1e-3)
            if t == 1:
                np.testing.assert_allclose(found, (lows[0], highs[0]), rtol=1e-5)
            if t == 20 and correction == "repo":
                assert found[1] > 1000 * highs.max()  # the double correction
        plain = np.array([0.1 * 0.9**i for i in range(160)])[::-1]
        np.testing.assert_allclose(found[1], plain @ highs, rtol=0.02)


@pytest.fixture(scope="module")
def family():
    return resnet(ResNetSize(widths=(3,), depth=2, classes=5))


@pytest.fixture(scope="module")
def params(family, draw_resnet):
    return draw_resnet(family)


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (8, 8, 8, 1))


def test_every_relu_has_a_range(family, params, x):
    ranges = init_ranges(family.net, params, x)
    sites = ["stem/out", "block1/mid", "block1/out", "block2/mid", "block2/features"]
    assert sorted(ranges) == sorted(sites)


@pytest.fixture(scope="module")
def run(family, params, x):
    """(params, w_bits, a_bits) -> logits on x, one program for all widths."""
    ranges = init_ranges(family.net, params, x)
    f = jax.jit(lambda p, w, a: apply_minmax(family.net, p, ranges, x, w, a, learn=True)[0])
    return lambda p, w, a: f(p, jnp.float32(w), jnp.float32(a))


def test_nothing_is_rounded_at_32_bits(family, params, x, run):
    np.testing.assert_allclose(run(params, 32, 32), jax.jit(family.apply)(params, x), atol=1e-4)


def test_first_and_last_weights_are_quantized_per_output_channel(params, run):
    """Rounding all kernels by hand, each column on its own grid, gives the same logits."""

    def by_hand(path, a):
        if path[-1].key != "kernel":
            return a
        flat = np.asarray(a)
        done = [published(k, 3, k.min(0), k.max(0)) for k in flat]
        return jnp.asarray(np.stack(done), jnp.float32)

    rounded = jax.tree_util.tree_map_with_path(by_hand, params)
    np.testing.assert_allclose(run(params, 3, 32), run(rounded, 32, 32), atol=1e-3)
    assert float(jnp.abs(run(params, 3, 32) - run(params, 32, 32)).max()) > 1e-2


@pytest.mark.slow
def test_ranges_learn_in_order_and_then_stay(family, params, x):
    ranges = init_ranges(family.net, params, x)
    learnt = jax.jit(lambda r: calibrate_ranges(family.net, params, r, x, 3, 3, batch_size=4))(
        ranges
    )
    assert float(learnt["stem/out"][2]) == 2  # batches
    step = jax.jit(lambda r, x, learn: apply_minmax(family.net, params, r, x, 3, 3, learn=learn))
    by_hand = ranges
    for batch in (x[:4], x[4:]):
        by_hand = step(by_hand, batch, True)[1]
    for a, b in zip(jax.tree.leaves(learnt), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, after = step(learnt, 5 * x[:4], False)
    assert all(
        bool((a == b).all())
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(learnt), strict=True)
    )
    # outputs of ReLUs on a grid of 3 bits take 8 values
    lo, hi = ema().finalize(learnt["stem/out"])
    u = jnp.linspace(float(lo), float(hi), 1000)
    seen = np.unique(np.asarray(fake_quant_minmax(u, 3, lo, hi)))
    assert len(seen) == 8


def test_blocks_are_the_net_as_deployed_and_run_packed(family, params, x):
    """Codes and grids give what the trained net gives, fake-quantized and packed; first and last weights at 8 bits."""
    wide = {"stem": 8, "head": 8, "features": 8}
    ranges = init_ranges(family.net, params, x)
    _, ranges = apply_minmax(family.net, params, ranges, x, 3, 4, learn=True, wide=wide)
    want, _ = apply_minmax(family.net, params, ranges, x, 3, 4, wide=wide)
    blocks = minmax_blocks(family.net, params, ranges, 3, 4, wide=wide)
    np.testing.assert_allclose(run_blocks(family.net, blocks, x), want, rtol=1e-4, atol=1e-4)
    small = narrowed(blocks, 3, wide)
    packed = jax.jit(lambda x: run_blocks(family.net, small, x, packed_run))(x)
    np.testing.assert_allclose(packed, want, rtol=1e-3, atol=1e-3)
    widths = {site: q.bits for b in small for site, q in b.weights.items()}
    assert widths == {s: wide.get(s, 3) for s in widths}
    assert {"stem", "head", "conv1"} <= set(widths)
    top = {site: int(q.codes.max()) for b in blocks for site, q in b.weights.items()}
    assert top["stem"] == top["head"] == 255
    assert top["conv1"] == 7
    ends = {site: float(a.q_max.max()) for b in blocks for site, a in b.acts.items()}
    assert ends["features"] == 255
    assert ends["mid"] == 15
