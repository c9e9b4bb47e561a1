"""Inner optimisers: where they end, what they count, and the slope that Adam-SPSA sees."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.device import session
from qlab.lab.errors import UserError
from qlab.quantum import placement as pm
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.angle_search import OPTIMISERS, Settings, angle_search, plain_spsa
from qlab.quantum.noise_model import NoiseModel
from qlab.quantum.pauli import ground_energy, to_coords
from qlab.quantum.search_problems import search_problem
from qlab.quantum.vqe import SPSA, adam_spsa


@pytest.fixture(scope="module")
def h2():
    """RY(0), CNOT(0, 1) on H2 with two qubits, in 4 slots; and RX(0) twice over."""
    with jax.enable_x64(True):
        obs, place = search_problem("h2_2q"), jax.jit(pm.place)
        tables = pc.noise_tables(NoiseModel(), 2)
        h = pc.effective_observable(to_coords(obs), tables)
        circuits = []
        for actions in ((3, 0), (2, 5)):
            c = pm.empty(4, 2)
            for a in actions:
                c = place(c, a)
            circuits.append(c)
        batch = jax.tree.map(lambda *x: jnp.stack(x), *circuits)
        wires = jax.jit(jax.vmap(lambda c: pc.wiring(pm.sequence(c), tables, 2)))(batch)
        return obs, h, wires, jax.vmap(pm.angle_order)(batch)


EXACT = {
    "rotosolve": 1e-12,
    "adam": 1e-3,
    "cobyla": 1e-5,
    "adam_spsa": 5e-3,
    "spsa": 5e-3,
    "three_stage": 5e-2,
}
SIZES = {"steps": 200, "max_evals": 400, "spsa": SPSA(a=1.0, alpha=0.602, gamma=0.101)}


FAST = ("rotosolve", "adam_spsa")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OPTIMISERS]
)
def test_finds_the_optimum_of_one_angle(h2, name):
    obs, h, wires, order = h2
    search = angle_search(Settings(name, **SIZES))
    run = jax.jit(jax.vmap(lambda w, o, k: search(w, jnp.zeros(4), o, h, None, k)))
    # COBYLA's callback runs in another thread: float64 for all of them, as the runner sets it.
    with session("auto", True) if name == "cobyla" else nullcontext():
        done = run(wires, order, jax.random.split(jax.random.key(0), 2))
        angles, asked = jax.block_until_ready(done)
    e = float(pc.energy(jax.tree.map(lambda x: x[0], wires), angles[0], h))
    assert -1e-12 < e - ground_energy(obs) < EXACT[name]
    one = 3 * (SIZES["max_evals"] // 3)
    want = {
        "rotosolve": lambda a: a % 3 == 0 and 0 < a <= 3 * 200,
        "adam": lambda a: a == 200 * 3,
        "cobyla": lambda a: 5 < a <= 400,
        "adam_spsa": lambda a: a == one,
        "spsa": lambda a: a == one,
        "three_stage": lambda a: a == sum(3 * (400 * s // 14 // 3) for s in (10, 3, 1)),
    }[name]
    assert want(int(asked[0])), asked


def test_rotosolve_counts_three_energies_an_angle_and_sweep(h2):
    _, h, wires, order = h2
    search = angle_search(Settings("rotosolve", 1))
    _, asked = jax.vmap(lambda w, o, k: search(w, jnp.zeros(4), o, h, None, k))(
        wires, order, jax.random.split(jax.random.key(0), 2)
    )
    assert asked.tolist() == [3, 6]


def test_a_restart_leaves_a_saddle(h2):
    """RX on both qubits: from angles 0 and pi/2 no single angle helps as much as both; a restart finds -1.1167."""
    _, h, wires, order = h2
    w = jax.tree.map(lambda x: x[1], wires)
    warm, asked = angle_search(Settings(steps=20, restarts=3))(
        w, jnp.zeros(4), order[1], h, None, jax.random.key(0)
    )
    assert abs(float(pc.energy(w, warm, h)) + 1.1166844) < 1e-6
    assert int(asked) % 3 == 4 % 3  # four ends were measured


def test_rotosolve_with_shots_scatters_by_its_three_energies(h2):
    """b and c have variance 1.5 and 0.5 sigma^2; near the minimum of slope 0 the angle errs by sqrt(...) / hypot(b, c)."""
    _, h, wires, order = h2
    w = jax.tree.map(lambda x: x[0], wires)
    search, sigma = angle_search(Settings("rotosolve", 1)), 1e-3
    keys = jax.random.split(jax.random.key(1), 4000)
    angles, _ = jax.jit(jax.vmap(lambda k: search(w, jnp.zeros(4), order[0], h, sigma, k)))(keys)
    _, b, c = pc.slices(w, jnp.zeros(4), h)[0]
    r = np.hypot(b, c)
    spread = sigma * np.sqrt(1.5 * (c / r) ** 2 + 0.5 * (b / r) ** 2) / r
    assert abs(angles[:, 0].std() / spread - 1) < 0.05


@pytest.mark.parametrize("method", [adam_spsa, plain_spsa])
def test_spsa_sees_the_exact_slope_of_a_line(method):
    """One step from 0 on f = s x with c -> 0 moves by -a s."""
    for slope in (0.7, -3.0):
        hp = SPSA(a=0.01, c=1e-7, max_evals=3)
        x, best, evals = method(lambda x, k, s=slope: s * x[0], jnp.zeros(1), jax.random.key(0), hp)
        assert abs(float(x[0]) + 0.01 * slope) < 1e-8
        assert abs(float(best) + 0.01 * slope**2) < 1e-8
        assert evals == 3


def test_a_new_angle_is_nudged_only_in_gradient_searches(h2):
    _, h, wires, order = h2
    search = angle_search(Settings("adam", 1, learning_rate=1e-12))
    angles, _ = search(
        jax.tree.map(lambda x: x[1], wires), jnp.zeros(4), order[1], h, None, jax.random.key(3)
    )
    # RX on both qubits: the last in order of (moment, axis, qubit) is the one on qubit 1
    assert float(angles[0]) < 1e-9 < float(angles[1]) < 0.1


def test_a_circuit_without_angles(h2):
    _obs, h, *_ = h2
    tables = pc.noise_tables(NoiseModel(), 2)
    circuit = pm.place(pm.empty(2, 2), 0)
    wires, order = pc.wiring(pm.sequence(circuit), tables, 2), pm.angle_order(circuit)
    for name in ("rotosolve", "cobyla"):
        angles, asked = angle_search(Settings(name))(
            wires, jnp.zeros(2), order, h, None, jax.random.key(0)
        )
        assert int(asked) == 0
        assert not np.asarray(angles).any()


def test_bad_settings(h2):
    with pytest.raises(UserError, match="did you mean rotosolve"):
        angle_search(Settings("rotosolv"))
    with pytest.raises(UserError, match="steps=0"):
        angle_search(Settings("adam", 0))
    with pytest.raises(UserError, match="one step needs 42"):
        angle_search(Settings("three_stage", max_evals=20))
