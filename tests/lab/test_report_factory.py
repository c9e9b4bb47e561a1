"""Synthetic run and sweep folders for the report's tests, and a test that they are what they say."""

import json
from pathlib import Path

import numpy as np

from qlab.lab import claims
from qlab.lab.experiment import Claim, Figure, Metric

ARMS = ("float", "rtn", "adaround", "flexround")
TASKS = ("w2", "w3", "w4")
METRICS = {
    "accuracy": Metric("%", "higher", "test accuracy"),
    "layer_mse": Metric("", "lower", "mean squared error of the layer outputs"),
}
CLAIMS = (
    Claim("FlexRound beats rounding to nearest at 2 bits", "Table 2", ("flexround", "w2/accuracy"), ">=", ("rtn", "w2/accuracy"), 1.0, paper=12.5, note="Digits, not ImageNet."),
    Claim("FlexRound is no worse than the best rule at 3 bits", "abstract", ("flexround", "w3/accuracy"), ">=", (("rtn", "adaround"), "w3/accuracy"), -0.3),
    Claim("FlexRound halves the layer error of rounding to nearest", "Figure 3", ("flexround", "w2/layer_mse"), "<=", ("rtn", "w2/layer_mse"), 0.5, kind="ratio", paper=0.31),
    Claim("FlexRound reaches float at 2 bits", "abstract", ("flexround", "w2/accuracy"), ">=", ("float", "w2/accuracy")),
    Claim("Perplexity within one point of float", "Table 4", ("flexround", "w4/perplexity"), "<=", ("float", "w4/perplexity"), 1.0),
)  # fmt: skip
FIGURES = (
    Figure("Reconstruction loss", "curve", "loss", ylabel="loss", logy=True),
    Figure("Accuracy over bits", "bars", "accuracy", ylabel="accuracy, %"),
    Figure("Accuracy against calibration images", "line", "accuracy_of_n", "n", "images", "accuracy, %", logx=True),
    Figure("Rounding decisions", "heatmap", "decisions", xlabel="input", ylabel="output", arms=("adaround", "flexround")),
)  # fmt: skip


def make_run(
    path: Path,
    *,
    arms=ARMS,
    tasks=TASKS,
    seeds=5,
    seed=0,
    shift=0.0,
    diverged=None,
    metrics=METRICS,
    claims_=CLAIMS,
    figures=FIGURES,
    paper="flexround",
    variant="",
    config=None,
    status="done",
    started="2031-05-04T10:20:30+00:00",
) -> Path:
    """A run folder with every file a finished run has. `shift` moves the last arm's accuracy."""
    rng = np.random.default_rng(seed)
    diverged = diverged or {}
    config = {
        "experiment": paper,
        "seed": 0,
        "seeds": seeds,
        "optimizer": {"lr": 0.003},
        "bits": 3,
    } | (config or {})
    rows = []
    shared = rng.normal(0, 0.6, (seeds, len(tasks)))
    for i, arm in enumerate(arms):
        (path / arm).mkdir(parents=True, exist_ok=True)
        lost = {int(s) for s in diverged.get(arm, {})}
        for j, task in enumerate(tasks):
            for s in range(seeds):
                quality = 97 - 3.0 * (len(arms) - 1 - i) * (len(tasks) - j) / len(tasks)
                if i == 0:
                    quality = 97.5
                noise = shared[s, j] + rng.normal(0, 0.25)
                made = {
                    "accuracy": quality + noise + (shift if i == len(arms) - 1 else 0),
                    "layer_mse": 0.4 ** (j + i + 1) * float(np.exp(rng.normal(0, 0.1))),
                }
                for name in metrics:
                    value = float(np.float32(made.get(name, rng.normal(1, 0.1))))
                    rows.append({
                        "paper": paper, "arm": arm, "task": task, "split": "test", "metric": name, "unit": metrics[name].unit,
                        "better": metrics[name].better, "value": None if s in lost else value, "seed": s, "step": 2000,
                        "wall_s": 12.5 + i, "peak_mem_mb": 310.0 + i, "device": "cpu", "deterministic": True, "seed_layout": "vmap",
                        "status": "nonfinite" if s in lost else "ok", "fallbacks": 0, "config_hash": "3f9a", "commit": "0123456789",
                        "claim": "", "claim_ref": "",
                    })  # fmt: skip
        curve = []
        for step in range(20, 2001, 20):
            for s in range(seeds):
                loss = (0.3 + 0.2 * i) * np.exp(-step / (300 + 90 * i)) + 0.01 * (i + 1) * np.exp(
                    rng.normal(0, 0.2)
                )
                values = {"loss": float(loss), "rate": float(0.003 * (1 - step / 2000))}
                curve.append(
                    {
                        "arm": arm,
                        "phase": "reconstruct",
                        "step": step,
                        "phase_step": step,
                        "seed": s,
                        "metrics": values,
                    }
                )
        _jsonl(path / arm / "metrics.jsonl", curve)
        n = np.array([16.0, 64, 256, 1024])
        np.savez(
            path / arm / "arrays.npz",
            n=np.tile(n, (seeds, 1)),
            accuracy_of_n=60 + 5 * i + 4 * np.log2(n) + rng.normal(0, 0.8, (seeds, 4)),
            decisions=rng.integers(-2, 3, (seeds, 24, 24)) * 1.0,
        )
    manifest = {
        "schema": 1, "paper": paper, "variant": variant, "title": "FlexRound (Lee et al. 2023): learned rounding by division",
        "arms": list(arms), "seeds": seeds, "seed": 0, "config_hash": "3f9ac0ffee", "commit": "0123456789",
        "versions": {"python": "3.11.9", "jax": "0.10.2", "qlab": "0.1.0"}, "device": "cpu, 2 cores", "platform": "Linux x86_64",
        "deterministic": True, "started": started, "command": f"python -m qlab.run --config configs/{paper}.py --config.seeds={seeds}",
        "status": status, "wall_s": 203.4, "claims": [c._asdict() for c in claims_], "figures": [f._asdict() for f in figures],
        "metrics": {k: m._asdict() for k, m in metrics.items()}, "arm_status": dict.fromkeys(arms, "done"), "diverged": diverged,
    }  # fmt: skip
    _jsonl(path / "results.jsonl", rows)
    verdicts = claims.check(claims_, rows, manifest)
    (path / "claims.json").write_text(json.dumps([v._asdict() for v in verdicts]))
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.json").write_text(json.dumps(config))
    (path / "command.txt").write_text(manifest["command"] + "\n")
    return path


def make_sweep(path: Path, axes, trials, *, explain=False, broken=(), **run) -> Path:
    """A sweep folder. trials: list of (overrides, shift of the last arm)."""
    record = {"config": "configs/flexround.py", "axes": axes, "trials": [], "explain": explain}
    for i, (overrides, shift) in enumerate(trials):
        name = f"trial_{i:03d}"
        trial = {
            "id": name,
            "overrides": overrides,
            "workdir": str(path / name),
            "status": "done",
            "reason": "",
            "command": f"python -m qlab.run --workdir {name}",
        }
        if i in broken:
            trial |= {"status": "failed", "reason": "config.bits=9: at most 8"}
        else:
            make_run(path / name, shift=shift, config={**overrides}, seed=i, **run)
        record["trials"].append(trial)
    path.mkdir(parents=True, exist_ok=True)
    (path / "sweep.json").write_text(json.dumps(record))
    return path


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_synthetic_run_has_all_three_verdicts(tmp_path):
    verdicts = json.loads((make_run(tmp_path / "run") / "claims.json").read_text())
    assert {v["verdict"] for v in verdicts} == {"HOLDS", "FAILS", "INCONCLUSIVE"}
