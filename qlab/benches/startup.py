"""From typing `python -m qlab.run` to the first step: interpreter, imports, init, compilation.

Contestants, each a process of its own:
    cold      a run with an empty cache folder: nothing trained, nothing compiled
    warm      the same run again: the net and the compiled programs come from the cache
    help      python -m qlab.run --help
    bare_jax  a process that imports JAX and runs one jitted addition, without a cache: the bound
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlab.benches.measure import Number, Sample, Tell, find, interleave, ratio
from qlab.lab.experiment import Claim, Figure, Metric

# The stretch that ends at each moment of a traced start.
STAGES = {
    "python": "the interpreter",
    "qlab": "import of qlab.run, with the config",
    "jax": "import of JAX",
    "device": "JAX's back end",
    "experiment": "import of the experiment",
    "build": "the rest of the study, and build(config)",
    "init": "init of all seeds",
    "compile": "compilation of the first phase",
    "first_step": "the first chunk, one step long",
}
METRICS = {
    "total": Metric("s", "lower", "start of the process to the end of the first step"),
    **{name: Metric("s", "lower", text) for name, text in STAGES.items()},
    "to_bare_jax": Metric("times", "lower", "total over that of bare_jax"),
}
GOALS: tuple[Claim, ...] = ()
FIGURES = (Figure("Start to first step", "bars", "total", ylabel="s"),)
BARE_JAX = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"


def settings(quick: bool) -> dict[str, Any]:
    return {
        "study": "flexround:smoke",
        "repetitions": 3 if quick else 7,
        "at_least": 1 if quick else 3,
        "budget_s": 18.0 if quick else 300.0,
    }


def _environment(cache: Path) -> dict[str, str]:
    """This process's, with a cache folder of its own, compilations kept, and qlab to be found."""
    dropped = ("QLAB_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, env.get("PYTHONPATH", "")) if p)
    return {**env, "QLAB_CACHE": str(cache), "PYTHONPATH": path}


def _process(arguments: list[str], cache: Path) -> tuple[float, float]:
    """Runs python with these arguments: (time since the epoch at the start, seconds it took)."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, *arguments], env=_environment(cache), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}: {last}")
    return start, time.time() - start


def traced(study: str, cache: Path) -> Sample:
    """One start of a study to its first step: seconds of each stage, and in total."""
    with tempfile.TemporaryDirectory(prefix="qlab-bench-") as folder:
        out = Path(folder) / "moments.json"
        words = ["-m", "qlab.benches.traced_start", str(out), "--"]
        words += ["--config", study, "--workdir", str(Path(folder) / "run")]
        start, _ = _process(words, cache)
        if not out.is_file():
            raise RuntimeError(f"{study} ended before its first step")
        return stages(start, json.loads(out.read_text()))


def stages(start: float, moments: dict[str, float]) -> Sample:
    """Moments -> durations.

    >>> stages(10.0, {"python": 10.5, "qlab": 11.0})
    {'python': 0.5, 'qlab': 0.5, 'total': 1.0}
    """
    at = sorted(moments.items(), key=lambda m: m[1])
    steps = {b[0]: b[1] - a[1] for a, b in pairwise([("", start), *at])}
    return {**steps, "total": at[-1][1] - start}


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    tell(f"startup: {s['study']}, up to {s['repetitions']} repetitions")
    with tempfile.TemporaryDirectory(prefix="qlab-bench-") as folder:
        caches: list[Path] = []

        def cold() -> Sample:
            caches.append(Path(folder) / str(len(caches)))
            return traced(s["study"], caches[-1])

        def warm() -> Sample:
            return traced(s["study"], caches[-1])

        def seconds(*arguments: str) -> Sample:
            return {"total": _process(list(arguments), Path(folder))[1]}

        numbers = interleave(
            {
                "cold": cold,
                "warm": warm,
                "help": lambda: seconds("-m", "qlab.run", "--help"),
                "bare_jax": lambda: seconds("-c", BARE_JAX),
            },
            s["repetitions"],
            s["budget_s"],
            s["at_least"],
        )
    return [
        *numbers,
        *(ratio(numbers, a, "bare_jax", "total", "to_bare_jax") for a in ("cold", "warm")),
    ]


def summary(numbers: list[Number]) -> str:
    def text(arm: str) -> str:
        parts = ("init", "compile")
        of = ", ".join(f"{p} {find(numbers, arm, p).median:.1f}" for p in parts)
        return f"{arm} {find(numbers, arm, 'total').median:.1f} s ({of})"

    rest = ", ".join(f"{a} {find(numbers, a, 'total').median:.2f} s" for a in ("help", "bare_jax"))
    return f"first step after {text('cold')}, {text('warm')}; {rest}"
