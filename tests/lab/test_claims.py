"""Verdicts against scipy's own paired test, coverage by simulation, and every branch by hand."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from qlab.lab import claims, stats
from qlab.lab.experiment import Claim


def rows_of(arm, values, key="acc", **extra):
    task, _, metric = key.rpartition("/")
    return [
        {"arm": arm, "task": task, "metric": metric, "seed": s, "value": v, "status": "ok"} | extra
        for s, v in enumerate(values)
    ]


def study(**arms):
    return [row for arm, values in arms.items() for row in rows_of(arm, values)]


def verdict(rows, *, op=">=", right=("base", "acc"), manifest=None, **claim):
    c = Claim("text", "Table 1", ("ours", "acc"), op, right, **claim)
    (v,) = claims.check([c], rows, manifest or {})
    return v


@pytest.mark.parametrize("n", [3, 5, 12])
def test_interval_is_scipys_paired_interval(n, rng):
    ours, base = rng.normal(1.0, 0.3, n), rng.normal(0.8, 0.3, n)
    want = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
    v = verdict(study(ours=ours, base=base))
    np.testing.assert_allclose([v.low, v.high], [want.low, want.high], rtol=1e-12)
    np.testing.assert_allclose(v.estimate, (ours - base).mean(), rtol=1e-12)
    assert (v.n, v.opponent) == (n, "base")


def test_interval_against_a_number_is_scipys_one_sample_interval(rng):
    ours = rng.normal(1.0, 0.3, 6)
    want = scipy.stats.ttest_1samp(ours, 0.9).confidence_interval(0.95)
    v = verdict(study(ours=ours), right=0.9)
    assert v.margin == 0.9  # shown on the scale of the number itself
    np.testing.assert_allclose([v.low, v.high], [want.low, want.high], rtol=1e-12)
    assert v.opponent == ""


def test_ratio_interval_is_scipys_on_logs(rng):
    ours, base = np.exp(rng.normal(0.5, 0.2, 5)), np.exp(rng.normal(0, 0.2, 5))
    want = scipy.stats.ttest_rel(np.log(ours), np.log(base)).confidence_interval(0.95)
    v = verdict(study(ours=ours, base=base), kind="ratio", margin=1.0)
    np.testing.assert_allclose([v.low, v.high], np.exp([want.low, want.high]), rtol=1e-12)
    np.testing.assert_allclose(v.estimate, scipy.stats.gmean(ours / base), rtol=1e-12)


def test_hand_computed():
    # differences 1, 2, 3: mean 2, sd 1, half-width 4.302653 / sqrt(3) = 2.484138
    v = verdict(study(ours=[1.0, 2.5, 3.25], base=[0.0, 0.5, 0.25]))
    assert v.estimate == 2.0
    assert v.low == pytest.approx(-0.484138, abs=1e-6)
    assert v.high == pytest.approx(4.484138, abs=1e-6)
    assert v.verdict == "INCONCLUSIVE"
    assert "straddles" in v.reason
    assert (
        verdict(study(ours=[1, 2.5, 3.25], base=[0, 0.5, 0.25]), margin=-0.485).verdict == "HOLDS"
    )
    assert verdict(study(ours=[1, 2.5, 3.25], base=[0, 0.5, 0.25]), margin=4.485).verdict == "FAILS"


def test_coverage_and_false_verdicts(rng):
    """At a true difference equal to the margin, each wrong verdict comes in 2.5 % of the studies."""
    outcomes, covered, trials = [], 0, 3000
    for _ in range(trials):
        shared = rng.normal(0, 5, 5)  # what a seed brings to both arms: pairing removes it
        ours, base = shared + 0.3 + rng.normal(0, 1, 5), shared + rng.normal(0, 1, 5)
        v = verdict(study(ours=ours, base=base), margin=0.3)
        outcomes.append(v.verdict)
        covered += v.low <= 0.3 <= v.high
    sd = math.sqrt(0.05 * 0.95 / trials)
    assert abs(covered / trials - 0.95) < 4 * sd
    for name in ("HOLDS", "FAILS"):
        assert abs(outcomes.count(name) / trials - 0.025) < 4 * sd


@pytest.mark.parametrize(
    ("op", "margin", "want"),
    [
        (">=", 0.0, "HOLDS"),
        (">=", 0.2, "FAILS"),
        (">=", 0.1, "INCONCLUSIVE"),
        ("<=", 0.0, "FAILS"),
        ("<=", 0.2, "HOLDS"),
        ("<=", 0.1, "INCONCLUSIVE"),
    ],
)
def test_three_verdicts_in_both_directions(op, margin, want):
    rows = study(ours=[0.91, 0.92, 0.90], base=[0.80, 0.83, 0.81])
    assert verdict(rows, op=op, margin=margin).verdict == want


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_pairs_never_decide(n, exact):
    v = verdict(study(ours=[9.0, 9.1][:n], base=[1.0, 1.1][:n]), exact=exact)
    assert (v.verdict, v.n, v.estimate) == ("INCONCLUSIVE", n, 8.0)


def test_only_seeds_of_both_sides_pair_up():
    v = verdict(study(ours=[9.0, 9.1, 9.2, 9.3], base=[1.0, 1.1]))
    assert (v.verdict, v.n) == ("INCONCLUSIVE", 2)


def test_strongest_of_several_arms():
    rows = study(ours=[5, 5.1, 5.2], weak=[1, 1.1, 1.3], strong=[6, 6.2, 6.1])
    up = verdict(rows, right=(("weak", "strong"), "acc"))
    assert (up.opponent, up.verdict) == ("strong", "FAILS")
    down = verdict(rows, op="<=", right=(("weak", "strong"), "acc"))
    assert (down.opponent, down.verdict) == ("weak", "FAILS")


def test_missing_opponent_keeps_a_win_open_but_not_a_loss():
    rows = study(ours=[5, 5.1, 5.2], weak=[1, 1.1, 1.3], strong=[6, 6.2, 6.1])
    won = verdict(rows, right=(("weak", "absent"), "acc"))
    assert won.verdict == "INCONCLUSIVE"
    assert "absent" in won.reason
    assert verdict(rows, right=(("strong", "absent"), "acc")).verdict == "FAILS"


def test_no_spread():
    rows = study(ours=[0.9] * 5, base=[0.8] * 5)
    v = verdict(rows)
    assert v.verdict == "INCONCLUSIVE"
    assert "neither side varies" in v.reason
    exact = verdict(rows, exact=True, margin=0.1)  # 0.9 - 0.8 < 0.1 in floating point
    assert (exact.verdict, exact.low, exact.high) == ("HOLDS", exact.estimate, exact.estimate)
    assert verdict(rows, exact=True, margin=0.11).verdict == "FAILS"
    assert verdict(study(ours=[0.9] * 5), right=0.5).verdict == "INCONCLUSIVE"
    assert verdict(study(ours=[0.9] * 5), right=0.5, exact=True).verdict == "HOLDS"


def test_equal_numbers_on_varying_seeds_are_a_tie_that_holds():
    rows = study(ours=[3, 7, 9], base=[3, 7, 9])
    assert verdict(rows).verdict == verdict(rows, op="<=").verdict == "HOLDS"
    assert verdict(rows, margin=1.0).verdict == "FAILS"


def test_ties_in_single_precision_but_not_between_counts():
    f32 = [float(np.float32(x)) for x in (0.9, 0.9, 0.9)]
    assert verdict(study(ours=f32), right=0.9, exact=True).verdict == "HOLDS"  # float32(0.9) < 0.9
    assert verdict(study(ours=f32), right=0.9, op="<=", exact=True).verdict == "HOLDS"
    assert verdict(study(ours=f32), right=0.90001, exact=True).verdict == "FAILS"
    big = study(ours=[16_000_000.0] * 3, base=[16_000_001.0] * 3)
    assert verdict(big, exact=True).verdict == "FAILS"
    tiny = study(ours=[1e-12 / 3] * 3)
    assert verdict(tiny, right=0.0, op="<=", margin=1e-13, exact=True).verdict == "FAILS"


def test_noise_of_a_rounding_is_not_spread():
    jitter = [0.9, 0.9 + 1e-16, 0.9]
    assert "neither side varies" in verdict(study(ours=jitter, base=[0.8] * 3)).reason


def test_non_finite_seeds_count_against():
    rows = study(ours=[0.9, 0.91, 0.92, math.nan, 0.93], base=[0.1, 0.11, 0.12, 0.13, 0.14])
    v = verdict(rows)
    assert (v.verdict, v.n) == ("INCONCLUSIVE", 4)
    assert "1 of 5 seeds non-finite in ours" in v.reason
    worse = study(ours=[0.9, 0.91, 0.92, None, 0.93], base=[1.1, 1.11, 1.12, 1.13, 1.15])
    assert verdict(worse).verdict == "FAILS"  # refuted already on the seeds that are left
    all_lost = verdict(study(ours=[math.inf] * 3, base=[1, 2, 3]))
    assert (all_lost.verdict, all_lost.n, all_lost.estimate) == ("INCONCLUSIVE", 0, None)
    assert "3 of 3" in all_lost.reason


@pytest.mark.parametrize("where", ["status", "manifest", "no row"])
def test_a_diverged_seed_is_seen_wherever_it_is_written(where):
    rows = study(ours=[0.9, 0.91, 0.92, 0.93], base=[0.1, 0.11, 0.12, 0.14])
    manifest = {}
    if where == "status":
        rows[2]["status"] = "nonfinite"
    else:
        manifest["diverged"] = {"ours": {"2": 17}}
    if where == "no row":
        del rows[2]
    v = verdict(rows, manifest=manifest)
    assert (v.verdict, v.n) == ("INCONCLUSIVE", 3)
    assert "1 of 4 seeds non-finite" in v.reason


@pytest.mark.parametrize("arm", ["ours", "base"])
def test_fallbacks_beyond_the_stated_share(arm):
    rows = study(ours=[0.9, 0.91, 0.93], base=[0.1, 0.11, 0.12])
    some = rows + rows_of(arm, [2, 2, 2], "fallbacks") + rows_of(arm, [10] * 3, "sites_total")
    assert verdict(some).verdict == "HOLDS"  # 20 % is allowed
    many = rows + rows_of(arm, [2, 2, 3], "fallbacks") + rows_of(arm, [10] * 3, "sites_total")
    v = verdict(many)
    assert v.verdict == "INCONCLUSIVE"
    assert f"{arm} fell back at 23% of sites" in v.reason
    assert verdict(many, manifest={"config": {"max_fallback_share": 0.3}}).verdict == "HOLDS"
    assert verdict(rows + rows_of(arm, [1], "fallbacks")).verdict == "INCONCLUSIVE"  # of how many?
    assert verdict(rows + rows_of(arm, [0], "fallbacks")).verdict == "HOLDS"


def test_fallbacks_are_read_per_task():
    rows = [r for k in ("a", "b") for r in rows_of("ours", [0.9, 0.91, 0.93], f"{k}/acc")]
    rows += rows_of("ours", [5, 5, 5], "a/fallbacks") + rows_of("ours", [9, 9, 9], "a/sites_total")
    rows += rows_of("ours", [0, 0, 0], "b/fallbacks") + rows_of("ours", [9, 9, 9], "b/sites_total")
    both = [Claim("t", "", ("ours", f"{k}/acc"), ">=", 0.5) for k in ("a", "b")]
    assert [v.verdict for v in claims.check(both, rows, {})] == ["INCONCLUSIVE", "HOLDS"]


def test_what_was_not_measured():
    rows = study(ours=[1, 2, 3])
    manifest = {"arms": ["ours", "base"], "arm_status": {"ours": "done", "base": "failed"}}
    assert "failed" in verdict(rows, manifest=manifest).reason
    assert "not part of this run" in verdict(rows, manifest={"arms": ["ours"]}).reason
    other = rows + rows_of("base", [1, 2, 3], "loss")
    v = verdict(other, manifest=manifest)
    assert (v.verdict, v.n) == ("INCONCLUSIVE", 0)
    assert "not measured in this variant" in v.reason
    (v,) = claims.check([Claim("t", "", ("gone", "acc"), ">=", 90.0)], rows, {})
    assert (v.op, v.right, v.margin) == (">=", 0.0, 90.0)  # shown as the number that was claimed


def test_ratio_refuses_what_has_no_logarithm():
    rows = study(ours=[1.0, 2.0, 0.0], base=[1.0, 1.0, 1.0])
    assert "zero or negative" in verdict(rows, kind="ratio", margin=1.0).reason
    good = study(ours=[2.0, 2.1, 2.2], base=[1.0, 1.0, 1.1])
    assert "positive margin" in verdict(good, kind="ratio").reason
    assert verdict(good, kind="ratio", margin=1.5).verdict == "HOLDS"
    assert verdict(good, kind="ratio", margin=1.5, op="<=").verdict == "FAILS"


@pytest.mark.parametrize(
    "bad", [{"op": "="}, {"right": "base"}, {"kind": "percent"}, {"left": "ours"}]
)
def test_a_malformed_claim_loses_nothing(bad):
    good = Claim("t", "s", ("ours", "acc"), ">=", ("base", "acc"))
    rows = study(ours=[0.9, 0.91, 0.93], base=[0.1, 0.11, 0.12])
    first, second = claims.check([{**good._asdict(), **bad}, good], rows, {})
    assert first.verdict == "INCONCLUSIVE"
    assert "malformed" in first.reason
    assert second.verdict == "HOLDS"


def test_verdicts_survive_json():
    cs = [
        Claim("a", "s", ("ours", "acc"), ">=", (("base", "ours2"), "acc"), paper=0.3),
        Claim("b", "s", ("ours", "acc"), ">=", ("base", "acc")),
        Claim("c", "s", ("ours", "acc"), ">=", 0.5),
        Claim("d", "s", ("ours", "acc"), ">=", ("base", "acc"), kind="ratio", margin=1.0),
    ]
    rows = study(ours=[1e-300, 1e300, 3.0], base=[0.1, 0.11, 0.12], ours2=[1, 2, 3])
    manifest = {"arms": ["ours", "base", "ours2"]}
    first = claims.check(cs, rows, manifest)
    back = json.loads(json.dumps([v._asdict() for v in first], allow_nan=False))
    assert claims.check([{k: r[k] for k in Claim._fields} for r in back], rows, manifest) == first


def test_later_rows_replace_earlier_ones_of_their_seed():
    rows = study(ours=[0.1, 0.1, 0.1]) + study(ours=[0.9, 0.91, 0.93], base=[0.5, 0.5, 0.6])
    assert verdict(rows).verdict == "HOLDS"


def test_difference_to_the_strongest_other_arm(rng):
    a, b, c = rng.normal(1, 0.1, 5), rng.normal(2, 0.1, 5), rng.normal(3, 0.1, 5)
    cells = stats.collect(study(a=a, b=b, c=c))
    gaps = stats.to_strongest(cells, "acc", "higher")
    assert {arm: other for arm, (other, _) in gaps.items()} == {"a": "c", "b": "c", "c": "b"}
    want = scipy.stats.ttest_rel(c, b).confidence_interval(0.95)
    np.testing.assert_allclose(gaps["c"][1][2:], [want.low, want.high], rtol=1e-12)
    assert stats.to_strongest(cells, "acc", "none") == {}


def test_no_jax_is_imported():
    code = "import qlab.lab.claims, qlab.lab.tables, sys; print('jax' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)
