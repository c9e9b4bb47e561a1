"""Methods that quantize a net as a whole, not block after block, in a table with those that do: AdaDFQ and Q-VLM.

`whole_study` is `site_study` for them: the same cells, keys, calibration samples, metrics and test; a step is a cell. A
`Quantizer` first prepares itself (compiles, or runs once), so that the seconds of a cell count none of it.

Letters: C = cells, N = samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Phase
from qlab.nn.generator import GeneratorSize, generator
from qlab.nn.resnet import ResNetSize, resnet
from qlab.nn.sites import BlockNet, Params
from qlab.quantization.ada_dfq import DataFree, Fit
from qlab.quantization.blocks import QuantizedBlock, scan_quantized
from qlab.quantization.q_vlm import Options, quantize_vlm
from qlab.quantization.site_study import (
    TESTED,
    VARIED,
    Cell,
    check_draw,
    compare,
    divergence,
    drawn_samples,
    relative_error,
    storage,
    sub_keys,
)

BY_ROW = Options(group=2**20)  # a group wider than any row: one scale a row
# (params, x, w_bits, a_bits, key) -> a QuantizedBlock per group; x: calibration samples
Quantizer = Callable[..., tuple[QuantizedBlock, ...]]


class State(NamedTuple):
    """key: of the method. step: i32[], the cell at work. nets: {name: params}. x_cal: calibration samples.

    out: f32[C, TESTED]. counted: f32[C, 3], bytes, bits a weight, sites. wall_s: f32[C], seconds.
    """

    key: jax.Array
    step: jax.Array
    nets: Mapping[str, tuple[Params, ...]]
    x_cal: Any
    out: jax.Array
    counted: jax.Array
    wall_s: jax.Array


def whole_study(
    net: BlockNet,
    nets: Callable[[jax.Array], Mapping[str, tuple[Params, ...]]],
    pool: Any,
    test: tuple[Any, np.ndarray],
    cells: Sequence[Cell],
    prepare: Callable[[tuple[Params, ...], Any], Quantizer],
    *,
    num_calibration: int = 64,
    vary: Sequence[str] = VARIED,
    wide: Mapping[str, int] | None = None,
) -> Experiment[State]:
    """One arm of a comparison.

    Args:
      net, nets, pool, test, cells, num_calibration, vary, wide: as in `site_study`.
      prepare: (params, x) -> Quantizer, called once before anything is timed.
    Returns:
      An Experiment whose evaluate gives, for each cell, the metrics of `site_study` and seconds.
    """
    x_test, y_test = jax.tree.map(jnp.asarray, test)
    check_draw(pool, num_calibration)
    ready: list[Quantizer] = []

    def init(key: jax.Array) -> State:
        k_net, k_draw, k_method = sub_keys(key, vary)
        x = drawn_samples(pool, jax.random.fold_in(k_draw, 0), num_calibration)
        key, first = jax.random.fold_in(k_method, 0), jnp.int32(0)
        out, counted = (jnp.zeros((len(cells), n)) for n in (len(TESTED), 3))
        return State(key, first, nets(k_net), x, out, counted, jnp.zeros(len(cells)))

    def step(state: State) -> tuple[State, dict[str, Any]]:
        c = int(state.step)
        cell, params = cells[c], state.nets[cells[c].net]
        if not ready:
            ready.append(prepare(params, state.x_cal))
        begun = time.perf_counter()
        key = jax.random.fold_in(state.key, c)
        blocks = jax.block_until_ready(ready[0](params, state.x_cal, cell.w_bits, cell.a_bits, key))
        seconds = time.perf_counter() - begun
        found = _judged(net, blocks, params, state.x_cal, x_test, y_test)
        held = storage(blocks, cell.w_bits, wide)
        sites = sum(
            g.n * (len(q.weights) + len(q.acts)) for g, q in zip(net.groups, blocks, strict=True)
        )
        state = state._replace(
            step=state.step + 1,
            out=state.out.at[c].set(jnp.stack([jnp.asarray(found[m]) for m in TESTED])),
            counted=state.counted.at[c].set(
                jnp.array([held["bytes"], held["stored_bits"], float(sites)])
            ),
            wall_s=state.wall_s.at[c].set(seconds),
        )
        return state, {"error": found["error"]}

    def evaluate(state: State) -> dict[str, jax.Array]:
        values = {}
        for c, cell in enumerate(cells):
            row = {m: state.out[c, i] for i, m in enumerate(TESTED)}
            row |= dict(zip(("bytes", "stored_bits", "sites_total"), state.counted[c], strict=True))
            row["seconds"] = state.wall_s[c]
            values |= {f"{cell.name}/{m}": v for m, v in row.items()}
        return values

    return Experiment(
        init, evaluate, (Phase("cells", len(cells), step, "host"),), seed_layout="map"
    )


@partial(jax.jit, static_argnums=0)
def _judged(net: BlockNet, blocks, params, x_cal, x_test, y_test) -> dict[str, jax.Array]:
    def logits(x):
        for group, q in zip(net.groups, blocks, strict=True):
            x = scan_quantized(group, q, x)
        return x

    want, got = net.apply(params, x_cal), logits(x_cal)
    return compare(logits(x_test), net.apply(params, x_test), y_test) | {
        "kl_calibration": divergence(want, got),
        "error": relative_error(got, want),
        "fallbacks": jnp.zeros(()),
    }


def data_free_net(
    widths: Sequence[Any],
    shape: Sequence[int],
    *,
    wide: tuple[tuple[str, int], ...] = (),
    gen_widths: Sequence[int] = (32, 16),
    pixel_mean: Sequence[float] = (0.0,),
    pixel_std: Sequence[float] = (1.0,),
    **fit: Any,
) -> DataFree:
    """AdaDFQ's trainer for a ResNet of `widths` on images of a shape (H, W, C); rates do not fall. fit: of `Fit`."""
    size = ResNetSize(*widths)
    made = generator(
        GeneratorSize(shape[0], shape[2], size.classes, widths=(gen_widths[0], gen_widths[1]))
    )
    how = Fit(drops=(), mean=tuple(pixel_mean), std=tuple(pixel_std), wide=wide, **fit)
    return DataFree(resnet(size), made, how)


def ada_dfq_quantizer(dfq: DataFree) -> Callable[[tuple[Params, ...], Any], Quantizer]:
    """AdaDFQ of a net with batch norms; the calibration samples are not looked at."""

    def train(params, w_bits, a_bits, key):
        state = dfq.init(key, params, w_bits=w_bits, a_bits=a_bits)
        return dfq.blocks(dfq.epoch(state, dfq.fit.num_steps)[0])

    def prepare(params: tuple[Params, ...], x: Any) -> Quantizer:
        del x
        bits = jnp.float32(4)
        program = jax.jit(train).lower(params, bits, bits, jax.random.key(0)).compile()

        def quantize(params, x, w_bits, a_bits, key):
            del x
            return program(params, jnp.float32(w_bits), jnp.float32(a_bits), key)

        return quantize

    return prepare


def q_vlm_quantizer(
    net: BlockNet, options: Options = BY_ROW
) -> Callable[[tuple[Params, ...], Any], Quantizer]:
    """Q-VLM of a vision-language model or a decoder; one weight scale a row, as the table's other arms have it.

    Its ranges are as it defines them, one per token row or per channel: finer than one per tensor.
    """

    def quantize(params, x, w_bits, a_bits, key):
        made = quantize_vlm(net, params, x, w_bits=w_bits, a_bits=a_bits, options=options, key=key)
        return made.blocks

    def prepare(params: tuple[Params, ...], x: Any) -> Quantizer:
        quantize(params, x, 4, 4, jax.random.key(0))  # its programs are compiled where they run
        return quantize

    return prepare
