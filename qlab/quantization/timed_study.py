"""What tables of quantization leave out, added to a `site_study`: seconds per cell without compiling, the memory of the
program, and the packed net beside the float one.

Letters: C = cells.
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

from qlab.lab.experiment import Experiment, Phase
from qlab.nn.sites import BlockNet, Params
from qlab.quantization.blocks import QuantizedBlock, fake_run, packed_run, run_blocks
from qlab.quantization.site_study import Cell
from qlab.quantization.site_study import State as StudyState

PACKED = ("float_time", "packed_time")
MOST_GAP = 0.05  # mean, of the mean output: where sums round otherwise a code moves by a step, and what is behind it


class Timed(NamedTuple):
    """study: the state of a study. memory: f32[], MiB of its program.

    wall_s: f32[C], seconds of each cell. wall_packed_s: f32[C, 2], of a pass of the float net and of the packed one; zeros
    where it was not measured. Clocks ("wall") are not part of what a resumed run must repeat.
    """

    study: StudyState
    memory: jax.Array
    wall_s: jax.Array
    wall_packed_s: jax.Array


Measure = Callable[[int, StudyState], tuple[float, float]]


def timed(
    study: Experiment[StudyState], cells: Sequence[Cell], measure: Measure | None = None
) -> Experiment[Timed]:
    """The study with the time of each cell (compiling left out) and the memory of its program.

    measure: (cell, state at its end) -> the row of `Timed.wall_packed_s`.
    """
    (phase,) = study.phases
    per_cell = phase.num_steps // len(cells)
    compiled: list[Any] = []

    def init(key):
        return Timed(
            study.init(key), jnp.zeros(()), jnp.zeros(len(cells)), jnp.zeros((len(cells), 2))
        )

    def step(state: Timed):
        if not compiled:
            program = jax.jit(phase.step).lower(state.study).compile()
            compiled.extend((program, _mebibytes(program)))
        c, at = divmod(int(state.study.step), per_cell)
        start = time.perf_counter()
        new, metrics = jax.block_until_ready(compiled[0](state.study))
        seconds = state.wall_s.at[c].add(time.perf_counter() - start)
        packed = state.wall_packed_s
        if measure is not None and at == per_cell - 1:
            packed = packed.at[c].set(jnp.asarray(measure(c, new)))
        return Timed(new, jnp.float32(compiled[1]), seconds, packed), metrics

    def evaluate(state: Timed):
        values = dict(study.evaluate(state.study))
        for i, cell in enumerate(cells):
            values[f"{cell.name}/seconds"] = state.wall_s[i]
            values[f"{cell.name}/memory"] = state.memory
            for j, name in enumerate(PACKED if measure is not None else ()):
                values[f"{cell.name}/{name}"] = state.wall_packed_s[i, j]
        return values

    own = phase.widest
    widest = None if own is None else lambda s: s._replace(study=own(s.study))
    host = Phase(phase.name, phase.num_steps, step, "host", widest)
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


def measure_once(
    net: BlockNet, cells: Sequence[Cell], x: Any, wide: Mapping[str, int] | None = None
) -> Measure:
    """A `Measure` on inputs x, codes packed at each cell's width or as `wide` says; later seeds are told what the first one measured, since times are of the machine."""
    known: dict[int, tuple[float, float]] = {}

    def measure(i: int, state: StudyState) -> tuple[float, float]:
        if i not in known:
            blocks = narrowed(state.quantized, cells[i].w_bits, wide)
            *times, gap = packed_beside_float(net, state.params, blocks, x)
            if gap > MOST_GAP:
                raise RuntimeError(
                    f"{cells[i].name}: the packed net's outputs are {gap:.3g} of their size away from the fake-quantized one's"
                )
            known[i] = times[0], times[1]
        return known[i]

    return measure


def packed_beside_float(
    net: BlockNet, params: Sequence[Params], blocks: Sequence[QuantizedBlock], x: Any
) -> tuple[float, float, float]:
    """(seconds of the float net, of the packed one, gap) for a pass over x, jitted: medians of 11, interleaved.

    gap: mean |packed - fake-quantized| output over the mean fake-quantized one.
    """
    blocks = tuple(blocks)
    programs = [
        jax.jit(partial(net.apply, params)),
        jax.jit(lambda x: run_blocks(net, blocks, x, packed_run)),
    ]
    want = run_blocks(net, blocks, x, fake_run)
    gap = jnp.abs(programs[1](x) - want).mean() / jnp.abs(want).mean()
    times: list[list[float]] = [[], []]
    jax.block_until_ready(programs[0](x))
    for _ in range(11):
        for f, found in zip(programs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(f(x))
            found.append(time.perf_counter() - start)
    return float(np.median(times[0])), float(np.median(times[1])), float(gap)
