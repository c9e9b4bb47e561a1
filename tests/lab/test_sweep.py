"""python -m qlab.sweep on a tiny study, in real processes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qlab
from qlab.lab import explain, records, trials
from qlab.lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = '''"""Toy (Nobody 2026): a mean of random numbers."""
from qlab.lab.config import base, grid

CONVENTIONS = {"opt.tie": ("odd",), "scale": (1.0, 2.0), "unused": ("b",)}


def get_config(variant=""):
    c = base("./toy_exp.py", seeds=2, steps=4, scale=1.0, crash="", unused="a", sleep=0.0,
             widths=(8, 8), flag=False, own=0, checkpoint_every_s=0.2)
    c.opt = dict(tie="even", lr=0.5)
    c.arms = dict(one=dict(own=1), two=dict(own=2))
    return c


def sweep():
    yield from grid({"scale": (1.0, 2.0), "opt.lr": (0.25, 0.5), "flag": (True,)})
'''
EXPERIMENT = """
import os, time
from typing import Any, NamedTuple
import jax, jax.numpy as jnp
from qlab.lab.experiment import Claim, Experiment, Metric, Phase

METRICS = {"err": Metric("", "lower")}
CLAIMS = (Claim("two is lower", "Table 1", ("two", "err"), "<=", ("one", "err")),)


class State(NamedTuple):
    key: Any
    step: Any
    x: Any


def build(c):
    if c.crash:
        raise ValueError(f"told to crash: {c.crash}")
    factor = {"even": 1.0, "odd": 3.0}[c.opt.tie] * c.scale / c.own

    def init(key):
        return State(key, jnp.int32(0), jnp.float32(0.0))

    def step(s):
        time.sleep(c.sleep if os.path.exists(f"hold-{c.arm}") else 0)
        noise = jax.random.normal(jax.random.fold_in(s.key, s.step), ())
        return s._replace(step=s.step + 1, x=s.x + c.opt.lr * (noise - s.x)), {"x": s.x}

    def evaluate(s):
        big = jnp.sum(jnp.sin(jax.random.normal(s.key, (200, 3000))))  # its last bits tell the threads
        return {"err": factor * jnp.abs(s.x), "big": big, "cores": len(os.sched_getaffinity(0))}

    return Experiment(init, evaluate, (Phase("walk", c.steps, step, loop="host"),), jittable=False)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def study(tmp_path, monkeypatch, cache):
    (tmp_path / "toy.py").write_text(CONFIG)
    (tmp_path / "toy_exp.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("QLAB_CACHE", str(cache))
    return tmp_path


def python(*words, **kwargs):
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, **kwargs)


def sweep(*words):
    return python("qlab.sweep", "--config", "toy.py", *words)


def book(folder="s"):
    return json.loads((Path(folder) / "sweep.json").read_text())


def overrides(**kwargs):
    return [t.overrides for t in trials.plan("toy.py", **kwargs).trials]


# --- what the trials are -------------------------------------------------------------------------


def test_grid_is_every_combination_typed_like_the_config(study):
    found = overrides(grid={"steps": "1, 2", "opt.lr": "1,1e-3", "flag": "true"})
    assert found == [
        {"steps": s, "opt.lr": lr, "flag": True} for s in (1, 2) for lr in (1.0, 0.001)
    ]
    assert [type(v) for v in found[0].values()] == [int, float, bool]


@pytest.mark.parametrize("text", ["(4,4),(8,)", "[4,4],[8]", "4,4;8", "(4, 4) ; 8;"])
def test_tuples_in_brackets_or_between_semicolons(study, text):
    assert overrides(grid={"widths": text}) == [{"widths": (4, 4)}, {"widths": (8,)}]


def test_strings_with_commas(study):
    assert overrides(grid={"unused": "x,y;z"}) == [{"unused": "x,y"}, {"unused": "z"}]
    assert overrides(grid={"unused": "x,y;"}) == [{"unused": "x,y"}]


def test_values_from_python_may_be_numpy_numbers(study):
    assert overrides(grid={"opt.lr": np.array([0.5, 1.0]), "steps": np.arange(2)}) == overrides(
        grid={"opt.lr": "0.5,1", "steps": "0,1"}
    )


def test_without_grid_the_configs_own_sweep(study):
    p = trials.plan("toy.py")
    assert [t.overrides for t in p.trials] == [
        {"scale": s, "opt.lr": lr, "flag": True} for s in (1.0, 2.0) for lr in (0.25, 0.5)
    ]
    assert p.axes == {"scale": [1.0, 2.0], "opt.lr": [0.25, 0.5], "flag": [True]}


def test_explain_flips_one_switch_at_a_time(study):
    p = trials.plan("toy.py", explain=True)
    # scale=1.0 is what the config has already
    assert [t.overrides for t in p.trials] == [
        {},
        {"opt.tie": "odd"},
        {"scale": 2.0},
        {"unused": "b"},
    ]


def test_folder_names_are_readable_stable_and_differ(study):
    p = trials.plan("toy.py", grid={"opt.lr": "0.001", "widths": "(4,4)", "unused": "a/b c"})
    (trial,) = p.trials
    assert trial.id.startswith("lr=0.001,widths=4x4,unused=a_b_c-")
    # the name is the hash of what runs: text or number, order of axes, other folder, no matter
    (same,) = trials.plan("toy.py", grid={"opt.lr": [1e-3], "widths": [(4, 4)], "unused": ["a/b c"]},
                          workdir="elsewhere").trials  # fmt: skip
    assert same.id == trial.id
    (other,) = trials.plan(
        "toy.py", grid={"opt.lr": "0.001", "widths": "(4,4)", "unused": "a/b_c"}
    ).trials
    assert other.id != trial.id
    (long,) = trials.plan("toy.py", grid={"widths": [(1, 2, 3, 4, 5)]}).trials
    assert long.id.startswith("widths=1x..x5-")
    (reseeded,) = trials.plan("toy.py", seeds=3, grid={"opt.lr": "0.001"}).trials
    (plain,) = trials.plan("toy.py", grid={"opt.lr": "0.001"}).trials
    assert reseeded.id != plain.id


def test_the_sweep_folder_depends_on_base_and_axes(study):
    def folder(**kwargs):
        return str(trials.plan("toy.py", **kwargs).workdir)

    first = folder(grid={"steps": "1,2"})
    assert first.startswith("runs/toy-sweep-")
    assert folder(grid={"steps": [1, 2]}) == first
    others = [
        folder(grid={"steps": "1,3"}),
        folder(grid={"steps": "1,2"}, seeds=3),
        folder(grid={"steps": "1,2"}, overrides={"scale": "3"}),
        folder(explain=True),
        folder(),
    ]
    assert len({first, *others}) == 6


def test_repeated_trials_run_once(study):
    p = trials.plan("toy.py", grid={"checkpoint_every_s": "1,2", "steps": "1,2,1"})
    assert [t.overrides["steps"] for t in p.trials] == [1, 2]
    assert any("repeat" in note for note in p.notes)


def test_every_trial_command_gives_back_its_config(study):
    grid = {
        "widths": "(4,4);(8,)",
        "unused": "it's,x;None",
        "flag": "true,false",
        "opt.lr": "1e-30",
    }
    p = trials.plan("toy.py", grid=grid, overrides={"scale": "2"}, arms=["one"])
    for t in p.trials:
        given = [w for w in trials.launch.words(t.spec) if w.startswith("--config.")]
        assert dict(w.removeprefix("--config.").split("=", 1) for w in given) == {
            "scale": "2.0", **{k: v if isinstance(v, str) else repr(v) for k, v in t.overrides.items()}
        }  # fmt: skip
        assert trials.launch.plan(t.spec).config_hash == t.config_hash


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"grid": {"stepz": "1"}}, "did you mean steps"),
        ({"grid": {"opt.lrr": "1"}}, r"did you mean opt\.lr"),
        ({"grid": {"steps": "1,two"}}, "wants int"),
        ({"grid": {"steps": [1.5]}}, "wants int"),
        ({"grid": {"steps": "1,,2"}}, "wants int"),
        ({"grid": {"steps": []}}, "no values"),
        ({"grid": {"steps": 3}}, "sequence"),
        ({"grid": {"unused": [None]}}, "command line"),  # there it would be the word None
        ({"grid": {"widths": "4,8"}}, "brackets"),
        ({"grid": {"opt": "1"}}, "is a group"),
        ({"grid": {"seeds": "0"}}, "runs nothing"),
        ({"grid": {"steps": "1"}, "overrides": {"steps": "2"}}, "drop one"),
        ({"grid": {"seeds": "1"}, "seeds": 2}, "drop one"),
        ({"grid": {"own": "3,4"}}, r"every arm sets own itself.*arms\.one\.own"),
        ({"grid": {"steps": "1"}, "explain": True}, "either"),
        ({"grid": {"steps": "1"}, "arms": ["oen"]}, "did you mean one"),
    ],
)
def test_bad_input_is_refused(study, kwargs, says):
    with pytest.raises(UserError, match=says):
        trials.plan("toy.py", **kwargs)


def test_an_arms_own_key_can_be_swept(study):
    assert overrides(grid={"arms.one.own": "3,4"}) == [{"arms.one.own": 3}, {"arms.one.own": 4}]
    (study / "toy.py").write_text(CONFIG.replace("two=dict(own=2)", "two=dict()"))
    (note,) = trials.plan("toy.py", grid={"own": "1,2"}).notes
    assert "does not change in arm one" in note


def test_configs_that_have_no_sweep_or_conventions(study):
    (study / "toy.py").write_text(CONFIG.split("def sweep")[0].replace("CONVENTIONS", "OTHER"))
    with pytest.raises(UserError, match="--grid KEY=V1,V2"):
        trials.plan("toy.py")
    with pytest.raises(UserError, match="CONVENTIONS = "):
        trials.plan("toy.py", explain=True)


def test_refused_before_anything_is_written(study):
    for words in (["--grid", "stepz=1"], ["--grid", "steps=1", "--launcher", "ray"],
                  ["--grid", "steps=1", "--retry", "-1"], ["--grid", "steps=1", "steps=2"]):  # fmt: skip
        done = sweep(*words)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not (study / "runs").exists()


def test_help_and_list_are_quick_and_import_no_jax(study):
    code = "import sys; from qlab.sweep import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    listed = ["--config", "toy.py", "--list"]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *listed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5  # 0.2 s on a quiet machine
    assert done.stdout.count("to do  python -m qlab.run --config toy.py") == 4
    assert not (study / "runs").exists()


# --- running them --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_trial_a_rerun_and_python(study):
    words = [
        "--grid",
        "crash=,bang",
        "scale=1,2",
        "--jobs",
        "2",
        "--arms",
        "one,two",
    ]
    done = sweep(*words, "--workdir", "s")
    assert done.returncode == 1, done.stderr
    found = book()
    assert [t["status"] for t in found["trials"]] == ["done", "done", "failed", "failed"]
    assert [t["attempts"] for t in found["trials"]] == [1, 1, 1, 1]
    assert "4 trials: 2 done, 0 skipped (finished before), 2 failed, 0 retried" in done.stdout
    for t in found["trials"][2:]:
        assert t["reason"] == "ValueError: told to crash: bang"
        (line,) = [x for x in done.stdout.splitlines() if x.startswith("failed") and t["id"] in x]
        assert t["reason"] in line
        assert f"rerun: {t['command']};" in line
    assert (study / "s" / "report.html").stat().st_size > 1000

    # each job ran on its own cores, and that changed no bit of what a run alone gives
    alone = python("qlab.run", "--config", "toy.py", "--config.scale=2.0", "--workdir", "alone")
    assert alone.returncode == 0, alone.stderr
    here = {(r["arm"], r["metric"], r["seed"]): r["value"] for r in records.read_jsonl(Path("alone/results.jsonl"))}  # fmt: skip
    there = {(r["arm"], r["metric"], r["seed"]): r["value"]
             for r in records.read_jsonl(Path(found["trials"][1]["workdir"]) / "results.jsonl")}  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    assert all(there[k] <= max(1, (cores + 1) // 2) for k in there if k[1] == "cores")
    assert {k: v for k, v in here.items() if k[1] != "cores"} == {
        k: v for k, v in there.items() if k[1] != "cores"
    }

    # mended by hand with the command of the digest; then only the other broken one is left
    mended = EXPERIMENT.replace("if c.crash:", "if c.crash and c.scale == 1:")
    (study / "toy_exp.py").write_text(mended)
    command = found["trials"][3]["command"]
    mend = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True)
    assert mend.returncode == 0, mend.stderr
    again = qlab.sweep(
        "toy.py",
        {"crash": ["", "bang"], "scale": (1.0, 2.0)},
        arms=["one", "two"],
        workdir="s",
        quiet=True,
    )
    skipped = [t["id"] for t in found["trials"] if t["id"] != found["trials"][2]["id"]]
    assert list(again.skipped) == skipped
    (left,) = again.failed
    assert left["id"] == found["trials"][2]["id"]
    assert left["attempts"] == 2
    # from Python and from the command line it is the same sweep
    assert [t["command"] for t in again.trials] == [t["command"] for t in found["trials"]]
    assert book()["axes"] == found["axes"]
    assert book()["config_hash"] == found["config_hash"]
    assert trials.plan("toy.py", grid={"crash": ["", "bang"], "scale": [1, 2]}).command == (
        "python -m qlab.sweep --config toy.py --grid crash=,bang --grid scale=1.0,2.0"
    )
    assert {r["scale"] for r in again.rows} == {1.0, 2.0}


@pytest.mark.slow
def test_more_values_in_the_same_folder_keep_the_earlier_trials(study):
    first = qlab.sweep("toy.py", {"steps": (1,)}, workdir="s", arms=["one"], quiet=True)
    more = qlab.sweep("toy.py", {"steps": (1, 2)}, workdir="s", arms=["one"], quiet=True)
    assert len(more.skipped) == 1
    assert not more.failed
    last = qlab.sweep("toy.py", {"steps": (2,)}, workdir="s", arms=["one"], quiet=True)
    assert [t["overrides"] for t in last.trials] == [{"steps": 2}]
    assert sorted(t["overrides"]["steps"] for t in book()["trials"]) == [1, 2]
    assert sorted(book()["axes"]["steps"]) == [1, 2]
    with pytest.raises(UserError, match="another config"):
        qlab.sweep("toy.py", {"steps": (1,)}, workdir="s", overrides={"scale": 2.0}, quiet=True)
    with pytest.raises(UserError, match="single run"):
        qlab.sweep("toy.py", {"steps": (1,)}, workdir=first.trials[0]["workdir"], quiet=True)
    (study / "s" / "sweep.json").write_text('{"cut')
    rebuilt = qlab.sweep("toy.py", {"steps": (1, 2)}, workdir="s", arms=["one"], quiet=True)
    assert len(rebuilt.skipped) == 2


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def processes(of):
    """Process ids whose command line names the folder."""
    found = []
    for p in Path("/proc").iterdir():
        try:
            if p.name.isdigit() and of in (p / "cmdline").read_text():
                found.append(int(p.name))
        except OSError:
            pass
    return found


def started(words, arm="one"):
    """A sweep in the background whose slow trial has come into an arm's steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qlab.sweep", "--config", "toy.py", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: any(p.stat().st_size for p in Path().glob(f"s/sleep=0.*/{arm}/metrics.jsonl")))
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_killed_stopped_resumed(study):
    folder = str(study / "s")
    words = ["--grid", "sleep=0.0,0.1", "--config.steps=300", "--jobs", "2", "--seeds", "1", "--workdir", folder]  # fmt: skip
    for arm in ("one", "two"):
        Path(f"hold-{arm}").touch()

    process = started(words)
    process.kill()  # no handler runs: the trials notice
    process.communicate()
    wait_for(lambda: not processes(folder))
    (slow,) = Path(folder).glob("sleep=0.1*")
    assert json.loads((slow / "manifest.json").read_text())["status"] == "preempted"

    Path("hold-one").unlink()
    process = started(words, "two")
    wait_for(lambda: any(t["status"] == "done" for t in book(folder)["trials"]))
    second = sweep(*words)
    assert second.returncode == 2
    assert "in use by process" in second.stderr
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert not processes(folder)
    assert "1 not finished" in out
    assert [t["status"] for t in book(folder)["trials"]] == ["done", "preempted"]

    Path("hold-two").unlink()
    done = sweep(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials: 1 done, 1 skipped" in done.stdout
    log = (Path(folder) / "logs" / f"{slow.name}.txt").read_text()
    assert "resumed at step" in log
    assert log.count("$ python -m qlab.run") == 3
    values = [
        [(r["arm"], r["metric"], r["value"]) for r in records.read_jsonl(Path(t["workdir"]) / "results.jsonl") if r["metric"] != "cores"]
        for t in book(folder)["trials"]
    ]  # fmt: skip
    assert values[0] == values[1]  # the resumed one as if nothing had happened


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_second_signal_ends_all_at_once(study):
    folder = str(study / "s")
    words = ["--grid", "sleep=0.01", "--config.steps=1000", "--seeds", "1", "--config.log_points=1000", "--workdir", folder]  # fmt: skip
    sleepy = "if s.step == 3: open('asleep', 'w').close(); time.sleep(100)"
    (study / "toy_exp.py").write_text(EXPERIMENT.replace("step(s):", f"step(s):\n        {sleepy}"))
    process = started(words)
    wait_for(Path("asleep").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for the trial to save
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    wait_for(lambda: not processes(folder), 10)


@pytest.mark.slow
def test_explain_runs_and_prints_what_moves_the_number(study):
    done = sweep("--explain", "--seeds", "3", "--jobs", "2", "--workdir", "s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert book()["explain"] is True
    found = explain.explain(Path("s"))
    # err is factor * |x| with the same x: the change is (factor' - factor) / own * mean |x|
    base = {c.arm: c.base for c in found.changes}
    factors = {"odd": 3.0, 2.0: 2.0, "b": 1.0}
    assert len(found.changes) == 6
    for c in found.changes:
        np.testing.assert_allclose(c.ci.mean, (factors[c.value] - 1) * base[c.arm], rtol=1e-5)
        assert c.same == (c.value == "b")
        assert c.ci.n == 3
    assert base["one"] == pytest.approx(2 * base["two"], rel=1e-5)
    assert [c.size for c in found.changes] == sorted([c.size for c in found.changes], reverse=True)
    lines = [
        x.split()[:2] for x in done.stdout.splitlines() if x.startswith(("opt.tie=", "scale="))
    ]
    # the changes are 2, 2/2, 1 and 1/2 of arm one's base; the middle two are equal but for rounding
    assert [lines[0], lines[-1]] == [["opt.tie=odd", "one"], ["scale=2", "two"]]
    assert sorted(lines[1:-1]) == [["opt.tie=odd", "two"], ["scale=2", "one"]]
    assert "changes no claimed number: unused=b" in done.stdout


# --- the table alone -----------------------------------------------------------------------------


def write_run(folder, values, verdict="HOLDS"):
    folder.mkdir(parents=True)
    rows = [
        {"arm": a, "task": "", "metric": "acc", "seed": s, "value": v, "status": "ok"}
        for a, vs in values.items()
        for s, v in enumerate(vs)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    claim = {
        "text": "a wins",
        "left": ["a", "acc"],
        "op": ">=",
        "right": [["b"], "acc"],
        "margin": 0,
    }
    manifest = {
        "claims": [claim],
        "metrics": {"acc": {"unit": "", "better": "higher"}},
        "diverged": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "claims.json").write_text(json.dumps([{**claim, "verdict": verdict}]))


def write_sweep(folder, flips):
    all_trials = [{"id": "base", "overrides": {}, "status": "done"}]
    for id, (switch, value, status) in flips.items():
        all_trials.append({"id": id, "overrides": {switch: value}, "status": status})
    (folder / "sweep.json").write_text(json.dumps({"explain": True, "trials": all_trials}))


def test_explained_against_numpy_and_the_verdicts(tmp_path):
    old_a, old_b = np.array([0.9, 0.8, 0.85]), np.array([0.5, 0.6, 0.4])
    new_a = np.array([0.7, 0.75, 0.72])
    write_run(tmp_path / "base", {"a": old_a, "b": old_b})
    write_run(tmp_path / "t1", {"a": new_a, "b": old_b}, "FAILS")
    write_sweep(tmp_path, {"t1": ("tie", "odd", "done"), "t2": ("order", "desc", "failed")})
    found = explain.explain(tmp_path)
    a, b = found.changes
    diff = new_a - old_a
    half = 4.302652729911275 * diff.std(ddof=1) / np.sqrt(3)  # t quantile 0.975 with 2 degrees
    np.testing.assert_allclose(a.ci[1:], [diff.mean(), diff.mean() - half, diff.mean() + half])
    assert a.size == pytest.approx(abs(diff.mean()) / old_a.mean())
    assert (a.arm, a.same, b.arm, b.same, b.ci.mean) == ("a", False, "b", True, 0.0)
    assert found.flips == [explain.Flip("tie", "odd", "a wins", "HOLDS", "FAILS")]
    assert found.missing == ["order=desc (failed)"]
    out = io.StringIO()
    explain.print_explained(found, file=out, width=100)
    assert "verdict: tie=odd turns HOLDS into FAILS: a wins" in out.getvalue()
    assert "no numbers: order=desc (failed)" in out.getvalue()
    assert "-0.13" in out.getvalue()


def test_nothing_to_compare_with(tmp_path):
    write_run(tmp_path / "t1", {"a": [1.0], "b": [1.0]})
    write_sweep(tmp_path, {"t1": ("tie", "odd", "done")})
    with pytest.raises(UserError, match="nothing to compare"):
        explain.explain(tmp_path)
