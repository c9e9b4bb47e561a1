"""The learning parts of the quantum bench: mitigation with its gradient, latent layers, circuit search.

    zne     value and gradient of a Richardson-extrapolated energy (three noise levels), 6 qubits, by first call and steady
    latent  a batch of 256 QAOA latents (two layers, ring) with gradient, as QCAE trains them, against a state vector by
            hand in plain JAX
    grow    CRLQAS's environment on H2 (2 qubits): steps a second with the angles re-optimised after each gate, 64 episodes
            side by side against one
    label   QAS: circuits of a pool given their score by Adagrad on a fidelity, all together against one after another
Everything in double precision, as the rest of the bench.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches.measure import Number, Tell, find, interleave, ratio, seconds_per_call
from qlab.lab.experiment import Claim, Metric
from qlab.quantum import ansatz, hamiltonians, zne
from qlab.quantum import architecture_env as ae
from qlab.quantum import moving_threshold as mt
from qlab.quantum import qas_pool as qp
from qlab.quantum import qas_tasks as qt
from qlab.quantum.circuits import Circuit, circuit
from qlab.quantum.qcae import embed, latent_circuit
from qlab.quantum.search_problems import search_problem

METRICS = {
    "steps_per_s": Metric("1/s", "higher", "gates placed a second, angles re-optimised after each"),
    "circuits_per_s": Metric("1/s", "higher", "circuits labelled a second"),
    "to_one": Metric("times", "higher", "rate over that of one at a time"),
}
TOLERANCE = 1e-8


def goals(s: dict[str, Any]) -> tuple[Claim, ...]:
    def goal(text: str, name: str, relation: Any, target: float) -> Claim:
        return Claim(text, "goal", ("qlab", name), relation, target)

    found = [
        goal(f"zero-noise extrapolation, {n} qubits: first call within 5 s", f"zne{n}/first_call_s", "<=", 5.0)
        for n in s["zne"]
    ]  # fmt: skip
    found += [
        goal(f"{s['latents']} latents of {n} qubits: 1.3 times the time by hand", f"latent{n}/to_raw", "<=", 1.3)
        for n in s["latent"]
    ]  # fmt: skip
    for task, what in (("grow", "episodes side by side"), ("label", "circuits together")):
        if s[task]:
            found.append(goal(f"{what} beat one at a time", f"{task}/to_one", ">=", 1.0))
    return tuple(found)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "zne": (3,) if quick else (6,),
        "latent": (4,) if quick else (4, 8),
        "latents": 256,
        "grow": 0 if quick else 64,  # episodes side by side
        "label": 0 if quick else 256,  # circuits
    }


def mitigated(n: int) -> Callable[[jax.Array], Any]:
    """theta f[3, 2, n] -> value and gradient of the energy extrapolated to no noise."""
    obs, lams = hamiltonians.tfim_ring(n), jnp.array([0.01, 0.02, 0.03])

    def energy(theta):
        at = jax.vmap(lambda lam: ansatz.noisy_expval(theta, lam, lam, obs))(lams)
        return zne.richardson(lams, at)

    return jax.jit(jax.value_and_grad(energy))


def extrapolated(n: int, s: dict[str, Any]) -> list[Number]:
    theta = jnp.asarray(np.random.default_rng(n).uniform(-np.pi, np.pi, (3, 2, n)))
    begun = time.perf_counter()
    f = mitigated(n)
    jax.block_until_ready(f(theta))
    first = Number("qlab", "first_call_s", (time.perf_counter() - begun,))
    way = {"qlab": lambda: {"call_ms": 1e3 * seconds_per_call(f, theta)}}
    return [first, *interleave(way, s["repetitions"], s["budget_s"])]


Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]


def library_latents(c: Circuit) -> Loss:
    """(params, z f[N, n], out f[N, n]) -> mean over samples of q . out: out stands for what a decoder sends back."""
    latent = latent_circuit(c)

    def loss(params, z, out):
        q = jax.vmap(lambda a: latent.apply(params, a, jax.random.key(0)))(z)
        return (q * out).sum(-1).mean()

    return loss


def hand_written_latents(c: Circuit) -> Loss:
    """The same with a state vector by hand: products for RX, one diagonal phase a layer."""
    n = c.n
    bits = (np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) & 1
    signs = jnp.asarray(1.0 - 2.0 * bits)  # f[2^n, n], of Z
    phases = sum(signs[:, i] * signs[:, j] for i, j in c.edges)

    def rx(psi, angles):
        cos, sin = jnp.cos(angles / 2), -1j * jnp.sin(angles / 2)
        for q in range(n):
            u = jnp.array([[1, 0], [0, 1]]) * cos[q] + jnp.array([[0, 1], [1, 0]]) * sin[q]
            psi = jnp.einsum("ab,ibj->iaj", u, psi.reshape(2**q, 2, -1))
        return psi.reshape(-1)

    def one(params, z):
        psi = rx(jnp.zeros(2**n, complex).at[0].set(1.0), embed(z))
        for gamma, beta in zip(params["gamma"], params["beta"], strict=True):
            psi = rx(jnp.exp(-1j * gamma * phases) * psi, jnp.full(n, 2 * beta))
        return jnp.abs(psi) ** 2 @ signs

    def loss(params, z, out):
        return (jax.vmap(lambda a: one(params, a))(z) * out).sum(-1).mean()

    return loss


def latents(n: int, s: dict[str, Any]) -> list[Number]:
    c, rng = circuit("qaoa_tied", n, 2), np.random.default_rng(n)
    params = {k: jnp.asarray(rng.uniform(-np.pi, np.pi, 2)) for k in ("gamma", "beta")}
    z, out = (jnp.asarray(rng.standard_normal((s["latents"], n))) for _ in range(2))
    numbers, ready, truth = [], {}, None
    for arm, make in (("qlab", library_latents), ("raw", hand_written_latents)):
        f = jax.jit(jax.value_and_grad(make(c), (0, 1)))
        begun = time.perf_counter()
        got = jax.block_until_ready(f(params, z, out))
        numbers.append(Number(arm, "first_call_s", (time.perf_counter() - begun,)))
        flat = np.concatenate([np.ravel(a) for a in jax.tree.leaves(got)])
        truth = flat if truth is None else truth
        error = float(np.abs(flat - truth).max())
        numbers.append(Number(arm, "max_error", (error,)))
        if not error <= TOLERANCE:
            note = f"differs from qlab by {error:.2g}"
            numbers.append(Number(arm, "call_ms", status="failed", note=note))
            continue
        ready[arm] = lambda f=f: {"call_ms": 1e3 * seconds_per_call(f, params, z, out)}
    numbers += interleave(ready, s["repetitions"], s["budget_s"])
    return [*numbers, ratio(numbers, "qlab", "raw", "call_ms", "to_raw")]


def grown(num_envs: int, steps: int = 12) -> Callable[[], float]:
    """() -> gates a second of `num_envs` episodes side by side under random legal actions."""
    task = ae.Task(search_problem("h2_2q"), 6)
    env = ae.architecture_env(task, num_envs, 10_000)
    rule = mt.ThresholdRule(env.e_ref)
    table = jnp.asarray(mt.halting_table(6, 6, 0.5))
    switches = ae.Switches(
        jnp.bool_(True), jnp.bool_(False), jnp.bool_(True), table, mt.moving_threshold(1e-2, rule)
    )

    def body(carry, key):
        state, obs = carry
        k_act, k_env = jax.random.split(key)
        legal = jnp.where(obs[1], 0.0, -jnp.inf)
        action = jax.random.categorical(k_act, legal).astype(jnp.int32)
        state, ts = env.step(state, action, k_env)
        return (state, ts.obs), ts.reward

    @jax.jit
    def play(carry, key):
        return jax.lax.scan(body, carry, jax.random.split(key, steps))

    carry = jax.jit(env.reset)(jax.random.key(0), switches)
    jax.block_until_ready(play(carry, jax.random.key(1)))

    def rate() -> float:
        return num_envs * steps / seconds_per_call(play, carry, jax.random.key(1))

    return rate


def growing(s: dict[str, Any]) -> list[Number]:
    rates = {"qlab": grown(s["grow"]), "one": grown(1)}
    ways = {arm: lambda r=r: {"steps_per_s": r()} for arm, r in rates.items()}
    numbers = interleave(ways, s["repetitions"], s["budget_s"])
    return [*numbers, ratio(numbers, "qlab", "one", "steps_per_s", "to_one")]


def labelling(s: dict[str, Any]) -> list[Number]:
    pool = qp.PoolSpec(size=s["label"])
    specs = qp.sample_circuits(jax.random.key(0), pool)
    state = qt.draw_target(jax.random.key(1), specs, pool)
    objective = qt.fidelity_objective(state, 20)
    few = max(1, s["label"] // 32)
    alone = [jax.tree.map(lambda a, i=i: a[i : i + 1], specs) for i in range(few)]

    def together() -> float:
        run = lambda: qt.label_pool(specs, objective, num_qubits=pool.num_qubits)  # noqa: E731
        return s["label"] / seconds_per_call(run)

    def one_by_one() -> float:
        def run():
            return [qt.label_pool(a, objective, num_qubits=pool.num_qubits) for a in alone]

        return few / seconds_per_call(run)

    rates = {"qlab": together, "one": one_by_one}
    for rate in rates.values():
        rate()  # compiles
    ways = {arm: lambda r=r: {"circuits_per_s": r()} for arm, r in rates.items()}
    numbers = interleave(ways, s["repetitions"], s["budget_s"])
    return [*numbers, ratio(numbers, "qlab", "one", "circuits_per_s", "to_one")]


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    numbers: list[Number] = []

    def add(task: str, found: list[Number]) -> None:
        numbers.extend(n._replace(name=f"{task}/{n.name}") for n in found)

    for n in s["zne"]:
        tell(f"quantum: gradient through zero-noise extrapolation, {n} qubits")
        add(f"zne{n}", extrapolated(n, s))
    for n in s["latent"]:
        tell(f"quantum: {s['latents']} latents of {n} qubits")
        add(f"latent{n}", latents(n, s))
    if s["grow"]:
        tell(f"quantum: architecture search, {s['grow']} episodes side by side")
        add("grow", growing(s))
    if s["label"]:
        tell(f"quantum: {s['label']} circuits of a pool labelled")
        add("label", labelling(s))
    return numbers


def summary(numbers: list[Number]) -> str:
    texts = []
    for task in dict.fromkeys(n.name.split("/")[0] for n in numbers):

        def number(name: str, task: str = task) -> Any:
            return find(numbers, "qlab", f"{task}/{name}")

        if task.startswith("zne"):
            texts.append(
                f"ZNE gradient, {task[3:]} qubits, {number('call_ms').median:.3g} ms "
                f"(first call {number('first_call_s').median:.2g} s)"
            )
        elif task.startswith("latent"):
            texts.append(
                f"latents of {task[6:]} qubits {number('call_ms').median:.3g} ms "
                f"({number('to_raw').median:.2g} x by hand)"
            )
        elif task == "grow":
            texts.append(
                f"{number('steps_per_s').median:.0f} gates/s ({number('to_one').median:.2g} x one episode)"
            )
        elif task == "label":
            texts.append(
                f"{number('circuits_per_s').median:.0f} circuits/s labelled ({number('to_one').median:.2g} x one by one)"
            )
    return ", ".join(texts)  # fmt: skip
