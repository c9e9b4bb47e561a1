"""A replay buffer as pure functions: a ring of fixed size inside the state.

Like everything in a state it is donated, vmapped over seeds and saved with the run. Its size is checked
before anything is allocated.
Letters: C = capacity, N = rows added or drawn at once.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError


class Replay(NamedTuple):
    """data: pytree with leading axis C. cursor: i32[], the next row. size: i32[], filled rows."""

    data: Any
    cursor: jax.Array
    size: jax.Array


def replay_bytes(row: Any, capacity: int) -> int:
    """Bytes of a buffer of `capacity` rows like `row` (arrays or shapes), without allocating it.

    >>> replay_bytes(jax.ShapeDtypeStruct((3,), jnp.float32), 10)
    120
    """
    return sum(
        capacity * int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(row)
    )


def free_bytes() -> int:
    """Memory left on the first device, else of the machine; 0 where neither tells."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def check_fits(num_bytes: int, key: str, share: float = 0.8, free: int | None = None) -> None:
    """Raises where `num_bytes` exceed `share` of the free memory.

    Args:
      key: the config key that makes it smaller. free: bytes; None asks the machine.
    Raises:
      UserError: one line with need, free memory and the key.
    """
    free = free_bytes() if free is None else free
    if free and num_bytes > share * free:
        raise UserError(
            f"replay needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free (at most "
            f"{share:.0%} of them may go to it); lower {key} or seeds"
        )


def replay_init(row: Any, capacity: int) -> Replay:
    """An empty buffer for rows shaped like `row`."""
    data = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    return Replay(data, jnp.int32(0), jnp.int32(0))


def replay_add(replay: Replay, rows: Any) -> Replay:
    """Writes N <= C rows (leading axis N) over the oldest."""
    n = jax.tree.leaves(rows)[0].shape[0]
    capacity = jax.tree.leaves(replay.data)[0].shape[0]
    if n > capacity:
        raise ValueError(f"{n} rows at once do not fit a replay of {capacity}; raise its capacity")
    at = (replay.cursor + jnp.arange(n)) % capacity
    data = jax.tree.map(lambda d, r: d.at[at].set(r), replay.data, rows)
    cursor = (replay.cursor + n) % capacity
    return Replay(data, cursor, jnp.minimum(replay.size + n, capacity))


def replay_sample(replay: Replay, key: jax.Array, n: int) -> Any:
    """n rows drawn uniformly with replacement from the filled part (which must not be empty)."""
    # Not randint: it draws twice; the bias is below 2^-24 a row.
    at = (jax.random.uniform(key, (n,)) * replay.size).astype(jnp.int32)
    return jax.tree.map(lambda d: d[at], replay.data)
