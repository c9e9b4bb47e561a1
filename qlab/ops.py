"""The low-bit operations over QTensor: what users import.

from qlab import ops
from qlab.quantization import quantize_matrix
qt = ops.pack(quantize_matrix(w, x_calib, bits=4, granularity="group:128"))   # w f32[out, in]
y = ops.matmul(x, qt)                                                         # x [..., in] -> [..., out]
print(ops.explain("matmul", x, qt))                                           # what ran, and why not another

Every operation lives in qlab.kernels.<op>, which takes raw arrays. `impl` names an implementation, which
runs or raises with the reason; None takes the first that can.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qlab.kernels.common import dispatch, tuned
from qlab.quantization.qtensor import QTensor, dequantize
from qlab.quantization.qtensor import pack_qtensor as pack
from qlab.quantization.qtensor import unpack_qtensor as unpack

__all__ = [
    "Explanation",
    "Help",
    "QTensor",
    "dequantize",
    "explain",
    "group_sparse",
    "group_sparse_matmul",
    "hadamard_quantize",
    "int8_matmul",
    "log2_attend",
    "log2_softmax_quantize",
    "matmul",
    "pack",
    "quantize_pack",
    "unpack",
    "would_help",
]

# name here -> folder in qlab/kernels
FOLDERS = {
    "matmul": "weight_only_matmul",
    "int8_matmul": "int8_matmul",
    "quantize_pack": "quantize_pack",
    "hadamard_quantize": "hadamard_quantize",
    "log2_softmax_quantize": "log2_softmax_quantize",
    "group_sparse_matmul": "group_sparse_matmul",
}


def matmul(
    x: jax.Array,
    qt: QTensor,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    perm: jax.Array | None = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """activation(x @ dequantize(qt).T + bias), the weights unpacked inside the product.

    Args:
      x: bf16, f16 or f32 [..., in]. qt: packed, of shape (out, in), any grid whose group is the whole row
        or a multiple of 8 columns. bias: f32[out].
      activation: None, "relu", "gelu" (tanh form) or "silu".
      perm: i32[in]: column c of qt belongs to input perm[c] (checkpoints with act-order); None: c.
      impl, interpret: see qlab.kernels.weight_only_matmul.api.
    Returns:
      [..., out] in the dtype of x, accumulated in float32; differentiable in x, scales and bias.
    Raises:
      ValueError: an argument does not fit. NotImplementedError: the named implementation cannot run.

    >>> qt = pack(QTensor(jnp.array([[1, -2]], jnp.int8), jnp.array([[0.5]]), bits=3, shape=(1, 2)))
    >>> matmul(jnp.array([[2.0, 1.0]]), qt).tolist()
    [[0.0]]
    """
    from qlab.kernels.weight_only_matmul import api

    if not qt.packed:
        raise ValueError(
            f"matmul: qt holds unpacked codes ({qt.codes.dtype}); pack them once: qt = ops.pack(qt)"
        )
    n, k = _matrix("matmul", qt, x)
    if qt.group % 8:
        raise ValueError(
            f"matmul: qt has groups of {qt.group} columns, kernels take the whole row or multiples of 8;"
            f' quantize with granularity="group:{-(-qt.group // 8) * 8}", or use x @ dequantize(qt).T'
        )
    if perm is not None:
        x = jnp.take(x, perm, axis=-1)
    # A short last group is padded: its columns meet zeros of x.
    wide = -(-k // qt.group) * qt.group if qt.group else k
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wide - k)])
    scale, zero, offset = (_by_row(a, n) for a in (qt.scale, qt.zero, qt.offset))
    return api.weight_only_matmul(
        x, qt.codes, scale, zero, offset, bias,
        bits=qt.bits, group=qt.group, activation=activation, impl=impl, interpret=interpret,
    )  # fmt: skip


def int8_matmul(
    x: jax.Array,
    qt: QTensor,
    bias: jax.Array | None = None,
    *,
    x_scale: jax.Array | float | None = None,
    x_zero: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    impl: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """activation(x_hat @ dequantize(qt).T + bias) with x_hat in 8 bits and the sum in int32.

    Args:
      x: bf16, f16 or f32 [..., in]; or its codes i8[..., in], then with their x_scale (and x_zero i8).
      qt: of shape (out, in), per channel or per tensor, with or without zero point in [0, 2^b - 1]. Held
        unpacked (i8 or u8) it is read as it is; packed, it is unpacked in every call.
      x_scale: f32[..., 1] or a scalar: the static scale of x, rounded half to even (no gradient in x);
        None: one a token from its largest value (straight-through gradient).
      out_dtype: bf16, f16 or f32; None: that of x, f32 for codes. The rest as in `matmul`.
    """
    from qlab.kernels.int8_matmul import api

    n, _ = _matrix("int8_matmul", qt, x)
    if qt.group or qt.offset is not None:
        what = f"groups of {qt.group} columns" if qt.group else "a real offset"
        raise ValueError(
            f"int8_matmul: qt has {what}, an int32 sum needs one scale a row and integer zero points;"
            ' quantize with granularity="channel" (symmetric or with zero point), or use ops.matmul'
        )
    qt = unpack(qt)
    codes, zero = qt.codes[:, : qt.shape[1]], _by_row(qt.zero, n)
    if codes.dtype == jnp.uint8:  # move both into i8
        if not isinstance(zero, Tracer) and not bool(((zero >= 0) & (zero <= 255)).all()):
            raise ValueError("int8_matmul: qt has zero points outside [0, 255]; use ops.matmul")
        codes = jax.lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
        zero = (zero - 128).astype(jnp.int8)
    common: dict[str, Any] = dict(activation=activation, impl=impl, interpret=interpret)
    scale = _by_row(qt.scale, n)
    if x_scale is None and x.dtype != jnp.int8:
        return api.int8_dynamic_matmul(x, codes, scale, zero, bias, out_dtype=out_dtype, **common)
    if x_scale is not None and x.dtype != jnp.int8:
        out_dtype = x.dtype if out_dtype is None else out_dtype
        u = jnp.round(x.astype(jnp.float32) / x_scale)
        x = jnp.clip(u + (0 if x_zero is None else x_zero), -128, 127).astype(jnp.int8)
    out_dtype = jnp.float32 if out_dtype is None else out_dtype
    return api.int8_matmul(
        x, codes, x_scale, scale, x_zero, zero, bias, out_dtype=out_dtype, **common
    )


def quantize_pack(
    x: jax.Array,
    bits: int,
    group: int = 0,
    *,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
    key: jax.Array | None = None,
    calibration: str = "absmax",
    rounding: str = "half_even",
    levels: str = "full",
    impl: str | None = None,
    interpret: bool = False,
) -> QTensor:
    """x f[rows, columns] rounded onto a grid and packed in one pass: a packed QTensor.

    Args:
      group: columns that share a scale, a multiple of 8 that divides the columns; 0: the whole row.
      calibration: "absmax" (symmetric), "minmax" (with zero point) or "given" (scale, and zero or None).
      rounding: "half_even", "half_up" or "stochastic" (with key). The rest: qlab.kernels.quantize_pack.api.
    """
    from qlab.kernels.quantize_pack import api

    done = api.quantize_pack(
        x, scale, zero, key, bits=bits, group=group, calibration=calibration, rounding=rounding,
        levels=levels, impl=impl, interpret=interpret,
    )  # fmt: skip
    group = 0 if done.scale.shape[1] == 1 else group
    return QTensor(done.codes, done.scale, done.zero, None, bits, (1,), x.shape, True, group)


def hadamard_quantize(
    x: jax.Array, bits: int = 8, block: int = 0, *, impl: str | None = None, interpret: bool = False
) -> QTensor:
    """H x (blocks of the last axis) in `bits` bits, one scale for each token: a QTensor like x f[..., K].

    8 bits: i8 codes, ready for `int8_matmul(qt.codes, w, x_scale=qt.scale)` with rotated weights; fewer:
    packed. The rest: qlab.kernels.hadamard_quantize.api.
    """
    from qlab.kernels.hadamard_quantize import api

    codes, scale = api.hadamard_quantize(x, bits=bits, block=block, impl=impl, interpret=interpret)
    return QTensor(codes, scale, None, None, bits, (x.ndim - 1,), x.shape, bits < 8)


def log2_softmax_quantize(
    logits: jax.Array, mask: jax.Array | None = None, scale: jax.Array | float = 1.0, **options: Any
) -> jax.Array:
    """u8 codes of softmax(logits) on a logarithmic grid, which is no uniform grid and so no QTensor.

    Options (bits, base, zero_code, causal, packed, impl): qlab.kernels.log2_softmax_quantize.api.
    """
    from qlab.kernels.log2_softmax_quantize import api

    return api.log2_softmax_quantize(logits, mask, scale, **options)


def log2_attend(
    codes: jax.Array, v: jax.Array, scale: jax.Array | float = 1.0, **options: Any
) -> jax.Array:
    """The codes of `log2_softmax_quantize` times values v[..., C, D], by shifts; options as there."""
    from qlab.kernels.log2_softmax_quantize import api

    return api.log2_attend(codes, v, scale, **options)


def group_sparse(qt: QTensor, mask: jax.Array):
    """The kept groups of qt (out, in), per group of a multiple of 8 columns: a BSR for the sparse product.

    Args:
      mask: bool[out, in / group], concrete; True: kept.
    """
    from qlab.kernels.group_sparse_matmul import api

    if not qt.group or qt.group % 8 or qt.offset is not None or len(qt.shape) != 2:
        raise ValueError(
            f'group_sparse: qt is {qt!r}; quantize a matrix with granularity="group:16" or another '
            "multiple of 8, and without a real offset"
        )
    n, _ = qt.shape
    codes = unpack(qt).codes.astype(jnp.int32) + (2 ** (qt.bits - 1) if qt.signed else 0)
    scale, zero = _by_row(qt.scale, n), _by_row(qt.zero, n)
    return api.from_dense(codes, scale, zero, mask, bits=qt.bits, group=qt.group)


def group_sparse_matmul(
    x: jax.Array, bsr: Any, bias: jax.Array | None = None, *, bits: int, group: int, **options: Any
) -> jax.Array:
    """x[..., in] @ w_hat.T + bias for the weights of `group_sparse`, with their bits and group.

    Options (plan, impl): qlab.kernels.group_sparse_matmul.api.
    """
    from qlab.kernels.group_sparse_matmul import api

    return api.group_sparse_matmul(x, bsr, bias, bits=bits, group=group, **options)


class Explanation(NamedTuple):
    """runs: the implementation, None if none can. reasons: (name, why or why not) of each, in order."""

    op: str
    device: str
    runs: str | None
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.runs or 'nothing can run it'}"]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.reasons)])


def explain(
    op: str, *args: Any, device: str | None = None, impl: str | None = None, **options: Any
) -> Explanation:
    """Which implementation would run for these shapes, and why the others would not.

    Args:
      op: "matmul", "int8_matmul", ...; args: for "matmul", (x, qt) of the call; else none.
      device: kind of a device that need not be here ("NVIDIA H200", "TPU v5 lite", "cpu"); None: this.
      impl: as if the call named it. options: sizes and options of the operation's `spec_of`, by name.

    >>> print(explain("matmul", m=1, k=64, n=8, bits=4, device="cpu").runs)
    xla
    """
    api = _api(op)
    if args:
        options = {**_shapes(op, *args), **options}
    fixed = ("platform", "device", "interpret")
    accepted = [p for p in inspect.signature(api.spec_of).parameters if p not in fixed]
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise ValueError(f"explain: {op} has no {unknown[0]}; it takes {', '.join(accepted)}")
    where = {} if device is None else {"platform": platform_of(device), "device": device}
    spec = api.spec_of(**options, **where)
    runs = dispatch.choose(api.IMPLS, spec, impl).name
    asked = [i.name for i in dispatch.candidates(api.IMPLS, spec, impl)[0]]
    by_name = {i.name: i for i in api.IMPLS}
    reasons = []
    for name in [*asked, *(n for n in by_name if n not in asked)]:
        why = by_name[name].why_not(spec)
        if name == runs:
            why = "runs" + (", with tuned blocks" if tuned.lookup(spec, name) else "")
        elif not why:
            why = "could run, if named" if name in asked else f"not asked on {spec.platform}"
            why += f" (impl={name!r})"
        reasons.append((name, why))
    return Explanation(op, spec.device, runs, tuple(reasons))


class Help(NamedTuple):
    """Whether low bits are faster than the same product with plain weights.

    helps: None where it was not measured. speedup: plain time / low-bit time. crossover: the smallest
    measured number of rows M (a power of two) at which they lose, None if at none.
    """

    helps: bool | None
    speedup: float | None
    crossover: int | None
    why: str


def would_help(
    m: int, k: int, n: int, bits: int, device: str | None = None, *, x_dtype: str = "bfloat16"
) -> Help:
    """Whether `matmul` with these bits beats the plain product x[m, k] @ w[n, k].T in x_dtype.

    From the shipped measurements alone: where the device or the shape was not measured, it is unknown.

    Args:
      device: its kind, e.g. "NVIDIA H200"; None: the one at hand.
    """
    device = dispatch.here()[1] if device is None else device
    op = FOLDERS["matmul"]
    rows = [r for r in tuned.table(op) if r["device"] == device and r.get("dense_us")]
    if not rows:
        why = f"no measurement for {device}; run python -m qlab.bench kernels --tune there"
        return Help(None, None, None, f"unknown: {why}")
    want = tuned.bucket({"m": m, "k": k, "n": n})
    best: dict[int, float] = {}
    for r in rows:
        same = r["options"].get("bits") == bits and r["dtypes"].get("x") == x_dtype
        if same and all(r["bucket"][d] == want[d] for d in "kn"):
            rows_m = r["bucket"]["m"]
            best[rows_m] = max(best.get(rows_m, 0.0), r["dense_us"] / r["us"])
    shape = f"{bits} bits, {x_dtype} x, K={want['k']}, N={want['n']} on {device}"
    if want["m"] not in best:
        have = ", ".join(map(str, sorted(best))) or "none"
        return Help(None, None, None, f"unknown: {shape}: measured M: {have}; not M={want['m']}")
    loses = [rows_m for rows_m in sorted(best) if best[rows_m] < 1]
    crossover, speedup = (loses[0] if loses else None), best[want["m"]]
    end = f"low bits lose from M={crossover}" if loses else "low bits win at every measured M"
    why = f"{shape}, M={want['m']}: {speedup:.2f} times the speed of the plain product; {end}"
    return Help(speedup >= 1, speedup, crossover, why)


def platform_of(device: str) -> str:
    """ "gpu", "tpu" or "cpu" from a device kind.

    >>> platform_of("NVIDIA H200"), platform_of("TPU v6 lite"), platform_of("cpu amx_bf16")
    ('gpu', 'tpu', 'cpu')
    """
    if device.lower().startswith("cpu"):
        return "cpu"
    return "tpu" if device.upper().startswith("TPU") else "gpu"


def _api(op: str) -> ModuleType:
    if op not in FOLDERS:
        raise ValueError(f"op={op!r} is not known; use one of {', '.join(FOLDERS)}")
    return importlib.import_module(f"qlab.kernels.{FOLDERS[op]}.api")


def _matrix(op: str, qt: QTensor, x: jax.Array) -> tuple[int, int]:
    """(out, in) of qt, which x must fit."""
    if len(qt.shape) != 2:
        raise ValueError(f"{op}: qt has shape {qt.shape}, expected (out, in)")
    if qt.codes.ndim != 2:
        raise ValueError(f"{op}: qt is a stack ({qt.codes.shape} codes); use jax.vmap or lax.scan")
    if x.ndim < 1 or x.shape[-1] != qt.shape[1]:
        hint = "; qt is (out, in)" if x.ndim and x.shape[-1] == qt.shape[0] else ""
        raise ValueError(f"{op}: x has shape {x.shape}, expected (..., {qt.shape[1]}){hint}")
    return qt.shape[0], qt.shape[1]


def _by_row(a: Any, n: int) -> Any:
    """A scale of the whole tensor, or of columns, repeated for each of n rows."""
    return None if a is None else jnp.broadcast_to(a, (n, a.shape[-1] if a.ndim else 1))


def _shapes(op: str, x: jax.Array, qt: QTensor) -> dict[str, Any]:
    """The sizes and options of a call matmul(x, qt)."""
    if op != "matmul":
        raise ValueError(f"explain: {op} takes sizes by name, arrays only for matmul")
    n, k = _matrix(op, qt, x)
    kind = "_".join(["zero"] * (qt.zero is not None) + ["offset"] * (qt.offset is not None))
    return dict(
        m=x.size // k if k else 0, k=k, n=n, bits=qt.bits, group=qt.group, x_dtype=x.dtype.name,
        kind=kind or "symmetric",
    )  # fmt: skip
