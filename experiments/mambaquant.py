"""MambaQuant on small Mamba nets: KLT rotations and fused smoothing against nearest, SmoothQuant and QuaRot."""

from __future__ import annotations

from functools import partial

import jax

from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.nn import zoo
from qlab.nn.mamba import MambaSize, outlier_twin, with_parts
from qlab.quantization.blocks import nearest_weight, site_by_site
from qlab.quantization.mambaquant import channel_ratios, mambaquant, parts_of, static_and_token
from qlab.quantization.site_study import METRICS as SITE_METRICS
from qlab.quantization.site_study import Cell, site_study

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Xu et al., ICLR 2025"
OURS = "the margin is ours; the twin is made of scalings that smoothing inverts, see arm smooth"

METRICS = SITE_METRICS | {
    f"ratio_{site}": Metric("", "lower", f"largest over least channel variance, {text}")
    for site, text in {
        "w_s": "input of the first in_proj",
        "w_dt": "dt vector, geometric mean over mixers",
        "w_o": "input of out_proj, geometric mean over mixers",
        "h": "states, geometric mean over mixers",
    }.items()
}

CLAIMS = (
    Claim("W8A8: within 1 point of the float net (rescaled twin)", f"{PAPER}, abstract",
          ("full", "w8a8_twin/accuracy"), ">=", ("full", "w8a8_twin/fp_accuracy"),
          margin=-1.0, paper=-0.7, note="75.4 of 76.1 on Vim-T; smoothing comes near without K"),
    Claim("W8A8: 5 points better than offline Hadamard rotation alone (rescaled twin)",
          f"{PAPER}, code's logs, Vim-T", ("full", "w8a8_twin/accuracy"), ">=",
          ("hadamard", "w8a8_twin/accuracy"), margin=5.0, paper=37.7, note=OURS),
    Claim("KLT, S5 and S7 improve on Hadamard alone, W8A8 (rescaled twin)",
          f"{PAPER}, code's logs, Vim-T", ("klt", "w8a8_twin/accuracy"), ">=",
          ("hadamard", "w8a8_twin/accuracy"), paper=10.7, note="its row has mean removal instead"),
    Claim("W4A8: within 4 points of the float net (rescaled twin)", f"{PAPER}, code's logs, Vim-T",
          ("full", "w4a8_twin/accuracy"), ">=", ("full", "w4a8_twin/fp_accuracy"),
          margin=-4.0, paper=-4.0),
    *(
        claim
        for rival, text, note in (
            ("quarot", "KLT and smoothing add to Hadamard at the same four places",
             "the stronger baseline: online R2 and R4 and h, C by token for both"),
            ("smooth", "Rotations add to smoothing",
             "smooth has S1 too, and h, C by token: what rotation alone adds"),
        )
        for claim in (
            Claim(f"{text}, W8A8: lower KL to the float net (rescaled twin)",
                  f"{PAPER}, abstract", ("full", "w8a8_twin/kl"), "<=", (rival, "w8a8_twin/kl"),
                  kind="ratio", margin=1.0, note=f"{note}; accuracies are alike at 8 bits"),
            Claim(f"{text}, W4A4 (rescaled twin)", f"{PAPER}, abstract",
                  ("full", "w4a4_twin/accuracy"), ">=", (rival, "w4a4_twin/accuracy"), note=note),
        )
    ),
    Claim("W8A8 on the plain net: within 1 point of the float net", f"{PAPER}, abstract",
          ("full", "w8a8/accuracy"), ">=", ("full", "w8a8/fp_accuracy"), margin=-1.0,
          note="says little: rounding to nearest passes as well here"),
    *(
        Claim(f"KLT makes channel variances equal: {what}", f"{PAPER}, section 4.1",
              ("full", f"w8a8_twin/ratio_{site}"), "<=", 1.01, exact=True,
              note="on calibration data, measured after smoothing")
        for site, what in (("w_s", "input of the first in_proj"), ("w_dt", "dt vector"))
    ),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("KL of the outputs to the float net's", "bars", "kl", ylabel="nat", logy=True),
    *(
        Figure(f"Variance of channels, largest over least: {METRICS[m].text.split(', ', 1)[1]}",
               "bars", m, logy=True)
        for m in ("ratio_w_s", "ratio_w_dt", "ratio_w_o", "ratio_h")
    ),
)  # fmt: skip


@partial(jax.jit, static_argnums=0)
def plain_and_twin(size: MambaSize, params, strength: float, key: jax.Array):
    """{name: params of `size`} of a trained net and of its outlier twin, which is the same function."""
    plain = with_parts(params, size)
    return {"plain": plain, "twin": outlier_twin(plain, strength, key)}


def build(c) -> Experiment:
    r = zoo.recipe(c.net)
    # All arms have the parts that any of them needs (the identity where unused), and so one program.
    rewrites = [(c.smoothing, c.rotations, c.mean)] + [
        (arm.get("smoothing", ()), arm.get("rotations", ()), arm.get("mean", False))
        for arm in c.arms.values()
    ]
    need = {"gate"}.union(*(parts_of(*rewrite) for rewrite in rewrites))
    size = MambaSize(*r.widths)._replace(parts=tuple(sorted(need)))
    net = zoo.model(r.kind, tuple(size))
    set_ = zoo.examples(r.dataset)
    x, y = set_.held_out(c.split)

    def nets(key: jax.Array):
        params = zoo.train(c.net, key)[1]
        return plain_and_twin(size, params, c.twin_strength, jax.random.fold_in(key, 1))

    bits = [tuple(int(b) for b in cell[1:].split("a")) for cell in c.cells]
    tail = {"plain": "", "twin": "_twin"}
    cells = [Cell(f"w{w}a{a}{tail[name]}", w, a, name) for name in c.nets for w, a in bits]
    transform = mambaquant(
        net, smoothing=c.smoothing, rotations=c.rotations, mean=c.mean, alpha=c.alpha,
        k_from=c.k_from, k_order=c.k_order, r5_transposed=c.r5_transposed,
    )  # fmt: skip
    method = site_by_site(
        act=static_and_token(
            state=c.state, state_bits=c.state_bits, share=c.share, ranges=c.ranges
        ),
        weight=nearest_weight(calibration="minmax", symmetric=c.symmetric),
    )
    return site_study(
        net, nets, set_.x_train, (x[: c.num_test], y[: c.num_test]), cells, method,
        transform=transform, probe=partial(channel_ratios, net), num_calibration=c.num_calibration,
        vary=c.vary,
    )  # fmt: skip
