"""Noisy circuits differentiated in JAX, observables, and zero-noise extrapolation.

from qlab.quantum import noisy_expval, tfim_ring
energy = noisy_expval(theta, lam1, lam2, tfim_ring(3))   # theta f[L+1, 2, n]; jit, vmap, grad
"""

from qlab.quantum.ansatz import noisy_expval
from qlab.quantum.hamiltonians import h2_2q, tfim_ring, zn
from qlab.quantum.pauli import PauliSum
from qlab.quantum.zne import ESTIMATORS, estimator, exp_zne, poly_zne, richardson

__all__ = [
    "ESTIMATORS",
    "PauliSum",
    "estimator",
    "exp_zne",
    "h2_2q",
    "noisy_expval",
    "poly_zne",
    "richardson",
    "tfim_ring",
    "zn",
]
