"""Words over a gate set: exact enumeration, shortest words by brute force, universality, OpenQASM.

A word is i32[L], its first gate the leftmost factor: U = g_1 g_2 ... g_L, so g_1 acts last in time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qlab.quantum.gatesets import (
    GateSet,
    _times,
    adjoint,
    canonical,
    compose,
    identity,
    matrix,
    product,
    word_matrix,
)


class Enumeration(NamedTuple):
    """All distinct elements by shortest length, in order of length.

    Attributes:
      elements: i32[E, N, N, 4]. mats: c128[E, N, N]. words: i8[E, L], padded with -1. lengths: i32[E].
      complete: whether no longer word gives a new element (the group is finite).
    """

    elements: np.ndarray
    mats: np.ndarray
    words: np.ndarray
    lengths: np.ndarray
    complete: bool


def names(x: np.ndarray) -> np.ndarray:
    """One fixed-size byte string an element: V[E]; equal if and only if the coefficients are."""
    flat = np.ascontiguousarray(x.reshape(len(x), -1), np.int32)
    return flat.view(np.dtype((np.void, 4 * flat.shape[1])))[:, 0]


def enumerate_unitaries(gates: GateSet, max_len: int, max_elements: int = 2_000_000) -> Enumeration:
    """Every element of length <= max_len once, with a shortest word: breadth-first, compared exactly.

    Ends early where the group is finite, or after the length that passes max_elements.

    >>> from qlab.quantum.gatesets import gate_set
    >>> np.bincount(enumerate_unitaries(gate_set("v_free"), 4).lengths).tolist()
    [1, 3, 9, 27, 81]
    """
    step, a = compose(gates), len(gates.labels)
    layer, words = identity(gates)[None], np.full((1, max_len), -1, np.int8)
    seen = np.sort(names(layer))
    layers, all_words, complete = [layer], [words], False
    for length in range(max_len):
        children = np.concatenate([step(layer, i) for i in range(a)])
        grown = np.repeat(words[None], a, 0)
        grown[:, :, length] = np.arange(a)[:, None]
        key, first = np.unique(names(children), return_index=True)
        at = np.minimum(np.searchsorted(seen, key), len(seen) - 1)
        fresh = seen[at] != key
        order = np.sort(first[fresh])
        layer, words = children[order], grown.reshape(-1, max_len)[order]
        if not len(layer):
            complete = True
            break
        seen = np.sort(np.concatenate([seen, key[fresh]]))
        layers.append(layer)
        all_words.append(words)
        if len(seen) > max_elements:
            break
    elements = np.concatenate(layers)
    lengths = np.repeat(np.arange(len(layers)), [len(x) for x in layers]).astype(np.int32)
    return Enumeration(elements, matrix(elements), np.concatenate(all_words), lengths, complete)


def shortest_within(table: Enumeration, targets: np.ndarray, eps: float, chunk: int = 64):
    """Length of the shortest word within eps of each target c[T, N, N]: f64[T] (nan: none listed), and its row."""
    n = targets.shape[-1]
    flat = table.mats.reshape(len(table.mats), -1).conj()
    best = np.full(len(targets), -1)
    for i in range(0, len(targets), chunk):
        trace = np.abs(targets[i : i + chunk].reshape(-1, n * n) @ flat.T)
        close = trace > n * (1 - eps * eps)
        best[i : i + chunk] = np.where(close.any(1), close.argmax(1), -1)
    return np.where(best >= 0, table.lengths[best], np.nan), best


def listed_words(table: Enumeration, targets: np.ndarray, eps: float):
    """([a shortest word within eps of each target, or None], size of the table)."""
    _, row = shortest_within(table, targets, eps)
    found = [tuple(table.words[r][table.words[r] >= 0].tolist()) if r >= 0 else None for r in row]
    return found, len(table.mats)


def word_distance(word, gates: GateSet, u: np.ndarray) -> float:
    """hs_distance of a word's matrix to U c128[N, N], in double precision and without cancellation."""
    v = word_matrix(word, gates)
    trace = np.sum(v.conj() * u)
    phase = trace / abs(trace) if abs(trace) > 1e-12 else 1.0
    return float(np.linalg.norm(u - phase * v) / np.sqrt(2 * gates.dim))


def shortest_exact(table: Enumeration, gates: GateSet, targets: np.ndarray) -> np.ndarray:
    """Exact shortest lengths of elements i[T, N, N, 4], meeting in the middle: f64[T], nan beyond twice the table.

    A word of length i + j is an element of length i times one of length j, both in the table.
    """
    key = names(table.elements)
    order = np.argsort(key)
    key, lengths = key[order], table.lengths[order]
    left = adjoint(table.elements.astype(np.int64))
    out = np.full(len(targets), np.nan)
    layers = [left[table.lengths == i] for i in range(int(table.lengths[-1]) + 1)]
    for t, target in enumerate(targets):
        # The first length i with a hit is enough: of a shortest word, all but its last letters (as many as the
        # table is deep) are a left part, so no smaller i has one and this i has the best.
        for i, layer in enumerate(layers):
            rest = product(layer, _times(target)[None])
            # The adjoint brings at most as many factors as the word has letters, mostly none.
            for _ in range(i + 1):
                rest, before = canonical(rest, gates), rest
                if np.array_equal(rest, before):
                    break
            found = names(rest)
            at = np.minimum(np.searchsorted(key, found), len(key) - 1)
            hit = key[at] == found
            if hit.any():
                out[t] = i + lengths[at][hit].min()
                break
    return out


def _comes_near(mats: np.ndarray, powers: int = 200) -> bool:
    """Whether a power of a unitary c128[E, N, N] has 0 < 2 N d^2 < 1 / 2 to the identity."""
    angles = np.angle(np.linalg.eigvals(mats))[:, None] * np.arange(1, powers)[:, None]  # [E, k, N]
    d2 = 1 - np.abs(np.exp(1j * angles).mean(-1))
    return bool(((d2 > 1e-9) & (d2 < 1 / (4 * mats.shape[-1]))).any())


def why_not_universal(gates: GateSet, max_elements: int = 20_000) -> str:
    """ "" if the set generates a dense subgroup of PU(N), else one line that says why not.

    Dense if and only if the adjoint representation is irreducible and the group infinite (Sawicki and Karnas
    2017). Irreducible: only multiples of the identity commute with all Pauli-transfer matrices' lower blocks.
    Infinite: some power of a short word is near the identity (2 N d^2 < 1/2) and is not it. An inverse-free
    set generates the same closure as its group.
    """
    dim = gates.dim
    g = gates.matrices
    ad = np.einsum("aij,akl->aikjl", g, g.conj()).reshape(len(g), dim * dim, dim * dim)
    # Operators on C^(N^2) that commute with U x conj(U): two dimensions (trivial + adjoint) if irreducible.
    eye = np.eye(dim * dim)
    if dim <= 4:
        gram = sum((m := np.kron(x, eye) - np.kron(eye, x.T)).conj().T @ m for x in ad)
        commutant = int((np.linalg.eigvalsh(gram) < 1e-9).sum())
        if commutant > 2:
            return (
                f"gate set {gates.name!r} is not universal: {', '.join(gates.labels)} keep a direction of "
                "the operator space fixed or leave qubits unentangled; add gates that mix them, e.g. H or CX01"
            )
    table = enumerate_unitaries(gates, 60, 200)
    if _comes_near(table.mats):
        return ""
    table = enumerate_unitaries(gates, 60, max_elements)
    if table.complete:
        return (
            f"gate set {gates.name!r} is not universal: {', '.join(gates.labels)} generate only "
            f"{len(table.mats)} elements; add a gate outside this group, e.g. T"
        )
    if _comes_near(table.mats[:2000]):
        return ""
    return f"gate set {gates.name!r}: no element near the identity found, so it may be finite"


def to_qasm(word, gates: GateSet) -> str:
    """The word as an OpenQASM 2 program, first gate of the word last in time; equal up to a global phase.

    >>> from qlab.quantum.gatesets import gate_set
    >>> print(to_qasm([0, 1], gate_set("ht_closed")))
    OPENQASM 2.0;
    include "qelib1.inc";
    qreg q[1];
    t q[0];
    h q[0];
    """
    head = ["OPENQASM 2.0;", 'include "qelib1.inc";', f"qreg q[{gates.num_qubits}];"]
    return "\n".join([*head, *(gates.qasm[int(a)] for a in reversed(list(word)))])


def simulate_qasm(text: str) -> np.ndarray:
    """The unitary c128[2^n, 2^n] of a program of `to_qasm`, by PennyLane's own gates; qubit 0 leftmost.

    Raises:
      ValueError: a statement it does not know, with the line.
    """
    import pennylane as qml
    from pennylane.tape import QuantumScript

    plain = {"h": qml.Hadamard, "cx": qml.CNOT, "cz": qml.CZ, "t": qml.T, "s": qml.S}
    turn = {"rx": qml.RX, "ry": qml.RY, "rz": qml.RZ}
    ops, n = [], 1
    for line in text.splitlines():
        name, _, rest = line.strip().rstrip(";").partition(" ")
        wires = [int(s.partition("]")[0]) for s in rest.split("[")[1:]]
        if name in ("OPENQASM", "include", ""):
            continue
        if name == "qreg":
            n = wires[0]
        elif name in plain:
            ops.append(plain[name](wires=wires))
        elif name in ("tdg", "sdg"):
            ops.append(qml.adjoint(plain[name[0]](wires=wires)))
        elif name[:2] in turn and name[2:3] == "(":
            value = name[3:-1]
            angle = {"pi/2": np.pi / 2, "-pi/2": -np.pi / 2}.get(value) or float(value)
            ops.append(turn[name[:2]](angle, wires=wires))
        else:
            raise ValueError(f"simulate_qasm: statement {line!r} is none of those to_qasm writes")
    if not ops:
        return np.eye(2**n) + 0j
    tape: Any = QuantumScript(ops)
    return np.asarray(qml.matrix(tape, wire_order=range(n)), np.complex128)


def reduced(word, gates: GateSet) -> tuple[int, ...]:
    """The word without neighbours that undo one another."""
    out: list[int] = []
    for a in map(int, word):
        if out and gates.inverse[out[-1]] == a:
            out.pop()
        else:
            out.append(a)
    return tuple(out)


def inverse_word(word, gates: GateSet) -> tuple[int, ...]:
    """The inverse of a word of an inverse-closed set."""
    if not gates.closed:
        lone = [s for s, i in zip(gates.labels, gates.inverse, strict=True) if i < 0]
        raise ValueError(
            f"gate set {gates.name!r} has no inverse of {', '.join(lone)}; use an inverse-closed set"
        )
    return tuple(gates.inverse[int(a)] for a in reversed(list(word)))
