"""The methods of the lab side by side: any of them on any net of the zoo, in one walk over blocks.

A `Family` is a net ready for the walk: its blocks, how to train it and its outlier twin, and the conventions that
all methods share on it: activations on one static affine grid per tensor (range from quantiles), the net's input (and
Mamba's states and C) in 8 bits at least, a ResNet's first and last layer in 8 bits. `arm` gives what a method does
there: a rewrite of the net or of its norms, grids of its own, the rounding of the weights.

`timed` adds to a study what tables of quantization leave out: seconds per cell without compiling, the
memory of the program, and the packed net beside the float one.

Letters: C = cells, N = samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase
from qlab.nn import zoo
from qlab.nn.chain import inject_outliers
from qlab.nn.dense import dense_net, dense_params
from qlab.nn.mamba import MambaSize, outlier_twin, with_parts
from qlab.nn.outliers import norm_twin, relu_twin
from qlab.nn.sites import BlockNet, Params
from qlab.nn.vit import LINKS
from qlab.quantization.activations import Affine, PerToken
from qlab.quantization.block_rounding import learned_weight
from qlab.quantization.blocks import (
    QuantizedBlock,
    SiteInput,
    WeightMethod,
    fake_run,
    gptq_weight,
    nearest_weight,
    packed_run,
    run_blocks,
    site_by_site,
)
from qlab.quantization.bn_statistics import correct_inputs
from qlab.quantization.decoupleq_walk import decoupleq_weight
from qlab.quantization.mambaquant import mambaquant, parts_of
from qlab.quantization.matrix import RULES
from qlab.quantization.norm_links import linked, smooth
from qlab.quantization.pd_quant import WIDE, Fit, Parts, beside, by_width, pd_quant, searched_act
from qlab.quantization.quantile_ranges import calib_affine_quantile, calib_log
from qlab.quantization.repquant import reparam
from qlab.quantization.site_study import Cell
from qlab.quantization.site_study import State as StudyState

ROUNDING = ("rtn", "mse", "gptq", "decoupleq", *RULES)
BLOCKS = ("brecq", "qdrop", "pd_quant")  # learn a block with its activation steps; on batch norms
LAMB_C = 0.02  # of distribution correction, the divisor of PD-Quant's published code
REWRITES = ("none", "smooth", "repquant", "mambaquant")
PACKED = ("float_time", "packed_time", "packed_gap")
MAMBA_SMOOTH, MAMBA_ROTATE = ("s2", "s4", "s5", "s7"), ("r1", "r2", "r4", "r5")


class Family(NamedTuple):
    """A net of the zoo ready for the walk.

    Attributes:
      kind: of `zoo.Recipe`. net: its blocks. nets: key -> {"plain": params, "twin": params}.
      broad: sites whose input has 8 bits at least. wide: {site: bits} of weights and operands of fixed width.
      norms: key -> the params with batch norms, None without.
    """

    kind: str
    net: BlockNet
    nets: Callable[[jax.Array], Mapping[str, tuple[Params, ...]]]
    broad: tuple[str, ...]
    wide: Mapping[str, int]
    norms: tuple[BlockNet, Callable[[jax.Array], Any]] | None = None


def family(name: str, strengths: Mapping[str, float], rewrite: str = "none") -> Family:
    """The zoo's net `name`. strengths: {kind: k}, the twin's channels are rescaled by 2^U(-k, k)."""
    r = zoo.recipe(name)
    if r.kind not in strengths:
        raise UserError(f"{name} is a net of kind {r.kind!r}; use nets of {', '.join(strengths)}")
    k = strengths[r.kind]
    made = zoo.model(r.kind, r.widths)

    def trained(key):
        return zoo.train(name, key)[1], jax.random.fold_in(key, 1)

    if r.kind == "mlp":

        def mlps(key):
            params, k_twin = trained(key)
            layers = made.layers(params)
            twin = inject_outliers(layers, k, k_twin)
            return {"plain": dense_params(layers), "twin": dense_params(twin)}

        return Family("mlp", dense_net(r.widths), mlps, (), {})
    if r.kind == "vit":

        def vits(key):
            params, k_twin = trained(key)
            return {"plain": params, "twin": norm_twin(params, LINKS, k, k_twin)}

        return Family("vit", made, vits, ("patch",), {})
    if r.kind == "mamba":
        full = rewrite == "mambaquant"
        parts = {"gate", *(parts_of(MAMBA_SMOOTH, MAMBA_ROTATE, False) if full else ())}
        size = MambaSize(*r.widths)._replace(parts=tuple(sorted(parts)))

        def mambas(key):
            params, k_twin = trained(key)
            plain = with_parts(params, size)
            return {"plain": plain, "twin": outlier_twin(plain, k, k_twin)}

        return Family("mamba", zoo.model("mamba", tuple(size)), mambas, ("embed", "h", "C"), {})

    def resnets(key):
        params, k_twin = trained(key)
        plain = made.fold(params)
        return {"plain": plain, "twin": relu_twin(plain, (("conv1", "conv2"),), k, k_twin)}

    return Family("resnet", made.folded, resnets, (), WIDE, (made.net, lambda key: trained(key)[0]))


class Method(NamedTuple):
    """What an arm does. rounding: of ROUNDING, or one of BLOCKS. rewrite: of REWRITES.

    num_iters: Adam steps of a learned product; a block method takes twice as many (blocks have two products on average).
    rate, step_rate: of weights and of a block's activation steps.
    """

    rounding: str = "mse"
    rewrite: str = "none"
    num_iters: int = 300
    batch_size: int = 32
    rate: float = 3e-2
    step_rate: float = 2e-3
    damp: float = 0.01
    dc_steps: int = 100
    num_search: int = 64


def fits(m: Method, kind: str) -> bool:
    """Whether the method exists for a kind of net."""
    need = {"repquant": ("vit",), "mambaquant": ("mamba",), "smooth": ("vit", "mamba")}
    if m.rounding in BLOCKS:
        return kind == "resnet"
    return kind in need.get(m.rewrite, (kind,))


def rounding(m: Method, max_bits: int = 8) -> WeightMethod:
    """The rounding of a product; other weights (a depthwise kernel) go to nearest, in all methods alike."""
    grid: dict[str, Any] = {"max_bits": max_bits, "calibration": "shares"}
    nearest = nearest_weight(**grid)
    if m.rounding == "rtn":
        return nearest_weight(max_bits=max_bits, calibration="minmax")
    if m.rounding == "mse":
        return nearest
    if m.rounding == "gptq":
        made = gptq_weight(damp=m.damp, **grid)
    elif m.rounding == "decoupleq":
        made = decoupleq_weight(max_bits=max_bits)
    else:
        rule, optimizer = (
            RULES[m.rounding][0](),
            optax.adam(optax.cosine_decay_schedule(m.rate, m.num_iters)),
        )
        made = learned_weight(
            rule, optimizer, num_iters=m.num_iters, batch_size=m.batch_size, **grid
        )
    return lambda i: nearest(i) if i.x is None else made(i)


def acts(f: Family, m: Method):
    """The activations' grids: one static affine grid per tensor, but for what a rewrite has of its own."""
    if f.kind == "resnet":
        return searched_act(f.wide, num=m.num_search)

    def act(i: SiteInput):
        bits = jnp.maximum(i.bits, 8.0) if i.site in f.broad else i.bits
        if m.rewrite == "repquant" and i.site == "probs":
            return calib_log(i.x, bits)
        if m.rewrite == "mambaquant" and i.site in ("h", "C"):
            return PerToken(bits)
        s, z = calib_affine_quantile(i.x, bits)
        q_max = 2.0**bits - 1
        return Affine(s, z, jnp.zeros_like(q_max), q_max)

    return act


def arm(f: Family, m: Method, max_w_bits: int = 8) -> dict[str, Any]:
    """The arguments of `site_study` beside net, data and cells: method, transform, around, beside, wide."""
    if m.rounding not in (*ROUNDING, *BLOCKS) or m.rewrite not in REWRITES:
        raise UserError(
            f"rounding={m.rounding!r}, rewrite={m.rewrite!r}: use one of {', '.join((*ROUNDING, *BLOCKS))} "
            f"and of {', '.join(REWRITES)}"
        )
    if not fits(m, f.kind):
        raise UserError(f"{m.rounding}, {m.rewrite} is not for nets of kind {f.kind!r}")
    if m.rounding in BLOCKS:
        return _block_arm(f, m, max_w_bits)
    act, weight = acts(f, m), rounding(m)
    weight = by_width(weight, weight, f.wide)
    made: dict[str, Any] = {"method": site_by_site(act=act, weight=weight), "wide": f.wide}
    if f.kind == "mamba" and m.rewrite != "none":
        smooth_only = {"smoothing": ("s1", "s2"), "rotations": ()}
        made["transform"] = mambaquant(f.net, **(smooth_only if m.rewrite == "smooth" else {}))
    elif m.rewrite == "smooth":
        made["method"] = linked(LINKS, smooth(), act, weight)
    elif m.rewrite == "repquant":
        made["method"] = linked(LINKS, reparam(steps=m.num_iters), act, weight)
    return made


def _block_arm(f: Family, m: Method, max_w_bits: int) -> dict[str, Any]:
    assert f.norms is not None
    net, params = f.norms
    whole = m.rounding == "pd_quant"
    share = 1.0 if m.rounding == "brecq" else 0.5
    fit = Fit(2 * m.num_iters, m.batch_size, m.rate, m.step_rate)
    parts = Parts() if whole else Parts(lamb_r=None)
    grid: dict[str, Any] = {"calibration": "shares", "max_bits": max_w_bits}
    method = pd_quant(parts, fit, wide=f.wide, num_search=m.num_search, **grid)

    def around(key: jax.Array, name: str, x):
        # the twin's norms are those of the plain net: it rescales what lies behind them
        del name
        steps = m.dc_steps if whole else 0
        inputs = correct_inputs(net, params(key), x, lamb_c=LAMB_C, n=steps)
        return beside(inputs, share, share)

    return {"method": method, "around": True, "beside": around, "wide": f.wide}


class Timed(NamedTuple):
    """study: the state of a study. seconds: f32[C], of each cell. memory: f32[], MiB of its program.

    packed: f32[C, 3], seconds of the float net and of the packed one, their `gap`; zeros where it was not measured.
    """

    study: StudyState
    seconds: jax.Array
    memory: jax.Array
    packed: jax.Array


Measure = Callable[[int, StudyState], tuple[float, float, float]]


def timed(
    study: Experiment[StudyState], cells: Sequence[Cell], measure: Measure | None = None
) -> Experiment[Timed]:
    """The study with the time of each cell (compiling left out) and the memory of its program.

    measure: (cell, state at its end) -> the row of `Timed.packed`.
    """
    (phase,) = study.phases
    per_cell = phase.num_steps // len(cells)
    compiled: list[Any] = []

    def init(key):
        zeros = jnp.zeros(len(cells))
        return Timed(study.init(key), zeros, jnp.zeros(()), jnp.zeros((len(cells), 3)))

    def step(state: Timed):
        if not compiled:
            program = jax.jit(phase.step).lower(state.study).compile()
            compiled.extend((program, _mebibytes(program)))
        c, at = divmod(int(state.study.step), per_cell)
        start = time.perf_counter()
        new, metrics = jax.block_until_ready(compiled[0](state.study))
        seconds = state.seconds.at[c].add(time.perf_counter() - start)
        packed = state.packed
        if measure is not None and at == per_cell - 1:
            packed = packed.at[c].set(jnp.asarray(measure(c, new)))
        return Timed(new, seconds, jnp.float32(compiled[1]), packed), metrics

    def evaluate(state: Timed):
        values = dict(study.evaluate(state.study))
        for i, cell in enumerate(cells):
            values[f"{cell.name}/seconds"] = state.seconds[i]
            values[f"{cell.name}/memory"] = state.memory
            for j, name in enumerate(PACKED if measure is not None else ()):
                values[f"{cell.name}/{name}"] = state.packed[i, j]
        return values

    host = Phase(phase.name, phase.num_steps, step, "host")
    return Experiment(init, evaluate, (host,), seed_layout="map")


def _mebibytes(program: Any) -> float:
    """What a compiled program holds beside its arguments, MiB; 0 where the backend does not say."""
    found = program.memory_analysis()
    if found is None:
        return 0.0
    return (found.temp_size_in_bytes + found.output_size_in_bytes) / 2**20


def narrowed(
    blocks: Sequence[QuantizedBlock], bits: int, wide: Mapping[str, int] | None = None
) -> tuple[QuantizedBlock, ...]:
    """Blocks whose codes were stored wider than their grid, at the width of the grid, so that they pack."""

    def at(site: str, qt):
        return dataclasses.replace(qt, bits=min(qt.bits, (wide or {}).get(site, bits)))

    return tuple(b._replace(weights={s: at(s, qt) for s, qt in b.weights.items()}) for b in blocks)


def measure_once(f: Family, cells: Sequence[Cell], x: Any) -> Measure:
    """A `Measure` on inputs x; later seeds are told what the first one measured, since times are of the machine."""
    known: dict[int, tuple[float, float, float]] = {}

    def measure(i: int, state: StudyState) -> tuple[float, float, float]:
        if i not in known:
            blocks = narrowed(state.quantized, cells[i].w_bits, f.wide)
            known[i] = packed_beside_float(f.net, state.params, blocks, x)
        return known[i]

    return measure


def packed_beside_float(
    net: BlockNet, params: Sequence[Params], blocks: Sequence[QuantizedBlock], x: Any
) -> tuple[float, float, float]:
    """(seconds of the float net, of the packed one, gap) for a pass over x, jitted: medians of 11, interleaved.

    gap: largest |packed - fake-quantized| output over the largest fake-quantized one.
    """
    blocks = tuple(blocks)
    programs = [
        jax.jit(partial(net.apply, params)),
        jax.jit(lambda x: run_blocks(net, blocks, x, packed_run)),
    ]
    want = run_blocks(net, blocks, x, fake_run)
    gap = jnp.abs(programs[1](x) - want).max() / jnp.abs(want).max()
    times: list[list[float]] = [[], []]
    jax.block_until_ready(programs[0](x))
    for _ in range(11):
        for f, found in zip(programs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(f(x))
            found.append(time.perf_counter() - start)
    return float(np.median(times[0])), float(np.median(times[1])), float(gap)
