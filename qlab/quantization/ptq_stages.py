"""Nets as a row of stages whose weight products are handed to a function: one walk for chains and nets of blocks.

A stage is n equal blocks, their params stacked. `apply(params, x, linear)` computes one block and sends every weight
product through linear(site, w f32[out, in], b f32[out], x f32[..., in]) -> f32[..., out].

Letters: N = samples, n = blocks of a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.nn.chain import Chain, Layer
from qlab.nn.sites import BlockNet, Run, pick, sites
from qlab.quantization.units import unit_layers

Linear = Callable[[str, jax.Array, jax.Array, jax.Array], jax.Array]


class SiteInfo(NamedTuple):
    """activation: what follows the product, None if nothing does. normed: its input comes out of a norm."""

    name: str
    rows: int
    columns: int
    activation: Callable[[jax.Array], jax.Array] | None = None
    normed: bool = False


class Stage(NamedTuple):
    """n blocks of one structure. weights: params of a block -> {site: (w, b)}."""

    n: int
    apply: Callable[[Any, Any, Linear], Any]
    weights: Callable[[Any], dict[str, tuple[jax.Array, jax.Array]]]
    sites: tuple[SiteInfo, ...]


Stages = tuple[Stage, ...]


def product(site: str, w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    """The float product."""
    del site
    return x @ w.T + b


def chain_stages(
    chain: Chain, shapes: Sequence[tuple[int, ...]], unit: str = "layer"
) -> tuple[Stages, Callable[[Sequence[Layer]], tuple[Any, ...]]]:
    """(stages, stack): a chain cut into units "layer", "block" (two layers) or "net"; stack makes their params.

    Consecutive units of one shape and with the same functions between layers form a stage.
    """
    units = unit_layers(len(shapes), unit)
    last = len(shapes) - 1

    def kind(layers):
        return [(shapes[i], chain.pre[i], i == last) for i in layers]

    plans = [list(same) for _, same in itertools.groupby(units, kind)]

    def stage(plan) -> Stage:
        first = plan[0]
        names = [f"layer{j}" for j in range(len(first))]

        def apply(params, x, linear):
            for j, i in enumerate(first):
                x = linear(names[j], params[j].w, params[j].b, chain.pre[i](x))
            return x

        infos = tuple(
            SiteInfo(name, *shapes[i], activation=None if i == last else jax.nn.relu)
            for name, i in zip(names, first, strict=True)
        )

        def weights(params):
            return {name: (a.w, a.b) for name, a in zip(names, params, strict=True)}

        return Stage(len(plan), apply, weights, infos)

    def stack(layers: Sequence[Layer]):
        return tuple(
            tuple(
                jax.tree.map(lambda *a: jnp.stack(a), *(layers[u[j]] for u in plan))
                for j in range(len(plan[0]))
            )
            for plan in plans
        )

    return tuple(map(stage, plans)), stack


def block_stages(
    net: BlockNet,
    params: Sequence[Any],
    x: Any,
    *,
    activations: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    normed: Sequence[str] = (),
) -> Stages:
    """The stages of a net of blocks; a site's weights lie under its own name in the params of its block.

    Args:
      params, x: arrays or shapes. activations: {site: what follows it}. normed: sites behind a norm.
    """
    stages = []
    for group, stacked in zip(net.groups, params, strict=True):
        one = jax.eval_shape(lambda p: pick(p, 0), stacked)
        found = [s for s in sites(group.block, one, x) if s.kind == "linear"]
        infos = tuple(
            SiteInfo(s.name, s.out, s.width, (activations or {}).get(s.name), s.name in normed)
            for s in found
        )

        def apply(p, x, linear, block=group.block):
            def run(site, layer, x):
                return linear(site, layer.kernel[...].T, layer.bias[...], x)

            return block(p, x, Run(run, lambda site, x: x))

        def weights(p, infos=infos):
            return {s.name: (p[s.name]["kernel"].T, p[s.name]["bias"]) for s in infos}

        stages.append(Stage(group.n, apply, weights, infos))
        x = jax.eval_shape(lambda p, x, block=group.block: block(p, x), one, x)
    return tuple(stages)


def scan_stage(stage: Stage, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any):
    """lax.scan over the blocks of a stage; without a loop where there is one."""
    if stage.n == 1:
        carry, y = body(carry, pick(xs, 0))
        return carry, jax.tree.map(lambda a: a[None], y)
    return jax.lax.scan(body, carry, xs)


def num_sites(stages: Stages) -> int:
    return sum(s.n * len(s.sites) for s in stages)


def offsets(stages: Stages) -> tuple[int, ...]:
    """The number of each stage's first site; block i's site j has offset + i * len(sites) + j."""
    counts = [s.n * len(s.sites) for s in stages]
    return tuple(itertools.accumulate([0, *counts[:-1]]))


def forward(stages: Stages, params: Sequence[Any], x: Any, weights: Sequence[Any] | None = None):
    """The net's output. weights: per stage {site: f32[n, out, in]} in place of its own."""
    for g, stage in enumerate(stages):
        own = None if weights is None else weights[g]

        def body(x, at, stage=stage):
            p, own = at

            def linear(site, w, b, x):
                return product(site, w if own is None else own[site], b, x)

            return stage.apply(p, x, linear), None

        x, _ = scan_stage(stage, body, x, (params[g], own))
    return x


def suffix(stages: Stages, params: Sequence[Any], g: int, i, y: jax.Array) -> jax.Array:
    """The float net's output from y, that of block i (may be traced) of stage g."""
    stage = stages[g]
    if stage.n > 1:

        def body(y, at):
            j, p = at
            return jnp.where(j > i, stage.apply(p, y, product), y), None

        y = jax.lax.scan(body, y, (jnp.arange(stage.n), params[g]))[0]
    return forward(stages[g + 1 :], params[g + 1 :], y)


def stacked_weights(stages: Stages, params: Sequence[Any]) -> tuple[dict[str, jax.Array], ...]:
    """Per stage {site: f32[n, out, in]}."""
    return tuple(
        {site: w for site, (w, _) in jax.vmap(stage.weights)(p).items()}
        for stage, p in zip(stages, params, strict=True)
    )


def site_inputs(stages: Stages, params: Sequence[Any], x: Any) -> dict[str, jax.Array]:
    """{"stage.block.site": f32[N, positions, in]}, the inputs of all weight products of the float net."""
    seen: dict[str, jax.Array] = {}
    for g, stage in enumerate(stages):
        for i in range(stage.n):

            def linear(site, w, b, x, g=g, i=i):
                seen[f"{g}.{i}.{site}"] = x.reshape(len(x), -1, x.shape[-1])
                return product(site, w, b, x)

            x = stage.apply(pick(params[g], i), x, linear)
    return seen


def entropy_of_answers(logits: jax.Array) -> jax.Array:
    """f32[]: cross-entropy to the net's own answers, summed over samples; needs no labels."""
    answers = jax.lax.stop_gradient(logits.argmax(-1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).sum()


def fisher_diagonal(
    stages: Stages, params: Sequence[Any], x: Any
) -> tuple[dict[str, jax.Array], ...]:
    """Per stage {site: f32[n, N, ..., out]}: squared gradients of each sample's loss at the float product's output."""
    shapes = []
    at = x
    for g, stage in enumerate(stages):
        seen: dict[str, Any] = {}

        def look(p, x, stage=stage, seen=seen):
            def linear(site, w, b, x):
                y = product(site, w, b, x)
                seen[site] = jax.ShapeDtypeStruct((stage.n, *y.shape), y.dtype)
                return y

            return stage.apply(pick(p, 0), x, linear)

        at = jax.eval_shape(look, params[g], at)
        shapes.append(seen)

    def loss(moved):
        y = x
        for g, stage in enumerate(stages):

            def body(y, at, stage=stage):
                p, add = at

                def linear(site, w, b, x):
                    return product(site, w, b, x) + add[site]

                return stage.apply(p, y, linear), None

            y, _ = scan_stage(stage, body, y, (params[g], moved[g]))
        return entropy_of_answers(y)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tuple(shapes))
    return jax.tree.map(jnp.square, jax.grad(loss)(zeros))


def weight_saliency(
    stages: Stages, params: Sequence[Any], x: Any, num_batches: int = 8
) -> tuple[dict[str, jax.Array], ...]:
    """Per stage {site: f32[n, out, in]}: mean over batches of the squared gradient of the mean loss (empirical Fisher)."""
    w = stacked_weights(stages, params)
    batches = jax.tree.map(
        lambda a: a[: len(a) // num_batches * num_batches].reshape(num_batches, -1, *a.shape[1:]), x
    )

    def one(batch):
        size = len(jax.tree.leaves(batch)[0])
        return jax.grad(lambda w: entropy_of_answers(forward(stages, params, batch, w)) / size)(w)

    squares = jax.lax.map(lambda b: jax.tree.map(jnp.square, one(b)), batches)
    return jax.tree.map(lambda a: a.mean(0), squares)
