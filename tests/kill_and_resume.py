"""Kills runs at random instants, resumes them, and compares with the uninterrupted run, bit for bit.

    python tests/kill_and_resume.py --papers flexround,q_star,arsq,vqe_zne --kills 20
    python tests/kill_and_resume.py --papers flexround --term    SIGTERM in every phase: exit 75, resume

Compared are all result values and step metrics but wall-clock times (unit "s", or "wall" in the
name), and the digests of the final states.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("importing", "init", "compiling", "steps", "evaluate", "save")


def start(spec: str, workdir: Path, cwd: Path | None = None) -> subprocess.Popen:
    """Starts `python -m qlab.run`; plain lines on its stdout tell the phase it is in."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qlab.run", "--config", spec, "--workdir", str(workdir)]
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd or ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def numbers(workdir: Path) -> dict:
    """All a run found, less clocks."""
    out = {}
    for line in (workdir / "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        if r["unit"] != "s" and "wall" not in r["metric"]:
            out[r["arm"], r["task"], r["metric"], r["seed"]] = r["value"]
    for done in sorted(workdir.glob("*/done.json")):
        arm = done.parent.name
        out[arm, "state"] = json.loads(done.read_text())["state_sha256"]
        for i, line in enumerate((done.parent / "metrics.jsonl").read_text().splitlines()):
            row = json.loads(line)
            row["metrics"] = {
                k: v for k, v in row["metrics"].items() if "wall" not in k and k != "time"
            }
            out[arm, "metrics", i] = row
    return out


def difference(a: dict, b: dict) -> str:
    """The first difference of two runs, "" if there is none."""
    for key in sorted({*a, *b}, key=str):
        if a.get(key, "absent") != b.get(key, "absent"):
            return f"{key}: {a.get(key, 'absent')} against {b.get(key, 'absent')}"
    return ""


def finish(spec: str, workdir: Path, cwd: Path | None = None) -> float:
    """Runs to the end. Returns seconds."""
    begun = time.monotonic()
    process = start(spec, workdir, cwd)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{spec}: exit {process.returncode}\n{output}")
    return time.monotonic() - begun


def kills(
    spec: str, num: int, folder: Path, seed: int, cwd: Path | None = None, chain: int = 5
) -> list[float]:
    """Kills `num` times, `chain` of them in one folder before it may finish. Returns the instants."""
    rng = random.Random(seed)
    whole = folder / "whole"
    finish(
        spec, folder / "warm", cwd
    )  # fills the compilation cache, so that the next time is typical
    took = finish(spec, whole, cwd)
    expected, instants = numbers(whole), []
    warm = difference(expected, numbers(folder / "warm"))
    if warm:
        raise SystemExit(f"{spec}: two whole runs differ: {warm}")
    for first in range(0, num, chain):
        workdir = folder / f"killed{first}"
        for _ in range(min(chain, num - first)):
            process = start(spec, workdir, cwd)
            after = rng.uniform(0.0, took)
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            instants.append(after)
        finish(spec, workdir, cwd)
        if found := difference(expected, numbers(workdir)):
            raise SystemExit(f"{spec}: a killed and resumed run differs: {found}")
    return instants


def terminate(spec: str, phase: str, folder: Path, cwd: Path | None = None) -> int:
    """SIGTERM once a line of that phase is seen; the exit code, and the resumed run is compared."""
    whole = folder / "whole"
    if not whole.exists():
        finish(spec, whole, cwd)
    workdir = folder / phase
    process = start(spec, workdir, cwd)
    assert process.stdout is not None
    if phase == "save":  # no line tells: a checkpoint's folder is being filled
        while process.poll() is None and not list(workdir.glob("*/checkpoints/*")):
            time.sleep(0.0005)
        process.send_signal(signal.SIGTERM)
    else:
        for line in process.stdout:
            if (phase if phase != "steps" else "compiling") in line:
                time.sleep(0.3 if phase == "steps" else 0.0)
                process.send_signal(signal.SIGTERM)
                break
    process.communicate()
    code = process.returncode
    if code not in (75, -signal.SIGTERM, 0):
        raise SystemExit(f"{spec}: SIGTERM during {phase} ended in exit {code}")
    finish(spec, workdir, cwd)
    if found := difference(numbers(whole), numbers(workdir)):
        raise SystemExit(f"{spec}: stopped during {phase} and resumed, it differs: {found}")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--papers", default="flexround,q_star,arsq,vqe_zne")
    parser.add_argument("--variant", default="smoke")
    parser.add_argument("--kills", type=int, default=20, help="for each paper")
    parser.add_argument("--term", action="store_true", help="SIGTERM in each phase instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for paper in args.papers.split(","):
        spec = f"{paper}:{args.variant}"
        folder = Path(tempfile.mkdtemp(prefix=f"kill_{paper}_"))
        if args.term:
            codes = {phase: terminate(spec, phase, folder) for phase in PHASES}
            print(f"{spec}: exit codes {codes}; every resumed run is equal bit for bit", flush=True)
        else:
            at = kills(spec, args.kills, folder, args.seed)
            print(
                f"{spec}: {len(at)} kills at {min(at):.1f} to {max(at):.1f} s; all equal bit for bit",
                flush=True,
            )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
