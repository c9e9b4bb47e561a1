"""One table of post-training methods: the same nets, calibration samples, seeds and budget for all.

Nets, all trained on 8 x 8 or 16 x 16 digits: a deep narrow MLP, a ViT, a Mamba, a ResNet with batch norms. Cells: weights
alone at 2 and 3 bits, weights and activations at 4, the last also on the outlier twin of each net (the same function with
channels rescaled by 2^U(-k, k), which smoothing inverts). Shared by all arms: 64 calibration images; weights per row on
an asymmetric grid (the share of the range of least |error|^2.4); activations on one static grid per tensor; GPTQ,
decoupleQ and learned rounding towards the float net's outputs; 300 Adam steps a learned product, 600 a learned
block. The net's input, and a Mamba's states and C, have 8 bits at least; a ResNet's first and last layers have 8.

Arms: rtn (range of the weights), mse (searched range), smooth (SmoothQuant on norms), gptq, adaround, adaquant,
flexround, decoupleq, smooth_gptq; and where they exist repquant (ViT: reparameterised norms, half-octave softmax, GPTQ),
mambaquant (Mamba: KLT rotations and smoothing), brecq, qdrop, pd_quant (ResNet: blocks with their activation steps),
ada_dfq (ResNet, W4A4: trained on generated images for 1000 iterations; it sees no calibration image), and gradient (learned rounding
with the choices that won most often on held-out images in configs/gradient_ptq.py: free straight-through offsets and a
constant rate; its losses behind the next activation and its larger calibration sets are not taken, being no equal budget).
mean_<cell> is the mean over nets, of the arms that ran on all.

Rates of Adam are those that the methods' own studies here chose on validation images; nothing was tuned for this
table. A seed draws the trained nets and their twins, the calibration images, and the method's key.

Variant :vlm is a vision-language model (DigitsVQA, 66 weights and inputs of products; the rest is float) at W4A4 and W4A8,
16 calibration pictures with five questions each, and has the arm q_vlm (its ranges are one per token row or per
channel, finer than the other arms' one per tensor; smooth is SmoothQuant).
Variant :full has all widths on plain nets and twins, lrq, and ten seeds (hours; it resumes).
    python -m qlab.run --config configs/ptq_table.py
    python -m qlab.run --config configs/ptq_table.py --arms gptq,decoupleq --config.num_calibration=256
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "vlm", "full")


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="ptq_table", seeds=3)
    # nets and cells
    c.nets = {
        "mlp": "digits_deep",
        "vit": "digits_vit",
        "mamba": "digits_mamba",
        "resnet": "digits_resnet",
    }
    c.twin_strengths = {"mlp": 2.0, "vit": 2.5, "mamba": 4.0, "resnet": 2.0}
    c.cells = ("w2", "w3", "w4a4", "w4a4_twin")
    c.vary = ("net", "calibration", "method")  # what a seed decides
    c.split = "test"  # "val" to tune
    c.num_calibration = 64
    # the arm
    c.rounding = "mse"
    c.rewrite = "none"
    c.time_packed = False  # run the packed net beside the float one
    # budgets and rates, equal for all
    c.num_iters = 300
    c.batch_size = 32
    c.rates = {
        "adaround": 3e-2,
        "adaquant": 3e-2,
        "flexround": 3e-2,
        "lrq": 3e-2,
        "brecq": 1e-1,
        "qdrop": 1e-1,
        "pd_quant": 1e-1,
        "gradient": 3e-2,
    }
    # of the gradient-based arm, see configs/gradient_ptq.py
    c.recipe = {
        "rule": "ste_free",
        "loss": "l2",
        "optimizer": "adam",
        "schedule": "constant",
        "reg_weight": 10.0,
    }
    # of AdaDFQ, see configs/ada_dfq.py
    c.data_free = {
        "num_steps": 1000,
        "warmup": 300,
        "range_steps": 300,
        "rate_q": 1e-3,
        "gen_widths": (32, 16),
        "pixel_mean": (0.306,),
        "pixel_std": (0.376,),
    }
    c.step_rate = 2e-3  # of activation steps
    c.damp = 0.01  # GPTQ's
    c.dc_steps = 100  # of PD-Quant's distribution correction
    c.num_search = 64  # images on which a ResNet's activation steps are searched
    c.arms = {
        "rtn": {"rounding": "rtn", "time_packed": True},
        "mse": {},
        "smooth": {"rewrite": "smooth"},
        "gptq": {"rounding": "gptq"},
        "adaround": {"rounding": "adaround"},
        "adaquant": {"rounding": "adaquant"},
        "flexround": {"rounding": "flexround"},
        "decoupleq": {"rounding": "decoupleq"},
        "smooth_gptq": {"rounding": "gptq", "rewrite": "smooth"},
        "repquant": {"rounding": "gptq", "rewrite": "repquant"},
        "mambaquant": {"rewrite": "mambaquant"},
        "brecq": {"rounding": "brecq"},
        "qdrop": {"rounding": "qdrop"},
        "pd_quant": {"rounding": "pd_quant"},
        "gradient": {"rounding": "gradient"},
        "ada_dfq": {"rounding": "ada_dfq", "cells": ("w4a4", "w4a4_twin")},
    }
    if variant == "smoke":
        c.update(seeds=1, cells=("w4a4",), num_calibration=32)
        c.nets = ConfigDict({"mlp": "digits_shallow", "vit": "digits_vit_small"})
        for arm in set(c.arms) - {"rtn", "gptq"}:
            del c.arms[arm]
    if variant == "vlm":
        c.update(cells=("w4a4", "w4a8", "w4a4_twin"), num_calibration=16)
        c.nets = ConfigDict({"vlm": "digits_vlm"})
        c.twin_strengths = ConfigDict({"vlm": 2.5})
        for arm in ("repquant", "mambaquant", "brecq", "qdrop", "pd_quant", "ada_dfq"):
            del c.arms[arm]
        c.arms["q_vlm"] = ConfigDict({"rounding": "q_vlm"})
    if variant == "full":
        widths = ("w2", "w3", "w4", "w4a8", "w4a4", "w8a8")
        c.update(seeds=10, num_iters=2000, num_calibration=256, dc_steps=500)
        c.cells = tuple(f"{w}{twin}" for twin in ("", "_twin") for w in widths)
        c.nets["vlm"], c.twin_strengths["vlm"] = "digits_vlm", 2.5
        c.arms["lrq"] = ConfigDict({"rounding": "lrq"})
        # AdaDFQ and Q-VLM round activations
        both = tuple(cell for cell in c.cells if "a" in cell)
        c.arms["ada_dfq"]["cells"] = both
        c.arms["q_vlm"] = ConfigDict({"rounding": "q_vlm", "cells": both})
    return c


def sweep():
    yield from grid({"num_calibration": (32, 64, 256), "num_iters": (100, 300, 1000)})
