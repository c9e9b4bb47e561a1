"""Quantizers, rounding rules, reconstruction: pure functions over one low-bit record.

from qlab.quantization import quantize_matrix, dequantize
qt = quantize_matrix(w, x_calib, method="flexround", bits=3)     # w f32[out, in], x f32[N, in]
w_hat = dequantize(qt)
"""

from qlab.quantization.adaquant import adaquant
from qlab.quantization.adaround import adaround
from qlab.quantization.affine_fit import fit_affine, shrink_search
from qlab.quantization.bit_allocation import greedy_bits, solve_bits
from qlab.quantization.decoupleq import DecoupleQ, decoupleq_layer
from qlab.quantization.decoupleq_walk import block_step
from qlab.quantization.flexround import flexround, lrq
from qlab.quantization.gptq import fp_target, gptq_round, hessian_init, hessian_update
from qlab.quantization.grid import Grid, make_grid, search_affine, search_symmetric
from qlab.quantization.importance import ig_importance
from qlab.quantization.matrix import layer_report, quantize_matrix
from qlab.quantization.own_model import quantize
from qlab.quantization.packing import pack, unpack
from qlab.quantization.power import fit_power, power_decode, power_encode
from qlab.quantization.qtensor import (
    QTensor,
    clip_ste,
    dequantize,
    pack_qtensor,
    round_ste,
    unpack_qtensor,
)
from qlab.quantization.quantizers import QUANTIZERS, Quantizer, identity, lsq_step, uniform
from qlab.quantization.recon_losses import recon_loss
from qlab.quantization.reconstruct import block_reconstruct
from qlab.quantization.rounding import RoundingRule, rtn
from qlab.quantization.rounding_optimizers import make_optimizer
from qlab.quantization.rounding_variables import softmax_rounding, ste_offset, tanh_rounding

ROUNDING_RULES = {
    "rtn": rtn,
    "adaround": adaround,
    "adaquant": adaquant,
    "flexround": flexround,
    "lrq": lrq,
    "tanh": tanh_rounding,
    "softmax": softmax_rounding,
    "ste": ste_offset,
}

__all__ = [
    "QUANTIZERS",
    "ROUNDING_RULES",
    "DecoupleQ",
    "Grid",
    "QTensor",
    "Quantizer",
    "RoundingRule",
    "adaquant",
    "adaround",
    "block_reconstruct",
    "block_step",
    "clip_ste",
    "decoupleq_layer",
    "dequantize",
    "fit_affine",
    "fit_power",
    "flexround",
    "fp_target",
    "gptq_round",
    "greedy_bits",
    "hessian_init",
    "hessian_update",
    "identity",
    "ig_importance",
    "layer_report",
    "lrq",
    "lsq_step",
    "make_grid",
    "make_optimizer",
    "pack",
    "pack_qtensor",
    "power_decode",
    "power_encode",
    "quantize",
    "quantize_matrix",
    "recon_loss",
    "round_ste",
    "rtn",
    "search_affine",
    "search_symmetric",
    "shrink_search",
    "softmax_rounding",
    "solve_bits",
    "ste_offset",
    "tanh_rounding",
    "uniform",
    "unpack",
    "unpack_qtensor",
]
