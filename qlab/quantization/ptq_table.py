"""The methods of the lab side by side: any of them on any net of the zoo, in one walk over blocks.

A `Family` is a net ready for the walk: its blocks, how to train it and its outlier twin, and the conventions that
all methods share on it: activations on one static affine grid per tensor (range from quantiles), the net's input (and
Mamba's states and C) in 8 bits at least, a ResNet's first and last layer in 8 bits. `arm` gives what a method does
there: a rewrite of the net or of its norms, grids of its own, the rounding of the weights.

Methods that work on a whole net at once (WHOLE) are in `whole_net`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.lab.errors import UserError
from qlab.nn import zoo
from qlab.nn.chain import inject_outliers
from qlab.nn.dense import dense_net, dense_params
from qlab.nn.mamba import MambaSize, outlier_twin, with_parts
from qlab.nn.outliers import Link, norm_twin, relu_twin
from qlab.nn.sites import BlockNet, Params
from qlab.nn.vit import LINKS as VIT_LINKS
from qlab.nn.vlm import LINKS as VLM_LINKS
from qlab.quantization.activations import Affine, PerToken
from qlab.quantization.block_rounding import learned_weight
from qlab.quantization.blocks import (
    SiteInput,
    WeightMethod,
    gptq_weight,
    nearest_weight,
    site_by_site,
)
from qlab.quantization.bn_statistics import correct_inputs
from qlab.quantization.decoupleq_walk import decoupleq_weight
from qlab.quantization.mambaquant import mambaquant, parts_of
from qlab.quantization.matrix import RULES
from qlab.quantization.norm_links import linked, smooth
from qlab.quantization.pd_quant import WIDE, Fit, Parts, beside, by_width, pd_quant, searched_act
from qlab.quantization.quantile_ranges import calib_affine_quantile, calib_log
from qlab.quantization.recon_losses import recon_loss
from qlab.quantization.repquant import reparam
from qlab.quantization.rounding_lanes import variable
from qlab.quantization.rounding_optimizers import keep_within, make_optimizer
from qlab.quantization.site_study import Cell
from qlab.quantization.vlm_weights import PRODUCTS

ROUNDING = ("rtn", "mse", "gptq", "decoupleq", *RULES, "gradient")
BLOCKS = ("brecq", "qdrop", "pd_quant")  # learn a block with its activation steps; on batch norms
WHOLE = {"ada_dfq": "resnet", "q_vlm": "vlm"}  # work on a whole net at once, of one kind
FLOAT_BITS = 32  # activations of a weight-only cell: the identity
LAMB_C = 0.02  # of distribution correction, the divisor of PD-Quant's published code
REWRITES = ("none", "smooth", "repquant", "mambaquant")
MAMBA_SMOOTH, MAMBA_ROTATE = ("s2", "s4", "s5", "s7"), ("r1", "r2", "r4", "r5")


def cells(names: Sequence[str], label: str) -> list[Cell]:
    """The cells "<label>_<name>" of names such as "w3" (weights alone), "w4a4", "w4a4_twin".

    >>> cells(["w3", "w4a8_twin"], "vit")[1]
    Cell(name='vit_w4a8_twin', w_bits=4, a_bits=8, net='twin', draw=0, run=0)
    """
    made = []
    for name in names:
        found = re.fullmatch(r"w([2-8])(?:a([2-8]))?(_twin)?", name)
        if not found:
            raise UserError(
                f'cells: {name!r}; names such as "w3", "w4a4", "w4a4_twin" are expected'
            )
        w, a, twin = found.groups()
        net = "twin" if twin else "plain"
        made.append(Cell(f"{label}_{name}", int(w), int(a or FLOAT_BITS), net))
    return made


class Family(NamedTuple):
    """A net of the zoo ready for the walk.

    Attributes:
      kind: of `zoo.Recipe`. net: its blocks. nets: key -> {"plain": params, "twin": params}.
      broad: sites whose input has 8 bits at least. wide: {site: bits} of weights and operands of fixed width.
      norms: the net with batch norms and nets of it, as `nets`; None without.
      only: the sites that are quantized; None: all. links: norms with the products that read them.
    """

    kind: str
    net: BlockNet
    nets: Callable[[jax.Array], Mapping[str, tuple[Params, ...]]]
    broad: tuple[str, ...]
    wide: Mapping[str, int]
    norms: tuple[BlockNet, Callable[[jax.Array], Mapping[str, tuple[Params, ...]]]] | None = None
    only: tuple[str, ...] | None = None
    links: tuple[Link, ...] = ()


def family(name: str, strengths: Mapping[str, float], rewrite: str = "none") -> Family:
    """The zoo's net `name`. strengths: {kind: k}, the twin's channels are rescaled by 2^U(-k, k)."""
    r = zoo.recipe(name)
    if r.kind not in strengths:
        raise UserError(f"{name} is a net of kind {r.kind!r}; use nets of {', '.join(strengths)}")
    k = strengths[r.kind]
    made = zoo.model(r.kind, r.widths)

    def trained(key):
        return zoo.train(name, key)[1], jax.random.fold_in(key, 1)

    if r.kind == "mlp":

        def mlps(key):
            params, k_twin = trained(key)
            layers = made.layers(params)
            twin = inject_outliers(layers, k, k_twin)
            return {"plain": dense_params(layers), "twin": dense_params(twin)}

        return Family("mlp", dense_net(r.widths), mlps, (), {})
    if r.kind in ("vit", "vlm"):
        links = VIT_LINKS if r.kind == "vit" else VLM_LINKS

        def transformers(key):
            params, k_twin = trained(key)
            return {"plain": params, "twin": norm_twin(params, links, k, k_twin)}

        if r.kind == "vit":
            return Family("vit", made, transformers, ("patch",), {}, links=links)
        # as Q-VLM has it: patch embedding, head and products of two activations stay float
        only = tuple(dict.fromkeys(itertools.chain(*PRODUCTS.values())))
        return Family("vlm", made, transformers, (), {}, only=only, links=links)
    if r.kind == "mamba":
        full = rewrite == "mambaquant"
        parts = {"gate", *(parts_of(MAMBA_SMOOTH, MAMBA_ROTATE, False) if full else ())}
        size = MambaSize(*r.widths)._replace(parts=tuple(sorted(parts)))

        def mambas(key):
            params, k_twin = trained(key)
            plain = with_parts(params, size)
            return {"plain": plain, "twin": outlier_twin(plain, k, k_twin)}

        return Family("mamba", zoo.model("mamba", tuple(size)), mambas, ("embed", "h", "C"), {})

    def with_norms(key):
        params, k_twin = trained(key)
        return {"plain": params, "twin": relu_twin(params, (("conv1", "conv2"),), k, k_twin)}

    def folded(key):
        return {name: made.fold(params) for name, params in with_norms(key).items()}

    return Family("resnet", made.folded, folded, (), WIDE, (made.net, with_norms))


class Recipe(NamedTuple):
    """The best practices of `configs/gradient_ptq.py`: rule of `rounding_lanes`, loss, optimizer, its schedule.

    reg_weight: of the rule's regulariser, the loss being relative to that of rounding to nearest.
    """

    rule: str = "sigmoid"
    loss: str = "l2"
    optimizer: str = "adam"
    schedule: str = "cosine"
    reg_weight: float = 10.0


class Method(NamedTuple):
    """What an arm does. rounding: of ROUNDING, BLOCKS or WHOLE. rewrite: of REWRITES.

    num_iters: Adam steps of a learned product; a block method takes twice as many (blocks have two products on average).
    rate, step_rate: of weights and of a block's activation steps. recipe: of "gradient".
    """

    rounding: str = "mse"
    rewrite: str = "none"
    num_iters: int = 300
    batch_size: int = 32
    rate: float = 3e-2
    step_rate: float = 2e-3
    damp: float = 0.01
    dc_steps: int = 100
    num_search: int = 64
    recipe: Recipe = Recipe()


def fits(m: Method, kind: str) -> bool:
    """Whether the method exists for a kind of net."""
    need = {"repquant": ("vit",), "mambaquant": ("mamba",), "smooth": ("vit", "mamba", "vlm")}
    if m.rounding in BLOCKS:
        return kind == "resnet"
    if m.rounding in WHOLE:
        return kind == WHOLE[m.rounding]
    return kind in need.get(m.rewrite, (kind,))


def rounding(m: Method, max_bits: int = 8) -> WeightMethod:
    """The rounding of a product; other weights (a depthwise kernel) go to nearest, in all methods alike."""
    grid: dict[str, Any] = {"max_bits": max_bits, "calibration": "shares"}
    nearest = nearest_weight(**grid)
    if m.rounding == "rtn":
        return nearest_weight(max_bits=max_bits, calibration="minmax")
    if m.rounding == "mse":
        return nearest
    if m.rounding == "gptq":
        made = gptq_weight(damp=m.damp, **grid)
    elif m.rounding == "decoupleq":
        made = decoupleq_weight(max_bits=max_bits)
    elif m.rounding == "gradient":
        r = m.recipe
        rule = variable(r.rule)
        optimizer = make_optimizer(r.optimizer, m.rate, r.schedule, num_steps=m.num_iters)
        if not rule.learns_scale:
            optimizer = optax.chain(optimizer, keep_within(-rule.bound, rule.bound))
        made = learned_weight(
            rule.rule, optimizer, num_iters=m.num_iters, batch_size=m.batch_size,
            loss=recon_loss(r.loss), relative=r.reg_weight, **grid,
        )  # fmt: skip
    else:
        optimizer = optax.adam(optax.cosine_decay_schedule(m.rate, m.num_iters))
        made = learned_weight(
            RULES[m.rounding][0](),
            optimizer,
            num_iters=m.num_iters,
            batch_size=m.batch_size,
            **grid,
        )
    return lambda i: nearest(i) if i.x is None else made(i)


def acts(f: Family, m: Method):
    """The activations' grids: one static affine grid per tensor, but for what a rewrite has of its own."""
    if f.kind == "resnet":
        return searched_act(f.wide, num=m.num_search)

    def act(i: SiteInput):
        bits = jnp.maximum(i.bits, 8.0) if i.site in f.broad else i.bits
        if m.rewrite == "repquant" and i.site == "probs":
            return calib_log(i.x, bits)
        if m.rewrite == "mambaquant" and i.site in ("h", "C"):
            return PerToken(bits)
        s, z = calib_affine_quantile(i.x, bits)
        q_max = 2.0**bits - 1
        return Affine(s, z, jnp.zeros_like(q_max), q_max)

    return act


def only(f: Family, method: Callable[[SiteInput], Any]) -> Callable[[SiteInput], Any]:
    """The method at the sites that the family quantizes, None (float) elsewhere."""
    return lambda i: method(i) if f.only is None or i.site in f.only else None


def arm(f: Family, m: Method, max_w_bits: int = 8) -> dict[str, Any]:
    """The arguments of `site_study` beside net, data and cells: method, transform, around, beside, wide."""
    if m.rounding not in (*ROUNDING, *BLOCKS) or m.rewrite not in REWRITES:
        raise UserError(
            f"rounding={m.rounding!r}, rewrite={m.rewrite!r}: use one of {', '.join((*ROUNDING, *BLOCKS))} "
            f"and of {', '.join(REWRITES)}"
        )
    if not fits(m, f.kind):
        raise UserError(f"{m.rounding}, {m.rewrite} is not for nets of kind {f.kind!r}")
    if m.rounding in BLOCKS:
        return _block_arm(f, m, max_w_bits)
    act, weight = only(f, acts(f, m)), rounding(m)
    weight = only(f, by_width(weight, weight, f.wide))
    made: dict[str, Any] = {"method": site_by_site(act=act, weight=weight), "wide": f.wide}
    if f.kind == "mamba" and m.rewrite != "none":
        smooth_only = {"smoothing": ("s1", "s2"), "rotations": ()}
        made["transform"] = mambaquant(f.net, **(smooth_only if m.rewrite == "smooth" else {}))
    elif m.rewrite == "smooth":
        made["method"] = linked(f.links, smooth(), act, weight)
    elif m.rewrite == "repquant":
        made["method"] = linked(f.links, reparam(steps=m.num_iters), act, weight)
    return made


def _block_arm(f: Family, m: Method, max_w_bits: int) -> dict[str, Any]:
    assert f.norms is not None
    net, params = f.norms
    whole = m.rounding == "pd_quant"
    share = 1.0 if m.rounding == "brecq" else 0.5
    fit = Fit(2 * m.num_iters, m.batch_size, m.rate, m.step_rate)
    parts = Parts() if whole else Parts(lamb_r=None)
    grid: dict[str, Any] = {"calibration": "shares", "max_bits": max_w_bits}
    method = pd_quant(parts, fit, wide=f.wide, num_search=m.num_search, **grid)

    def around(key: jax.Array, name: str, x):
        # the twin's norms are those of the plain net: it rescales what lies behind them
        del name
        steps = m.dc_steps if whole else 0
        inputs = correct_inputs(net, params(key)["plain"], x, lamb_c=LAMB_C, n=steps)
        return beside(inputs, share, share)

    return {"method": method, "around": True, "beside": around, "wide": f.wide}
