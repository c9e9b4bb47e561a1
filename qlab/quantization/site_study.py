"""Post-training quantization of weights and activations of a BlockNet as an Experiment: cells x blocks.

A cell is a net (plain or outlier twin) at a weight width and an activation width. Each cell takes one step to
prepare (a transform of the whole net that preserves its function: smoothing, rotation), one per block (the
arm's block method, then the block's outputs become the inputs of the next) and one to test. Widths and nets are
data and a switch chooses what a step does, so an arm compiles one program, in which blocks of one structure
share their part. A run may stop and resume between any two steps.

What a seed varies, each with a sub-key of its own (fold_in 0, 1, 2 of the seed's key): the trained net
(and its twin), the calibration draw, the method.

Letters: M = nets, C = cells, N = calibration samples, n = blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.experiment import Experiment, Metric, Phase
from qlab.nn.sites import BlockNet, Params, pick, run_group
from qlab.quantization.blocks import QuantizedBlock, fake_run
from qlab.quantization.qtensor import row_bytes

METRICS = {
    "accuracy": Metric("%", "higher", "test accuracy of the quantized net"),
    "fp_accuracy": Metric("%", "none", "test accuracy of the float net"),
    "kl": Metric("nat", "lower", "test mean of KL(float net || quantized net) over its outputs"),
    "flips": Metric("%", "lower", "test answers that differ from the float net's"),
    "loss": Metric("nat", "lower", "test cross-entropy of the quantized net"),
    "fp_loss": Metric("nat", "none", "test cross-entropy of the float net"),
    "error": Metric("", "lower", "error of the last block's outputs over their power, calibration"),
    "bytes": Metric("B", "lower", "packed weights with scales and zero points"),
    "stored_bits": Metric("bits", "lower", "per quantized weight, scales and zero points included"),
    "fallbacks": Metric("", "lower", "sites that fell back to a simpler method"),
    "sites_total": Metric("", "none", "quantized weights and activations"),
    "variance_method": Metric(
        "", "none", "mean over seeds: variance of accuracy by the method key"
    ),
    "variance_calibration_and_method": Metric("", "none", "the same with a fresh calibration draw"),
}
TESTED = ("accuracy", "fp_accuracy", "kl", "flips", "loss", "fp_loss", "error", "fallbacks")

BlockMethod = Callable[..., tuple[QuantizedBlock, jax.Array]]
Transform = Callable[[tuple[Params, ...], Any, jax.Array], tuple[Params, ...]]


class Cell(NamedTuple):
    """One cell of a table. draw, run > 0: the cell again with a fresh calibration draw or method key."""

    name: str
    w_bits: int
    a_bits: int
    net: str = "plain"
    draw: int = 0
    run: int = 0


class State(NamedTuple):
    """key: of the method, per cell. nets: params per group, leaves [M, n, ...]. x_cal: [C, N, ...].

    Of the cell at work: params, its transformed nets; inputs: per group (x_q, x_fp); quantized: per
    group; fallbacks f32[]. out: f32[C, len(TESTED) and the probe's].
    """

    key: jax.Array
    step: jax.Array
    nets: tuple[Params, ...]
    x_cal: Any
    params: tuple[Params, ...]
    inputs: tuple[Any, ...]
    quantized: tuple[QuantizedBlock, ...]
    fallbacks: jax.Array
    out: jax.Array


def site_study(
    net: BlockNet,
    nets: Callable[[jax.Array], Mapping[str, tuple[Params, ...]]],
    pool: Any,
    test: tuple[Any, np.ndarray],
    cells: Sequence[Cell],
    method: BlockMethod,
    *,
    transform: Transform | None = None,
    probe: Callable[[tuple[Params, ...], Any], Mapping[str, jax.Array]] | None = None,
    num_calibration: int = 64,
    vary: Sequence[str] = ("net", "calibration", "method"),
    run: Callable[..., Any] = fake_run,
) -> Experiment[State]:
    """One arm of a comparison of methods that quantize weights and activations.

    Args:
      net: the net. nets: key -> {net name: params}, e.g. plain and twin, the same function.
      pool: samples (a pytree, first axis) to draw calibration samples from. test: (inputs, labels
        i32[N] or i32[N, T]); outputs are logits over a last axis.
      cells: the table. method: (block, params, x_q, x_fp, w_bits, a_bits, key) -> (QuantizedBlock,
        fallbacks), e.g. `site_by_site(act=..., weight=...)`; traced once per group.
      transform: (params, x_cal, key) -> params, a rewrite of the whole net that keeps its function.
      probe: (transformed params, x_cal) -> {metric: f32[]}, measured for each cell beside METRICS.
      vary: which of the three parts the seed decides. run: how quantized blocks execute.
    Returns:
      An Experiment whose evaluate gives the METRICS per cell.
    """
    size = len(jax.tree.leaves(pool)[0])
    if num_calibration > size:
        raise ValueError(f"num_calibration={num_calibration}, but the pool holds {size} samples")
    unknown = set(vary) - {"net", "calibration", "method"}
    if unknown:
        raise ValueError(f'vary={tuple(vary)}; use some of "net", "calibration", "method"')
    names = tuple(dict.fromkeys(c.net for c in cells))
    which = jnp.array([names.index(c.net) for c in cells])
    w_bits = jnp.array([c.w_bits for c in cells], jnp.float32)
    a_bits = jnp.array([c.a_bits for c in cells], jnp.float32)
    sizes = [g.n for g in net.groups]
    # What the steps of a cell do: prepare, blocks of group 0, of group 1, ..., test.
    kinds = jnp.asarray(np.repeat(np.arange(len(sizes) + 2), [1, *sizes, 1]))
    # Jitted for their traces: init needs the shapes of what the steps make.
    methods = [jax.jit(partial(method, g.block)) for g in net.groups]
    x_test, y_test = jax.tree.map(jnp.asarray, test)

    def shapes(params, x) -> tuple[tuple[Any, ...], tuple[QuantizedBlock, ...]]:
        """Zeros in the form of the inputs of each group and of its quantized blocks."""
        inputs, quantized = [], []
        bit = jax.ShapeDtypeStruct((), jnp.float32)
        for g, block_method, stacked in zip(net.groups, methods, params, strict=True):
            one = jax.eval_shape(lambda s: pick(s, 0), stacked)
            inputs.append((x, x))
            key = jax.eval_shape(jax.random.key, 0)
            q, _ = jax.eval_shape(block_method, one, x, x, bit, bit, key)
            quantized.append(jax.tree.map(lambda a, n=g.n: _zeros(a, (n,)), q))
            x = jax.eval_shape(lambda p, x, g=g: g.block(p, x), one, x)
        return jax.tree.map(_zeros, tuple(inputs)), tuple(quantized)

    def probed(params, x) -> dict[str, jax.Array]:
        return {} if probe is None else dict(probe(params, x))

    def columns(state: State) -> tuple[str, ...]:
        """The metrics in the columns of `out`."""
        x = jax.eval_shape(lambda x: pick(x, 0), state.x_cal)
        return (*TESTED, *sorted(jax.eval_shape(probed, state.params, x)))

    def init(key: jax.Array) -> State:
        parts = {
            name: jax.random.fold_in(key if name in vary else jax.random.key(0), i)
            for i, name in enumerate(("net", "calibration", "method"))
        }
        made = nets(parts["net"])
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(made[name] for name in names))
        draws = [jax.random.fold_in(parts["calibration"], c.draw) for c in cells]
        picks = [np.asarray(jax.random.permutation(k, size)[:num_calibration]) for k in draws]
        x_cal = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a[p]) for p in picks]), pool)
        keys = jnp.stack([jax.random.fold_in(parts["method"], c.run) for c in cells])
        params = jax.tree.map(lambda a: jnp.zeros_like(a[0]), stacked)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x_cal)
        inputs, quantized = shapes(jax.eval_shape(lambda p: p, params), one)
        state = State(
            keys, jnp.zeros((), jnp.int32), stacked, x_cal, params, inputs, quantized,
            jnp.zeros(()), jnp.zeros(()),
        )  # fmt: skip
        return state._replace(out=jnp.zeros((len(cells), len(columns(state)))))

    def prepare(state: State):
        c = state.step // len(kinds)
        params, x = pick(state.nets, which[c]), pick(state.x_cal, c)
        if transform is not None:
            params = transform(params, x, jax.random.fold_in(state.key[c], 0))
        inputs = ((x, x), *state.inputs[1:])
        values = probed(params, x)
        row = jnp.array([values[m] for m in sorted(values)])
        state = state._replace(
            params=params,
            inputs=inputs,
            fallbacks=jnp.zeros(()),
            out=state.out.at[c, len(TESTED) :].set(row),
        )
        return state, jnp.zeros(())

    def make_rounding(g: int):
        group, first = net.groups[g], 1 + sum(sizes[:g])

        def rounding(state: State):
            c, i = state.step // len(kinds), state.step % len(kinds) - first
            params = pick(state.params[g], i)
            x_q, x_fp = state.inputs[g]
            key = jax.random.fold_in(state.key[c], 1 + first + i)
            q, failed = methods[g](params, x_q, x_fp, w_bits[c], a_bits[c], key)
            y_q, y_fp = group.block(q.params, x_q, run(q)), group.block(params, x_fp)
            put = partial(
                jax.tree.map, lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, i, 0)
            )
            quantized = list(state.quantized)
            quantized[g] = put(quantized[g], q)
            inputs = list(state.inputs)
            if group.n > 1:
                inputs[g] = (y_q, y_fp)
            if g + 1 < len(sizes):
                inputs[g + 1] = (y_q, y_fp)
            error = _relative(y_q, y_fp)
            state = state._replace(
                inputs=tuple(inputs),
                quantized=tuple(quantized),
                fallbacks=state.fallbacks + failed,
                out=state.out.at[c, TESTED.index("error")].set(error),
            )
            return state, error

        return rounding

    def tested(state: State):
        c = state.step // len(kinds)
        logits, logits_fp = x_test, x_test
        for g, q in zip(net.groups, state.quantized, strict=True):
            logits = _scan_quantized(g, q, logits, run)
        for g, p in zip(net.groups, pick(state.nets, which[c]), strict=True):
            logits_fp = run_group(g, p, logits_fp)
        values = compare(logits, logits_fp, y_test) | {
            "error": state.out[c, TESTED.index("error")],
            "fallbacks": state.fallbacks,
        }
        row = jnp.stack([values[m] for m in TESTED])
        return state._replace(out=state.out.at[c, : len(TESTED)].set(row)), values["error"]

    branches = [prepare, *map(make_rounding, range(len(sizes))), tested]

    def step(state: State):
        new, error = jax.lax.switch(kinds[state.step % len(kinds)], branches, state)
        return new._replace(step=state.step + 1), {"error": error}

    phase = Phase("blocks", len(cells) * len(kinds), jax.jit(step))

    def evaluate(state: State) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        total = sum(
            g.n * (len(q.weights) + len(q.acts))
            for g, q in zip(net.groups, state.quantized, strict=True)
        )
        for c, cell in enumerate(cells):
            if cell.draw or cell.run:
                continue
            values |= {f"{cell.name}/{m}": state.out[c, i] for i, m in enumerate(columns(state))}
            values |= {
                f"{cell.name}/{k}": jnp.float32(v)
                for k, v in storage(state.quantized, cell.w_bits).items()
            }
            values[f"{cell.name}/sites_total"] = jnp.float32(total)
        return values | _variance(cells, state.out[:, 0])

    return Experiment(init, evaluate, (phase,), seed_layout="map")


def _zeros(a, lead: tuple[int, ...] = ()):
    return jnp.zeros((*lead, *a.shape), a.dtype)


def _relative(y, y_fp) -> jax.Array:
    y, y_fp = (jnp.concatenate([a.ravel() for a in jax.tree.leaves(t)]) for t in (y, y_fp))
    return ((y - y_fp) ** 2).mean() / jnp.maximum((y_fp**2).mean(), 1e-30)


def _scan_quantized(group, stacked: QuantizedBlock, x, run):
    if group.n == 1:
        q = pick(stacked, 0)
        return group.block(q.params, x, run(q))
    return jax.lax.scan(lambda x, q: (group.block(q.params, x, run(q)), None), x, stacked)[0]


def compare(logits: jax.Array, logits_fp: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Accuracy, flips (%), KL and cross-entropy (nats) of quantized against float logits.

    >>> one = jnp.array([[2.0, 0.0]])
    >>> values = compare(one, one, jnp.array([0]))
    >>> float(values["accuracy"]), float(values["kl"]), float(values["flips"])
    (100.0, 0.0, 0.0)
    """
    log_p, log_q = jax.nn.log_softmax(logits_fp), jax.nn.log_softmax(logits)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    answer, answer_fp = logits.argmax(-1), logits_fp.argmax(-1)
    return {
        "accuracy": 100.0 * (answer == labels).mean(),
        "fp_accuracy": 100.0 * (answer_fp == labels).mean(),
        "kl": (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "flips": 100.0 * (answer != answer_fp).mean(),
        "loss": entropy(logits, labels).mean(),
        "fp_loss": entropy(logits_fp, labels).mean(),
    }


def storage(quantized: Sequence[QuantizedBlock], bits: int) -> dict[str, float]:
    """Bytes of the weights packed at `bits`, with scales (f32) and zero points (a byte)."""
    num_bytes, num_weights = 0, 0
    for q in quantized:
        for qt in q.weights.values():
            n = qt.codes.shape[0]
            rows, columns = qt.shape
            at = qt.bits if qt.bits < bits else bits
            per = rows * row_bytes(columns, at, qt.group)
            per += sum(
                a.size // n * size
                for a, size in ((qt.scale, 4), (qt.zero, 1), (qt.offset, 4))
                if a is not None
            )
            num_bytes += n * per
            num_weights += n * rows * columns
    return {"bytes": float(num_bytes), "stored_bits": 8.0 * num_bytes / max(num_weights, 1)}


def _variance(cells: Sequence[Cell], accuracy: jax.Array) -> dict[str, jax.Array]:
    """Half the squared difference to the repeats of a cell, see tasks.variance_split."""
    home = {c.name: i for i, c in enumerate(cells) if not (c.draw or c.run)}
    out = {}
    for i, c in enumerate(cells):
        if c.draw or c.run:
            what = "variance_calibration_and_method" if c.draw else "variance_method"
            out[f"{c.name}/{what}"] = (accuracy[i] - accuracy[home[c.name]]) ** 2 / 2
    return out
