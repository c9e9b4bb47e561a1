"""PD-Quant against nearest, AdaRound, BRECQ and QDrop: one walk over the blocks of a ResNet with batch norm."""

from __future__ import annotations

import jax
import optax

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.quantization.adaround import adaround
from qlab.quantization.block_rounding import learned_weight
from qlab.quantization.blocks import nearest_weight, site_by_site
from qlab.quantization.bn_statistics import correct_inputs
from qlab.quantization.pd_quant import WIDE, Fit, Parts, beside, by_width, pd_quant, searched_act
from qlab.quantization.site_study import METRICS as SITE_METRICS
from qlab.quantization.site_study import BlockMethod, Cell, site_study

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Liu et al., CVPR 2023"
METHODS = ("rtn", "adaround", "blocks")

METRICS = SITE_METRICS | {
    "lost": Metric("pt", "lower", "accuracy lost between the widest and the narrowest cell"),
    "kl_gap": Metric("nat", "lower", "KL on the test set less KL on the calibration images"),
}

CLAIMS = (
    Claim("PD-Quant is no worse than QDrop, W2A2",
          f"{PAPER}, abstract (ResNet-18: 53.14) against QDrop's 51.14",
          ("pd_quant", "w2a2/accuracy"), ">=", ("qdrop", "w2a2/accuracy"), paper=2.0,
          note="a small net on digits: parity is possible"),
    Claim(
        "PD-Quant is no worse than the stronger of BRECQ and QDrop, W2A2",
        "ours: QDrop is not the stronger one everywhere",
        ("pd_quant", "w2a2/accuracy"),
        ">=",
        (("brecq", "qdrop"), "w2a2/accuracy"),
    ),
    Claim(
        "Its logits are nearer to the float net's than QDrop's, W2A2",
        f"{PAPER}, abstract (difference of predictions)",
        ("pd_quant", "w2a2/kl"),
        "<=",
        ("qdrop", "w2a2/kl"),
        margin=1.0,
        kind="ratio",
        note="KL on the test set, which resolves what 357 answers do not",
    ),
    Claim(
        "Its gain over QDrop is larger at W2A2 than at W4A4",
        f"{PAPER}, abstract (especially in low-bit settings)",
        ("pd_quant", "w2a2/lost"),
        "<=",
        ("qdrop", "w2a2/lost"),
        note="the same inequality, read as points lost from W4A4 to W2A2",
    ),
    *(
        Claim(
            f"{what} adds to QDrop, W2A2",
            f"{PAPER}, abstract",
            (arm, "w2a2/accuracy"),
            ">=",
            ("qdrop", "w2a2/accuracy"),
        )
        for arm, what in (
            ("qdrop_pd", "The prediction difference"),
            ("qdrop_dc", "Distribution correction"),
        )
    ),
    Claim(
        "Distribution correction lessens overfitting to the calibration images, W2A2",
        f"{PAPER}, abstract",
        ("pd_quant", "w2a2/kl_gap"),
        "<=",
        ("qdrop_pd", "w2a2/kl_gap"),
        note="KL on the test set less KL on the calibration images",
    ),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("KL to the float net", "bars", "kl", ylabel="nat", logy=True),
    Figure("KL on the test set less KL on the calibration images", "bars", "kl_gap", ylabel="nat"),
)


def method(c, max_bits: int) -> BlockMethod:
    """The arm's way to quantize a block."""
    grid = {"calibration": c.weight_grid}
    if c.method == "blocks":
        parts = Parts(c.lamb_r if c.pd else None, c.difference, c.temperature, c.suffix)
        fit = Fit(
            c.num_iters, c.batch_size, c.rate, c.step_rate, c.absolute_steps, c.reg_weight, c.warmup
        )
        return pd_quant(parts, fit, max_bits=max_bits, num_search=c.num_search, **grid)

    def weight(bits: int):
        if c.method == "rtn":
            return nearest_weight(max_bits=bits, **grid)
        rule = adaround(reg_weight=c.reg_weight, warmup=c.warmup)
        return learned_weight(
            rule, optax.adam(c.rate), num_iters=c.num_iters, batch_size=c.batch_size,
            max_bits=bits, **grid,
        )  # fmt: skip

    act = searched_act(num=c.num_search)
    return site_by_site(act=act, weight=by_width(weight(max_bits), weight(8)))


def build(c) -> Experiment:
    if c.method not in METHODS:
        raise UserError(f"method={c.method!r}: expected {', '.join(METHODS)}")
    if c.net == "imagenet_resnet18":
        raise UserError(
            "pd_quant:full needs ImageNet (1024 training and the 50,000 validation images) and a trained ResNet-18 "
            "with its batch norms; qlab.data and qlab.nn.zoo read neither yet: use :cifar or the standard config"
        )
    r = zoo.recipe(c.net)
    family = zoo.model(r.kind, r.widths)
    images = zoo.examples(r.dataset)
    test = images.held_out(c.split)
    widths = [[int(bits) for bits in name[1:].split("a")] for name in c.cells]
    cells = [Cell(name, w, a) for name, (w, a) in zip(c.cells, widths, strict=True)]
    blocks = c.method == "blocks"

    def around(key: jax.Array, name: str, x):
        del name  # there is one net
        params, steps = zoo.train(c.net, key)[1], c.dc_steps if c.dc else 0
        inputs = correct_inputs(family.net, params, x, lamb_c=c.lamb_c, n=steps, lr=c.dc_rate)
        return beside(inputs, c.mix, c.quantized)

    study = site_study(
        family.folded, lambda key: {"plain": family.fold(zoo.train(c.net, key)[1])}, images.x_train,
        test, cells, method(c, max(cell.w_bits for cell in cells)),
        around=blocks, beside=around if blocks else None, wide=WIDE,
        num_calibration=c.num_calibration, vary=c.vary,
    )  # fmt: skip

    def evaluate(state):
        v = dict(study.evaluate(state))
        for cell in c.cells:
            v[f"{cell}/kl_gap"] = v[f"{cell}/kl"] - v[f"{cell}/kl_calibration"]
        low, high = (pick(cells, key=lambda x: x.w_bits + x.a_bits).name for pick in (min, max))
        return v | {f"{low}/lost": v[f"{high}/accuracy"] - v[f"{low}/accuracy"]}

    return study._replace(evaluate=evaluate)
