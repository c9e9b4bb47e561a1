"""QARL: adversarial training with a curriculum of bounded rationality (Reddi et al. 2024, arXiv 2311.01642).

Arms differ in who the adversary is and how it grows; steps, updates and networks are shared. The arm "exact"
solves matrix and Markov games and the teacher instead. A seed draws networks, exploration, starts,
temperatures and minibatches, and for "exact" the games.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.rl import rationality
from qlab.rl import teacher as tt
from qlab.rl.envs.control import ENVS, Physics, control
from qlab.rl.envs.drawings import filmed
from qlab.rl.envs.env import alone
from qlab.rl.sac import sac
from qlab.rl.two_player import DuelConfig, duel, play, robustness_grid, see

# Mean reward a step that counts as 0 and as 100.
ANCHORS = {"cartpole": (0.0, 1.0), "pendulum": (-6.0, 0.0), "point_mass": (0.0, 1.0)}


def build_exact(c: Any) -> Experiment:
    hot_to_cold = np.geomspace(c.exact_high, c.exact_low, c.exact_points)

    def evaluate(state) -> dict[str, Any]:
        rng = np.random.default_rng(int(state["seed"]))
        return {
            **rationality.matrix_study(rng, hot_to_cold, c.exact_games),
            **rationality.markov_study(rng, hot_to_cold[:: c.exact_points // 4], c.exact_states, c.exact_discount),
            **rationality.teacher_study(c.conc0, teacher_config(c)),
        }  # fmt: skip

    def init(key):
        return {"seed": jax.random.randint(key, (), 0, 2**31 - 1)}

    return Experiment(init, evaluate, jittable=False)


def teacher_config(c: Any) -> tt.TeacherConfig:
    return tt.TeacherConfig(c.conc_target, c.rate, c.kl_eps, c.j_lb, c.min_pairs, c.explore)


def build(config: Any) -> Experiment:
    c = config
    if c.part == "exact":
        return build_exact(c)
    if c.env.startswith("brax"):
        if importlib.util.find_spec("brax") is None:
            raise UserError(f"env={c.env!r} needs brax: pip install 'qlab[brax]'")
        raise UserError(f"env={c.env!r}: walkers with an external force are not in this lab yet")
    low, high = ANCHORS.get(c.env, (0.0, 1.0))
    env = control(c.env, max_force=c.adv_max_force, horizon=c.horizon)
    longer = partial(control, c.env, max_force=c.adv_max_force, horizon=c.eval_horizon)
    settings = DuelConfig(
        iterations=c.iterations, best_response=c.best_response_steps, num_envs=c.episodes_per_phase,
        horizon=c.horizon, steps_per_update=c.steps_per_update, batch_size=c.batch,
        capacity=c.replay_size, learning_starts=c.learning_starts, discount=c.discount,
        adversary=c.adversary_algo, teacher=c.teacher, conc0=c.conc0, gamma=teacher_config(c),
        visible=c.temperature_visible, force0=c.force0,
    )  # fmt: skip
    mass = ENVS[c.env].physics.mass * np.linspace(*c.grid_mass, num=c.grid_size)
    friction = np.linspace(*c.grid_friction, num=c.grid_size)
    cells = np.meshgrid(mass, friction, indexing="ij")
    grid = Physics(*(jnp.asarray(x, jnp.float32) for x in cells))

    def make_agent(obs_dim, action_dim, temperature):
        return sac(
            obs_dim, action_dim, temperature=temperature, hidden=c.hidden, lr_actor=c.lr_actor,
            lr_critic=c.lr_critic, lr_alpha=c.lr_alpha, tau=c.tau, actor_warmup=c.actor_warmup,
            init_temperature=c.init_temperature,
        )  # fmt: skip

    def evaluate(key, policy, own, fresh):
        n, steps, shown = c.eval_episodes, c.eval_horizon, jnp.zeros(c.eval_episodes)
        foes = {"none": lambda k, x: jnp.zeros((n, env.adversary_dim)), "own": own, "fresh": fresh}
        foes = {k: f for k, f in foes.items() if f is not None}
        total = {k: play(longer(), key, (policy, f), shown, steps).mean() for k, f in foes.items()}
        cells = robustness_grid(key, policy, lambda p: longer(physics=p), grid, n, steps)
        hardest = alone(longer(physics=jax.tree.map(lambda x: x[-1, -1], grid)))
        met = filmed(c.env, hardest, lambda k, x: policy(k, see(x, shown[:1])), key, steps // 8)
        total |= {"grid": cells.mean(), "grid_q10": jnp.quantile(cells, 0.1)}
        out = {f"{k}/return": v for k, v in total.items()}
        out |= {f"{k}/score": 100 * (v / steps - low) / (high - low) for k, v in total.items()}
        return out | {"grid_map": cells} | met

    return duel(env, make_agent, settings, evaluate, c.seeds)


METRICS = {
    "return": Metric("", "higher", "undiscounted return of the greedy protagonist"),
    "score": Metric("%", "higher", "return from 0 = low to 100 = best conceivable reward a step"),
    "protagonist_updates": Metric("", "none", "gradient steps of the protagonist"),
    "final_temperature": Metric("", "lower", "the adversary's at the end, its mean or the learned one"),
    "residual": Metric("", "lower", "largest distance to the fixed point"),
    "uniform_gap": Metric("", "lower", "adversary at the highest temperature, distance to uniform"),
    "value_gap": Metric("", "lower", "game value at the lowest temperature against linear programming"),
    "exploitability": Metric("", "lower", "value of the game minus the worst case"),
    "least_rise": Metric("", "higher", "least rise of the worst case along falling temperature"),
    "rise": Metric("", "higher", "worst case at the lowest minus at the highest temperature"),
    "updates": Metric("", "lower", "teacher updates until the target"),
    "surprise": Metric("", "lower", "distance to the number of updates that SciPy predicts"),
}  # fmt: skip
SMALL = "small nets and few steps: this checks direction, not the paper's size"
CURRICULA = ("linear", "force", "fixed_temp")


def _beats(text: str, task: str, right, margin: float = 0.0, source: str = "abstract") -> Claim:
    return Claim(text, source, ("qarl", f"{task}/score"), ">=", (right, f"{task}/score"), margin, note=SMALL)  # fmt: skip


def _exact(text: str, metric: str, op: Any, bound: float) -> Claim:
    return Claim(text, "theory", ("exact", metric), op, bound, exact=True, note="solved, not learned")  # fmt: skip


CLAIMS = (
    _beats("Against a fresh adversary QARL is at least as good as RARL", "fresh", "rarl"),
    _beats("Over changed mass and friction QARL is at least as good as RARL", "grid", "rarl"),
    _beats("Without adversary QARL loses at most 5 % of the range to SAC", "none", ("sac", "sac_half"), -5.0),
    _beats("Over changed mass and friction QARL is at least as good as SAC", "grid", ("sac", "sac_half")),
    _beats("The Gamma teacher is no worse than the best other curriculum", "fresh", CURRICULA, 0.0, "ablation"),
    Claim("The curriculum arrives: mean temperature at most 0.002 at the end", "Section 4", ("qarl", "final_temperature"),
          "<=", 0.002, exact=True, note="a bound J_lb out of reach would freeze it"),
    _exact("Quantal response equilibria: fixed-point residual below 1e-6", "matrix/residual", "<=", 1e-6),
    _exact("A hot adversary is uniform", "matrix/uniform_gap", "<=", 0.02),
    _exact("A cold equilibrium is Nash: value within 0.01 of linear programming", "matrix/value_gap", "<=", 0.01),
    _exact("[[2, -1], [-1, 1]]: the worst case never falls as the adversary cools", "matrix/least_rise", ">=", -1e-9),
    _exact("and rises by more than 1 in all", "matrix/rise", ">=", 1.0),
    _exact("Markov games: cold value within 0.1 of Shapley's", "markov/value_gap", "<=", 0.1),
    _exact("A student always good enough meets the target in the predicted updates", "teacher/surprise", "<=", 0.0),
)  # fmt: skip
FIGURES = (
    Figure("Return by test", "bars", "score", ylabel="%"),
    Figure("Share of runs above a score, three tests together", "profile", "score", tasks=("none", "fresh", "grid")),
    Figure("Without adversary, heaviest pole, most friction", "filmstrip", "film", "film_step"),
    Figure("Return without adversary, by physics", "heatmap", "grid_map", xlabel="friction, cell", ylabel="mass, cell"),
    Figure("Protagonist's discounted return, last against the fresh adversary", "curve", "discounted_return", xlabel="turn"),
    Figure("Temperature of the adversary, drawn or learned", "curve", "temperature", xlabel="turn", logy=True),
    Figure("[[2, -1], [-1, 1]]: worst case", "line", "worst_case", "rationality", "t_y", "value", True),
    Figure("Random games", "line", "exploitability_path", "rationality", "t_y", "exploitability", True, True),
)  # fmt: skip
