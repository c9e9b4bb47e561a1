"""FlexRound (Lee et al. 2023): learned division against AdaRound, AdaQuant, GPTQ and nearest, W2-W4.

A deep narrow ReLU net 64-(24 x 7)-10 on 8 x 8 digits is quantized layer by layer, weights only.
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="flexround", seeds=5)
    c.net = "digits_deep"
    c.nets = ("plain", "twin")
    c.twin_strength = 2.0  # hidden channels times 2^U(-k, k), function unchanged
    c.bits = (2, 3, 4)
    c.granularities = ("tensor", "channel")
    c.anchor = "w2_tensor"  # the cell whose variance is split
    c.vary = ("net", "calibration", "method")
    c.split = "test"
    c.num_calibration = 256
    c.target = "fp"
    c.unit = "layer"
    # grid
    c.symmetric = False
    c.calibration = "searched"
    c.rounding_ties = "half_even"
    # method
    c.method = "rtn"
    c.num_iters = 2000
    c.rounds = 10
    c.batch_size = 32
    c.learning_rate = 1e-2
    c.schedule = "cosine"
    c.reduction = "sum_outputs"
    c.input_mix = 0.0
    c.rule = "division"
    c.learn_s1 = True
    c.use_s3 = True
    c.parametrisation = "log"
    c.rank = 4
    c.reg_weight = 0.01
    c.damp = 0.01
    c.act_order = True
    c.arms = {
        "rtn_minmax": {"method": "rtn", "calibration": "minmax"},
        "rtn_mse": {"method": "rtn"},
        "gptq": {"method": "gptq"},
        "adaround": {"method": "adaround", "learning_rate": 3e-2},
        "adaquant": {"method": "adaquant", "learning_rate": 1e-1},
        "flexround": {"method": "flexround", "learning_rate": 3e-2},
    }
    if variant == "smoke":
        c.update(
            seeds=2,
            net="digits_wide",
            nets=("plain",),
            bits=(3,),
            granularities=("tensor",),
            anchor="w3_tensor",
            num_iters=300,
            rounds=3,
        )
    return c


def sweep():
    yield from grid(
        {"unit": ("layer", "block", "net"), "target": ("fp", "same"), "num_calibration": (64, 256)}
    )
