"""ARSQ (Liu et al. 2025): auto-regressive against independent, joint and cloned policies on suboptimal logs.

Paper: arXiv 2502.00288 (ICML 2025). Claim: 1.62 times the average D4RL return of the best value-based
baseline (CQN) when non-expert demonstrations are mixed in; a motivating example with one optimal mode
(r = 1) and two more frequent suboptimal ones (r = 0.1, r = -1).

Here: five tasks that can be solved exactly, learned from fixed logs.
  bandit        the motivating example, 2 dimensions x 5 bins, one step
  chain         5 states, 2 dimensions x 3 bins, reward needs both dimensions to agree; 20 % of the
                episodes by an expert, 40 % by a slow safe controller, 40 % by an uncoordinated one
  chain_expert  the same with 80 / 10 / 10 %
  separable     no coupling: Q is a sum over dimensions
  chain_1d      the chain with its nine joint actions as nine bins of one dimension
Score: exact discounted return of the greedy policy, 0 = uniform, 100 = optimal.

Arms: arsq; no_ar (the same net, tokens see coarser levels only); independent (CQN: C51, dueling,
per-dimension targets) and independent_scalar (the same without C51); flat (soft Q-learning over all
joint actions, the strong baseline wherever they can be listed); bc (auto-regressive behaviour cloning
of the best bc_filter share of the log). All have the same widths, batches, updates and log.

:control (also in its own run): control with demonstrations of mixed quality and own experience.
  gates         a point in a fence with two good gates and a side door, 2 dimensions (coupled); demonstrations
                20 % expert, 40 % medium (side door), 40 % bad (against the fence)
  gates_expert  the same with 80 / 10 / 10 %
  thrusters     a craft flies to a goal, each axis driven by the product of two thrusters, 4 dimensions (coupled)
  thrusters_separable  the same with their mean; pendulum: swing-up, 1 dimension (both controls without coupling)
20,000 demonstrated steps loaded first, then 12,800 own steps by 16 environments, 3 updates after each of their 800 steps
on minibatches of 64, half of them demonstrations. Score: undiscounted return of the greedy policy, 0 = uniform, 100 =
expert, mean of the last three of 16 evaluations over 16 episodes; gamma 0.97.
Arms: arsq, no_ar, independent (as above, L = 2, B = 5), flat_bins (independent with L = 1 and B = 25, as fine), sac (half of
each minibatch demonstrations, normalised critics: RLPD without its ensembles and many updates), bc
(auto-regressive cloning). All but sac imitate the best tenth of the demonstrations: arsq and no_ar with weight
lambda_bc = alpha, independent and flat_bins with the weight 1 that CQN publishes, bc alone.
Own demonstrations: --config.demos=mine.npz (arrays as in qlab.rl.demos) or minari:<id>, with one task of the same sizes, for example
--config.tasks="('pendulum',)" with a set recorded from Gymnasium's Pendulum and --config.demo_reward_scale=0.003. A task "brax:<environment>"
needs them; its score is 0 for uniform actions and 100 for the best demonstrated episode. CQN's relabelling of successful episodes is left out.
Not tuned arm by arm: lr 3e-4 and 2 x 64 units for all; tau 0.02 and 0.005 (sac) are the published defaults. alpha: an
action's entropy is worth at most 4 alpha log 5 on gates and has to stay below the cost of a step, 0.01. Tried on root
key 1000, for arsq alone (so it had looks that the other arms had not): without cloning (lambda_bc = 0; six points of lr
and alpha, 2 seeds) gates was at 22 to 99 after 50 steps of all environments and at 2 to 58 at the end, with V at
first states 0.6 to 1.5 above what followed: actions never seen lift V, the target passes it on, and only trying them
pulls it down; thrusters 14 to 41 (1 seed). lambda_bc = alpha kept 100 on gates, a tenth of it did not (1 seed, 500 steps).

Tuning of the rest, on other seeds (root key 1000, 3 seeds, 1000 updates; mean of final score and mean score over
bandit, chain, chain_expert): nine points for each arm, lr in {3e-4, 1e-3, 3e-3} times alpha in {0.001, 0.01,
0.1} (arsq, no_ar, flat), tau in {0.005, 0.02, 0.1} (independent) or bc_filter in {1, 0.3, 0.1} (bc); the default
was kept where it came within 0.1 points of the best. With alpha = 0.1 the soft optimum of the chain itself
lingers for its entropy (score -34), and arsq and flat both learn exactly that.
What to keep in mind: the tasks are tiny and made to be coupled, so ratios between arms are not the paper's;
on the expert-majority chain the expert has two equally good modes, and factorised arms that mix them up score
far below the uniform policy; cloning the best tenth of a noise-free log is a strong baseline.
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "control", "full")


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="arsq",
        seeds=5,
        tasks=("bandit", "chain", "chain_expert", "separable", "chain_1d"),
        bandit_bins=5,
        bandit_contexts=1,
        demo_mix=(0.2, 0.4, 0.4),  # expert, medium, bad: shares of the logged episodes
        expert_mix=(0.8, 0.1, 0.1),
        noise=0.1,  # share of uniform actions in every controller
        slip=0.0,  # chance that a move of the chain fails
        num_logged=2000,
        discount=0.9,
        # Agent.
        agent="arsq",
        L=1,  # levels
        B=0,  # bins a level; 0 takes the task's own
        dim_order="identity",
        conditioning="ar",  # ar, level or none
        action_mode="sample",  # sample (greedy per token when evaluated), greedy or beam
        alpha=0.01,
        reward_scale=1.0,
        lambda_td=1.0,
        lambda_bc=0.0,
        bc_filter=1.0,  # share of the log that cloning may imitate, best episodes first
        distribution="c51",
        v_min=-2.0,
        v_max=2.0,
        # Training, the same for all arms.
        hidden=(64, 64),
        lr=1e-3,
        weight_decay=0.0,
        tau=0.02,
        batch=128,
        updates=2000,
        updates_per_step=20,
        # Control only.
        demos="",  # "" = scripted controllers; or a file.npz, or minari:<id> (qlab.rl.demos)
        demo_reward_scale=1.0,  # multiplies the rewards of a file or set
        num_demos=20_000,
        action_noise=0.2,  # standard deviation added to every scripted action
        demo_fraction=0.5,  # of a minibatch; 1 learns from demonstrations alone
        env_steps=12_800,
        num_envs=16,
        utd=3,  # updates after each step of all environments
        learning_starts=500,
        replay_size=12_800,
        control_discount=0.97,
        eval_points=16,
        eval_episodes=16,
    )
    c.arms = {
        "arsq": {},
        "no_ar": {"conditioning": "level", "lr": 3e-4, "alpha": 0.001},
        "independent": {"agent": "cqn", "lr": 3e-4},
        "independent_scalar": {"agent": "cqn", "distribution": "scalar", "lr": 3e-4},
        "flat": {"agent": "joint_q"},
        "bc": {"lambda_td": 0.0, "lambda_bc": 1.0, "lr": 3e-4, "bc_filter": 0.1},
    }
    if variant == "smoke":
        # One shape for all tasks and fewer arms: compilation is nearly all of the time.
        c.update(seeds=2, tasks=("bandit", "chain", "separable"), bandit_bins=3, bandit_contexts=5)
        c.update(updates=400, num_logged=500, hidden=(32,), log_points=20)
        c.update(env_steps=640, num_demos=1600, replay_size=1600, learning_starts=32, eval_points=5)
        c.arms["arsq"] = {"tasks": ("bandit", "chain", "separable", "gates")}
        for arm in ("no_ar", "independent_scalar", "flat", "bc"):
            del c.arms[arm]
    if variant == "control":
        c.update(tasks=("gates", "gates_expert", "thrusters", "thrusters_separable", "pendulum"))
        c.update(L=2, B=5, batch=64, lr=3e-4, alpha=1e-3, lambda_bc=1e-3, bc_filter=0.1)
        c.log_points = 16
        c.arms = {
            "arsq": {},
            "no_ar": {"conditioning": "level"},
            "independent": {"agent": "cqn", "lambda_bc": 1.0},
            "flat_bins": {"agent": "cqn", "lambda_bc": 1.0, "L": 1, "B": 25},
            "sac": {"agent": "sac", "alpha": 0.01, "tau": 0.005},
            "bc": {"lambda_td": 0.0, "lambda_bc": 1.0, "demo_fraction": 1.0},
        }
    if variant == "full":
        # The parent's network and more of everything; D4RL and RLBench themselves are not in this lab.
        c.update(seeds=20, hidden=(512, 512), batch=256, updates=20_000, num_logged=20_000)
        # control is a variant of its own: --config configs/arsq.py:control --config.env_steps=1000000 ...
    return c


def sweep():
    """The paper's knobs: temperature, order of the dimensions, levels x bins, quality of the data."""
    tasks = {"tasks": (("bandit", "chain"),)}
    yield from grid({**tasks, "alpha": (0.001, 0.01, 0.1, 1.0)})
    yield from grid({**tasks, "dim_order": ("identity", "reverse", "random")})
    yield from grid({"tasks": (("chain",),), "L": (1,), "B": (3, 9)})
    yield from grid({"tasks": (("chain",),), "L": (2,), "B": (3,)})  # as fine as 1 x 9
    yield from grid(
        {
            **tasks,
            "demo_mix": ((0.05, 0.15, 0.8), (0.2, 0.4, 0.4), (0.5, 0.25, 0.25), (0.9, 0.05, 0.05)),
        }
    )
    yield from grid({**tasks, "lambda_bc": (0.0, 0.1, 1.0), "bc_filter": (0.2, 1.0)})
    yield from grid({**tasks, "num_logged": (200, 2000), "slip": (0.0, 0.2)})
    yield from grid({**tasks, "conditioning": ("ar", "level", "none"), "L": (2,), "B": (3,)})
    # The same in control, on the coupled task whose joint actions can still be listed.
    gates = {"tasks": (("gates",),), "lr": (3e-4,), "batch": (64,), "bc_filter": (0.1,)}
    yield from grid({**gates, "L": (2,), "B": (5,), "alpha": (1e-4, 1e-3, 1e-2)})
    yield from grid(
        {**gates, "L": (1,), "B": (25,), "alpha": (1e-3,), "demo_fraction": (0.25, 0.5)}
    )
    mixes = {"demo_mix": ((0.05, 0.15, 0.8), (0.2, 0.4, 0.4), (0.9, 0.05, 0.05))}
    yield from grid(
        {**gates, "L": (2,), "B": (5,), "alpha": (1e-3,), "lambda_bc": (0.0, 1e-3), **mixes}
    )
