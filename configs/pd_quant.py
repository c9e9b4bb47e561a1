"""PD-Quant (Liu et al. 2023, arXiv 2212.07048): a batch-norm ResNet at W2A2 by prediction difference, against QDrop.

A ResNet-8 (widths 8, 16, 32; batch norm) on digits of 16 x 16 (1200 training images) is quantized block by block on 256
calibration images: stem, three residual blocks, head. Weights asymmetric per output channel, activations per tensor
behind every ReLU, all grids searched (least |error|^2.4; activations on 64 images); 8 bits for the first and last
weights and for the last layer's input. Cells W2A2 and W4A4 (the code's W2A4, W4A2: --config.cells).

Arms, the same images, grids and steps: rtn; adaround (weights product by product, activation steps as searched); and
block by block with learned roundings and activation steps: brecq (float targets, inputs of the quantized net), qdrop
(inputs and activations half float in training: the baseline that counts), qdrop_pd (the prediction difference added),
qdrop_dc (targets and float inputs from images whose statistics are corrected towards the batch norms'), pd_quant (both).

A seed draws the trained net, the calibration images and the minibatches and drops. 400 steps a block where the paper
takes 20,000, so rates are larger; the rate of activation steps is relative to the searched steps.

Tuning, for all learned arms on qdrop alone: W2A2 accuracy on the 240 validation images, one net of root key 1000, mean
of two draws. Rate of V 3e-2, 1e-1, 3e-1: 91.7, 94.6, 94.0 (1e-2: 84.6, one draw). Rate of the steps at V's 1e-1 5e-4,
2e-3: 93.0, 94.6 (1e-2 at V's 3e-2: 88.8 against 93.3 with 2e-3, one draw). The rest is the paper's.

Variant :ablation takes PD-Quant's parts one at a time (lamb_r, temperature, lamb_c, KL against MSE and cosine, the rest
of the net rounded, 32 to 1024 images); :cifar is ResNet-20 on CIFAR-10, for an accelerator; :full the paper's ResNet-18
on ImageNet, which needs data and weights that are not here.
    python -m qlab.run --config configs/pd_quant.py
    python -m qlab.run --config configs/pd_quant.py --arms qdrop,pd_quant --config.num_calibration=32
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "ablation", "cifar", "full")

CONVENTIONS = {
    "difference": ("mse", "cosine"),  # of the logits, instead of KL
    "temperature": (1.0, 8.0),
    "suffix": ("nearest",),  # the rest of the net rounded to nearest, not float
    "absolute_steps": (True,),  # the paper's rate of activation steps, not relative to them
    "weight_grid": ("shares", "minmax"),
    "lamb_r": (0.2,),  # of the code's function signature; its command line says 0.1
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="pd_quant", seeds=3)
    # the net and the cells
    c.net = "digits_resnet"
    c.cells = ("w2a2", "w4a4")
    c.vary = ("net", "calibration", "method")  # what a seed decides
    c.split = "test"  # "val" to tune
    c.num_calibration = 256
    # the grids
    c.weight_grid = "searched"
    c.num_search = 64  # images on which activation steps are searched
    # learning
    c.method = "blocks"
    c.num_iters = 400
    c.batch_size = 32
    c.rate = 1e-1  # of AdaRound's V
    c.step_rate = 2e-3  # of the activation steps
    c.absolute_steps = False
    c.reg_weight = 0.01
    c.warmup = 0.2  # share of the steps without regulariser
    # QDrop: shares of the elements that are the quantized ones
    c.mix = 0.5
    c.quantized = 0.5
    # the prediction difference; lamb_r is a divisor
    c.pd = True
    c.lamb_r = 0.1
    c.temperature = 4.0
    c.difference = "kl"
    c.suffix = "fp"
    # distribution correction; lamb_c is a divisor
    c.dc = True
    c.lamb_c = 0.02
    c.dc_steps = 200
    c.dc_rate = 1e-3
    c.arms = {
        "rtn": {"method": "rtn"},
        "adaround": {"method": "adaround"},
        "brecq": {"pd": False, "dc": False, "mix": 1.0, "quantized": 1.0},
        "qdrop": {"pd": False, "dc": False},
        "qdrop_pd": {"dc": False},
        "qdrop_dc": {"pd": False},
        "pd_quant": {},
    }
    if variant == "smoke":
        c.update(seeds=1, net="digits_resnet_small", cells=("w2a2",), num_calibration=64)
        c.update(num_iters=100, dc_steps=50, num_search=32)
        for arm in ("rtn", "adaround", "brecq", "qdrop_pd", "qdrop_dc"):
            del c.arms[arm]
    if variant == "ablation":
        c.cells = ("w2a2",)
        c.arms = {
            "qdrop": {"pd": False, "dc": False},
            "pd_quant": {},
            "no_dc": {"dc": False},
            **{f"lamb_r_{v}": {"lamb_r": v} for v in (1.0, 0.01)},
            **{f"temperature_{v:.0f}": {"temperature": v} for v in (1.0, 8.0)},
            **{f"lamb_c_{v}": {"lamb_c": v} for v in (0.001, 0.2)},
            **{kind: {"difference": kind} for kind in ("mse", "cosine")},
            "suffix_nearest": {"suffix": "nearest"},
            **{f"images_{n}": {"num_calibration": n} for n in (32, 1024)},
            **{f"images_{n}_no_dc": {"num_calibration": n, "dc": False} for n in (32, 1024)},
        }
    if variant == "cifar":  # for an accelerator
        c.update(net="cifar10_resnet", num_calibration=1024, num_search=256, dc_steps=500)
        c.update(num_iters=20_000, rate=3e-3, step_rate=4e-5)
    if variant == "full":
        c.update(net="imagenet_resnet18", num_calibration=1024, num_search=256, dc_steps=500)
        c.update(num_iters=20_000, rate=3e-3, step_rate=4e-5, absolute_steps=True)
    return c


def sweep():
    yield from grid(
        {
            "lamb_r": (1.0, 0.1, 0.01),
            "temperature": (1.0, 4.0, 8.0),
            "num_calibration": (32, 256, 1024),
        }
    )
