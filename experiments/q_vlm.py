"""Q-VLM on a small vision-language model: ranges searched in blocks that entropy chooses, against other range searches."""

from __future__ import annotations

import re

from qlab import data
from qlab.data.vqa import QUESTIONS
from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.nn.vlm import LINKS
from qlab.quantization.norm_links import awq, smooth
from qlab.quantization.q_vlm import Options, check_options
from qlab.quantization.vlm_study import METRICS as STUDY_METRICS
from qlab.quantization.vlm_study import Cell, vlm_study

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Wang et al. 2024"
REWRITES = ("none", "smooth", "awq")
OPTIONS = Options._fields

METRICS = STUDY_METRICS | {
    f"accuracy_{name}": Metric("%", "higher", f'test answers to "{text}"')
    for name, (text, _) in QUESTIONS.items()
}


def _closer(
    arm: str, rival: str, text: str, where: str, cell: str = "w4a4", note: str = ""
) -> Claim:
    """The arm's logits are no farther from the float net's than the rival's."""
    return Claim(
        f"{text}: output error ({cell})", f"{PAPER}, {where}",
        (arm, f"{cell}/mse"), "<=", (rival, f"{cell}/mse"), margin=1.0, kind="ratio", note=note,
    )  # fmt: skip


CLAIMS = (
    _closer("entropy", "layerwise", "Entropy blocks are no worse than layer-wise search", "abstract"),
    Claim("They gain a point of accuracy over layer-wise search (w4a4)", f"{PAPER}, abstract",
          ("entropy", "w4a4/accuracy"), ">=", ("layerwise", "w4a4/accuracy"), margin=1.0,
          note="the size of the gain is ours; 1 to 5 points were expected at this scale"),
    Claim("They gain less than a point where inputs have 8 bits (w4a8)", f"{PAPER}, tables",
          ("entropy", "w4a8/accuracy"), "<=", ("layerwise", "w4a8/accuracy"), margin=1.0,
          note="there is little left to gain"),
    Claim("They take less than half of the search of fixed blocks of three (w4a4)",
          f"{PAPER}, abstract", ("entropy", "w4a4/evaluations"), "<=",
          ("fixed_3", "w4a4/evaluations"), margin=0.5, kind="ratio", exact=True,
          note="candidate blocks run; fixed_3 tries all 7^3 combinations in each block"),
    _closer("entropy", "fixed_3", "They are no worse than exhaustive blocks of three", "abstract"),
    _closer("entropy", "shuffled", "Where entropy cuts matters: no worse than its lengths shuffled",
            "method", note="the same number of blocks of each length, so the same cost"),
    _closer("entropy", "fixed_1", "Blocks add to each layer searched alone by its output",
            "method"),
    Claim("Entropy H(k) ranks pairs by what a joint search gains (w4a4)", f"{PAPER}, method",
          ("entropy", "w4a4/spearman"), ">=", 0.0, note="the premise; G(k) of 23 pairs of layers"),
    _closer("entropy_encoder", "entropy", "The encoder step brings the net closer", "abstract"),
    Claim("Q-VLM is no worse than AWQ, SmoothQuant or min/max ranges (w4a4)", f"{PAPER}, tables",
          ("entropy_encoder", "w4a4/accuracy"), ">=",
          (("awq", "smoothquant", "rtn"), "w4a4/accuracy"),
          note="AWQ and SmoothQuant without range search; SmoothQuant with ranges per token"),
    Claim("No degradation: within 1 point of the float net (w4a4)", f"{PAPER}, abstract",
          ("entropy_encoder", "w4a4/accuracy"), ">=", ("entropy_encoder", "w4a4/fp_accuracy"),
          margin=-1.0),
    Claim("Memory falls by 2.78 (w4a4)", f"{PAPER}, abstract", ("entropy", "w4a4/memory_ratio"),
          ">=", 2.78, exact=True, paper=0.0,
          note="all parameters against bf16; small tables, norms and grids weigh more here"),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("Mean squared error of the logits", "bars", "mse", logy=True),
    Figure("Candidate blocks run by the search", "bars", "evaluations", logy=True),
    Figure("Shares of the ranges (w4a4)", "line", "w4a4/shares", x="layers", xlabel="layer",
           arms=("layerwise", "fixed_1", "fixed_3", "entropy")),
    Figure("Entropy H(k) of the codes (w4a4)", "line", "w4a4/proxy", x="layers", xlabel="layer",
           ylabel="nat", arms=("entropy",)),
)  # fmt: skip


def cells(names) -> list[Cell]:
    """The table of names such as "w4a8"."""
    made = []
    for name in names:
        found = re.fullmatch("w([2-8])a([2-8])", name)
        if not found:
            raise UserError(f'cells: {name!r}; names such as "w4a8" are expected')
        made.append(Cell(name, int(found[1]), int(found[2])))
    return made


def build(c) -> Experiment:
    r = zoo.recipe(c.net)
    if r.kind != "vlm":
        raise UserError(f"net={c.net!r} is no vision-language model; use digits_vlm")
    if c.rewrite not in REWRITES:
        raise UserError(f"rewrite={c.rewrite!r}; use one of {', '.join(REWRITES)}")
    set_ = data.load(r.dataset)
    options = Options(**{name: c[name] for name in OPTIONS})
    check_options(options)

    def fit(w_bits: int):
        if c.rewrite == "smooth":
            return smooth(c.alpha)
        return awq(w_bits, group=c.group, calibration=c.weight_grid)

    test = set_.held_out(c.split)
    return vlm_study(
        zoo.model(r.kind, r.widths), lambda key: zoo.train(c.net, key)[1], set_.x_train, test,
        cells(c.cells), options, questions=tuple(QUESTIONS), links=LINKS,
        rewrite=None if c.rewrite == "none" else fit, premise=c.premise,
        num_calibration=c.num_calibration,
    )  # fmt: skip
