"""Nets as a row of blocks with named quantizable sites: what activation quantization works on.

A block is a flax.nnx module whose `__call__(x, run)` sends every product through `run`: a weight product as
`run.linear("fc1", self.fc1, x)`, an operand of a product of two activations (or any other tensor that a
method rounds) as `run.operand("probs", p)`. FLOAT computes; other runs capture, round, quantize or execute
packed weights, so that one program of the model serves them all and nothing is patched.

Blocks are split at the edge: below it everything takes (block, params), block static and hashable, params a
plain nested dict of arrays. Consecutive blocks of one structure form a group: their params are stacked on
a leading axis, and one compiled program serves them all.

Letters: n = blocks of a group, N = samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]


class Run(NamedTuple):
    """How the sites of a block are executed.

    Attributes:
      linear: (site, layer, x f32[..., in]) -> f32[..., out], the affine map of an nnx.Linear.
      operand: (site, x) -> x, an activation that is not the input of a weight product.
      weight: (site, w f32[out, in]) -> w, a weight used otherwise than in a plain product (a depthwise
        kernel, a row for each channel). Its input, if that is rounded, is the operand of the same name.
    """

    linear: Callable[[str, nnx.Linear, jax.Array], jax.Array]
    operand: Callable[[str, jax.Array], jax.Array]
    weight: Callable[[str, jax.Array], jax.Array] = lambda site, w: w


FLOAT = Run(lambda site, layer, x: layer(x), lambda site, x: x)


class Block(NamedTuple):
    """The static part of a block; equal for blocks of one structure."""

    graph: Any

    def __call__(self, params: Params, x: Any, run: Run = FLOAT) -> Any:
        return nnx.merge(self.graph, params)(x, run)


class Group(NamedTuple):
    """n consecutive blocks of one structure. name: for messages and site names."""

    name: str
    block: Block
    n: int


class BlockNet(NamedTuple):
    """A net as groups of blocks; hashable, all its functions pure.

    Attributes:
      groups: static. make: rngs -> the blocks, group after group (a module each).
    """

    groups: tuple[Group, ...]
    make: Callable[[nnx.Rngs], Sequence[Sequence[nnx.Module]]]

    def init(self, key: jax.Array) -> tuple[Params, ...]:
        """Per group the params of its blocks, stacked on axis 0."""
        return _init(self, key)

    def apply(self, params: Sequence[Params], x: Any, run: Run = FLOAT) -> Any:
        """The net's output. `run` sees the site names of a block, the same in every block."""
        for group, stacked in zip(self.groups, params, strict=True):
            x = run_group(group, stacked, x, run)
        return x

    def suffix(self, params: Sequence[Params], g: int, i: Any, y: Any, run: Run = FLOAT) -> Any:
        """The net's output from y, that of block i (may be traced) of group g: y through all blocks after it."""
        group = self.groups[g]
        if group.n > 1:

            def body(y, at):
                j, p = at
                new = group.block(p, y, run)
                return jax.tree.map(lambda a, b: jnp.where(j > i, a, b), new, y), None

            y = jax.lax.scan(body, y, (jnp.arange(group.n), params[g]))[0]
        for later, stacked in zip(self.groups[g + 1 :], params[g + 1 :], strict=True):
            y = run_group(later, stacked, y, run)
        return y

    @property
    def names(self) -> tuple[str, ...]:
        """Of every block, e.g. "encoder.2"."""
        return tuple(
            g.name if g.n == 1 else f"{g.name}.{i}" for g in self.groups for i in range(g.n)
        )


def block_net(
    names: Sequence[str], make: Callable[[nnx.Rngs], Sequence[Sequence[nnx.Module]]]
) -> BlockNet:
    """The BlockNet of a function that makes modules: per name the blocks of one group.

    Raises:
      ValueError: two blocks of a group differ in structure.
    """
    made = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    groups = []
    for name, blocks in zip(names, made, strict=True):
        graphs = [Block(nnx.graphdef(b)) for b in blocks]
        if any(g != graphs[0] for g in graphs):
            raise ValueError(f"the blocks of group {name!r} differ; give each kind its own group")
        groups.append(Group(name, graphs[0], len(graphs)))
    return BlockNet(tuple(groups), make)


def run_group(group: Group, stacked: Params, x: Any, run: Run = FLOAT) -> Any:
    """x through the n blocks of a group; a scan where there are several."""
    if group.n == 1:
        return group.block(pick(stacked, 0), x, run)
    return jax.lax.scan(lambda x, params: (group.block(params, x, run), None), x, stacked)[0]


def blocks_of(net: BlockNet, params: Sequence[Params]) -> Iterator[tuple[str, Block, Params]]:
    """(name, block, its own params) of every block, in order: for a walk that is not scanned over groups."""
    names = iter(net.names)
    for group, stacked in zip(net.groups, params, strict=True):
        for i in range(group.n):
            yield next(names), group.block, jax.tree.map(lambda a, i=i: a[i], stacked)


def pick(stacked: Any, i) -> Any:
    """Entry i (may be traced) of every leaf."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, False), stacked)


def capture(
    block: Block, params: Params, x: Any, run: Run = FLOAT
) -> tuple[Any, dict[str, jax.Array]]:
    """(output, {site: its input, before `run` rounds it}) of a block; sites stand in the order in which they run."""
    seen: dict[str, jax.Array] = {}

    def note(site: str, x: jax.Array) -> jax.Array:
        if site in seen:
            raise ValueError(f"two sites of a block are called {site!r}; name them apart")
        seen[site] = x
        return x

    noted = Run(
        lambda site, layer, x: run.linear(site, layer, note(site, x)),
        lambda site, x: run.operand(site, note(site, x)),
        run.weight,
    )
    return block(params, x, noted), seen


class Site(NamedTuple):
    """A quantizable place. kind: "linear" (a weight product and its input), "operand" or "weight".

    shape: of its input for the samples given (of a "weight": its own). out, width: rows and columns of
    the weight, 0 for operands.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    out: int = 0
    width: int = 0


def sites(block: Block, params: Params, x: Any) -> tuple[Site, ...]:
    """The sites of a block, in order, without running it; params, x: arrays or shapes."""
    found: list[Site] = []

    def linear(site, layer, x):
        width, out = layer.kernel.shape
        found.append(Site(site, "linear", x.shape, out, width))
        return layer(x)

    def operand(site, x):
        found.append(Site(site, "operand", x.shape))
        return x

    def weight(site, w):
        found.append(Site(site, "weight", w.shape, *w.shape))
        return w

    jax.eval_shape(lambda p, x: block(p, x, Run(linear, operand, weight)), params, x)
    return tuple(found)


@partial(jax.jit, static_argnums=0)
def _init(net: BlockNet, key: jax.Array) -> tuple[Params, ...]:
    made = net.make(nnx.Rngs(params=key))
    trees = [[nnx.to_pure_dict(nnx.state(block)) for block in blocks] for blocks in made]
    return tuple(jax.tree.map(lambda *a: jnp.stack(a), *blocks) for blocks in trees)
