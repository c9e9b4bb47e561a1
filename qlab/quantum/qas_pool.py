"""Pools of random circuits, and circuits as graphs (Sun et al. 2024, the encoding).

A circuit of G slots is a graph of N = G + 2 nodes: START, the gates in order, END. An edge runs from a gate to the
next one on each of its qubits; START stands before the first, END behind the last; double edges count once. A
node's row is a one-hot over 13 types (START, the 11 gates, END) and n columns for the qubits it touches (START and
END: all). Angles are not encoded, and control and target look the same. A circuit without a gate is START -> END.
mask "signed" writes -1 on the control (of CNOT) and +1 on other touched qubits, and counts shared qubits on the
edges (a later version of the paper, second-hand); "none" drops the qubit columns (ablation).
Empty slots are nodes without row and edge; `live` masks them. Letters: G, N as above, n = qubits, P = circuits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.quantum import circuit_spec as cs
from qlab.quantum.circuit_spec import CircuitSpec

NUM_TYPES = 13
START, END = 0, 12  # a gate's type is its code, 1..11
MASKS = ("unsigned", "signed", "none")
_BATCH = 4096  # circuits drawn at once
_MAX_DRAWS = 500  # batches before a pool is given up


class PoolSpec(NamedTuple):
    """What is drawn: gates and depths lie in closed ranges (a fixed number of gates: twice the same).

    gate_set: names of circuit_spec.GATES. size: P.
    """

    num_qubits: int = 4
    num_gates: tuple[int, int] = (10, 10)
    depth: tuple[int, int] = (0, 5)
    size: int = 5000
    gate_set: tuple[str, ...] = cs.GATES[1:]


class Graph(NamedTuple):
    """ops f[N, 13 + n], adj f[N, N] (strictly upper triangular), live f[N]: 1 for nodes that exist."""

    ops: jax.Array
    adj: jax.Array
    live: jax.Array


def touches(spec: CircuitSpec, num_qubits: int) -> jax.Array:
    """bool[..., G, n]: the qubits each gate acts on."""
    q = jnp.arange(num_qubits)
    gate = jnp.asarray(spec.gate)[..., None]
    on = (jnp.asarray(spec.q0)[..., None] == q) | (jnp.asarray(spec.q1)[..., None] == q)
    return on & (gate != cs.NOOP)


def depth(spec: CircuitSpec, num_qubits: int) -> jax.Array:
    """i32[...]: the longest path of gates, by the usual count of layers.

    >>> int(depth(cs.circuit_spec([("H", [0]), ("X", [1]), ("CNOT", [0, 1])]), 2))
    2
    """
    on = jnp.moveaxis(touches(spec, num_qubits), -2, 0)

    def place(level, on):
        top = jnp.max(jnp.where(on, level, 0), -1, keepdims=True) + 1
        return jnp.where(on, top, level), None

    start = jnp.zeros(on.shape[1:], jnp.int32)
    return jax.lax.scan(place, start, on)[0].max(-1)


@functools.partial(jax.jit, static_argnames="pool")
def _draw(key: jax.Array, pool: PoolSpec) -> tuple[CircuitSpec, jax.Array]:
    """A batch of circuits before rejection, and which of them are deep enough and not too deep."""
    n, size, batch = pool.num_qubits, pool.num_gates[1], _BATCH
    u = jax.random.uniform(key, (batch, size, 7), dtype=jnp.float32)  # one draw: quick to compile

    def below(k, num):  # i32, uniform in 0..num - 1
        return jnp.minimum((u[..., k] * num).astype(jnp.int32), num - 1)

    codes = jnp.array([cs.GATES.index(g) for g in pool.gate_set], jnp.int32)
    gate, q0 = codes[below(0, len(codes))], below(1, n)
    # never 0: another qubit
    hop = jnp.where(gate == cs.CNOT, 1, 1 + below(2, max(n - 1, 1)))
    two = jnp.asarray(cs.NUM_QUBITS)[gate] == 2
    angle = 2 * jnp.pi * u[..., 3:6]
    count = pool.num_gates[0] + below(6, size + 1 - pool.num_gates[0])[:, :1]
    used = jnp.arange(size) < count
    spec = CircuitSpec(
        jnp.where(used, gate, 0),
        jnp.where(used, q0, 0),
        jnp.where(used, jnp.where(two, (q0 + hop) % n, q0), 0),
        jnp.where(used[..., None], angle, 0),
    )
    deep = depth(spec, n)
    return spec, (deep >= pool.depth[0]) & (deep <= pool.depth[1])


def check_pool(pool: PoolSpec) -> PoolSpec:
    """Raises: UserError: a range the wrong way round, an unknown gate, two-qubit gates on one qubit."""
    for name in pool.gate_set:
        if name not in cs.GATES[1:]:
            raise UserError(f"gate_set: {name!r} is not known{nearest(name, cs.GATES[1:])}")
    if not pool.gate_set or pool.size < 1:
        raise UserError("a pool needs at least one circuit and one kind of gate")
    wide = [g for g in pool.gate_set if cs.NUM_QUBITS[cs.GATES.index(g)] == 2]
    if not 1 <= pool.num_qubits <= 12 or (pool.num_qubits == 1 and wide):
        raise UserError(f"{pool.num_qubits} qubits with gates {wide or 'of one qubit'}; use 2..12 qubits "
                        "(1 without two-qubit gates)")  # fmt: skip
    for name, least in (("num_gates", 1), ("depth", 0)):
        low, high = getattr(pool, name)
        if not least <= low <= high:
            raise UserError(f"{name}={(low, high)}; give (least, most), {least} <= least <= most")
    return pool


def sample_circuits(key: jax.Array, pool: PoolSpec) -> CircuitSpec:
    """P different circuits (NumPy, on the host): gates, qubits and angles uniform, depths outside the range rejected.

    Two circuits are the same if gates and qubits agree slot by slot; angles do not count. CNOT's target is the
    next qubit (mod n), the partner of CZ and SWAP any other. Angles are U(0, 2 pi).

    Raises:
      UserError: the pool cannot be filled (too few different circuits, or hardly any of an allowed depth).
    """
    check_pool(pool)
    shape = pool._replace(size=0)  # one program for pools of any size
    parts: list[Any] = []
    seen: set[bytes] = set()
    for i in range(_MAX_DRAWS):
        spec, ok = jax.device_get(_draw(jax.random.fold_in(key, i), shape))
        rows = np.stack(spec[:3], -1)[ok].astype(np.int8)
        keep = []
        for j, row in enumerate(rows):
            name = row.tobytes()
            if name not in seen:
                seen.add(name)
                keep.append(j)
            if len(seen) == pool.size:
                break
        parts.append([x[ok][keep] for x in spec])
        if len(seen) == pool.size:
            return CircuitSpec(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    raise UserError(
        f"only {len(seen)} of {pool.size} different circuits of {pool.num_gates} gates and depth "
        f"{pool.depth} in {_MAX_DRAWS * _BATCH} draws; widen depth, or ask for a smaller pool"
    )


# ---- graphs -------------------------------------------------------------------------------------


def row_width(num_qubits: int, mask: str = "unsigned") -> int:
    """Columns of a node's row."""
    if mask not in MASKS:
        raise UserError(f"mask={mask!r}{nearest(mask, MASKS)}")
    return NUM_TYPES + (0 if mask == "none" else num_qubits)


def encode_graph(spec: CircuitSpec, num_qubits: int, mask: str = "unsigned") -> Graph:
    """The graph of one circuit; vmap for many. See the module for what the numbers are.

    >>> g = encode_graph(cs.circuit_spec([("H", [0]), ("CNOT", [0, 1])]), 2)
    >>> [(int(i), int(j)) for i, j in jnp.argwhere(g.adj)]
    [(0, 1), (0, 2), (1, 2), (2, 3)]
    """
    width = row_width(num_qubits, mask)
    gate = jnp.asarray(spec.gate, jnp.int32)
    size = gate.shape[-1]
    on = touches(spec, num_qubits).astype(jnp.float32)  # [G, n]
    live = jnp.pad((gate != cs.NOOP).astype(jnp.float32), 1, constant_values=1.0)
    kind = jnp.pad(gate, 1).at[-1].set(END)
    ops = jax.nn.one_hot(kind, NUM_TYPES) * live[:, None]
    column = on
    if mask == "signed":
        control = jax.nn.one_hot(jnp.asarray(spec.q0), num_qubits) * (gate == cs.CNOT)[:, None]
        column = on - 2 * control
    if width > NUM_TYPES:
        ops = jnp.concatenate([ops, jnp.pad(column, ((1, 1), (0, 0)), constant_values=1.0)], 1)

    def link(last, xs):  # last f[n, N]: one-hot of the last node on each qubit
        on, node = xs
        edges = on @ last
        here = jax.nn.one_hot(node, size + 2)
        return jnp.where(on[:, None] > 0, here, last), edges

    start = jnp.tile(jax.nn.one_hot(0, size + 2), (num_qubits, 1))
    last, rows = jax.lax.scan(link, start, (on, jnp.arange(1, size + 1)))
    to_end = jnp.where(on.max(0) > 0, 1.0, 0.0) @ last
    to_end = jnp.where(on.sum() > 0, to_end, start[0])
    into = jnp.concatenate([jnp.zeros((1, size + 2)), rows, to_end[None]])  # [to, from]
    return Graph(ops, into.T if mask == "signed" else jnp.minimum(into.T, 1.0), live)


@functools.partial(jax.jit, static_argnames=("num_qubits", "mask", "terminals"))
def encode_pool(
    specs: CircuitSpec, num_qubits: int, mask: str = "unsigned", terminals: bool = True
) -> Graph:
    """The graphs of a batch. terminals=False cuts START and END off (ablation)."""
    g = jax.vmap(lambda s: encode_graph(s, num_qubits, mask))(specs)
    if terminals:
        return g
    inner = jnp.ones(g.live.shape[-1]).at[jnp.array([0, -1])].set(0.0)
    return g._replace(adj=g.adj * inner[:, None] * inner)


def flat_rows(g: Graph) -> jax.Array:
    """f32[P, N (13 + n) + N (N - 1) / 2]: the encoding itself, rows and upper triangle: the raw embedding."""
    i, j = np.triu_indices(g.adj.shape[-1], 1)
    return jnp.concatenate([g.ops.reshape(g.ops.shape[0], -1), g.adj[:, i, j]], 1)


def mean_rows(g: Graph) -> jax.Array:
    """f32[P, 13 + n]: how often each gate and each qubit occurs, over the nodes; knows no edge and no order.

    >>> g = encode_graph(cs.circuit_spec([("H", [0]), ("CNOT", [0, 1])]), 2)
    >>> (4 * mean_rows(jax.tree.map(lambda x: x[None], g)))[0, 13:].tolist()
    [4.0, 3.0]
    """
    return (g.ops * g.live[..., None]).sum(-2) / g.live.sum(-1, keepdims=True)


def is_valid(types: jax.Array) -> jax.Array:
    """bool[...]: types i[..., N] starts with START, ends with END, and has gates between."""
    inner = types[..., 1:-1]
    gates = ((inner != START) & (inner != END)).all(-1)
    return (types[..., 0] == START) & (types[..., -1] == END) & gates


def decode_graph(ops: Any, adj: Any, mask: str = "unsigned") -> CircuitSpec:
    """The circuit of a graph without angles (zeros), on the host; inverse of `encode_graph` up to control and target.

    Of an unsigned mask a CNOT from the higher to the lower qubit is read as the reverse, unless only
    that is (q, q + 1 mod n). Empty nodes are empty slots. `adj` is checked against the circuit.

    Raises:
      UserError: not the graph of a circuit: types, number of touched qubits, or edges.
    """
    ops, adj = np.asarray(ops), np.asarray(adj)
    if mask == "none":
        raise UserError("decode_graph: a graph without qubit columns is not one circuit's")
    n = ops.shape[-1] - NUM_TYPES
    kinds, columns = ops[:, :NUM_TYPES], ops[:, NUM_TYPES:]
    if not (kinds[0, START] == 1 and kinds[-1, END] == 1):
        raise UserError("decode_graph: the first node must be START and the last END")
    rows: list[Any] = []
    for node, (kind, column) in enumerate(zip(kinds[1:-1], columns[1:-1], strict=True), 1):
        if not kind.any():
            rows.append((cs.NOOP, 0, 0))
            continue
        code = int(kind.argmax())
        qubits = np.flatnonzero(column).tolist()
        if code in (START, END) or len(qubits) != cs.NUM_QUBITS[code]:
            name = "a terminal" if code in (START, END) else cs.GATES[code]
            raise UserError(f"decode_graph: node {node} is {name} on qubits {qubits}")
        first, second = qubits[0], qubits[-1]
        swap = column[first] > 0 > column[second] if mask == "signed" else (first + 1) % n != second
        if code == cs.CNOT and swap:
            first, second = second, first
        rows.append((code, first, second))
    gate, q0, q1 = np.array(rows, np.int32).reshape(-1, 3).T
    spec = CircuitSpec(gate, q0, q1, np.zeros((len(rows), 3), np.float32))
    again = encode_pool(jax.tree.map(lambda x: x[None], spec), n, mask)
    if not np.array_equal(again.adj[0], adj):
        raise UserError("decode_graph: the edges are not those of the circuit the rows give")
    return spec
