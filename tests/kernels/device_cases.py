"""Main shapes of every operation, for devices that are not there: CASES[op](platform, device) -> cases.

A case: (name, which implementations' list, Spec, the arrays its `run` takes, as shapes; None where absent).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qlab.kernels.common import dispatch, layout

S = jax.ShapeDtypeStruct
Case = tuple[str, tuple[dispatch.Impl, ...], dispatch.Spec, list[Any]]


def name_of(*dims, **options) -> str:
    return "-".join(["x".join(map(str, dims)), *(f"{k}={v}" for k, v in options.items())])


def weight_only_matmul(**on) -> Iterator[Case]:
    from qlab.kernels.weight_only_matmul import api

    def case(m, k, n, **o):
        o = dict(x_dtype="bfloat16", kind="symmetric", group=128) | o
        biased = "activation" in o
        spec = api.spec_of(m, k, n, **o, bias=biased, **on)
        a = S((n, layout.num_groups(k, o["group"])), jnp.float32)
        codes = S((n, layout.row_bytes(k, o["bits"], o["group"])), jnp.uint8)
        zero, offset = (a if part in o["kind"] else None for part in ("zero", "offset"))
        bias = S((n,), jnp.float32) if biased else None
        return name_of(m, k, n, **o), api.IMPLS, spec, [
            S((m, k), o["x_dtype"]), codes, a, zero, offset, bias,
        ]  # fmt: skip

    for m in (1, 16, 4096):
        yield from (case(m, 4096, 4096, bits=b) for b in (2, 3, 4, 8))
    yield case(1, 8192, 8192, bits=4, x_dtype="float16", kind="zero")
    yield case(64, 4096, 4096, bits=4, group=32, x_dtype="float32", kind="zero_offset", activation="gelu")  # fmt: skip
    yield case(256, 4096, 4096, bits=4, group=0, kind="offset", activation="relu")
    yield case(256, 4096, 4096, bits=8, group=0, kind="zero", activation="silu")
    yield case(256, 4096, 4096, bits=4, group=1024, activation="gelu")
    yield case(17, 4097, 130, bits=7, group=0, kind="zero")
    yield case(8, 28672, 512, bits=4, kind="zero")  # more groups than a register row of a TPU
    yield case(1, 1, 1, bits=1, group=0)


def int8_matmul(**on) -> Iterator[Case]:
    from qlab.kernels.int8_matmul import api

    def case(m, k, n, **o):
        spec = api.spec_of(m, k, n, **o, **on)
        scaled, zeros = o.get("out") != "int32", o.get("zeros", "")
        token, channel = S((m,), jnp.float32), S((n,), jnp.float32)
        return name_of(m, k, n, **o), api.IMPLS, spec, [
            S((m, k), o.get("x_dtype", "int8")),
            S((n, k), "int8"),
            token if scaled and "x_dtype" not in o else None,
            channel if scaled else None,
            S((m,), "int8") if "x" in zeros else None,
            S((n,), "int8") if "w" in zeros else None,
            channel if o.get("bias") else None,
            None,
        ]  # fmt: skip

    yield case(4096, 4096, 4096)
    yield case(1, 8192, 8192)
    yield case(16, 4096, 11008, x_dtype="bfloat16", bias=True)
    yield case(300, 1000, 777, zeros="xw", bias=True, activation="silu")
    yield case(256, 2048, 2048, x_dtype="float32", zeros="w", activation="gelu", out="float32")
    yield case(3, 127, 5, zeros="xw", activation="relu", out="float16")
    yield case(64, 4097, 512, zeros="x", out="int32")
    yield case(1, 1, 1)


def quantize_pack(**on) -> Iterator[Case]:
    from qlab.kernels.quantize_pack import api

    def case(n, k, **o):
        o = dict(x_dtype="bfloat16") | o
        side = S((n, layout.num_groups(k, o.get("group", 0))), jnp.float32)
        key = S((2,), jnp.int32)
        return name_of(n, k, **o), api.IMPLS, api.spec_of(n, k, **o, **on), [
            S((n, k), o["x_dtype"]),
            side if o.get("calibration") == "given" else None,
            None,
            key if o.get("rounding") == "stochastic" else None,
        ]  # fmt: skip

    yield case(4096, 4096, bits=4, group=128)
    yield case(4096, 4096, bits=2, group=32, calibration="minmax")
    yield case(
        512, 4096, x_dtype="float32", bits=3, group=64, calibration="given", rounding="half_up"
    )
    yield case(512, 4096, x_dtype="float32", bits=4, group=256, rounding="stochastic")
    yield case(512, 4096, bits=8)
    yield case(16, 4096, bits=4, calibration="minmax", rounding="stochastic")


def hadamard_quantize(**on) -> Iterator[Case]:
    from qlab.kernels.hadamard_quantize import api

    def case(n, k, **o):
        o = dict(x_dtype="bfloat16") | o
        return name_of(n, k, **o), api.IMPLS, api.spec_of(n, k, **o, **on), [S((n, k), o["x_dtype"])]  # fmt: skip

    yield case(128, 4096, bits=4)
    yield case(128, 14336, bits=8)
    yield case(128, 1024, x_dtype="float32", bits=0, block=64)
    yield case(128, 512, x_dtype="float32", bits=4)
    yield case(5, 128, bits=3)


def log2_softmax_quantize(**on) -> Iterator[Case]:
    from qlab.kernels.log2_softmax_quantize import api

    def case(b, r, c, **o):
        mask = S((b, r, c), jnp.bool_) if o.get("mask") else None
        return name_of(b, r, c, **o), api.IMPLS, api.spec_of(b, r, c, **o, **on), [
            S((b, r, c), o.get("dtype", "float32")), mask, S((), jnp.float32),
        ]  # fmt: skip

    yield case(8, 1024, 1024, bits=4, dtype="bfloat16")
    yield case(2, 300, 5000, bits=4, base="log_sqrt2", causal=True, mask=True)
    yield case(2, 197, 197, bits=8, base="log_sqrt2", zero_code="clip")


def log2_attend(**on) -> Iterator[Case]:
    from qlab.kernels.log2_softmax_quantize import api

    def case(b, r, c, **o):
        spec = api.spec_of(b, r, c, **o, **on)
        codes, values = S((b, r, c), jnp.uint8), S((b, c, o["d"]), o["dtype"])
        return name_of(b, r, c, **o), api.ATTEND_IMPLS, spec, [codes, values]

    yield case(8, 1024, 1024, bits=4, d=128, dtype="int8", fraction=14)
    yield case(2, 300, 5000, bits=4, base="log_sqrt2", d=64, dtype="int8", fraction=7)
    yield case(2, 197, 197, bits=4, base="log_sqrt2", d=64, dtype="bfloat16")


def group_sparse_matmul(**on) -> Iterator[Case]:
    from qlab.kernels.group_sparse_matmul import api

    chunk = {"gpu": 128, "tpu": 1024}[on["platform"]]

    def case(m, k, n, nnz, bits, group, x_dtype, zero):
        o = dict(bits=bits, group=group, x_dtype=x_dtype, zero=zero)
        scale, i32 = S((nnz,), jnp.float32), jnp.int32
        parts = -(-nnz // chunk)
        return name_of(m, k, n, nnz, **o), api.IMPLS, api.spec_of(m, k, n, nnz, chunk=chunk, **o, **on), [
            S((m, k), x_dtype),
            S((n + 1,), i32), S((nnz,), jnp.int16), S((nnz, layout.row_bytes(group, bits)), jnp.uint8),
            scale, scale if zero else None, None,
            S((1, parts * chunk), i32), S((parts, chunk), i32), S((parts, 8), i32),
        ]  # fmt: skip

    yield case(1, 4096, 4096, 524288, 4, 16, "bfloat16", True)
    yield case(16, 4096, 4096, 131072, 4, 16, "bfloat16", True)
    yield case(64, 4096, 2048, 30000, 2, 128, "float32", False)
    yield case(3, 512, 100, 777, 3, 32, "float16", True)


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    f.__name__: f
    for f in (
        weight_only_matmul,
        int8_matmul,
        quantize_pack,
        hadamard_quantize,
        log2_softmax_quantize,
        log2_attend,
        group_sparse_matmul,
    )
}


def closed(impls, spec, arrays, impl: str) -> tuple[Callable[..., Any], list[Any]]:
    """(f, args): f runs `impl`, or raises with its reason, on the arrays that are there."""
    there = [i for i, a in enumerate(arrays) if a is not None]

    def f(*given):
        filled = list(arrays)
        for i, a in zip(there, given, strict=True):
            filled[i] = a
        return dispatch.run(impls, spec, *filled, impl=impl)

    return f, [arrays[i] for i in there]
