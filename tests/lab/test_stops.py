"""Real signals: SIGTERM wherever a run can be, a second one, and SIGKILL at random instants."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qlab
from qlab.lab import arm, checkpoint, loop
from qlab.lab.errors import Preempted
from qlab.lab.signals import listen
from qlab.run import main

SCRIPT = Path(__file__).resolve().parents[1] / "kill_and_resume.py"
spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
assert spec is not None
assert spec.loader is not None
kill_and_resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_and_resume)


def sigterm_then(function):
    """`function`, but a SIGTERM arrives while it runs, the first time."""
    seen = []

    def wrapped(*args, **kwargs):
        if not seen:
            seen.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return function(*args, **kwargs)

    return wrapped


PLACES = {
    "init": (loop, "stack"),
    "compilation": (loop, "compile_phase"),
    "chunk": (loop, "Window"),
    "compiling evaluate": (loop, "compile_evaluate"),
    "evaluate": (loop, "over_seeds"),
    "save": (checkpoint, "save"),
    "writing results": (arm, "result_rows"),
}


@pytest.mark.parametrize("place", PLACES)
def test_sigterm_ends_in_75_and_the_resumed_run_is_equal(toy, monkeypatch, capsys, place):
    args = ["--config", "toy.py:smoke", "--arms", "big", "--config.host_steps=3"]
    assert main([*args, "--workdir", "whole"]) == 0
    with monkeypatch.context() as m:
        module, name = PLACES[place]
        m.setattr(module, name, sigterm_then(getattr(module, name)))
        assert main([*args, "--workdir", "w"]) == 75
    assert (
        "stopped by SIGTERM; everything is saved, the same command resumes"
        in capsys.readouterr().err
    )
    assert json.loads(Path("w/manifest.json").read_text())["status"] == "preempted"
    assert main([*args, "--workdir", "w"]) == 0
    assert not kill_and_resume.difference(
        kill_and_resume.numbers(Path("whole")), kill_and_resume.numbers(Path("w"))
    )


def test_sigint_is_a_stop_too_and_handlers_are_put_back(toy, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "kill", lambda pid, _, kill=os.kill: kill(pid, signal.SIGINT))
    monkeypatch.setattr(loop, "compile_phase", sigterm_then(loop.compile_phase))
    with pytest.raises(Preempted, match="SIGINT"):
        qlab.run("toy.py:smoke", workdir="w", quiet=True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_flag_is_up_at_once_and_check_raises():
    with listen() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stop.why == "SIGTERM"
        with pytest.raises(Preempted):
            stop.check()


def test_a_second_signal_leaves_at_once_even_from_compiled_code():
    code = (
        "import os, signal, time, threading\n"
        "from qlab.lab.signals import listen\n"
        "import numpy as np\n"
        "with listen():\n"
        "    print('ready', flush=True)\n"
        "    a = np.random.randn(9000, 9000); np.linalg.svd(a)\n"  # minutes without a bytecode
    )
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "second signal" in err


@pytest.mark.slow
def test_kills_of_the_toy(toy, monkeypatch):
    text = (
        toy.read_text()
        .replace("checkpoint_every_s=30.0", "")
        .replace("seeds=4,", "seeds=4, checkpoint_every_s=0.05,")
    )
    toy.write_text(
        text.replace("host_steps=0", "host_steps=40").replace("pause_s=0.0", "pause_s=0.01", 1)
    )
    at = kill_and_resume.kills(
        "toy.py", 3, toy.parent, seed=int(time.time()), cwd=toy.parent, chain=3
    )
    assert len(at) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("paper", ["flexround", "q_star", "arsq", "vqe_zne"])
def test_kills_of_the_papers(paper, tmp_path):
    seed = int(time.time())
    print(f"seed {seed}")
    at = kill_and_resume.kills(f"{paper}:smoke", 3, tmp_path, seed)
    assert len(at) == 3
