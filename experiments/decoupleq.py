"""decoupleQ against nearest, GPTQ on three grids, AdaRound and FlexRound: one walk, equal targets."""

from __future__ import annotations

import jax
import optax

from qlab import data
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.quantization import adaround, flexround, methods
from qlab.quantization.decoupleq import DecoupleQ
from qlab.quantization.decoupleq_walk import adam, decoupleq, shrink_gptq
from qlab.quantization.one_layer import history, one_layer
from qlab.quantization.post_training import post_training
from qlab.quantization.tasks import METRICS as TABLE
from qlab.quantization.tasks import Task, with_repeats

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Guo et al., 2024"
METRICS = TABLE | {
    "first_layer": Metric(
        "", "lower", "mean squared error of the first layer, whose inputs all share"
    ),
    "loss": Metric("", "lower", "tr(E H E^T) / tr(w H w^T) of the one layer (variant :layer)"),
}
BASELINES = ("gptq_minmax", "gptq_mse", "shrink_gptq", "adaround", "flexround")
TARGETS = (
    ("same", "", "the paper's own target, for all"),
    ("fp", "_fp", "FlexRound's target, for all"),
)
BLOCK = "decoupleq_block"


def _w2(text: str, source: str, left: str, right, note: str = "", margin: float = 0.0) -> Claim:
    pair = (left, "w2/accuracy"), ">=", (right, "w2/accuracy")
    return Claim(f"2 bits: {text}", f"{PAPER}, {source}", *pair, margin, note=note)


CLAIMS = (
    *(
        _w2(f"with the block step GPTQ's accuracy on the min/max grid or more (target {t})",
            "abstract (near fp accuracy at 2 bits), our form", BLOCK + end, "gptq_minmax" + end, note)
        for t, end, note in TARGETS
    ),
    *(
        _w2(f"layer by layer no worse than the best baseline (target {t})", "tables of 2-bit LLaMA, our form",
            "decoupleq" + end, tuple(b + end for b in BASELINES), note)
        for t, end, note in TARGETS
    ),
    *(
        _w2(f"with the block step no worse than FlexRound on the same blocks (target {t})",
            "ours", BLOCK + end, "flexround_block" + end, note)
        for t, end, note in TARGETS
    ),
    _w2("the block step helps", "block-wise minimization", BLOCK, "decoupleq"),
    Claim("2 bits: within 5 points of the float net", f"{PAPER}, abstract", (BLOCK, "w2/accuracy"), ">=",
          (BLOCK, "w2/fp_accuracy"), -5.0, note="the 5 points are ours"),
    Claim("4 bits: within 1 point of the float net", f"{PAPER}, abstract", (BLOCK, "w4/accuracy"), ">=",
          (BLOCK, "w4/fp_accuracy"), -1.0, note="so is GPTQ"),
    Claim("2 bits: lowest error of all on the first layer", f"{PAPER}, layer objective",
          ("decoupleq", "w2/first_layer"), "<=", (("rtn_minmax", "rtn_mse", *BASELINES), "w2/first_layer"),
          1.0, "ratio", note="on calibration samples; GPTQ on the min/max grid is where it starts"),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("Error of the first layer", "bars", "first_layer", logy=True),
    Figure("Loss of the last layer after each half step, over nearest", "line", "history", "half_step",
           "nearest, GPTQ, then integers and floats in turn", logy=True),
    Figure("Loss of the layer", "bars", "loss", logy=True),
)  # fmt: skip


def tasks(c) -> list[Task]:
    """The cells, and two repeats of the first one that split its variance."""
    return with_repeats([Task(f"w{bits}", bits, "channel") for bits in c.bits], c.anchor)


def method(c) -> methods.Method:
    """The arm's way to quantize a unit."""
    if c.method == "rtn":
        return methods.nearest()
    if c.method == "gptq":
        return methods.gptq(damp=c.damp, act_order=c.act_order)
    if c.method == "shrink_gptq":
        return shrink_gptq(target=c.target, damp=c.damp)
    if c.method == "decoupleq":
        cfg = DecoupleQ(
            num_outer=c.num_outer, solver=c.solver, float_step=c.float_step, damp=c.damp,
            extra_damp=c.extra_damp, act_order=c.act_order, iters=c.pgd_iters, inner=c.pgd_inner,
            learning_rate=c.pgd_learning_rate,
        )  # fmt: skip
        return decoupleq(
            cfg, target=c.target, num_steps=c.num_iters * c.block_step, batch_size=c.batch_size,
            optimizer=adam(c.block_learning_rate, c.block_weight_decay), train=c.block_train,
        )  # fmt: skip
    rule = {"adaround": adaround, "flexround": flexround}[c.method]()
    rate = optax.cosine_decay_schedule(c.learning_rate, c.num_iters)
    return methods.learned(
        rule, optax.adam(rate), num_iters=c.num_iters, rounds=c.rounds, batch_size=c.batch_size
    )


def build(c) -> Experiment:
    grid = {"symmetric": c.symmetric, "calibration": c.calibration, "group": c.group}
    if c.net == "layer":
        return one_layer(
            method(c),
            c.bits,
            shape=(c.layer_out, c.layer_in),
            num_samples=c.num_calibration,
            grid_options=grid,
        )
    r = zoo.recipe(c.net)
    model = zoo.model(r.kind, r.widths)
    images = data.load(r.dataset)

    def nets(key: jax.Array):
        return {"plain": model.layers(zoo.train(c.net, key)[1])}

    is_conv = r.kind == "cnn"
    done = post_training(
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
        grid_options=grid,
        vary=c.vary,
        seed_layout="map" if is_conv else "vmap",
        loop="step" if is_conv else "scan",
    )

    def evaluate(state):
        out = dict(done.evaluate(state))
        if c.unit == "layer":
            first = state.groups[0].error[:, 0, 0]
            for i, t in enumerate(tasks(c)[: len(c.bits)]):
                out[f"{t.name}/first_layer"] = first[i]
        if c.method == "decoupleq":
            out |= history(state.groups[-1].carry.history[0, -1])
        return out

    return done._replace(evaluate=evaluate)
