"""A model of your own, quantized: any unedited flax.nnx or linen module, any method of the lab.

    from qlab.quantization import quantize
    result = quantize(model, batches, method="gptq", bits=4)   # model: an nnx.Module
    print(result)                                              # bytes, error per layer, where precision went
    y = result.model(x)                                        # a copy in eval mode with packed weights; yours is untouched

    result = quantize(module, batches, variables=variables, bits=4)   # a linen module
    y = result.apply(x)

The model runs once on all calibration samples (eagerly, in its own code). Each layer is quantized when it is
called, on the inputs that the quantized layers before it give; with target "fp" towards its output on the
inputs it has in the float model (W* = W C H^-1 of `fp_target`), which undoes part of their error.
Weights only: activations stay float.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from qlab.lab.errors import UserError, nearest
from qlab.quantization.layer_plan import Plan, Quantized, Target, check_found
from qlab.quantization.layers import View
from qlab.quantization.matrix import METHODS, grid_search
from qlab.quantization.own_flax import quantize_linen, quantize_nnx
from qlab.quantization.qtensor import dequantize


def quantize(
    model: Any,
    calibration: Iterable[Any] | None = None,
    *,
    method: str = "flexround",
    bits: int = 4,
    granularity: str = "channel",
    pattern: str = "",
    target: Target = "fp",
    variables: Any = None,
    inputs: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    **options: Any,
) -> Quantized:
    """Quantizes the linear layers of a model; the model itself is not changed.

    Args:
      model: an nnx.Module (run in eval mode), a linen module with `variables`, or any function
        apply(params, x) with `variables` its params: then every leaf of two or more axes is a kernel
        (in..., out), known by its path.
      calibration: batches, each an input x or a tuple of arguments with samples first. May be None
        for method "rtn" (but not for linen modules, whose layers show themselves only when called).
      method, bits, granularity, options: of `quantize_matrix`; the grid's calibration is "searched" up to
        5 bits and "minmax" above unless it is given.
      pattern: regular expression searched in the layers' paths ("encoder/0/attention"); others stay float.
      target: what a layer's output is held to: the float model's ("fp") or what the layer would give
        on its present inputs ("same").
      inputs: only for functions: {path: f[..., in]}, the inputs of kernels, needed by all but "rtn".
      call: keyword arguments of every call of the model, e.g. {"train": False}.
    Raises:
      UserError: no layer fits the pattern (the nearest name is given), a method is not known, or weights or
        inputs are not finite (the layer is named).

    >>> from flax import nnx
    >>> net = nnx.Sequential(nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
    >>> x = jax.random.normal(jax.random.key(0), (64, 16))
    >>> result = quantize(net, [x], method="gptq", bits=8)
    >>> bool(jnp.abs(result.model(x) - net(x)).max() < 0.1), sorted(result.weights)
    (True, ['layers/0', 'layers/2'])
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is not known{nearest(method, METHODS)}")
    if target not in ("fp", "same"):
        raise UserError(f'target={target!r}; use "fp" or "same"')
    if calibration is None and method != "rtn" and not inputs:
        raise UserError(f'method={method!r} needs calibration batches; or use method="rtn"')
    try:
        wanted = re.compile(pattern)
    except re.error as e:
        raise UserError(f"pattern={pattern!r} is no regular expression: {e}") from None
    options = dict(options, method=method, bits=bits, granularity=granularity)
    if isinstance(bits, int):
        options.setdefault("calibration", grid_search(bits))
    plan = Plan(options, wanted, target, {}, {}, {})
    args = None if calibration is None else _joined(calibration)
    if isinstance(model, nnx.Module):
        return quantize_nnx(model, args, plan, dict(call or {}))
    if isinstance(model, linen.Module):
        return quantize_linen(model, args, plan, variables, dict(call or {}))
    if callable(model):
        return _function(model, plan, variables, inputs or {}, dict(call or {}))
    raise UserError(
        f"model is a {type(model).__name__}; an nnx.Module, a linen module with variables, or a function "
        "apply(params, x) is expected"
    )


def _joined(batches: Iterable[Any]) -> tuple[Any, ...]:
    """All batches as one, joined along their first axes."""
    made = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not made:
        raise UserError("calibration holds no batch")
    try:
        return jax.tree.map(lambda *a: jnp.concatenate([jnp.asarray(p) for p in a]), *made)
    except (ValueError, TypeError) as e:
        raise UserError(
            f"calibration batches do not join along their first axes: {str(e).splitlines()[0]}"
        ) from None


def _function(fn, plan: Plan, params, inputs, call) -> Quantized:
    if params is None:
        raise UserError("a function apply(params, x) needs variables=params")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in leaves
    ]
    kernels = {n: a for n, (_, a) in zip(names, leaves, strict=True) if jnp.ndim(a) >= 2}
    unknown = sorted(set(inputs) - set(kernels))
    if unknown:
        raise UserError(
            f"inputs names {unknown[0]!r}, no kernel{nearest(unknown[0], tuple(kernels))}"
        )
    views = {}
    for name, kernel in kernels.items():
        if not plan.pattern.search(name):
            continue
        if plan.options["method"] != "rtn" and name not in inputs:
            raise UserError(
                f"{name}: method={plan.options['method']!r} needs inputs={{{name!r}: f[..., in]}}; or use"
                ' method="rtn", or a narrower pattern'
            )
        shape = jnp.shape(kernel)
        width = int(np.prod(shape[:-1]))
        views[name] = View(
            lambda k, w=width: k.reshape(w, -1).T,
            lambda m, s=shape: m.T.reshape(s),
            lambda x, w=width: jnp.asarray(x).reshape(-1, w),
        )
        plan.quantize(name, "kernel", views[name], jnp.asarray(kernel), inputs.get(name))
    check_found(plan, kernels)

    def apply(*a, **k):
        whole = [
            views[n].kernel(dequantize(plan.weights[n])).astype(leaf.dtype)
            if n in plan.weights
            else leaf
            for n, (_, leaf) in zip(names, leaves, strict=True)
        ]
        return fn(jax.tree.unflatten(tree, whole), *a, **{**call, **k})

    return Quantized(None, plan.weights, tuple(plan.rows.values()), apply)
