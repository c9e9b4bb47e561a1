"""The cases of the kernels bench: one call of every operation, beside what users do without it.

A case is built when its turn comes, so that the operands of a large one are freed before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab import ops
from qlab.benches import kernel_peers
from qlab.benches.measure import bind, seconds_per_call
from qlab.quantization.qtensor import QTensor


class Case(NamedTuple):
    """label: task of its rows. arms: name -> jitted call without arguments. absent: name -> why.

    unchecked: arms whose result is another's. truth: f64 result of the others, or None.
    flops, num_bytes: of the qlab arm. rate: which measured ceiling its arithmetic has. note: of qlab.
    """

    label: str
    arms: dict[str, Callable[[], Any]]
    flops: float
    num_bytes: float
    rate: str
    note: str
    truth: np.ndarray | None = None
    unchecked: tuple[str, ...] = ()
    absent: Mapping[str, str] = {}


def products(x: jax.Array, w: jax.Array) -> list[Callable[[], Any]]:
    """x @ w.T as XLA has it. Which form is fast hangs on dtype and M: up to 60 times on a CPU."""
    out = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    forms = (
        lambda x, w: jnp.dot(x, w.T, preferred_element_type=out),
        lambda x, w: jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=out
        ),
    )
    return [bind(f, x, w) for f in forms]


def fastest(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    for call in calls:
        jax.block_until_ready(call())
    return min(calls, key=lambda call: min(seconds_per_call(call) for _ in range(3)))


def _plain(x: jax.Array, w: jax.Array) -> dict[str, Callable[[], Any]]:
    """The products users have without low bits, each in its faster form."""
    return {
        name: fastest(products(x.astype(t), w.astype(t)))
        for name, t in (("f32", jnp.float32), ("bf16", jnp.bfloat16))
    }


def quantized(rng: np.random.Generator, n: int, k: int, bits: int, group: int) -> QTensor:
    """Random codes, a scale and the zero point 2^(b-1) for each group."""
    codes = jnp.asarray(rng.integers(0, 2**bits, (n, k)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, k // group)) / 2**bits, jnp.float32)
    zero = jnp.full(scale.shape, 2.0 ** (bits - 1))
    return QTensor(codes, scale, zero, None, bits, (1,), (n, k))


def _truth(x: jax.Array, w: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def _add(arms: dict, absent: dict, peers: Mapping[str, Callable[..., Any]], *args: Any) -> None:
    """The peers that can take part here; why the others cannot."""
    for name, make in peers.items():
        try:
            arms[name] = make(*args)
        except kernel_peers.Absent as e:
            absent[name] = str(e)


def weight_only(m: int, bits: int, s: dict[str, Any]) -> Case:
    from qlab.kernels.weight_only_matmul import cost

    k, n, group = s["k"], s["n"], s["group"]
    rng = np.random.default_rng(m + bits)
    plain = quantized(rng, n, k, bits, group)
    qt = ops.pack(plain)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    w = ops.dequantize(qt)
    arms = {"qlab": bind(lambda x, qt: ops.matmul(x, qt), x, qt), **_plain(x, w)}
    absent: dict[str, str] = {}
    of_peers = (np.asarray(x, np.float32), *map(np.asarray, (plain.codes, plain.scale)))
    _add(arms, absent, kernel_peers.WEIGHT_ONLY, *of_peers, bits, group)
    return Case(
        f"w{bits}g{group} m{m}", arms, cost.flops(m, k, n),
        cost.num_bytes(m, k, n, bits=bits, group=group), "bf16",
        str(ops.explain("matmul", x, qt).runs), _truth(x, w), absent=absent,
    )  # fmt: skip


def int8(m: int, s: dict[str, Any]) -> Case:
    from qlab.kernels.int8_matmul import cost

    k, n = s["k"], s["n"]
    rng = np.random.default_rng(m)
    codes = jnp.asarray(rng.integers(-127, 128, (n, k)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, 1)) / 127, jnp.float32)
    qt = QTensor(codes, scale, bits=8, axes=(1,), shape=(n, k))
    xq = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    x_scale = jnp.asarray(rng.uniform(0.5, 1.5, (m, 1)) / 127, jnp.float32)
    w = ops.dequantize(qt)
    x = xq.astype(jnp.float32) * x_scale
    static = lambda xq, qt, xs: ops.int8_matmul(xq, qt, x_scale=xs, out_dtype=jnp.bfloat16)  # noqa: E731
    arms = {"qlab": bind(static, xq, qt, x_scale), **_plain(x, w)}
    arms["qlab_dynamic"] = bind(lambda x, qt: ops.int8_matmul(x, qt), x.astype(jnp.bfloat16), qt)
    absent: dict[str, str] = {}
    _add(arms, absent, kernel_peers.INT8, *map(np.asarray, (xq, codes, x_scale, scale)))
    runs = ops.explain("int8_matmul", m=m, k=k, n=n).runs
    return Case(
        f"int8 m{m}", arms, cost.flops(m, k, n), cost.num_bytes(m, k, n), "int8", str(runs),
        _truth(x, w), absent=absent,
    )  # fmt: skip


def sparse(m: int, s: dict[str, Any]) -> Case:
    """GQSA: 4 bits, groups of 16, half of them kept; the rivals are dense."""
    from qlab.kernels.group_sparse_matmul import cost

    k, n, bits, group = s["k"], s["n"], 4, 16
    rng = np.random.default_rng(m)
    mask = rng.random((n, k // group)) < 0.5
    dense = quantized(rng, n, k, bits, group)
    bsr = ops.group_sparse(dense, jnp.asarray(mask))
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    w = ops.dequantize(dense) * np.repeat(mask, group, 1)
    w2 = ops.pack(quantized(rng, n, k, 2, s["group"]))
    product = lambda x, bsr: ops.group_sparse_matmul(x, bsr, bits=bits, group=group)  # noqa: E731
    arms = {"qlab": bind(product, x, bsr), **_plain(x, w)}
    arms["w2"] = bind(lambda x, qt: ops.matmul(x, qt), x, w2)
    nnz = int(mask.sum())
    runs = ops.explain("group_sparse_matmul", m=m, k=k, n=n, nnz=nnz, bits=bits, group=group).runs
    return Case(
        f"sparse w{bits}g{group} m{m}", arms, cost.flops(m, nnz, group),
        cost.num_bytes(m, k, n, nnz, bits=bits, group=group), "bf16", str(runs), _truth(x, w), ("w2",),
    )  # fmt: skip


def quantize_pack(s: dict[str, Any]) -> Case:
    from qlab.kernels.quantize_pack import cost

    rows, k, group = s["rows"], s["k"], s["group"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, k)), jnp.bfloat16)
    arms = {"qlab": bind(lambda x: ops.quantize_pack(x, 4, group), x), "copy": _copy(x)}
    runs = ops.explain("quantize_pack", n=rows, k=k, bits=4, group=group).runs
    num_bytes = cost.num_bytes(rows, k, bits=4, group=group)
    return Case("quantize_pack w4", arms, 0.0, num_bytes, "f32", str(runs))


def hadamard_quantize(s: dict[str, Any]) -> Case:
    """plain: the product with the dense matrix, then rounding, as XLA does it."""
    from qlab.kernels.hadamard_quantize import cost, matrices

    rows, k = s["rows"], s["k"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, k)), jnp.bfloat16)
    h = jnp.asarray(matrices.dense(k) / np.sqrt(k), jnp.bfloat16)

    def plain(x, h):
        y = jnp.dot(x, h.T, preferred_element_type=jnp.float32)
        scale = jnp.abs(y).max(-1, keepdims=True) / 127
        return jnp.round(y / scale).astype(jnp.int8), scale

    arms = {
        "qlab": bind(lambda x: ops.hadamard_quantize(x, 8), x),
        "plain": bind(plain, x, h),
        "copy": _copy(x),
    }
    runs = ops.explain("hadamard_quantize", n=rows, k=k, bits=8).runs
    flops, num_bytes = cost.flops(rows, k), cost.num_bytes(rows, k)
    return Case("hadamard w8", arms, flops, num_bytes, "f32", str(runs))


def log2_softmax(s: dict[str, Any]) -> Case:
    """plain: softmax in the dtype of the logits."""
    from qlab.kernels.log2_softmax_quantize import cost

    heads, c = s["heads"], s["k"] // 2
    z = jnp.asarray(np.random.default_rng(0).normal(size=(heads, c, c)), jnp.bfloat16)
    arms = {
        "qlab": bind(lambda z: ops.log2_softmax_quantize(z, bits=4), z),
        "plain": bind(lambda z: jax.nn.softmax(z, -1), z),
        "copy": _copy(z),
    }
    runs = ops.explain("log2_softmax_quantize", b=heads, r=c, c=c, bits=4, dtype="bfloat16").runs
    num_bytes = cost.num_bytes(heads, c, c)
    return Case("log2_softmax w4", arms, 0.0, num_bytes, "f32", str(runs))


def log2_attend(s: dict[str, Any]) -> Case:
    """The codes times int8 values; the rivals multiply the probabilities that the codes stand for."""
    from qlab.kernels.log2_softmax_quantize import api, cost

    heads, c, d = s["heads"], s["k"] // 2, 64
    rng = np.random.default_rng(0)
    z = jnp.asarray(3 * rng.normal(size=(heads, c, c)), jnp.float32)
    codes = ops.log2_softmax_quantize(z, bits=4)
    v = jnp.asarray(rng.integers(-127, 128, (heads, c, d)), jnp.int8)
    p = api.decode(codes, bits=4)
    arms = {"qlab": bind(lambda q, v: ops.log2_attend(q, v, bits=4), codes, v)}
    for name, t in (("f32", jnp.float32), ("bf16", jnp.bfloat16)):
        dot = lambda p, v: jnp.matmul(p, v, preferred_element_type=jnp.float32)  # noqa: E731
        arms[name] = bind(dot, p.astype(t), v.astype(t))
    truth = np.matmul(np.asarray(p, np.float64), np.asarray(v, np.float64))
    flops = cost.attend_flops(heads, c, c, d, bits=4, base="log2")
    num_bytes = cost.attend_bytes(heads, c, c, d)
    return Case("log2_attend w4", arms, flops, num_bytes, "int8", "", truth)


def _copy(x: jax.Array) -> Callable[[], Any]:
    return bind(lambda x: x + 1, x)


def cases(s: dict[str, Any]) -> list[Callable[[], Case]]:
    out: list[Callable[[], Case]] = []
    for m in s["m"]:
        out += [lambda m=m, b=b: weight_only(m, b, s) for b in s["bits"]]
        out.append(lambda m=m: int8(m, s))
        if m <= 16:
            out.append(lambda m=m: sparse(m, s))
    memory = (quantize_pack, hadamard_quantize, log2_softmax, log2_attend)
    return [*out, *(lambda f=f: f(s) for f in memory)]
