"""All post-training methods on the same nets, calibration samples, seeds and budget: one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlab import data
from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric, side_by_side
from qlab.nn import zoo
from qlab.quantization import ptq_table as table
from qlab.quantization.site_study import METRICS as SITE_METRICS
from qlab.quantization.site_study import site_study
from qlab.quantization.timed_study import measure_once, timed
from qlab.quantization.whole_net import (
    ada_dfq_quantizer,
    data_free_net,
    q_vlm_quantizer,
    whole_study,
)

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
OURS = "ours: the methods' own papers use other nets, data and budgets"
ONE_BY_ONE = ("adaround", "adaquant", "flexround")  # learned product by product
GENERAL = ("gptq", "decoupleq", *ONE_BY_ONE)

METRICS = SITE_METRICS | {
    "seconds": Metric("s", "lower", "calibration of the cell, without compiling"),
    "memory": Metric("MiB", "lower", "temporary and output arrays of the compiled calibration"),
    "float_time": Metric("s", "none", "one pass of the float net over the test images"),
    "packed_time": Metric("s", "lower", "the same of the packed net"),
}

CLAIMS = (
    *(
        Claim(f"GPTQ is no worse than the best learned rounding of products, {cell.upper()}, mean over nets",
              OURS, ("gptq", f"mean_{cell}/accuracy"), ">=", (ONE_BY_ONE, f"mean_{cell}/accuracy"),
              note="same grid, same target")
        for cell in ("w2", "w4a4")
    ),
    Claim("decoupleQ is no worse than GPTQ, W2, mean over nets", "Guo et al. 2024, abstract (2 bits)",
          ("decoupleq", "mean_w2/accuracy"), ">=", ("gptq", "mean_w2/accuracy")),
    Claim("FlexRound is no worse than AdaRound, W2, mean over nets", "Lee et al. 2023, abstract",
          ("flexround", "mean_w2/accuracy"), ">=", ("adaround", "mean_w2/accuracy")),
    Claim("Gradient-based PTQ's choices are no worse than AdaRound, W2, mean over nets", "Yvinec et al. 2023, abstract",
          ("gradient", "mean_w2/accuracy"), ">=", ("adaround", "mean_w2/accuracy")),
    *(
        Claim(f"{text} is no worse than the best general method, W4A4 (rescaled {label})",
              f"{source}, abstract", (name, f"{label}_w4a4_twin/accuracy"), ">=",
              ((*GENERAL, "smooth", "smooth_gptq"), f"{label}_w4a4_twin/accuracy"), note=note)
        for name, text, label, source, note in (
            ("repquant", "RepQuant", "vit", "Li et al. 2024",
             "smoothing with GPTQ undoes the rescaling as well"),
            ("mambaquant", "MambaQuant", "mamba", "Xu et al. 2025",
             "it rounds to nearest, and its online rotations cost run time"),
        )
    ),
    Claim("PD-Quant is no worse than the best general method, W4A4 (ResNet)",
          "Liu et al. 2023, abstract", ("pd_quant", "resnet_w4a4/accuracy"), ">=",
          ((*GENERAL, "brecq", "qdrop"), "resnet_w4a4/accuracy"),
          note="block methods learn activation steps too"),
    Claim("AdaDFQ is within 2 points of the best general method, W4A4 (ResNet)", "ours: it sees no data",
          ("ada_dfq", "resnet_w4a4/accuracy"), ">=", (GENERAL, "resnet_w4a4/accuracy"), margin=-2.0),
    Claim("Q-VLM is no worse than the best general method, W4A4 (vision-language model, :vlm)",
          "Wang et al. 2024, abstract", ("q_vlm", "vlm_w4a4/accuracy"), ">=",
          ((*GENERAL, "smooth", "smooth_gptq"), "vlm_w4a4/accuracy"),
          note="its ranges are finer than one per tensor"),
)  # fmt: skip

FIGURES = (
    *(
        Figure(f"Accuracy against bytes, weights only: {label}", "line", f"front_{label}_accuracy",
               x=f"front_{label}_bytes", xlabel="bytes", ylabel="%")
        for label in ("mlp", "vit", "mamba", "resnet")
    ),
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("KL to the float net", "bars", "kl", ylabel="nat", logy=True),
    Figure("Time to calibrate a cell", "bars", "seconds", ylabel="s", logy=True),
)  # fmt: skip


def method(c) -> table.Method:
    rate = c.rates.get(c.rounding, 0.0)
    return table.Method(
        c.rounding, c.rewrite, c.num_iters, c.batch_size, rate, c.step_rate, c.damp, c.dc_steps,
        c.num_search, table.Recipe(**c.recipe),
    )  # fmt: skip


def whole(c, f: table.Family, net: str):
    """(net, nets, how to prepare) of a method that works on the whole net at once."""
    if c.rounding == "q_vlm":
        return f.net, f.nets, q_vlm_quantizer(f.net)
    assert f.norms is not None
    r, wide = zoo.recipe(net), tuple(f.wide.items())
    shape = data.load(r.dataset).x_test.shape[1:]
    return *f.norms, ada_dfq_quantizer(data_free_net(r.widths, shape, wide=wide, **c.data_free))


def one_net(c, label: str) -> Experiment:
    m = method(c)
    f = table.family(c.nets[label], c.twin_strengths, m.rewrite)
    set_ = zoo.examples(zoo.recipe(c.nets[label]).dataset)
    test = set_.held_out(c.split)
    made = table.cells(c.cells, label)
    common = {"num_calibration": c.num_calibration, "vary": c.vary}
    if m.rounding in table.WHOLE:
        net, nets, prepare = whole(c, f, c.nets[label])
        return whole_study(net, nets, set_.x_train, test, made, prepare, wide=f.wide, **common)
    study = site_study(f.net, f.nets, set_.x_train, test, made, **common, **table.arm(f, m))
    measure = None
    if c.time_packed:
        measure = measure_once(f.net, made, jax.tree.map(jnp.asarray, test[0]), f.wide)
    run = timed(study, made, measure)
    front = sorted(
        (k for k in made if k.net == "plain" and k.a_bits == table.FLOAT_BITS),
        key=lambda k: k.w_bits,
    )

    def evaluate(state) -> Mapping[str, Any]:
        values = dict(run.evaluate(state))
        for name in ("bytes", "accuracy") if len(front) > 1 else ():
            values[f"front_{label}_{name}"] = jnp.stack([values[f"{k.name}/{name}"] for k in front])
        return values

    return run._replace(evaluate=evaluate)


def build(c) -> Experiment:
    here = [k for k, net in c.nets.items() if table.fits(method(c), zoo.recipe(net).kind)]
    if not here:
        raise UserError(
            f"rounding={c.rounding!r}, rewrite={c.rewrite!r} fits none of the nets {', '.join(c.nets)}"
        )
    joined = side_by_side({label: one_net(c, label) for label in here})

    def evaluate(state) -> Mapping[str, Any]:
        values = dict(joined.evaluate(state))
        if len(here) == len(c.nets):
            for name in c.cells:
                for metric in ("accuracy", "kl", "flips", "seconds"):
                    found = [values[f"{label}_{name}/{metric}"] for label in here]
                    values[f"mean_{name}/{metric}"] = jnp.stack(found).mean()
        return values

    return joined._replace(evaluate=evaluate)
