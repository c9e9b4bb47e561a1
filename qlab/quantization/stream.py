"""A net quantized block by block on batches of calibration samples: memory does not grow with their number.

    done = quantize_stream(net, params, batches, minmax(), gptq_fold(), w_bits=4, a_bits=8)
    y = run_blocks(net, done.blocks, x)

`quantize_net` keeps all samples' activations of a block at once. Here each batch is folded into a state of fixed size,
a range or histogram for an activation (any Observer), a Hessian for a weight, in one pass over the batches each;
passes follow the order in which the sites run, so that every site sees what the quantized sites before it give.
What one block hands to the next stays batch by batch on the host, beyond `cache_bytes` in files of a temporary folder.

A pass repeats the block up to its site: some two passes a weight, against one over all samples in
`quantize_net`. Learned rounding draws minibatches again and again and is no fold: see `learn_block`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.nn.sites import Block, BlockNet, Params, Run, Site, capture, pick, sites
from qlab.quantization.activations import affine
from qlab.quantization.blocks import QuantizedBlock, Target, fake_run, weight_grid
from qlab.quantization.gptq import fp_target, hessian_init, hessian_update
from qlab.quantization.grid import Grid, nearest_qtensor
from qlab.quantization.methods import gptq_codes
from qlab.quantization.observers import Observer
from qlab.quantization.qtensor import QTensor
from qlab.quantization.quantize_net import QuantizedNet, check_net, check_widths


class WeightFold(NamedTuple):
    """What a weight gathers over batches, and what is made of it.

    Attributes:
      grid: (w f32[out, in], bits) -> Grid. init: in -> state. update: (state, x_q, x_fp f32[..., in]) -> state; None:
        the weight needs no inputs. made: (w, grid, state) -> (QTensor, fallbacks f32[]).
    """

    grid: Callable[[jax.Array, Any], Grid]
    init: Callable[[int], Any]
    update: Callable[..., Any] | None
    made: Callable[..., tuple[QTensor, jax.Array]]


def nearest_fold(*, granularity: str = "channel", max_bits: int = 8, **options) -> WeightFold:
    """Rounding to nearest; options: of grid.calibrate ("shares")."""
    grid = partial(weight_grid, granularity=granularity, max_bits=max_bits, options=options)
    return WeightFold(
        grid, lambda width: (), None, lambda w, grid, _: (nearest_qtensor(w, grid), jnp.zeros(()))
    )


def gptq_fold(
    *,
    granularity: str = "channel",
    target: Target = "fp",
    damp: float = 0.01,
    act_order: bool = True,
    max_bits: int = 8,
    **options,
) -> WeightFold:
    """GPTQ, as `gptq_weight`: its state is E[x_q x_q^T] and, for the target "fp", E[x_fp x_q^T]."""

    def update(state, x_q, x_fp):
        h, c = state
        x_q, x_fp = (x.reshape(-1, x.shape[-1]) for x in (x_q, x_fp))
        return hessian_update(h, x_q), hessian_update(c, x_q, left=x_fp) if target == "fp" else c

    def made(w, grid, state):
        h, c = (s.mean for s in state)
        goal = fp_target(w, c, h, damp) if target == "fp" else w
        return gptq_codes(w, goal, h, grid, damp=damp, act_order=act_order)

    grid = partial(weight_grid, granularity=granularity, max_bits=max_bits, options=options)
    return WeightFold(grid, lambda width: (hessian_init(width), hessian_init(width)), update, made)


class Cache:
    """Trees of arrays by number, in host memory up to a number of bytes and beyond it in files of `folder`."""

    def __init__(self, cap: int | None, folder: Path):
        self._cap, self._folder, self._written = cap, folder, 0
        self._trees: list[Any] = []
        self._sizes: list[int] = []  # bytes in memory; 0: in files

    def __len__(self) -> int:
        return len(self._trees)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._trees)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(self._sizes)

    def put(self, i: int, tree: Any) -> None:
        """Sets entry i, or appends it."""
        tree = jax.tree.map(np.asarray, tree)
        if i == len(self._trees):
            self._trees.append(None)
            self._sizes.append(0)
        self._trees[i], self._sizes[i] = None, 0
        size = sum(a.nbytes for a in jax.tree.leaves(tree))
        if self._cap is None or self.nbytes + size <= self._cap:
            self._sizes[i] = size
        else:
            tree = jax.tree.map(self._filed, tree)
        self._trees[i] = tree

    def _filed(self, a: np.ndarray) -> np.ndarray:
        path = self._folder / f"{self._written}.npy"
        self._written += 1
        np.save(path, a)
        mapped = np.load(path, mmap_mode="r")
        path.unlink()  # the disk's space is free as soon as nobody reads the mapping
        return mapped


def quantize_stream(
    net: BlockNet,
    params: Iterable[Params],
    batches: Iterable[Any],
    act: Observer | None,
    weight: WeightFold,
    *,
    w_bits: int,
    a_bits: int,
    cache_bytes: int | None = None,
) -> QuantizedNet:
    """Every block quantized on what the quantized and the float blocks before it give for the batches.

    Args:
      batches: inputs of the net, best of one size: each other size compiles again. Read once.
      act: gives (lo, hi) of an activation, for one affine grid per tensor; None: activations stay float.
      weight: of all products; weights used otherwise are rounded to nearest on its grid.
      w_bits, a_bits: 2 to 8. cache_bytes: of activations in host memory between blocks (the quantized and the float net's
        together), None: all of them.
    Returns:
      The same numbers as `quantize_net` on all batches joined, up to the rounding of sums.
    Raises:
      UserError: a width that is not one of 2 to 8; no batch; an empty batch or one that is not finite.
    """
    check_widths(w_bits, a_bits)
    params = tuple(params)
    made, failed = [], jnp.zeros(())
    # A half each, so that neither net's activations crowd out the other's.
    cap = None if cache_bytes is None else cache_bytes // 2
    with tempfile.TemporaryDirectory(prefix="qlab-stream-") as folder:
        x_q, x_fp = Cache(cap, Path(folder, "q")), Cache(cap, Path(folder, "fp"))
        for cache in (Path(folder, "q"), Path(folder, "fp")):
            cache.mkdir()
        seen = set()
        for i, x in enumerate(batches):
            for leaf in jax.tree.leaves(x):
                if not np.size(leaf) or not bool(np.isfinite(leaf).all()):
                    raise UserError(f"calibration batch {i} is empty or not finite; leave it out")
            form = str(jax.tree.map(np.shape, x))
            if form not in seen:
                check_net(net, params, x)
                seen.add(form)
            x_q.put(i, x)
            x_fp.put(i, x)
        if not len(x_q):
            raise UserError("calibration holds no batch; pass a few of real samples")
        for group, stacked in zip(net.groups, params, strict=True):
            blocks = []
            for i in range(group.n):
                own = pick(stacked, i)
                q, fallbacks = _block(group.block, own, x_q, x_fp, act, weight, w_bits, a_bits)
                for n, (a, b) in enumerate(zip(x_q, x_fp, strict=True)):
                    y_q, y_fp = _outputs(group.block, own, q, a, b)
                    x_q.put(n, y_q)
                    x_fp.put(n, y_fp)
                blocks.append(q)
                failed = failed + fallbacks
            made.append(jax.tree.map(lambda *a: jnp.stack(a), *blocks))
    return QuantizedNet(tuple(made), failed)


def _block(
    block: Block, params: Params, x_q: Cache, x_fp: Cache, act, weight: WeightFold, w_bits, a_bits
) -> tuple[QuantizedBlock, jax.Array]:
    first = next(iter(x_q))
    q, failed = QuantizedBlock(params, {}, {}), jnp.zeros(())
    for site in sites(block, params, first):
        if site.kind != "weight" and act is not None:
            state = act.init(site.shape[-1])
            for x in x_q:
                state = _fold_act(block, site.name, act, q, state, x)
            q.acts[site.name] = _record(act, state, a_bits)
        if site.kind == "operand":
            continue
        state = ()
        if site.kind == "linear" and weight.update is not None:
            state = weight.init(site.width)
            for a, b in zip(x_q, x_fp, strict=True):
                state = _fold_weight(block, site.name, weight, q, state, a, b)
        made = _made(block, site, weight, params, first, jnp.float32(w_bits), state)
        q.weights[site.name], fallbacks = made
        failed = failed + fallbacks
    return q, failed


def _input(block: Block, site: str, q: QuantizedBlock, x: Any) -> jax.Array:
    """The input of a site behind the sites quantized so far, on its own grid if that is known; the rest is not run."""
    run = fake_run(q)
    return run.operand(site, capture(block, q.params, x, run)[1][site])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _fold_act(block: Block, site: str, act: Observer, q: QuantizedBlock, state, x):
    return act.update(state, _input(block, site, q, x))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _fold_weight(block: Block, site: str, weight: WeightFold, q: QuantizedBlock, state, x_q, x_fp):
    assert weight.update is not None
    x_float = capture(block, q.params, x_fp)[1][site]
    return weight.update(state, _input(block, site, q, x_q), x_float)


@partial(jax.jit, static_argnums=(0, 2))
def _record(act: Observer, state, bits: int):
    lo, hi = act.finalize(state)
    return affine(lo, hi, bits)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _made(block: Block, site: Site, weight: WeightFold, params: Params, x, bits, state):
    w = _weights(block, params, x)[site.name]
    grid = weight.grid(w, bits)
    if site.kind == "weight":
        return nearest_qtensor(w, grid), jnp.zeros(())
    return weight.made(w, grid, state)


def _weights(block: Block, params: Params, x) -> dict[str, jax.Array]:
    """{site: f32[out, in]}, whatever the layers call their kernels."""
    found: dict[str, jax.Array] = {}

    def linear(site, layer, x):
        found[site] = jnp.asarray(layer.kernel[...]).T
        return layer(x)

    def weight(site, w):
        found[site] = w
        return w

    block(params, x, Run(linear, lambda site, x: x, weight))
    return found


@partial(jax.jit, static_argnums=0)
def _outputs(block: Block, params: Params, q: QuantizedBlock, x_q, x_fp):
    return block(q.params, x_q, fake_run(q)), block(params, x_fp)
