"""What batch norms remember of the training data: a loss on it, and inputs corrected by it.

The loss is shared by PD-Quant's distribution correction (Liu et al., CVPR 2023, arXiv 2212.07048, section 3.4: statistics
of each sample, standard deviations, summed) and by data-free quantization (statistics of the batch, variances, averaged).

Letters: N = samples, H, W, C = height, width, channels, n = blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from qlab.nn.resnet import norms
from qlab.nn.sites import Block, BlockNet, Params, blocks_of, capture
from qlab.quantization.methods import squared_error

EPS = 1e-6  # under both roots of a standard deviation
Stats = Mapping[str, tuple[jax.Array, jax.Array]]


def bn_stat_loss(
    bn_inputs: Mapping[str, jax.Array],
    running: Stats,
    *,
    per_sample: bool = True,
    spread: Literal["std", "var"] = "std",
) -> jax.Array:
    """f32[]: how far the inputs of batch norms are from what the norms remember; 0 without norms.

    Args:
      bn_inputs: {norm: f32[N, H, W, C]}. running: {norm: (mean f32[C], var f32[C])}.
      per_sample: means and unbiased variances over the positions of each sample; squared distances summed over
        samples and channels, over N, summed over norms (PD-Quant). False: over samples and positions, biased; squared
        distances averaged over channels and norms (GDFQ, AdaDFQ).
      spread: compares sqrt(var + 1e-6) or var.

    >>> u = jnp.array([0.0, 2.0]).reshape(1, 2, 1, 1)
    >>> float(bn_stat_loss({"a": u}, {"a": (jnp.array([1.0]), jnp.array([2.0]))}))
    0.0
    """
    axes = (1, 2) if per_sample else (0, 1, 2)

    def distance(u, mean, var):
        m, v = u.mean(axes), u.var(axes, ddof=int(per_sample))
        if spread == "std":
            v, var = jnp.sqrt(v + EPS), jnp.sqrt(var + EPS)
        gap = (m - mean) ** 2 + (v - var) ** 2
        return gap.sum() / len(u) if per_sample else gap.mean()

    parts = [distance(bn_inputs[name], *stats) for name, stats in running.items()]
    total = sum(parts, jnp.zeros(()))
    return total if per_sample else total / max(len(parts), 1)


def bn_inputs(block: Block, params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """{norm: its input f32[N, H, W, C]} in a block of `qlab.nn.resnet` with norms."""
    seen = capture(block, params, x)[1]
    return {name: seen[name] for name in norms(params)}


def net_bn_inputs(
    net: BlockNet, params: Sequence[Params], x: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """(logits, {"block1/conv1_bn": its input f32[N, H, W, C]}, {the same: running (mean, var)}) of a whole net."""
    seen, running = {}, {}
    for name, block, p in blocks_of(net, params):
        x, here = capture(block, p, x)
        for norm, stats in norms(p).items():
            seen[f"{name}/{norm}"], running[f"{name}/{norm}"] = here[norm], stats
    return x, seen, running


def distribution_correct(
    inputs: Callable[[jax.Array], Mapping[str, jax.Array]],
    running: Stats,
    x: jax.Array,
    lamb_c: float,
    n: int,
    lr: float = 1e-3,
    *,
    patience: int = 100,
    least_lr: float = 1e-5,
) -> jax.Array:
    """x' near x whose statistics in each sample are nearer to what the norms remember; like x (eq. 8).

    Minimises bn_stat_loss + mean_(N, H, W) |x' - x|^2 / lamb_c from x' = x by n steps of Adam; the rate falls tenfold
    after `patience` steps without progress. All samples are one batch: Adam makes the steps free of the scale.

    Args:
      inputs: x -> {norm: its input}, the norms in evaluation mode. lamb_c: a divisor: smaller holds x' faster.
    """
    # torch counts steps beyond `patience`, optax up to it
    plateau = optax.contrib.reduce_on_plateau(patience=patience + 1, min_scale=least_lr / lr)
    optimizer = optax.chain(optax.adam(lr), plateau)

    def loss(new):
        return bn_stat_loss(inputs(new), running) + squared_error(new, x) / lamb_c

    def body(carry, _):
        new, state = carry
        value, grad = jax.value_and_grad(loss)(new)
        updates, state = optimizer.update(grad, state, new, value=value)
        return (optax.apply_updates(new, updates), state), None

    last: Any = jax.lax.scan(body, (x, optimizer.init(x)), None, length=n)[0]
    return last[0]


@partial(jax.jit, static_argnums=0, static_argnames=("lamb_c", "n", "lr"))
def correct_inputs(
    net: BlockNet,
    params: Sequence[Params],
    x: jax.Array,
    *,
    lamb_c: float,
    n: int,
    lr: float = 1e-3,
) -> tuple[jax.Array, ...]:
    """Per group f32[n, N, ...]: the corrected input of each of its blocks; of blocks without norms, the input itself.

    Args:
      net, params: with norms (`ResNet.net`). x: f32[N, H, W, C], inputs of the net.
    """
    out = []
    for group, stacked in zip(net.groups, params, strict=True):

        def body(x, p, block=group.block):
            running = norms(p)
            new = x
            if running:
                inputs = partial(bn_inputs, block, p)
                new = distribution_correct(inputs, running, x, lamb_c, n, lr)
            return block(p, x), new

        if group.n == 1:  # its output may have another shape than its input
            x, new = body(x, jax.tree.map(lambda a: a[0], stacked))
            out.append(new[None])
        else:
            x, new = jax.lax.scan(body, x, stacked)
            out.append(new)
    return tuple(out)
