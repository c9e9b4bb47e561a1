"""Q-VLM: ranges of activations searched jointly in blocks of dependent layers (Wang et al., arXiv 2410.08119).

    quantized = quantize_vlm(net, params, x, w_bits=4, a_bits=4)        # net: qlab.nn.vlm or qlab.nn.gpt
    logits = run_blocks(net, quantized.blocks, x)

Weights of the encoder, the projector and the decoder are rounded to nearest (groups of 64 inputs, asymmetric); the patch
embedding, the tables of tokens and the head stay float. Inputs of the encoder's and projector's products have a static
range per token row, those of the decoder's one per input channel, from the float net on the calibration samples and
widened to hold 0. Candidate ranges are p (lo, hi), one p per layer, p in {1, .9, ..., .4} for the decoder.
1. Encoder: p in {1, .999, .998} product by product, or learned ends (`encoder_steps` > 0): Adam on
   |v - v_q|^2 / |v|^2 + eta mean_k H(k), v the decoder's tokens, H(k) the soft entropy of its first block's inputs.
2. A proxy of the dependency between layers k and k + 1 cuts the decoder into blocks (`partition_by_proxy`).
3. Block after block, on inputs behind the quantized blocks before it, the shares that bring the block's output nearest to
   the float decoder's: all combinations up to 7^3, else coordinate search from the layer-wise solution.

The paper's formulation and its code (ChangyuanWang17/QVLM) differ; this is the formulation, of which the paper's abstract
gives points 1 to 3 and we chose the details. The code searches layer by layer on |x - x_hat|^0.5, repeats that on every
batch from the range as already shrunk, and uses its entropy only to decide which ranges see a batch at all:
`search="repo"`. In the encoder it adds the same entropy to every candidate, which cannot move the minimum. At prefill it
finds the ranges of o_proj and down_proj inputs anew for each prompt, and at decoding it widens them token by token; ranges
here are static. Its weights are bitsandbytes' 4-bit floats. Scales per input channel do not fit an integer product:
activations are rounded in floats, memory is counted from packed weights.

Letters: N = samples, T = tokens, D = channels, L = layers of the decoder, n = blocks of a group.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError
from qlab.nn.gpt import STAGES
from qlab.nn.sites import BlockNet, Params, pick
from qlab.quantization.activations import Affine, PerToken, affine
from qlab.quantization.blocks import QuantizedBlock
from qlab.quantization.encoder_ranges import Ends, front, front_ranges, search_front, tune_encoder
from qlab.quantization.language_layers import (
    FloatPass,
    State,
    decoder_at,
    dependency_proxies,
    float_pass,
    input_errors,
    layer,
    num_layers,
    output_error,
    start_state,
)
from qlab.quantization.qtensor import QTensor
from qlab.quantization.range_search import (
    EXHAUSTIVE,
    Cost,
    Found,
    Partition,
    coordinate_search,
    fixed_partition,
    joint_range_search,
    partition_by_proxy,
    run_layers,
    search_cost,
    shuffled_partition,
)
from qlab.quantization.repo_ranges import repo_ranges
from qlab.quantization.vlm_weights import PRODUCTS, round_weights, with_weights

Search = Literal["minmax", "layerwise", "blocks", "repo", "token"]
Cut = Literal["proxy", "fixed", "shuffled"]
PROXIES = ("entropy", "conditional", "repo")
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
VISION_SHARES = (1.0, 0.999, 0.998)


class Options(NamedTuple):
    """How ranges are found; the default is Q-VLM without the encoder step.

    Attributes:
      search: "minmax" (the whole range), "layerwise" (each input's own error), "blocks" (Q-VLM), "repo" (the published
        code), "token" (each token's own range at run time, as baselines have it).
      cut: blocks by "proxy", of "fixed" length max_len, or the proxy's lengths "shuffled".
      proxy: one of PROXIES. tau, max_len: of `partition_by_proxy`. shares, vision_shares: candidates.
      power: of the error that layer-wise searches minimise. exhaustive: combinations up to which all are tried.
      encoder_steps, encoder_rate, eta, encoder_norms: of `tune_encoder`; 0 steps: shares are searched.
      group: inputs that share a weight scale, where they divide. weight_grid: of `grid.calibrate`.
    """

    search: Search = "blocks"
    cut: Cut = "proxy"
    proxy: str = "entropy"
    tau: float = 1.0
    max_len: int = 3
    shares: tuple[float, ...] = SHARES
    vision_shares: tuple[float, ...] = VISION_SHARES
    power: float = 2.0
    exhaustive: int = EXHAUSTIVE
    encoder_steps: int = 0
    encoder_rate: float = 5e-2
    eta: float = 0.01
    encoder_norms: bool = False
    repo_batches: int = 8
    group: int = 64
    weight_grid: str = "shares"


class QuantizedVLM(NamedTuple):
    """blocks: a QuantizedBlock per group, for `run_blocks`. shares: f32[L] (1 where ranges are not shares). partition: of
    the decoder's layers. proxies: {name: f32[L]}. cost: of the search. sites: quantized weights and inputs."""

    blocks: tuple[QuantizedBlock, ...]
    shares: jax.Array
    partition: Partition
    proxies: dict[str, jax.Array]
    cost: Cost
    sites: int


def check_options(o: Options) -> None:
    """Raises a UserError that names what cannot be."""
    for name, given, known in (
        ("search", o.search, ("minmax", "layerwise", "blocks", "repo", "token")),
        ("cut", o.cut, ("proxy", "fixed", "shuffled")),
        ("proxy", o.proxy, PROXIES),
    ):
        if given not in known:
            raise UserError(f"{name}={given!r}; use one of {', '.join(known)}")
    for name, grid in (("shares", o.shares), ("vision_shares", o.vision_shares)):
        if not grid or not all(0 < p <= 1 for p in grid):
            raise UserError(f"{name}={tuple(grid)}; shares above 0 and up to 1 are expected")
    if o.max_len < 1 or o.encoder_steps < 0:
        raise UserError(
            f"max_len={o.max_len}, encoder_steps={o.encoder_steps}; use at least 1 and 0"
        )


def quantize_vlm(
    net: BlockNet,
    params: tuple[Params, ...],
    x: Any,
    *,
    w_bits: int,
    a_bits: int,
    options: Options = Options(),  # noqa: B008 (a constant tuple)
    key: jax.Array | None = None,
) -> QuantizedVLM:
    """The net with rounded weights and inputs, calibrated on x. Runs on the host, its heavy parts compiled.

    Args:
      net: of `qlab.nn.vlm`, or of `qlab.nn.gpt` (all of its tokens are the decoder's). x: inputs, a few samples.
      w_bits, a_bits: 2 to 8. key: of a shuffled partition.
    Raises:
      UserError: widths or options that do not exist.
    """
    check_options(options)
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UserError(f"{name}={bits!r}; a width from 2 to 8 is expected")
    at, o, bits = decoder_at(net), options, jnp.float32(a_bits)
    weights = round_weights(net, params, jnp.float32(w_bits), group=o.group, grid=o.weight_grid)
    rounded = with_weights(params, weights)
    if o.search == "token":
        acts = [_per_token(net.groups[g], w, a_bits) for g, w in enumerate(weights)]
        return _packed(net, params, weights, acts, jnp.ones(num_layers(net)), (), {}, Cost(0, 0))
    ranges, tokens = front_ranges(net, params, x, PRODUCTS)
    seen = float_pass(net, params[at], tokens)
    ends, cost = ranges, Cost(0, 0)
    if o.search != "minmax":
        grid = jnp.array(o.vision_shares)
        ends = search_front(net, rounded[:at], ranges, x, bits, grid, o.power)
    if o.encoder_steps:
        ends, norms, _ = tune_encoder(
            net, rounded, ends, seen, x, bits, num_steps=o.encoder_steps,
            learning_rate=o.encoder_rate, eta=o.eta, norms=o.encoder_norms,
        )  # fmt: skip
        params, rounded = _with_norms(params, norms), _with_norms(rounded, norms)
        blocks = (
            sum(g.n for g in net.groups[:at] if g.name == "vision") + 1
        )  # and the decoder's first
        cost = Cost(o.encoder_steps * blocks, 0)
    tokens_q = front(net, rounded[:at], ends, x, bits)
    state = start_state(rounded[at], tokens_q)
    proxies = dependency_proxies(seen, bits)
    partition, shares = (), jnp.ones(num_layers(net))
    language = seen.ranges
    grid = jnp.array(o.shares)
    if o.search == "layerwise":
        shares = search_layers(net, rounded[at], seen.ranges, bits, state, grid, o.power)
        cost += Cost(0, num_layers(net))
    elif o.search == "repo":
        language, more = repo_ranges(net, rounded[at], tokens_q, bits, grid, o.repo_batches)
        cost += more
    elif o.search == "blocks":
        partition = _partition(o, proxies[o.proxy], key)
        shares, more = search_blocks(net, rounded[at], seen, bits, state, grid, partition, o)
        cost += more
    per = {name: shares.reshape(-1, len(STAGES))[:, i, None] for i, name in enumerate(STAGES)}
    ends = (*ends, {name: (lo * per[name], hi * per[name]) for name, (lo, hi) in language.items()})
    acts = [_records(e, bits) for e in ends]
    acts += [{}] * (len(net.groups) - len(acts))
    return _packed(net, params, weights, acts, shares, partition, proxies, cost)


def _with_norms(params: tuple[Params, ...], norms: tuple[Params, ...]) -> tuple[Params, ...]:
    front = [{**p, **n} for p, n in zip(params, norms, strict=False)]
    return (*front, *params[len(norms) :])


def _packed(net, params, weights, acts, shares, partition, proxies, cost) -> QuantizedVLM:
    blocks = tuple(QuantizedBlock(*b) for b in zip(params, weights, acts, strict=True))
    sites = sum(
        g.n * (len(q.weights) + len(q.acts)) for g, q in zip(net.groups, blocks, strict=True)
    )
    return QuantizedVLM(blocks, shares, partition, proxies, cost, sites)


@jax.jit
def _records(ends: Ends, bits) -> dict[str, Affine]:
    return {site: jax.vmap(lambda lo, hi: affine(lo, hi, bits))(*e) for site, e in ends.items()}


def _per_token(group, weights: dict[str, QTensor], bits: int) -> dict[str, PerToken]:
    return {site: PerToken(jnp.full(group.n, float(bits))) for site in weights}


def _partition(o: Options, proxy: jax.Array, key: jax.Array | None) -> Partition:
    if o.cut == "fixed":
        return fixed_partition(len(proxy), o.max_len)
    made = partition_by_proxy(proxy, o.tau, o.max_len)
    return (
        made
        if o.cut == "proxy"
        else shuffled_partition(made, jax.random.key(0) if key is None else key)
    )


@partial(jax.jit, static_argnums=0)
def search_layers(
    net: BlockNet, params: Params, ranges, bits, state: State, grid: jax.Array, power
) -> jax.Array:
    """f32[L]: for each layer the share with the least mean |x - x_hat|^power of its own input behind the layers before."""

    def step(state, k):
        share = grid[input_errors(net, params, ranges, bits, k, state, grid, power).argmin()]
        return layer(net, params, ranges, bits, k, state, share), share

    return jax.lax.scan(step, state, jnp.arange(num_layers(net)))[1]


def search_blocks(
    net: BlockNet, params: Params, seen: FloatPass, bits, state: State, grid: jax.Array,
    partition: Partition, options: Options,
) -> tuple[jax.Array, Cost]:  # fmt: skip
    """(f32[L], Cost): the blocks of a partition one after another, each behind the quantized ones before it."""
    shares, cost = [], Cost(0, 0)
    room = max(j - i + 1 for i, j in partition)
    for i, j in partition:
        n = j - i + 1
        found, state = search_block(
            net, params, seen.ranges, seen.outputs, bits, i, n, state, grid, options.power,
            room=room, exhaustive=len(grid) ** n <= options.exhaustive,
        )  # fmt: skip
        shares.append(found.shares[:n])
        cost += search_cost(len(grid), n, exhaustive=options.exhaustive) + Cost(0, n)
    return jnp.concatenate(shares), cost


@partial(jax.jit, static_argnums=0, static_argnames=("room", "exhaustive"))
def search_block(
    net: BlockNet, params: Params, ranges, targets: State, bits, first, length, state: State, grid,
    power=2.0, *, room: int, exhaustive: bool = True,
) -> tuple[Found, State]:  # fmt: skip
    """The shares of layers first .. first + length - 1 for which their output is nearest to the float one.

    Args:
      params, ranges: of the decoder. targets: states after each layer of the float decoder, leaves [L, ...].
      state: before the block, behind quantized layers. grid: f32[P]. power: of a coordinate search's layer-wise start.
      length: traced, at most room. exhaustive: all combinations, or coordinate search.
    Returns:
      (shares and their mean squared error, the state behind the block).
    """
    last = first + length - 1
    target = pick(targets, last)

    def one(i, state, share):
        return layer(net, params, ranges, bits, first + i, state, share)

    def loss(state: State) -> jax.Array:
        return output_error(params, last, state, target)

    if exhaustive:
        found = joint_range_search(one, state, loss, grid, length, room)
    else:

        def begin(i, carry):
            y, shares = carry
            errors = input_errors(net, params, ranges, bits, first + i, y, grid, power)
            share = grid[errors.argmin()]
            return one(i, y, share), shares.at[i].set(share)

        start = jax.lax.fori_loop(0, length, begin, (state, jnp.ones(room)))[1]
        found = coordinate_search(one, state, loss, grid, start, length)
    return found, run_layers(one, state, found.shares, length)


@partial(jax.jit, static_argnums=0)
def pair_gaps(
    net: BlockNet, params: Params, seen: FloatPass, bits, state: State, grid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """G(k), and G(k) over the sequential error, f32[L - 1] each: what layers k and k + 1 gain from a joint search.

    G(k) is the error of the pair's output with both shares found one after the other, each for its own layer's output,
    less the error of the best pair. Layers before k are rounded on their whole ranges. Never negative.
    """

    def step(state, k):
        def run(i, state, share):
            return layer(net, params, seen.ranges, bits, k + i, state, share)

        def error(i, state):
            return output_error(params, k + i, state, pick(seen.outputs, k + i))

        def row(share):
            between = run(0, state, share)
            return error(0, between), jax.lax.map(lambda s: error(1, run(1, between, s)), grid)

        own, pairs = jax.lax.map(row, grid)  # f32[P], f32[P, P]
        sequential = pairs[own.argmin()].min()
        gap = sequential - pairs.min()
        return run(0, state, 1.0), (gap, gap / jnp.maximum(sequential, 1e-30))

    return jax.lax.scan(step, state, jnp.arange(num_layers(net) - 1))[1]
