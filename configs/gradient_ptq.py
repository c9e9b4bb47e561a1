"""Gradient-based PTQ."""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "full")

CONVENTIONS = {
    "reg_weight": (0.1, 10.0),
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
VIT = tuple(
    n for n in CHAIN if n not in ("c_768", "d_activation", "e_adaquant", "g_momentum", "g_adamax")
) + ("e_norm",)


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="gradient_ptq", seeds=3)
    c.net = "digits_deep"
    c.split = "test"
    c.bits = (2, 3)
    c.options = CHAIN
    # learning: the same number of steps for all options
    c.num_iters = 500
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
        "mlp": {"options": (*CHAIN, "d_kl", "h_net")},
        "cnn": {"net": "digits_cnn", "batch_size": 128},
        "vit": {"net": "digits_vit", "batch_size": 128, "bits": (3, 4), "options": VIT, "num_iters": 200},
    }  # fmt: skip
    if variant == "smoke":
        c.update(seeds=1, num_iters=200, rates=(3e-2,), bits=(2,), budgets=(), closed=("gptq",))
        c.arms = {"mlp": {"net": "digits_shallow", "options": ("base", "d_l1")}}
    if variant == "full":
        c.update(seeds=10, num_iters=10_000)
    return c


def sweep():
    yield from grid({"reg_weight": (0.1, 1.0, 10.0), "num_iters": (200, 500, 2000)})
