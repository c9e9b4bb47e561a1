"""Q* search (Agostinelli et al. 2021): A*, deferred A*, Q* and greedy search as the action space grows.

Lights Out 4x4 (A = 16, 136, 696: all sets of at most 1, 2, 3 presses) and the 8-puzzle (A = 4, 16, 52: all reduced
words of at most 1, 2, 3 moves), every action at cost 1. 100 fixed instances a task, drawn uniformly; the optimum is known
for every state. The h-net and the Q-net have the same layers, training states (goals scrambled by up to k_max moves),
number of states and updates; the labels are exact (h*(s) for one, Q*(s, a) for every a for the other: with the label of one
drawn action a state, config.target = "q_taken", Q has A times fewer and Q* falls behind A*). qstar_bootstrap learns Q as
the paper does, one drawn action a state against a target net. Weight w = 0.6 as for the cube; ties: larger g, then latest. A seed draws nets and their data.
Choices of ours: net sizes, instances, exact labels (bootstrapping h would need batch x A inputs an update).

    python -m qlab.run --config configs/q_star.py
    python -m qlab.run --config configs/q_star.py --config.w=1.0 --config.B=10
"""

from typing import Any

from qlab.lab.config import base, grid


def get_config(variant: str = "") -> Any:
    c = base(
        experiment="q_star",
        seeds=3,
        log_points=20,
        domain=("lightsout4", "puzzle8"),
        macro_depth=(1, 2, 3),
        eval_states=100,
        instance_seed=0,
        num_blocks=4,
        # search
        mode="qstar",
        w=0.6,
        B=1,
        stop="first",
        tie="lifo",
        lookahead=False,
        node_limit=2_000_000,
        max_nodes=dict(lightsout4=8192, puzzle8=1 << 18, puzzle15=1 << 20),
        # heuristic
        heuristic="net",  # net, exact, admissible
        read="q",  # value, q, min_q
        target="q",  # h, q (all actions labelled), q_taken, q_bootstrap (one drawn action a state)
        net=dict(widths=(128, 128), blocks=0),
        batch_size=256,
        train_steps=2000,
        k_max=dict(lightsout4=32, puzzle8=60, puzzle15=500),
        lr=1e-3,
        lr_decay=0.999,
        target_sync="loss",
        sync_loss=0.1,
        sync_every=100,
    )
    c.arms = dict(
        astar=dict(mode="astar", read="value", target="h"),
        astar_deferred=dict(mode="astar_deferred", read="value", target="h"),
        qstar=dict(),
        qstar_bootstrap=dict(target="q_bootstrap"),
        astar_minq=dict(mode="astar", read="min_q"),
        greedy=dict(mode="astar", read="value", target="h", w=0.0),
        admissible=dict(mode="astar", heuristic="admissible"),
    )
    if variant == "smoke":
        c.update(
            seeds=1,
            domain=("puzzle8",),
            macro_depth=(1,),
            eval_states=50,
            num_blocks=2,
            heuristic="exact",
            w=1.0,
        )
        c.arms = dict(
            astar=dict(mode="astar"), astar_deferred=dict(mode="astar_deferred"), qstar=dict()
        )
    if variant == "full":
        c.update(
            domain=("puzzle15",),
            macro_depth=(1,),
            batch_size=10_000,
            train_steps=1_000_000,
            B=1000,
            w=0.8,
        )
        c.net.widths, c.net.blocks = (5000, 1000), 4
        c.lr_decay = 0.9999993
        c.max_nodes.puzzle15 = 1 << 24
        c.arms = dict(
            qstar=dict(target="q_bootstrap"),
            astar_minq=dict(target="q_bootstrap", mode="astar", read="min_q"),
        )
    return c


def sweep():
    yield from grid({"w": (0.2, 0.6, 1.0), "B": (1, 10, 100), "stop": ("first", "bound")})
