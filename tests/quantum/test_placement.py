"""Circuits under construction against plain Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import placement as pm
from qlab.quantum.circuit_spec import CNOT, RX, apply_spec


def names(n):
    """The card's order of actions, spelt out."""
    out = [("cx", c, (c + off) % n) for c in range(n) for off in range(1, n)]
    return out + [("r", q, axis) for q in range(n) for axis in range(3)]


class Plain:
    """The same circuit with lists: gates as (name, ...), first free moments, last gate on each qubit."""

    def __init__(self, d, n):
        self.d, self.n, self.gates, self.free, self.last = d, n, [], [0] * n, [None] * n
        self.grid = np.zeros((d, n + 3, n), int)

    def wires(self, g):
        return (g[1], g[2]) if g[0] == "cx" else (g[1],)

    def add(self, g):
        m = max(self.free[w] for w in self.wires(g))
        row, col = (g[2], g[1]) if g[0] == "cx" else (self.n + g[2], g[1])
        self.grid[m, row, col] = 1
        self.gates.append((m, g))
        for w in self.wires(g):
            self.free[w], self.last[w] = m + 1, g

    def legal(self):
        return [not all(self.last[w] == g for w in self.wires(g)) for g in names(self.n)]


@pytest.fixture(scope="module")
def compiled():
    return (
        jax.jit(jax.vmap(pm.place)),
        jax.jit(jax.vmap(pm.legal_mask)),
        jax.jit(jax.vmap(pm.to_circuit_spec)),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_placement_and_mask_as_with_lists(n, compiled, rng):
    place, mask, to_spec = compiled
    d, batch = 9, 8
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), pm.empty(d, n))
    plain = [Plain(d, n) for _ in range(batch)]
    for _ in range(d):
        legal = np.asarray(mask(state))
        assert legal.tolist() == [p.legal() for p in plain]
        assert legal.any(1).all()
        assert (~legal).sum(1).max() <= n
        action = np.array([rng.choice(np.flatnonzero(row)) for row in legal], np.int32)
        state = place(state, action)
        for p, a in zip(plain, action, strict=True):
            p.add(names(n)[a])
        np.testing.assert_array_equal(state.grid, [p.grid for p in plain])
    assert state.depth.tolist() == [max(p.free) for p in plain]
    full = place(state, jnp.zeros(batch, jnp.int32))  # no room left
    jax.tree.map(np.testing.assert_array_equal, full, state)

    spec = to_spec(state, jnp.asarray(rng.uniform(0, 6, (batch, d))))
    for i, p in enumerate(plain):
        moments = sorted(p.gates, key=lambda x: (x[0], x[1][0] != "cx"))
        kinds = [CNOT if g[0] == "cx" else RX + g[2] for _, g in moments]
        assert spec.gate[i].tolist() == kinds
    # the order of moments is the same map as the order of insertion
    sequence = jax.vmap(pm.sequence)(state)
    angles = jnp.asarray(rng.uniform(0, 6, (batch, d)))
    spec = to_spec(state, angles)
    run = jax.jit(jax.vmap(lambda s, a: apply_spec(s, a, n)))
    flat = jnp.zeros((batch, d, 3)).at[..., 0].set(angles)
    np.testing.assert_allclose(run(spec, spec.angle), run(sequence, flat), atol=1e-12)


def test_a_direct_repetition_only_is_illegal():
    c = pm.place(pm.empty(4, 2), 0)  # CNOT(0, 1)
    assert np.flatnonzero(~np.asarray(pm.legal_mask(c))).tolist() == [0]
    c = pm.place(c, 6)  # RY on qubit 1: the CNOT is free again, as CNOT RY CNOT is no identity
    assert np.flatnonzero(~np.asarray(pm.legal_mask(c))).tolist() == [6]


def test_short_circuits_are_padded_at_the_end():
    c = pm.place(pm.place(pm.empty(5, 3), 9), 1)
    spec = pm.to_circuit_spec(c)
    assert spec.gate.tolist() == [CNOT, RX + 0, 0, 0, 0] or spec.gate.tolist()[2:] == [0, 0, 0]
    assert pm.place(c, pm.num_actions(3)).count == 2  # "no gate"


def test_order_of_angles():
    # RX(0), RZ(1), CNOT, RY(0), left-packed RX(2) into the first moment
    c = pm.empty(6, 3)
    for a in (6, 11, 0, 7, 12):
        c = pm.place(c, a)
    order = pm.angle_order(c).tolist()
    assert order[2] == order[5] == -1
    assert order == [
        0 * 9 + 0 * 3 + 0,
        0 * 9 + 2 * 3 + 1,
        -1,
        2 * 9 + 1 * 3 + 0,
        0 * 9 + 0 * 3 + 2,
        -1,
    ]


def test_bad_sizes():
    with pytest.raises(UserError, match="max_gates=0"):
        pm.empty(0, 2)
    with pytest.raises(UserError, match="num_qubits=0"):
        pm.actions(0)
