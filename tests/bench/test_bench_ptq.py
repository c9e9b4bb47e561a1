"""The PyTorch loops of the ptq bench do the same work as the lab's programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization.gptq import gptq_solve
from qlab.quantization.grid import calibrate
from qlab.quantization.methods import squared_error

pytest.importorskip("torch")
from qlab.benches import ptq, ptq_peers
from qlab.quantization.blocks import fake_run


def test_gptq_of_both_gives_the_same_integers():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(24, 70)).astype(np.float32)
    x = (rng.normal(size=(200, 70)) + rng.normal(size=(200, 1))).astype(np.float32)
    h, scale = x.T @ x / len(x), np.abs(w).max(1, keepdims=True) / 7
    ours, _ = gptq_solve(w, jnp.asarray(h), scale, jnp.zeros_like(scale), -8, 7)
    theirs = ptq_peers.torch_gptq(w, h, scale, -8, 7, block=32)()
    assert (np.asarray(ours) == theirs).mean() > 0.999  # two factorisations in float32


def test_adaround_of_both_leaves_the_same_error():
    block, params, x, y, q = ptq._encoder(64)
    s = {"steps": 300, "batch": 32}
    grids = {
        k: calibrate(params[k]["kernel"].T, 4.0, False, max_bits=8, calibration="shares")
        for k in q.weights
    }
    codes = ptq_peers.torch_adaround(params, q.acts, grids, x, y, ptq.SIZE.heads, 300, 32)()
    theirs = {k: grids[k].qtensor(jnp.asarray(v), v.shape) for k, v in codes.items()}
    ours = ptq._learn(block, s)(q, x, y, jax.random.key(0)).weights

    def error(weights):
        return float(squared_error(block(params, x, fake_run(q._replace(weights=weights))), y))

    assert error(ours) < 0.9 * error(q.weights)
    assert error(theirs) == pytest.approx(error(ours), rel=0.05)
