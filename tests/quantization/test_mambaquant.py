"""MambaQuant: equal variances, exact rewrites, and the quantized net packed and fake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.nn.mamba import PARTS, MambaSize, mamba, outlier_twin, s_silu, selective_scan, with_parts
from qlab.nn.sites import pick
from qlab.quantization.activations import PerToken, fake
from qlab.quantization.blocks import (
    SiteInput,
    fake_run,
    gptq_weight,
    nearest_weight,
    packed_run,
    run_blocks,
    site_by_site,
)
from qlab.quantization.mambaquant import (
    ROTATIONS,
    SMOOTHING,
    captured,
    channel_ratios,
    fold_norm,
    mambaquant,
    parts_of,
    remove_mean,
    rotate,
    rotated,
    smooth,
    smoothed,
    static_and_token,
    tail,
)
from qlab.quantization.rotation import (
    covariance,
    fwht,
    hadamard,
    klt,
    klt_rotation,
    signs,
    variance_ratio,
)

SIZE = MambaSize(chunk=2, dim=8, depth=2, states=4, rank=4, outputs=3, parts=tuple(PARTS))
WIDTHS = {"s1": 8, "s2": 16, "s3": 16, "s4": 4, "s5": 4, "s7": 16}


def slow(*params):
    """Parameters, each a tuple of the test's arguments, whose turn comes more rarely."""
    return [pytest.param(*values, marks=pytest.mark.slow) for values in params]


# -- rotations


@pytest.mark.parametrize("n", [1, 12, 64, *slow((2,), (4,), (20,), (24,))])
def test_hadamard_is_orthogonal_flat_and_what_fwht_computes(n):
    key = jax.random.key(n)
    r = np.asarray(hadamard(n, key), np.float64)
    np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-6)
    np.testing.assert_allclose(np.abs(r), n**-0.5, rtol=1e-6)
    x = jax.random.normal(jax.random.key(1), (3, n))
    np.testing.assert_allclose(fwht(x * signs(n, key)), x @ r, rtol=1e-5, atol=1e-5)
    if n >= 20:
        assert np.abs(r - np.asarray(hadamard(n, jax.random.key(n + 1)))).max() > 0


@pytest.mark.parametrize(("n", "near"), [(7, "4 or 8"), (0, "1"), (11008, "10752 or 11136")])
def test_unknown_orders_name_the_nearest(n, near):
    with pytest.raises(ValueError, match=f"order {n} is known here; use a width of {near}"):
        hadamard(n, jax.random.key(0))


@pytest.mark.parametrize(("n", "rows"), [(12, 300), (8, 3), *slow((4, 200), (16, 1))])
def test_klt_hadamard_gives_every_channel_the_mean_variance(n, rows):
    with jax.enable_x64(True):
        rng = np.random.default_rng(n)
        mix = rng.standard_normal((n, n)) * 2.0 ** rng.uniform(-6, 6, n)
        x = jnp.asarray(rng.standard_normal((rows, n)) @ mix + 5.0)  # correlated, with a mean
        r = klt_rotation(x, jax.random.key(0))
        var = np.asarray(covariance(x @ r)).diagonal()
        trace = float(jnp.trace(covariance(x)))
        np.testing.assert_allclose(var, trace / n, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-6)
        plain = np.asarray(covariance(x @ hadamard(n, jax.random.key(0)))).diagonal()
        if rows > n:
            assert plain.max() / plain.min() > 1.05  # what the paper objects to
        k, lam = klt(x)
        np.testing.assert_allclose(k * lam @ k.T, covariance(x), atol=1e-9 * max(trace, 1.0))


def test_klt_stays_orthogonal_in_float32():
    x = jax.random.normal(jax.random.key(0), (600, 96)) * 2.0 ** jnp.linspace(-8, 8, 96)
    k = np.asarray(klt(x)[0], np.float64)
    np.testing.assert_allclose(k.T @ k, np.eye(96), atol=1e-6)
    assert float(variance_ratio(x @ klt_rotation(x, jax.random.key(1)))) < 1.01


def test_with_uncorrelated_channels_of_one_order_klt_is_plain_hadamard():
    lam = np.sqrt(np.arange(1.0, 5.0))
    x = jnp.asarray(np.concatenate([np.diag(lam), -np.diag(lam)]), jnp.float32)
    k = klt(x)[0]
    np.testing.assert_array_equal(jnp.abs(k), np.eye(4))
    h = hadamard(4, jax.random.key(3))
    np.testing.assert_array_equal(klt_rotation(x, jax.random.key(3)), k @ h)


def test_variance_ratio_of_a_constant_channel_is_large_but_finite():
    x = jnp.stack([jnp.arange(5.0), jnp.ones(5)], -1)
    assert float(variance_ratio(x)) == pytest.approx(1e12)
    assert np.isfinite(float(variance_ratio(jnp.ones((5, 2)))))


# -- identities of the mixer


def test_s_silu_of_a_scaled_gate_is_silu_over_the_scale():
    rng = np.random.default_rng(0)
    v, s = rng.standard_normal(200) * 5, 2.0 ** rng.uniform(-6, 6, 200)
    want = v / (1 + np.exp(-v)) / s
    np.testing.assert_allclose(s_silu(jnp.asarray(v / s), jnp.asarray(s)), want, rtol=1e-5)
    np.testing.assert_allclose(s_silu(jnp.asarray(v)), v / (1 + np.exp(-v)), rtol=1e-5)


def test_scaled_states_leave_the_scan_as_it_is():
    rng = np.random.default_rng(0)
    x, b, c = (jnp.asarray(rng.standard_normal(s)) for s in ((6, 3), (6, 4), (6, 4)))
    dt, a = jnp.abs(x) + 0.1, -jnp.exp(jnp.asarray(rng.standard_normal((3, 4))))
    d, h0 = jnp.ones(3), jnp.asarray(rng.standard_normal((3, 4)))
    s = jnp.asarray(2.0 ** rng.uniform(-4, 4, 4))
    want = selective_scan(x, dt, a, b, c, d, h0)
    np.testing.assert_allclose(
        selective_scan(x, dt, a, b / s, c * s, d, h0 / s), want, rtol=1e-4, atol=1e-5
    )
    wrong = selective_scan(x, dt, a, b / s, c * s, d, h0)
    assert float(jnp.abs(wrong - want).max()) > 0.1  # a start that is not 0 has to be divided too


# -- rewrites of the net


@pytest.fixture(scope="module")
def net():
    return mamba(SIZE)


@pytest.fixture(scope="module")
def apply(net):
    return jax.jit(net.apply)


@pytest.fixture(scope="module")
def params(net):
    plain = mamba(SIZE._replace(parts=())).init(jax.random.key(0))
    made = with_parts(plain, SIZE)
    return outlier_twin(made, 2.0, jax.random.key(5))  # norms and gates that are not 1


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (16, 12))


def same(apply, new, old, x):
    y = apply(old, x)
    np.testing.assert_allclose(apply(new, x), y, atol=1e-4 * float(jnp.abs(y).max()))
    assert any(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    )


def random_scales(names, seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(2.0 ** rng.uniform(-3, 3, (2, WIDTHS[n])), jnp.float32) for n in names}


def random_rotations(names, seed):
    widths = {"r1": 8, "r2": 16, "r3": 16, "r4": 4, "r5": 4, "r6": 16}
    rng = np.random.default_rng(seed)

    def q(*shape):
        return jnp.asarray(np.linalg.qr(rng.standard_normal(shape))[0], jnp.float32)

    lead = {n: () if n == "r1" else (2,) for n in names}
    return {n: q(*lead[n], widths[n], widths[n]) for n in names}


@pytest.mark.parametrize("names", [*((n,) for n in SMOOTHING), SMOOTHING])
def test_smoothing_keeps_the_logits_for_any_scales(apply, params, x, names):
    new = (params[0], smoothed(params[1], random_scales(names, 3)), params[2])
    same(apply, new, params, x)


@pytest.mark.parametrize("names", [*((n,) for n in ROTATIONS), ROTATIONS])
def test_rotations_keep_the_logits_for_any_orthogonal_matrices(apply, params, x, names):
    same(apply, rotated(params, random_rotations(names, 4)), params, x)


def test_everything_in_turn_keeps_the_logits_and_applies_twice(apply, net, params, x):
    s, r = random_scales(SMOOTHING, 8), random_rotations(ROTATIONS, 9)
    new = (params[0], smoothed(params[1], s), params[2])
    new = remove_mean(net).apply(new, jnp.full((2, 4), 0.7))
    new = rotated(rotated(new, r), random_rotations(ROTATIONS, 10))
    same(apply, new, params, x)


def test_rotation_without_folding_the_norm_would_not_be_exact(apply, params, x):
    folded = fold_norm(params)
    same(apply, folded, params, x)
    assert float(jnp.abs(folded[1]["norm"]["scale"] - 1).max()) == 0.0
    assert float(jnp.abs(folded[2]["norm"]["scale"] - 1).max()) == 0.0


OPTIONS = {
    "full": {},
    "vision": {"smoothing": ("s2", "s3"), "mean": True},
    "all": {"smoothing": SMOOTHING, "rotations": ROTATIONS, "mean": True},
    "quarot": {"smoothing": (), "k_from": "none"},
    "weights": {"k_from": "weights"},
    "before": {"k_order": "before"},
    "transposed": {"r5_transposed": True},
    "smooth": {"rotations": ()},
}


@pytest.fixture(scope="module")
def made(net, params, x):
    """{option: (params, channel ratios)}, each measured on x."""
    out = {}
    for name, options in OPTIONS.items():
        new = mambaquant(net, **options)(params, x, jax.random.key(2))
        out[name] = new, channel_ratios(net, new, x)
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_the_whole_method_keeps_the_logits(apply, params, x, made, name):
    same(apply, made[name][0], params, x)


def test_variances_are_equal_where_k_was_measured_and_only_there(made):
    for name in ("full", "vision", "all"):
        ratio = made[name][1]
        assert float(ratio["ratio_w_s"]) == pytest.approx(1.0, abs=1e-3)
        assert float(ratio["ratio_w_dt"]) == pytest.approx(1.0, abs=1e-3)
        assert float(ratio["ratio_w_o"]) > 1.1  # plain Hadamard
    for name in ("quarot", "weights", "before", "transposed", "smooth"):
        assert float(made[name][1]["ratio_w_dt"]) > 1.05, name
    assert float(made["transposed"][1]["ratio_w_s"]) == pytest.approx(1.0, abs=1e-3)


def test_without_k_the_matrices_are_those_of_quarot(net, params, x):
    r = rotate(net, ("r1", "r2", "r4", "r5"), k_from="none").init(params, x, jax.random.key(2))
    for name, m in r.items():
        i = ROTATIONS.index(name)
        key = jax.random.fold_in(jax.random.key(2), i)
        if name == "r1":
            np.testing.assert_array_equal(m, hadamard(8, key))
        else:  # a fresh one for each mixer
            fresh = [hadamard(m.shape[-1], k) for k in jax.random.split(key, 2)]
            np.testing.assert_array_equal(m, jnp.stack(fresh))


def test_smoothing_balances_inputs_and_weights_and_means_vanish(net, params, x):
    s = smooth(net, ("s2", "s5", "s7"))
    new = s(params, x, jax.random.key(0))
    seen = captured(net, new, x)
    for site in ("w_o", "w_dt", "conv"):
        act = np.abs(np.asarray(seen[site])).max((1, 2))
        weight = np.abs(np.asarray(new[1][site]["kernel"])).max(-1)
        free = np.asarray(s.init(params, x, jax.random.key(0))[
            {"w_o": "s2", "w_dt": "s5", "conv": "s7"}[site]]) > 1e-2  # fmt: skip
        np.testing.assert_allclose(act[free], weight[free], rtol=1e-3)
        assert free.any()
    centred = remove_mean(net)(params, x, jax.random.key(0))
    mean = np.asarray(captured(net, centred, x)["w_dt"]).mean((1, 2))
    np.testing.assert_allclose(mean, 0.0, atol=1e-5)


def test_parts_that_the_rewrites_need():
    assert set(parts_of(SMOOTHING, ROTATIONS, True)) == set(PARTS)
    assert parts_of(("s1", "s4", "s5", "s7"), ("r1", "r5"), False) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: smooth(n, ("s6",)), "no smoothing is called 's6'"),
        (lambda n: rotate(n, ("r7",)), "no rotation is called 'r7'"),
        (lambda n: rotate(n, ("r1",), k_from="data"), "k_from='data'"),
        (lambda n: mambaquant(n, k_order="between"), "k_order='between'"),
        (lambda n: static_and_token(share=0.2), r"share=0.2 must lie in \(0.5, 1\]"),
        (lambda n: static_and_token(state="row"), "state='row'"),
    ],
)
def test_names_that_do_not_exist(net, make, message):
    with pytest.raises(ValueError, match=message):
        make(net)


# -- quantizers


@pytest.mark.parametrize(
    ("n", "share"), [(1, 0.9), (7, 1.0), (50, 0.93), (1000, 0.9999), (40, 0.51)]
)
def test_tail_is_the_quantile(n, share):
    x = jax.random.normal(jax.random.key(n), (n,))
    np.testing.assert_allclose(
        tail(x, share), np.quantile(np.asarray(x), share), rtol=1e-4, atol=1e-5
    )


def test_states_have_eight_bits_and_a_range_for_each_token():
    x = jnp.stack([jnp.linspace(-1, 1, 64), jnp.linspace(-100, 100, 64)])[None]
    i = SiteInput("h", x, x, None, jnp.float32(4.0), jax.random.key(0))
    record = static_and_token()(i)
    assert isinstance(record, PerToken)
    gap = np.abs(np.asarray(fake(record, x) - x)).max(-1)[0]
    assert gap[0] <= 2 / 255
    assert gap[1] <= 200 / 255
    static = static_and_token(state="static")(i)
    assert float(static.q_max) == 255
    assert float(static_and_token(state="static", state_bits=0)(i).q_max) == 15
    assert float(static_and_token()(i._replace(site="w_o")).q_max) == 15


@pytest.fixture(scope="module", params=[(8, 8), *slow(((4, 4),))])
def quantized(request, net, made, x):
    w_bits, a_bits = request.param
    method = site_by_site(
        act=static_and_token(),
        weight=nearest_weight(calibration="minmax", symmetric=True, max_bits=w_bits),
    )
    out, x_q, x_fp = [], x, x
    for g, stacked in zip(net.groups, made["full"][0], strict=True):

        def one(p, x_q, x_fp, g=g):
            q, _ = method(g.block, p, x_q, x_fp, w_bits, a_bits, jax.random.key(0))
            return q, g.block(q.params, x_q, fake_run(q)), g.block(p, x_fp)

        one, blocks = jax.jit(one), []
        for i in range(g.n):
            q, x_q, x_fp = one(pick(stacked, i), x_q, x_fp)
            blocks.append(q)
        out.append(jax.tree.map(lambda *a: jnp.stack(a), *blocks))
    return tuple(out), x_q, x_fp


@pytest.mark.slow  # of other nets test_sites has it in the fast part
def test_packed_equals_fake(net, quantized, x):
    blocks, y, _ = quantized
    np.testing.assert_allclose(run_blocks(net, blocks, x), y, rtol=1e-3, atol=1e-3)
    gap = np.abs(np.asarray(run_blocks(net, blocks, x, packed_run) - y)) / np.abs(y).max()
    assert np.median(gap) < 1e-3  # a value on the edge between two codes may fall to either side
    assert gap.max() < 0.1


def test_every_site_is_quantized(quantized):
    blocks, y, y_fp = quantized
    linear = {"w_s", "w_g", "w_xdt", "w_dt", "w_B", "w_C", "w_o"}
    assert set(blocks[1].weights) == linear | {"conv"}
    assert set(blocks[1].acts) == linear | {"conv", "h", "C"}
    conv = blocks[1].weights["conv"]
    assert conv.shape == (16, 4)
    assert conv.scale.shape == (2, 16, 1)  # per channel
    assert float(jnp.abs(y - y_fp).max()) > 0


def test_gptq_refuses_the_kernel_of_the_convolution(net, params, x):
    method = site_by_site(act=static_and_token(), weight=gptq_weight(calibration="minmax"))
    tokens = jnp.zeros((2, 6, 8))
    with pytest.raises(ValueError, match="'conv' is no plain product"):
        jax.eval_shape(
            lambda p, t: method(net.groups[1].block, p, t, t, 8, 8, jax.random.key(0))[0],
            pick(params[1], 0), tokens,
        )  # fmt: skip
