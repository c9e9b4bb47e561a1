"""RepQuant (Li et al. 2024, arXiv 2402.05628): a ViT at W4A4 by scale reparameterization, against SmoothQuant + GPTQ.

A ViT on 8 x 8 digits (16 tokens, width 64, four pre-LN blocks) with every product quantized: the inputs and weights of
patch embedding (its input in 8 bits), qkv, proj, fc1, fc2 and head, and q, k, softmax and v inside attention. Weights have an
affine grid per output channel (range by squared error, 50 shares), softmax outputs half octaves, other
activations one static affine grid per tensor from quantiles of 32 calibration images. Cells: W3A4, W4A8, W6A6, W4A4,
and W4A4 on the outlier twin: the same function, LayerNorm channels rescaled by 2^U(-2.5, 2.5) and the next
weights inversely. SmoothQuant at alpha = 0.5 and reparameterisation undo any such factors exactly, so the twin
separates them from rtn and token only.

Arms, the same walk over blocks: rtn (nothing rewritten, weights to nearest), smooth (SmoothQuant), smooth_gptq (and
GPTQ), token (ranges per row at run time), token_gptq (and SmoothQuant, GPTQ), repq_vit (reparameterised from
quantiles, weights to nearest), dual_clip (learned ends), repquant (and GPTQ). GPTQ has the float net as its target
in all arms. Nothing is tuned: alpha is SmoothQuant's, the steps that learn the ends (500 of Adam at 0.01) were set
beforehand. A seed draws the trained net and its twin and the calibration images; the method's key matters to
AdaRound and to clip_batch > 0 only.

Variant :ablation exchanges one part of RepQuant at a time; :full has more seeds and steps on the same net. The paper's
ImageNet models cannot be read here.
    python -m qlab.run --config configs/repquant.py
    python -m qlab.run --config configs/repquant.py --arms smooth_gptq,repquant --config.split=val
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "ablation", "full")

CONVENTIONS = {
    "round_zero": (False,),  # the repository's: the mean zero point as it is
    "zero_code": ("repo",),  # zero gets a code of its own: 2^b + 1 values
    "weight_grid": ("minmax", "searched"),
    "target": ("same",),  # GPTQ's: the float weights on the quantized prefix's inputs
    "softmax": ("uniform", "log2"),
    "reconstruction": ("none", "adaround"),
    "clip": ("none", "quantile", "single"),
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="repquant", seeds=5)
    # the net and the cells
    c.net = "digits_vit"
    c.twin_strength = 2.5
    c.cells = ("w3a4", "w4a8", "w6a6", "w4a4", "w4a4_twin")  # weights, activations, net
    c.anchor = "w4a4_twin"  # the cell whose variance is split
    c.vary = ("net", "calibration", "method")  # what a seed decides
    c.split = "test"  # "val" to tune
    c.num_calibration = 32
    # the grids
    c.quantiles = (0.999, 0.9999, 0.99999)
    c.weight_grid = "shares"
    c.weight_shares = 50
    c.softmax = "log_sqrt2"
    c.zero_code = "reserve"
    c.per_token = False
    # the LayerNorms
    c.rewrite = "none"
    c.alpha = 0.5  # SmoothQuant's
    c.round_zero = True
    c.clip = "dual"
    c.clip_steps = 500
    c.clip_learning_rate = 1e-2
    c.clip_batch = 0  # rows a step, 0: all
    # the weights
    c.reconstruction = "none"
    c.target = "fp"
    c.damp = 0.01
    c.num_iters = 500  # of AdaRound
    c.learning_rate = 3e-2
    c.arms = {
        "rtn": {},
        "smooth": {"rewrite": "smooth"},
        "smooth_gptq": {"rewrite": "smooth", "reconstruction": "gptq"},
        "token": {"per_token": True},
        "token_gptq": {"per_token": True, "rewrite": "smooth", "reconstruction": "gptq"},
        "repq_vit": {"rewrite": "reparam", "clip": "quantile"},
        "dual_clip": {"rewrite": "reparam"},
        "repquant": {"rewrite": "reparam", "reconstruction": "gptq"},
    }
    if variant == "smoke":
        c.update(seeds=1, net="digits_vit_small", cells=("w4a4_twin",), clip_steps=50)
        for arm in ("smooth", "smooth_gptq", "token", "token_gptq", "repq_vit", "dual_clip"):
            del c.arms[arm]
    if variant == "ablation":
        # RepQuant with one part exchanged at a time
        c.cells = ("w3a4", "w4a4", "w4a4_twin")
        whole = {"rewrite": "reparam", "reconstruction": "gptq"}
        c.arms = {
            "repquant": whole,
            "softmax_uniform": whole | {"softmax": "uniform"},
            "softmax_log2": whole | {"softmax": "log2"},
            "zero_repo": whole | {"zero_code": "repo"},
            "mean_zero": whole | {"round_zero": False},
            "clip_none": whole | {"clip": "none"},
            "clip_quantile": whole | {"clip": "quantile"},
            "clip_single": whole | {"clip": "single"},
            "recon_none": whole | {"reconstruction": "none"},
            "recon_adaround": whole | {"reconstruction": "adaround"},
            "images_8": whole | {"num_calibration": 8},
            "images_128": whole | {"num_calibration": 128},
        }
    if variant == "full":
        c.update(seeds=10, clip_steps=1000, num_iters=2000)
    return c


def sweep():
    yield from grid(
        {
            "num_calibration": (8, 32, 128),
            "softmax": ("log_sqrt2", "log2", "uniform"),
            "round_zero": (True, False),
        }
    )
