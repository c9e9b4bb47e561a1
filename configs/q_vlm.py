"""Q-VLM (Wang et al. 2024, arXiv 2410.08119): a vision-language model at W4A4, ranges searched in blocks of layers.

A ViT encoder (two blocks, width 48) reads an 8 x 8 digit as 16 tokens, a projector hands them to a causal decoder (six
blocks, width 64, 4 query and 2 key heads), which answers five questions about it with one word each: which digit, is it
odd, is it above four, which comes next, how many closed loops. Rounded are the weights and inputs of all products of
encoder, projector and decoder; patch embedding, tables of tokens and head stay float, products of two activations too.
Weights have an asymmetric grid per 64 inputs of a row (rounded to nearest, range by squared error); inputs a static
range per token row in the encoder and per channel in the decoder, from 16 training pictures with all their questions (80
pairs). Cells: W4A4, W4A8, W3A3.

Arms, all with these weights and these ranges to start from: rtn (whole ranges), layerwise (each input's own error),
fixed_1 (each layer's output), fixed_2, fixed_3 (all combinations in blocks of two and three layers; fixed_3 is the
exhaustive block of three), descent_3 (blocks of three by coordinate search), entropy (Q-VLM's blocks), shuffled (the same lengths in
random order), entropy_encoder (and the encoder step), repo (the published code's heuristic), awq (AWQ's scales, whole
ranges), smoothquant (alpha = 0.5, each token's range at run time). The search cost counts every candidate block run.

Nothing is tuned: candidates, tau = 1 and blocks of up to three are the paper's or its code's, the encoder step's 100 steps at
0.05 were set beforehand. A seed draws the trained net, the calibration pictures and the shuffled order.

Variant :ablation changes one part of Q-VLM at a time; :full has ten seeds and twice the calibration pictures on the same
net. The paper's LLaVA-7B and 13B on ScienceQA (W4A4: 79.8 and 80.8 %) need their checkpoints and an accelerator.
    python -m qlab.run --config configs/q_vlm.py
    python -m qlab.run --config configs/q_vlm.py --arms layerwise,entropy --config.split=val
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "ablation", "full")

CONVENTIONS = {
    "proxy": (
        "conditional",
        "repo",
    ),  # the entropy of codes given the layer before, the code's measure
    "power": (0.5,),  # of the error of layer-wise searches: the code's
    "weight_grid": ("minmax",),
    "vision_shares": ((1.0,),),  # the encoder's whole ranges
    "encoder_norms": (True,),  # the encoder step learns the norms too
    "group": (32,),
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="q_vlm", seeds=3)
    # the net and the cells
    c.net = "digits_vlm"
    c.cells = ("w4a4", "w4a8", "w3a3")
    c.split = "test"  # "val" to tune
    c.num_calibration = 16  # pictures, five questions each
    # the search
    c.search = "blocks"
    c.cut = "proxy"
    c.proxy = "entropy"
    c.tau = 1.0
    c.max_len = 3
    c.shares = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    c.exhaustive = 343  # combinations up to which all are tried
    c.power = 2.0
    c.premise = False  # also the gaps G(k)
    # the encoder
    c.vision_shares = (1.0, 0.999, 0.998)
    c.encoder_steps = 0
    c.encoder_rate = 5e-2
    c.encoder_norms = False
    c.eta = 0.01
    # weights and baselines
    c.group = 64
    c.weight_grid = "shares"
    c.rewrite = "none"
    c.alpha = 0.5
    c.repo_batches = 8
    c.arms = {
        "layerwise": {"search": "layerwise"},
        "entropy": {"premise": True},
        "fixed_3": {"cut": "fixed"},
        "shuffled": {"cut": "shuffled"},
        "fixed_1": {"cut": "fixed", "max_len": 1},
        "entropy_encoder": {"encoder_steps": 100},
        "rtn": {"search": "minmax"},
        "awq": {"search": "minmax", "rewrite": "awq"},
        "smoothquant": {"search": "token", "rewrite": "smooth"},
        "fixed_2": {"cut": "fixed", "max_len": 2},
        "descent_3": {"cut": "fixed", "exhaustive": 0},
        "repo": {"search": "repo"},
    }
    if variant == "smoke":
        c.update(
            seeds=1,
            net="digits_vlm_small",
            cells=("w4a4",),
            num_calibration=8,
            weight_grid="minmax",
        )
        c.arms = {name: c.arms[name].to_dict() for name in ("layerwise", "fixed_3")}
        c.arms["entropy"] = {}
    if variant == "ablation":
        c.cells = ("w4a4",)
        encoder = {"encoder_steps": 100}
        c.arms = {
            "entropy": {},
            "tau_0.5": {"tau": 0.5},
            "tau_0.9": {"tau": 0.9},
            "tau_1.1": {"tau": 1.1},
            "up_to_1": {"max_len": 1},
            "up_to_2": {"max_len": 2},
            "up_to_4": {"max_len": 4},
            "conditional": {"proxy": "conditional"},
            "repo_proxy": {"proxy": "repo"},
            "shuffled": {"cut": "shuffled"},
            "eta_0": encoder | {"eta": 0.0},
            "eta_0.01": encoder,
            "eta_0.1": encoder | {"eta": 0.1},
            "norms": encoder | {"encoder_norms": True},
            "shares_4": {"shares": (1.0, 0.8, 0.6, 0.4)},
            "shares_13": {"shares": tuple(1.0 - 0.05 * i for i in range(13))},
        }
    if variant == "full":
        c.update(seeds=10, num_calibration=32)
    return c


def sweep():
    yield from grid(
        {
            "tau": (0.9, 1.0, 1.1),
            "max_len": (1, 2, 3, 4),
            "num_calibration": (8, 16, 32),
        }
    )
