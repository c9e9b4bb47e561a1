"""RepQuant against layer-wise rounding, SmoothQuant with GPTQ and dynamic per-token grids: one walk over blocks."""

from __future__ import annotations

from functools import partial

import jax

from qlab import data
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.nn.outliers import norm_twin
from qlab.nn.vit import LINKS
from qlab.quantization import site_study
from qlab.quantization.norm_links import Fit, smooth
from qlab.quantization.repquant import reparam, repquant, site_acts, weight_error

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Li et al. 2024"
STRONG = ("smooth_gptq", "token_gptq")
TWIN = "the twin is made of what smoothing and reparameterisation both undo"

METRICS = site_study.METRICS | {
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
        note=TWIN,
    ),
    Claim(
        "It is no worse than SmoothQuant with the same weight rounding (w4a4_twin)",
        f"{PAPER}, related work",
        ("repq_vit", "w4a4_twin/accuracy"),
        ">=",
        ("smooth", "w4a4_twin/accuracy"),
        note=TWIN,
    ),
    *(
        Claim(f"RepQuant is no worse than RepQ-ViT ({cell})", f"{PAPER}, abstract",
              ("repquant", f"{cell}/accuracy"), ">=", ("repq_vit", f"{cell}/accuracy"))
        for cell in ("w4a4", "w4a4_twin", "w3a4_twin")
    ),
    *(
        Claim(
            f"RepQuant is no worse than smoothing or per-token grids with GPTQ ({cell})",
            f"{PAPER}, abstract",
            ("repquant", f"{cell}/accuracy"),
            ">=",
            (STRONG, f"{cell}/accuracy"),
            note="GPTQ, its target and its damping are the same in all three",
        )
        for cell in ("w4a4", "w4a4_twin")
    ),
    Claim(
        "Learned clipping brings the net no farther from the float one (w4a4_twin)",
        f"{PAPER}, abstract (per-channel dual clipping)",
        ("dual_clip", "w4a4_twin/kl"),
        "<=",
        ("repq_vit", "w4a4_twin/kl"),
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


def cells(c) -> list[site_study.Cell]:
    """The table; the anchor comes twice more, with a fresh method key and with a fresh draw too."""
    made = [
        site_study.Cell(f"w{w}a{a}" + ("_twin" if net == "twin" else ""), w, a, net)
        for net in c.nets
        for w, a in c.bits
    ]
    home = next((cell for cell in made if cell.name == c.anchor), None)
    repeats = [] if home is None else [home._replace(run=1), home._replace(draw=1, run=1)]
    return repeats + made


def rewrite(c) -> Fit | None:
    """How the arm changes the LayerNorms."""
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
    study = site_study.site_study(
        net,
        nets,
        images.x_train,
        (images.x_val, images.y_val) if c.split == "val" else (images.x_test, images.y_test),
        table,
        method,
        num_calibration=c.num_calibration,
        vary=c.vary,
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
        names = (f"{last.name}/weight_error", f"{last.name}/weight_error_before")
        return study.evaluate(state) | dict(zip(names, (after, before), strict=True))  # pyright: ignore[reportOperatorIssue]

    return study._replace(evaluate=evaluate)
