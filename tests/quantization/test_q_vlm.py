"""Q-VLM on a net of one decoder block (four layers): searches against ones written out, ranges, memory, the study."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlab.configs.q_vlm import get_config
from qlab.experiments.q_vlm import build, cells
from qlab.lab.errors import UserError
from qlab.nn.gpt import STAGES
from qlab.nn.sites import Run
from qlab.nn.vlm import LINKS, VLMSize, vlm
from qlab.quantization.activations import affine, encode, fake
from qlab.quantization.blocks import packed_run, run_blocks, scan_quantized
from qlab.quantization.encoder_ranges import front, front_ranges, search_front, tune_encoder
from qlab.quantization.language_layers import (
    channel_range,
    dependency_proxies,
    float_pass,
    layer,
    shrunk,
    start_state,
)
from qlab.quantization.norm_links import LinkInput, awq, norm_transform
from qlab.quantization.q_vlm import (
    SHARES,
    Options,
    pair_gaps,
    quantize_vlm,
    search_blocks,
    search_layers,
)
from qlab.quantization.qtensor import dequantize
from qlab.quantization.vlm_study import spearman
from qlab.quantization.vlm_weights import PRODUCTS, memory_report, round_weights, with_weights

SIZE = VLMSize(
    vision_dim=8, vision_depth=1, vision_heads=2, vision_hidden=16, vocab=9, dim=16, depth=1,
    heads=2, kv_heads=1, hidden=20, question=3,
)  # fmt: skip
L = 4
BITS = jnp.float32(3)
GRID = jnp.array([1.0, 0.8, 0.6, 0.4])
NEAREST = Options(weight_grid="minmax")


@pytest.fixture(scope="module")
def net():
    return vlm(SIZE)


@pytest.fixture(scope="module")
def params(net):
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    rng = np.random.default_rng(5)
    made = [jnp.asarray(rng.standard_t(4, a.shape) * 0.3, jnp.float32) for a in leaves]
    return jax.tree.unflatten(tree, made)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(6)
    image = jnp.asarray(rng.random((6, 8, 8, 1)), jnp.float32)
    return {"image": image, "question": jnp.asarray(rng.integers(0, 9, (6, 2, 3)), jnp.int32)}


class Case:
    """The decoder behind a rounded encoder, ready to be searched."""

    def __init__(self, net, params, x):
        self.net = net
        self.decoder = jax.tree.map(lambda a: a[0], params[3])
        self.rounded = with_weights(
            params, round_weights(net, params, jnp.float32(4), grid=NEAREST.weight_grid)
        )
        self.ranges, tokens = front_ranges(net, params, x, PRODUCTS)
        self.seen = float_pass(net, params[3], tokens)
        self.state = start_state(
            self.rounded[3], front(net, self.rounded[:3], self.ranges, x, BITS)
        )
        self.module = nnx.merge(
            net.groups[3].block.graph, jax.tree.map(lambda a: a[0], self.rounded[3])
        )

    def by_hand(self, state, k, share):
        """Layer k by its own stage, the input on share * (lo, hi) by the repository's formula in NumPy."""
        lo, hi = (np.float32(a[0] * np.float32(share)) for a in self.seen.ranges[STAGES[k]])
        s = 7 / (hi - lo)
        z = np.round(s * lo) + 4

        def product(site, product, x):
            q = np.clip(np.round(s * np.asarray(x) - z), -4, 3)
            return product(jnp.asarray((q + z) / s, jnp.float32))

        return self.module.stage(STAGES[k], *state, Run(product, lambda site, x: x))

    def error(self, k, state):
        """Mean squared error of what layer k writes."""
        part = 1 if k % 2 == 0 else 0
        width = {0: 32, 2: 20}.get(k, 16)
        target = self.seen.outputs[part][k]
        return float(((state[part] - target)[..., :width] ** 2).mean())

    def search(self, partition, options=Options(), grid=GRID):  # noqa: B008
        return search_blocks(
            self.net, self.rounded[3], self.seen, BITS, self.state, grid, partition, options
        )

    def losses(self, shares, partition):
        """Of every block under these shares."""
        state, out = self.state, []
        for i, j in partition:
            for k in range(i, j + 1):
                state = self.layer(k, state, shares[k])
            out.append(self.error(j, state))
        return out

    def layer(self, k, state, share):
        return _layer(self.net, self.rounded[3], self.seen.ranges, BITS, k, state, share)


_layer = jax.jit(layer, static_argnums=0)


@pytest.fixture(scope="module")
def case(net, params, x):
    return Case(net, params, x)


def test_the_grid_is_the_repositorys_quantizer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    x[:, 2] = 0.0  # a constant channel: no division by 0

    @jax.jit
    def rounded(x, bits):
        lo, hi = channel_range(x, (0,))
        record = affine(lo, hi, bits)
        return lo, hi, fake(record, x), encode(record, x)

    for bits in (2, 4, 8):
        lo, hi, x_hat, codes = map(np.asarray, rounded(x, jnp.float32(bits)))
        assert hi[2] - lo[2] == np.float32(1e-5)
        s = (2**bits - 1) / (hi - lo)
        z = np.round(s * lo) + 2 ** (bits - 1)
        q = np.clip(np.round(s * x - z), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        np.testing.assert_allclose(x_hat, (q + z) / s, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(codes, q + 2 ** (bits - 1))


def test_a_layer_is_its_stage_with_a_rounded_input_and_all_of_them_are_the_block(case):
    state = case.state
    for k, share in enumerate((1.0, 0.6, 0.9, 0.4)):
        want = case.by_hand(state, k, share)
        state = case.layer(k, state, share)
        np.testing.assert_allclose(state[0], want[0], atol=2e-5)
        np.testing.assert_allclose(state[1], want[1], atol=2e-5)
    block = case.net.groups[3].block
    want = jax.jit(lambda p, x: block(p, x))(case.decoder, case.seen.start[0])
    np.testing.assert_allclose(case.seen.outputs[0][-1], want, atol=1e-4)


def test_blocks_of_one_are_sequential_search_of_each_output(case):
    shares, _ = case.search(((0, 0), (1, 1), (2, 2), (3, 3)))
    state, want = case.state, []
    for k in range(L):
        tried = [case.error(k, case.by_hand(state, k, s)) for s in GRID.tolist()]
        want.append(GRID[int(np.argmin(tried))])
        state = case.by_hand(state, k, float(want[-1]))
    np.testing.assert_array_equal(shares, jnp.stack(want))


@pytest.mark.slow
def test_exhaustive_search_is_the_best_there_is(case):
    """Of all four layers as one block, against every combination and the other searches."""
    whole = ((0, 3),)
    shares, cost = case.search(whole)
    best = case.losses(shares, whole)[0]
    table = [case.losses(s, whole)[0] for s in itertools.product(GRID.tolist(), repeat=L)]
    assert best == pytest.approx(min(table), rel=1e-4)
    assert max(table) > 1.2 * best  # there is something to find
    assert cost.blocks == 4**4
    descent, cheap = case.search(whole, Options(exhaustive=0))
    apart, _ = case.search(((0, 0), (1, 1), (2, 2), (3, 3)))
    errors = search_layers(case.net, case.rounded[3], case.seen.ranges, BITS, case.state, GRID, 2.0)
    for other in (descent, apart, errors):
        assert best <= case.losses(other, whole)[0] * (1 + 1e-5)
    assert case.losses(descent, whole)[0] <= case.losses(errors, whole)[0] * (1 + 1e-5)
    assert cheap.blocks == 1 + 2 * L * 4


@pytest.mark.slow
@pytest.mark.parametrize("partition", [((0, 1), (2, 3)), ((0, 2), (3, 3)), ((0, 0), (1, 3))])
def test_a_joint_search_is_never_worse_than_sequential_ones_on_any_block(case, partition):
    """From the same inputs: the sequential shares take the joint search's own prefix."""
    joint, _ = case.search(partition)
    losses = case.losses(joint, partition)
    for (i, j), own in zip(partition, losses, strict=True):
        state = case.state
        for k in range(i):
            state = case.layer(k, state, joint[k])
        for judge in ("output", "input"):
            y = state
            for k in range(i, j + 1):
                if judge == "output":
                    tried = [case.error(k, case.layer(k, y, s)) for s in GRID]
                else:
                    tried = [_input_error(case, k, y, s) for s in GRID.tolist()]
                y = case.layer(k, y, GRID[int(np.argmin(tried))])
            assert own <= case.error(j, y) * (1 + 1e-5)


def _input_error(case, k, state, share):
    lo, hi = (a[0] for a in case.seen.ranges[STAGES[k]])
    found = []

    def product(site, product, x):
        found.append(float(((fake(shrunk(lo, hi, share, BITS), x) - x) ** 2).mean()))
        return product(x)

    case.module.stage(STAGES[k], *state, Run(product, lambda site, x: x))
    return found[0]


@pytest.mark.slow
def test_layerwise_search_looks_at_inputs_only(case):
    got = search_layers(case.net, case.rounded[3], case.seen.ranges, BITS, case.state, GRID, 2.0)
    state = case.state
    for k in range(L):
        tried = [_input_error(case, k, state, s) for s in GRID.tolist()]
        assert float(got[k]) == float(GRID[int(np.argmin(tried))])
        state = case.layer(k, state, got[k])


@pytest.mark.slow
def test_gaps_are_sequential_less_joint(case):
    gaps, relative = pair_gaps(case.net, case.rounded[3], case.seen, BITS, case.state, GRID)
    state = case.state
    for k in range(L - 1):
        firsts = [case.layer(k, state, s) for s in GRID]
        table = np.array(
            [[case.error(k + 1, case.layer(k + 1, y, s)) for s in GRID] for y in firsts]
        )
        own = int(np.argmin([case.error(k, y) for y in firsts]))
        assert float(gaps[k]) == pytest.approx(table[own].min() - table.min(), abs=1e-5)
        assert float(relative[k]) == pytest.approx(1 - table.min() / table[own].min(), abs=1e-3)
        state = case.layer(k, state, 1.0)


@pytest.mark.slow
def test_a_grid_of_1_alone_is_rounding_to_nearest_on_whole_ranges(net, params, x):
    made = [
        quantize_vlm(net, params, x, w_bits=4, a_bits=4, options=o)
        for o in (
            NEAREST._replace(search="minmax"),
            NEAREST._replace(shares=(1.0,), vision_shares=(1.0,)),
            NEAREST._replace(search="layerwise", shares=(1.0,), vision_shares=(1.0,)),
        )
    ]
    for other in made[1:]:
        for a, b in zip(
            jax.tree.leaves(made[0].blocks), jax.tree.leaves(other.blocks), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    seen = front_ranges(net, params, x, PRODUCTS)[0][1]["fc1"]
    record = made[0].blocks[1].acts["fc1"]
    np.testing.assert_allclose(record.scale, (seen[1] - seen[0]) / 15, rtol=1e-6)
    assert record.scale.shape == (1, 16, 1)  # a range for each token row
    assert made[0].blocks[3].acts["down"].scale.shape == (1, 20)  # and one for each channel
    assert made[0].sites == 2 * (4 + 1 + 4)  # weights and inputs of encoder, projector and decoder


@pytest.fixture(scope="module")
def quantized(net, params, x):
    options = NEAREST._replace(shares=tuple(GRID.tolist()))
    return quantize_vlm(net, params, x, w_bits=4, a_bits=3, options=options)


@pytest.mark.slow
def test_the_quantized_net_is_what_was_searched(net, case, quantized, x):
    """Blocks run by themselves give the state that the search ended with."""
    y = x
    for group, q in zip(net.groups[:4], quantized.blocks, strict=False):
        y = scan_quantized(group, q, y)
    weights = [0.0] * L
    ends = search_front(net, case.rounded[:3], case.ranges, x, BITS, jnp.array([1.0, 0.999, 0.998]))
    state = start_state(case.rounded[3], front(net, case.rounded[:3], ends, x, BITS))
    for k, share in enumerate(quantized.shares.tolist()):
        state, weights[k] = case.layer(k, state, share), share
    np.testing.assert_allclose(y, state[0], atol=1e-4)
    assert set(weights) <= set(np.float32(GRID).tolist())
    assert [k for i, j in quantized.partition for k in range(i, j + 1)] == list(range(L))


@pytest.mark.slow
def test_packed_execution_is_the_fake_one(net, quantized, x):
    want = run_blocks(net, quantized.blocks, x)
    np.testing.assert_allclose(run_blocks(net, quantized.blocks, x, packed_run), want, atol=1e-4)


@pytest.mark.slow
def test_memory_is_counted_from_arrays(params, quantized):
    found = memory_report(params, quantized.blocks, 4)
    rows = {"vision": 24 + 8 + 16 + 8, "join": 16, "decoder": 32 + 16 + 40 + 16}
    codes = (24 + 8 + 16) * 4 + 8 * 8 + 16 * 4 + (32 + 16 + 40) * 8 + 16 * 10
    packed = codes + 5 * sum(rows.values())  # a scale of 4 bytes and a zero point a row
    num = sum(q.codes.size for b in quantized.blocks for q in b.weights.values())
    assert found["stored_bits"] == pytest.approx(8 * packed / num)
    total = sum(a.size for a in jax.tree.leaves(params))
    assert found["float_bytes"] == 2 * total
    inputs = 8 * (16 * 5 + 16 + 16 + 16 + 20)
    assert found["bytes"] == packed + 2 * (total - num) + inputs
    assert found["memory_ratio"] == pytest.approx(found["float_bytes"] / found["bytes"])


@pytest.mark.slow
def test_proxies_are_entropies_of_codes_on_whole_ranges(case):
    got = dependency_proxies(case.seen, BITS)
    codes = []
    for name in STAGES:
        lo, hi = (np.asarray(a[0]) for a in case.seen.ranges[name])
        s = 7 / (hi - lo)
        codes.append(np.round(s * np.asarray(case.seen.inputs[name][0])) - np.round(s * lo))
    for k, q in enumerate(codes):
        p = np.bincount(np.clip(q, 0, 7).astype(int).ravel(), minlength=8) / q.size
        want = -(p[p > 0] * np.log(p[p > 0])).sum()
        assert float(got["entropy"][k]) == pytest.approx(want, abs=2e-3)
    # pairs of one width, qkv -> proj -> gate_up; then 16 and 20 channels do not pair up
    assert (got["conditional"] <= got["entropy"][jnp.array([1, 2, 2, 3])] + 1e-5)[:2].all()
    np.testing.assert_array_equal(got["conditional"][2:], got["entropy"][2:])
    x = np.abs(
        np.asarray(
            fake(affine(*(a[0] for a in case.seen.ranges["qkv"]), BITS), case.seen.inputs["qkv"][0])
        )
    )
    a = x / np.maximum(np.sqrt((x**2).sum(1, keepdims=True)), 1e-12)
    assert float(got["repo"][0]) == pytest.approx(-(a * np.log(a + 1e-7)).sum(1).mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norms", [False, True])
def test_the_encoder_step_lowers_its_objective(net, case, params, x, norms):
    ends, held, values = tune_encoder(
        net, case.rounded, case.ranges, case.seen, x, BITS, num_steps=30, norms=norms
    )
    assert values.min() < values[0]
    again = tune_encoder(
        net, (*({**p, **n} for p, n in zip(case.rounded[:3], held, strict=True)), *case.rounded[3:]),
        ends, case.seen, x, BITS, num_steps=0,
    )[2]  # fmt: skip
    assert float(again[0]) == pytest.approx(float(values.min()), rel=1e-3)
    for a, b in zip(jax.tree.leaves(ends), jax.tree.leaves(case.ranges), strict=True):
        assert a.shape == b.shape
    same = all(
        (a == b).all()
        for p, n in zip(case.rounded, held, strict=False)
        for s in n
        for a, b in zip(jax.tree.leaves(n[s]), jax.tree.leaves(p[s]), strict=True)
    )
    assert same != norms
    without = tune_encoder(
        net, case.rounded, case.ranges, case.seen, x, BITS, num_steps=0, eta=0.0
    )[2]
    got = front(net, case.rounded[:3], case.ranges, x, BITS)
    want = case.seen.start[0]
    assert float(without[0]) == pytest.approx(
        float(((got - want) ** 2).mean() / (want**2).mean()), rel=1e-3
    )


@pytest.mark.slow
def test_the_codes_heuristic_shrinks_and_compounds(net, params, x):
    wide, narrow = (
        quantize_vlm(
            net, params, x, w_bits=4, a_bits=3,
            options=Options(search="repo", shares=shares, repo_batches=3),
        )
        for shares in ((1.0,), (0.5,))
    )  # fmt: skip
    for name in STAGES:  # two batches or more of the same share are its power
        a, b = (q.blocks[3].acts[name] for q in (wide, narrow))
        np.testing.assert_allclose(b.scale, a.scale / 8, rtol=1e-5)
    assert narrow.cost.layers == 2 * 3 * L


@pytest.mark.slow
def test_awq_keeps_the_function_and_is_no_worse_than_nearest(net, params, x):
    transform = norm_transform(net, LINKS, awq(3))
    new = transform(params, x, jax.random.key(0))
    apply = jax.jit(net.apply)
    y = apply(params, x)
    np.testing.assert_allclose(apply(new, x), y, atol=2e-4 * float(jnp.abs(y).max()))
    rng = np.random.default_rng(2)
    i = LinkInput(
        jnp.asarray(rng.normal(size=(99, 16)) * 2.0 ** np.linspace(-3, 3, 16), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), jnp.float32(8), jax.random.key(0),
    )  # fmt: skip
    r = awq(3)(i).r

    def error(r):
        p = ({"w": {"kernel": (i.w * r).T[None]}},)
        q = jax.vmap(dequantize)(_rounded(p))[0]
        return float((((i.x / r) @ q.T - i.x @ i.w.T) ** 2).mean())

    assert error(r) < 0.7 * error(jnp.ones(16))


def _rounded(p):
    from qlab.quantization.grid import calibrate, nearest_codes

    w = p[0]["w"]["kernel"][0].T
    grid = calibrate(w, jnp.float32(3), False, max_bits=8, calibration="shares")
    made = grid.qtensor(nearest_codes(w, grid), w.shape)
    return jax.tree.map(lambda a: a[None], made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "best"}, "search='best'; use one of minmax"),
        ({"proxy": "hessian"}, "proxy='hessian'"),
        ({"shares": ()}, "shares=()"),
        ({"vision_shares": (0.0,)}, "vision_shares"),
        ({"max_len": 0}, "max_len=0"),
    ],
)
def test_options_that_do_not_exist(net, params, x, change, message):
    with pytest.raises(UserError) as e:
        quantize_vlm(net, params, x, w_bits=4, a_bits=4, options=Options()._replace(**change))
    assert message in str(e.value)


def test_bad_input_gets_one_line(net, params, x):
    with pytest.raises(UserError, match="w_bits=9"):
        quantize_vlm(net, params, x, w_bits=9, a_bits=4)
    with pytest.raises(UserError, match="'w4'"):
        cells(("w4",))
    c = get_config("smoke")
    for change, message in (
        ({"net": "digits_vit"}, "no vision-language"),
        ({"rewrite": "x"}, "rewrite"),
    ):
        bad = c.copy_and_resolve_references()
        bad.update(change)
        with pytest.raises(UserError, match=message):
            build(bad)


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=23), rng.integers(0, 4, 23)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert SHARES[0] == 1.0
