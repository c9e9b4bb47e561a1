"""Q-VLM and its baselines on a small vision-language model as an Experiment: a step is a cell (a weight and an input width).

What a seed varies, each with a sub-key of its own (fold_in 0, 1, 2 of the seed's key): the trained net, the calibration
pictures, the method (which only a shuffled partition uses). Steps run on the host: which layers form a block depends on
data; what is heavy is compiled, with widths and partitions as data, so that all arms and cells share the programs.

Letters: C = cells, L = layers of the decoder, N = pictures, R = questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Metric, Phase
from qlab.nn.sites import BlockNet, Params
from qlab.quantization.blocks import scan_quantized
from qlab.quantization.encoder_ranges import front, front_ranges
from qlab.quantization.language_layers import (
    decoder_at,
    dependency_proxies,
    float_pass,
    num_layers,
    start_state,
)
from qlab.quantization.norm_links import Fit, norm_transform
from qlab.quantization.q_vlm import Options, pair_gaps, quantize_vlm
from qlab.quantization.site_study import check_draw, compare, drawn_samples
from qlab.quantization.vlm_weights import PRODUCTS, memory_report, round_weights, with_weights

METRICS = {
    "accuracy": Metric("%", "higher", "test answers of the quantized net that are right"),
    "fp_accuracy": Metric("%", "none", "test answers of the float net that are right"),
    "flips": Metric("%", "lower", "test answers that differ from the float net's"),
    "kl": Metric("nat", "lower", "test mean of KL(float net || quantized net) over the words"),
    "mse": Metric("", "lower", "test mean squared error of the logits to the float net's"),
    "mse_calibration": Metric("", "lower", "the same on the calibration pictures"),
    "evaluations": Metric("", "lower", "candidate blocks run by the search, encoder steps included"),
    "layer_forwards": Metric("", "lower", "decoder layers run by the search"),
    "num_blocks": Metric("", "none", "blocks of the decoder's layers"),
    "sites_total": Metric("", "none", "quantized weights and inputs"),
    "bytes": Metric("B", "lower", "packed weights, scales, grids of inputs, and what stays in bf16"),
    "float_bytes": Metric("B", "none", "all parameters in bf16"),
    "memory_ratio": Metric("", "higher", "float_bytes over bytes"),
    "stored_bits": Metric("bits", "lower", "per quantized weight, scales and zero points included"),
    "spearman": Metric("", "higher", "rank correlation of H(k) and the gap G(k)"),
    "spearman_relative": Metric("", "higher", "of H(k) and G(k) over the sequential error"),
    "spearman_conditional": Metric("", "none", "of H(k + 1 | k) and G(k)"),
    "gap_relative": Metric("", "none", "mean over pairs of layers of G(k) over the sequential error"),
}  # fmt: skip


class Cell(NamedTuple):
    name: str
    w_bits: int
    a_bits: int


class State(NamedTuple):
    """key: of the method. step: i32[], the cell at work. params, x_cal: the seed's net and calibration pictures.
    values: f32[C, M], of the arm's metrics. shares, proxy: f32[C, L]. gaps: f32[C, L - 1]."""

    key: jax.Array
    step: jax.Array
    params: tuple[Params, ...]
    x_cal: Any
    values: jax.Array
    shares: jax.Array
    proxy: jax.Array
    gaps: jax.Array


def vlm_study(
    net: BlockNet,
    train: Callable[[jax.Array], tuple[Params, ...]],
    pool: Mapping[str, np.ndarray],
    test: tuple[Mapping[str, np.ndarray], np.ndarray],
    cells: Sequence[Cell],
    options: Options,
    *,
    questions: Sequence[str],
    links: Sequence[Any] = (),
    rewrite: Callable[[int], Fit] | None = None,
    premise: bool = False,
    num_calibration: int = 16,
) -> Experiment[State]:
    """One arm.

    Args:
      net: of `qlab.nn.vlm`. train: key -> params. pool: {"image", "question"} to draw calibration pictures from.
      test: inputs and answers i32[N, R]. questions: R names, for an accuracy of each.
      rewrite: w_bits -> how the norms of `links` are rewritten beforehand (a baseline); None: not.
      premise: also the gaps G(k) of all pairs of layers and their correlation with the proxies; not part of the cost.
      num_calibration: pictures, each with all its questions.
    Raises:
      ValueError: more calibration pictures than the pool has.
    """
    check_draw(pool, num_calibration)
    x_test, y_test = jax.tree.map(jnp.asarray, test)
    num = num_layers(net)
    names = _names(questions, premise)

    def init(key: jax.Array) -> State:
        k_net, k_draw, k_method = (jax.random.fold_in(key, i) for i in range(3))
        x_cal = drawn_samples(dict(pool), k_draw, num_calibration)
        zeros = [jnp.zeros((len(cells), n)) for n in (len(names), num, num, num - 1)]
        return State(k_method, jnp.int32(0), train(k_net), x_cal, *zeros)

    def step(state: State) -> tuple[State, dict[str, Any]]:
        c = int(state.step)
        cell, params = cells[c], state.params
        if rewrite is not None:
            transform = norm_transform(net, links, rewrite(cell.w_bits))
            params = transform(params, state.x_cal, state.key)
        q = quantize_vlm(
            net, params, state.x_cal, w_bits=cell.w_bits, a_bits=cell.a_bits, options=options,
            key=jax.random.fold_in(state.key, c),
        )  # fmt: skip
        found = _judged(net, q.blocks, state.params, state.x_cal, x_test, y_test)
        found |= {f"accuracy_{n}": a for n, a in zip(questions, found.pop("each"), strict=True)}
        found |= memory_report(params, q.blocks, cell.w_bits)
        found |= {
            "evaluations": q.cost.blocks, "layer_forwards": q.cost.layers,
            "num_blocks": len(q.partition), "sites_total": q.sites,
        }  # fmt: skip
        proxy, gaps = jnp.zeros(num), jnp.zeros(num - 1)
        if premise:
            more, proxy, gaps = _premise(net, params, state.x_cal, cell, options)
            found |= more
        row = jnp.array([float(found[n]) for n in names])
        state = state._replace(
            step=state.step + 1,
            values=state.values.at[c].set(row),
            shares=state.shares.at[c].set(q.shares),
            proxy=state.proxy.at[c].set(proxy),
            gaps=state.gaps.at[c].set(gaps),
        )
        return state, {"mse": found["mse"]}

    def evaluate(state: State) -> dict[str, Any]:
        values: dict[str, Any] = {
            f"{cell.name}/{name}": state.values[c, i]
            for c, cell in enumerate(cells)
            for i, name in enumerate(names)
        }
        for c, cell in enumerate(cells):
            values[f"{cell.name}/shares"] = state.shares[c]
            if premise:
                values[f"{cell.name}/proxy"] = state.proxy[c]
                values[f"{cell.name}/gaps"] = state.gaps[c]
        values["layers"] = jnp.arange(float(num))
        return values

    phase = Phase("cells", len(cells), step, loop="host")
    return Experiment(init, evaluate, (phase,), seed_layout="map", jittable=False)


def _names(questions: Sequence[str], premise: bool) -> list[str]:
    own = [n for n in METRICS if premise or not n.startswith(("spearman", "gap"))]
    return own + [f"accuracy_{q}" for q in questions]


@partial(jax.jit, static_argnums=0)
def _judged(net: BlockNet, blocks, params, x_cal, x_test, y_test) -> dict[str, jax.Array]:
    """What the quantized net does on the test pictures and how far its logits are from the float net's."""

    def logits(x):
        for group, q in zip(net.groups, blocks, strict=True):
            x = scan_quantized(group, q, x)
        return x

    got, want = logits(x_test), net.apply(params, x_test)
    found = compare(got, want, y_test)
    found = {n: found[n] for n in ("accuracy", "fp_accuracy", "flips", "kl")}
    found["mse"] = ((got - want) ** 2).mean()
    found["mse_calibration"] = ((logits(x_cal) - net.apply(params, x_cal)) ** 2).mean()
    return found | {"each": 100.0 * (got.argmax(-1) == y_test).mean(0)}


def _premise(net: BlockNet, params, x, cell: Cell, options: Options):
    """(metrics, H(k) f32[L], G(k) f32[L - 1]): do proxies rank the pairs by what a joint search gains?"""
    at, bits = decoder_at(net), jnp.float32(cell.a_bits)
    weights = round_weights(
        net, params, jnp.float32(cell.w_bits), group=options.group, grid=options.weight_grid
    )
    rounded = with_weights(params, weights)
    ranges, tokens = front_ranges(net, params, x, PRODUCTS)
    seen = float_pass(net, params[at], tokens)
    state = start_state(rounded[at], front(net, rounded[:at], ranges, x, bits))
    gaps, relative = pair_gaps(net, rounded[at], seen, bits, state, jnp.array(options.shares))
    proxies = dependency_proxies(seen, bits)
    found = {
        "spearman": spearman(proxies["entropy"][:-1], gaps),
        "spearman_relative": spearman(proxies["entropy"][:-1], relative),
        "spearman_conditional": spearman(proxies["conditional"][:-1], gaps),
        "gap_relative": relative.mean(),
    }
    return found, proxies["entropy"], gaps


def spearman(a: Any, b: Any) -> float:
    """Rank correlation, equal values share a rank; 0 if one side does not vary.

    >>> spearman([1.0, 2.0, 3.0], [1.0, 10.0, 100.0]), spearman([1.0, 2.0], [5.0, 5.0])
    (1.0, 0.0)
    """
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(v)) for v in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1].round(12))
