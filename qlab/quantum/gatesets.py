"""Gate sets for compiling, in exact integer arithmetic: elements are compared without rounding.

Every gate here is, up to a positive factor, a matrix over Z[w], w = exp(i pi / 4), so an element is integers
[N, N, 4]: entry (j, k) is x0 + x1 w + x2 w^2 + x3 w^3. Two such matrices are one projective unitary if they
differ by a factor, and `canonical` picks one of them: divided by sqrt(2) (or 5) as often as that goes, and
of the eight multiples by w^k the one whose first non-zero entry is lexicographically largest. (Both factors
are of modulus sqrt(2)^m or 5^m times 1; the numbers of modulus 1 in Z[w] are the eight powers of w.)
A rounded floating-point matrix cannot do this: stored on a grid of 1e-6, errors of the order of the grid
enter every product, so most pairs of equal elements land on different points and stay two states.
A set with entries outside Z[w] (Fibonacci braids, generic angles) is not offered for this reason.
Arrays are NumPy or JAX; xp below is the one or the other.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest

W = np.exp(0.25j * np.pi)
POWERS = W ** np.arange(4)
_SHIFT = np.zeros((4, 4), np.int32)  # row vector x -> x w
_SHIFT[[0, 1, 2], [1, 2, 3]] = 1
_SHIFT[3, 0] = -1
_TURNS = np.stack([np.linalg.matrix_power(_SHIFT, k) for k in range(8)])
COEF_LIMIT = 2**26  # coefficients beyond it would overflow 32 bits in a product


def _times(x: np.ndarray) -> np.ndarray:
    """i32[..., 4, 4]: the matrix that multiplies a row of coefficients by x i[..., 4]."""
    return np.einsum("...k,klm->...lm", x, _TURNS[:4]).astype(np.int32)


class GateSet(NamedTuple):
    """
    Attributes:
      name; labels: A names; qasm: A OpenQASM statements. num_qubits: n.
      matrices: c128[A, N, N], unitary. ints: i32[A, N, N, 4], the same up to a positive factor.
      inverse: for each gate its inverse's index, -1 where the set has none.
      divisor: (i32[4], q): x / divisor = x * divisor[0] / q. reductions: most divisions after a product.
    """

    name: str
    num_qubits: int
    labels: tuple[str, ...]
    qasm: tuple[str, ...]
    matrices: np.ndarray
    ints: np.ndarray
    inverse: tuple[int, ...]
    divisor: tuple[tuple[int, ...], int]
    reductions: int

    @property
    def dim(self) -> int:
        return 2**self.num_qubits

    @property
    def closed(self) -> bool:
        return min(self.inverse) >= 0


def product(left, times, xp=np):
    """Coefficients of left x right: left [..., N, K, 4] and times = `_times` of right [..., K, M, 4, 4]."""
    return xp.einsum("...ijl,...jmlk->...imk", left, times)


def canonical(x, gates: GateSet, xp=np):
    """The representative of the projective element of x: i[..., N, N, 4]; see the module."""
    by, q = xp.asarray(_times(np.asarray(gates.divisor[0]))).astype(x.dtype), gates.divisor[1]
    for _ in range(gates.reductions):
        y = x @ by
        whole = (y % q == 0).all((-3, -2, -1), keepdims=True)
        x = xp.where(whole, y // q, x)
    flat = x.reshape(*x.shape[:-3], -1, 4)
    at = xp.argmax((flat != 0).any(-1), -1)
    first = xp.take_along_axis(flat, at[..., None, None], -2)[..., 0, :]
    turns = xp.asarray(_TURNS).astype(x.dtype)
    rows = xp.einsum("...l,klm->...km", first, turns)  # the eight multiples
    left = xp.ones(rows.shape[:-1], bool)
    for i in range(4):
        value = xp.where(left, rows[..., i], -(2**31) + 1)
        left = left & (value == value.max(-1, keepdims=True))
    turn = turns[xp.argmax(left, -1)]
    return (flat @ turn).reshape(x.shape)


def identity(gates: GateSet) -> np.ndarray:
    """i32[N, N, 4]."""
    x = np.zeros((gates.dim, gates.dim, 4), np.int32)
    x[np.arange(gates.dim), np.arange(gates.dim), 0] = 1
    return canonical(x, gates)


def compose(gates: GateSet, xp: Any = np):
    """(x i[..., N, N, 4], a) -> the canonical element of x times gate a (the gate on the right)."""
    times = _times(gates.ints)

    def run(x, a):
        return canonical(product(x, xp.asarray(times)[a], xp), gates, xp)

    return run


def arithmetic(gates: GateSet):
    """What a search over the group takes: (identity, compose, matrix, matrices, inverse, limit), in JAX."""
    step, mat = compose(gates, jnp), functools.partial(matrix, xp=jnp)
    return identity(gates), step, mat, gates.matrices, gates.inverse, COEF_LIMIT


def adjoint(x):
    """The adjoint's coefficients: transposed, w -> 1 / w = -w^3."""
    x = np.swapaxes(x, -3, -2)
    return np.stack([x[..., 0], -x[..., 3], -x[..., 2], -x[..., 1]], -1)


def matrix(x, xp=np):
    """The unitary of an element: c[..., N, N] from i[..., N, N, 4] (c64 with JAX)."""
    if xp is np:
        u = x @ POWERS
    else:
        f = x.astype(xp.float32)
        r = np.float32(np.sqrt(0.5))
        u = (f[..., 0] + r * (f[..., 1] - f[..., 3])) + 1j * (
            f[..., 2] + r * (f[..., 1] + f[..., 3])
        )
    return u / xp.sqrt(xp.sum(u.real**2 + u.imag**2, -1, keepdims=True))


def word_element(word, gates: GateSet) -> np.ndarray:
    """The canonical element of a word; the first gate stands leftmost in the product."""
    x, step = identity(gates).astype(np.int64), compose(gates)
    for a in word:
        x = step(x, int(a))
    return x


def word_matrix(word, gates: GateSet) -> np.ndarray:
    """c128[N, N]: g_1 g_2 ... g_L by plain products of the floating-point gates."""
    return functools.reduce(lambda u, a: u @ gates.matrices[int(a)], word, np.eye(gates.dim) + 0j)


_I = {"0": (0, 0, 0, 0), "1": (1, 0, 0, 0), "-": (-1, 0, 0, 0), "w": (0, 1, 0, 0), "W": (0, 0, 0, -1),
      "i": (0, 0, 1, 0), "j": (0, 0, -1, 0), "2": (2, 0, 0, 0), "m": (-2, 0, 0, 0), "k": (0, 0, 2, 0),
      "l": (0, 0, -2, 0), "p": (1, 0, 2, 0), "n": (1, 0, -2, 0)}  # fmt: skip
_ANGLE = 2 * float(np.arctan(2.0))
# One letter an entry (W = 1 / w, k = 2i, p = 1 + 2i ...), the OpenQASM statement, the inverse.
_GATES = {
    "H": ("11 1-", "h {0};", "H"), "T": ("10 0w", "t {0};", "Tdg"), "Tdg": ("10 0W", "tdg {0};", "T"),
    "S": ("10 0i", "s {0};", "Sdg"), "Sdg": ("10 0j", "sdg {0};", "S"),
    "VX": ("1k k1", f"rx({-_ANGLE!r}) {{0}};", "VXdg"), "VXdg": ("1l l1", f"rx({_ANGLE!r}) {{0}};", "VX"),
    "VY": ("12 m1", f"ry({-_ANGLE!r}) {{0}};", "VYdg"), "VYdg": ("1m 21", f"ry({_ANGLE!r}) {{0}};", "VY"),
    "VZ": ("p0 0n", f"rz({-_ANGLE!r}) {{0}};", "VZdg"), "VZdg": ("n0 0p", f"rz({_ANGLE!r}) {{0}};", "VZ"),
    "SX": ("1j j1", "rx(pi/2) {0};", "SXdg"), "SXdg": ("1i i1", "rx(-pi/2) {0};", "SX"),
    "CX": ("1000 0100 0001 0010", "cx {0},{1};", "CX"), "CZ": ("1000 0100 0010 000-", "cz {0},{1};", "CZ"),
}  # fmt: skip
_V = ("VX", "VY", "VZ", "VXdg", "VYdg", "VZdg")
_HT2 = ("H0", "T0", "Tdg0", "H1", "T1", "Tdg1", "CX01", "CX10")
_N3 = tuple(f"{g}{q}" for q in range(3) for g in ("SX", "SXdg", "T", "Tdg"))
SETS = {
    "v_closed": (1, _V), "v_free": (1, _V[:3]),
    "ht_closed": (1, ("H", "T", "Tdg")), "ht_free": (1, ("H", "T")),
    "ht2_closed": (2, _HT2), "ht2_free": (2, tuple(g for g in _HT2 if "dg" not in g)),
    "native2": (2, ("SX0", "SXdg0", "T0", "Tdg0", "SX1", "SXdg1", "T1", "Tdg1", "CZ01")),
    "native3": (3, (*_N3, "CZ01", "CZ12", "CZ02")),
    "clifford": (1, ("H", "S")), "diagonal": (1, ("S", "T", "Tdg")),
}  # fmt: skip


def _spread(small: np.ndarray, qubits: tuple[int, ...], n: int) -> np.ndarray:
    """A gate's coefficients on qubits of an n-qubit register: i[2^n, 2^n, 4]."""
    out = np.zeros((2**n, 2**n, 4), np.int32)
    bits = (np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) & 1
    rest = [q for q in range(n) if q not in qubits]
    local = bits[:, list(qubits)] @ (1 << np.arange(len(qubits) - 1, -1, -1))
    same = (bits[:, None, rest] == bits[None, :, rest]).all(-1)
    out[same] = small[local[:, None], local[None, :]][same]
    return out


@functools.cache
def gate_set(name: str) -> GateSet:
    """A gate set by name; a name may also list gates: "H,T,Tdg" or, on two qubits, "H0,T1,CX01".

    >>> g = gate_set("v_free")
    >>> g.labels, g.inverse, g.matrices.shape
    (('VX', 'VY', 'VZ'), (-1, -1, -1), (3, 2, 2))

    Raises:
      UserError: unknown name or gate, or gates of two rings mixed.
    """
    if name in SETS:
        n, labels = SETS[name]
    else:
        labels = tuple(s.strip() for s in name.split(","))
        wires = [
            int(c)
            for s in labels
            for c in s.lstrip("".join(sorted(set("HTSVXYZCdg"))))
            if c.isdigit()
        ]
        n = max(wires, default=0) + 1
    ints, qasm, kinds = [], [], []
    for label in labels:
        kind = label.rstrip("0123456789")
        if kind not in _GATES:
            known = [*SETS, *_GATES]
            raise UserError(f"gate set {name!r}: no gate or set {label!r}{nearest(label, known)}; "
                            f"use one of {', '.join(SETS)} or a list such as H,T,Tdg")  # fmt: skip
        wires = tuple(int(c) for c in label[len(kind) :]) or (0,)
        rows, text, _ = _GATES[kind]
        small = np.array([[_I[c] for c in row] for row in rows.split()], np.int32)
        if 2 ** len(wires) != len(small) or len(set(wires)) != len(wires):
            raise UserError(f"gate {label!r}: {kind} acts on {len(small).bit_length() - 1} different qubits; "
                            "write them as digits behind its name, e.g. CX01")  # fmt: skip
        ints.append(_spread(small, wires, n))
        qasm.append(text.format(*(f"q[{q}]" for q in wires)))
        kinds.append((kind, label[len(kind) :]))
    has_v = any(k.startswith("V") for k, _ in kinds)
    if has_v and not all(k.startswith("V") for k, _ in kinds):
        raise UserError(
            f"gate set {name!r}: V gates and others need different denominators; use one kind"
        )
    x = np.stack(ints)
    inverse = tuple(
        kinds.index((_GATES[k][2], q)) if (_GATES[k][2], q) in kinds else -1 for k, q in kinds
    )
    divisor = ((1, 0, 0, 0), 5) if has_v else ((0, 1, 0, -1), 2)  # 5, sqrt(2)
    return GateSet(
        name, n, labels, tuple(qasm), matrix(x.astype(np.int64)), x, inverse, divisor, 1 if has_v else 2
    )  # fmt: skip
