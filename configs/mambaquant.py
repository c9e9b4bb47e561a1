"""MambaQuant (Xu et al. 2025, arXiv 2501.13484): KLT rotations and fused smoothing of a Mamba at W8A8 to W4A4.

A Mamba-1 net (width 32, inner width 64, 8 states, dt rank 4, three mixers) reads 8 x 8 digits row by row as 16 tokens
of 4 pixels and answers at the last one. Quantized are the inputs and weights of all projections, of the embedding
and the head, the convolution's input and kernel, and both operands of the product of states and C.
Weights: rounded to nearest, a symmetric scale per output channel. Activations: one static affine grid per
tensor from the 0.999999 quantiles of 128 calibration images; h and C always in 8 bits, per tensor and static
or, where an arm says so, per token at run time. Cells: W8A8, W6A6, W4A8, W4A4, on the plain net and on its outlier
twin, the same function with channels rescaled by 2^U(-4, 4) at three scaling symmetries of a mixer (norm and in_proj,
gate and out_proj, B and C). The twin is what smoothing inverts, so arm smooth is the control that tells what
rotations add.

Arms: rtn (nothing rewritten), smoothquant (S1, S2: inputs of in_proj and out_proj), smooth (S1, S2, S4, S5, S7 and h, C per
token), hadamard (offline R1, R5: the published code's baseline), quarot (R1, R2, R4, R5 Hadamard, h, C per token), klt
(R1, R5 with K, S5, S7), klt_smooth (and S2, S4), full (and online R2, R4, h and C per token).

Nothing is tuned: alpha = 0.5 and the clamps are the paper's. All arms run one program: each has the online parts that
any of them needs, the identity where it does not rewrite them. A seed draws the trained net (and its twin), the
calibration images, and the signs of the Hadamard matrices.

Variant :ablation takes one part, or K, out of full at a time; :copy is selective copying (a known answer), :text next
characters of tiny Shakespeare (needs the data set); :full a wider text net. The paper's own checkpoints (Vim on
ImageNet, state-spaces Mamba) cannot be read here.
    python -m qlab.run --config configs/mambaquant.py
    python -m qlab.run --config configs/mambaquant.py --arms hadamard,full --config.k_from=weights
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "ablation", "copy", "text", "full")

CONVENTIONS = {
    "k_order": ("before",),  # K measured on the net before smoothing, as the published code does
    "r5_transposed": (True,),  # R5 the other way round, as the published code does
    "k_from": ("weights", "none"),
    "mean": (True,),  # the dt vector centred: the vision recipe
    "ranges": ("quantized",),  # static ranges behind the quantized blocks before
    "state": ("static", "token"),
    "state_bits": (0,),  # h and C as wide as other activations
    "symmetric": (False,),  # weights with a zero point
    "share": (1.0, 0.9999),
}
SMOOTH = ("s2", "s4", "s5", "s7")
ROTATE = ("r1", "r2", "r4", "r5")


def get_config(variant: str = "") -> ConfigDict:
    c = base(experiment="mambaquant", seeds=5)
    # nets and cells
    c.net = "digits_mamba"
    c.nets = ("plain", "twin")
    c.twin_strength = 4.0
    c.cells = ("w8a8", "w6a6", "w4a8", "w4a4")
    c.vary = ("net", "calibration", "method")  # what a seed decides
    c.split = "test"  # "val" to tune
    c.num_calibration = 128
    c.num_test = 357
    # rewrites of the net
    c.smoothing = ()
    c.rotations = ()
    c.mean = False
    c.alpha = 0.5
    c.k_from = "activations"
    c.k_order = "after"
    c.r5_transposed = False
    # quantizers
    c.state = "static"
    c.state_bits = 8
    c.share = 0.999999
    c.ranges = "fp"
    c.symmetric = True
    c.arms = {
        "rtn": {},
        "smoothquant": {"smoothing": ("s1", "s2")},
        "smooth": {"smoothing": ("s1", *SMOOTH), "state": "token"},
        "hadamard": {"rotations": ("r1", "r5"), "k_from": "none"},
        "quarot": {"rotations": ROTATE, "k_from": "none", "state": "token"},
        "klt": {"rotations": ("r1", "r5"), "smoothing": ("s5", "s7")},
        "klt_smooth": {"rotations": ("r1", "r5"), "smoothing": SMOOTH},
        "full": {"rotations": ROTATE, "smoothing": SMOOTH, "state": "token"},
    }
    if variant == "smoke":
        c.update(
            seeds=1, net="digits_mamba_small", cells=("w8a8",), nets=("twin",), num_calibration=32
        )
        for arm in ("rtn", "smoothquant", "smooth", "hadamard", "klt", "klt_smooth"):
            del c.arms[arm]  # the two that are left share their program
    if variant == "ablation":
        full = dict(c.arms["full"])
        c.arms = {"full": full, "full_static": {**full, "state": "static"}}
        for name in (*ROTATE, *SMOOTH):
            key, names = ("rotations", ROTATE) if name[0] == "r" else ("smoothing", SMOOTH)
            c.arms[f"no_{name}"] = {**full, key: tuple(n for n in names if n != name)}
        c.arms["no_k"] = {**full, "k_from": "none"}
        c.arms["vision"] = {**full, "smoothing": ("s2", "s3"), "mean": True}
        c.arms["r3_r6"] = {**full, "rotations": (*ROTATE, "r3", "r6")}
    if variant == "copy":
        c.update(net="copy_mamba")
    if variant in ("text", "full"):
        c.update(net="text_mamba", num_calibration=64, num_test=128)
    if variant == "full":
        c.update(net="text_mamba_large", num_test=800)
    return c


def sweep():
    yield from grid(
        {
            "k_from": ("activations", "weights", "none"),
            "alpha": (0.25, 0.5, 0.75),
            "num_calibration": (8, 128, 1000),  # 128, 2 k and 16 k tokens
        }
    )
