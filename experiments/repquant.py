"""RepQuant against layer-wise rounding, SmoothQuant with GPTQ and dynamic per-token grids: one walk over blocks."""

from __future__ import annotations

import re
from functools import partial

import jax

from qlab import data
from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.nn.outliers import norm_twin
from qlab.nn.vit import LINKS
from qlab.quantization.norm_links import Fit, smooth
from qlab.quantization.repquant import reparam, repquant, site_acts, weight_error
from qlab.quantization.site_study import METRICS as SITE_METRICS
from qlab.quantization.site_study import Cell, site_study

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Li et al. 2024"
STRONG = ("smooth_gptq", "token_gptq")
SAME = "the same on the twin up to rounding: both methods undo it, whatever its factors"

METRICS = SITE_METRICS | {
    "weight_error": Metric("", "lower", "relative squared error of rewritten post-LN weights"),
    "weight_error_before": Metric("", "none", "the same of the float net's weights as they are"),
}

CLAIMS = (
    Claim(
        "Reparameterisation gains ten points over layer-wise grids (w4a4_twin)",
        f"{PAPER}, abstract; RepQ-ViT, Table 1",
        ("repq_vit", "w4a4_twin/accuracy"),
        ">=",
        ("rtn", "w4a4_twin/accuracy"),
        margin=10.0,
        note="the twin is made of what smoothing and reparameterisation undo: see arm smooth",
    ),
    *(
        Claim(f"It is no worse than {what} (w4a4)", f"{PAPER}, {where}",
              ("repq_vit", "w4a4/accuracy"), ">=", (arm, "w4a4/accuracy"), note=note)
        for arm, what, where, note in (
            ("rtn", "layer-wise grids", "abstract", "a net without outlier channels"),
            ("smooth", "SmoothQuant with the same weight rounding", "related work", SAME),
        )
    ),
    *(
        Claim(f"RepQuant is no worse than RepQ-ViT ({cell})", f"{PAPER}, abstract",
              ("repquant", f"{cell}/accuracy"), ">=", ("repq_vit", f"{cell}/accuracy"), note=SAME)
        for cell in ("w4a4", "w3a4")
    ),
    *(
        Claim(f"RepQuant is no worse than smoothing or per-token grids with GPTQ ({cell})",
              f"{PAPER}, abstract",
              ("repquant", f"{cell}/accuracy"), ">=", (STRONG, f"{cell}/accuracy"),
              note="GPTQ, its target and its damping are the same in all three")
        for cell in ("w4a4", "w3a4")
    ),
    Claim(
        "Learned clipping brings the net no farther from the float one (w4a4)",
        f"{PAPER}, abstract (per-channel dual clipping)",
        ("dual_clip", "w4a4/kl"),
        "<=",
        ("repq_vit", "w4a4/kl"),
        margin=1.0,
        kind="ratio",
        note="KL resolves what 357 test images do not",
    ),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("KL to the float net", "bars", "kl", logy=True),
    Figure("Relative error of the block at work", "curve", "error", logy=True),
)


def cells(c) -> list[Cell]:
    """The table of names such as "w4a4_twin"; the anchor once more, with a fresh draw and method key."""
    made = []
    for name in c.cells:
        found = re.fullmatch("w([2-8])a([2-8])(_twin)?", name)
        if not found:
            raise UserError(f'cells: {name!r}; names such as "w4a4" or "w4a4_twin" are expected')
        w, a, twin = found.groups()
        made.append(Cell(name, int(w), int(a), "twin" if twin else "plain"))
    home = next((cell for cell in made if cell.name == c.anchor), None)
    return made if home is None else [home._replace(draw=1, run=1), *made]


def rewrite(c) -> Fit | None:
    """How the arm changes the LayerNorms."""
    if c.rewrite not in ("none", "smooth", "reparam"):
        raise UserError(f'rewrite={c.rewrite!r}; use "none", "smooth" or "reparam"')
    if c.rewrite == "smooth":
        return smooth(c.alpha)
    if c.rewrite == "reparam":
        return reparam(
            c.clip, ps=c.quantiles, round_zero=c.round_zero, steps=c.clip_steps,
            learning_rate=c.clip_learning_rate, batch_size=c.clip_batch,
        )  # fmt: skip
    return None


def build(c) -> Experiment:
    r = zoo.recipe(c.net)
    net = zoo.model(r.kind, r.widths)
    images = data.load(r.dataset)

    def nets(key: jax.Array):
        plain = zoo.train(c.net, key)[1]
        return {
            "plain": plain,
            "twin": norm_twin(plain, LINKS, c.twin_strength, jax.random.fold_in(key, 1)),
        }

    table = cells(c)
    grid = {"calibration": c.weight_grid, "n_grid": c.weight_shares}
    method = repquant(
        rewrite(c),
        site_acts(
            c.softmax, ps=c.quantiles, zero_code=c.zero_code, per_token=c.per_token, input_bits=8
        ),
        reconstruction=c.reconstruction, target=c.target, damp=c.damp, num_iters=c.num_iters,
        learning_rate=c.learning_rate, max_bits=max(cell.w_bits for cell in table), **grid,
    )  # fmt: skip
    test = images.held_out(c.split)
    study = site_study(
        net, nets, images.x_train, test, table, method,
        num_calibration=c.num_calibration, vary=c.vary,
    )  # fmt: skip
    last = table[-1]

    def evaluate(state):
        """The study's metrics, and what the rewrite did to the weights of the last cell."""
        if c.rewrite != "reparam":
            return study.evaluate(state)
        error = partial(weight_error, links=LINKS, bits=last.w_bits, **grid)
        after, before = (
            jax.lax.map(error, p).mean() for p in (state.quantized[1].params, state.params[1])
        )
        name = f"{last.name}/weight_error"
        return {**study.evaluate(state), name: after, f"{name}_before": before}

    return study._replace(evaluate=evaluate)
