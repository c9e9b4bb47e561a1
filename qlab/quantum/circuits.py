"""Latent circuits by name: QAOA in three forms and the circuit designs it is compared with; and PennyLane's own.

Every circuit takes n data angles a and gives n values <Z_i>. Depth p; E edges.
    qaoa_tied     RX(a), p x [zz, RX]       one gamma and one beta a layer: the textbook
    qaoa_untied   the same                  one angle a gate
    qaoa_embed    p x [RX(a), zz, RY], RX(a): PennyLane's QAOAEmbedding with a Y field (a returns in every layer)
    cosine        RX(a): q_i = cos a_i, no quantum part (QAOA with p = 0)
    basic         RX(a), p x [RX, CNOT ring]                     (BasicEntanglerLayers)
    ry_cz         RX(a), p x [CZ on the edges, RY]               (hardware-efficient; RY last, or it would be wasted)
    strong        RX(a), p x [Rot, CNOTs of growing range]       (StronglyEntanglingLayers)
    iqp           p x [H, RZ(a), zz(a_i a_j), RX]                (IQPEmbedding, then a trained RX: without it <Z> = 0)
Ours: all but qaoa_embed, basic and strong, whose layers are PennyLane's. Rivals with tied=True share each angle of a
layer over the qubits. `match_depth` gives a rival about as many parameters as QAOA has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.quantum import columns as col
from qlab.quantum import qaoa
from qlab.quantum.qml import pennylane

Params = dict[str, jax.Array]


class Circuit(NamedTuple):
    """n, p: size. columns: the gates. shapes: of the trained parameters. angles: (a f[n], params) -> phi f[G]."""

    name: str
    n: int
    p: int
    edges: qaoa.Edges
    columns: col.Columns
    shapes: dict[str, tuple[int, ...]]
    angles: Callable[[jax.Array, Params], jax.Array]

    @property
    def num_params(self) -> int:
        return sum(math.prod(s) for s in self.shapes.values())

    def init(self, key: jax.Array, scale: float = float(jnp.pi)) -> Params:
        """Angles uniform in [-scale, scale]."""
        keys = jax.random.split(key, len(self.shapes) + 1)
        return {
            name: jax.random.uniform(k, shape, minval=-scale, maxval=scale)
            for k, (name, shape) in zip(keys, self.shapes.items(), strict=False)
        }


def _qaoa(name: str, n: int, p: int, edges: qaoa.Edges, tied: bool) -> Circuit:
    shapes = {"gamma": (p,), "beta": (p,)} if tied else {"gamma": (p, len(edges)), "beta": (p, n)}

    def angles(a, w):
        return qaoa.qaoa_angles(a, w["gamma"], w["beta"], edges)

    return Circuit(name, n, p, edges, qaoa.qaoa_columns(n, p, edges), shapes if p else {}, angles)


def qaoa_tied(n: int, p: int, edges: qaoa.Edges, tied: bool = True) -> Circuit:
    return _qaoa("qaoa_tied", n, p, edges, True)


def qaoa_untied(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    return _qaoa("qaoa_untied", n, p, edges, False)


def cosine(n: int, p: int, edges: qaoa.Edges, tied: bool = True) -> Circuit:
    columns = (col.local("rx", n),)
    return Circuit("cosine", n, 0, edges, columns, {}, lambda a, w: a)


def qaoa_embed(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    layer = (col.local("rx", n), col.Column("zz", edges), col.local("ry", n))
    shapes = {"zz": (p, 1 if tied else len(edges)), "ry": (p, 1 if tied else n)}

    def angles(a, w):
        zz, ry = jnp.broadcast_to(w["zz"], (p, len(edges))), jnp.broadcast_to(w["ry"], (p, n))
        body = jnp.concatenate([jnp.broadcast_to(a, (p, n)), zz, ry], 1)
        return jnp.concatenate([body.reshape(-1), a])

    return Circuit("qaoa_embed", n, p, edges, layer * p + (col.local("rx", n),), shapes, angles)


def _cx_pairs(n: int, reach: int) -> tuple[tuple[int, int], ...]:
    """CNOTs i -> i + reach (mod n)."""
    return tuple((i, (i + reach) % n) for i in range(n))


def _layered(name: str, n: int, p: int, edges: qaoa.Edges, tied: bool, kind: str, layer) -> Circuit:
    """RX(a), then p times a layer whose only angles are those of its rotations of one kind."""

    def angles(a, w):
        return jnp.concatenate([a, jnp.broadcast_to(w[kind], (p, n)).reshape(-1)])

    shapes = {kind: (p, 1 if tied else n)}
    return Circuit(name, n, p, edges, (col.local("rx", n), *(layer * p)), shapes, angles)


def basic(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    ring = {1: (), 2: ((0, 1),)}.get(n, _cx_pairs(n, 1))
    layer = (col.local("rx", n), col.Column("cx", ring))
    return _layered("basic", n, p, edges, tied, "rx", layer)


def ry_cz(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    layer = (col.Column("cz", edges), col.local("ry", n))
    return _layered("ry_cz", n, p, edges, tied, "ry", layer)


def strong(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    columns = [col.local("rx", n)]
    for layer in range(p):
        columns += [col.local("rz", n), col.local("ry", n), col.local("rz", n)]
        if n > 1:
            columns.append(col.Column("cx", _cx_pairs(n, layer % (n - 1) + 1)))

    def angles(a, w):  # rot f[p, n, 3]: Rot(x, y, z) = RZ(z) RY(y) RZ(x)
        rot = jnp.broadcast_to(w["rot"], (p, n, 3))
        return jnp.concatenate([a, rot.transpose(0, 2, 1).reshape(-1)])

    shapes = {"rot": (p, 1 if tied else n, 3)}
    return Circuit("strong", n, p, edges, tuple(columns), shapes, angles)


def iqp(n: int, p: int, edges: qaoa.Edges, tied: bool = False) -> Circuit:
    layer = (col.local("h", n), col.local("rz", n), col.Column("zz", edges), col.local("rx", n))
    first, second = (jnp.array([e[k] for e in edges], jnp.int32) for k in (0, 1))

    def angles(a, w):
        data = jnp.broadcast_to(jnp.concatenate([a, a[first] * a[second]]), (p, n + len(edges)))
        return jnp.concatenate([data, jnp.broadcast_to(w["rx"], (p, n))], 1).reshape(-1)

    shapes = {"rx": (p, 1 if tied else n)}
    return Circuit("iqp", n, p, edges, layer * p, shapes, angles)


CIRCUITS: dict[str, Callable[..., Circuit]] = {
    "qaoa_tied": qaoa_tied, "qaoa_untied": qaoa_untied, "qaoa_embed": qaoa_embed, "cosine": cosine,
    "basic": basic, "ry_cz": ry_cz, "strong": strong, "iqp": iqp,
}  # fmt: skip
RIVALS = ("basic", "ry_cz", "strong", "iqp")


def circuit(name: str, n: int, p: int, edges: str = "ring", *, tied: bool = False) -> Circuit:
    """The named circuit on n qubits, p layers deep, on a named graph.

    Args:
      tied: of the rivals and qaoa_embed: one angle a layer and kind instead of one a gate.
    Raises:
      UserError: an unknown name, n outside 2..16, or p below what the circuit needs.

    >>> c = circuit("qaoa_tied", 4, 2)
    >>> c.num_params, col.num_gates(c.columns)
    (4, 20)
    """
    if name not in CIRCUITS:
        raise UserError(f"no circuit is called {name!r}{nearest(name, tuple(CIRCUITS))}")
    if not 2 <= n <= 16:
        raise UserError(f"{n} qubits; a latent circuit takes 2 to 16 (2^n amplitudes a sample)")
    least = 0 if name in ("qaoa_tied", "qaoa_untied", "cosine") else 1
    if p < least:
        raise UserError(f"{name} with p={p}; give at least {least} layer{'s' * (least != 1)}")
    return CIRCUITS[name](n, p, qaoa.graph(edges, n), tied=tied)


def match_depth(name: str, n: int, p: int, edges: str = "ring", *, tied: bool = True) -> int:
    """The least depth at which a rival has as many parameters as QAOA of depth p, both tied or both not.

    >>> [match_depth(r, 4, 3) for r in RIVALS]
    [6, 6, 2, 6]
    """
    target = circuit("qaoa_tied" if tied else "qaoa_untied", n, p, edges).num_params
    per_layer = circuit(name, n, 1, edges, tied=tied).num_params
    return max(1, -(-target // per_layer))


# ---- PennyLane: the same circuits from its own templates -----------------------------------------


def _template(qml: Any, c: Circuit, a: jax.Array, w: Params) -> None:
    """Queues circuit c the way PennyLane spells it."""
    wires = range(c.n)
    if c.name == "qaoa_embed":
        weights = jnp.concatenate(
            [jnp.broadcast_to(w["zz"], (c.p, len(c.edges))), jnp.broadcast_to(w["ry"], (c.p, c.n))],
            1,
        )
        qml.QAOAEmbedding(features=a, weights=weights, wires=wires, local_field="Y")
        return
    if c.name == "iqp":
        for layer in range(c.p):
            qml.IQPEmbedding(a, wires=wires, n_repeats=1, pattern=[list(e) for e in c.edges])
            for q in wires:
                qml.RX(jnp.broadcast_to(w["rx"], (c.p, c.n))[layer, q], wires=q)
        return
    qml.AngleEmbedding(a, wires=wires, rotation="X")
    if c.name == "basic":
        qml.BasicEntanglerLayers(
            jnp.broadcast_to(w["rx"], (c.p, c.n)), wires=wires, rotation=qml.RX
        )
    elif c.name == "strong":
        qml.StronglyEntanglingLayers(jnp.broadcast_to(w["rot"], (c.p, c.n, 3)), wires=wires)
    elif c.name == "ry_cz":
        for layer in range(c.p):
            for i, j in c.edges:
                qml.CZ(wires=(i, j))
            for q in wires:
                qml.RY(jnp.broadcast_to(w["ry"], (c.p, c.n))[layer, q], wires=q)
    elif c.p:
        gamma = jnp.broadcast_to(w["gamma"].reshape(c.p, -1), (c.p, len(c.edges)))
        beta = jnp.broadcast_to(w["beta"].reshape(c.p, -1), (c.p, c.n))
        for layer in range(c.p):
            for e, pair in enumerate(c.edges):
                qml.IsingZZ(2 * gamma[layer, e], wires=pair)
            for q in wires:
                qml.RX(2 * beta[layer, q], wires=q)


@functools.cache
def qnode(
    name: str,
    n: int,
    p: int,
    edges: str = "ring",
    *,
    tied: bool = False,
    diff_method: str = "backprop",
    depol: float = 0.0,
) -> Callable[[jax.Array, Params], jax.Array]:
    """(a f[n], params) -> q f[n] as a PennyLane QNode, built once: the reference of every circuit here.

    Args:
      diff_method: of PennyLane, e.g. "backprop" or "parameter-shift".
      depol: probability of a Pauli error after every gate (default.mixed then, "backprop" only).
    """
    qml = pennylane()
    c = circuit(name, n, p, edges, tied=tied)
    device = qml.device("default.mixed" if depol else "default.qubit", wires=n)

    @qml.qnode(device, interface="jax", diff_method=diff_method)
    def run(a, w):
        if depol:
            _noisy(qml, c, a, w, depol)
        else:
            _template(qml, c, a, w)
        return [qml.expval(qml.PauliZ(q)) for q in range(n)]

    return lambda a, w: jnp.stack(run(a, w))


def _noisy(qml: Any, c: Circuit, a: jax.Array, w: Params, depol: float) -> None:
    """The template unrolled to gates, each followed by a depolarizing channel on its wires."""
    with qml.QueuingManager.stop_recording(), qml.queuing.AnnotatedQueue() as q:
        _template(qml, c, a, w)
    tape = qml.tape.QuantumScript.from_queue(q)
    kinds = ("RX", "RY", "RZ", "Rot", "Hadamard", "IsingZZ", "MultiRZ", "CNOT", "CZ")
    (flat,), _ = qml.transforms.decompose(tape, stopping_condition=lambda op: op.name in kinds)
    from qlab.quantum.noise import depolarizing_kraus, p_to_lam

    for op in flat.operations:
        parts = [op]
        if op.name == "Rot":  # three gates on a device, and in `columns`
            x, y, z = op.parameters
            with qml.QueuingManager.stop_recording():
                parts = [qml.RZ(x, op.wires), qml.RY(y, op.wires), qml.RZ(z, op.wires)]
        for part in parts:
            qml.apply(part)
            k = len(part.wires)
            qml.QubitChannel(
                list(depolarizing_kraus(jnp.asarray(p_to_lam(depol, k)), k)), wires=part.wires
            )
