"""The low-bit operations beside plain matrix products and other libraries, and beside the bound.

The ceilings of the device are measured first: bytes copied a second, and the rates of f32, bf16 and int8
products. A case's bound is the slower of its bytes at the copy rate and its arithmetic at the best rate of
its dtypes (kernels/<op>/cost.py). Contestants of a product y[M, N] = x[M, K] @ w[N, K].T:
    qlab         the operation, by the implementation that impl=None takes (named in the note)
    f32, bf16    XLA's own product of plain weights (cuBLAS on a GPU)
    onnxruntime  MatMulNBits or MatMulInteger on a CPU, where installed
    torch        its int4 weight-only product, or _int_mm, where installed
Memory-bound operations (quantize_pack, hadamard_quantize) stand beside a copy of their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab import ops
from qlab.benches import kernel_peers, kernel_tuning
from qlab.benches.measure import Number, Tell, find, interleave, ratio, seconds_per_call
from qlab.kernels.common import dispatch
from qlab.lab.experiment import Claim, Figure, Metric
from qlab.quantization.qtensor import QTensor

METRICS = {
    "us": Metric("us", "lower", "one call, steady"),
    "bound_us": Metric("us", "none", "bytes at the copy rate or arithmetic at the product rate"),
    "of_bound": Metric("%", "higher", "bound_us over us"),
    "to_f32": Metric("times", "higher", "f32 product's time over this one's"),
    "to_bf16": Metric("times", "higher", "bf16 product's time over this one's"),
    "to_copy": Metric("times", "lower", "time over that of copying the input"),
    "max_error": Metric(
        "", "none", "largest difference from the dequantized product, of its scale"
    ),
    "gb_per_s": Metric("GB/s", "higher", "bytes that must move, a second"),
    "tflops": Metric("TFLOP/s", "higher", "multiply-adds count twice"),
}
FIGURES = (Figure("One call", "bars", "us", ylabel="us", logy=True),)


def _goal(text: str, task: str, metric: str, target: float) -> Claim:
    return Claim(text, "goal, CPU", ("qlab", f"{task}/{metric}"), ">=", target)


GOALS = (
    _goal("W8A8 at 1024^3 is 8 times XLA's f32 product", "int8 m1024", "to_f32", 8.0),
    _goal("W4A16 at 1024^3 is 4 times XLA's f32 product", "w4g128 m1024", "to_f32", 4.0),
)


class Case(NamedTuple):
    """label: task of its rows. arms: name -> jitted call without arguments. truth: f64 result or None.

    flops, num_bytes: of the qlab arm. rate: which measured ceiling its arithmetic has. note: of qlab.
    """

    label: str
    arms: dict[str, Callable[[], Any]]
    absent: dict[str, str]
    truth: np.ndarray | None
    flops: float
    num_bytes: float
    rate: str
    note: str


def settings(quick: bool) -> dict[str, Any]:
    gpu = dispatch.here()[0] == "gpu"
    size = 8192 if gpu else 1024
    return {
        "k": size,
        "n": size,
        "m": (1, 1024) if quick else (1, 16, 4096 if gpu else 1024),
        "tune_m": tuple(2**i for i in range(13 if gpu else 11)),
        "bits": (4,) if quick else (2, 3, 4, 8),
        "group": 128,
        "rows": size,
        "repetitions": 5 if quick else 21,
        "budget_s": 1.0 if quick else 6.0,
    }


def _bind(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(f)
    return lambda: compiled(*args)


def ceilings(s: dict[str, Any], tell: Tell) -> dict[str, float]:
    """Measured on this device: bytes a second of a copy, FLOP/s of f32, bf16 and int8 products."""
    tell("kernels: ceilings of this device")
    gpu = dispatch.here()[0] != "cpu"
    big = jnp.ones(1 << (28 if gpu else 24), jnp.float32)  # far beyond the last cache
    side = 8192 if gpu else 1024
    rng = np.random.default_rng(0)
    # Two operands: XLA takes a slow path for a @ a.T.
    x, w = (jnp.asarray(rng.normal(size=(side, side)), jnp.float32) for _ in range(2))
    q, p = (jnp.asarray(rng.integers(-127, 128, (side, side)), jnp.int8) for _ in range(2))

    def best(f, *args):
        call = _bind(f, *args)
        jax.block_until_ready(call())
        return min(seconds_per_call(call) for _ in range(5))

    def product(a, b, accumulate):
        return best(lambda a, b: jnp.dot(a, b.T, preferred_element_type=accumulate), a, b)

    narrow = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    return {
        "copy": 2 * big.nbytes / best(lambda a: a + 1, big),
        "f32": 2 * side**3 / product(x, w, jnp.float32),
        "bf16": 2 * side**3 / product(*narrow, jnp.float32),
        "int8": 2 * side**3 / product(q, p, jnp.int32),
    }


def _plain(x: jax.Array, w: jax.Array) -> dict[str, Callable[[], Any]]:
    """The products users have without low bits."""
    dot = lambda x, w: jnp.dot(x, w.T, preferred_element_type=jnp.float32)  # noqa: E731
    return {
        name: _bind(dot, x.astype(t), w.astype(t))
        for name, t in (("f32", jnp.float32), ("bf16", jnp.bfloat16))
    }


def weight_only(m: int, bits: int, s: dict[str, Any]) -> Case:
    from qlab.kernels.weight_only_matmul import cost

    k, n, group = s["k"], s["n"], s["group"]
    rng = np.random.default_rng(m + bits)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float32) / 2**bits
    zero = np.full((n, k // group), 2.0 ** (bits - 1), np.float32)
    plain = QTensor(
        jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(zero), None, bits, (1,), (n, k)
    )
    qt = ops.pack(plain)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    w = ops.dequantize(qt)
    arms = {"qlab": _bind(lambda x, qt: ops.matmul(x, qt), x, qt), **_plain(x, w)}
    absent: dict[str, str] = {}
    for name, make in kernel_peers.WEIGHT_ONLY.items():
        try:
            arms[name] = make(np.asarray(x, np.float32), codes, scale, bits, group)
        except kernel_peers.Absent as e:
            absent[name] = str(e)
    truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    return Case(
        f"w{bits}g{group} m{m}", arms, absent, truth, cost.flops(m, k, n),
        cost.num_bytes(m, k, n, bits=bits, group=group), "bf16", str(ops.explain("matmul", x, qt).runs),
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
    f = lambda xq, qt, xs: ops.int8_matmul(xq, qt, x_scale=xs, out_dtype=jnp.bfloat16)  # noqa: E731
    arms = {"qlab": _bind(f, xq, qt, x_scale), **_plain(x, w)}
    dynamic = lambda x, qt: ops.int8_matmul(x, qt)  # noqa: E731
    arms["qlab_dynamic"] = _bind(dynamic, x.astype(jnp.bfloat16), qt)
    absent: dict[str, str] = {}
    for name, make in kernel_peers.INT8.items():
        try:
            arms[name] = make(*map(np.asarray, (xq, codes, x_scale, scale)))
        except kernel_peers.Absent as e:
            absent[name] = str(e)
    truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    runs = ops.explain("int8_matmul", m=m, k=k, n=n).runs
    return Case(
        f"int8 m{m}",
        arms,
        absent,
        truth,
        cost.flops(m, k, n),
        cost.num_bytes(m, k, n),
        "int8",
        str(runs),
    )


def quantize_pack(s: dict[str, Any]) -> Case:
    from qlab.kernels.quantize_pack import cost

    rows, k, group = s["rows"], s["k"], s["group"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, k)), jnp.bfloat16)
    arms = {
        "qlab": _bind(lambda x: ops.quantize_pack(x, 4, group), x),
        "copy": _bind(lambda x: x + 1, x),
    }
    return Case(
        "quantize_pack w4",
        arms,
        {},
        None,
        0.0,
        cost.num_bytes(rows, k, bits=4, group=group),
        "f32",
        "",
    )


def cases(s: dict[str, Any]) -> list[Callable[[], Case]]:
    """Built one at a time: operands of a large case are freed before the next."""
    out: list[Callable[[], Case]] = []
    for m in s["m"]:
        out += [lambda m=m, b=b: weight_only(m, b, s) for b in s["bits"]]
        out.append(lambda m=m: int8(m, s))
    return [*out, lambda: quantize_pack(s)]


def one_case(case: Case, rates: dict[str, float], s: dict[str, Any]) -> list[Number]:
    bound = max(case.num_bytes / rates["copy"], case.flops / rates[case.rate])
    numbers = [Number("qlab", "bound_us", (1e6 * bound,), note=case.note)]
    numbers += [Number(arm, "us", status="absent", note=why) for arm, why in case.absent.items()]
    ready = {}
    for arm, call in case.arms.items():
        y = jax.block_until_ready(call())
        if case.truth is not None:
            y = y.float().cpu().numpy() if hasattr(y, "cpu") else np.asarray(y)  # of torch
            error = np.abs(y.astype(np.float64) - case.truth).max() / np.abs(case.truth).max()
            numbers.append(Number(arm, "max_error", (float(error),)))
            if not error < 0.03:  # bf16 and dynamic 8-bit inputs stay below
                note = f"differs by {error:.2g} of the largest value"
                numbers.append(Number(arm, "us", status="failed", note=note))
                continue
        ready[arm] = lambda call=call: {"us": 1e6 * seconds_per_call(call)}
    numbers += interleave(ready, s["repetitions"], s["budget_s"])
    times = find(numbers, "qlab", "us").values
    numbers.append(Number("qlab", "of_bound", tuple(100 * 1e6 * bound / t for t in times)))
    for arm in case.arms:
        for plain in ("f32", "bf16"):
            if plain in case.arms and arm != plain:
                numbers.append(ratio(numbers, plain, arm, "us", f"to_{plain}")._replace(arm=arm))
    if "copy" in case.arms:
        numbers.append(ratio(numbers, "qlab", "copy", "us", "to_copy"))
        numbers.append(Number("qlab", "gb_per_s", tuple(case.num_bytes / t / 1e3 for t in times)))
    return [x._replace(name=f"{case.label}/{x.name}") for x in numbers]


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    rates = ceilings(s, tell)
    numbers = [Number("device", "gb_per_s", (rates["copy"] / 1e9,), note="copy")]
    numbers += [
        Number(f"{name} product", "tflops", (rates[name] / 1e12,))
        for name in ("f32", "bf16", "int8")
    ]
    for make in cases(s):
        case = make()
        tell(f"kernels: {case.label}")
        numbers += one_case(case, rates, s)
    return numbers


def tune(s: dict[str, Any], tell: Tell) -> None:
    kernel_tuning.tune(kernel_tuning.jobs(s), tell)


def summary(numbers: list[Number]) -> str:
    texts = []
    for n in numbers:
        if n.arm == "qlab" and n.name.endswith("/us") and n.status == "ok":
            task = n.name.split("/")[0]
            share = find(numbers, "qlab", f"{task}/of_bound").median
            speed = find(numbers, "qlab", f"{task}/to_f32")
            times = f", {speed.median:.2g} x f32" if speed.values else ""
            texts.append(f"{task} {n.median:.3g} us ({share:.0f} % of bound{times})")
    return "; ".join(texts)
