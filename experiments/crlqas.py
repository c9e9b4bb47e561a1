"""CRLQAS: curriculum reinforcement learning for quantum architecture search (Patel et al. 2024, arXiv 2402.03500).

Arms are an agent on the environment (crlqas, its ablations, random) or circuits of another kind (exhaustive, hea, uccsd).
A task is a problem with a most number of gates, noiseless or noisy. A seed draws nets, exploration, lengths of
episodes, minibatches and shots; the other kinds of circuits do not vary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.lab.experiment import Claim, Experiment, Figure
from qlab.quantum import architecture_env as ae
from qlab.quantum import moving_threshold as mt
from qlab.quantum import reference_circuits as rc
from qlab.quantum.angle_search import Settings
from qlab.quantum.search_problems import search_noise, search_problem
from qlab.quantum.search_report import (
    METRICS,
    reference_results,
    round_metrics,
    search_results,
    unfinished,
)
from qlab.quantum.vqe import SPSA
from qlab.rl.dqn import double_dqn, mlp_q
from qlab.rl.off_policy import OnlineConfig, OnlineTask, off_policy, online_rl

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
METHODS = ("ddqn", "random", "exhaustive", "hea", "uccsd")
E_REFS = ("lower_bound", "exact")


def make_task(c: Any, name: str) -> ae.Task:
    t = c.tasks[name]
    o, noise = c.optimiser, search_noise(t.noise)
    spsa = SPSA(*(o.spsa[k] for k in SPSA._fields[:-1]), max_evals=o.max_evals)
    settings = Settings(o.name, o.steps, o.restarts, o.learning_rate, o.max_evals, spsa)
    return ae.Task(search_problem(t.problem), t.D, noise, c.n_shots, settings, c.lag_optimisation)


def make_switches(c: Any, name: str, env: ae.ArchitectureEnv) -> ae.Switches:
    """Curriculum, mask and halting of this arm."""
    t, halt = c.tasks[name], c.rand_halt
    if c.e_ref not in E_REFS:
        raise UserError(f"e_ref={c.e_ref!r} is not known{nearest(c.e_ref, E_REFS)}")
    e_ref = env.e_ref if c.e_ref == "lower_bound" else env.e_true
    rule = mt.ThresholdRule(
        e_ref, c.delta, c.G, c.success_thresh, c.succ_radius_shift, c.succ_switch, c.curriculum
    )
    table = mt.halting_table(t.D, halt.n or t.D, halt.p, halt.least)
    xi = t.accept_err if c.accept_err is None else c.accept_err
    return ae.Switches(jnp.bool_(c.mask), jnp.bool_(halt.on), table, mt.moving_threshold(xi, rule))


def online_task(c: Any, name: str) -> OnlineTask:
    task = make_task(c, name)
    env = ae.architecture_env(task, c.num_envs, c.episodes)
    learns = c.method == "ddqn"
    agent = double_dqn(
        mlp_q(env.num_features, c.hidden, env.num_actions), env.num_actions, discount=c.gamma_final,
        n_step=c.n_step, learning_rate=c.lr, target_every=c.target_every, epsilon_decay=c.eps_decay,
        epsilon_final=c.eps_final if learns else 1.0,
    )  # fmt: skip
    online = OnlineConfig(
        c.gamma_final, c.updates_per_step, c.batch, c.n_step, c.replay_size, c.learning_starts
    )
    loop = off_policy(env.step, agent, online, learns=learns, num_seeds=c.seeds)
    switches = make_switches(c, name, env)
    return OnlineTask(
        loop,
        reset=lambda key: env.reset(key, switches),
        busy=lambda s, upto: unfinished(s.records, upto),
        metrics=round_metrics,
        results=lambda s: search_results(s.records, task, c.last_episodes),
    )


def other_circuits(c: Any, name: str) -> dict[str, Any]:
    task = make_task(c, name)
    if c.method == "exhaustive":
        return reference_results(task, rc.exhaustive(task, c.tasks[name].exhaustive))
    if c.method == "hea":
        return reference_results(task, rc.hardware_efficient(task, c.hea_layers))
    return reference_results(task, (rc.coupled_cluster(task),))


def build(config: Any) -> Experiment:
    c = config
    if c.method not in METHODS:
        raise UserError(f"method={c.method!r} is not known{nearest(c.method, METHODS)}")
    names = [n for n in c.tasks if not c.only or n in c.only]
    if c.method in ("ddqn", "random"):
        tasks = {n: online_task(c, n) for n in names}
        return online_rl(tasks, c.episodes, c.round_episodes)
    if c.method == "uccsd":
        names = [n for n in names if c.tasks[n].problem.startswith("h2_")]

    @functools.cache  # the same for every seed
    def all_tasks():
        return {f"{n}/{k}": v for n in names for k, v in other_circuits(c, n).items()}

    return Experiment(lambda key: {"key": key}, lambda state: all_tasks(), jittable=False)


CLEAN, NOISY, SMALL = "h2_3q", "h2_3q_noisy", "h2_2q"


def _rate(text: str, task: str, other: str, note: str = "") -> Claim:
    metric = f"{task}/success_rate"
    return Claim(
        text, "abstract, checked form", ("crlqas", metric), ">=", (other, metric), note=note
    )


def _gates(text: str, task: str, other: str, source: str, **kw: Any) -> Claim:
    return Claim(text, source, ("crlqas", f"{task}/gates"), "<=", (other, f"{task}/gates"), **kw)


EASY = "random circuits of the same environment pass this too"
CLAIMS = (
    _rate("More of its last episodes succeed than of a random legal agent's, H2 on 3 qubits", CLEAN, "random"),
    _rate("The same with noise", NOISY, "random"),
    _rate("The same on 2 qubits, noiseless", SMALL, "random"),
    _gates("Not more gates than a hardware-efficient ansatz, 3 qubits", CLEAN, "hea", "abstract", exact=True, note=EASY),
    _gates("The same with noise", NOISY, "hea", "abstract", exact=True, note=EASY),
    _gates("Not more gates than UCCSD, 3 qubits", CLEAN, "uccsd", "abstract", exact=True, note=EASY),
    _gates("As short as the shortest circuit there is (exhaustive), 3 qubits", CLEAN, "exhaustive", "ours"),
    Claim("With noise the circuit it hands over is within chemical accuracy without noise", "abstract",
          ("crlqas", f"{NOISY}/lowest_error"), "<=", 1.6e-3, note=EASY),
    _rate("The curriculum does not cost success against being told the ground energy", CLEAN, "told_e0"),
    _rate("The curriculum helps: more success than without an end at a success", CLEAN, "no_curriculum"),
    _rate("Illegal actions: the mask helps", CLEAN, "no_mask"),
    _rate("Random halting helps", CLEAN, "no_halting"),
    _gates("Not more gates than the best of a random legal agent, 3 qubits", CLEAN, "random", "abstract"),
    Claim("PennyLane agrees on the circuits found", "ours", ("crlqas", f"{CLEAN}/pennylane_gap"), "<=", 1e-9, exact=True),
)  # fmt: skip
FIGURES = (
    Figure("Success of the last episodes", "bars", "success_rate", ylabel="%"),
    Figure("Gates of the shortest circuit within 1.6 mHa", "bars", "gates"),
    Figure("H2, 3 qubits: success by round", "curve", f"{CLEAN}/success", xlabel="round"),
    Figure("With noise: success by round", "curve", f"{NOISY}/success", xlabel="round"),
    Figure("H2, 3 qubits: threshold", "curve", f"{CLEAN}/threshold", xlabel="round", ylabel="Ha"),
    Figure("H2, 3 qubits: least error", "curve", f"{CLEAN}/error", xlabel="round", ylabel="Ha", logy=True),
    Figure("Error by number of gates", "line", "error_by_gates", "num_gates", "gates", "Ha", logy=True),
)  # fmt: skip
