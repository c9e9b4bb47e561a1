"""The bench command: arithmetic of the numbers, schema of the rows, what is said when something is absent."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qlab import bench
from qlab.benches import measure
from qlab.benches.measure import Number
from qlab.lab.errors import UserError
from qlab.lab.experiment import Metric

ROOT = Path(__file__).resolve().parents[2]
ROW = [
    "paper",
    "arm",
    "task",
    "split",
    "metric",
    "unit",
    "better",
    "value",
    "seed",
    "step",
    "wall_s",
    "peak_mem_mb",
    "device",
    "deterministic",
    "seed_layout",
    "status",
    "fallbacks",
    "config_hash",
    "commit",
    "claim",
    "claim_ref",
]


class TestArithmetic:
    def test_repetitions_take_turns_and_are_kept_apart(self):
        order = []

        def contestant(name, value):
            def once():
                order.append(name)
                return {"s": value * len(order), "t/s": 1.0}

            return once

        numbers = measure.interleave({"a": contestant("a", 1), "b": contestant("b", 10)}, 3)
        assert "".join(order) == "abbaab"
        assert measure.find(numbers, "a", "s").values == (1, 4, 5)
        assert measure.find(numbers, "b", "s").values == (20, 30, 60)
        assert [(n.arm, n.name) for n in numbers] == [
            ("a", "s"), ("a", "t/s"), ("b", "s"), ("b", "t/s"),
        ]  # fmt: skip

    def test_a_spent_budget_ends_the_rounds_but_not_before_the_least_number(self):
        calls = []
        once = {"a": lambda: calls.append(1) or {"s": 1.0}}
        measure.interleave(once, 50, budget_s=0.0, at_least=4)
        assert len(calls) == 4
        measure.interleave(once, 50, budget_s=math.inf)
        assert len(calls) == 54

    def test_ratios_are_of_repetitions_not_of_medians(self):
        a, b = Number("a", "s", (1.0, 9.0, 2.0)), Number("b", "s", (2.0, 3.0, 1.0))
        r = measure.ratio([a, b], "a", "b", "s", "times")
        assert r == Number("a", "times", (0.5, 3.0, 2.0))
        assert (r.median, a.median / b.median) == (2.0, 1.0)
        over = measure.percent_over([a, b], "a", "b", "s", "over")
        np.testing.assert_allclose(over.values, (-50, 200, 100))

    def test_a_ratio_with_an_absent_side_is_absent_and_says_why(self):
        a = Number("a", "s", (1.0,))
        gone = Number("b", "s", status="absent", note="b is not installed")
        r = measure.ratio([a, gone], "a", "b", "s", "times")
        assert (r.status, r.note, r.values) == ("absent", "b is not installed", ())
        assert measure.ratio([a], "a", "c", "s", "times").status == "absent"

    def test_median_and_quartiles(self, rng):
        x = tuple(rng.standard_normal(101))
        np.testing.assert_allclose(measure.spread(x), np.quantile(x, (0.25, 0.75)))
        assert Number("a", "s", x).median == sorted(x)[50]

    def test_seconds_per_call_counts_the_calls(self):
        calls = []
        took = measure.seconds_per_call(lambda: calls.append(1), at_least_s=0.01)
        assert len(calls) > 1
        assert 0.01 / len(calls) <= took


class TestRows:
    METRICS = {"ms": Metric("ms", "lower")}

    def test_a_row_a_repetition_in_the_schema_of_a_study(self):
        columns = {
            "paper": "bench-x", "variant": "", "split": "", "device": "cpu", "deterministic": False,
            "config_hash": "", "commit": "", "claim": "", "claim_ref": "",
        }  # fmt: skip
        numbers = [
            Number("a", "n3/ms", (1.0, 2.0)),
            Number("b", "n3/ms", status="absent", note="no b"),
        ]
        rows = measure.result_rows(numbers, self.METRICS, columns, 1.5, 10.0)
        assert all(set(ROW) <= set(r) for r in rows)
        assert [(r["arm"], r["task"], r["metric"], r["seed"], r["value"]) for r in rows] == [
            ("a", "n3", "ms", 0, 1.0), ("a", "n3", "ms", 1, 2.0), ("b", "n3", "ms", 0, None),
        ]  # fmt: skip
        assert [r["status"] for r in rows] == ["ok", "ok", "absent"]
        assert rows[2]["note"] == "no b"
        assert {(r["unit"], r["better"]) for r in rows} == {("ms", "lower")}

    def test_the_table_says_what_is_absent(self):
        text = measure.table(
            [Number("a", "ms", (1.0, 2.0, 3.0)), Number("b", "ms", status="absent", note="no b")],
            self.METRICS,
        )
        assert "2 ms  1.5 .. 2.5, 3 repetitions" in text
        assert text.splitlines()[1].split() == ["ms", "b", "absent", "no", "b"]


class TestCommand:
    def test_help_and_list_import_no_jax(self):
        code = (
            "import sys, contextlib\nfrom qlab import bench\n"
            "assert bench.main(['--list']) == 0\n"
            "with contextlib.suppress(SystemExit): bench.main(['--help'])\n"
            "heavy = {'jax', 'numpy.random', 'pennylane', 'qiskit'} & set(sys.modules)\n"
            "assert 'jax' not in heavy and 'pennylane' not in heavy, heavy\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()[: len(bench.BENCHES)]] == list(
            bench.BENCHES
        )

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["quantun"], "did you mean quantum?"),
            ([], "which bench?"),
            (["runner", "search", "--workdir", "x"], "--workdir is the folder of one bench"),
        ],
    )
    def test_bad_input_is_one_line_and_2(self, words, says, capsys):
        assert bench.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert says in err
        assert err.count("\n") == 1

    def test_the_folder_of_another_run_is_left_alone(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"paper": "flexround"}')
        with pytest.raises(UserError, match="holds another run"):
            bench.bench("quantum", quick=True, workdir=tmp_path, quiet=True)
        assert (tmp_path / "manifest.json").read_text() == '{"paper": "flexround"}'

    def test_every_bench_has_what_the_command_asks_of_it(self):
        for name in bench.BENCHES:
            module = __import__(f"qlab.benches.{name}", fromlist=["x"])
            assert module.settings(True) != module.settings(False)
            assert set(module.settings(True)) == set(module.settings(False))
            s = module.settings(False)
            goals = module.goals(s) if hasattr(module, "goals") else module.GOALS
            for item in (*goals, *module.FIGURES):
                metric = (item.left[1] if hasattr(item, "left") else item.y).split("/")[-1]
                assert metric in module.METRICS


def run_quick(name, folder, **changes):
    """A bench in this process, with its quick settings made smaller still."""
    module = __import__(f"qlab.benches.{name}", fromlist=["x"])
    settings = module.settings
    module.settings = lambda quick: {**settings(quick), **changes}
    try:
        return bench.bench(name, quick=True, workdir=folder, quiet=True)
    finally:
        module.settings = settings


def check_folder(result, name):
    """Files of a run, rows in the schema, and a page that the report can draw."""
    import qlab

    manifest = json.loads((result.workdir / "manifest.json").read_text())
    assert manifest["paper"] == f"bench-{name}"
    assert manifest["status"] == "done"
    assert result.summary.startswith(f"{name}: ")
    assert "\n" not in result.summary
    rows = [json.loads(line) for line in (result.workdir / "results.jsonl").open()]
    assert all(set(ROW) <= set(r) for r in rows)
    assert {r["metric"] for r in rows} <= set(manifest["metrics"])
    cores = [r["value"] for r in rows if r["metric"] == "cores"]
    assert cores == [len(os.sched_getaffinity(0))]
    assert all(r["device"] for r in rows)
    assert "python -m qlab.bench" in (result.workdir / "command.txt").read_text()
    page = qlab.report(result.workdir)
    assert manifest["title"].split(":")[0][:20] in page.read_text()
    return rows


@pytest.mark.slow
def test_quantum_agrees_and_says_what_is_absent(tmp_path, monkeypatch):
    from qlab.benches import quantum

    monkeypatch.setitem(quantum.NEEDS, "aer", "no_such_package")
    result = run_quick("quantum", tmp_path, qubits=(2,), states=(), blocks=1, repetitions=3)
    rows = check_folder(result, "quantum")
    errors = {r["arm"]: r["value"] for r in rows if r["metric"] == "max_error"}
    assert set(errors) == {"ptm", "default.mixed", "density"}
    assert max(errors.values()) < 1e-12
    absent = [r for r in rows if r["arm"] == "aer"]
    assert absent
    assert all(r["status"] == "absent" and r["value"] is None for r in absent)
    assert "no_such_package is not installed" in result.summary
    by = {(r["arm"], r["metric"], r["seed"]): r["value"] for r in rows}
    for i in range(3):
        assert by["ptm", "to_density", i] == pytest.approx(
            by["ptm", "call_ms", i] / by["density", "call_ms", i]
        )


@pytest.mark.slow
def test_noiseless_contestants_agree(tmp_path):
    result = run_quick("quantum", tmp_path, qubits=(), states=(3,), repetitions=3)
    rows = check_folder(result, "quantum")
    ok = {r["arm"] for r in rows if r["metric"] == "call_ms" and r["status"] == "ok"}
    assert {"qlab", "raw", "default.qubit", "lightning"} <= ok
    assert max(r["value"] for r in rows if r["metric"] == "max_error") < 1e-12


@pytest.mark.slow
def test_a_simulator_that_disagrees_is_failed(tmp_path, monkeypatch):
    from qlab.benches import quantum

    wrong = {"ptm": quantum.ptm, "density": lambda n, b, lam: quantum.density(n, b, lam * 1.01)}
    monkeypatch.setattr(quantum, "CONTESTANTS", wrong)
    result = run_quick("quantum", tmp_path, qubits=(2,), states=(), blocks=1, repetitions=3)
    rows = [r for r in result.rows if r["arm"] == "density" and r["metric"] == "call_ms"]
    assert [r["status"] for r in rows] == ["failed"]
    assert "differs from ptm" in rows[0]["note"]
    assert "density failed" in result.summary


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runner", "startup", "search", "quantum", "kernels", "ptq"])
def test_quick(name, tmp_path):
    """Each as a person calls it; the last line is the summary."""
    done = subprocess.run(
        [sys.executable, "-m", "qlab.bench", name, "--quick", "--workdir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == json.loads((tmp_path / "manifest.json").read_text())["summary"]
    assert "nan" not in last
