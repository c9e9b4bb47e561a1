"""The quantum latent layer of a denoising autoencoder (QCAE; Kea et al. 2024, arXiv 2401.06367).

z f[n] from the encoder -> angles a = pi tanh(z) -> circuit -> q_i = <Z_i> in [-1, 1] -> decoder.
The abstract names the QAOA circuit and the parameter-shift rule; the embedding, the sizes and the form of the
circuit are ours. pi tanh keeps the map into a period of RX one to one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.nn.autoencoder import Denoiser, Latent, denoiser
from qlab.quantum import columns as col
from qlab.quantum.circuits import Circuit
from qlab.quantum.measure import measure


def embed(z: jax.Array) -> jax.Array:
    """a = pi tanh(z)."""
    return jnp.pi * jnp.tanh(z)


def latent_circuit(
    circuit: Circuit,
    *,
    grad: str = "backprop",
    shots: int = 0,
    depol: float = 0.0,
    frozen: bool = False,
    init_scale: float = float(jnp.pi),
) -> Latent:
    """A circuit as the latent layer of an autoencoder.

    Args:
      grad, shots, depol: see `measure`.
      frozen: keep the random angles it starts with (gradients still pass to the encoder).
      init_scale: angles start uniform in [-init_scale, init_scale].

    >>> from qlab.quantum.circuits import circuit
    >>> latent = latent_circuit(circuit("cosine", 2, 0))
    >>> latent.apply({}, jnp.zeros(2), jax.random.key(0)).tolist()
    [1.0, 1.0]
    """
    read = measure(circuit.columns, circuit.n, grad=grad, shots=shots, depol=depol)

    def apply(params, z, key):
        params = jax.lax.stop_gradient(params) if frozen else params
        return read(circuit.angles(embed(z), params), key)

    def init(key):
        return circuit.init(key, init_scale)

    return Latent(init, apply, 0 if frozen else circuit.num_params)


def qcae(
    side: int, circuit: Circuit, *, channels: tuple[int, int] = (8, 16), **options
) -> Denoiser:
    """The autoencoder of Kea et al. around `circuit`; options: see `latent_circuit`.

    >>> from qlab.quantum.circuits import circuit
    >>> net = qcae(8, circuit("qaoa_tied", 4, 2))
    >>> net.latent.num_params
    4
    """
    return denoiser(side, circuit.n, latent_circuit(circuit, **options), channels=channels)


def runs_per_sample(circuit: Circuit) -> int:
    """Circuit runs that one gradient of one sample takes by parameter shift: 2 G.

    >>> from qlab.quantum.circuits import circuit
    >>> runs_per_sample(circuit("qaoa_tied", 4, 2))
    40
    """
    return 2 * col.num_gates(circuit.columns)
