"""The terminal tables: what they show, and that they stay readable."""

import io

from qlab.lab import claims, tables
from qlab.lab.experiment import Claim, Metric

METRICS = {"acc": Metric("%", "higher"), "wall": Metric("s", "lower")}


def rows_of(arms, tasks, metrics, seeds=3):
    return [
        {"arm": a, "task": t, "metric": m, "seed": s, "value": i + 0.1 * s, "status": "ok"}
        for i, a in enumerate(arms)
        for t in tasks
        for m in metrics
        for s in range(seeds)
    ]


def shown(rows, width=100, encoding="utf-8", **kw):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    tables.print_results(rows, METRICS, file=file, width=width, **kw)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_mean_interval_best_and_lost_seeds():
    out = shown(rows_of(["rtn", "[bold]ours"], [""], ["wall", "acc"]), diverged={"rtn": {"1": 7}})
    assert "[bold]ours" in out  # not taken for markup
    assert out.index("acc") < out.index("wall")  # declared order, not row order
    assert "1.10 ± 0.25 *" in out  # 1.0, 1.1, 1.2: half-width 4.3027 * 0.1 / sqrt(3)
    assert "!1/3" in out
    assert "\x1b" not in out


def test_wide_studies_are_cut_and_say_so():
    arms, tasks = [f"arm_{i}" for i in range(14)], [f"w{i}_tensor" for i in range(15)]
    out = shown(rows_of(arms, tasks, ["acc", "wall", "a", "b", "c", "d"]))
    lines = out.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100
    assert "wall" not in "\n".join(lines[:40])  # the primary metric first
    assert "of 90 columns" in out
    assert "report.html" in out


def test_fallbacks_and_empty():
    rows = rows_of(["ours"], ["w2"], ["acc"])
    for name, value in (("fallbacks", 2), ("sites_total", 9)):
        rows += [dict(r, metric=name, value=value) for r in rows[:3]]
    assert "ours: 6 of 27 sites fell back" in shown(rows)
    assert "No results" in shown([])


def test_claims_in_plain_ascii():
    rows = rows_of(["base", "ours"], [""], ["acc"])
    cs = [
        Claim("ours [wins] é", "Table 1", ("ours", "acc"), ">=", ("base", "acc"), paper=0.5),
        Claim("not here", "Table 2", ("ours", "none"), ">=", ("base", "acc")),
    ]
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    tables.print_claims(claims.check(cs, rows, {}), file=file, width=80)
    file.flush()
    out = raw.getvalue().decode()
    assert "HOLDS" in out
    assert "INCONCLUSIVE" in out
    assert "[wins]" in out
    assert "paper 0.5" in out
    assert "2 claims: 1 HOLDS, 1 INCONCLUSIVE" in out
    assert max(map(len, out.splitlines())) <= 80
