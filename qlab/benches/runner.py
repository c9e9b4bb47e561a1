"""The runner's loop over a bare jitted loop of the same step, and how long checkpoints stall it.

Contestants, all with the same step over the same seeds (vmapped):
    bare     one jitted fori_loop that keeps the last metrics: the bound
    program  the runner's compiled chunk: sums of metrics, finite checks, frozen seeds
    runner   qlab.lab.loop.run_phase as qlab.lab.arm drives it, at the default settings: chunks,
             windows, metrics.jsonl, event files, progress, signals, checkpoints
Bare and program are compared in pieces of a fiftieth of a second, so that a busy machine meets both;
a whole phase is bare against runner. From the two parts, time a step and time a window, follows
overhead_10s: what the runner adds to a phase of 10 s. Compiling, evaluating and the save at the end
of an arm are left out (last_stall has that save).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches.measure import Number, Sample, Tell, find, interleave, percent_over
from qlab.benches.runner_parts import STEPS, run_arm
from qlab.lab import arm as arms
from qlab.lab import checkpoint, loop
from qlab.lab import config as configs
from qlab.lab.experiment import Claim, Experiment, Figure, Metric, Phase

SOURCE = "goal"
METRICS = {
    "overhead_10s": Metric("%", "lower", "over bare for a phase of 10 s: step_overhead + windows"),
    "step_ms": Metric("ms", "lower", "one step of all seeds"),
    "step_overhead": Metric("%", "lower", "step_ms over that of bare"),
    "window_ms": Metric("ms", "lower", "host time of one log window"),
    "window_cpu_ms": Metric("ms", "lower", "processor time of it, little disturbed by others"),
    "seconds": Metric("s", "lower", "wall time of a whole phase"),
    "overhead": Metric("%", "lower", "seconds over those of bare"),
    "save_s": Metric("s", "lower", "one checkpoint"),
    "stall": Metric("%", "lower", "share of wall time in which the loop waits for checkpoints"),
    "last_stall": Metric("%", "none", "the same with the save at the end of the arm"),
    "stall_by_rule": Metric("%", "lower", "the share that save_s gives at the default interval"),
}
GOALS = (
    *(
        Claim(
            f"the runner adds at most 1 % to a phase of 10 s ({task} steps)",
            SOURCE,
            ("runner", f"{task}/overhead_10s"),
            "<=",
            1.0,
        )
        for task in ("0.1ms", "1ms", "mlp")
    ),
    *(
        Claim(
            f"checkpoints stall a state of {size} at most 2 %",
            SOURCE,
            ("runner", f"{size}/stall"),
            "<=",
            2.0,
            note="without the save at the end of the arm",
        )
        for size in ("1MB", "100MB")
    ),
)
FIGURES = (
    Figure("Added to a phase of 10 s", "bars", "overhead_10s", ylabel="%"),
    Figure("Share of wall time in checkpoints", "bars", "stall", ylabel="%"),
)


def settings(quick: bool) -> dict[str, Any]:
    """loop_s, stall_s: seconds of one repetition (0 = none); budget_s: of all those of one task."""
    default = configs.base("bench")
    return {
        "tasks": ("0.1ms", "mlp") if quick else ("0.1ms", "1ms", "mlp"),
        "seeds": default.seeds,
        "log_points": default.log_points,
        "piece_s": 0.02,
        "pieces": 60 if quick else 300,
        "loop_s": 1.0 if quick else 4.0,
        "repetitions": 3 if quick else 7,
        "budget_s": 8.0 if quick else 200.0,
        "states_mb": (1, 100),
        "saves": 5,
        "stall_s": 0.0 if quick else 40.0,
        "stall_repetitions": 3,
    }


# ---- contestants --------------------------------------------------------------------------------


def bare(init: Callable, step: Callable, seeds: int) -> tuple[Callable[[], Any], Callable]:
    """(fresh stacked states, compiled (states, n) -> (states, last metrics))."""

    def fresh():
        return loop.stack([init(jax.random.fold_in(jax.random.key(0), i)) for i in range(seeds)])

    def run(states, n):
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(jax.vmap(step), states)[1]
        )
        return jax.lax.fori_loop(0, n, lambda _, c: jax.vmap(step)(c[0]), (states, zero))

    return fresh, jax.jit(run, donate_argnums=0).lower(fresh(), jnp.int32(1)).compile()


def bare_seconds(fresh: Callable, run: Callable, num_steps: int) -> float:
    states = jax.block_until_ready(fresh())
    start = time.perf_counter()
    jax.block_until_ready(run(states, np.int32(num_steps)))
    return time.perf_counter() - start


def step_seconds(fresh: Callable, run: Callable) -> float:
    """A rough time of one step, to choose how many fill a repetition."""
    n = 20
    while (took := bare_seconds(fresh, run, n)) < 0.2:
        n *= 4
    return took / n


def pieces(phase: Phase, fresh: Callable, run: Callable, n: int, s: dict[str, Any]) -> list[Number]:
    """Time a step in bare and in program, n steps in turn."""
    bad = np.full(s["seeds"], -1, np.int32)
    endless = phase._replace(num_steps=2**30)
    carry = loop.place(loop.begin(fresh(), endless, s["seeds"], bad), s["seeds"], "vmap")
    advance = loop.compile_phase(endless, carry, s["seeds"], "vmap").advance
    at: dict[str, Any] = {"bare": fresh(), "program": carry}
    step = {
        "bare": lambda states: run(states, np.int32(n))[0],
        "program": lambda carry: advance(carry, n),
    }

    def piece(arm: str) -> Sample:
        start = time.perf_counter()
        at[arm] = jax.block_until_ready(step[arm](at[arm]))
        return {"step_ms": 1e3 * (time.perf_counter() - start) / n}

    found = interleave({arm: lambda arm=arm: piece(arm) for arm in at}, s["pieces"])
    return [*found, percent_over(found, "program", "bare", "step_ms", "step_overhead")]


def overhead(task: str, s: dict[str, Any], tell: Tell) -> list[Number]:
    init, step = STEPS[task]()
    fresh, run = bare(init, step, s["seeds"])
    once = step_seconds(fresh, run)
    num_steps = max(100, round(s["loop_s"] / once))
    tell(f"runner: {task}, {num_steps} steps of {1e3 * once:.3g} ms")
    phase = Phase("train", num_steps, step)
    exp = Experiment(init, lambda _: {"none": jnp.zeros(())}, (phase,))
    numbers = pieces(phase, fresh, run, max(1, round(s["piece_s"] / once)), s)

    def whole() -> Sample:
        t = run_arm(exp, s["seeds"])
        host = t["loop"] - t["chunks"]
        windows = max(t["windows"], 1)
        return {
            "seconds": t["loop"],
            "window_ms": 1e3 * host / windows,
            "window_cpu_ms": 1e3 * t["cpu"] / windows,
        }

    numbers += interleave(
        {"bare": lambda: {"seconds": bare_seconds(fresh, run, num_steps)}, "runner": whole},
        s["repetitions"],
        s["budget_s"],
    )
    numbers.append(percent_over(numbers, "runner", "bare", "seconds", "overhead"))
    numbers.append(over_phase(numbers, s["log_points"], 10.0))
    return [n._replace(name=f"{task}/{n.name}") for n in numbers]


def over_phase(numbers: list[Number], windows: int, seconds: float) -> Number:
    """What the runner adds to a phase of so many seconds of steps, in percent.

    >>> parts = [Number("program", "step_overhead", (0.5,)), Number("runner", "window_ms", (0.3,))]
    >>> over_phase(parts, 100, 10.0).values
    (0.8,)
    """
    steps = find(numbers, "program", "step_overhead").median
    host = find(numbers, "runner", "window_ms").values
    values = tuple(steps + 100 * windows * 1e-3 * ms / seconds for ms in host)
    return Number("runner", f"overhead_{seconds:.0f}s", values)


# ---- checkpoints --------------------------------------------------------------------------------


def stall(size_mb: int, s: dict[str, Any], tell: Tell) -> list[Number]:
    """Saves of a state of so many MB (all seeds together), alone and in an arm at default settings."""
    seeds = s["seeds"]
    count = size_mb * 10**6 // 4 // seeds

    def init(key):
        return {"i": jnp.int32(0), "big": jax.random.normal(key, (count,))}

    def step(state):
        busy = jnp.sin(jnp.arange(1 << 16, dtype=jnp.float32) + state["i"]).sum()
        return {**state, "i": state["i"] + 1}, {"loss": busy}

    fresh, run = bare(init, step, seeds)
    states = fresh()

    def one_save() -> Sample:
        with tempfile.TemporaryDirectory(prefix="qlab-bench-") as folder:
            start = time.perf_counter()
            checkpoint.save(Path(folder), 1, states, {}, "", 2)
            cost = time.perf_counter() - start
        due = max(configs.base("bench").checkpoint_every_s, cost / arms.MAX_SAVE_SHARE)
        return {"save_s": cost, "stall_by_rule": 100 * cost / (due + cost)}

    tell(f"runner: checkpoints of {size_mb} MB")
    one_save()  # imports orbax
    numbers = interleave({"runner": one_save}, s["saves"])
    if s["stall_s"]:
        num_steps = round(s["stall_s"] / step_seconds(fresh, run))
        phase = Phase("train", num_steps, step)
        exp = Experiment(init, lambda _: {"none": jnp.zeros(())}, (phase,))
        tell(f"runner: arms of {s['stall_s']:g} s with a state of {size_mb} MB")

        def one_arm() -> Sample:
            t = run_arm(exp, seeds)
            return {
                "stall": 100 * sum(t["saves"][:-1]) / t["loop"],
                "last_stall": 100 * sum(t["saves"]) / (t["loop"] + t["saves"][-1]),
            }

        numbers += interleave({"runner": one_arm}, s["stall_repetitions"])
    return [n._replace(name=f"{size_mb}MB/{n.name}") for n in numbers]


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    numbers = [n for task in s["tasks"] for n in overhead(task, s, tell)]
    return numbers + [n for size in s["states_mb"] for n in stall(size, s, tell)]


def summary(numbers: list[Number]) -> str:
    def parts(arm: str, metric: str) -> str:
        found = [n for n in numbers if n.arm == arm and n.name.endswith("/" + metric)]
        return ", ".join(f"{n.name.split('/')[0]} {n.median:.2f} %" for n in found)

    measured = parts("runner", "stall") or f"{parts('runner', 'stall_by_rule')} by rule"
    return f"adds to a phase of 10 s {parts('runner', 'overhead_10s')}; checkpoint stall {measured}"
