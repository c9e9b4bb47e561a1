"""The static side of a search: options checked, sizes chosen, memory known before it is taken."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax

from qlab.search.problem import Problem
from qlab.search.queue import Shape, layout
from qlab.search.table import num_words


class Plan(NamedTuple):
    """Hashable: equal plans share one compiled program. See `make_plan`."""

    mode: str
    batch: int
    stop: str
    tie: str
    max_nodes: int
    max_rows: int
    max_length: int
    chunk: int  # states evaluated at once
    slack: int  # children of a batch
    lookahead: bool
    prune_stale: bool
    record: int
    state: jax.ShapeDtypeStruct
    queue: Shape

    @property
    def table_bytes(self) -> int:
        rows = self.max_nodes + self.slack
        slots = 1 << max(4, (2 * rows - 1).bit_length())
        return 4 * (slots + rows * (num_words(self.state) + 4))

    @property
    def queue_bytes(self) -> int:
        rows = self.queue.sizes[0] // self.queue.width
        return 4 * (sum(self.queue.sizes) + 2 * rows + sum(self.queue.sizes[1:]))

    @property
    def bytes(self) -> int:
        """What the arrays of one search take, in bytes; the heuristic's own work comes on top."""
        return self.table_bytes + self.queue_bytes

    def describe(self) -> str:
        return (
            f"{self.bytes / 2**20:.1f} MiB: table {self.table_bytes / 2**20:.1f} MiB (max_nodes={self.max_nodes}),"
            f" queue {self.queue_bytes / 2**20:.1f} MiB (max_rows={self.max_rows} rows of {self.queue.width})"
        )


def make_plan(
    problem: Problem,
    state: jax.ShapeDtypeStruct,
    mode: Literal["astar", "astar_deferred", "qstar"],
    *,
    batch: int = 1,
    stop: Literal["first", "bound"] = "first",
    tie: Literal["lifo", "fifo"] = "lifo",
    max_nodes: int = 1 << 16,
    max_rows: int | None = None,
    max_length: int = 256,
    eval_chunk: int | None = None,
    lookahead: bool = False,
    prune_stale: bool = False,
    record: int = 0,
    max_bytes: int = 8 << 30,
) -> Plan:
    """The plan of a search over states like `state`; `.bytes` is its memory, nothing is allocated.

    Args:
      max_rows: rows ever written to OPEN, one per node opened or re-opened (default 1.25 max_nodes);
        in the edge modes a row has A entries.
      max_length: longest path that is returned.
      eval_chunk: states per call of the heuristic.
      lookahead: edge modes: generate the children of a node before pushing its edges and leave out
        those already stored at no larger cost. Costs A generated nodes a state.
      prune_stale: do not expand an entry whose node was reached more cheaply since.
      record: places to log popped entries in (see `driver.trace`).
      max_bytes: refuse to allocate more.

    >>> import jax.numpy as jnp
    >>> from qlab.search.domains.sliding import sliding
    >>> make_plan(sliding(4), jax.ShapeDtypeStruct((16,), jnp.uint8), "qstar", max_nodes=1 << 20).describe()
    '88.6 MiB: table 48.0 MiB (max_nodes=1048576), queue 40.6 MiB (max_rows=1310721 rows of 4)'
    """
    allowed = {
        "mode": (mode, ("astar", "astar_deferred", "qstar")),
        "stop": (stop, ("first", "bound")),
        "tie": (tie, ("lifo", "fifo")),
    }
    for name, (value, names) in allowed.items():
        if value not in names:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(names)}")
    if batch < 1 or max_nodes < 1:
        raise ValueError(f"batch={batch}, max_nodes={max_nodes}: both must be at least 1")
    if lookahead and mode == "astar":
        raise ValueError("lookahead=True needs an edge mode: A* already generates all children")
    slack = batch * problem.num_actions if mode == "astar" else batch
    width = 1 if mode == "astar" else problem.num_actions
    chunk = min(slack, eval_chunk or (256 if batch <= 32 else 4096))
    max_rows = max_nodes + max_nodes // 4 + 1 if max_rows is None else max_rows
    shape = layout(max_rows + chunk, width, batch)
    plan = Plan(
        mode=mode, batch=batch, stop=stop, tie=tie, max_nodes=max_nodes, max_rows=max_rows,
        max_length=max_length, chunk=chunk, slack=slack, lookahead=lookahead,
        prune_stale=prune_stale, record=record, state=state, queue=shape,
    )  # fmt: skip
    if shape.sizes[0] >= 2**31 or max_nodes + slack >= 2**29:
        raise ValueError(
            f"indices are 32 bits wide: lower max_nodes={max_nodes} or max_rows={max_rows}"
        )
    if plan.bytes > max_bytes:
        raise ValueError(
            f"this search would take {plan.describe()}, more than max_bytes={max_bytes}: "
            "lower max_nodes, max_rows or batch, or raise max_bytes"
        )
    return plan
