"""Mamba: the scan against a float64 loop, the mixer written out, its parts and its outlier twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab import data
from qlab.data.sequences import ASK, NOISE, next_char, selective_copy, windows
from qlab.data.text import parse_text
from qlab.lab.errors import UserError
from qlab.nn.mamba import (
    EPS,
    PARTS,
    MambaSize,
    causal_conv,
    mamba,
    outlier_twin,
    selective_scan,
    ssm_states,
    ssm_states_loop,
    with_parts,
)
from qlab.nn.sites import pick, sites

SIZE = MambaSize(chunk=2, dim=8, depth=2, states=4, rank=4, outputs=3)
ALL = SIZE._replace(parts=tuple(PARTS))


@pytest.fixture(scope="module")
def net():
    return mamba(SIZE)


@pytest.fixture(scope="module")
def params(net):
    leaves, tree = jax.tree.flatten(net.init(jax.random.key(0)))
    rng = np.random.default_rng(7)  # norms, D and biases that are not 1 and 0
    moved = [np.asarray(a) + 0.2 * rng.standard_normal(a.shape, np.float32) for a in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in moved])


@pytest.fixture(scope="module")
def mixer(net):
    """(params, x f32[2, 9, 8]) -> the first mixer's output."""
    return jax.jit(lambda p, x: net.groups[1].block(p, x))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (5, 12))


def arguments(t, e=3, s=4, lead=(2,), seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (*lead, t, e),
        (*lead, t, e),
        (e, s),
        (*lead, t, s),
        (*lead, t, s),
        (e,),
        (*lead, e, s),
    ]
    x, dt, a, b, c, d, h0 = (rng.standard_normal(shape) for shape in shapes)
    return x, np.abs(dt), -np.exp(a), b, c, d, h0


def scanned(x, dt, a, b, c, d, h0):
    """The recurrence in float64, token after token: (h, y)."""
    h, hs = h0, []
    for t in range(x.shape[-2]):
        decay = np.exp(dt[..., t, :, None] * a)
        h = decay * h + (dt[..., t, :] * x[..., t, :])[..., None] * b[..., t, None, :]
        hs.append(h)
    hs = np.stack(hs, -3)
    return hs, (hs * c[..., None, :]).sum(-1) + d * x


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("t", "lead"),
    [
        (1, ()),
        (7, (2, 1)),
        *(pytest.param(*c, marks=SLOW) for c in ((2, ()), (7, ()), (2, (2, 1)))),
    ],
)
def test_both_scans_equal_the_recurrence(t, lead):
    given = arguments(t, lead=lead)
    h, y = scanned(*given)
    x, dt, a, b, c, d, h0 = (jnp.asarray(v, jnp.float32) for v in given)
    for scan in map(jax.jit, (ssm_states, ssm_states_loop)):
        np.testing.assert_allclose(scan(x, dt, a, b, h0), h, rtol=2e-5, atol=2e-5)
        zero = scanned(*given[:-1], np.zeros_like(given[-1]))[0]
        np.testing.assert_allclose(scan(x, dt, a, b), zero, rtol=2e-5, atol=2e-5)
    got = jax.jit(selective_scan)(x, dt, a, b, c, d, h0)
    np.testing.assert_allclose(got, y, rtol=2e-5, atol=2e-5)


def test_causal_conv_is_numpys():
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((2, 5, 3)), rng.standard_normal((3, 4))
    want = np.stack(
        [[np.convolve(s[:, c], k[c, ::-1])[:5] for c in range(3)] for s in x]
    ).transpose(0, 2, 1)
    np.testing.assert_allclose(
        causal_conv(jnp.asarray(x), jnp.asarray(k)), want, rtol=1e-5, atol=1e-6
    )


def test_mixer_equals_the_equations_written_out(mixer, params):
    p = jax.tree.map(np.float64, pick(params[1], 0))
    x = np.random.default_rng(3).standard_normal((2, 9, 8))

    def k(site):
        return p[site]["kernel"]

    def silu(v):
        return v / (1 + np.exp(-v))

    u = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * p["norm"]["scale"]
    v, g = u @ k("w_s"), u @ k("w_g")
    padded = np.pad(v, ((0, 0), (3, 0), (0, 0)))
    v = sum(padded[:, i : i + 9] * k("conv")[:, i] for i in range(4)) + p["conv"]["bias"]
    v = silu(v)
    dt = np.log1p(np.exp(v @ k("w_xdt") @ k("w_dt") + p["w_dt"]["bias"]))
    a = -np.exp(p["a_log"])
    _, y = scanned(v, dt, a, v @ k("w_B"), v @ k("w_C"), p["d"], np.zeros((2, 16, 4)))
    want = x + (y * silu(g)) @ k("w_o")
    got = mixer(pick(params[1], 0), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_no_token_sees_a_later_one(mixer, params):
    p = pick(params[1], 1)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 8)), jnp.float32)
    y, moved = mixer(p, x), mixer(p, x.at[:, 5].add(1.0))
    np.testing.assert_array_equal(y[:, :5], moved[:, :5])
    assert float(jnp.abs(y - moved)[:, 8].max()) > 1e-6  # but a later one sees it, past the taps


def test_sites_of_a_mixer(net, params):
    found = sites(net.groups[1].block, pick(params[1], 0), jnp.zeros((2, 6, 8)))
    assert [(s.name, s.kind) for s in found] == [
        ("w_s", "linear"), ("conv", "operand"), ("conv", "weight"), ("w_g", "linear"),
        ("w_xdt", "linear"), ("w_dt", "linear"), ("w_B", "linear"), ("w_C", "linear"),
        ("h", "operand"), ("C", "operand"), ("w_o", "linear"),
    ]  # fmt: skip
    shapes = {(s.name, s.kind): s.shape for s in found}
    assert shapes["conv", "weight"] == (16, 4)
    assert shapes["h", "operand"] == (2, 6, 64)  # a row holds a token's 16 x 4 states


def test_parts_are_identities_and_the_twin_is_the_same_function(net, params, x):
    want = jax.jit(net.apply)(params, x)
    full = mamba(ALL)
    more = with_parts(params, ALL)
    like = jax.eval_shape(full.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(jnp.shape, like)
    apply = jax.jit(full.apply)
    np.testing.assert_allclose(apply(more, x), want, atol=1e-6)
    twin = outlier_twin(more, 4.0, jax.random.key(3))
    np.testing.assert_allclose(apply(twin, x), want, atol=2e-5 * float(jnp.abs(want).max()))
    for site in ("w_s", "w_g", "w_o", "w_B", "w_C"):
        ratio = np.asarray(twin[1][site]["kernel"] / more[1][site]["kernel"])
        assert ratio.max() / ratio.min() > 8, site
    assert with_parts(twin, ALL)[1]["gate"] is twin[1]["gate"]  # what is there stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0 is no size"),
        ({"answers": -1}, "answers=-1"),
        ({"scan": "fast"}, "use one of associative, loop"),
        ({"parts": ("r9",)}, "no part is called 'r9'"),
    ],
)
def test_sizes_that_do_not_exist(change, message):
    with pytest.raises(ValueError, match=message):
        mamba(SIZE._replace(**change))


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_answers_are_the_last_tokens(answers):
    size = SIZE._replace(vocab=5, answers=answers)
    net = mamba(size)
    ids = jnp.array([[1, 4, 0, 2]])
    shape = jax.eval_shape(net.apply, jax.eval_shape(net.init, jax.random.key(0)), ids).shape
    assert shape == {0: (1, 4, 3), 1: (1, 3), 2: (1, 2, 3)}[answers]


def test_selective_copying_has_its_answer_among_the_noise():
    s = data.load("selective_copy", length=9, num_tokens=3, size=64)
    for x, y in zip(s.x_train, s.y_train, strict=True):
        assert x[:9][x[:9] != NOISE].tolist() == y.tolist()
        assert x[9:].tolist() == [ASK] * 3
    assert len(s.x_test) == 8
    assert len({tuple(row) for row in s.x_train}) > 60
    with pytest.raises(UserError, match="num_tokens=4"):
        selective_copy(length=3, num_tokens=4)


def test_windows_give_the_next_id_and_parts_do_not_meet():
    text = parse_text(bytes(range(32, 112)) * 5, "t")
    s = next_char(text, 8)
    flat = text.ids.astype(np.int32)
    np.testing.assert_array_equal(s.x_train[1], flat[4:12])
    np.testing.assert_array_equal(s.y_train[1], flat[5:13])
    cut = len(text.val) // 2
    np.testing.assert_array_equal(s.x_test[0], text.val[cut : cut + 8])
    assert windows(np.arange(3), 3, 1)[0].shape == (0, 3)
