"""Gradient-based post-training quantization: which choices matter, the recipe of winners, bits by importance."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from qlab import data
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.quantization import methods
from qlab.quantization.decoupleq_walk import decoupleq
from qlab.quantization.gradient_ptq_study import Net, Plan, study
from qlab.quantization.ptq_options import OPTIONS, axis
from qlab.quantization.ptq_stages import block_stages, chain_stages

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Yvinec et al. 2023, abstract"
WIDTHS = {"mlp": (2, 3), "cnn": (2, 3), "vit": (3, 4)}
METRICS = {
    "accuracy": Metric("%", "higher", "test accuracy of the quantized net"),
    "fp_accuracy": Metric("%", "none", "test accuracy of the float net"),
    "kl": Metric("nat", "lower", "test mean of KL(float net || quantized net)"),
    "heldout_kl": Metric(
        "nat", "lower", "the same on held-out training images, by which is chosen"
    ),
    "soft_accuracy": Metric("%", "none", "test accuracy before the last rounding decisions"),
    "soft_gap": Metric("pt", "none", "soft_accuracy less accuracy: what hardening changes"),
    "lr": Metric("", "none", "the learning rate chosen"),
    "spread": Metric("pt", "none", "range of test accuracy over an axis, base included"),
    "spread_rest": Metric("pt", "none", "the same without the worst option"),
    "gain": Metric("pt", "higher", "test accuracy that the axis' winner adds to the base"),
}


def _pair(
    text: str,
    source: str,
    net: str,
    left: str,
    right: str,
    note: str = "",
    op: Literal[">=", "<="] = ">=",
) -> Claim:
    return Claim(text, source, (net, left), op, (net, right), note=note)


CLAIMS = (
    *(
        _pair(f"{net}: weights, features and calibration set matter less than loss, freedom, grid and optimizer",
              f"{PAPER} (robust to the first, best practices for the others)", net, f"axes_abc/{what}",
              f"axes_defg/{what}", note, "<=")
        for net in WIDTHS
        for what, note in (
            ("spread", "range of accuracy over an axis' options; one bad option decides it"),
            ("spread_rest", "the same without the worst option of each axis"),
        )
    ),
    *(
        _pair(f"{net}: the recipe is no worse than AdaRound ({cell})",
              f"{PAPER} (improves every method, +6.8 points on ViT at 4 bits)", net, f"{cell}_recipe/accuracy",
              f"{cell}_base/accuracy", "chosen on held-out calibration images inside each run")
        for net, widths in WIDTHS.items()
        for cell in (f"w{b}" for b in widths)
    ),
    *(
        _pair(f"{net}: the recipe is no worse than {rival} ({cell})", "ours: closed forms on the same cells", net,
              f"{cell}_recipe/accuracy", f"{cell}_{rival}/accuracy")
        for net, widths in WIDTHS.items()
        for cell in (f"w{widths[0]}",)
        for rival in ("gptq", "decoupleq")
    ),
    *(
        _pair(f"{net}: mixed bits by importance, 3 on average, are no worse than {what}", source, net,
              "mp_ig_3/accuracy", right)
        for net in WIDTHS
        for what, source, right in (
            ("3 bits everywhere", PAPER, "w3_base/accuracy"),
            ("bits by squared error of the weights", "ours", "mp_mse_3/accuracy"),
            ("random bits", "ours", "mp_random_3/accuracy"),
        )
    ),
    *(
        _pair(f"{net}: the same at 2.5 bits on average, against {what}", "ours: a budget with more to lose", net,
              "mp_ig_2p5/accuracy", right)
        for net in WIDTHS
        for what, right in (("squared error", "mp_mse_2p5/accuracy"), ("random bits", "mp_random_2p5/accuracy"))
    ),
)  # fmt: skip

FIGURES = (
    Figure("Range of accuracy over an axis", "bars", "spread", ylabel="points"),
    Figure("The same without the worst option", "bars", "spread_rest", ylabel="points"),
    Figure("What the axis' winner adds to AdaRound", "bars", "gain", ylabel="points"),
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
)
GELU = partial(jax.nn.gelu, approximate=False)


def net_of(c) -> Net:
    """The net of the zoo in units of layers, and of blocks where options ask for them."""
    r = zoo.recipe(c.net)
    model = zoo.model(r.kind, r.widths)
    units = ["layer", *(n[2:] for n in c.options if axis(n) == "h")]
    if r.kind != "vit":
        cuts = {unit: chain_stages(model.chain, model.shapes, unit) for unit in units}
        return Net(
            {unit: stages for unit, (stages, _) in cuts.items()},
            lambda unit, trained: cuts[unit][1](model.layers(trained)),
            r.kind == "mlp",
        )
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *data.load(r.dataset).x_train.shape[1:]), jnp.float32)
    stages = block_stages(
        model, params, x, activations={"fc1": GELU}, normed=("qkv", "fc1", "head")
    )
    return Net(dict.fromkeys(units, stages), lambda unit, trained: trained, False)


def build(c) -> Experiment:
    images = zoo.examples(zoo.recipe(c.net).dataset)
    test = images.held_out(c.split)
    closed = {
        "gptq": methods.gptq(damp=c.damp),
        "decoupleq": decoupleq(target="fp"),
    }
    plan = Plan(
        tuple(n for n in OPTIONS if n in c.options) + tuple(n for n in c.options if n not in OPTIONS),
        tuple(c.bits), tuple(c.rates), c.num_iters, c.batch_size, c.reg_weight, tuple(c.budgets), tuple(c.menu),
        c.midpoints, {k: m for k, m in closed.items() if k in c.closed},
    )  # fmt: skip

    def train(key):
        return zoo.train(c.net, key)[1]

    return study(net_of(c), train, (images.x_train, images.y_train), test, plan)
