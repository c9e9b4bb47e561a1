"""Low-bit products of other libraries, for the kernels bench: each maker gives a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qlab.benches.measure import bind


class Absent(Exception):
    """Why a peer cannot take part here."""


def _need(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise Absent(f"{name} is not installed") from None


def _session(
    nodes: list[Any], inputs: dict[str, tuple[np.ndarray, int]], constants: dict[str, np.ndarray]
):
    """An ONNX Runtime session of a few nodes with constant weights; () -> the output "y"."""
    onnx, ort = _need("onnx"), _need("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    values = [helper.make_tensor_value_info(k, t, a.shape) for k, (a, t) in inputs.items()]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "product", values, [out],
        [numpy_helper.from_array(a, name) for name, a in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {k: a for k, (a, _) in inputs.items()}
    return lambda: session.run(None, feed)[0]


def onnx_weight_only(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, group: int):
    """MatMulNBits: x f32[M, K], 4-bit codes in blocks of `group`, zero point 8."""
    onnx = _need("onnx")
    if bits != 4:
        raise Absent(f"MatMulNBits of onnxruntime on a CPU is for 4 bits, not {bits}")
    n, k = codes.shape
    blob = codes.reshape(n, k // group, group // 2, 2)
    packed = (blob[..., 0] | (blob[..., 1] << 4)).astype(np.uint8)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=group, accuracy_level=4,
    )  # fmt: skip
    constants = {"w": packed, "scales": scale.reshape(-1)}
    return _session([node], {"x": (x, onnx.TensorProto.FLOAT)}, constants)


def onnx_int8(xq: np.ndarray, codes: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray):
    """MatMulInteger, i8[M, K] by i8[K, N] to i32, then a cast and both scales."""
    onnx = _need("onnx")
    make, f32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    # Signed weights may saturate in its x86 kernels: both unsigned, zero points undo the shift.
    nodes = [
        make("MatMulInteger", ["x", "w", "zero", "zero"], ["sum"]),
        make("Cast", ["sum"], ["float"], to=f32),
        make("Mul", ["float", "x_scale"], ["scaled"]),
        make("Mul", ["scaled", "w_scale"], ["y"]),
    ]
    x = (xq.astype(np.int16) + 128).astype(np.uint8)
    inputs = {"x": (x, onnx.TensorProto.UINT8), "x_scale": (x_scale, f32)}
    constants = {
        "w": np.ascontiguousarray((codes.T.astype(np.int16) + 128).astype(np.uint8)),
        "w_scale": w_scale.reshape(1, -1),
        "zero": np.asarray(128, np.uint8),
    }
    return _session(nodes, inputs, constants)


def _torch_call(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Waits for the GPU where there is one, so that a call's time is the product's."""
    torch = _need("torch")

    def call():
        y = f(*args)
        if y.is_cuda:
            torch.cuda.synchronize()
        return y

    return call


def torch_weight_only(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, group: int):
    """torch's own int4 weight-only product (tinygemm layout): bf16 x, zero point 8."""
    torch = _need("torch")
    if bits != 4:
        raise Absent(f"torch's weight-only product is for 4 bits, not {bits}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    xt = torch.tensor(x, device=device).bfloat16()
    # q_group_size blocks: w = (code - 8) * scale + zero, scales and zeros side by side
    pairs = np.stack([scale.T, np.zeros_like(scale.T)], -1)
    scales = (
        torch.tensor(pairs, device=device).bfloat16().contiguous()
    )  # the kernel reads no strides
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.tensor(codes.astype(np.int32)), 1
        )
        f = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs8 = torch.tensor((codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8), device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs8, 8)
        f = torch.ops.aten._weight_int4pack_mm
    return _torch_call(f, xt, packed, group, scales)


def torch_int8(xq: np.ndarray, codes: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray):
    """torch._int_mm and both scales."""
    torch = _need("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and len(xq) <= 16:
        raise Absent("torch._int_mm takes more than 16 rows on a GPU")
    a, b = torch.tensor(xq, device=device), torch.tensor(codes, device=device).t()
    xs, ws = (torch.tensor(v, device=device) for v in (x_scale, w_scale.reshape(1, -1)))
    return _torch_call(lambda a, b: torch._int_mm(a, b).float() * xs * ws, a, b)


def _torchao(w: np.ndarray, config: Any, dtype: str, x: np.ndarray):
    """torch.nn.Linear quantized by torchao's one call, as a user has it: its scales are its own."""
    torch, ao = _need("torch"), _need("torchao.quantization")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(w), requires_grad=False)
    layer = torch.nn.Sequential(layer.to(device, getattr(torch, dtype)))
    ao.quantize_(layer, config)
    xt = torch.tensor(x, device=device).to(getattr(torch, dtype))

    def call(x):
        with torch.inference_mode():
            return layer(x)

    return _torch_call(call, xt)


def torchao_weight_only(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, group: int):
    """quantize_ with torchao's 4-bit configuration for CPUs, or its 8-bit one (a scale a row): bf16 x."""
    ao = _need("torchao.quantization")
    if bits == 4:
        config = _need("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(
            group_size=group
        )
    elif bits == 8:
        config = ao.Int8WeightOnlyConfig()
    else:
        raise Absent(f"torchao's weight-only layers are of 4 or 8 bits, not {bits}")
    k = codes.shape[1]
    w = (codes.astype(np.float32) - 2 ** (bits - 1)) * np.repeat(scale, group or k, 1)[:, :k]
    return _torchao(w, config, "bfloat16", x)


def torchao_int8(xq: np.ndarray, codes: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray):
    """quantize_ with Int8DynamicActivationInt8WeightConfig: x is quantized on the way, as in qlab_dynamic."""
    config = _need("torchao.quantization").Int8DynamicActivationInt8WeightConfig()
    w = codes.astype(np.float32) * w_scale.reshape(-1, 1)
    return _torchao(w, config, "float32", xq * x_scale)


def _small_integers(codes: np.ndarray, bits: int) -> Any:
    """jnp.int4 or int8 of unsigned codes whose zero point is 2^(b-1)."""
    import jax.numpy as jnp

    if bits not in (4, 8):
        raise Absent(f"XLA has int4 and int8, not {bits} bits")
    return jnp.asarray(
        codes.astype(np.int32) - 2 ** (bits - 1), jnp.int4 if bits == 4 else jnp.int8
    )


def xla_weight_only(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, group: int):
    """bf16 x with weights in XLA's own small integers, a product for each group and its scales after it."""
    import jax
    import jax.numpy as jnp

    (n, k), w = codes.shape, _small_integers(codes, bits)

    def f(x, w, scale):
        x, w = x.reshape(len(x), k // group, group), w.reshape(n, k // group, group)
        dims = (((2,), (2,)), ((1,), (1,)))
        y = jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)
        return jnp.einsum("gmn,ng->mn", y, scale)

    return bind(f, jnp.asarray(x, jnp.bfloat16), w, jnp.asarray(scale))


def xla_int8(xq: np.ndarray, codes: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray):
    """bf16 x with int8 weights as they are: what XLA makes of mixed operands."""
    import jax
    import jax.numpy as jnp

    def f(x, w, scale):
        dims = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
        return y * scale

    x = jnp.asarray(xq * x_scale, jnp.bfloat16)
    return bind(f, x, jnp.asarray(codes), jnp.asarray(w_scale.reshape(1, -1)))


def _qwix(x: Any, w: Any):
    import jax.numpy as jnp

    dims = (((1,), (1,)), ((), ()))
    dot = _need("qwix").dot_general
    return bind(lambda x, w: dot(x, w, dims, preferred_element_type=jnp.float32), x, w)


def qwix_weight_only(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bits: int, group: int):
    """bf16 x with a QArray of int4 or int8 and a scale a group."""
    import jax.numpy as jnp

    w = _small_integers(codes, bits)
    q = _need("qwix").QArray(w, jnp.asarray(scale), None, w.dtype)
    return _qwix(jnp.asarray(x, jnp.bfloat16), q)


def qwix_int8(xq: np.ndarray, codes: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray):
    """Both operands as QArrays of int8."""
    import jax.numpy as jnp

    make = lambda q, s: _need("qwix").QArray(jnp.asarray(q), jnp.asarray(s), None, jnp.int8)  # noqa: E731
    return _qwix(make(xq, x_scale), make(codes, w_scale))


WEIGHT_ONLY = {
    "xla_int": xla_weight_only,
    "qwix": qwix_weight_only,
    "onnxruntime": onnx_weight_only,
    "torch": torch_weight_only,
    "torchao": torchao_weight_only,
}
INT8 = {
    "xla_int": xla_int8,
    "qwix": qwix_int8,
    "onnxruntime": onnx_int8,
    "torch": torch_int8,
    "torchao": torchao_int8,
}
