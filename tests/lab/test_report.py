"""python -m qlab.report: folders in, pages out, one line for what is wrong."""

import json
import os
import subprocess
import sys
import time

import pytest
from test_report_factory import make_run, make_sweep

import qlab
from qlab import report
from qlab.lab import reading
from qlab.lab.errors import UserError

QUICK = {"arms": ("rtn", "flexround"), "tasks": ("w2",), "seeds": 3, "figures": ()}


def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True)


def test_a_run_folder_rewrites_its_page(tmp_path, capsys):
    run = make_run(tmp_path / "run", **QUICK)
    (run / "report.html").write_text("old")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "FlexRound beats" in (run / "report.html").read_text()


def test_a_folder_of_runs_gives_one_page(tmp_path):
    for name in ("a", "deep/er/b"):
        make_run(tmp_path / "runs" / name, **QUICK)
    make_sweep(
        tmp_path / "runs" / "sweep", {"bits": [2, 3]}, [({"bits": 2}, 0), ({"bits": 3}, 1)], **QUICK
    )
    page = qlab.report(tmp_path / "runs")  # the module itself is callable
    assert page == tmp_path / "runs" / "report.html"
    text = page.read_text()
    assert "1 paper, 4 runs" in text
    assert "Over <code>bits</code>" in text
    out = report.report([tmp_path / "runs" / "a"], tmp_path / "x" / "page.html")
    assert out.is_file()


def test_moved_sweeps_find_their_trials(tmp_path):
    made = make_sweep(
        tmp_path / "old", {"bits": [2, 3]}, [({"bits": 2}, 0), ({"bits": 3}, 1)], **QUICK
    )
    made.rename(tmp_path / "new")
    sweep = reading.load_sweep(tmp_path / "new")
    assert list(sweep.runs) == ["trial_000", "trial_001"]
    assert not sweep.problems


def damage(run, name):
    file = run / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if name.endswith(("npz", "json")) else data[:-20])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("results.jsonl", "its cut last line left out"),
        ("rtn/metrics.jsonl", "its cut last line left out"),
        ("rtn/arrays.npz", "its figures are left out"),
        ("claims.json", "the claims were checked on what is here"),
        ("config.json", "is damaged"),
    ],
)
def test_damaged_files_are_left_out_and_said(tmp_path, name, said):
    run = make_run(tmp_path / "run", **QUICK)
    damage(run, name)
    assert said in report.report(run).read_text()
    (run / name).unlink()
    assert "FlexRound beats" in report.report(run).read_text()


def test_a_run_in_progress_uses_the_arms_that_are_done(tmp_path):
    run = make_run(tmp_path / "run", **QUICK)
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    (run / "rtn" / "results.jsonl").write_text("".join(x for x in lines if '"arm": "rtn"' in x))
    for name in ("results.jsonl", "claims.json"):
        (run / name).unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"status": "running", "arm_status": {"rtn": "done", "flexround": "running"}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = report.report(run).read_text()
    assert "This run has not come to its end." in text
    assert "flexround: running" in text
    assert "arm flexround has no results (running)" in text
    (run / "results.jsonl").write_text("not json\n[1]\n{}\n")
    text = report.report(run).read_text()
    assert "2 damaged lines left out" in text
    assert "1 rows without arm and metric left out" in text


@pytest.mark.parametrize("broken", ["", "{", "[1, 2]"])
def test_a_run_without_a_readable_manifest_is_one_line(tmp_path, capsys, broken):
    run = make_run(tmp_path / "run", **QUICK)
    (run / "manifest.json").write_text(broken)
    assert report.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "manifest.json" in err
    other = make_run(tmp_path / "other", **QUICK)  # beside a good one it is left out and said
    assert "manifest.json" in report.report([run, other], tmp_path / "i.html").read_text()


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for bad in ("nowhere", "empty", "file"):
        assert report.main([str(tmp_path / bad)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("error: ")
        assert bad in err
    with pytest.raises(UserError):
        report.report([])
    run = make_run(tmp_path / "run", **QUICK)
    assert report.main([str(run), "--out", str(tmp_path / "file" / "page.html")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "page.html" in err


def test_arm_names_do_not_lead_out_of_the_folder(tmp_path):
    run = make_run(tmp_path / "run", **QUICK)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seed": 0, "metrics": {"secret": 1.0}}\n')
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["arms"] += ["..", "../run", "", str(tmp_path)]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "secret" not in report.report(run).read_text()


def test_never_imports_jax_and_help_is_quick(tmp_path):
    run = make_run(tmp_path / "run", **QUICK)
    heavy = "('jax', 'flax', 'optax', 'orbax', 'pennylane', 'sklearn')"
    code = f"import sys; from qlab import report; report({str(run)!r}); print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"
    lazy = "('matplotlib', 'scipy', 'jinja2', 'rich', 'numpy')"
    code = f"import sys, qlab.report; print([m for m in {lazy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"
    start = time.perf_counter()
    done = python("-m", "qlab.report", "--help")
    assert done.returncode == 0
    assert "RUN_OR_FOLDER" in done.stdout
    assert time.perf_counter() - start < 1.0 + 2.0 * (os.getloadavg()[0] > 1.5)  # a busy machine


def test_module_from_the_command_line(tmp_path):
    run = make_run(tmp_path / "run", **QUICK)
    done = python("-m", "qlab.report", str(run))
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html"))
    assert done.stderr == ""
