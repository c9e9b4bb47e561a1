"""Gradient-based PTQ, a study (Yvinec et al. 2023, arXiv 2308.07662): which choices in learned rounding matter, and a recipe.

Only the abstract is public, so the options are those of the literature it builds on. The base is AdaRound, layer by
layer, weights only, one scale per row, the float layer on float inputs as the target. One factor is changed at a time:
  a  which weights learn: a random half, the largest, the most important (Fisher times squared error), those between codes
  b  features: QDrop, mixup, noise
  c  calibration set: five of ten classes, photographs, images made from the net's statistics, 16 to 768 images (base 256)
  d  loss: L1, log L2, cosine, L2 behind the activation, Fisher-weighted L2, KL through the rest of the net (MLP only)
  e  freedom: biases, a factor per row, the norm before the layer (ViT), AdaQuant, FlexRound
  f  grid: symmetric, power (exponent by error), powers of two
  g  variable (tanh, straight-through offsets bounded and free) and optimizer (six others, and a constant rate)
  h  unit: two layers, the whole net; for the ViT an encoder block
and, outside of all claims on axes, x (float inputs, or the quantized prefix as the target: no error correction) and r
(the base with other minibatches, which shows the range that chance alone gives). Softmax over {floor, ceil} takes the
same path as tanh under Adam, so one of them is run.

Then for each width the recipe (every axis' winner at once; recipe_core: loss, variable, optimizer and grid only; both
layer by layer), GPTQ and decoupleQ on the same inputs and target, and nets of mixed widths, 2.5 and 3 bits a weight on
average, learned as the base: by integrated-gradient importance solved exactly (per layer, and per row), the same greedily,
by squared error of the weights, and two random draws. Learned widths keep the base's rate.

All options take the same number of steps. Rates and recipe are chosen inside each run, for each width, by the KL to the
float net on 256 held-out training images, never on test images. Every option with another loss, grid, variable,
optimizer, schedule or unit is tuned over three rates as the base is; the others take the base's rate. The weight of the
regulariser (of 0.1 to 30) and the place of the rates were found on held-out images of one net whose seed is not reported.

Arms are nets: mlp 64-(24 x 7)-10 and cnn at W2 and W3, vit (16 tokens, width 64, four blocks) at W3 and W4 with fewer
options and steps (all that the others have in :full). A seed draws the trained net, the calibration and held-out images, and the method's keys.

A range grows with the number of options and is never 0: compare it with that of r. Spread_rest leaves out each axis'
worst option, as one bad option (plain SGD, powers of two at two bits) decides the range. Claims (i) are read both ways.

    python -m qlab.run --config configs/gradient_ptq.py
    python -m qlab.run --config configs/gradient_ptq.py --arms mlp --config.num_iters=1000
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "full")

CONVENTIONS = {
    "reg_weight": (1.0, 100.0),  # of AdaRound's regulariser, losses being relative to nearest
    "num_iters": (200, 2000),
    "midpoints": (1, 32),  # of the path of importances
    "damp": (0.001, 0.1),  # GPTQ's
}

CHAIN = (
    "base",
    "a_random", "a_magnitude", "a_importance", "a_middle",
    "b_qdrop", "b_mixup", "b_noise",
    "c_classes", "c_photos", "c_synthetic", "c_16", "c_64", "c_768",
    "d_l1", "d_log_l2", "d_cosine", "d_activation", "d_fisher",
    "e_bias", "e_scale", "e_adaquant", "e_flexround",
    "f_symmetric", "f_power", "f_log2",
    "g_tanh", "g_ste", "g_ste_free", "g_sgd", "g_momentum", "g_adamw", "g_adamax", "g_lion", "g_sign_sgd",
    "g_constant",
    "h_block",
    "x_fp_input", "x_own_target", "rtn", "r_1", "r_2", "r_3", "r_4",
)  # fmt: skip
MLP = (*CHAIN, "d_kl", "h_net")
VIT = tuple(
    n for n in CHAIN if n not in ("c_768", "d_activation", "e_adaquant", "g_momentum", "g_adamax")
) + ("e_norm",)
FEW = (  # of the ViT, a call of which takes longest
    "base", "a_random", "a_importance", "b_qdrop", "c_photos", "c_16", "d_l1", "d_cosine", "e_bias", "e_norm",
    "e_flexround", "f_power", "g_tanh", "h_block", "x_fp_input", "rtn", "r_1", "r_2",
)  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="gradient_ptq", seeds=3)
    c.net = "digits_deep"
    c.split = "test"  # "val" for other reported images
    c.bits = (2, 3)
    c.options = CHAIN
    # learning: the same number of steps for all options
    c.num_iters = 300
    c.batch_size = 32
    c.rates = (3e-2, 1e-1, 3e-1)
    c.reg_weight = 10.0
    # mixed precision
    c.budgets = (2.5, 3.0)
    c.menu = (2, 3, 4, 6, 8)
    c.midpoints = 8
    # closed forms on the same cells
    c.closed = ("gptq", "decoupleq")
    c.damp = 0.01
    c.arms = {
        "mlp": {"options": MLP},
        "cnn": {"net": "digits_cnn", "batch_size": 128},
        "vit": {"net": "digits_vit", "batch_size": 32, "bits": (3, 4), "options": FEW, "num_iters": 100, "midpoints": 4},
    }  # fmt: skip
    if variant == "smoke":
        c.update(seeds=1, num_iters=200, rates=(3e-2,), bits=(2,), budgets=(), closed=())
        c.arms = {"mlp": {"net": "digits_shallow", "options": ("base", "d_l1")}}
    if (
        variant == "full"
    ):  # the whole study at AdaRound's budget; the paper's ImageNet nets are not here
        c.update(seeds=10, num_iters=10_000)
        c.arms["vit"].update(
            {"num_iters": 10_000, "options": VIT, "batch_size": 128, "midpoints": 8}
        )
    return c


def sweep():
    # one axis at a time on every net, with the base and its repeats
    for axis in "abcdefghx":
        own = {}
        for net, every in (("mlp", MLP), ("cnn", CHAIN), ("vit", VIT)):
            names = tuple(n for n in every if n.startswith(f"{axis}_"))
            own[f"arms.{net}.options"] = (("base", *names, "r_1", "r_2", "r_3", "r_4"),)
        yield from grid(own)
