"""Hadamard matrices by order: Sylvester's 2^k, and m 2^k for the orders m that Paley's two constructions give.

H_n = S_(2^k) (x) B_m, n = m 2^k, the base innermost: y[i m + j] mixes m neighbours by B, then blocks by S.
S is symmetric; B need not be, so the inverse is the transpose.
"""

from __future__ import annotations

import functools

import numpy as np

MOST_BASE = 512  # a base is a dense matrix


def is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def sylvester(n: int) -> np.ndarray:
    """[n, n] of +-1: (-1)^(number of ones in i and j).

    >>> sylvester(2).tolist()
    [[1, 1], [1, -1]]
    """
    h = np.ones((1, 1), np.int8)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def jacobsthal(q: int) -> np.ndarray:
    """[q, q]: chi(i - j), the quadratic character of a prime field."""
    chi = np.full(q, -1, np.int8)
    chi[[a * a % q for a in range(1, q)]] = 1
    chi[0] = 0
    i = np.arange(q)
    return chi[(i[:, None] - i) % q]


def _paley(m: int) -> int:
    """1 or 2, the construction that gives order m; 0: none over a prime field."""
    if m % 4:
        return 0
    if (m - 1) % 4 == 3 and is_prime(m - 1):
        return 1
    return 2 if (m // 2 - 1) % 4 == 1 and is_prime(m // 2 - 1) else 0


@functools.cache
def base(m: int) -> np.ndarray:
    """[m, m] of +-1 with B B^T = m I (Paley 1933), m of `decompose`.

    I: I + [[0, 1], [-1, Q]], m = q + 1, q = 3 mod 4. II: C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
    C = [[0, 1], [1, Q]], m = 2 (q + 1), q = 1 mod 4, symmetric.
    """
    if m == 1:
        return np.ones((1, 1), np.int8)
    kind = _paley(m)
    q = m - 1 if kind == 1 else m // 2 - 1
    c = np.zeros((q + 1, q + 1), np.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, -1 if kind == 1 else 1, jacobsthal(q)
    eye = np.eye(q + 1, dtype=np.int8)
    if kind == 1:
        return eye + c
    return np.kron(c, sylvester(2)) + np.kron(eye, np.array([[1, -1], [-1, -1]], np.int8))


@functools.cache
def decompose(n: int) -> tuple[int, int] | None:
    """(m, k) with n = m 2^k and the smallest base m that is known (1 for a power of two), else None.

    >>> decompose(4096), decompose(14336), decompose(5120), decompose(11008)
    ((1, 12), (28, 9), (20, 8), None)
    """
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1, n.bit_length() - 1
    m = 4 * odd
    while n % m == 0 and m <= MOST_BASE:
        if _paley(m):
            return m, (n // m).bit_length() - 1
        m *= 2
    return None


def dense(n: int) -> np.ndarray:
    """[n, n] of +-1, H H^T = n I."""
    m, k = decompose(n)
    return np.kron(sylvester(2**k), base(m))


def nearest(n: int) -> tuple[int, int]:
    """The supported sizes next below and above n.

    >>> nearest(11008)
    (10752, 11136)
    """
    below = next(i for i in range(n - 1, 0, -1) if decompose(i)) if n > 1 else 1
    return below, next(i for i in range(n + 1, 2 * n + 3) if decompose(i))


def largest_block(k: int) -> int:
    """The largest supported size that divides k.

    >>> largest_block(11008)
    256
    """
    return max(b for b in range(1, k + 1) if k % b == 0 and decompose(b))
