"""Every operation's Mosaic GPU kernel is lowered for H100 and H200 on a machine without either.

To add an operation: a function device -> [(name, f, args)] in CASES; f takes arrays, args are their shapes.
"""

import jax
import jax.numpy as jnp
import pytest

from qlab.kernels.common import layout, lowering

DEVICES = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
S = jax.ShapeDtypeStruct


def weight_only_matmul(device):
    from qlab.kernels.weight_only_matmul import api, pallas_gpu

    def case(m, k, n, bits, group, dtype="bfloat16", kind="symmetric", activation=None):
        spec = api.spec_of(
            m, k, n, bits=bits, group=group, x_dtype=dtype, kind=kind, activation=activation,
            bias=activation is not None, platform="gpu", device=device,
        )  # fmt: skip
        assert pallas_gpu.why_not(spec) == ""
        a = S((n, layout.num_groups(k, group)), jnp.float32)
        args = dict(
            x=S((m, k), dtype), codes=S((n, layout.row_bytes(k, bits, group)), jnp.uint8), scale=a,
            zero=a if "zero" in kind else None, offset=a if "offset" in kind else None,
            bias=S((n,), jnp.float32) if activation else None,
        )  # fmt: skip
        name = f"{m}x{k}x{n}-w{bits}g{group}-{dtype}-{kind}-{activation}"
        return name, lambda **a: pallas_gpu.run(spec, *a.values()), args

    yield from (case(m, 4096, 4096, b, 128) for m in (1, 16, 4096) for b in (2, 3, 4, 8))
    yield case(1, 8192, 8192, 4, 128, "float16", "zero")
    yield case(64, 4096, 4096, 4, 32, "float32", "zero_offset", "gelu")
    yield case(256, 4096, 4096, 4, 0, "bfloat16", "offset", "relu")
    yield case(256, 4096, 4096, 8, 0, "bfloat16", "zero", "silu")
    yield case(256, 4096, 4096, 4, 1024, "bfloat16", "symmetric", "gelu")
    yield case(17, 4097, 5, 7, 0, "bfloat16", "zero")
    yield case(1, 1, 1, 1, 0)


CASES = {"weight_only_matmul": weight_only_matmul}


def listed():
    return [
        pytest.param(
            op,
            device,
            i,
            id=f"{op}-{name}-{device.split()[1]}",
            marks=() if device == DEVICES[-1] and i % 2 else (pytest.mark.slow,),
        )
        for op, cases in CASES.items()
        for device in DEVICES
        for i, (name, _, _) in enumerate(cases(device))
    ]


@pytest.mark.parametrize(("op", "device", "i"), listed())
def test_lowers(op, device, i):
    _, f, args = list(CASES[op](device))[i]
    given = {k: a for k, a in args.items() if a is not None}
    names = list(given)

    def g(*arrays):
        return f(**dict.fromkeys(args) | dict(zip(names, arrays, strict=True)))

    text = lowering.lower_gpu(g, *given.values(), device=device).mlir_module()
    assert "mosaic_gpu" in text
