"""decoupleQ (Guo et al. 2024, arXiv 2404.12759): integers and floats of a uniform grid in turn, against GPTQ and learned rounding at W2-W4."""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "layer", "small_layer", "ablation", "cnn", "full")

CONVENTIONS = {
    "target": ("fp",),  # the float layer on float inputs
    "symmetric": (True,),  # no offset
    "group": (8,),  # columns that share a scale, instead of whole rows
    "solver": ("train",),  # projected Adam instead of GPTQ for the integers
    "float_step": (False,),  # the searched range stays
    "act_order": (False,),
    "extra_damp": (0.001, 0.1),  # beside `damp`, where GPTQ inverts H
    "damp": (0.001, 0.1),
    "block_train": (("scale",), ("scale", "offset", "extra")),  # extra: biases
    "unit": ("net",),  # of the arms with the block step
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="decoupleq", seeds=5)
    # the net and the cells
    c.net = "digits_deep"
    c.bits = (2, 3, 4)
    c.anchor = "w2"  # the cell whose variance is split
    c.vary = ("net", "calibration", "method")  # what a seed decides
    c.split = "test"  # "val" to tune
    # calibration and units
    c.num_calibration = 256
    c.target = "same"
    c.unit = "layer"
    # the grid
    c.symmetric = False
    c.calibration = "searched"
    c.group = 0
    # closed forms
    c.method = "rtn"
    c.damp = 0.01
    c.act_order = True
    # decoupleQ
    c.num_outer = 4
    c.solver = "gptq"
    c.float_step = True
    c.extra_damp = 0.01
    c.pgd_iters = 50
    c.pgd_inner = 50
    c.pgd_learning_rate = 1e-3
    # its block step
    c.block_steps = 0
    c.block_learning_rate = 1e-3
    c.block_weight_decay = 1e-6
    c.block_train = ("scale", "offset")
    # learned rounding
    c.num_iters = 2000
    c.rounds = 10  # pieces per layer
    c.batch_size = 32
    c.learning_rate = 3e-2
    # of the variants that quantize one random layer
    c.layer_out = 64
    c.layer_in = 64
    block = {"method": "decoupleq", "unit": "block", "block_steps": 500}
    c.arms = {
        "rtn_minmax": {"method": "rtn", "calibration": "minmax"},
        "rtn_mse": {"method": "rtn"},
        "gptq_minmax": {"method": "gptq", "calibration": "minmax"},
        "gptq_mse": {"method": "gptq"},
        "shrink_gptq": {"method": "shrink_gptq"},
        "adaround": {"method": "adaround", "learning_rate": 3e-2},
        "flexround": {"method": "flexround", "learning_rate": 3e-2},
        "flexround_block": {"method": "flexround", "learning_rate": 3e-2, "unit": "block"},
        "decoupleq": {"method": "decoupleq"},
        "decoupleq_block": block,
        "gptq_minmax_fp": {"method": "gptq", "calibration": "minmax", "target": "fp"},
        "gptq_mse_fp": {"method": "gptq", "target": "fp"},
        "shrink_gptq_fp": {"method": "shrink_gptq", "target": "fp"},
        "adaround_fp": {"method": "adaround", "learning_rate": 3e-2, "target": "fp"},
        "flexround_fp": {"method": "flexround", "learning_rate": 3e-2, "target": "fp"},
        "flexround_block_fp": {
            "method": "flexround",
            "learning_rate": 3e-2,
            "unit": "block",
            "target": "fp",
        },
        "decoupleq_fp": {"method": "decoupleq", "target": "fp"},
        "decoupleq_block_fp": {**block, "target": "fp"},
    }
    if variant == "smoke":
        c.update(seeds=1, net="digits_wide", bits=(2,))
        c.arms = {"gptq_minmax": c.arms["gptq_minmax"], "decoupleq_block": block}
        c.arms["decoupleq_block"]["block_steps"] = 100
    if variant in ("layer", "small_layer"):
        c.update(net="layer", seeds=5)
        c.arms = {
            "rtn_minmax": {"method": "rtn", "calibration": "minmax"},
            "gptq_minmax": {"method": "gptq", "calibration": "minmax"},
            "shrink_gptq": {"method": "shrink_gptq"},
            "decoupleq_k1": {"method": "decoupleq", "num_outer": 1},
            "decoupleq_k2": {"method": "decoupleq", "num_outer": 2},
            "decoupleq": {"method": "decoupleq"},
            "decoupleq_k8": {"method": "decoupleq", "num_outer": 8},
            "decoupleq_train": {"method": "decoupleq", "solver": "train"},
            "decoupleq_no_float": {"method": "decoupleq", "float_step": False},
        }
    if variant == "small_layer":  # small enough to try all integers
        c.update(layer_in=8, bits=(2,))
        c.arms["decoupleq_exhaustive"] = {"method": "decoupleq", "solver": "exhaustive"}
    if variant == "ablation":
        one = {"method": "decoupleq"}
        c.arms = {
            "gptq_minmax": {"method": "gptq", "calibration": "minmax"},
            "gptq_group8": {"method": "gptq", "calibration": "minmax", "group": 8},
            "gptq_symmetric": {"method": "gptq", "calibration": "minmax", "symmetric": True},
            "decoupleq": one,
            "decoupleq_k1": {**one, "num_outer": 1},
            "decoupleq_k2": {**one, "num_outer": 2},
            "decoupleq_k8": {**one, "num_outer": 8},
            "decoupleq_train": {**one, "solver": "train"},
            "decoupleq_no_float": {**one, "float_step": False},
            "decoupleq_group8": {**one, "group": 8},
            "decoupleq_symmetric": {**one, "symmetric": True},
            "decoupleq_damp_large": {**one, "damp": 0.1},
            "decoupleq_damp_small": {**one, "damp": 0.001},
            "decoupleq_n64": {**one, "num_calibration": 64},
            "decoupleq_n1024": {**one, "num_calibration": 1024},
            "decoupleq_block": block,
            "decoupleq_block_bias": {**block, "block_train": ("scale", "offset", "extra")},
            "decoupleq_block_net": {**block, "unit": "net"},
        }
    if variant == "cnn":
        c.update(net="digits_cnn", seeds=3, num_calibration=128, num_iters=600, rounds=30)
    if variant == "full":
        c.update(seeds=10, num_iters=5000, num_calibration=1024)
    return c


def sweep():
    yield from grid(
        {
            "num_outer": (1, 2, 4, 8),
            "solver": ("gptq", "train"),
            "num_calibration": (64, 256, 1024),
        }
    )
