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
from qlab.quantum import search_report as report
from qlab.quantum.angle_search import Settings
from qlab.quantum.search_problems import search_noise, search_problem
from qlab.quantum.vqe import SPSA
from qlab.rl.dqn import double_dqn, mlp_q
from qlab.rl.off_policy import OnlineConfig, OnlineTask, off_policy, online_rl

__all__ = ["CLAIMS", "FIGURES", "METRICS", "build"]
METRICS = report.METRICS
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
    mask, halting, ends = (jnp.bool_(x) for x in (c.mask, halt.on, halt.terminal))
    return ae.Switches(mask, halting, ends, table, mt.moving_threshold(xi, rule))


def online_task(c: Any, name: str) -> OnlineTask:
    task = make_task(c, name)
    env = ae.architecture_env(task, c.num_envs, c.episodes)
    agent = double_dqn(
        mlp_q(env.num_features, c.hidden, env.num_actions), env.num_actions, discount=c.gamma_final,
        n_step=c.n_step, learning_rate=c.lr, target_every=c.target_every, epsilon_decay=c.eps_decay,
        epsilon_final=c.eps_final,
    )  # fmt: skip
    online = OnlineConfig(
        c.gamma_final, c.updates_per_step, c.batch, c.n_step, c.replay_size, c.learning_starts
    )
    switches = make_switches(c, name, env)
    return OnlineTask(
        off_policy(env.step, agent, online, num_seeds=c.seeds),
        reset=lambda key: env.reset(key, switches),
        busy=lambda s, upto: report.unfinished(s.records, upto),
        metrics=report.round_metrics,
        results=lambda s: report.search_results(s.records, task, c.last_episodes),
        learns=c.method == "ddqn",  # a random agent never leaves epsilon = 1
    )


def other_circuits(c: Any, name: str) -> dict[str, Any]:
    task = make_task(c, name)
    if c.method == "exhaustive":
        found = rc.exhaustive(task, c.tasks[name].exhaustive)
    else:
        hea = c.method == "hea"
        found = rc.hardware_efficient(task, c.hea_layers) if hea else (rc.coupled_cluster(task),)
    return report.reference_results(task, found)


def build(config: Any) -> Experiment:
    c = config
    if c.method not in METHODS:
        raise UserError(f"method={c.method!r} is not known{nearest(c.method, METHODS)}")
    if unknown := [n for n in c.only if n not in c.tasks]:
        raise UserError(f"only: {unknown[0]!r} is no task{nearest(unknown[0], tuple(c.tasks))}")
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


# The configs' tasks in words: a claim and a curve each; a variant leaves those of other tasks unmeasured.
TASKS = {
    "h2_2q": "H2, 2 qubits", "h2_3q": "H2, 3 qubits", "h2_3q_noisy": "H2, 3 qubits, noisy", "h2_4q": "H2, 4 qubits",
    "lih_4q": "LiH, 4 qubits", "lih_4q_noisy": "LiH, 4 qubits, noisy",
}  # fmt: skip
MAIN = "h2_3q"  # where the ablations are
H2, NOISY = [t for t in TASKS if "h2" in t], [t for t in TASKS if "noisy" in t]
EASY = "a random legal agent's shortest circuit passes this too (measured on H2)"


def _than(other: str, metric: str, op: Any, text: str, tasks: Any = (MAIN,), source: str = "abstract, checked form", **kw: Any):  # fmt: skip
    """A claim for each task: crlqas against another arm."""
    sides = ((t, f"{t}/{metric}") for t in tasks)
    return [Claim(f"{text}: {TASKS[t]}", source, ("crlqas", m), op, (other, m), **kw) for t, m in sides]  # fmt: skip


CLAIMS = (
    *_than("random", "success_rate", ">=", "More of its last episodes reach 1.6 mHa than a random legal agent's", TASKS),
    *_than("random", "solved_at", "<=", "They reach it with fewer gates than a random legal agent's", TASKS),
    *_than("random", "gates", "<=", "Its shortest circuit has no more gates than a random legal agent's", TASKS, exact=True),
    *_than("hea", "gates", "<=", "Not more gates than a hardware-efficient ansatz", TASKS, exact=True, note=EASY),
    *_than("uccsd", "gates", "<=", "Not more gates than UCCSD", H2, exact=True, note=EASY),
    *_than("exhaustive", "gates", "<=", "As short as the shortest circuit there is", H2[:3], "ours", exact=True, note=EASY),
    *(Claim(f"The circuit handed over is within 1.6 mHa without the noise: {TASKS[t]}", "abstract, checked form",
            ("crlqas", f"{t}/lowest_error"), "<=", 1.6e-3, note=EASY) for t in NOISY),
    *_than("told_e0", "success_rate", ">=", "At most 5 points less success than when told the ground energy", margin=-5.0),
    *_than("no_curriculum", "success_rate", ">=", "The curriculum helps: more success than without an end at a success"),
    *_than("no_mask", "success_rate", ">=", "Illegal actions: the mask helps"),
    *_than("no_halting", "success_rate", ">=", "Random halting helps"),
    Claim("PennyLane agrees on the circuit handed over", "ours", ("crlqas", f"{MAIN}/pennylane_gap"), "<=", 1e-9, exact=True),
)  # fmt: skip
FIGURES = (
    Figure("Success of the last episodes", "bars", "success_rate", ylabel="%"),
    Figure("Gates at which they came within 1.6 mHa", "bars", "solved_at"),
    Figure("Gates of the shortest circuit within 1.6 mHa", "bars", "gates"),
    *(Figure(f"{TASKS[t]}: success by round", "curve", f"{t}/success", xlabel="round") for t in H2),
    Figure(f"{TASKS[MAIN]}: threshold", "curve", f"{MAIN}/threshold", xlabel="round", ylabel="Ha"),
    Figure(f"{TASKS[MAIN]}: least error", "curve", f"{MAIN}/error", xlabel="round", ylabel="Ha", logy=True),
    Figure("Shortest circuit within 1.6 mHa (lowest energy if none)", "circuit", "circuit"),
    Figure("Error by number of gates", "line", "error_by_gates", "num_gates", "gates", "Ha", logy=True),
)  # fmt: skip
