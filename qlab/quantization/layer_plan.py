"""What is known while a model's layers are quantized one after another, and what comes out of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlab import ops
from qlab.lab.errors import UserError, nearest
from qlab.quantization.gptq import layer_problem
from qlab.quantization.layers import View, kind_of, view_of
from qlab.quantization.matrix import layer_report, quantize_matrix
from qlab.quantization.qtensor import QTensor, dequantize

Target = Literal["fp", "same"]


class Row(NamedTuple):
    """One layer. relative: output error over output power; mse_ratio: over that of rounding to nearest.

    note: "" or why the layer stayed float or fell back to rounding to nearest. bits: 32 if float.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: float
    float_bytes: int
    bytes: int
    relative: float
    mse_ratio: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What `quantize` returns; print it for a summary.

    Attributes:
      model: a copy of an nnx model with packed weights; None for the other forms.
      weights: {layer: packed QTensor of W f32[out, in]}. rows: a Row per linear layer.
      apply: (x, ...) -> output of the quantized model.
    """

    model: Any
    weights: Mapping[str, QTensor]
    rows: tuple[Row, ...]
    apply: Callable[..., Any]

    @property
    def fallbacks(self) -> int:
        """Layers that were asked for and stayed float, or fell back to rounding to nearest."""
        return sum(bool(r.note) for r in self.rows)

    def __repr__(self) -> str:
        width = max([len(r.name) for r in self.rows], default=5)
        lines = [
            f"{'layer':{width}}  {'kernel':>16} {'bits':>5} {'bytes':>9} {'error':>8} {'/ rtn':>6}"
        ]
        for r in sorted(self.rows, key=lambda r: -r.relative):
            shape = " x ".join(map(str, r.shape))
            error = "" if np.isnan(r.relative) else f"{100 * r.relative:.3g} %"
            ratio = "" if np.isnan(r.mse_ratio) else f"{r.mse_ratio:.2f}"
            lines.append(
                f"{r.name:{width}}  {shape:>16} {r.bits:5.2f} {r.bytes:9d} {error:>8} {ratio:>6}"
                + (f"  {r.note}" if r.note else "")
            )
        before, after = sum(r.float_bytes for r in self.rows), sum(r.bytes for r in self.rows)
        lines.append(
            f"{len(self.rows)} layers, {before} -> {after} bytes ({before / max(after, 1):.1f} x smaller), "
            f"{self.fallbacks} of them not as asked; largest error first"
        )
        return "\n".join(lines)


class Plan(NamedTuple):
    """How each layer is quantized, and what was found so far."""

    options: Mapping[str, Any]
    pattern: re.Pattern[str]
    target: Target
    x_fp: dict[str, jax.Array]
    weights: dict[str, QTensor]
    rows: dict[str, Row]

    def layer(self, name: str, layer: Any, kernel: jax.Array, x: Any) -> jax.Array | None:
        """The kernel to use in the call of a layer on x, None for its own: quantized at its first call."""
        if name in self.weights:  # called before: the weight is shared, and quantized already
            return self._kernel(layer, name, kernel.shape)
        if name in self.rows or not self.pattern.search(name):
            return None
        view = view_of(layer, kernel.shape)
        if isinstance(x, Tracer) or isinstance(kernel, Tracer):
            view = "called inside jit, scan or vmap, where its inputs are not numbers yet"
        if isinstance(view, str):
            self.rows[name] = float_row(name, layer, kernel, view)
            return None
        self.quantize(name, kind_of(layer), view, kernel, x)
        return self._kernel(layer, name, kernel.shape)

    def _kernel(self, layer: Any, name: str, shape: tuple[int, ...]) -> jax.Array:
        view = view_of(layer, shape)
        assert isinstance(view, View)
        return view.kernel(dequantize(self.weights[name]))

    def quantize(self, name: str, kind: str, view: View, kernel: jax.Array, x: Any) -> None:
        """Fills weights and rows for one layer; x None: without inputs."""
        w = view.matrix(kernel)
        rows = None if x is None else view.rows(x)
        goal = w
        if not bool(jnp.isfinite(w).all()):
            raise UserError(f"{name}: its weights hold NaN or infinity; remove them first")
        if rows is not None and not bool(jnp.isfinite(rows).all()):
            raise UserError(
                f"{name}: its calibration inputs hold NaN or infinity; check the batches"
            )
        if rows is not None and name in self.x_fp and self.options["method"] != "rtn":
            goal = _goal(w, rows, self.x_fp[name])
        options, note = dict(self.options), ""
        try:
            qt = quantize_matrix(goal, rows, **options)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        except ValueError as e:  # no damping made the Hessian regular
            options["method"], note = "rtn", f"rounded to nearest: {e}"
            qt = quantize_matrix(w, None, **options)
        qt = ops.pack(qt)
        report = layer_report(w, qt, rows)
        size = int(np.prod(kernel.shape)) * kernel.dtype.itemsize
        self.weights[name] = qt
        self.rows[name] = Row(
            name, kind, kernel.shape, qt.stored_bits, size, qt.nbytes,
            report["relative"], report["mse_ratio"], note,
        )  # fmt: skip


def called(model: Callable[..., Any], args: Sequence[Any], call: Mapping[str, Any]) -> Any:
    """model(*args, **call) on the calibration batches; one line if they do not fit."""
    try:
        return model(*args, **call)
    except (TypeError, ValueError) as e:
        shapes = ", ".join(str(jnp.shape(a)) for a in jax.tree.leaves(tuple(args)))
        raise UserError(
            f"the model does not run on the calibration batches (of shape {shapes} together): {str(e).splitlines()[0]}"
        ) from e


@jax.jit
def _goal(w: jax.Array, x_q: jax.Array, x_fp: jax.Array) -> jax.Array:
    """W* of a layer, see `fp_target`."""
    return layer_problem(w, x_q, x_fp)[0]


def float_row(name: str, layer: Any, kernel: jax.Array, why: str) -> Row:
    size = int(np.prod(kernel.shape)) * kernel.dtype.itemsize
    nan = float("nan")
    return Row(
        name, kind_of(layer), kernel.shape, 32.0, size, size, nan, nan, f"stays float: {why}"
    )


def check_found(plan: Plan, known: Iterable[str]) -> None:
    if not plan.rows:
        names = sorted(known)
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        near = nearest(plan.pattern.pattern, tuple(names))
        raise UserError(
            f"no linear layer fits pattern={plan.pattern.pattern!r}{near}; there are: {listed or 'none'}"
        )
