"""What a study would take, before hours are spent on it: each arm's first step at full shapes, its memory, and the time left.

Nothing is written. Of every arm one seed is initialised and a few steps of each phase run, at the phase's widest unit if
it names one (`Phase.widest`), so the estimate is an upper bound there. A phase on the host that names none is tried
only if it is an arm's first: a later one may read what the earlier ones found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qlab.lab import loop
from qlab.lab.config import Config
from qlab.lab.console import Console, clock
from qlab.lab.device import peak_memory_mb
from qlab.lab.experiment import Experiment, Phase, as_experiment

SPAN_S = 1.0  # steps are repeated until this long


class Trial(NamedTuple):
    """One arm. init_s, compile_s: once a seed, once a phase. steps_s: of all steps of all seeds, an estimate; NaN where a
    phase could not be tried. memory_mb: the process' peak so far. untried: names of phases."""

    arm: str
    init_s: float
    compile_s: float
    steps_s: float
    memory_mb: float
    untried: tuple[str, ...] = ()

    def total_s(self, seeds: int) -> float:
        return seeds * self.init_s + self.compile_s + self.steps_s


def try_arm(build: Any, config: Config, console: Console, label: str) -> Trial:
    """Initialises one seed of an arm and runs a few steps of each phase."""
    exp = as_experiment(build(config))
    begun = time.perf_counter()
    with console.waiting(f"{label}: init"):
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        state = jax.block_until_ready(exp.init(key))
    init_s = time.perf_counter() - begun
    compile_s, steps_s, untried = 0.0, 0.0, []
    for i, phase in enumerate(exp.phases):
        if i and phase.loop == "host" and phase.widest is None:
            untried.append(phase.name)
            continue
        with console.waiting(f"{label}: {phase.name}"):
            state, first, each = _try_phase(exp, phase, state, config.seeds)
        compile_s += max(first - each, 0.0)
        steps_s += each * phase.num_steps
    return Trial(config.arm, init_s, compile_s, steps_s, peak_memory_mb(), tuple(untried))


def _try_phase(exp: Experiment, phase: Phase, state: Any, seeds: int) -> tuple[Any, float, float]:
    """(state after a step, seconds of the first step with compiling, seconds of a step of all seeds)."""
    side_by_side = exp.seed_layout == "vmap" and phase.loop != "host"
    num = seeds if side_by_side else 1
    start = state if phase.widest is None else phase.widest(state)
    begun = time.perf_counter()

    def fresh() -> loop.Carry:
        carry = loop.begin(loop.stack([start] * num), phase, num, np.full(num, -1, np.int32))
        return loop.place(carry, num, exp.seed_layout)

    runner = loop.compile_phase(phase, fresh(), num, exp.seed_layout)
    after = runner.advance(fresh(), 1)
    jax.block_until_ready(after.states)
    first = time.perf_counter() - begun
    kept = loop.unstack(after.states, num)[0]
    spent, steps, n = 0.0, 0, 1
    while spent < SPAN_S and steps < phase.num_steps:
        carry = fresh()
        begun = time.perf_counter()
        jax.block_until_ready(runner.advance(carry, n).states)
        spent += time.perf_counter() - begun
        steps += n
        if phase.widest is None:  # the widest step is always the first
            n = min(2 * n, phase.num_steps)
    each = spent / max(steps, 1)
    return kept, first, each if side_by_side else each * seeds


def table(trials: Sequence[Trial], seeds: int) -> str:
    """One line an arm, and the sum."""
    width = max(len(t.arm) for t in trials)
    lines = [
        f"{t.arm:{width}}  init {clock(t.init_s)} a seed, compiling {clock(t.compile_s)}, steps at most {clock(t.steps_s)}"
        f", {seeds} seeds {clock(t.total_s(seeds))}; peak memory {t.memory_mb:.0f} MB"
        + (f"; not tried: {', '.join(t.untried)}" if t.untried else "")
        for t in trials
    ]
    whole = sum(t.total_s(seeds) for t in trials)
    more = " and the phases not tried" if any(t.untried for t in trials) else ""
    return "\n".join([*lines, f"in all about {clock(whole)}{more}"])
