"""The graph VAE, against NumPy in float64 and its own symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlab.lab.errors import UserError
from qlab.quantum import qas_pool as qp
from qlab.quantum import qas_vae as qv

SMALL = qv.VaeSpec(latent_dim=4, hidden=8, hops=3, batch=16, epochs=6)
VARIED = qp.PoolSpec(3, (3, 6), (0, 6), 96)


@pytest.fixture(autouse=True)
def x32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def graphs():
    with jax.enable_x64(False):
        pool = qp.sample_circuits(jax.random.key(7), VARIED)
        return qp.encode_pool(pool, 3)


@pytest.fixture(scope="module")
def trained(graphs):
    with jax.enable_x64(False):
        return qv.train_vae(jax.random.key(8), graphs, SMALL)


def some(graphs, k):
    return jax.tree.map(lambda x: x[:k], graphs)


def test_kl_is_zero_at_the_prior_and_normalised_twice(rng):
    """Property 5 of the card, and the sum over graphs and nodes in plain loops."""
    zero = jnp.zeros((3, 5, 4))
    assert float(qv.kl_term(zero, zero, jnp.ones((3, 5)))) == 0
    mu, s = (jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32) for _ in range(2))
    total = 0.0
    for b, i, d in np.ndindex(3, 5, 4):
        m, t = float(mu[b, i, d]), float(s[b, i, d])
        total += -0.5 * (1 + 2 * t - m**2 - np.exp(2 * t))
    got = float(qv.kl_term(mu, s, jnp.ones((3, 5))))
    assert got == pytest.approx(total / 15 / 15, rel=1e-5)
    live = jnp.ones((3, 5)).at[1, 2].set(0)
    other = mu.at[1, 2].set(99.0)  # a node that does not exist
    assert float(qv.kl_term(mu, s, live)) == pytest.approx(float(qv.kl_term(other, s, live)))


def gin_by_hand(state, g, layers):
    """The encoder's mean over nodes of mu, float64, one graph at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(state))
    out = []
    for ops, adj, live in zip(*(np.asarray(x, np.float64) for x in g), strict=True):
        x = ops[live > 0]
        a = (adj + adj.T)[live > 0][:, live > 0]
        for k in range(layers):
            q = p["body"]["layers"][k]
            norm = lambda x, n: (x - n["mean"]) / np.sqrt(n["var"] + 1e-5) * n["scale"] + n["bias"]  # noqa: E731
            x = (1 + q["eps"]) * x + a @ x
            x = np.maximum(norm(x @ q["inner"]["kernel"] + q["inner"]["bias"], q["norms"][0]), 0)
            x = np.maximum(norm(x @ q["outer"]["kernel"] + q["outer"]["bias"], q["norms"][1]), 0)
        out.append((x @ p["mean"]["kernel"] + p["mean"]["bias"]).mean(0))
    return np.stack(out)


def test_embedding_is_the_encoder_by_hand_and_ignores_the_batch(graphs, trained):
    vae, _ = trained
    got = np.asarray(qv.embed_pool(vae, graphs, chunk=40))  # 96 = 40 + 40 + 16
    np.testing.assert_allclose(got, gin_by_hand(vae.state, graphs, 2), atol=2e-5)
    np.testing.assert_allclose(got[:5], qv.embed_pool(vae, some(graphs, 5)), atol=2e-6)
    total = qv.embed_pool(vae, some(graphs, 5), "sum")
    np.testing.assert_allclose(
        total, got[:5] * np.asarray(graphs.live[:5].sum(1))[:, None], atol=2e-5
    )


def test_order_of_nodes_does_not_matter(graphs, trained, rng):
    """Property 4 of the card; empty nodes may stand anywhere too."""
    vae, _ = trained
    order = rng.permutation(graphs.live.shape[1])
    moved = qp.Graph(graphs.ops[:, order], graphs.adj[:, order][:, :, order], graphs.live[:, order])
    np.testing.assert_allclose(qv.embed_pool(vae, graphs), qv.embed_pool(vae, moved), atol=2e-6)


@pytest.mark.slow
def test_padding_changes_neither_embedding_nor_batch_statistics(graphs, trained):
    vae, _ = trained
    wide = qp.Graph(
        jnp.pad(graphs.ops, ((0, 0), (0, 3), (0, 0))),
        jnp.pad(graphs.adj, ((0, 0), (0, 3), (0, 3))),
        jnp.pad(graphs.live, ((0, 0), (0, 3))),
    )
    np.testing.assert_allclose(qv.embed_pool(vae, graphs), qv.embed_pool(vae, wide), atol=2e-6)
    stats = []
    for g in (graphs, wide):
        net = nnx.merge(vae.graph, vae.state, copy=True)
        net.encode(g, train=True)
        stats.append(jax.tree.leaves(nnx.state(net, nnx.BatchStat)))
    for a, b in zip(*stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("repo_loss", [False, True])
def test_loss_is_that_of_plain_loops(graphs, trained, repo_loss):
    g = some(graphs, 4)
    net = nnx.merge(*trained[0])
    spec = SMALL._replace(repo_loss=repo_loss, kl_weight=3.0)
    got, parts = qv.vae_loss(net, g, jax.random.key(0), spec, train=False)
    mu, s = net.encode(g)
    logits, edges = (np.asarray(x, np.float64) for x in net.decode(mu))
    ops, adj, live = (np.asarray(x, np.float64) for x in g)
    bce = lambda x, t: np.logaddexp(0, x) - t * x  # noqa: E731
    type_loss, column_loss, row_loss, edge_loss = [], [], [], []
    for b in range(4):
        for i in np.flatnonzero(live[b]):
            types = logits[b, i, :13]
            type_loss.append(np.log(np.exp(types).sum()) - types @ ops[b, i, :13])
            column_loss += list(bce(logits[b, i, 13:], ops[b, i, 13:]))
            p = np.exp(logits[b, i]) / np.exp(logits[b, i]).sum()
            row_loss += list(-ops[b, i] * np.log(p) - (1 - ops[b, i]) * np.log1p(-p))
            edge_loss += [
                bce(edges[b, i, j], adj[b, i, j]) for j in np.flatnonzero(live[b]) if j > i
            ]
    rows = np.mean(row_loss) if repo_loss else np.mean(type_loss) + np.mean(column_loss)
    kl = float(qv.kl_term(mu, s, g.live))
    assert float(got) == pytest.approx(rows + np.mean(edge_loss) + 3 * kl, rel=1e-4)
    assert float(parts["edges"]) == pytest.approx(np.mean(edge_loss), rel=1e-4)


def test_training_lowers_the_loss_and_is_deterministic(graphs, trained):
    vae, losses = trained
    assert losses.shape == (6,)
    assert losses[-1] < losses[0] - 0.3
    again, _ = qv.train_vae(jax.random.key(8), graphs, SMALL)
    jax.tree.map(np.testing.assert_array_equal, again.state, vae.state)
    eps = [float(x["eps"]) for x in nnx.to_pure_dict(vae.state)["body"]["layers"].values()]
    assert all(e != 0 for e in eps)  # learnt


@pytest.mark.slow
def test_settled_norms_give_the_embeddings_of_whole_pool_statistics(graphs):
    """An untrained net in evaluation mode is then about what it is with the statistics of the pool at hand."""
    vae = qv.gin_vae_init(jax.random.key(3), graphs.ops.shape[-1], SMALL)
    after = qv.settle_norms(jax.random.key(4), vae, graphs, num=60)
    for kind, same in ((nnx.Param, True), (nnx.BatchStat, False)):
        a, b = (jax.tree.leaves(nnx.split_state(v.state, kind, ...)[0]) for v in (vae, after))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) is same
    want, _ = nnx.merge(vae.graph, vae.state, copy=True).encode(graphs, train=True)
    gaps = [
        float(jnp.abs(nnx.merge(*v).encode(graphs)[0] - want).mean() / want.std())
        for v in (vae, after)
    ]
    assert gaps[1] < 0.05 < 0.3 < gaps[0]


@pytest.mark.slow
def test_noise_is_exp_of_the_log_deviation(graphs, trained):
    """z = mu + exp(s) noise: the loss with s = 0 and its KL tell a deviation from a variance."""
    net = nnx.merge(*trained[0], copy=True)
    net.log_std.kernel[...] = jnp.zeros_like(net.log_std.kernel[...])
    losses = []
    for log_std in (-20.0, 2.0):
        net.log_std.bias[...] = jnp.full_like(net.log_std.bias[...], log_std)
        keys = jax.random.split(jax.random.key(1), 3)
        one = lambda k: qv.vae_loss(net, graphs, k, SMALL._replace(dropout=0.0))[1]["edges"]  # noqa: E731
        losses.append(np.array([float(one(k)) for k in keys]))
    assert np.ptp(losses[0]) < 1e-5 < np.ptp(losses[1])


def test_quality_of_a_decoder_that_knows_the_graphs(graphs, trained):
    vae, _ = trained
    out = {k: float(v) for k, v in qv.quality(vae, graphs).items()}
    assert all(0 <= v <= 1 for v in out.values())
    net = nnx.merge(vae.graph, vae.state)
    logits, edges = net.decode(net.encode(graphs)[0])
    live = np.asarray(graphs.live) > 0
    right = np.asarray(logits[..., :13].argmax(-1) == graphs.ops[..., :13].argmax(-1))
    assert out["type_acc"] == pytest.approx(right[live].mean(), abs=1e-6)
    both = np.triu(live[:, :, None] & live[:, None], 1)
    true = np.asarray(graphs.adj) > 0
    p = np.asarray(jax.nn.sigmoid(edges))
    assert out["adj_acc"] == pytest.approx(((p > 0.5) == true)[both].mean(), abs=1e-6)
    assert out["no_edge_acc"] == pytest.approx((~true)[both].mean(), abs=1e-6)
    assert out["edge_prob"] == pytest.approx(p[both & true].mean(), abs=1e-5)
    assert out["false_mass"] == pytest.approx(p[both & ~true].mean(), abs=1e-5)
    mask = np.asarray((logits[..., 13:] > 0) == (graphs.ops[..., 13:] > 0))
    assert out["mask_acc"] == pytest.approx(mask[live].mean(), abs=1e-6)
    made = qv.generation_quality(vae, graphs, jax.random.key(2), 200)
    assert 0 <= float(made["validity"]) <= 1
    assert 0 <= float(made["uniqueness"]) <= 1


@pytest.mark.slow  # two more compilations
@pytest.mark.parametrize("mask", ["signed", "none"])
def test_other_encodings_train(mask):
    pool = qp.sample_circuits(jax.random.key(7), VARIED._replace(size=32))
    g = qp.encode_pool(pool, 3, mask)
    vae, losses = qv.train_vae(jax.random.key(1), g, SMALL._replace(epochs=1))
    assert np.isfinite(losses).all()
    out = qv.quality(vae, g)
    assert np.isnan(float(out["mask_acc"])) == (mask == "none")


def test_bad_nets_get_one_line():
    for change in (dict(hops=1), dict(dropout=1.0), dict(latent_dim=0), dict(pool_nodes="max")):
        with pytest.raises(UserError):
            qv.gin_vae_init(jax.random.key(0), 17, SMALL._replace(**change))
