"""AdaDFQ (Qian et al., CVPR 2023): a batch-norm ResNet quantized and trained without data, against GDFQ and AdaSG.

A ResNet-8 (widths 8, 16, 32; batch norm) on digits of 16 x 16 is copied to Q, its weights on min/max grids per output
channel (first and last layer too), its ReLU outputs on one grid each (running min/max, then frozen). A conditional
generator (widths 32 and 16 where the paper has 128 and 64) and Q are trained in turn, one step each in every one of 1000
iterations of 16 generated images (the paper: 80,000); Q is trained, and its ranges frozen, from iteration 300 on. Neither
ever sees a real image: the program of the training step is searched for one before it runs. Only `real_kd` trains on real
images. The two constants of the net's preprocessing (mean and deviation of a pixel) are taken as published with it.

Arms, the same net, z, y, grids and steps: rtn_noise, rtn_zeroq (no training; ranges on Gaussian noise, or on 256 images
optimised towards the batch norms' statistics); gdfq; gdfq_q (its generator, AdaDFQ's loss of Q: what adaptive images add
alone); ada_sg (its published code is AdaDFQ's with l = 0.3, a_ds = 0.1); ada_dfq; no_agreement (a_as = 0); no_margin
(l = 0, u = 1); largest (both: adaptability alone); real_kd (AdaDFQ's loss of Q on the training images: an upper bound).
Accuracies are the last iteration's; nothing is selected on the test set.

Tuning, on gdfq alone with one net of root key 1000. Q's rate, the same for all trained arms (240 validation images, 500
iterations, rates falling at quarters): 1e-3 gives 65.0 % at W3A3 and 27.5 at W2A4 (float 98.8); with 1e-2 the loss is not
finite any more 16 iterations after the warm-up. The paper's 1e-4 needs its 80,000. Rates stay constant: the paper's first
drop comes after 20,000 iterations, and with drops at quarters the generator stops learning (of its images P classifies
23 % as asked after 500 iterations, 48 % at a constant rate; other rates of G, 3e-3 and 1e-2 falling: 28 and 16 %, 3e-3
constant: 53 %). No real image is needed for that choice.

Conventions: gradient of the rounding 1 everywhere (ste = "repo"), running ranges corrected for their start once (ema =
"end"; the published code divides at every step, which only has worn off after 150).

Variant :w4a4 is the four-bit cell; :ablation takes AdaDFQ's parts one at a time; :full is the paper's ResNet-20 on
CIFAR-10 with its own settings, for an accelerator; :imagenet says what it lacks.
    python -m qlab.run --config configs/ada_dfq.py
    python -m qlab.run --config configs/ada_dfq.py --arms gdfq,ada_dfq --config.ste=clipped
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "w4a4", "ablation", "full", "imagenet")

CONVENTIONS = {
    "ste": ("clipped",),  # gradient only where the code lies on the grid
    "ema": ("repo",),  # running ranges divided by 1 - beta^t at every step
    "gen_labels": ("norms",),  # norms of the generator with scale and bias per class
    "low": (0.3,),  # of the code's comments, for 4 and 5 bits on ImageNet
    "drops": ((0.25, 0.5, 0.75),),  # rates fall at the paper's shares of all iterations
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="ada_dfq", seeds=3)
    # the net and the cells
    c.net = "digits_resnet"
    c.cells = ("w3a3", "w2a4")  # ablations: W3A3 only
    c.split = "test"  # "val" to tune
    c.pixel_mean = (0.306,)  # of the net's inputs per channel, published with its preprocessing
    c.pixel_std = (0.376,)
    # the generator
    c.latent = 100
    c.gen_widths = (32, 16)
    c.gen_labels = "product"
    # training: iterations of one step of G and one of Q
    c.train = True
    c.source = (
        "generated"  # of training images: or "real"; of calibration images: "gaussian", "zeroq"
    )
    c.num_iters = 1000
    c.batch_size = 16
    c.warmup = 300  # iterations before Q is trained
    c.range_iters = 300  # iterations in which activation ranges move
    c.rate_g = 1e-3
    c.rate_q = 1e-3
    c.momentum = 0.9
    c.decay = 1e-4
    c.drops = ()  # shares of the iterations after which rates fall tenfold
    c.loop = "step"  # "scan" on an accelerator
    # G's loss
    c.margin = 1.0
    c.low = 0.1  # l
    c.high = 0.8  # u
    c.a_ds = 0.2
    c.a_as = 0.1
    c.beta = 1.0
    c.p = 0.0  # of CE(z_P, y)
    c.gamma = 1.0  # of the batch-norm loss
    # Q's loss
    c.entropy = 1.0
    c.kd = 0.0
    c.ce = 0.0
    c.temperature = 20.0
    # conventions
    c.ste = "repo"
    c.ema = "end"
    # calibration images
    c.num_calibration = 256
    c.zeroq_iters = 200
    c.zeroq_rate = 0.1
    gdfq_images = {"margin": 0.0, "a_ds": 0.0, "a_as": 0.0, "p": 1.0, "gamma": 0.1}
    c.arms = {
        "rtn_noise": {"train": False, "source": "gaussian"},
        "rtn_zeroq": {"train": False, "source": "zeroq"},
        "gdfq": {**gdfq_images, "entropy": 0.0, "kd": 1.0, "ce": 1.0},
        "gdfq_q": gdfq_images,
        "ada_sg": {"low": 0.3, "a_ds": 0.1, "cells": ("w3a3",)},
        "ada_dfq": {},
        "no_agreement": {"a_as": 0.0, "cells": ("w3a3",)},
        "no_margin": {"low": 0.0, "high": 1.0, "cells": ("w3a3",)},
        "largest": {"a_as": 0.0, "low": 0.0, "high": 1.0},
        "real_kd": {"source": "real", "cells": ("w3a3",)},
    }
    if variant == "smoke":
        c.update(seeds=1, net="digits_resnet_small", cells=("w3a3",), num_iters=90, warmup=30)
        c.update(range_iters=30, zeroq_iters=50, num_calibration=64, gen_widths=(16, 8))
        for arm in list(c.arms):
            if arm not in ("rtn_zeroq", "gdfq", "ada_dfq"):
                del c.arms[arm]
    if variant == "w4a4":
        c.cells = ("w4a4",)
        for arm in list(c.arms):
            if arm not in ("rtn_zeroq", "gdfq", "gdfq_q", "ada_dfq"):
                del c.arms[arm]
    if variant == "ablation":
        c.cells = ("w3a3",)
        c.arms = {
            "ada_dfq": {},
            **{f"bounds_{100 * lo:.0f}_{100 * hi:.0f}": {"low": lo, "high": hi} for lo in (0.0, 0.1, 0.3) for hi in (0.6, 0.8, 1.0)},
            **{f"pair_{10 * ds:.0f}_{10 * as_:.0f}": {"a_ds": ds, "a_as": as_} for ds, as_ in ((0.1, 0.2), (0.3, 0.0), (0.0, 0.3))},
            "no_bns": {"gamma": 0.0},
            **{f"temperature_{t:.0f}": {"temperature": t} for t in (1.0, 4.0)},
            "no_warmup": {"warmup": 0},
        }  # fmt: skip
        del c.arms["bounds_10_80"]  # that is ada_dfq
    if variant == "full":
        c.update(net="cifar10_resnet", cells=("w3a3", "w4a4"), num_iters=80_000, warmup=800)
        c.update(range_iters=800, rate_q=1e-4, gen_widths=(128, 64), loop="scan")
        c.update(drops=(0.25, 0.5, 0.75))
        for arm in c.arms.values():
            arm.update({"cells": c.cells})
        c.update(pixel_mean=(0.4914, 0.4822, 0.4465), pixel_std=(0.2470, 0.2435, 0.2616))
    if variant == "imagenet":
        c.net = "imagenet_resnet18"
    return c


def sweep():
    yield from grid({"low": (0.0, 0.1, 0.3), "high": (0.6, 0.8, 1.0)})
    yield from grid({"a_ds": (0.1, 0.2, 0.3), "a_as": (0.0, 0.1, 0.2)})
    yield from grid({"gamma": (0.0, 1.0)})
    yield from grid({"temperature": (1.0, 4.0, 20.0)})
    yield from grid({"warmup": (0, 300, 600)})
    yield from grid({"cells": (("w2a2",), ("w3a3",), ("w4a4",), ("w5a5",))})
