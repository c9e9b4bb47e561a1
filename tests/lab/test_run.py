"""python -m qlab.run from outside: files, resume, and every mistake a person can make."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qlab
from qlab.lab import checkpoint, records
from qlab.lab.errors import AllSeedsDiverged, Preempted, UserError
from qlab.run import main

ROOT = Path(__file__).resolve().parents[2]


def rows(workdir, name="results.jsonl"):
    return [json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()]


def numbers(workdir):
    """Everything a run found, less clocks: result values, metrics, final states."""
    workdir = Path(workdir)
    values = {
        (r["arm"], r["task"], r["metric"], r["seed"]): r["value"]
        for r in rows(workdir)
        if r["unit"] != "s"
    }
    arms = sorted({k[0] for k in values})
    metrics = {a: (workdir / a / "metrics.jsonl").read_bytes() for a in arms}
    states = {a: json.loads((workdir / a / "done.json").read_text())["state_sha256"] for a in arms}
    return values, metrics, states


def line(capsys):
    """The one line of the error."""
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err


def test_a_whole_study(toy, capsys):
    assert (
        main(["--config", "toy.py:smoke", "--workdir", "w", "--seeds", "4", "--config.lr=0.2"]) == 0
    )
    out = capsys.readouterr().out
    assert "the larger step ends nearer" in out
    assert "page: " in out
    w = Path("w")
    manifest = json.loads((w / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["arm_status"] == {"small": "done", "big": "done"}
    assert manifest["command"] == (w / "command.txt").read_text().strip()
    assert "--config.lr=0.2" in manifest["command"]
    result = rows(w)
    assert len(result) == 2 * 4 * 3
    assert {r["config_hash"] for r in result} == {manifest["config_hash"]}
    worst = [r for r in result if r["metric"] == "big_err"]
    assert {r["task"] for r in worst} == {"worst"}
    needed = "paper arm task split metric unit better value seed step wall_s peak_mem_mb device deterministic seed_layout status fallbacks config_hash commit claim claim_ref"
    assert set(needed.split()) <= set(result[0])
    with np.load(w / "big" / "arrays.npz") as arrays:
        assert arrays["w"].shape == (4, 5)
        err = [r["value"] for r in result if (r["arm"], r["metric"]) == ("big", "err")]
    assert len(err) == 4
    claims = json.loads((w / "claims.json").read_text())
    assert [c["verdict"] for c in claims] == ["HOLDS", "FAILS"]
    assert (w / "report.html").stat().st_size > 1000
    assert "nothing" not in out


def test_seeds_are_paired_and_do_not_depend_on_how_many(toy):
    a = qlab.run("toy.py:smoke", seeds=1, workdir="a", quiet=True)
    b = qlab.run("toy.py:smoke", seeds=3, workdir="b", quiet=True, overrides={"layout": "map"})
    first = {(r["arm"], r["metric"]): r["value"] for r in a.rows if r["unit"] != "s"}
    same = {
        (r["arm"], r["metric"]): r["value"] for r in b.rows if r["seed"] == 0 and r["unit"] != "s"
    }
    assert first.keys() == same.keys()
    for k in first:
        np.testing.assert_allclose(first[k], same[k], rtol=1e-5)
    assert len({r["value"] for r in b.rows if r["metric"] == "err"}) == 6
    assert [c.verdict for c in a.claims] == ["INCONCLUSIVE"] * 2  # one seed never decides


def test_finished_arms_are_skipped_and_arms_can_be_added(toy, capsys):
    assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big"]) == 0
    assert json.loads(Path("w/manifest.json").read_text())["status"] == "partial"
    before = Path("w/big/done.json").stat().st_mtime_ns
    assert main(["--config", "toy.py:smoke", "--workdir", "w"]) == 0
    assert "big: finished before" in capsys.readouterr().out
    assert Path("w/big/done.json").stat().st_mtime_ns == before
    assert json.loads(Path("w/manifest.json").read_text())["status"] == "done"
    assert {r["arm"] for r in rows("w")} == {"small", "big"}


def test_fresh_sets_the_old_run_aside(toy, capsys):
    for _ in range(2):
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big", "--fresh"]) == 0
    assert Path("w.old1/results.jsonl").is_file()


class TestStops:
    """A stop at any chunk end, then the same command: bit for bit what it would have been."""

    @pytest.fixture
    def whole(self, toy):
        qlab.run("toy.py", workdir="whole", quiet=True, overrides={"host_steps": 6})
        return numbers("whole")

    @pytest.mark.parametrize("after", [1, 7, 40, 101, 104, 108])
    def test_resume_is_bitwise(self, whole, monkeypatch, after):
        from qlab.lab import loop

        monkeypatch.setattr(loop, "CHUNK_S", 1e-4)
        original, seen = loop.run_phase, [0]

        def run_phase(*args):
            for item in original(*args):
                seen[0] += 1
                if seen[0] == after:
                    STOP[0].raise_flag("SIGTERM")
                yield item

        STOP = []
        from qlab.lab import study

        listen = study.listen

        def spy(limit):
            import contextlib

            @contextlib.contextmanager
            def wrapped():
                with listen(limit) as stop:
                    STOP[:] = [stop]
                    yield stop

            return wrapped()

        monkeypatch.setattr(study, "listen", spy)
        monkeypatch.setattr(loop, "run_phase", run_phase)
        over = {"host_steps": 6}
        with pytest.raises(Preempted):
            qlab.run("toy.py", workdir="w", quiet=True, overrides=over)
        assert json.loads(Path("w/manifest.json").read_text())["status"] == "preempted"
        qlab.run("toy.py", workdir="w", quiet=True, overrides=over)
        assert numbers("w") == whole

    def test_a_kill_between_metrics_and_checkpoint(self, whole):
        """metrics.jsonl runs ahead of the newest checkpoint; the resumed run cuts it back."""
        over = {"host_steps": 6}
        qlab.run("toy.py", workdir="w", quiet=True, overrides=over, arms=["big"])
        (Path("w") / "big" / "done.json").unlink()
        with (Path("w") / "big" / "metrics.jsonl").open("a") as f:
            f.write('{"arm": "big", "phase": "train", "st')
        qlab.run("toy.py", workdir="w", quiet=True, overrides=over)
        assert numbers("w") == whole

    def test_time_limit(self, toy):
        over = {"host_steps": 50, "pause_s": 0.1, "steps": 5, "seeds": 1}
        start = time.monotonic()
        with pytest.raises(Preempted, match="time limit"):
            qlab.run(
                "toy.py", workdir="w", quiet=True, overrides=over, time_limit_s=2.5, arms=["big"]
            )
        assert time.monotonic() - start < 4.5
        assert checkpoint.steps(Path("w/big/checkpoints"))


@pytest.mark.slow
def test_seeds_over_two_devices_and_a_checkpoint_from_there_opens_on_one(toy):
    over = {"host_steps": 30, "pause_s": 0.05}
    args = [f"--config.{k}={v}" for k, v in over.items()]
    two = {**env(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    base = [sys.executable, "-m", "qlab.run", "--config", "toy.py", "--arms", "big", *args]
    done = subprocess.run(
        [*base, "--workdir", "w", "--time-limit", "4"], env=two, capture_output=True, text=True
    )
    assert done.returncode == 75, done.stderr
    assert "cpu x 2" in json.loads(Path("w/manifest.json").read_text())["device"]
    qlab.run("toy.py", workdir="w", arms=["big"], overrides=over, quiet=True)
    qlab.run("toy.py", workdir="v", arms=["big"], overrides=over, quiet=True)
    (values, *_), (expected, *_) = numbers("w"), numbers("v")
    assert values.keys() == expected.keys()
    for k in values:
        np.testing.assert_allclose(values[k], expected[k], rtol=1e-5)


class TestDivergence:
    def test_one_seed_is_frozen_the_rest_go_on(self, toy, capsys):
        assert main(["--config", "toy.py", "--workdir", "w", "--config.bad_seed=2"]) == 0
        assert "seed 2 became non-finite at step 50" in capsys.readouterr().out
        bad = [r for r in rows("w") if r["status"] == "nonfinite"]
        assert {(r["seed"], r["step"], r["value"]) for r in bad} == {(2, 50, None)}
        assert json.loads(Path("w/manifest.json").read_text())["diverged"] == {
            "small": {"2": 50},
            "big": {"2": 50},
        }
        assert {c["verdict"] for c in json.loads(Path("w/claims.json").read_text())} <= {
            "INCONCLUSIVE",
            "FAILS",
        }
        after = [r for r in rows("w/big", "metrics.jsonl") if r["seed"] == 2]
        assert max(r["step"] for r in after) <= 50

    def test_all_seeds_exit_3_and_the_other_arm_still_runs(self, toy, capsys):
        args = ["--config", "toy.py", "--workdir", "w", "--config.arms.big.lr=1e9"]
        assert main(args) == 3
        err = line(capsys)
        assert "arm big (last at step" in err
        assert [r for r in rows("w") if r["arm"] == "small" and r["status"] == "ok"]
        with pytest.raises(AllSeedsDiverged):
            qlab.run("toy.py", workdir="w", quiet=True, overrides={"arms.big.lr": 1e9})


class TestMistakes:
    """Each gets exit 2 and one line with what, where and the remedy; nothing written is lost."""

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ([], "which study?"),
            (["--config", "toyy"], "no config 'toyy'"),
            (["--config", "toy.py:smok"], "did you mean smoke?"),
            (
                ["--config", "toy.py", "--config.lrr=1"],
                "unknown config key 'lrr'; did you mean lr?",
            ),
            (["--config", "toy.py", "--config.steps=many"], "'steps' wants int"),
            (["--config", "toy.py", "--config.steps"], "--config.steps needs a value"),
            (["--config", "toy.py", "--arms", "bigg"], "no arm 'bigg'; did you mean big?"),
            (["--config", "toy.py", "--seeds", "0"], "seeds=0 runs nothing"),
            (["--config", "toy.py", "--device", "quantum"], "unknown device 'quantum'"),
            (["--config", "toy.py", "--workdir", "toy.py/x"], "not a folder"),
            (["--config", "toy.py", "--workdir", "/proc/x"], "cannot write /proc/x"),
        ],
    )
    def test_one_line(self, toy, capsys, args, words):
        assert main(args) == 2
        assert words in line(capsys)

    def test_unknown_experiment(self, toy, capsys):
        Path("toy.py").write_text(
            Path("toy.py").read_text().replace("./toy_experiment.py", "flexrond")
        )
        assert main(["--config", "toy.py", "--workdir", "w"]) == 2
        assert "unknown experiment 'flexrond'; did you mean flexround?" in line(capsys)

    @pytest.mark.parametrize("platforms", ["", "cpu"])
    def test_a_device_that_is_not_there(self, toy, platforms, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        done = cli("--config", "toy.py:smoke", "--workdir", "w", "--device", "tpu")
        assert done.returncode == 2
        assert "device 'tpu' is not there" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr

    def test_run_in_use(self, toy, capsys):
        with records.lock(Path("w")):
            assert subprocess.run(
                [sys.executable, "-m", "qlab.run", "--config", "toy.py", "--workdir", "w"],
                env=env(),
                capture_output=True,
                text=True,
            ).stderr.startswith(f"error: w is in use by process {os.getpid()}")

    def test_another_config_in_the_folder(self, toy, capsys):
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big"]) == 0
        kept = Path("w/results.jsonl").read_bytes()
        capsys.readouterr()
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--config.lr=0.5"]) == 2
        assert "w holds a run of another config: lr was 0.1, now 0.5" in line(capsys)
        assert Path("w/results.jsonl").read_bytes() == kept

    def test_another_tree_in_the_checkpoint(self, toy, capsys):
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big"]) == 0
        Path("w/big/done.json").unlink()
        code = (
            Path("toy_experiment.py")
            .read_text()
            .replace("zero = jnp.zeros(5)", "zero = jnp.zeros(6)[:5].astype(jnp.bfloat16)")
        )
        Path("toy_experiment.py").write_text(
            code.replace(
                "w=s.w + v, velocity=v)",
                "w=(s.w + v).astype(jnp.bfloat16), velocity=v.astype(jnp.bfloat16))",
            )
        )
        capsys.readouterr()
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big"]) == 2
        err = line(capsys)
        assert ".w is float32[2,5], this run has bfloat16[2,5]" in err
        assert checkpoint.steps(Path("w/big/checkpoints"))

    def test_a_corrupt_newest_checkpoint_falls_back(self, toy, capsys, monkeypatch):
        over = ["--config.checkpoint_every_s=0.0"]
        monkeypatch.setattr("qlab.lab.arm.MAX_SAVE_SHARE", 1e9)
        assert main(["--config", "toy.py", "--workdir", "w", "--arms", "big", *over]) == 0
        good = numbers("w")
        Path("w/big/done.json").unlink()
        newest = (
            Path("w/big/checkpoints") / f"{checkpoint.steps(Path('w/big/checkpoints'))[-1]:010d}"
        )
        shutil.rmtree(newest / "state" / "d")
        capsys.readouterr()
        assert main(["--config", "toy.py", "--workdir", "w", "--arms", "big", *over]) == 0
        out = capsys.readouterr().out
        assert "is damaged" in out
        assert "resumed at step" in out
        assert numbers("w") == good

    @pytest.mark.parametrize(
        "limit_kb", [4, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 12, 40))]
    )
    def test_a_full_disk(self, toy, limit_kb):
        """A file-size limit makes every write past it fail as a full disk does."""
        code = (
            "import resource, sys; from qlab.run import main;"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_kb * 1000}, {limit_kb * 1000}));"
            "sys.exit(main(sys.argv[1:]))"
        )
        args = ["--config", "toy.py", "--workdir", "w", "--config.log_points=200"]
        done = subprocess.run(
            [sys.executable, "-c", code, *args], env=env(), capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "cannot write" in done.stderr.splitlines()[-1]
        assert main(args) == 0  # the remedy works
        qlab.run("toy.py", workdir="v", quiet=True, overrides={"log_points": 200})
        assert numbers("w") == numbers("v")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_what_the_system_says_becomes_one_line(self, tmp_path, code):
        words = r"cannot write .*x: .*; the same command then resumes"
        with pytest.raises(UserError, match=words), records.guard(tmp_path / "x"):
            raise OSError(code, os.strerror(code), str(tmp_path / "x"))

    def test_a_damaged_manifest(self, toy, capsys):
        assert main(["--config", "toy.py:smoke", "--workdir", "w", "--arms", "big"]) == 0
        Path("w/config.json").write_text("{")
        capsys.readouterr()
        assert main(["--config", "toy.py:smoke", "--workdir", "w"]) == 2
        assert "w/config.json is damaged" in line(capsys)

    def test_an_arm_that_is_no_folder_name(self, toy, capsys):
        text = (
            Path("toy.py")
            .read_text()
            .replace("dict(small=dict(lr=0.01), ", 'dict(**{"up/there": dict(lr=0.01)}, ')
        )
        Path("toy.py").write_text(text)
        assert main(["--config", "toy.py", "--workdir", "w"]) == 2
        assert "'up/there' cannot be a folder name" in line(capsys)


def env():
    return {**os.environ, "PYTHONPATH": str(ROOT), "QLAB_COMPILATION_CACHE": "off"}


def cli(*args):
    return subprocess.run(
        [sys.executable, "-m", "qlab.run", *args], env=env(), capture_output=True, text=True
    )


def test_help_and_list_are_quick_and_import_no_jax(toy):
    for flag in ("--help", "--list"):
        code = (
            "import sys; from qlab.run import main\n"
            f"try: main(['{flag}'])\nexcept SystemExit: pass\n"
            "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
        )
        times = []
        for _ in range(3):
            start = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", code], env=env(), capture_output=True, text=True
            )
            times.append(time.monotonic() - start)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
        assert min(times) < 1.0
