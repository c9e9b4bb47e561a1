"""FlexRound against rounding to nearest, AdaRound, AdaQuant and GPTQ: one walk over layers, other methods."""

from __future__ import annotations

import jax
import optax

from qlab import data
from qlab.lab.experiment import Claim, Experiment, Figure
from qlab.nn import zoo
from qlab.nn.chain import inject_outliers
from qlab.quantization import adaquant, adaround, flexround, lrq, methods
from qlab.quantization.post_training import post_training
from qlab.quantization.tasks import METRICS, Task, with_repeats

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Lee et al., ICML 2023"
CELLS = tuple(
    f"w{b}_{g}{twin}" for twin in ("", "_twin") for g in ("tensor", "channel") for b in (2, 3, 4)
)
SMALL = "8-layer digits net, so no ImageNet margin is expected"

CLAIMS = (
    *(
        Claim(
            f"FlexRound is no worse than rounding to nearest ({cell})",
            f"{PAPER}, sanity: learning starts from nearest",
            ("flexround", f"{cell}/accuracy"),
            ">=",
            ("rtn_mse", f"{cell}/accuracy"),
            note="same searched grid for both",
        )
        for cell in CELLS
    ),
    *(
        Claim(
            f"FlexRound keeps up with AdaRound, per tensor ({cell})",
            f"{PAPER}, abstract (per-tensor uniform PTQ)",
            ("flexround", f"{cell}/accuracy"),
            ">=",
            ("adaround", f"{cell}/accuracy"),
            margin=-0.3,
            note=SMALL,
        )
        for cell in ("w2_tensor", "w3_tensor")
    ),
    Claim(
        "FlexRound beats AdaRound where weight ranges differ widely, per tensor (w4_tensor_twin)",
        f"{PAPER}, abstract (per-tensor uniform PTQ)",
        ("flexround", "w4_tensor_twin/accuracy"),
        ">=",
        ("adaround", "w4_tensor_twin/accuracy"),
        margin=1.0,
        note="the twin re-scales hidden channels by 2^U(-2, 2) to get such ranges",
    ),
    Claim(
        "Division beats addition (w4_tensor_twin)",
        f"{PAPER}, abstract (division, not addition)",
        ("flexround", "w4_tensor_twin/accuracy"),
        ">=",
        ("adaquant", "w4_tensor_twin/accuracy"),
        note="AdaQuant here is the same program with round(w / s1 + V)",
    ),
)

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("Layer error against rounding to nearest", "bars", "mse_ratio", logy=True),
    Figure(
        "Error of the layer at work over that of rounding to nearest",
        "curve",
        "mse_ratio",
        logy=True,
    ),
)


def tasks(c) -> list[Task]:
    """The cells, and two repeats of the first one that split its variance."""
    cells = [
        Task(f"w{bits}_{kind}" + ("_twin" if net == "twin" else ""), bits, kind, net)
        for net in c.nets
        for kind in c.granularities
        for bits in c.bits
    ]
    return with_repeats(cells, c.anchor)


def method(c) -> methods.Method:
    """The arm's way to quantize a unit."""
    if c.method == "rtn":
        return methods.nearest()
    if c.method == "gptq":
        return methods.gptq(damp=c.damp, act_order=c.act_order)
    rule = {
        "adaround": lambda: adaround(reg_weight=c.reg_weight),
        "adaquant": lambda: adaquant(learn_s1=c.learn_s1),
        "flexround": lambda: (
            flexround(learn_s1=c.learn_s1, use_s3=c.use_s3, parametrisation=c.parametrisation)
            if c.rule == "division"
            else adaquant(learn_s1=c.learn_s1)
        ),
        "lrq": lambda: lrq(c.rank, learn_s1=c.learn_s1),
    }[c.method]()
    lr = c.learning_rate
    rate = optax.cosine_decay_schedule(lr, c.num_iters) if c.schedule == "cosine" else lr
    return methods.learned(
        rule,
        optax.adam(rate),
        num_iters=c.num_iters,
        rounds=c.rounds,
        batch_size=c.batch_size,
        reduction=c.reduction,
        input_mix=c.input_mix,
    )


def build(c) -> Experiment:
    r = zoo.recipe(c.net)
    model = zoo.model(r.kind, r.widths)
    images = data.load(r.dataset)

    def nets(key: jax.Array):
        layers = model.layers(zoo.train(c.net, key)[1])
        twin = inject_outliers(layers, c.twin_strength, jax.random.fold_in(key, 1))
        return {"plain": layers, "twin": twin}

    is_conv = r.kind == "cnn"
    return post_training(
        model.chain,
        model.shapes,
        nets,
        images.x_train,
        images.held_out(c.split),
        tasks(c),
        method(c),
        target=c.target,
        unit=c.unit,
        num_calibration=c.num_calibration,
        grid_options={
            "symmetric": c.symmetric,
            "calibration": c.calibration,
            "ties": c.rounding_ties,
        },
        vary=c.vary,
        seed_layout="map" if is_conv else "vmap",
        loop="step" if is_conv else "scan",
    )
