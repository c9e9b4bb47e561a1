"""Post-training quantization of weights and activations of a BlockNet as an Experiment: cells x blocks.

A cell is a net (plain or outlier twin) at a weight width and an activation width. What does not depend on
widths is done once for all cells of a net, in `init`: a transform of the whole net that preserves its function
(smoothing, rotation), the float net's test outputs. Then each cell takes a step per block (the arm's block
method, then the block's outputs become the inputs of the next) and one to test. Widths and nets are data, so all
cells of an arm run one compiled program, and arms whose method and parts of the net are alike share it
through the compilation cache. A step is a block: a run may stop and resume between any two.

What a seed varies, each with a sub-key of its own (fold_in 0, 1, 2 of the seed's key): the trained net
(and its twin), the calibration draw, the method.

Letters: C = cells, U = setups (net, calibration draw and method key, which cells share), N = calibration
samples, n = blocks of a group.
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
from qlab.nn.sites import BlockNet, Params, pick
from qlab.quantization.blocks import QuantizedBlock, around_block, fake_run, scan_quantized
from qlab.quantization.qtensor import row_bytes

METRICS = {
    "accuracy": Metric("%", "higher", "test accuracy of the quantized net"),
    "fp_accuracy": Metric("%", "none", "test accuracy of the float net"),
    "kl": Metric("nat", "lower", "test mean of KL(float net || quantized net) over its outputs"),
    "flips": Metric("%", "lower", "test answers that differ from the float net's"),
    "kl_calibration": Metric("nat", "lower", "KL of the same kind on the calibration samples"),
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
TESTED = (
    "accuracy", "fp_accuracy", "kl", "kl_calibration", "flips", "loss", "fp_loss", "error", "fallbacks"
)  # fmt: skip

VARIED = ("net", "calibration", "method")

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
    """Of each setup: key, of the method; nets, rewritten params per group, leaves [U, n, ...]; x_cal,
    [U, N, ...]; logits, f32[U, ...], the float net's on the test inputs; probed, {metric: f32[U]}; beside,
    per group, leaves [U, n, ...], or None.

    Of the cell at work: params, its net's; inputs: per group (x_q, x_fp); quantized: per group; fallbacks
    f32[]. out: f32[C, len(TESTED)].
    """

    key: jax.Array
    step: jax.Array
    nets: tuple[Params, ...]
    x_cal: Any
    logits: jax.Array
    probed: dict[str, jax.Array]
    beside: Any
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
    around: bool = False,
    beside: Callable[[jax.Array, str, Any], tuple[Any, ...]] | None = None,
    wide: Mapping[str, int] | None = None,
    num_calibration: int = 64,
    vary: Sequence[str] = VARIED,
    run: Callable[..., Any] = fake_run,
) -> Experiment[State]:
    """One arm of a comparison of methods that quantize weights and activations.

    Args:
      net: the net. nets: key -> {net name: params}, e.g. plain and twin, the same function.
      pool: samples (a pytree, first axis) to draw calibration samples from. test: (inputs, labels
        i32[N] or i32[N, T]); outputs are logits over a last axis.
      cells: the table. method: (block, params, x_q, x_fp, w_bits, a_bits, key) -> (QuantizedBlock,
        fallbacks), e.g. `site_by_site(act=..., weight=...)`; called once per group under jit.
      transform: (params, x_cal, key) -> params, a rewrite of the whole net that keeps its function.
      probe: (transformed params, x_cal) -> {metric: f32[]}, reported for each cell beside METRICS. Both are
        called on the host, once per net: their heavy parts should be jitted, with `net` static, so that
        arms share the programs.
      around: the method takes an Around as its last argument.
      beside: (key of the nets, net name, x_cal) -> per group a pytree with the n blocks first, for the method; found
        once for all cells with that net and draw (corrected inputs, for example).
      wide: {weight site: its bits} where the method gives a site a width of its own.
      vary: which of the three parts the seed decides. run: how quantized blocks execute.
    Returns:
      An Experiment whose evaluate gives the METRICS per cell.
    """
    check_draw(pool, num_calibration)
    if set(vary) - set(VARIED):
        raise ValueError(f'vary={tuple(vary)}; use some of "net", "calibration", "method"')
    setups = tuple(dict.fromkeys((c.net, c.draw, c.run) for c in cells))
    which = jnp.array([setups.index((c.net, c.draw, c.run)) for c in cells])
    w_bits = jnp.array([c.w_bits for c in cells], jnp.float32)
    a_bits = jnp.array([c.a_bits for c in cells], jnp.float32)
    sizes = [g.n for g in net.groups]
    # of the steps of a cell: the group whose next block is quantized; the last step tests
    stages = jnp.array([*(g for g, n in enumerate(sizes) for _ in range(n)), len(sizes)])
    x_test, y_test = jax.tree.map(jnp.asarray, test)

    @partial(jax.jit, static_argnums=0)  # so that init and the steps share its trace
    def quantize(g: int, params, i, x_q, x_fp, w_bits, a_bits, key, side):
        """The method on block i of group g. params: per group; side: what is beside the net, per group, or None."""
        own = pick(params[g], i)
        args = (net.groups[g].block, own, x_q, x_fp, w_bits, a_bits, key)
        if not around:
            return method(*args)
        own_side = None if side is None else pick(side[g], i)
        return method(*args, around_block(net, params, g, i, own_side))

    def shapes(params, x, side) -> tuple[tuple[Any, ...], tuple[QuantizedBlock, ...]]:
        """Zeros in the form of the inputs of each group and of its quantized blocks."""
        inputs, quantized = [], []
        bit, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(jax.random.key, 0)
        first = jax.ShapeDtypeStruct((), jnp.int32)
        for g, group in enumerate(net.groups):
            inputs.append((x, x))
            q, _ = jax.eval_shape(partial(quantize, g), params, first, x, x, bit, bit, key, side)
            quantized.append(jax.tree.map(lambda a, n=group.n: _zeros(a, (n,)), q))
            x = jax.eval_shape(lambda s, x, block=group.block: block(pick(s, 0), x), params[g], x)
        return jax.tree.map(_zeros, tuple(inputs)), tuple(quantized)

    def init(key: jax.Array) -> State:
        k_net, *k_rest = sub_keys(key, vary)
        made = nets(k_net)
        sides: dict[tuple[str, int], Any] = {}

        def setup(name: str, draw: int, run: int):
            k_draw, k = (jax.random.fold_in(k, i) for k, i in zip(k_rest, (draw, run), strict=True))
            x = drawn_samples(pool, k_draw, num_calibration)
            params = made[name]
            logits = apply_net(net, params, x_test)
            if transform is not None:
                params = transform(params, x, jax.random.fold_in(k, 0))
            if beside is not None and (name, draw) not in sides:
                sides[name, draw] = beside(k_net, name, x)
            found = {} if probe is None else dict(probe(params, x))
            return k, params, x, logits, found, sides.get((name, draw))

        keys, rewritten, x_cal, logits, probed, sided = _stack(*(setup(*s) for s in setups))
        params, x, side = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype),
            (rewritten, x_cal, sided),
        )
        inputs, quantized = shapes(params, x, side)
        out = jnp.zeros((len(cells), len(TESTED)))
        step, fallbacks = jnp.zeros((), jnp.int32), jnp.zeros(())
        params = jax.tree.map(_zeros, params)
        return State(
            keys, step, rewritten, x_cal, logits, probed, sided, params, inputs, quantized,
            fallbacks, out,
        )  # fmt: skip

    def begun(state: State) -> State:
        """At the first step of a cell: its net and its calibration samples."""
        at = which[state.step // len(stages)]
        new = partial(jax.tree.map, partial(jnp.where, state.step % len(stages) == 0))
        params, x = pick((state.nets, state.x_cal), at)
        inputs = (new((x, x), state.inputs[0]), *state.inputs[1:])
        fallbacks = new(0.0, state.fallbacks)
        return state._replace(params=new(params, state.params), inputs=inputs, fallbacks=fallbacks)

    def block_step(g: int, state: State) -> State:
        """Quantizes the next block of group g."""
        group = net.groups[g]
        c, at = jnp.divmod(state.step, len(stages))
        i = at - sum(sizes[:g])
        params = pick(state.params[g], i)
        x_q, x_fp = state.inputs[g]
        key = jax.random.fold_in(state.key[which[c]], 2 + at)  # 0 is the transform's
        side = pick(state.beside, which[c])  # None stays None
        q, failed = quantize(g, state.params, i, x_q, x_fp, w_bits[c], a_bits[c], key, side)
        y_q, y_fp = group.block(q.params, x_q, run(q)), group.block(params, x_fp)
        put = partial(jax.tree.map, lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, i, 0))
        quantized = list(state.quantized)
        quantized[g] = put(quantized[g], q)
        inputs = list(state.inputs)
        if group.n > 1:
            inputs[g] = (y_q, y_fp)
        if g + 1 < len(sizes):
            inputs[g + 1] = (y_q, y_fp)
        out = state.out.at[c, TESTED.index("error")].set(relative_error(y_q, y_fp))
        if g + 1 == len(sizes):  # of its blocks the last one stays
            out = out.at[c, TESTED.index("kl_calibration")].set(divergence(y_fp, y_q))
        return state._replace(
            inputs=tuple(inputs),
            quantized=tuple(quantized),
            fallbacks=state.fallbacks + failed,
            out=out,
        )

    def tested(state: State) -> State:
        c = state.step // len(stages)
        logits = x_test
        for g, q in zip(net.groups, state.quantized, strict=True):
            logits = scan_quantized(g, q, logits, run)
        kept = {m: state.out[c, TESTED.index(m)] for m in ("error", "kl_calibration")}
        values = compare(logits, state.logits[which[c]], y_test) | kept
        values |= {"fallbacks": state.fallbacks}
        row = jnp.stack([values[m] for m in TESTED])
        return state._replace(out=state.out.at[c].set(row))

    branches = [*(partial(block_step, g) for g in range(len(sizes))), tested]

    @jax.jit
    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        c, at = jnp.divmod(state.step, len(stages))
        state = jax.lax.switch(stages[at], branches, begun(state))
        error = state.out[c, TESTED.index("error")]
        return state._replace(step=state.step + 1), {"error": error}

    def evaluate(state: State) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        total = sum(
            g.n * (len(q.weights) + len(q.acts))
            for g, q in zip(net.groups, state.quantized, strict=True)
        )
        for c, cell in enumerate(cells):
            if cell.draw or cell.run:
                continue
            values |= {f"{cell.name}/{m}": state.out[c, i] for i, m in enumerate(TESTED)}
            values |= {f"{cell.name}/{m}": v[which[c]] for m, v in state.probed.items()}
            values |= {
                f"{cell.name}/{k}": jnp.float32(v)
                for k, v in storage(state.quantized, cell.w_bits, wide).items()
            }
            values[f"{cell.name}/sites_total"] = jnp.float32(total)
        return values | _variance(cells, state.out[:, 0])

    def widest(state: State) -> State:
        """At the first block of the group with most weights, on noise in the place of its inputs."""
        per_block = [
            sum(a.size for a in jax.tree.leaves(p)) / g.n
            for p, g in zip(state.params, net.groups, strict=True)
        ]
        at = sum(sizes[: int(np.argmax(per_block))])

        def noise(a):
            if not jnp.issubdtype(a.dtype, jnp.floating):
                return a
            return jax.random.normal(jax.random.key(0), a.shape, a.dtype)

        params = pick(state.nets, which[0])
        inputs = jax.tree.map(noise, state.inputs) if at else state.inputs
        return state._replace(step=jnp.int32(at), params=params, inputs=inputs)

    phase = Phase("cells", len(cells) * len(stages), step, widest=widest)
    return Experiment(init, evaluate, (phase,), seed_layout="map")


def _zeros(a, lead: tuple[int, ...] = ()):
    return jnp.asarray(np.zeros((*lead, *a.shape), a.dtype))  # jnp.zeros compiles for each shape


@jax.jit
def _stack(*trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def sub_keys(key: jax.Array, vary: Sequence[str] = VARIED) -> tuple[jax.Array, ...]:
    """Keys of the net, the calibration draw and the method; what `vary` leaves out has the same one for all seeds."""
    return tuple(
        jax.random.fold_in(key if name in vary else jax.random.key(0), i)
        for i, name in enumerate(VARIED)
    )


def check_draw(pool: Any, num: int) -> None:
    """Raises ValueError if the pool (a pytree, samples first) holds fewer samples than num."""
    size = len(jax.tree.leaves(pool)[0])
    if num > size:
        raise ValueError(f"num_calibration={num}, but the pool holds {size} samples")


def drawn_samples(pool: Any, key: jax.Array, num: int) -> Any:
    """num samples of a pool without replacement, on the device."""
    size = len(jax.tree.leaves(pool)[0])
    chosen = np.asarray(jax.random.permutation(key, size)[:num])
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[chosen]), pool)


def relative_error(y, y_fp) -> jax.Array:
    """f32[]: mean squared error over the mean square of y_fp; trees of arrays."""
    y, y_fp = (jnp.concatenate([a.ravel() for a in jax.tree.leaves(t)]) for t in (y, y_fp))
    return ((y - y_fp) ** 2).mean() / jnp.maximum((y_fp**2).mean(), 1e-30)


@partial(jax.jit, static_argnums=0)
def apply_net(net: BlockNet, params: tuple[Params, ...], x: Any) -> jax.Array:
    """The float net's outputs; equal nets share the program."""
    return net.apply(params, x)


def divergence(logits_p: jax.Array, logits_q: jax.Array, temperature: float = 1.0) -> jax.Array:
    """f32[]: mean KL(softmax(p / T) || softmax(q / T)) in nats over all but the last axis."""
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (logits_p, logits_q))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def compare(logits: jax.Array, logits_fp: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Accuracy, flips (%), KL and cross-entropy (nats) of quantized against float logits.

    >>> one = jnp.array([[2.0, 0.0]])
    >>> values = compare(one, one, jnp.array([0]))
    >>> float(values["accuracy"]), float(values["kl"]), float(values["flips"])
    (100.0, 0.0, 0.0)
    """
    entropy = optax.softmax_cross_entropy_with_integer_labels
    answer, answer_fp = logits.argmax(-1), logits_fp.argmax(-1)
    return {
        "accuracy": 100.0 * (answer == labels).mean(),
        "fp_accuracy": 100.0 * (answer_fp == labels).mean(),
        "kl": divergence(logits_fp, logits),
        "flips": 100.0 * (answer != answer_fp).mean(),
        "loss": entropy(logits, labels).mean(),
        "fp_loss": entropy(logits_fp, labels).mean(),
    }


def storage(
    quantized: Sequence[QuantizedBlock], bits: int, wide: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Bytes of the weights packed at `bits` (or as `wide` says), with scales (f32) and zero points (a byte)."""
    num_bytes, num_weights = 0, 0
    for q in quantized:
        for site, qt in q.weights.items():
            n = qt.codes.shape[0]
            rows, columns = qt.shape
            at = min(qt.bits, (wide or {}).get(site, bits))
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
