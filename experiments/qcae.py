"""A denoising autoencoder with a QAOA latent layer against classical latents, other circuits and plain filters.

Arms differ in the layer between one encoder and one decoder, or train no net at all. All see the same noisy images.
Cells "n4_p2" are latent width and circuit depth, trained side by side; a latent without depth is trained once a width
and its numbers stand in every cell of that width. Task "mean" is the mean over the cells.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp

from qlab import data
from qlab.lab.errors import UserError, nearest
from qlab.lab.experiment import Claim, Experiment, Figure, Metric, Phase
from qlab.nn import denoisers, denoising
from qlab.nn.autoencoder import CLASSICAL, classical_latent, denoiser
from qlab.quantum import circuits, qcae

METRICS = {
    "train_mse": Metric("", "lower", "on the fixed noisy training images, after training"),
    "mse": Metric("", "lower", "mean squared error a pixel"),
    "psnr": Metric("dB", "higher", "mean over images of 10 log10(1 / MSE)"),
    "ssim": Metric("", "higher", "mean over images"),
    "bce": Metric("nat", "lower", "cross-entropy a pixel"),
    "latent_params": Metric("", "none", "trained parameters of the latent layer"),
}
RIVALS = ("basic", "ry_cz", "strong", "iqp")
MATCHED = tuple(f"{r}_m" for r in RIVALS)
_Q, _M = "qaoa", "mean/ssim"
_EPS = "margin 1: any gain counts; the paper's number is shown beside it"
CLAIMS = (
    Claim("Lower training loss than the classical autoencoder (linear latent)", "abstract",
          (_Q, "mean/train_mse"), "<=", ("linear", "mean/train_mse")),
    Claim("Higher SSIM than the classical autoencoder (linear latent)", "abstract (up to 40 %)",
          (_Q, _M), ">=", ("linear", _M), 1.0, "ratio", paper=1.4, note=_EPS),
    Claim("Higher SSIM than the best classical latent (linear, tanh, MLP)", "ours",
          (_Q, _M), ">=", (("linear", "tanh", "mlp"), _M), 1.0, "ratio"),
    *(Claim(f"Higher SSIM than the {r} circuit, same depth", "abstract (25 % on average)",
            (_Q, _M), ">=", (r, _M), 1.0, "ratio", paper=1.25, note=_EPS) for r in RIVALS),
    *(Claim(f"Higher SSIM than the {r[:-2]} circuit, same number of parameters", "abstract (25 % on average)",
            (_Q, _M), ">=", (r, _M), 1.0, "ratio", paper=1.25, note=_EPS) for r in MATCHED),
    Claim("The entangler helps: higher SSIM than the same without it (q = cos a)", "ours",
          (_Q, _M), ">=", ("cosine", _M), 1.0, "ratio"),
    Claim("Training the circuit helps: higher SSIM than with frozen random angles", "ours",
          (_Q, _M), ">=", ("frozen", _M), 1.0, "ratio"),
    Claim("Higher SSIM than the best tuned filter", "ours",
          (_Q, _M), ">=", (("median", "gaussian", "tv", "nlm"), _M), 1.0, "ratio"),
    Claim("Lower test error than the best linear map of the same width", "ours",
          (_Q, "mean/mse"), "<=", (("pca", "reduced_rank"), "mean/mse")),
    Claim("Lower test error than ridge regression, which has no bottleneck", "ours",
          (_Q, "mean/mse"), "<=", ("ridge", "mean/mse"), note="expected to fail: no n numbers hold what ridge passes"),
)  # fmt: skip
FIGURES = (
    Figure("SSIM by width n and depth p", "bars", "ssim"),
    Figure("Test error by width n and depth p", "bars", "mse", logy=True),
    Figure("Training loss, mean of the cells", "curve", "loss", logy=True,
           arms=(_Q, "linear", "tanh", "mlp", "cosine", "frozen", "unet")),
)  # fmt: skip


def cell_size(name: str) -> tuple[int, int]:
    """(n, p) of "n4_p2"."""
    match = re.fullmatch(r"n(\d+)_p(\d+)", name)
    if not match:
        raise UserError(f"cell {name!r}; expected n<width>_p<depth>, e.g. n4_p2")
    return int(match[1]), int(match[2])


def make_net(c: Any, side: int, n: int, p: int):
    """The arm's net of width n and depth p."""
    channels = tuple(c.channels)
    if c.latent in CLASSICAL:
        return denoiser(side, n, classical_latent(c.latent, n), channels=channels, skip=c.skip)
    if c.match not in ("depth", "params"):
        raise UserError(f"match={c.match!r}; use depth or params")
    same = c.match == "params"  # as many parameters as the textbook QAOA, one angle a layer
    depth = circuits.match_depth(c.latent, n, p, c.edges) if same else p
    circuit = circuits.circuit(c.latent, n, depth, c.edges, tied=same or c.tied)
    names = ("grad", "shots", "depol", "frozen", "init_scale")
    return qcae.qcae(side, circuit, channels=channels, **{k: c[k] for k in names})


def build(c: Any) -> Experiment:
    if c.split not in ("val", "test"):
        raise UserError(f"split={c.split!r}; use val (to tune) or test")
    known = ("net", *denoisers.FILTERS, *denoisers.LINEAR)
    if c.method not in known:
        raise UserError(f"method {c.method!r} is unknown{nearest(c.method, known)}")
    images = data.load(c.dataset)
    parts = {
        "train": jnp.asarray(images.x_train[: c.num_train or None]),
        "val": jnp.asarray(images.x_val[: c.num_val or None]),
        "test": jnp.asarray(images.x_test[: c.num_test or None]),
    }
    # a filter knows neither n nor p, a classical latent no p
    filters = c.method in (*denoisers.FILTERS, "ridge")
    p_matters = c.method == "net" and c.latent not in (*CLASSICAL, "cosine")
    sizes = {cell: cell_size(cell) for cell in c.cells}
    cells = {k: "any" if filters else k if p_matters else f"n{n}" for k, (n, _) in sizes.items()}
    size_of = {net: (0, 0) if filters else sizes[cell] for cell, net in cells.items()}

    def summary(test, train, num_params):
        return {k: v.mean() for k, v in test.items()} | {
            "train_mse": train["mse"].mean(),
            "latent_params": jnp.float32(num_params),
        }

    if c.method != "net":

        def evaluate_host(k_noise):
            results = {}
            for net, (n, _) in size_of.items():
                out = denoising.evaluate_classical(c.method, n, k_noise, parts, c.split, c.sigma)
                results[net] = summary(out[c.split], out["train"], 0)
            return denoising.over_cells(cells, results)

        return Experiment(lambda key: denoising.seed_keys(key)[0], evaluate_host, jittable=False)

    nets = {net: make_net(c, parts["train"].shape[1], *size) for net, size in size_of.items()}
    options = {k: c[k] for k in ("sigma", "epochs", "batch", "lr", "noise_mode", "loss")}
    run = denoising.training(nets, parts["train"], **options)

    def evaluate(state):
        judged = {part: parts[part] for part in (c.split, "train")}
        out = denoising.evaluate(nets, state, judged, c.sigma)
        results = {
            name: summary(out[c.split][name], out["train"][name], net.latent.num_params)
            for name, net in nets.items()
        }
        return denoising.over_cells(cells, results)

    return Experiment(run.init, evaluate, (Phase("train", run.num_steps, run.step),))
