"""What the AQ* study claims, measures and draws (arXiv 2204.06904); its experiment joins it with the searches."""

from __future__ import annotations

from qlab.lab.experiment import Claim, Figure, Metric

METRICS = {
    "iterations": Metric("", "lower", "batches popped, mean over targets"),
    "max_open": Metric("entries", "lower", "most entries in OPEN, mean over targets"),
    "solved": Metric("%", "higher", "targets compiled within the node limit"),
    "cost": Metric("gates", "lower", "mean length of the words found"),
    "cost_gap": Metric("%", "lower", "mean length above the exact optimum, compiled targets"),
    "optimal": Metric("%", "higher", "targets compiled at the optimal length"),
    "generated": Metric("nodes", "lower", "states made, mean over targets (enumeration: size of its table)"),
    "net_inputs": Metric("states", "lower", "states given to the net, mean over targets"),
    "time": Metric("s", "lower", "wall-clock a target, without compilation"),
    "slope": Metric("gates", "lower", "mean length per unit of log(1 / eps)"),
}  # fmt: skip
EASY = "a search without a net (arm uninformed) shows how much of it the node limit alone gives"
_AQ, _ONE = "aqstar", ("v_closed", "v_free", "ht_closed", "ht_free")
CLAIMS = (
    *(Claim(f"{n}: AQ* compiles 90 % of Haar targets to 0.05", "abstract, checked form", (_AQ, f"{n}_e0.05/solved"),
            ">=", 90.0, note=EASY) for n in _ONE),
    *(Claim(f"{n}: AQ* compiles more than a search without a net, eps 0.05", "ours", (_AQ, f"{n}_e0.05/solved"), ">=",
            ("uninformed", f"{n}_e0.05/solved")) for n in _ONE),
    *(Claim(f"{n}: mean length at most 1.2 times the optimum, eps 0.1", "abstract, checked form",
            (_AQ, f"{n}_e0.1/cost_gap"), "<=", 20.0, note="over the targets compiled") for n in _ONE),
    *(Claim(f"ht_closed: at most a third of Solovay-Kitaev's length, eps {t:g}", "abstract, checked form",
            (_AQ, f"ht_closed_e{t:g}/cost"), "<=", ("sk", f"ht_closed_e{t:g}/cost"), 1 / 3, kind="ratio",
            note="means over the targets each arm compiled: where AQ* solves fewer, it keeps the easy ones") for t in (0.2, 0.1, 0.05)),
    Claim("Inverse-free V gates: length grows at most 1.6 times as fast as with inverses", "abstract, checked form",
          (_AQ, "v_free/slope"), "<=", (_AQ, "v_closed/slope"), 1.6, kind="ratio", note="counting alone: 1.465"),
    Claim("Two qubits: AQ* finds 90 % of words of up to 6 gates", "abstract, checked form",
          (_AQ, "ht2_closed_words/solved"), ">=", 90.0, note=EASY),
    Claim("Two qubits: more than a search without a net", "ours", (_AQ, "ht2_closed_words/solved"), ">=",
          ("uninformed", "ht2_closed_words/solved")),
    Claim("v_closed: AQ* needs fewer nodes than A* with a value net, eps 0.05", "ours", (_AQ, "v_closed_e0.05/generated"),
          "<=", ("astar", "v_closed_e0.05/generated")),
)  # fmt: skip
FIGURES = (
    Figure("Targets compiled", "bars", "solved", ylabel="%"),
    Figure("Length above the optimum", "bars", "cost_gap", ylabel="%"),
    *(Figure(f"{n}: length against tolerance", "line", f"{n}_length", f"{n}_log_inv_eps", "log(1 / eps)", "gates") for n in _ONE),
    Figure("Training of the nets", "curve", "loss", logy=True),
)  # fmt: skip
