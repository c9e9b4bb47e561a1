"""Trials of a sweep, and where they run.

A RunSpec is one `python -m qlab.run` with a folder of its own. It can be started any number of times:
a finished one is skipped, an unfinished one resumes. A Launcher starts RunSpecs and says which have
ended; `run_all` drives one over a list. Imports no JAX.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlab.lab import records, study
from qlab.lab.errors import AllSeedsDiverged, Preempted, UserError, nearest
from qlab.lab.signals import Stop

MAX_RESUMES = 20  # of one trial that others keep stopping; then it counts as failed
MAX_REASON = 300  # characters
POLL_S = 0.05  # how soon the end of a process is noticed
WAIT_S = 0.1  # how soon a signal is
LATER = ("ray", "slurm")  # launchers that are planned
HOPELESS = (UserError.code, AllSeedsDiverged.code)  # the same input ends the same way


class RunSpec(NamedTuple):
    """One run.

    Attributes:
      config: path or name, with ":variant". overrides: {dotted key: value}. arms: () means all.
      seeds: None means the config's. workdir: its own folder. options: further words for qlab.run.
    """

    config: str
    overrides: Mapping[str, Any]
    arms: tuple[str, ...]
    seeds: int | None
    workdir: Path
    options: tuple[str, ...] = ()


def text(value: Any) -> str:
    """A config value as `--config.key=` takes it.

    >>> text(0.001), text((64, 64)), text("relu"), text(None)
    ('0.001', '(64, 64)', 'relu', 'None')
    """
    return value if isinstance(value, str) else repr(value)


def words(spec: RunSpec) -> list[str]:
    """The arguments of qlab.run for a spec."""
    out = ["--config", spec.config, *(f"--config.{k}={text(v)}" for k, v in spec.overrides.items())]
    out += ["--arms", ",".join(spec.arms)] if spec.arms else []
    out += ["--seeds", str(spec.seeds)] if spec.seeds is not None else []
    return [*out, *spec.options, "--workdir", str(spec.workdir)]


def command(spec: RunSpec) -> str:
    """The shell command that runs (or resumes) a spec by itself."""
    return shlex.join(["python", "-m", "qlab.run", *words(spec)])


def plan(spec: RunSpec) -> study.Plan:
    """What the command would run, from the very words on it. Raises UserError if it cannot."""
    overrides = {key: text(value) for key, value in spec.overrides.items()}
    return study.plan(
        spec.config, overrides=overrides, arms=spec.arms, seeds=spec.seeds, workdir=spec.workdir
    )


def is_done(spec: RunSpec) -> bool:
    """Whether every arm asked for has finished with numbers, under this very config."""
    p = plan(spec)
    try:
        manifest = records.read_json(p.workdir / "manifest.json")
        return (
            manifest["config_hash"] == p.config_hash
            and manifest["status"] in ("done", "partial")
            and all(manifest["arm_status"].get(a) == "done" for a in p.arms)
        )
    except (UserError, KeyError, TypeError):
        return False


class Outcome(NamedTuple):
    """How a process ended: exit code (-n: killed by signal n), why in one line, how long it ran."""

    code: int
    reason: str
    wall_s: float


class Launcher(NamedTuple):
    """Where trials run.

    Attributes:
      slots: how many at once.
      submit: (spec, log file) -> a handle; what the process prints is appended to the log.
      wait: timeout in seconds -> {handle: Outcome} of those that ended since; {} at the time-out.
      stop: asks all that run to save and end.
    """

    slots: int
    submit: Callable[[RunSpec, Path], int]
    wait: Callable[[float], dict[int, Outcome]]
    stop: Callable[[], None]


class Event(NamedTuple):
    """Something happened to a trial.

    Attributes:
      id: of the trial. attempt: how often it has been started.
      kind: "started"; "done"; "failed" for good; "retry" or "resume" (it is queued again);
        "stopped" because the sweep was.
      outcome: of the process that ended, None for "started".
    """

    id: str
    kind: Literal["started", "done", "failed", "retry", "resume", "stopped"]
    attempt: int
    outcome: Outcome | None = None


def run_all(
    specs: Mapping[str, RunSpec], launcher: Launcher, logs: Path, stop: Stop, *, retry: int = 0
) -> Generator[Event, None, None]:
    """Runs all specs, in order, as many at once as the launcher has slots, and tells what happens.

    Args:
      specs: {id: spec}. logs: folder for <id>.txt. stop: once it is up, nothing more is started and
        what runs is asked to save; the iterator ends when all of it has.
      retry: how often a failure is attempted again. Bad input (exit 2) and arms without a finite
        seed (exit 3) are not: they would end the same way. A run that was stopped (exit 75) goes on
        where it was and is no failure.
    """
    queue = collections.deque(specs)
    started, failures, resumes = (collections.Counter[str]() for _ in range(3))
    running: dict[int, str] = {}
    asked = False

    def ended(name: str, outcome: Outcome) -> Event:
        def event(kind: Any) -> Event:
            return Event(name, kind, started[name], outcome)

        if outcome.code == 0:
            return event("done")
        if outcome.code in HOPELESS:
            return event("failed")
        if asked:
            return event("stopped")
        if outcome.code in (Preempted.code, -signal.SIGTERM, -signal.SIGINT):
            resumes[name] += 1
            return event("resume" if resumes[name] <= MAX_RESUMES else "failed")
        failures[name] += 1
        return event("retry" if failures[name] <= retry else "failed")

    try:
        while queue or running:
            while queue and len(running) < launcher.slots and not stop.why:
                name = queue.popleft()
                started[name] += 1
                running[launcher.submit(specs[name], logs / f"{name}.txt")] = name
                yield Event(name, "started", started[name])
            if stop.why and not asked:
                launcher.stop()
                asked = True
            if stop.why and not running:
                return
            for handle, outcome in launcher.wait(WAIT_S).items():
                event = ended(running.pop(handle), outcome)
                if event.kind in ("retry", "resume"):
                    queue.append(event.id)
                yield event
    finally:  # the caller gave up in the middle: leave no process behind
        if running:
            launcher.stop()
            while running:
                for handle in launcher.wait(WAIT_S):
                    running.pop(handle)


def launcher(name: str, jobs: int) -> Launcher:
    """The launcher of that name. Raises UserError if there is none, or for jobs < 1."""
    if name in LATER:
        raise UserError(f"--launcher {name} is not there yet; use --launcher local --jobs N")
    if name != "local":
        raise UserError(f"unknown launcher {name!r}{nearest(name, ['local', *LATER])}")
    if jobs < 1:
        raise UserError(f"--jobs {jobs} runs nothing; give 1 or more")
    return local(jobs)


class _Process(NamedTuple):
    popen: subprocess.Popen[bytes]
    slot: int
    log: Path
    log_start: int
    start: float


def local(jobs: int = 1) -> Launcher:
    """Up to `jobs` processes on this machine, each on its own share of the processor cores."""
    running: dict[int, _Process] = {}
    free = list(range(jobs))
    shares = cpu_shares(_cpus(), jobs)
    environment = _environment(jobs)

    def submit(spec: RunSpec, log: Path) -> int:
        argv = [sys.executable, "-m", "qlab.lab.launch", *words(spec)]
        slot = free.pop(0)
        with records.guard(log), log.open("ab") as out:
            out.write(f"$ {command(spec)}\n".encode())
            out.flush()
            log_start = out.tell()
            with _pinned(shares[slot]):
                popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,  # never written to: it ends when this process does
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C comes through us, once
                )
        running[popen.pid] = _Process(popen, slot, log, log_start, time.monotonic())
        return popen.pid

    def wait(timeout_s: float) -> dict[int, Outcome]:
        deadline = time.monotonic() + timeout_s
        while True:
            ended = {pid: p for pid, p in running.items() if p.popen.poll() is not None}
            if ended or time.monotonic() > deadline or not running:
                break
            time.sleep(POLL_S)
        out = {}
        for pid, p in ended.items():
            del running[pid]
            free.append(p.slot)
            assert p.popen.stdin is not None
            p.popen.stdin.close()
            code, wall_s = p.popen.returncode, time.monotonic() - p.start
            out[pid] = Outcome(code, _reason(code, p.log, p.log_start), round(wall_s, 3))
        return out

    def stop() -> None:
        for p in running.values():
            p.popen.terminate()

    return Launcher(jobs, submit, wait, stop)


def _cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def cpu_shares(cpus: Sequence[int], jobs: int) -> list[list[int]]:
    """Which cores each of `jobs` slots gets: even shares; in turn where there are more jobs than cores.

    >>> cpu_shares([0, 1, 2, 3], 2), cpu_shares([0, 1], 3), cpu_shares([4, 5, 6], 2)
    ([[0, 1], [2, 3]], [[0], [1], [0]], [[4], [5, 6]])
    """
    n = len(cpus)
    if n < jobs:
        return [[cpus[i % n]] if n else [] for i in range(jobs)]
    return [list(cpus[i * n // jobs : (i + 1) * n // jobs]) for i in range(jobs)]


@contextlib.contextmanager
def _pinned(cpus: Sequence[int]) -> Iterator[None]:
    """A process started in here inherits these cores; this thread gets its own back at the end."""
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def _environment(jobs: int) -> dict[str, str]:
    """XLA splits sums by the number of its threads, so a process that saw only its share of the cores
    would get other last bits than `qlab.run` alone. NPROC keeps that number what it would be alone.
    """
    env = dict(os.environ)
    if jobs > 1 and (cpus := _cpus()):
        env.setdefault("NPROC", str(len(cpus)))
    if jobs > 1:  # each process would take three quarters of a GPU's memory at its start
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.3f}")
    root = Path(__file__).resolve().parents[2]
    if "site-packages" not in root.parts:  # a checkout that is not installed
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH", "")]))
    return env


def _reason(code: int, log: Path, start: int) -> str:
    if code == 0:
        return ""
    with log.open("rb") as f:
        f.seek(start)
        last = last_error(f.read().decode(errors="replace"))
    last = last if len(last) <= MAX_REASON else f"{last[:MAX_REASON]}..."  # the log has all of it
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}" + (f", last line: {last}" if last else "")
    return last or f"exit code {code}, nothing printed"


def last_error(output: str) -> str:
    """The line that says why a process ended: its last `error:` line or exception, else its last line.

    >>> last_error("step 1\\nTraceback (most recent call last):\\n  File x\\nValueError: too big\\nby far\\n")
    'ValueError: too big'
    >>> last_error("compiling\\nerror: unknown key 'a'; did you mean b?\\n")
    "unknown key 'a'; did you mean b?"
    """
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("error: "):
            return lines[i].removeprefix("error: ")
        if lines[i].startswith("Traceback (most recent call last)"):
            after = (s for s in lines[i + 1 :] if re.match(r"[A-Za-z_]", s))
            return next(after, lines[-1].strip())
    return lines[-1].strip() if lines else ""


def _end_with_the_sweep() -> None:
    """Waits until the sweep, which holds the other end of our standard input, is gone; then SIGTERM.

    So a killed sweep's trials save and stop, and a second Ctrl-C on it is their second signal.
    """
    while os.read(0, 64):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":  # the process of a trial
    threading.Thread(target=_end_with_the_sweep, daemon=True, name="qlab-sweep-is-gone").start()
    runpy.run_module("qlab.run", run_name="__main__", alter_sys=True)
