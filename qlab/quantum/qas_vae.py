"""The graph VAE that learns circuit embeddings without labels (Sun et al. 2024; the model is arch2vec's).

Encoder: A <- A + A^T; four times X <- relu(BN(MLP((1 + eps) X + A X))), MLP = Linear, BN, relu, Linear; then mu and s
by linear maps of each node: z = mu + exp(s) noise, so s is the log of a standard deviation. Decoder: dropout on z, a
linear map to the row of each node, and sigmoid(z z^T) for the edges, judged on the strict upper triangle.
Loss: cross-entropy of the 13 types + binary cross-entropy of the qubit columns + that of the edges + KL, where
    KL = -(1/2) / (B N) mean over graphs and nodes of sum_d (1 + 2 s - mu^2 - exp(2 s)),
normalised twice as in the paper's source, which makes it weak (B N = 384 times weaker than a mean per node).
repo_loss: the source's softmax over the whole row, then binary cross-entropy with all of it.
Embedding of a circuit: mean of mu over its nodes, batch norm in evaluation mode. Empty nodes are masked everywhere.
Letters: B = graphs of a batch, N = nodes, F = row width, D = latent width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlab.lab.errors import UserError
from qlab.quantum.qas_pool import NUM_TYPES, Graph, is_valid


class VaeSpec(NamedTuple):
    """hops counts layers the paper's way: hops = 5 means 4 updates. pool_nodes: "mean" or "sum" over nodes."""

    latent_dim: int = 16
    hidden: int = 128
    hops: int = 5
    dropout: float = 0.3
    kl_weight: float = 1.0
    repo_loss: bool = False
    pool_nodes: str = "mean"
    learning_rate: float = 1e-3
    batch: int = 32
    epochs: int = 16
    clip: float = 5.0


def check_vae(spec: VaeSpec) -> VaeSpec:
    """Raises: UserError: what no net can be built or trained with."""
    if spec.pool_nodes not in ("mean", "sum"):
        raise UserError(f"pool_nodes={spec.pool_nodes!r}; use mean or sum")
    sizes = (spec.latent_dim, spec.hidden, spec.hops - 1, spec.batch)
    if min(sizes) < 1 or spec.epochs < 0 or not 0 <= spec.dropout < 1:
        raise UserError(
            f"latent_dim, hidden, hops - 1, batch = {sizes}, epochs = {spec.epochs}, dropout = "
            f"{spec.dropout}; sizes must be positive, dropout in [0, 1)"
        )
    return spec


class GinLayer(nnx.Module):
    """X <- relu(BN(MLP((1 + eps) X + A X)))."""

    def __init__(self, size_in: int, hidden: int, rngs: nnx.Rngs):
        self.eps = nnx.Param(jnp.zeros(()))
        self.inner, self.outer = (nnx.Linear(k, hidden, rngs=rngs) for k in (size_in, hidden))
        # momentum .9: the running means move by a tenth a step
        self.norms = nnx.List(
            [nnx.BatchNorm(hidden, momentum=0.9, epsilon=1e-5, rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x, adj, live, train):
        # nnx.BatchNorm reduces over batch and nodes
        mask = (live > 0)[..., None]
        norms = [functools.partial(n, use_running_average=not train, mask=mask) for n in self.norms]
        x = (1 + self.eps[...]) * x + adj @ x
        x = self.outer(nnx.relu(norms[0](self.inner(x))))
        return nnx.relu(norms[1](x)) * live[..., None]


class Gin(nnx.Module):
    """Node features f[B, N, hidden] of a batch of graphs; the VAE's body and the predictor's."""

    def __init__(self, row: int, hidden: int, num_layers: int, rngs: nnx.Rngs):
        sizes = [row] + [hidden] * (num_layers - 1)
        self.layers = nnx.List([GinLayer(k, hidden, rngs) for k in sizes])

    def __call__(self, g: Graph, train: bool):
        x, adj = g.ops, g.adj + jnp.swapaxes(g.adj, -1, -2)
        for layer in self.layers:
            x = layer(x, adj, g.live, train)
        return x


class GinVae(nnx.Module):
    """Encoder and decoder; `encode` gives (mu, s) f[B, N, D], `decode` row logits and edge logits z z^T."""

    def __init__(self, row: int, spec: VaeSpec, rngs: nnx.Rngs):
        self.body = Gin(row, spec.hidden, spec.hops - 1, rngs)
        self.mean, self.log_std = (
            nnx.Linear(spec.hidden, spec.latent_dim, rngs=rngs) for _ in range(2)
        )
        self.rows = nnx.Linear(spec.latent_dim, row, rngs=rngs)

    def encode(self, g: Graph, train: bool = False):
        x = self.body(g, train)
        return self.mean(x), self.log_std(x)

    def decode(self, z):
        return self.rows(z), z @ jnp.swapaxes(z, -1, -2)


class Vae(NamedTuple):
    """graph: the static half (hashable); state: everything learnt, with the running means."""

    graph: Any
    state: Any


def gin_vae_init(key: jax.Array, row: int, spec: VaeSpec) -> Vae:
    return Vae(*nnx.split(GinVae(row, check_vae(spec), nnx.Rngs(params=key))))


def kl_term(mu: jax.Array, log_std: jax.Array, live: jax.Array) -> jax.Array:
    """The doubly normalised KL of the module; 0 at mu = 0, log_std = 0.

    >>> float(kl_term(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.ones((2, 3))))
    0.0
    """
    per_node = -0.5 * (1 + 2 * log_std - mu**2 - jnp.exp(2 * log_std)).sum(-1)
    return (per_node * live).sum() / live.sum() / live.size


def _bce(logits: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    losses = optax.sigmoid_binary_cross_entropy(logits, target)
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def edge_weight(live: jax.Array) -> jax.Array:
    """f[B, N, N]: 1 above the diagonal between nodes that exist."""
    n = live.shape[-1]
    return live[..., :, None] * live[..., None, :] * jnp.triu(jnp.ones((n, n)), 1)


def _targets(g: Graph) -> tuple[jax.Array, jax.Array]:
    """Qubit columns and edges in [0, 1]: of a signed mask, -1, 0, 1 become 0, 1/2, 1, and any edge counts as one."""
    columns = g.ops[..., NUM_TYPES:]
    signed = (columns < 0).any()
    return jnp.where(signed, (columns + 1) / 2, columns), jnp.minimum(g.adj, 1.0)


def vae_loss(
    net: GinVae, g: Graph, key: jax.Array, spec: VaeSpec, train: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on one batch and its parts; train=True draws noise and dropout and moves the running means."""
    mu, log_std = net.encode(g, train)
    k_noise, k_drop = jax.random.split(key)
    z = mu
    if train:
        z = mu + jnp.exp(log_std) * jax.random.normal(k_noise, mu.shape)
        keep = 1 - spec.dropout
        z = jnp.where(jax.random.bernoulli(k_drop, keep, z.shape), z / keep, 0.0)
    logits, edges = net.decode(z)
    columns, adj = _targets(g)
    live = g.live[..., None]
    if spec.repo_loss:
        p = jnp.clip(nnx.softmax(logits), 1e-7, 1 - 1e-7)
        target = jnp.concatenate([g.ops[..., :NUM_TYPES], columns], -1)
        rows = -(target * jnp.log(p) + (1 - target) * jnp.log1p(-p))
        ops = (rows * live).sum() / live.sum() / rows.shape[-1]
    else:
        cross = optax.softmax_cross_entropy(logits[..., :NUM_TYPES], g.ops[..., :NUM_TYPES])
        ops = (cross * g.live).sum() / g.live.sum()
        if columns.shape[-1]:
            ops += _bce(logits[..., NUM_TYPES:], columns, jnp.broadcast_to(live, columns.shape))
    parts = {"ops": ops, "edges": _bce(edges, adj, edge_weight(g.live)),
             "kl": kl_term(mu, log_std, g.live)}  # fmt: skip
    return ops + parts["edges"] + spec.kl_weight * parts["kl"], parts


def _take(g: Graph, at: jax.Array) -> Graph:
    return jax.tree.map(lambda x: x[at], g)


@functools.partial(jax.jit, static_argnames="spec")
def train_vae(key: jax.Array, graphs: Graph, spec: VaeSpec) -> tuple[Vae, jax.Array]:
    """Trains on f[P, ...] graphs for spec.epochs in one program; a last batch that is not full is left out.

    Returns:
      the net and the mean training loss of each epoch, f[epochs].
    """
    k_init, k_run = jax.random.split(key)
    graph, state = gin_vae_init(k_init, graphs.ops.shape[-1], spec)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    tx = optax.chain(optax.clip_by_global_norm(spec.clip), optax.adam(spec.learning_rate))
    size = graphs.ops.shape[0]
    batch = min(spec.batch, size)
    per_epoch = size // batch

    def step(carry, xs):
        params, rest, opt_state = carry
        key, at = xs

        def loss_fn(params):
            net = nnx.merge(graph, params, rest, copy=True)
            loss, _ = vae_loss(net, _take(graphs, at), key, spec)
            return loss, nnx.split_state(nnx.state(net), nnx.Param, ...)[1]

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    def epoch(carry, key):
        k_order, k_steps = jax.random.split(key)
        order = jax.random.permutation(k_order, size)[: per_epoch * batch]
        keys = jax.random.split(k_steps, per_epoch)
        carry, losses = jax.lax.scan(step, carry, (keys, order.reshape(per_epoch, batch)))
        return carry, losses.mean()

    start = (params, rest, tx.init(params))
    (params, rest, _), losses = jax.lax.scan(epoch, start, jax.random.split(k_run, spec.epochs))
    return Vae(graph, nnx.merge_state(params, rest)), losses  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnames=("graph", "num", "batch"))
def _settle(key: jax.Array, graph: Any, state: Any, graphs: Graph, num: int, batch: int) -> Any:
    params, rest = nnx.split_state(state, nnx.Param, ...)

    def see(rest, key):
        net = nnx.merge(graph, params, rest, copy=True)
        at = jax.random.randint(key, (batch,), 0, graphs.ops.shape[0])
        net.encode(_take(graphs, at), train=True)
        return nnx.split_state(nnx.state(net), nnx.Param, ...)[1], None

    rest, _ = jax.lax.scan(see, rest, jax.random.split(key, num))
    return nnx.merge_state(params, rest)  # pyright: ignore[reportArgumentType]


def settle_norms(
    key: jax.Array, vae: Vae, graphs: Graph, *, num: int = 40, batch: int = 256
) -> Vae:
    """The net with batch norms that know its inputs: `num` random batches move the running means, weights stay.

    Without it an untrained net's norms (mean 0, variance 1) let activations grow layer by layer, and the control
    that training is compared with would be weaker than it has to be.
    """
    return vae._replace(state=_settle(key, vae.graph, vae.state, graphs, num, batch))


@functools.partial(jax.jit, static_argnames=("graph", "pool_nodes"))
def _embed(graph: Any, state: Any, g: Graph, pool_nodes: str) -> jax.Array:
    mu, _ = nnx.merge(graph, state).encode(g)
    total = (mu * g.live[..., None]).sum(-2)
    return total if pool_nodes == "sum" else total / g.live.sum(-1, keepdims=True)


def embed_pool(vae: Vae, graphs: Graph, pool_nodes: str = "mean", chunk: int = 1024) -> jax.Array:
    """e f[P, D] of every graph, in evaluation mode, in chunks of one shape."""
    size = graphs.ops.shape[0]
    width = min(chunk, size)
    parts = []
    for at in range(0, size, width):
        rows = jnp.minimum(jnp.arange(at, at + width), size - 1)
        parts.append(_embed(vae.graph, vae.state, _take(graphs, rows), pool_nodes))
    return jnp.concatenate(parts)[:size]


@functools.partial(jax.jit, static_argnames="graph")
def _quality(graph: Any, state: Any, g: Graph) -> dict[str, jax.Array]:
    net = nnx.merge(graph, state)
    logits, edges = net.decode(net.encode(g)[0])
    columns, adj = _targets(g)
    weight, live = edge_weight(g.live), g.live
    right = logits[..., :NUM_TYPES].argmax(-1) == g.ops[..., :NUM_TYPES].argmax(-1)
    p = nnx.sigmoid(edges)
    per_node = live.sum()
    q = nnx.sigmoid(logits[..., NUM_TYPES:])
    three = (columns == 0.5).any()  # a signed mask
    guess = jnp.where(three, jnp.round(2 * q) / 2, (q > 0.5).astype(q.dtype))
    return {
        "type_acc": (right * live).sum() / per_node,
        "mask_acc": ((guess == columns) * live[..., None]).sum() / per_node
        / max(columns.shape[-1], 1) if columns.shape[-1] else jnp.float32(jnp.nan),
        "adj_acc": (((p > 0.5) == (adj > 0.5)) * weight).sum() / weight.sum(),
        "edge_prob": (p * adj * weight).sum() / (adj * weight).sum(),
        "false_mass": (p * (1 - adj) * weight).sum() / ((1 - adj) * weight).sum(),
        "no_edge_acc": ((1 - adj) * weight).sum() / weight.sum(),
    }  # fmt: skip


def quality(vae: Vae, graphs: Graph) -> dict[str, jax.Array]:
    """How well the decoder gives graphs back, from mu and without dropout.

    Shares in [0, 1]: type_acc, mask_acc, adj_acc (edges at threshold 1/2), edge_prob (mean probability of true
    edges), false_mass (mean probability where there is none), no_edge_acc (what adj_acc is for "no edge at all").
    """
    return _quality(vae.graph, vae.state, graphs)


@functools.partial(jax.jit, static_argnames=("graph", "num"))
def _generate(graph: Any, state: Any, g: Graph, key: jax.Array, num: int) -> Any:
    net = nnx.merge(graph, state)
    mu = net.encode(g)[0]
    weight = g.live[..., None]
    count = jnp.maximum(weight.sum(0), 1.0)  # by position: START's z is not a gate's
    centre = (mu * weight).sum(0) / count
    spread = jnp.sqrt((((mu - centre) ** 2) * weight).sum(0) / count)
    z = centre + spread * jax.random.normal(key, (num, *centre.shape))
    logits, edges = net.decode(z)
    types = logits[..., :NUM_TYPES].argmax(-1)
    return types, logits[..., NUM_TYPES:] > 0, edges > 0


def generation_quality(
    vae: Vae, graphs: Graph, key: jax.Array, num: int = 10_000
) -> dict[str, jax.Array]:
    """Shares of `num` decodings of z ~ N(mean mu, std mu), over the pool at each node: valid (START, gates, END), and of
    the valid ones different from each other (rows and edges)."""
    types, columns, edges = jax.device_get(_generate(vae.graph, vae.state, graphs, key, num))
    valid = np.asarray(is_valid(types))
    i, j = np.triu_indices(types.shape[1], 1)
    rows = np.concatenate(
        [types, columns.reshape(num, -1), edges[:, i, j]], 1, dtype=np.int8, casting="unsafe"
    )[valid]
    unique = len(np.unique(rows, axis=0)) / max(len(rows), 1)
    return {"validity": jnp.float32(valid.mean()), "uniqueness": jnp.float32(unique)}
