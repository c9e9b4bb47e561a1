"""QAOA layers on data: RX(a) on every qubit, then p times a ZZ phase on a graph and an RX mixer, read as <Z_i>.

    V(a) = prod_i RX_i(a_i);  U_C(gamma) = exp(-i gamma sum_{ij} w_ij Z_i Z_j);  U_M(beta) = prod_i RX_i(2 beta)
    q_i = <0| V^+ ... U_M^+ Z_i U_M U_C ... V |0>,  i = 1..n

In columns: zz gates of angle 2 gamma w_ij, rx gates of angle 2 beta. The mixer is last: a phase before a measurement
of Z does nothing. With p = 0 or gamma = 0 this is q_i = cos(a_i + 2 sum beta), a cosine, so the phase is the only
part a classical layer lacks. Also the MaxCut energy of the textbook circuit, which starts in |+>.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.quantum import columns as col

Edges = tuple[tuple[int, int], ...]
GRAPHS = ("ring", "line", "complete")


def graph(kind: str, n: int) -> Edges:
    """The edges of a named graph on n nodes (the ring of two is one edge).

    >>> graph("ring", 3)
    ((0, 1), (1, 2), (2, 0))
    """
    if kind not in GRAPHS:
        raise UserError(f"edges {kind!r} are unknown{nearest(kind, GRAPHS)}")
    if kind == "complete":
        return tuple(itertools.combinations(range(n), 2))
    line = tuple((i, i + 1) for i in range(n - 1))
    return line + ((n - 1, 0),) if kind == "ring" and n > 2 else line


def check_edges(edges: Edges, n: int) -> None:
    """One line about the first pair that is no edge on n nodes, or that comes twice."""
    seen = set()
    for i, j in edges:
        if not (0 <= i < n and 0 <= j < n) or i == j or frozenset((i, j)) in seen:
            raise UserError(f"edge {(i, j)}; expected distinct pairs of different nodes 0..{n - 1}")
        seen.add(frozenset((i, j)))


def zz_diag(edges: Edges, weights: jax.Array | None, n: int) -> jax.Array:
    """f[2^n]: the diagonal of sum_{ij} w_ij Z_i Z_j (weights None: all 1).

    >>> zz_diag(((0, 1),), None, 2).tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    check_edges(edges, n)
    w = jnp.ones(len(edges)) if weights is None else jnp.asarray(weights)
    return w @ jnp.asarray(col.zz_signs(edges, n), w.dtype) if edges else jnp.zeros(2**n)


def qaoa_columns(n: int, p: int, edges: Edges) -> col.Columns:
    """RX(a), then p times [zz on the edges, rx on all]."""
    layer = (col.Column("zz", edges), col.local("rx", n))
    return (col.local("rx", n), *(layer * p))


def qaoa_angles(
    a: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    edges: Edges,
    weights: tuple[float, ...] | None = None,
) -> jax.Array:
    """phi f[n + p (|E| + n)] of `qaoa_columns`; see `qaoa_latent`."""
    p, n = gamma.shape[0], a.shape[0]
    w = jnp.ones(len(edges)) if weights is None else jnp.asarray(weights)
    gamma, beta = (t if t.ndim == 2 else t[:, None] for t in (gamma, beta))
    phase = jnp.broadcast_to(gamma, (p, len(edges))) * (2 * w.astype(a.dtype))
    mixer = jnp.broadcast_to(beta, (p, n)) * 2
    return jnp.concatenate([a, jnp.concatenate([phase, mixer], 1).reshape(-1)])


def qaoa_latent(
    a: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    edges: Edges,
    weights: tuple[float, ...] | None = None,
) -> jax.Array:
    """q f[n] of the circuit above; jit, vmap, grad.

    Args:
      a: f[n] data angles. gamma: f[p], or f[p, |E|] with one a gate. beta: f[p], or f[p, n].
      edges: pairs of qubits. weights: one a pair, None = 1.

    >>> qaoa_latent(jnp.zeros(3), jnp.array([0.3]), jnp.array([0.0]), graph("ring", 3)).round(6).tolist()
    [1.0, 1.0, 1.0]
    """
    n = a.shape[0]
    check_edges(edges, n)
    if gamma.shape[:1] != beta.shape[:1]:
        raise UserError(f"gamma {gamma.shape} and beta {beta.shape}; both start with the p layers")
    columns = qaoa_columns(n, gamma.shape[0], edges)
    return col.mean_z(col.probabilities(columns, n, qaoa_angles(a, gamma, beta, edges, weights)), n)


def qaoa_maxcut_energy(gamma: jax.Array, beta: jax.Array, edges: Edges, n: int) -> jax.Array:
    """<C>, C = sum_{ij} (1 - Z_i Z_j) / 2, of the textbook circuit: |+>, then exp(-i gamma C), exp(-i beta sum X).

    Args:
      gamma, beta: f[p].

    >>> ring = graph("ring", 4)  # p = 1 reaches 3/4 of the cut of 4
    >>> round(float(qaoa_maxcut_energy(jnp.array([jnp.pi / 4]), jnp.array([jnp.pi / 8]), ring, 4)), 4)
    3.0
    """
    cut = (len(edges) - zz_diag(edges, None, n)) / 2
    # exp(-i gamma C) is, up to a phase, a zz gate of angle -gamma on every edge; |+> needs no data angles
    columns = (col.local("h", n), *qaoa_columns(n, gamma.shape[0], edges)[1:])
    phi = qaoa_angles(jnp.zeros(n, gamma.dtype), -gamma / 2, beta, edges)[n:]
    return cut.astype(phi.dtype) @ col.probabilities(columns, n, phi)
