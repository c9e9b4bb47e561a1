"""A decoder (group "decoder" of a net of `qlab.nn.gpt` or `qlab.nn.vlm`) as a row of layers whose inputs are rounded.

Layer k is one weight product of a block with what stands before it (norm, attention, gate): stage k % 4 of
block k // 4, in the order of `qlab.nn.gpt.STAGES`. Its input has one range per channel, (lo, hi) f32[D], widened to hold
0; a share shrinks the whole range. Weights are taken as they stand in the params: rounded ones are put there first.

A state is (x f32[N, T, D], m f32[N, T, E]), the residual stream and what "qkv" or "gate_up" leave for the next layer.
The output of a layer is the part that it writes. k may be traced, so that one compiled program serves all layers.

Letters: N = samples, T = tokens, L = layers, n = blocks, P = candidate shares.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.gpt import STAGES
from qlab.nn.sites import BlockNet, Params, Run, capture, pick
from qlab.quantization.activations import Affine, affine, encode, fake
from qlab.quantization.code_entropy import code_histogram, conditional_entropy, entropy

LEAST_WIDTH = 1e-5  # of a range: a constant channel has a step
FLOAT_BITS = 32.0  # on such a grid everything stays as it is
State = tuple[jax.Array, jax.Array]
Ranges = dict[str, tuple[jax.Array, jax.Array]]


class FloatPass(NamedTuple):
    """What the float decoder does on calibration tokens.

    start: the state before layer 0. inputs: {stage: f32[n, N, T, D]}. ranges: {stage: (lo, hi) f32[n, D]}.
    outputs: states after each layer, leaves [L, ...].
    """

    start: State
    inputs: dict[str, jax.Array]
    ranges: Ranges
    outputs: State


def decoder_at(net: BlockNet) -> int:
    """Place of the group "decoder"."""
    names = [g.name for g in net.groups]
    if "decoder" not in names:
        raise ValueError(f"no group is called 'decoder'; the net has {', '.join(names)}")
    return names.index("decoder")


def num_layers(net: BlockNet) -> int:
    return net.groups[decoder_at(net)].n * len(STAGES)


def channel_range(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) over `axes`, widened to hold 0 and to LEAST_WIDTH."""
    lo, hi = jnp.minimum(x.min(axes), 0.0), jnp.maximum(x.max(axes), 0.0)
    return lo, jnp.maximum(hi, lo + LEAST_WIDTH)


def shrunk(lo: jax.Array, hi: jax.Array, share, bits) -> Affine:
    """The grid of share * (lo, hi): `affine`, which in codes from 0 is the repository's quantizer
    q = clip(round(S x - Z)), x_hat = (q + Z) / S with S = (2^b - 1) / (hi - lo)."""
    return affine(lo * share, hi * share, bits)


def start_state(params: Params, tokens: jax.Array) -> State:
    """Before layer 0. params: of the decoder, stacked."""
    width = max(params["qkv"]["kernel"].shape[-1], params["down"]["kernel"].shape[-2])
    return tokens, jnp.zeros((*tokens.shape[:2], width))


def on_stage(net: BlockNet, params: Params, ranges: Any, k, then, *args: Any) -> Any:
    """then(stage name, module of block k // 4, its range (lo, hi), *args), k traced; equal forms for all stages."""
    group = net.groups[decoder_at(net)]
    own, near = pick((params, ranges), k // len(STAGES))

    def branch(name: str):
        return lambda *args: then(name, nnx.merge(group.block.graph, own), near[name], *args)

    return jax.lax.switch(k % len(STAGES), [branch(name) for name in STAGES], *args)


def layer(net: BlockNet, params: Params, ranges: Ranges, bits, k, state: State, share) -> State:
    """The state after layer k, its input rounded on share times its range."""

    def run_stage(name, block, ends, state, share):
        record = shrunk(ends[0], ends[1], share, bits)
        run = Run(lambda site, product, x: product(fake(record, x)), lambda site, x: x)
        return block.stage(name, *state, run)

    return on_stage(net, params, ranges, k, run_stage, state, jnp.asarray(share, jnp.float32))


def input_errors(
    net: BlockNet, params: Params, ranges: Ranges, bits, k, state: State, grid, power=2.0
) -> jax.Array:
    """f32[P]: mean |x - x_hat|^power of the input of layer k on each share of its range."""

    def errors(name, block, ends, state):
        found = []

        def linear(site, product, x):
            def error(share):
                record = shrunk(ends[0], ends[1], share, bits)
                return (jnp.abs(fake(record, x) - x) ** power).mean()

            found.append(jax.lax.map(error, grid))
            return product(x)

        block.stage(name, *state, Run(linear, lambda site, x: x))
        return found[0]

    return on_stage(net, params, ranges, k, errors, state)


def output_error(params: Params, k, state: State, target: State) -> jax.Array:
    """f32[]: mean squared error of the output of layer k: of x, or of the columns of m that it fills."""
    filled = jnp.array([params["qkv"]["kernel"].shape[-1], params["down"]["kernel"].shape[-2]])
    dx = ((state[0] - target[0]) ** 2).mean()
    dm = ((state[1] - target[1]) ** 2).sum(-1).mean() / filled[k % len(STAGES) // 2]
    return jnp.where(k % 2 == 0, dm, dx)  # "qkv" and "gate_up" fill m, the others add to x


@partial(jax.jit, static_argnums=0)
def float_pass(net: BlockNet, params: Params, tokens: jax.Array) -> FloatPass:
    """The float decoder (params: of its group, stacked) on tokens f32[N, T, D]."""
    group = net.groups[decoder_at(net)]
    seen = jax.lax.scan(lambda x, p: capture(group.block, p, x), tokens, params)[1]
    inputs = {name: seen[name] for name in STAGES}
    ranges = {name: channel_range(x, (1, 2)) for name, x in inputs.items()}
    start = start_state(params, tokens)

    def step(state, k):
        state = layer(net, params, ranges, FLOAT_BITS, k, state, 1.0)
        return state, state

    outputs = jax.lax.scan(step, start, jnp.arange(group.n * len(STAGES)))[1]
    return FloatPass(start, inputs, ranges, outputs)


def in_order(values: dict[str, jax.Array]) -> jax.Array:
    """f32[L] of f32[n] per stage."""
    return jnp.stack([values[name] for name in STAGES], 1).reshape(-1)


@partial(jax.jit, static_argnames="max_bits")
def dependency_proxies(seen: FloatPass, bits, *, max_bits: int = 8) -> dict[str, jax.Array]:
    """{"entropy", "conditional", "repo"}: f32[L], of each layer for its dependency with the next.

    All from the codes of the float inputs on their whole ranges. entropy: H(k) of the codes, per tensor.
    conditional: H(codes of k + 1 | codes of k) at equal places, where the widths agree and the two stand in one
    block, else H(k). repo: the published code's measure, see `repo_entropy` and `repo_dependency`.

    Args:
      bits: at most max_bits, which sets the room of the histograms.
    """
    levels = 2**max_bits
    grids = {
        name: jax.vmap(lambda lo, hi: affine(lo, hi, bits))(*seen.ranges[name]) for name in STAGES
    }
    codes = {
        name: jax.lax.map(lambda a: encode(*a), (grids[name], seen.inputs[name])) for name in STAGES
    }
    plain = {
        name: jax.lax.map(lambda q: entropy(code_histogram(q, levels)), codes[name])
        for name in STAGES
    }
    given, repo = dict(plain), {}
    x_hat = {name: jnp.abs(jax.vmap(fake)(grids[name], seen.inputs[name])) for name in STAGES}
    for i, name in enumerate(STAGES):
        later = STAGES[i + 1] if i + 1 < len(STAGES) else None
        if later is not None and codes[name].shape == codes[later].shape:
            pairs = (codes[name], codes[later])
            given[name] = jax.lax.map(lambda p: conditional_entropy(p[0], p[1], levels), pairs)
        before = STAGES[i - 1]
        if name in ("proj", "gate_up") and x_hat[before].shape == x_hat[name].shape:
            repo[name] = jax.vmap(repo_dependency)(x_hat[before], x_hat[name])
        else:
            repo[name] = jax.vmap(repo_entropy)(x_hat[name])
    return {"entropy": in_order(plain), "conditional": in_order(given), "repo": in_order(repo)}


def repo_entropy(x: jax.Array) -> jax.Array:
    """f32[] of |x_hat| f32[N, T, D]: -sum_t a log(a + 1e-7), mean over the rest; a has unit L2 norm over tokens.

    a is no distribution, so this is no entropy; it is what the published code compares.
    """
    a = x / jnp.maximum(jnp.sqrt((x**2).sum(1, keepdims=True)), 1e-12)
    return -(a * jnp.log(a + 1e-7)).sum(1).mean()


def repo_dependency(x: jax.Array, y: jax.Array) -> jax.Array:
    """f32[] of |x_hat|, |y_hat| f32[N, T, D] of successive layers: -sum_t j log(c + 1e-5), mean over the rest.

    With a, b of unit sum over tokens: j is a b and c is b / (a + 1e-5), both scaled to unit sum again.
    """

    def unit(a):
        return a / jnp.maximum(a.sum(1, keepdims=True), 1e-12)

    a, b = unit(x), unit(y)
    return -(unit(a * b) * jnp.log(unit(b / (a + 1e-5)) + 1e-5)).sum(1).mean()
