"""Quantizing unedited flax modules: layers are watched as the model runs, then exchanged for packed ones.

nnx layers are swapped in a copy of the model; linen layers are met by an interceptor. See own_model.quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.core import Tracer

from qlab import ops
from qlab.lab.errors import UserError
from qlab.quantization.layer_plan import Plan, Quantized, called, check_found, float_row
from qlab.quantization.layers import View, kind_of, view_of
from qlab.quantization.qtensor import QTensor, dequantize

# -- flax.nnx


class PackedWeight(nnx.Variable):
    """A QTensor inside an nnx module."""


class QuantizedLayer(nnx.Module):
    """A linear layer whose kernel is a packed QTensor; everything else is the layer's own.

    A matrix times vectors runs packed (`ops.matmul`), other kinds decode the kernel in the call.
    """

    def __init__(self, layer: nnx.Module, qt: QTensor, shape: tuple[int, ...]):
        graph, state = nnx.split(layer)
        self.graph = graph
        self.shape = tuple(shape)
        self.rest = nnx.data({k: v for k, v in state.items() if k != "kernel"})
        self.weight = PackedWeight(qt)
        view = view_of(layer, self.shape)
        assert isinstance(view, View)
        self.kernel_of = view.kernel
        bias = getattr(layer, "bias", None)
        # ops.matmul adds in float32 and knows no groups that are no multiples of 8
        self.direct = kind_of(layer) == "linear" and qt.group % 8 == 0
        self.has_bias = bias is not None

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        qt = self.weight.get_value()
        plain = all(value is None for value in options.values())  # e.g. a sharding of the output
        if plain and self.direct and x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            bias = self.rest["bias"][...] if self.has_bias else None
            return ops.matmul(x, qt, bias)
        kernel = self.kernel_of(dequantize(qt))
        rest = {k: v[...] for k, v in self.rest.items()}
        return nnx.merge(self.graph, {"kernel": kernel, **rest})(x, **options)


class _Watched(nnx.Module):
    """Stands for a layer during calibration: notes its input, and lets the plan choose its kernel."""

    def __init__(self, layer: Any, name: str, see: Callable[..., jax.Array | None]):
        self.layer, self.name, self.see = layer, name, see

    def __call__(self, x: jax.Array, **options: Any) -> Any:
        kernel = self.see(self.name, self.layer, self.layer.kernel[...], x)
        if kernel is None:
            return self.layer(x, **options)
        graph, state = nnx.split(self.layer)
        state["kernel"] = self.layer.kernel.replace(kernel.astype(self.layer.kernel[...].dtype))
        return nnx.merge(graph, state)(x, **options)


def _linears(model: nnx.Module) -> dict[str, Any]:
    found = {}
    for path, module in nnx.iter_modules(model):
        if kind_of(module) and hasattr(module, "kernel"):
            found["/".join(map(str, path))] = (path, module)
    return found


def _replaced(model: nnx.Module, new: Callable[[str, Any], Any]) -> Any:
    """A copy of the model with each linear layer exchanged for new(name, layer), unless that is None."""
    model = nnx.clone(model)
    for name, (path, layer) in _linears(model).items():
        made = new(name, layer)
        if made is None:
            continue
        if not path:
            return made
        parent: Any = model
        for step in path[:-1]:
            parent = parent[step] if isinstance(step, int) else getattr(parent, step)
        if isinstance(path[-1], int):
            parent[path[-1]] = made
        else:
            setattr(parent, path[-1], made)
    return model


def quantize_nnx(model: nnx.Module, args, plan: Plan, call) -> Quantized:
    ready = nnx.clone(model)
    ready.eval()
    known = _linears(ready)
    if args is None:
        for name, (_, layer) in known.items():
            kernel = layer.kernel[...]
            view = view_of(layer, kernel.shape)
            if not plan.pattern.search(name):
                continue
            if isinstance(view, str):
                plan.rows[name] = float_row(name, layer, kernel, view)
            else:
                plan.quantize(name, kind_of(layer), view, kernel, None)
    else:
        if plan.target == "fp":
            watched = _replaced(ready, lambda name, layer: _Watched(layer, name, _noting(plan)))
            called(watched, args, call)
        called(_replaced(ready, lambda name, layer: _Watched(layer, name, plan.layer)), args, call)
        for name, (_, layer) in known.items():
            if plan.pattern.search(name) and name not in plan.rows:
                plan.rows[name] = float_row(name, layer, layer.kernel[...], "never called")
    check_found(plan, known)

    def packed(name, layer):
        if name not in plan.weights:
            return None
        return QuantizedLayer(layer, plan.weights[name], layer.kernel[...].shape)

    made = _replaced(ready, packed)
    return Quantized(
        made, plan.weights, tuple(plan.rows.values()), lambda *a, **k: made(*a, **{**call, **k})
    )


def _noting(plan: Plan):
    """Keeps the rows that each layer sees in the float model; its kernel stays its own."""

    def see(name, layer, kernel, x):
        view = view_of(layer, kernel.shape)
        if isinstance(view, View) and not isinstance(x, Tracer) and plan.pattern.search(name):
            plan.x_fp.setdefault(name, view.rows(x))

    return see


# -- flax.linen


def quantize_linen(module: linen.Module, args, plan: Plan, variables, call) -> Quantized:
    if variables is None:
        raise UserError("a linen module needs variables=...: what module.init gave, trained")
    if args is None:
        raise UserError("a linen module needs calibration batches, one is enough for method 'rtn'")
    known: set[str] = set()

    def running(see):
        inside: list[bool] = []  # the call below with another kernel is met by the interceptor too

        def intercept(next_fun, a, k, context):
            layer = context.module
            if inside or context.method_name != "__call__" or not kind_of(layer):
                return next_fun(*a, **k)
            name = "/".join(map(str, layer.path))
            known.add(name)
            own = layer.variables["params"]
            kernel = see(name, layer, own["kernel"], a[0])
            if kernel is None:
                return next_fun(*a, **k)
            fresh = layer.clone(parent=None, name=None)
            inside.append(True)
            try:
                changed = {**own, "kernel": kernel.astype(own["kernel"].dtype)}
                return fresh.apply({"params": changed}, *a, **k)
            finally:
                inside.pop()

        return linen.intercept_methods(intercept)

    if plan.target == "fp":
        with running(_noting(plan)):
            called(partial(module.apply, variables), args, call)
    with running(plan.layer):
        called(partial(module.apply, variables), args, call)
    check_found(plan, known)

    def decoded(name, layer, kernel, x):
        if name not in plan.weights:
            return None
        view = view_of(layer, kernel.shape)
        assert isinstance(view, View)
        return view.kernel(dequantize(plan.weights[name]))

    def apply(*a, **k):
        with running(decoded):
            return module.apply(variables, *a, **{**call, **k})

    return Quantized(None, plan.weights, tuple(plan.rows.values()), apply)
