"""AdaDFQ against GDFQ, AdaSG and rounding: a ResNet with batch norm, quantized and trained without data."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric, Phase
from qlab.nn import zoo
from qlab.nn.generator import GeneratorSize, generator
from qlab.nn.resnet import ResNetSize
from qlab.nn.sites import pick
from qlab.quantization.ada_dfq import Coefficients, DataFree, Fit, State
from qlab.quantization.data_free import assert_data_free, zeroq_images
from qlab.quantization.site_study import METRICS as SITE_METRICS
from qlab.quantization.site_study import compare

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
PAPER = "Qian et al., CVPR 2023"
SOURCES = ("generated", "gaussian", "zeroq", "real")

METRICS = SITE_METRICS | {"lost": Metric("pt", "lower", "accuracy lost to the float net")}
LEVEL = "its ResNet-20 on CIFAR-10 at W3A3"


def _claim(text, right, cell="w3a3", source="abstract", **more):
    left = ("ada_dfq", f"{cell}/accuracy")
    return Claim(f"{text}, {cell.upper()}", f"{PAPER}, {source}", left, ">=", right, **more)


CLAIMS = (
    _claim("AdaDFQ is at least GDFQ", ("gdfq", "w3a3/accuracy"), source="Table 1", paper=9.78, note=LEVEL),
    _claim("AdaDFQ is at least GDFQ", ("gdfq", "w2a4/accuracy"), "w2a4"),
    *(
        _claim("Its generator adds to GDFQ's where Q's loss is the same (ours)", ("gdfq_q", f"{cell}/accuracy"), cell)
        for cell in ("w3a3", "w2a4")
    ),
    _claim("AdaDFQ is at least AdaSG", ("ada_sg", "w3a3/accuracy"), source="Table 1", paper=0.75, note=LEVEL),
    *(
        _claim("The largest adaptability is not the best", ("largest", f"{cell}/accuracy"), cell)
        for cell in ("w3a3", "w2a4")
    ),
    _claim("The agreement samples help", ("no_agreement", "w3a3/accuracy"), source="ablation"),
    _claim("The margin helps", ("no_margin", "w3a3/accuracy"), source="ablation"),
    _claim("Ten points over rounding on images of the batch norms (ours)", ("rtn_zeroq", "w3a3/accuracy"), margin=10.0),
    _claim("Within 5 points of distillation on the real training images (ours)",
           ("real_kd", "w3a3/accuracy"), margin=-5.0),
)  # fmt: skip

FIGURES = (
    Figure("Test accuracy", "bars", "accuracy", ylabel="%"),
    Figure("KL to the float net", "bars", "kl", ylabel="nat", logy=True),
    Figure("Batch-norm loss of generated images (cells one after another)", "curve", "bns", logy=True),
    Figure("Generated images that P classifies as asked", "curve", "as_asked", ylabel="%"),
    Figure("Entropy of the disagreement", "curve", "entropy", ylabel="nat"),
)  # fmt: skip


class Study(NamedTuple):
    """step: i32[], over all cells, which are trained one after another. cells: States, stacked."""

    step: jax.Array
    cells: State


def build(c) -> Experiment:
    if c.source not in SOURCES or (c.train and c.source in ("gaussian", "zeroq")):
        raise UserError(f"source={c.source!r} with train={c.train}: see configs/ada_dfq.py")
    if c.net == "imagenet_resnet18":
        raise UserError(
            "ada_dfq:imagenet needs the validation images and a trained ResNet-18 with its batch norms; qlab.data and "
            "qlab.nn.zoo read neither yet: use :full (CIFAR-10) or the standard config"
        )
    r = zoo.recipe(c.net)
    family, size = zoo.model(r.kind, r.widths), ResNetSize(*r.widths)
    images = zoo.examples(r.dataset)
    shape = images.x_test.shape[1:]
    test = images.held_out(c.split)
    x_test, y_test = map(jnp.asarray, test)
    gen = generator(
        GeneratorSize(shape[0], shape[2], size.classes, c.latent, tuple(c.gen_widths), c.gen_labels)
    )
    fit = Fit(
        c.num_iters, c.batch_size, c.rate_g, c.rate_q, c.momentum, c.decay, c.warmup, c.range_iters,
        tuple(c.drops), c.ste, c.ema, tuple(c.pixel_mean), tuple(c.pixel_std),
    )  # fmt: skip
    dfq = DataFree(family, gen, fit)
    weights = Coefficients(*(c[name] for name in Coefficients._fields))
    widths = [[int(bits) for bits in name[1:].split("a")] for name in c.cells]

    @jax.jit  # so that the check below and the runner share its trace
    def step(study: Study):
        at = study.step // c.num_iters
        s = pick(study.cells, at)
        if c.source == "real":
            rows = jax.random.randint(
                jax.random.fold_in(s.key, s.step), (c.batch_size,), 0, len(images.x_train)
            )
            new, metrics = dfq.step_on(
                s, jnp.asarray(images.x_train)[rows], jnp.asarray(images.y_train)[rows]
            )
        else:
            new, metrics = dfq.step(s)
        put = partial(jax.tree.map, lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, at, 0))
        return Study(study.step + 1, put(study.cells, new)), metrics

    def init(key: jax.Array) -> Study:
        k_net, k_run = jax.random.split(key)
        teacher = zoo.train(c.net, k_net)[1]
        # every arm draws the same z and y, in every cell
        cells = [dfq.init(k_run, teacher, weights, w_bits=w, a_bits=a) for w, a in widths]
        if not c.train:
            k = jax.random.fold_in(k_run, 1)
            x = dfq.scaled(jax.random.normal(k, (c.num_calibration, *shape)))
            if c.source == "zeroq":
                x = zeroq_images(
                    family.net, teacher, k, c.num_calibration, shape, mean=jnp.array(c.pixel_mean), std=jnp.array(c.pixel_std),
                    num_steps=c.zeroq_iters, rate=c.zeroq_rate,
                )  # fmt: skip
            cells = [dfq.calibrated(s, x) for s in cells]
        study = Study(jnp.int32(0), jax.tree.map(lambda *a: jnp.stack(a), *cells))
        if c.train and c.source != "real":  # neither G nor Q ever sees a real image
            assert_data_free(
                step, study, np.concatenate([images.x_train, images.x_val, images.x_test])
            )
        return study

    def evaluate(study: Study):
        values = {}
        for i, cell in enumerate(c.cells):
            s = pick(study.cells, i)
            found = compare(dfq.logits(s, x_test), family.apply(s.teacher, x_test), y_test)
            found["lost"] = found["fp_accuracy"] - found["accuracy"]
            values |= {f"{cell}/{k}": v for k, v in found.items()}
        return values

    phases = (Phase("cells", len(c.cells) * c.num_iters, step, c.loop),) if c.train else ()
    return Experiment(init, evaluate, phases, seed_layout="map")
