"""A whole net of your own, quantized block by block: what the studies do, without a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.nn.sites import Block, BlockNet, Params, capture, pick
from qlab.quantization.activations import fake
from qlab.quantization.blocks import QuantizedBlock, SiteInput, WeightMethod, around_block, fake_run


class QuantizedNet(NamedTuple):
    """blocks: a QuantizedBlock per group, for `run_blocks`. fallbacks: sites that fell back to a simpler method."""

    blocks: tuple[QuantizedBlock, ...]
    fallbacks: jax.Array


def quantize_net(
    net: BlockNet,
    params: Sequence[Params],
    x: Any,
    method: Callable[..., tuple[QuantizedBlock, jax.Array]],
    *,
    w_bits: int,
    a_bits: int,
    key: jax.Array | None = None,
    around: bool = False,
    beside: Sequence[Any] | None = None,
) -> QuantizedNet:
    """Every block quantized on what the quantized and the float blocks before it give for x.

    Args:
      x: calibration inputs. method: (block, params, x_q, x_fp, w_bits, a_bits, key) -> (QuantizedBlock,
        fallbacks), as `site_study` takes it. w_bits, a_bits: 2 to 8. key: None: key(0).
      around: the method takes an Around as its last argument. beside: what that is to hold, per group, the n blocks
        first.
    """
    check_widths(w_bits, a_bits)
    for leaf in jax.tree.leaves(x):
        if not jnp.size(leaf) or not bool(jnp.isfinite(leaf).all()):
            raise UserError("calibration inputs are empty or not finite; pass a few real samples")
    check_net(net, params, x)
    key = jax.random.key(0) if key is None else key
    params = tuple(params)
    x_q, x_fp, made, failed = x, x, [], jnp.zeros(())
    bits = jnp.float32(w_bits), jnp.float32(a_bits)
    for g, group in enumerate(net.groups):
        blocks = []
        for i in range(group.n):
            k = jax.random.fold_in(jax.random.fold_in(key, g), i)
            if around:
                side = None if beside is None else pick(beside[g], i)
                done = _quantize_in(method, net, g, params, jnp.int32(i), x_q, x_fp, *bits, k, side)
            else:
                done = _quantize(method, group.block, pick(params[g], i), x_q, x_fp, *bits, k)
            q, x_q, x_fp, fallbacks = done
            blocks.append(q)
            failed = failed + fallbacks
        made.append(jax.tree.map(lambda *a: jnp.stack(a), *blocks))
    return QuantizedNet(tuple(made), failed)


def redo_site(
    done: QuantizedNet,
    net: BlockNet,
    params: Sequence[Params],
    x: Any,
    where: str,
    weight: WeightMethod,
    *,
    w_bits: int,
    key: jax.Array | None = None,
) -> QuantizedNet:
    """The net with the weight of one site rounded anew (by GPTQ with other damping, say); all others stay as they are.

        again = redo_site(done, net, params, x, "encoder.2/fc1", gptq_weight(damp=0.1), w_bits=4)

    What lies behind the site was rounded on its old codes; redo those sites as well where that matters.

    Args:
      done: of `quantize_net` on x, whose `params` and `key` are given again. where: block and site. weight: see
        `SiteInput`.
    Raises:
      UserError: no such block or site.
    """
    check_widths(w_bits, 8)
    name, _, site = where.rpartition("/")
    if name not in net.names:
        raise UserError(f"no block is called {name!r}{nearest(name, net.names)}")
    x_q, x_fp = x, x
    key = jax.random.key(0) if key is None else key
    for g, group in enumerate(net.groups):
        for i in range(group.n):
            q, own = pick(done.blocks[g], i), pick(tuple(params)[g], i)
            if net.names[sum(a.n for a in net.groups[:g]) + i] != name:
                x_q, x_fp = group.block(q.params, x_q, fake_run(q)), group.block(own, x_fp)
                continue
            if site not in q.weights:
                raise UserError(
                    f"{name} has no quantized weight {site!r}{nearest(site, tuple(q.weights))}"
                )
            _, seen = capture(group.block, q.params, x_q, fake_run(q))
            _, seen_fp = capture(group.block, own, x_fp)
            at = fake(q.acts[site], seen[site]) if site in q.acts else seen[site]
            k = jax.random.fold_in(jax.random.fold_in(key, g), i)
            k = jax.random.fold_in(k, 2 * list(seen_fp).index(site) + 1)
            w = q.params[site]["kernel"].T
            made = weight(SiteInput(site, at, seen_fp[site], w, jnp.float32(w_bits), k))
            assert made is not None  # a method of weights
            stacked = done.blocks[g]
            put = partial(jax.tree.map, lambda a, v: a.at[i].set(v))
            weights = {**stacked.weights, site: put(stacked.weights[site], made[0])}
            blocks = list(done.blocks)
            blocks[g] = stacked._replace(weights=weights)
            return QuantizedNet(tuple(blocks), done.fallbacks + made[1])
    raise AssertionError(name)


def check_net(net: BlockNet, params: Sequence[Params], x: Any) -> None:
    """Raises UserError unless the params are finite and the net takes inputs of this shape."""
    for group, stacked in zip(net.groups, params, strict=True):
        for path, leaf in jax.tree_util.tree_flatten_with_path(stacked)[0]:
            if not bool(jnp.isfinite(leaf).all()):
                where = group.name + jax.tree_util.keystr(path)
                raise UserError(
                    f"{where} holds NaN or infinity; remove them from the weights first"
                )
    try:
        jax.eval_shape(net.apply, tuple(params), x)
    except (TypeError, ValueError) as e:
        shapes = ", ".join(str(jnp.shape(a)) for a in jax.tree.leaves(x))
        raise UserError(
            f"the net does not take calibration inputs of shape {shapes}: {str(e).splitlines()[0]}"
        ) from e


def check_widths(w_bits: int, a_bits: int) -> None:
    """Raises UserError unless both are whole numbers from 2 to 8."""
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UserError(f"{name}={bits!r}; a width from 2 to 8 is expected")


@partial(jax.jit, static_argnums=(0, 1))
def _quantize(method, block: Block, params: Params, x_q, x_fp, w_bits, a_bits, key):
    """One block, and its outputs on either input; the same method on other widths compiles nothing new."""
    q, fallbacks = method(block, params, x_q, x_fp, w_bits, a_bits, key)
    return q, block(q.params, x_q, fake_run(q)), block(params, x_fp), fallbacks


@partial(jax.jit, static_argnums=(0, 1, 2))
def _quantize_in(method, net: BlockNet, g: int, params, i, x_q, x_fp, w_bits, a_bits, key, side):
    """The same for a method that looks at the net around block i of group g."""
    own, near = pick(params[g], i), around_block(net, params, g, i, side)
    block = net.groups[g].block
    q, fallbacks = method(block, own, x_q, x_fp, w_bits, a_bits, key, near)
    return q, block(q.params, x_q, fake_run(q)), block(own, x_fp), fallbacks
