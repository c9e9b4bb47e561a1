"""Small residual nets with batch norm (He et al., arXiv 1512.03385), with named sites: ResNet-8 for 16 x 16 images.

Convolutions are patches times the kernel of an nnx.Linear, so that every product goes through `run` (and because
that is several times faster inside lax.scan on a CPU). One family gives two nets with the same groups of blocks:
- `net`, with batch norms that use running statistics. The input of norm "conv1_bn" passes the operand site of that
  name, so `capture` shows it, and `learn` trains through the same program;
- `folded`, the norms folded into kernels and biases by `fold`: what is quantized.

Sites of a block: products stem; conv1, conv2, short; head. Operands: mid and out, behind the ReLUs (the last block's
out is called features).
Letters: N = samples, H, W, C = height, width, channels, n = blocks of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.chain import patches
from qlab.nn.sites import FLOAT, BlockNet, Params, Run, block_net

EPS = 1e-5
NORM = "_bn"  # the norm behind product "conv1" is called "conv1_bn"
HE_NORMAL = nnx.initializers.he_normal()


class BatchNorm(nnx.Module):
    """Normalises each channel of f32[..., C] with running statistics, in training too (see `learn`)."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, u: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPS)
        return (u - self.mean[...]) * factor + self.bias[...]


class _Convolutions(nnx.Module):
    """Products with a norm each, or with a bias instead where the norms are folded."""

    def add(self, name: str, width_in: int, width: int, folded: bool, rngs: nnx.Rngs) -> None:
        linear = nnx.Linear(
            width_in, width, use_bias=folded, kernel_init=HE_NORMAL, bias_init=nnx.initializers.zeros,
            rngs=rngs,
        )  # fmt: skip
        setattr(self, name, linear)
        if not folded:
            setattr(self, name + NORM, BatchNorm(width))

    def conv(self, name: str, x: jax.Array, run: Run) -> jax.Array:
        y = run.linear(name, getattr(self, name), x)
        norm = getattr(self, name + NORM, None)
        return y if norm is None else norm(run.operand(name + NORM, y))


class Stem(_Convolutions):
    """A 3 x 3 convolution and ReLU; f32[N, H, W, C] -> f32[N, H, W, width]."""

    def __init__(self, channels: int, width: int, *, folded: bool, rngs: nnx.Rngs):
        self.add("stem", 9 * channels, width, folded, rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        return run.operand("out", jax.nn.relu(self.conv("stem", patches(x), run)))


class Residual(_Convolutions):
    """relu(conv2(relu(conv1 x)) + short(x)), 3 x 3 each; short: 1 x 1 where the shape changes, else the identity."""

    def __init__(
        self, width_in: int, width: int, stride: int, out: str, *, folded: bool, rngs: nnx.Rngs
    ):
        self.stride, self.out = stride, out
        self.changes = stride > 1 or width != width_in
        self.add("conv1", 9 * width_in, width, folded, rngs)
        self.add("conv2", 9 * width, width, folded, rngs)
        if self.changes:
            self.add("short", width_in, width, folded, rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        h = jax.nn.relu(self.conv("conv1", patches(x, 3, self.stride), run))
        h = self.conv("conv2", patches(run.operand("mid", h)), run)
        if self.changes:
            x = self.conv("short", patches(x, 1, self.stride), run)
        return run.operand(self.out, jax.nn.relu(h + x))


class Head(nnx.Module):
    """Mean over positions and a linear classifier; f32[N, H, W, C] -> f32[N, classes]."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        return run.linear("head", self.head, x.mean((1, 2)))


class ResNetSize(NamedTuple):
    """Hyper-parameters. widths: per stage, which all but the first begin with stride 2. depth: blocks of a stage."""

    channels: int = 1
    widths: tuple[int, ...] = (8, 16, 32)
    depth: int = 1  # 1: ResNet-8, 3: ResNet-20
    classes: int = 10


class ResNet(NamedTuple):
    """The family: params are those of `net`; `fold` makes those of `folded`, the same function.

    Attributes:
      net: with norms in evaluation mode. folded: without.
    """

    net: BlockNet
    folded: BlockNet

    def init(self, key: jax.Array) -> tuple[Params, ...]:
        return self.net.init(key)

    def apply(self, params: Sequence[Params], x: jax.Array) -> jax.Array:
        """f32[N, classes] from f32[N, H, W, C]."""
        return self.net.apply(params, x)

    def learn(
        self, params: Sequence[Params], x: jax.Array, momentum: float = 0.9
    ) -> tuple[jax.Array, Any]:
        """(logits with the batch's own statistics, the running ones moved on: momentum * old + the rest)."""
        stats = []
        for group, stacked in zip(self.net.groups, params, strict=True):
            seen = []
            for i in range(group.n):
                p = jax.tree.map(lambda a, i=i: a[i], stacked)
                seen.append({})
                x = group.block(p, x, _training(p, seen[-1], momentum))
            stats.append(jax.tree.map(lambda *a: jnp.stack(a), *seen))
        return x, tuple(stats)

    def keep(self, params: Sequence[Params], stats: Any) -> tuple[Params, ...]:
        """params with the running statistics that `learn` gave."""
        return tuple(
            {name: {**v, **s.get(name, {})} for name, v in p.items()}
            for p, s in zip(params, stats, strict=True)
        )

    def fold(self, params: Sequence[Params]) -> tuple[Params, ...]:
        """The params of `folded`: kernels times scale / sqrt(var + eps), and biases."""
        return tuple(map(_folded, params))


def norms(params: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{name: running (mean, var), f32[..., C]} of the batch norms of a block, or of a group's stacked blocks."""
    return {name: (v["mean"], v["var"]) for name, v in params.items() if name.endswith(NORM)}


def _training(params: Params, stats: dict[str, Params], momentum: float) -> Run:
    """The run in which each norm's input is given running statistics in the place of the batch's own.

    The norm, which uses running ones, then puts out what a norm in training would. `stats` takes the moved ones.
    """
    running = norms(params)

    def operand(site: str, u: jax.Array) -> jax.Array:
        if site not in running:
            return u
        axes = tuple(range(u.ndim - 1))
        mean, var = u.mean(axes), u.var(axes)
        count = u.size // u.shape[-1]
        old_mean, old_var = running[site]
        stats[site] = {
            "mean": momentum * old_mean + (1 - momentum) * mean,
            "var": momentum * old_var + (1 - momentum) * var * (count / (count - 1)),
        }
        return (u - mean) * jnp.sqrt((old_var + EPS) / (var + EPS)) + old_mean

    return FLOAT._replace(operand=operand)


def _folded(params: Params) -> Params:
    out = {}
    for name, value in params.items():
        norm = params.get(name + NORM)
        if norm is not None:
            factor = norm["scale"] * jax.lax.rsqrt(norm["var"] + EPS)
            kernel = value["kernel"] * factor[..., None, :]
            out[name] = {"kernel": kernel, "bias": norm["bias"] - norm["mean"] * factor}
        elif not name.endswith(NORM):
            out[name] = value
    return out


def resnet(s: ResNetSize = ResNetSize()) -> ResNet:  # noqa: B008 (a constant tuple)
    """The family of a size; blocks that are alike and neighbours form a group.

    Raises:
      ValueError: no stage, or a stage without blocks.

    >>> family = resnet(ResNetSize(widths=(4, 8)))
    >>> family.folded.names
    ('stem', 'block1', 'block2', 'head')
    >>> x, params = jnp.ones((2, 16, 16, 1)), family.init(jax.random.key(0))
    >>> same = jnp.allclose(family.apply(params, x), family.folded.apply(family.fold(params), x), atol=1e-5)
    >>> family.apply(params, x).shape, bool(same)
    ((2, 10), True)
    """
    if not s.widths or s.depth < 1:
        raise ValueError(f"widths={s.widths}, depth={s.depth}: at least one of each is needed")
    specs = []
    for stage, width in enumerate(s.widths):
        for block in range(s.depth):
            first = stage > 0 and block == 0
            specs.append((s.widths[stage - 1] if first else width, width, 2 if first else 1, "out"))
    specs[-1] = (*specs[-1][:3], "features")
    groups = [(spec, len(list(same))) for spec, same in itertools.groupby(specs)]
    starts = itertools.accumulate((n for _, n in groups), initial=1)
    names = ("stem", *(f"block{i}" for _, i in zip(groups, starts, strict=False)), "head")

    def family(folded: bool) -> BlockNet:
        def make(rngs: nnx.Rngs):
            return [
                [Stem(s.channels, s.widths[0], folded=folded, rngs=rngs)],
                *(
                    [Residual(*spec, folded=folded, rngs=rngs) for _ in range(n)]
                    for spec, n in groups
                ),
                [Head(s.widths[-1], s.classes, rngs=rngs)],
            ]

        return block_net(names, make)

    return ResNet(family(False), family(True))
