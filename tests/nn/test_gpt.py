"""The decoder against float64 NumPy written out and Hugging Face's models; cache, pads, RoPE, grouped queries."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlab.lab.errors import UserError
from qlab.nn.gpt import (
    PRESETS,
    STAGES,
    GPTSize,
    attention,
    causal,
    gpt,
    padded,
    parted,
    rope,
)
from qlab.nn.gpt_decode import decode_step, generate, prefill, sample_token
from qlab.nn.gpt_import import from_hf, size_of, to_hf
from qlab.nn.sites import capture, sites

SIZE = GPTSize(vocab=11, dim=16, depth=2, heads=4, kv_heads=2, hidden=24, qkv_bias=True)


@pytest.fixture(scope="module")
def net():
    return gpt(SIZE)


@pytest.fixture(scope="module")
def params(net):
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    rng = np.random.default_rng(7)  # norms and biases that are not 1 and 0
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32) for a in leaves]
    )


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(1).integers(0, 11, (3, 7)), jnp.int32)


@pytest.fixture(scope="module")
def apply(net):
    return jax.jit(net.apply)


@pytest.fixture(scope="module")
def logits(apply, params, ids):
    return np.asarray(apply(params, ids))


def written_out(params, ids, size=SIZE):
    """f64[N, T, V]: the equations of a Qwen2 decoder, head by head and token by token."""
    stem, blocks, head = jax.tree.map(np.float64, params)
    c, group = size.width, size.heads // size.kv_heads

    def norm(x, w):
        return w * x / np.sqrt((x**2).mean(-1, keepdims=True) + size.eps)

    def turn(x, p):  # complex numbers: pair (i, i + C/2) times e^(i p theta)
        z = (x[..., : c // 2] + 1j * x[..., c // 2 :]) * np.exp(
            1j * p * size.base ** (-2 * np.arange(c // 2) / c)
        )
        return np.concatenate([z.real, z.imag], -1)

    out = []
    for row in np.asarray(ids):
        x = stem["table"][0][row]
        for i in range(size.depth):
            p = {k: {n: a[i] for n, a in v.items()} for k, v in blocks.items()}
            y = norm(x, p["attn_norm"]["scale"]) @ p["qkv"]["kernel"] + p["qkv"].get("bias", 0.0)
            q, k, v = np.split(y, [size.heads * c, (size.heads + size.kv_heads) * c], -1)
            mixed = np.zeros((len(row), size.heads * c))
            for h in range(size.heads):
                kv = slice(h // group * c, (h // group + 1) * c)
                for t in range(len(row)):
                    qt = turn(q[t, h * c : (h + 1) * c], t)
                    scores = np.array([qt @ turn(k[s, kv], s) for s in range(t + 1)]) / np.sqrt(c)
                    w = np.exp(scores - scores.max())
                    mixed[t, h * c : (h + 1) * c] = (w / w.sum()) @ v[: t + 1, kv]
            x = x + mixed @ p["proj"]["kernel"]
            g, u = np.split(norm(x, p["mlp_norm"]["scale"]) @ p["gate_up"]["kernel"], 2, -1)
            x = x + (g / (1 + np.exp(-g)) * u) @ p["down"]["kernel"]
        out.append(norm(x, head["norm"]["scale"][0]) @ head["head"]["kernel"][0])
    return np.stack(out)


def test_decoder_equals_the_equations_written_out(params, ids, logits):
    np.testing.assert_allclose(logits, written_out(params, ids), rtol=1e-4, atol=1e-4)


def test_cache_decode_equals_the_full_forward(net, params, ids, logits):
    room = 9
    first, cache = jax.jit(prefill, static_argnums=(0, 4))(net, params, ids[:, :3], None, room)
    np.testing.assert_allclose(first, logits[:, :3], atol=1e-5)
    step = jax.jit(decode_step, static_argnums=0)
    for t in range(3, 7):
        got, cache = step(net, params, cache, ids[:, t])
        np.testing.assert_allclose(got, logits[:, t], atol=1e-5)
    assert cache.index.tolist() == [7] * 3
    with pytest.raises(ValueError, match="room=2"):
        prefill(net, params, ids, None, 2)


def test_left_pads_change_nothing(net, apply, params, ids, logits):
    pads = jnp.zeros((3, 4), jnp.int32)
    keep = jnp.concatenate([pads, jnp.ones_like(ids)], 1).astype(bool)
    long = jnp.concatenate([pads + 5, ids], 1)  # whatever stands there
    np.testing.assert_allclose(apply(params, (long, keep))[:, 4:], logits, atol=1e-5)


@pytest.mark.slow
def test_rows_of_other_lengths_decode_in_one_batch(net, apply, params, ids, logits):
    row = jnp.concatenate([jnp.zeros((1, 4), jnp.int32), ids[:1, :3]], 1)
    both = jnp.concatenate([row, ids[1:2]])
    keep = jnp.ones((2, 7), bool).at[0, :4].set(False)
    got, cache = jax.jit(prefill, static_argnums=(0, 4))(net, params, both, keep, 8)
    np.testing.assert_allclose(got[0, -1], logits[0, 2], atol=1e-5)
    got, _ = jax.jit(decode_step, static_argnums=0)(net, params, cache, ids[:2, 3])
    np.testing.assert_allclose(got[0], logits[0, 3], atol=1e-5)
    assert np.isfinite(np.asarray(apply(params, (row, keep[:1] & False)))).all()


def test_rows_do_not_meet(apply, params, ids, logits):
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(apply(params, ids[order]), logits[np.asarray(order)], atol=1e-6)
    moved = np.asarray(apply(params, ids.at[:, 4].add(1) % 11))
    np.testing.assert_allclose(
        moved[:, :4], logits[:, :4], atol=1e-6
    )  # nor sees a token a later one
    assert np.abs(moved - logits)[:, 6].max() > 1e-4


def test_rope_depends_on_distance_and_keeps_norms():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def at(x, p):
        return rope(x, jnp.array([[p]]), 1e4)

    dots = [float((at(q, p + 9) * at(k, p)).sum()) for p in (0, 3, 50)]
    np.testing.assert_allclose(dots, dots[0], atol=1e-4)
    assert abs(dots[0] - float((at(q, 3) * at(k, 0)).sum())) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-5)
    # pairs are (i, i + C / 2), not neighbours
    one = rope(jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0), jnp.array([[1]]), 1e4)
    np.testing.assert_allclose(one.ravel(), [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_grouped_queries_are_repeated_keys():
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, 5, 4, 6)).astype(np.float32)
    see, run = causal(5).visible, jax.jit(attention)
    for num in (4, 2, 1):  # MHA, GQA, MQA
        k = rng.standard_normal((2, 5, num, 6)).astype(np.float32)
        got = np.asarray(run(q, k, see)).reshape(2, 4, 5, 5)
        scores = np.einsum("nthc,nshc->nhts", q, np.repeat(k, 4 // num, 2)) / np.sqrt(6)
        w = np.where(np.tril(np.ones((5, 5), bool)), np.exp(scores), 0.0)
        np.testing.assert_allclose(got, w / w.sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(run(q, k, jnp.zeros((1, 5, 5), bool)), 0.2, atol=1e-6)


@pytest.mark.slow
def test_nets_of_grouped_queries_are_nets_with_repeated_keys(params, ids, logits):
    """K = 2 key heads and H = 4 with each of them twice; and K = 1."""
    c = SIZE.width
    for num in (2, 1):
        small = SIZE._replace(kv_heads=num)
        like = jax.eval_shape(gpt(small).init, jax.random.key(0))
        p = (
            params
            if num == 2
            else jax.tree.map(lambda a, b: a[tuple(map(slice, b.shape))], params, like)
        )

        def wide(a, num=num):
            parts = jnp.split(a, [4 * c, (4 + num) * c], -1)
            kv = [x.reshape(*x.shape[:-1], num, c) for x in parts[1:]]
            kv = [jnp.repeat(x, 4 // num, -2).reshape(*x.shape[:-2], -1) for x in kv]
            return jnp.concatenate([parts[0], *kv], -1)

        full = {**p[1], "qkv": {n: wide(a) for n, a in p[1]["qkv"].items()}}
        got = jax.jit(gpt(SIZE._replace(kv_heads=4)).apply)((p[0], full, p[2]), ids)
        want = logits if num == 2 else jax.jit(gpt(small).apply)(p, ids)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_parts_behind_a_prefix_are_sequences_of_their_own(params, ids):
    """Packed questions have the logits that each has alone behind the prefix."""
    packed = gpt(SIZE._replace(prefix=3, part=2, answers=1))
    got = jax.jit(packed.apply)(params, ids)  # 3 + 2 + 2
    alone = jax.jit(gpt(SIZE._replace(answers=1)).apply)
    for i, at in enumerate((3, 5)):
        want = alone(params, jnp.concatenate([ids[:, :3], ids[:, at : at + 2]], 1))
        np.testing.assert_allclose(got[:, i], want, atol=1e-5)
    assert parted(4, 0, 0).position.tolist() == causal(4).position.tolist()
    at = padded(jnp.array([[False, True, True]]))
    assert at.position.tolist() == [[0, 0, 1]]
    assert at.visible[0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]


def test_stages_are_the_block_and_its_sites_are_named(net, params):
    block, p = net.groups[1].block, jax.tree.map(lambda a: a[1], params[1])
    x = jax.random.normal(jax.random.key(2), (2, 5, 16))

    @jax.jit
    def staged(p, x):
        y, m = x, jnp.zeros((2, 5, 32))
        for name in STAGES:
            y, m = nnx.merge(block.graph, p).stage(name, y, m)
        return y, *capture(block, p, x)

    y, want, seen = staged(p, x)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert len(seen) == 8
    found = sites(block, p, x)
    assert [s.name for s in found] == ["qkv", "q", "k", "v", "probs", "proj", "gate_up", "down"]
    assert [s.name for s in found if s.kind == "linear"] == list(STAGES)


@pytest.mark.slow
def test_sampling_order_and_limits():
    z = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    draw = jax.jit(
        jax.vmap(lambda k, t, n: sample_token(k, z, t, top_k=0, top_p=1.0)[0], (0, None, None))
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    share = np.bincount(draw(keys, 1.0, 0), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.03)

    def seen(**options):
        return set(
            np.unique(jax.vmap(lambda k: sample_token(k, z, **options)[0])(keys[:500])).tolist()
        )

    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.79) == {0, 1}  # 0.5 is below 0.79, 0.8 is not
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_p=1e-9) == {0}
    assert seen(temperature=0.0) == {0}


@pytest.mark.slow
def test_generation_follows_argmax_and_stops_at_the_end(net, apply, params, ids):
    run = ids[:, :3]
    for _ in range(5):
        run = jnp.concatenate([run, apply(params, run)[:, -1].argmax(-1)[:, None].astype(int)], 1)
    want = np.asarray(run[:, 3:])
    out, length = generate(net, params, ids[:, :3], None, jax.random.key(0), max_new=5)
    np.testing.assert_array_equal(out, want)
    assert length.tolist() == [5] * 3
    eos = int(want[0, 1])
    out, length = generate(net, params, ids[:, :3], None, jax.random.key(0), max_new=5, eos=eos)
    for row, n, full in zip(np.asarray(out), np.asarray(length), want, strict=True):
        stop = full.tolist().index(eos) + 1 if eos in full else 5
        assert n == stop
        assert row.tolist() == full[:stop].tolist() + [eos] * (5 - stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0 is no size"),
        ({"kv_heads": 3}, "must divide heads=4"),
        ({"heads": 16, "kv_heads": 2}, "even widths"),
        ({"part": -1}, "part=-1"),
    ],
)
def test_sizes_that_do_not_exist(change, message):
    with pytest.raises(ValueError, match=message):
        gpt(SIZE._replace(**change))


def test_checkpoints_go_out_and_come_back(params):
    tensors = to_hf(SIZE, params)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (8, 16)
    back = from_hf(SIZE, tensors)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)
    tied = {n: a for n, a in tensors.items() if n != "lm_head.weight"}
    np.testing.assert_array_equal(
        from_hf(SIZE, tied)[2]["head"]["kernel"][0], params[0]["table"][0].T
    )
    del tied["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"no model\.layers\.0\.mlp\.up_proj\.weight"):
        from_hf(SIZE, tied)
    with pytest.raises(UserError, match=r"k_proj.weight has shape \(8, 16\), expected \(16, 16\)"):
        from_hf(SIZE._replace(kv_heads=4), tensors)


def test_configs_that_cannot_be_read():
    good = {
        "model_type": "llama", "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    }  # fmt: skip
    s = size_of(good)
    assert (s.kv_heads, s.base, s.qkv_bias) == (2, 500.0, False)
    for bad, message in (
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "scaled RoPE"),
        ({"attention_bias": True}, "attention_bias"),
    ):
        with pytest.raises(UserError, match=message):
            size_of(good | bad)


def test_presets_are_the_sizes_named():
    assert PRESETS["tiny"].width == 16
    for name, count in (("tiny", 1.1e5), ("small", 8e5)):
        shapes = jax.eval_shape(gpt(PRESETS[name]).init, jax.random.key(0))
        assert abs(sum(a.size for a in jax.tree.leaves(shapes)) / count - 1) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_logits_and_generation_are_those_of_hugging_face(kind):
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        pytest.skip("needs torch and transformers")
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=23, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, rope_theta=1e4,
        tie_word_embeddings=kind == "Qwen2", bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and norms that are not 0 and 1
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    tensors = {n: a.detach().numpy() for n, a in theirs.state_dict().items()}
    size = size_of(config.to_dict())
    assert size.qkv_bias == (kind == "Qwen2")
    net, params = gpt(size), from_hf(size, tensors)
    ids = np.random.default_rng(0).integers(1, 23, (3, 9))
    keep = np.ones((3, 9), bool)
    keep[0, :4] = keep[1, :1] = False
    with torch.no_grad():
        plain = theirs(torch.tensor(ids)).logits.numpy()
        left = theirs(
            torch.tensor(ids), attention_mask=torch.tensor(keep).long(),
            position_ids=torch.tensor(np.maximum(keep.cumsum(1) - 1, 0)),
        ).logits.numpy()  # fmt: skip
        chosen = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.ones(3, 9).long(),
            max_new_tokens=32,
            do_sample=False,
        ).numpy()[:, 9:]
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(params, jnp.asarray(ids)), plain, atol=2e-4)
    got = np.asarray(apply(params, (jnp.asarray(ids), jnp.asarray(keep))))
    np.testing.assert_allclose(got[keep], left[keep], atol=2e-4)
    out, _ = generate(net, params, jnp.asarray(ids, jnp.int32), None, jax.random.key(0), max_new=32)
    np.testing.assert_array_equal(out, chosen)
