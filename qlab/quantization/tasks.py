"""The cells of a table of quantized nets: what each is, what it costs to store, how its spread splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qlab.lab.experiment import Metric
from qlab.quantization.qtensor import row_bytes

METRICS = {
    "accuracy": Metric("%", "higher", "test accuracy of the quantized net"),
    "fp_accuracy": Metric("%", "none", "test accuracy of the float net"),
    "mse_ratio": Metric(
        "", "lower", "layer error over that of rounding to nearest (geometric mean)"
    ),
    "moved": Metric("%", "none", "weights one or more grid steps from the nearest"),
    "moved2": Metric("%", "none", "weights two or more grid steps from the nearest"),
    "stored_bits": Metric("bits", "lower", "per weight, scales and zero points included"),
    "bytes": Metric("B", "lower", "packed weights with scales and zero points"),
    "fallbacks": Metric("", "lower", "layers whose Hessian needed more damping than asked for"),
    "sites_total": Metric("", "none", "layers"),
    "variance_method": Metric(
        "pt^2", "none", "its mean over seeds: variance from the method's key"
    ),
    "variance_calibration_and_method": Metric(
        "pt^2", "none", "the same with a fresh calibration draw"
    ),
}


class Task(NamedTuple):
    """One cell of the table: which net at how many bits. `draw` and `run` > 0 repeat a cell afresh."""

    name: str
    bits: int
    granularity: str  # "tensor" | "channel"
    net: str = "plain"
    draw: int = 0  # calibration draw
    run: int = 0  # method key


def with_repeats(cells: Sequence[Task], anchor: str) -> list[Task]:
    """The cells, then cell `anchor` with a fresh method key, and with a fresh draw and key.

    >>> [(t.name, t.draw, t.run) for t in with_repeats([Task("w2", 2, "channel")], "w2")]
    [('w2', 0, 0), ('w2', 0, 1), ('w2', 1, 2)]
    """
    home = [t for t in cells if t.name == anchor]
    return [*cells, *(t._replace(run=1) for t in home), *(t._replace(draw=1, run=2) for t in home)]


def storage(
    sizes: Sequence[tuple[int, ...]], task: Task, options: Mapping[str, Any]
) -> dict[str, float]:
    """Bytes of the packed weights with scales (f32) and zero points (a byte), and bits per weight.

    Options: symmetric (no zero points), group (columns that share a scale), offset (real, f32, instead of
    zero points).

    >>> storage([(10, 16)], Task("w2", 2, "channel"), {})
    {'bytes': 90.0, 'stored_bits': 4.5}
    """
    num_bytes = 0
    for rows, cols in sizes:
        group = options.get("group", 0)
        scales = 1 if task.granularity == "tensor" else rows * (cols // group if group else 1)
        num_bytes += rows * row_bytes(cols, task.bits, group)
        num_bytes += scales * (8 if options.get("offset") else 4 if options.get("symmetric") else 5)
    return {
        "bytes": float(num_bytes),
        "stored_bits": 8.0 * num_bytes / sum(r * c for r, c in sizes),
    }


def variance_split(tasks: Sequence[Task], hits: jax.Array, percent: float) -> dict[str, jax.Array]:
    """Shares of the spread over seeds, from tasks that repeat another with a fresh draw or method key.

    For a repeat that differs in the method key only, E (a - a')^2 / 2 is the variance that key makes;
    for one that differs in draw and key, it is that of both. The mean of these rows over seeds is
    the estimate; what is left of the variance of `accuracy` over seeds is the trained net's.

    Args:
      hits: i32[T], right answers per task (whole numbers: equal tasks give exactly 0).
      percent: accuracy points per right answer.

    >>> tasks = [Task("w2", 2, "channel"), Task("w2", 2, "channel", run=1)]
    >>> float(variance_split(tasks, jax.numpy.array([90, 92]), 1.0)["w2/variance_method"])
    2.0
    """
    home = {t.name: i for i, t in enumerate(tasks) if t.draw == 0 and t.run == 0}
    out = {}
    for i, t in enumerate(tasks):
        if t.draw or t.run:
            what = "variance_calibration_and_method" if t.draw else "variance_method"
            gap = (hits[i] - hits[home[t.name]]) * percent
            out[f"{t.name}/{what}"] = gap**2 / 2
    return out
