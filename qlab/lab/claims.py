"""A paper's claims against the numbers of a run: HOLDS, FAILS or INCONCLUSIVE.

A claim is compared seed by seed (the arms share their seeds' keys, so the difference of a pair is
free of what the seed brings to both). The verdict reads the two-sided 95 % Student t interval of the
mean difference: the whole of it has to lie on one side of the margin. It is a verdict on this
run's scale and seeds, not on the paper.

Everything that keeps a comparison from being fair caps the verdict: fewer than three pairs, seeds
that became non-finite, methods that fell back to something else, arms that were not run.
Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from qlab.lab import stats
from qlab.lab.experiment import Claim

METHOD = (
    "Arms are compared seed by seed: a claim HOLDS if the whole two-sided 95 % Student t interval of "
    "the paired difference (of the log ratio where a ratio is claimed) lies on the claimed side of the "
    "margin, FAILS if it lies wholly on the other side, and is INCONCLUSIVE if it straddles the margin, "
    "if fewer than three seeds pair up, or if the comparison is not a fair one."
)
NOT_MEASURED = "not measured in this variant"
MIN_PAIRS = 3
ULPS = 8  # rounding allowed at the margin


class Verdict(NamedTuple):
    """A claim (the first ten fields, as in Claim) and what this run says about it.

    Attributes:
      verdict: HOLDS, FAILS or INCONCLUSIVE. reason: why, in one line.
      n: paired seeds. estimate, low, high: mean difference (or geometric mean ratio) and interval.
      opponent: the arm it was compared with, "" for a number.
      left_mean, right_mean: of the two sides, over the paired seeds.
    """

    text: str
    source: str
    left: tuple[str, str]
    op: str
    right: Any
    margin: float
    kind: str
    exact: bool
    paper: float | None
    note: str
    verdict: Literal["HOLDS", "FAILS", "INCONCLUSIVE"]
    reason: str
    method: str
    n: int = 0
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    opponent: str = ""
    left_mean: float | None = None
    right_mean: float | None = None


def check(
    claims: Iterable[Claim | Mapping[str, Any]],
    rows: Iterable[stats.Row],
    manifest: Mapping[str, Any],
    *,
    max_fallback_share: float | None = None,
) -> list[Verdict]:
    """One verdict per claim.

    Args:
      claims: Claim records, or their dicts as a manifest holds them.
      rows: of results.jsonl. manifest: of the same run; `arms`, `arm_status`, `diverged` are read.
      max_fallback_share: of the config; else manifest["config"]["max_fallback_share"], else 0.2.

    >>> def row(arm, seed, value):
    ...     return {"arm": arm, "task": "", "metric": "acc", "seed": seed, "value": value}
    >>> rows = [row("ours", s, 0.9 + s / 100) for s in range(3)] + [row("base", s, 0.8) for s in range(3)]
    >>> v, = check([Claim("ours wins", "Table 1", ("ours", "acc"), ">=", ("base", "acc"))], rows, {})
    >>> v.verdict, v.n, round(v.estimate, 3), round(v.low, 3)
    ('HOLDS', 3, 0.11, 0.085)
    """
    cells = stats.collect(rows, manifest.get("diverged"))
    if max_fallback_share is None:
        max_fallback_share = float((manifest.get("config") or {}).get("max_fallback_share", 0.2))
    return [_check(c, cells, manifest, max_fallback_share) for c in claims]


class _Undecided(Exception):
    """The comparison cannot be made; the message is the reason."""


def _check(
    claim: Claim | Mapping[str, Any], cells: stats.Cells, manifest: Mapping[str, Any], share: float
) -> Verdict:
    given = claim._asdict() if isinstance(claim, Claim) else {**_DEFAULTS, **claim}
    fields: dict[str, Any] = {name: given.get(name) for name in Claim._fields}
    try:
        record = _parse(fields)
        fields = record._asdict()
        return _compare(record, cells, manifest, share)
    except _Undecided as why:
        return Verdict(**fields, verdict="INCONCLUSIVE", reason=str(why), method="none")


_DEFAULTS = {"text": "", "source": "", **Claim._field_defaults}


def _parse(fields: Mapping[str, Any]) -> Claim:
    """The claim with tuples where JSON has lists."""
    right = fields["right"]
    if isinstance(right, (list, tuple)) and len(right) == 2:
        names, key = right
        right = (names if isinstance(names, str) else tuple(names), key)
    elif isinstance(right, bool) or not isinstance(right, (int, float)):
        raise _Undecided(f"malformed claim: right side {right!r}")
    left = fields["left"]
    if not isinstance(left, (list, tuple)) or len(left) != 2:
        raise _Undecided(f"malformed claim: left side {left!r}")
    if fields["op"] not in (">=", "<="):
        raise _Undecided(f"malformed claim: op {fields['op']!r} is neither >= nor <=")
    if fields["kind"] not in ("difference", "ratio"):
        raise _Undecided(f"malformed claim: kind {fields['kind']!r}")
    if fields["kind"] == "ratio" and not fields["margin"] > 0:
        raise _Undecided("a ratio needs a positive margin (1 means no worse)")
    claim = Claim(**{**fields, "left": tuple(left), "right": right})
    if isinstance(right, tuple) or claim.kind == "ratio":
        return claim
    # left - 90 >= 0 is shown as left >= 90: the number that people know.
    paper = None if claim.paper is None else claim.paper + right
    return claim._replace(right=0.0, margin=claim.margin + right, paper=paper)


def _available(cells: stats.Cells, manifest: Mapping[str, Any], arm: str, key: str) -> str:
    """ "" if the arm has the number, else why not."""
    if (arm, key) in cells:
        return ""
    if manifest.get("arms") and arm not in manifest["arms"]:
        return f"arm {arm} is not part of this run"
    if not any(a == arm for a, _ in cells):
        status = (manifest.get("arm_status") or {}).get(arm, "no results")
        return (
            f"arm {arm} has no results ({status})"
            if status != "no results"
            else f"arm {arm} has no results"
        )
    return f"{key} of {arm}: not measured in this variant"


def _compare(
    claim: Claim, cells: stats.Cells, manifest: Mapping[str, Any], max_share: float
) -> Verdict:
    arm, key = claim.left
    caps: list[str] = []  # reasons why the verdict is at most INCONCLUSIVE
    if why := _available(cells, manifest, arm, key):
        raise _Undecided(why)
    left_cell = cells[arm, key]
    compared = [(arm, key, left_cell)]
    if isinstance(claim.right, tuple):
        names, right_key = claim.right
        opponents = (names,) if isinstance(names, str) else names
        opponent, missing = _opponent(cells, manifest, opponents, right_key, claim.op)
        if missing:
            caps.append("the strongest opponent may be missing: " + "; ".join(missing))
        right_cell = cells[opponent, right_key]
        if (opponent, right_key) != (arm, key):
            compared.append((opponent, right_key, right_cell))
    else:
        opponent = ""
        right_cell = stats.Cell(dict.fromkeys(left_cell.values, float(claim.right)), ())

    fallen = _fallbacks(cells, [(a, stats.task_of(k)) for a, k, _ in compared], max_share)
    caps += [
        f"{len(cell.bad)} of {cell.num_seeds} seeds non-finite in {a}"
        for a, _, cell in compared
        if cell.bad
    ]
    left, right = stats.paired(left_cell, right_cell)
    if left.size == 0:
        raise _Undecided("; ".join(caps) or "no seed has a value on both sides")
    out = _estimate(claim, left, right)
    verdict, reason = _decide(claim, left, right, out)
    if fallen:
        verdict, reason = "INCONCLUSIVE", "; ".join((*fallen, *caps, reason))
    elif caps:  # a claim already refuted stays refuted
        verdict = "FAILS" if verdict == "FAILS" else "INCONCLUSIVE"
        reason = "; ".join((*caps, reason))
    return Verdict(
        **claim._asdict(),
        verdict=verdict,
        reason=reason,
        method=out.method,
        n=out.ci.n,
        estimate=_finite(out.ci.mean),
        low=_finite(out.ci.low),
        high=_finite(out.ci.high),
        opponent=opponent,
        left_mean=_finite(left.mean()),
        right_mean=_finite(right.mean()),
    )


def _opponent(
    cells: stats.Cells, manifest: Mapping[str, Any], names: Sequence[str], key: str, op: str
) -> tuple[str, list[str]]:
    """The strongest of the arms by mean over its finite seeds, and what is missing.

    Taking the best of several by the same numbers favours the opponent: HOLDS is on the safe side.
    """
    problems = {name: _available(cells, manifest, name, key) for name in names}
    present = [name for name, why in problems.items() if not why]
    missing = [why for why in problems.values() if why]
    best = stats.strongest(cells, present, key, "higher" if op == ">=" else "lower")
    if best is None:
        lost = [
            f"{len(cells[a, key].bad)} of {cells[a, key].num_seeds} seeds non-finite in {a}"
            for a in present
        ]
        raise _Undecided("; ".join(missing + lost) or "no arm to compare with")
    return best, missing


def _fallbacks(
    cells: stats.Cells, compared: Iterable[tuple[str, str]], max_share: float
) -> list[str]:
    reasons = []
    for arm, task in compared:
        share = stats.fallback_share(cells, arm, task)
        if share is not None and share > max_share:
            of_what = (
                f"{share:.0%} of sites" if math.isfinite(share) else "an unknown share of sites"
            )
            reasons.append(f"{arm} fell back at {of_what} (at most {max_share:.0%} allowed)")
    return reasons


class _Estimate(NamedTuple):
    ci: stats.Interval  # on the claim's own scale
    tol: float  # rounding of the values, on the same scale
    method: str


def _estimate(claim: Claim, left: np.ndarray, right: np.ndarray) -> _Estimate:
    sided = "paired t" if isinstance(claim.right, tuple) else "one-sample t"
    eps = _epsilon(left, right) if isinstance(claim.right, tuple) else _epsilon(left)
    if claim.kind == "difference":
        scale = max(np.abs(left).max(), np.abs(right).max(), abs(claim.margin))
        return _Estimate(stats.t_interval(left - right), ULPS * eps * scale, f"{sided}, 95 %")
    if (left <= 0).any() or (right <= 0).any():
        raise _Undecided("a ratio needs positive values, and some are zero or negative")
    ci = stats.t_interval(np.log(left) - np.log(right))
    with np.errstate(over="ignore"):
        mean, low, high = (float(np.exp(x)) for x in ci[1:])
    tol = ULPS * eps * max(mean, claim.margin)
    return _Estimate(stats.Interval(ci.n, mean, low, high), tol, f"{sided} on logs, 95 %")


def _decide(claim: Claim, left: np.ndarray, right: np.ndarray, out: _Estimate) -> tuple[Any, str]:
    n, _, low, high = out.ci
    if n < MIN_PAIRS:
        return "INCONCLUSIVE", f"{n} paired seed{'s' * (n > 1)}; a verdict needs {MIN_PAIRS}"
    if not claim.exact and not _varies(left) and not _varies(right):
        sides = (
            "neither side varies"
            if isinstance(claim.right, tuple)
            else f"{claim.left[0]} does not vary"
        )
        return "INCONCLUSIVE", f"{sides} with the seed, so there is no spread to judge by"
    near, far = (low, high) if claim.op == ">=" else (-high, -low)
    margin = claim.margin if claim.op == ">=" else -claim.margin
    at = stats.format_number(claim.margin)
    constant = claim.kind == "difference" and not _varies(left - right)
    what = "the difference, the same on every seed," if constant else "the whole interval"
    if near >= margin - out.tol:
        return "HOLDS", f"{what} is {claim.op} {at}"
    if far < margin - out.tol:
        return "FAILS", f"{what} is {'<' if claim.op == '>=' else '>'} {at}"
    return "INCONCLUSIVE", f"the interval straddles the margin {at}"


def _epsilon(*values: np.ndarray) -> float:
    """Relative rounding of the values: float32's where all of them are float32 numbers.

    Whole numbers are exact in either, so counts get the tighter one.
    """
    x = np.concatenate(values)
    with np.errstate(over="ignore"):
        single = bool((x.astype(np.float32) == x).all()) and not bool((x == np.round(x)).all())
    return float(np.finfo(np.float32 if single else np.float64).eps)


def _varies(x: np.ndarray) -> bool:
    return bool(np.ptp(x) > ULPS * _epsilon(x) * np.abs(x).max())


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def unmeasured(record: Mapping[str, Any]) -> bool:
    """Whether a verdict record says no more than that the variant leaves the claim out."""
    return not record.get("n") and str(record.get("reason", "")).endswith(NOT_MEASURED)


def counts(verdicts: Iterable[Verdict | Mapping[str, Any]]) -> dict[str, int]:
    """How many of each verdict, all three named.

    >>> counts([{"verdict": "HOLDS"}])
    {'HOLDS': 1, 'FAILS': 0, 'INCONCLUSIVE': 0}
    """
    out = {"HOLDS": 0, "FAILS": 0, "INCONCLUSIVE": 0}
    for v in verdicts:
        name = v.verdict if isinstance(v, Verdict) else v.get("verdict", "INCONCLUSIVE")
        out[name] = out.get(name, 0) + 1
    return out
