"""One arm of a study, from init or its newest checkpoint to its result rows."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab import checkpoint, loop, records
from qlab.lab.board import Board, finite_mean
from qlab.lab.config import Config
from qlab.lab.console import Console
from qlab.lab.device import cache_folder, peak_memory_mb
from qlab.lab.experiment import Experiment, Metric, as_experiment
from qlab.lab.signals import Stop

MAX_SAVE_SHARE = 0.02  # saving takes at most this share of the time between saves


class Context(NamedTuple):
    """What an arm needs to know of its study.

    columns: the fields that every result row of the study shares. metrics: the paper's METRICS.
    """

    workdir: Path
    config_hash: str
    columns: dict[str, Any]
    metrics: dict[str, Metric]
    console: Console
    stop: Stop
    label: str


class Outcome(NamedTuple):
    """rows: of results.jsonl. diverged: {seed: global step}. skipped: it was finished before."""

    rows: list[dict[str, Any]]
    diverged: dict[int, int]
    wall_s: float
    skipped: bool


class _Position(NamedTuple):
    phase: int
    carry: loop.Carry
    metrics_bytes: int
    wall_s: float
    diverged: dict[int, int]


def run_arm(build: Any, config: Config, ctx: Context) -> Outcome:
    """Runs (or resumes, or skips) one arm.

    Args:
      build: the paper's build(config). config: the arm's merged config.
    Raises:
      Preempted: a signal or the time limit; the state is saved. UserError: see checkpoint.restore.
    """
    folder = ctx.workdir / config.arm
    done_file = folder / "done.json"
    if done_file.is_file():
        done = records.read_json(done_file)
        ctx.console.say(f"{ctx.label}: finished before ({done['commit'] or 'no commit'}), skipped")
        diverged = {int(k): v for k, v in done["diverged"].items()}
        return Outcome(records.read_jsonl(folder / "results.jsonl"), diverged, done["wall_s"], True)
    with records.guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ctx.stop.check()
    exp = as_experiment(build(config))
    start = time.monotonic()
    at = _start(exp, config, ctx, folder)
    log = records.JsonLines(folder / "metrics.jsonl", at.metrics_bytes)
    board = Board(ctx.workdir / "tensorboard" / config.arm)
    try:
        at = _run_phases(exp, config, ctx, folder, at, log, board, start)
    finally:
        log.close()
        board.close()
    wall_s = at.wall_s + time.monotonic() - start
    rows = _evaluate(exp, config, ctx, folder, at, wall_s)
    records.write_json(
        done_file,
        {
            "steps": exp.num_steps,
            "wall_s": round(wall_s, 3),
            "config_hash": ctx.config_hash,
            "commit": ctx.columns["commit"],
            "diverged": at.diverged,
            "state_sha256": checkpoint.digest(at.carry.states),
        },
    )
    ctx.stop.check()
    return Outcome(rows, at.diverged, wall_s, False)


def _start(exp: Experiment, config: Config, ctx: Context, folder: Path) -> _Position:
    """The newest whole checkpoint, else freshly initialised states."""
    saves, num = folder / "checkpoints", config.seeds
    keys = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(num)]
    seeds, rest = loop.shardings(num, exp.seed_layout)

    with ctx.console.waiting(f"{ctx.label}: init"):
        if not checkpoint.steps(saves):
            states = []
            for key in keys:
                states.append(exp.init(key))
                ctx.stop.check()
            return _Position(0, _begin(exp, 0, loop.stack(states), num), 0, 0.0, {})
        one = loop.stack([exp.init(keys[0])])  # only its structure is used

    def like(extra: dict[str, Any]) -> loop.Carry:
        wide = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype, sharding=seeds), one
        )
        shapes = jax.eval_shape(lambda s: _fresh(exp, extra["phase"], s, num), wide)

        def put(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        spread = jax.tree.map(lambda x: put(x, seeds), shapes)
        return spread._replace(done=put(shapes.done, rest))

    found = checkpoint.restore(saves, like, ctx.config_hash, ctx.console.say)
    if found is None:
        ctx.console.say(f"{ctx.label}: no whole checkpoint is left, starting again from step 0")
        states = loop.stack([exp.init(key) for key in keys])
        return _Position(0, _begin(exp, 0, states, num), 0, 0.0, {})
    ctx.console.say(f"{ctx.label}: resumed at step {found.step}/{exp.num_steps}")
    extra = found.extra
    diverged = {int(k): v for k, v in extra["diverged"].items()}
    return _Position(extra["phase"], found.state, extra["metrics_bytes"], extra["wall_s"], diverged)


def _begin(
    exp: Experiment, phase: int, states: Any, num: int, dead: tuple[int, ...] = ()
) -> loop.Carry:
    return loop.place(_fresh(exp, phase, states, num, dead), num, exp.seed_layout)


def _fresh(
    exp: Experiment, phase: int, states: Any, num: int, dead: tuple[int, ...] = ()
) -> loop.Carry:
    """The carry at the start of a phase; after the last one (or without any) there is no metric."""
    bad = np.array([-2 if i in dead else -1 for i in range(num)], np.int32)
    if phase < len(exp.phases):
        return loop.begin(states, exp.phases[phase], num, bad)
    return loop.Carry(states, {}, {}, jnp.asarray(bad), jnp.int32(0))


def _run_phases(
    exp: Experiment,
    config: Config,
    ctx: Context,
    folder: Path,
    at: _Position,
    log: records.JsonLines,
    board: Board,
    start: float,
) -> _Position:
    total, before = exp.num_steps, sum(p.num_steps for p in exp.phases[: at.phase])
    last_save, save_cost = time.monotonic(), 0.0

    def save(p: int, carry: loop.Carry, step: int) -> None:
        nonlocal last_save, save_cost
        begun = time.monotonic()
        extra = {
            "phase": p,
            "metrics_bytes": log.sync(),
            "wall_s": at.wall_s + begun - start,
            "diverged": at.diverged,
        }
        checkpoint.save(
            folder / "checkpoints", step, carry, extra, ctx.config_hash, config.keep_checkpoints
        )
        last_save = time.monotonic()
        save_cost = last_save - begun

    for p in range(at.phase, len(exp.phases)):
        phase = exp.phases[p]
        if p > at.phase:
            carry = _begin(exp, p, at.carry.states, config.seeds, tuple(at.diverged))
            at = at._replace(phase=p, carry=carry)
        carry = at.carry
        if len(at.diverged) == config.seeds:
            break
        if int(carry.done) < phase.num_steps:
            name = f"compiling {config.experiment}/{config.arm}/{phase.name}"
            wait = ctx.console.waiting(name, cache_folder("times") / "compile.json")
            with wait if phase.loop != "host" else contextlib.nullcontext():
                runner = loop.compile_phase(phase, carry, config.seeds, exp.seed_layout)
            ctx.stop.check()
            with ctx.console.progress(f"{ctx.label} {phase.name}", total, before + int(carry.done)):
                for now, window in loop.run_phase(phase, carry, runner, config.log_points):
                    carry = now  # the older one's buffers are donated
                    step = before + int(carry.done)
                    if window is not None:
                        at = at._replace(diverged=_note_dead(carry, at.diverged, before, ctx))
                        rows = _metric_rows(window, config, phase.name, before, at.diverged)
                        log.write(rows)
                        board.add(rows, step)
                        loss = window.means.get("loss")
                        note = "" if loss is None else f"loss {finite_mean(loss):.4g}"
                        ctx.console.update(step, total, note)
                    due = max(config.checkpoint_every_s, save_cost / MAX_SAVE_SHARE)
                    if ctx.stop.why or time.monotonic() - last_save > due:
                        save(p, carry, step)
                        ctx.stop.check()
                    if len(at.diverged) == config.seeds:
                        break
            at = at._replace(carry=carry, diverged=_note_dead(carry, at.diverged, before, ctx))
        before += phase.num_steps
    if exp.phases:
        save(at.phase, at.carry, before)
    ctx.stop.check()
    return at


def _note_dead(
    carry: loop.Carry, known: dict[int, int], before: int, ctx: Context
) -> dict[int, int]:
    new = {
        i: before + int(b) for i, b in enumerate(np.asarray(carry.bad)) if b >= 0 and i not in known
    }
    for seed, step in new.items():
        ctx.console.say(
            f"{ctx.label}: seed {seed} became non-finite at step {step}; it is frozen there"
        )
    return {**known, **new}


def _metric_rows(
    window: loop.Window, config: Config, phase: str, before: int, diverged: dict[int, int]
) -> list[dict[str, Any]]:
    at = {"arm": config.arm, "phase": phase, "step": before + window.phase_step}
    return [
        {
            **at,
            "phase_step": window.phase_step,
            "seed": seed,
            "metrics": {k: float(v[seed]) for k, v in sorted(window.means.items())},
        }
        for seed in range(config.seeds)
        if seed not in diverged
    ]


def _evaluate(
    exp: Experiment, config: Config, ctx: Context, folder: Path, at: _Position, wall_s: float
) -> list[dict[str, Any]]:
    name = f"compiling {config.experiment}/{config.arm}/evaluate"
    with ctx.console.waiting(name, cache_folder("times") / "compile.json"):
        evaluate = loop.compile_evaluate(exp, at.carry.states, config.seeds)
    ctx.stop.check()
    with ctx.console.waiting(f"{ctx.label}: evaluate"):
        values = evaluate(at.carry.states)
    scalars = {k: v for k, v in values.items() if v.ndim == 1}
    arrays = {k: v for k, v in values.items() if v.ndim > 1}
    if arrays:
        tmp = folder / ".arrays.tmp.npz"
        with records.guard(tmp):
            np.savez_compressed(tmp, allow_pickle=False, **arrays)
            tmp.replace(folder / "arrays.npz")
    rows = result_rows(scalars, config.arm, config.seeds, exp, at.diverged, wall_s, ctx)
    records.write_atomic(folder / "results.jsonl", "".join(records.dumps(r) + "\n" for r in rows))
    return rows


def result_rows(
    scalars: dict[str, np.ndarray],
    arm: str,
    num_seeds: int,
    exp: Experiment,
    diverged: dict[int, int],
    wall_s: float,
    ctx: Context,
) -> list[dict[str, Any]]:
    """One row a number; names "task/metric" are split at the last slash."""
    rows = []
    for name, values in sorted(scalars.items()):
        task, _, metric = name.rpartition("/")
        spec = ctx.metrics.get(metric, Metric())
        fallbacks = scalars.get(
            f"{task}/fallbacks" if task else "fallbacks", scalars.get("fallbacks")
        )
        for seed in range(num_seeds):
            dead = seed in diverged
            rows.append(
                {
                    **ctx.columns,
                    "arm": arm,
                    "task": task,
                    "metric": metric,
                    "unit": spec.unit,
                    "better": spec.better,
                    "value": None if dead else float(values[seed]),
                    "seed": seed,
                    "step": diverged.get(seed, exp.num_steps),
                    "wall_s": round(wall_s, 3),
                    "peak_mem_mb": peak_memory_mb(),
                    "seed_layout": exp.seed_layout,
                    "status": "nonfinite" if dead else "ok",
                    "fallbacks": 0 if fallbacks is None else float(fallbacks[seed]),
                }
            )
    return rows
