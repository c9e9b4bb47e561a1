"""Every operation's Mosaic TPU kernel is compiled for v5e, v6e and v5p on a machine without a TPU.

To add an operation: a function device -> [(name, f, args)] in CASES; f takes arrays, args are their shapes.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from qlab.kernels.common import layout, lowering

DEVICES = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5"}
S = jax.ShapeDtypeStruct

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiling for a TPU needs the libtpu wheel: pip install 'jax[tpu]'",
    ),
]


def weight_only_matmul(device):
    from qlab.kernels.weight_only_matmul import api, pallas_tpu

    def case(m, k, n, bits, group, dtype="bfloat16", kind="symmetric", activation=None):
        spec = api.spec_of(
            m, k, n, bits=bits, group=group, x_dtype=dtype, kind=kind, activation=activation,
            bias=activation is not None, platform="tpu", device=device,
        )  # fmt: skip
        assert pallas_tpu.why_not(spec) == ""
        a = S((n, layout.num_groups(k, group)), jnp.float32)
        args = dict(
            x=S((m, k), dtype), codes=S((n, layout.row_bytes(k, bits, group)), jnp.uint8), scale=a,
            zero=a if "zero" in kind else None, offset=a if "offset" in kind else None,
            bias=S((n,), jnp.float32) if activation else None,
        )  # fmt: skip
        name = f"{m}x{k}x{n}-w{bits}g{group}-{dtype}-{kind}-{activation}"
        return name, lambda **a: pallas_tpu.run(spec, *a.values()), args

    yield from (case(m, 4096, 4096, b, 128) for m in (1, 1024) for b in (2, 3, 4, 8))
    yield case(16, 4096, 4096, 4, 32, "float32", "zero_offset", "gelu")
    yield case(16, 4096, 4096, 3, 0, "bfloat16", "zero_offset", "silu")
    yield case(300, 4097, 130, 7, 0, "float16", "zero", "relu")
    yield case(8, 28672, 512, 4, 128, "bfloat16", "zero")  # more groups than a register row


CASES = {"weight_only_matmul": weight_only_matmul}


def listed():
    return [
        pytest.param(op, device, i, id=f"{op}-{name}-{short}")
        for op, cases in CASES.items()
        for short, device in DEVICES.items()
        for i, (name, _, _) in enumerate(cases(device))
    ]


@pytest.mark.parametrize(("op", "device", "i"), listed())
@pytest.mark.aot
def test_compiles(op, device, i):
    _, f, args = list(CASES[op](device))[i]
    given = {k: a for k, a in args.items() if a is not None}
    names = list(given)

    def g(*arrays):
        return f(**dict.fromkeys(args) | dict(zip(names, arrays, strict=True)))

    assert "custom-call" in lowering.compile_tpu(g, list(given.values()), device).as_text()
