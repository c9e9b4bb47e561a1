"""Q* search (Agostinelli et al. 2021): Q*, A*, deferred and greedy best-first search as the action space grows.

Paper: arXiv 2102.04518. Claims (abstract): with 157 times the actions on the cube, the time of Q* grows
less than 4-fold and its generated nodes less than 3-fold; it is up to 129 times faster and generates up
to 1288 times fewer nodes than A*. Q* keeps edges in OPEN at w g(s) + Q(s, a): one generated node and at
most one net input a pop, where A* generates and evaluates all children.

Here: 8-puzzle (181,440 states) and Lights Out 4 x 4 (4,096 reachable states) with macro-actions of up to
1, 2, 3 base moves at cost 1: 4, 16, 52 and 16, 136, 696 actions. 100 fixed instances, uniform over all
states; exact costs from breadth-first search and GF(2) elimination. For every arm: weight 0.6, one entry
popped at once, first goal, equal priorities larger g first and then the latest, entries whose node was
reached more cheaply since are skipped.
Nets: two layers of 128, 2000 updates of 256 states scrambled by U{0..k_max} base moves; the same layers,
states, updates and step size for all. Labels are exact: h*(s), or Q*(s, a) for every a (net="q_taken":
for one drawn action, as in the paper's loss; then Q falls behind at many actions). qstar_bootstrap has no
labels: target c + min Q_target of one drawn action, copied when the loss falls below a threshold.
Arms: astar and astar_deferred (edges at the parent's h: one generated node a pop without a Q; the
baseline to watch) with the h-net; qstar; astar_minq (h = min Q, which is not 0 at a goal, so that goals are
popped late); greedy (w = 0, h-net); admissible
(Manhattan distance / depth, lit cells / 5 / depth).
In the end each heuristic (min Q for qstar) is averaged over the states at each exact cost: all of Lights Out,
some 3000 of the 8-puzzle, drawn evenly over costs. h_error and h_over are its mean absolute error and share
of overestimates over all states but the goal, the drawn ones weighted for them.
Generated nodes are counted in one place for all arms: duplicates and illegal moves count, the root does not.
What to keep in mind: with an optimum near two macro-actions, A* on Lights Out cannot generate fewer than
about 1300 nodes at 696 actions and a perfect Q needs two, so the ratio measures how well a small net ranks
many actions. Many macros of the 8-puzzle end in the same state, and each such edge counts when popped.
"first" with w < 1 stops at the first goal generated (edges) or popped (A*), so Q* may pay in path cost.
:full is the cube with 12 and 1884 actions on DeepCubeA's test states (see python -m qlab.data), and
:puzzle15 the 15-puzzle, both bootstrapped, for a GPU.
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "puzzle15", "full")


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="q_star",
        seeds=3,
        domain=("lightsout4", "puzzle8"),
        macro_depth=(1, 2, 3),
        dedup=True,  # leave out macros that only repeat others (words with an undo, other orders)
        # Search.
        mode="astar",  # astar, astar_deferred, qstar
        heuristic="h",  # h, q, min_q, admissible, exact_h, exact_q
        w=0.6,
        B=1,  # entries popped at once
        stop="first",  # first, bound
        tie="lifo",  # lifo (larger g, then the latest), fifo (the earliest)
        node_limit=3000,  # for all arms; A* needs 1300 on average at 696 actions
        max_nodes=2_000_000,  # distinct states stored; no more than a domain has
        max_entries=0,  # written to OPEN, 4 bytes each; 0: those of 2 max_nodes states
        lookahead=False,  # edge modes: drop edges to stored states when pushing (generates all children)
        prune_stale=True,  # skip entries whose node was reached more cheaply since
        eval_states=100,
        block=50,  # instances per timed call
        instance_seed=2021,
        probe_states=4096,  # of a domain, at most; their exact costs are compared with the heuristic
        # Training.
        net="h",  # h, q, q_taken, q_bootstrap, none
        widths=(128, 128),
        blocks=0,
        train_steps=2000,
        train_batch=256,
        k_max={
            "lightsout4": 32,
            "puzzle8": 400,
            "puzzle15": 500,
            "puzzle24": 1000,
            "cube2": 20,
            "cube3": 30,
        },
        lr=3e-3,
        lr_decay=0.999,
        target_sync="loss",  # loss, every
        sync_loss=0.1,
        sync_every=100,
    )
    c.arms = {
        "astar": {},
        "astar_deferred": {"mode": "astar_deferred"},
        "qstar": {"mode": "qstar", "heuristic": "q", "net": "q"},
        "qstar_bootstrap": {"mode": "qstar", "heuristic": "q", "net": "q_bootstrap"},
        "astar_minq": {"heuristic": "min_q", "net": "q"},
        "greedy": {"w": 0.0},
        "admissible": {"heuristic": "admissible", "net": "none"},
    }
    if variant == "smoke":
        # Exact values from breadth-first search instead of nets, so w = 1 must give optimal costs.
        c.update(seeds=1, domain=("puzzle8",), macro_depth=(1,), eval_states=50, w=1.0)
        c.update(net="none", heuristic="exact_h")
        for arm in ("qstar_bootstrap", "astar_minq", "greedy", "admissible"):
            del c.arms[arm]
        c.arms["qstar"] = {"mode": "qstar", "heuristic": "exact_q"}
    if variant in ("full", "puzzle15"):
        # At the width of the paper family, bootstrapped: exact labels do not exist here.
        c.update(widths=(5000, 1000), blocks=4, train_steps=1_000_000, train_batch=10_000)
        c.update(lr=1e-3, lr_decay=0.9999993, net="q_bootstrap", block=10)
        c.update(node_limit=50_000_000, max_nodes=20_000_000, max_entries=1_000_000_000)
        c.arms = {
            "qstar": {"mode": "qstar", "heuristic": "q"},
            "astar_minq": {"heuristic": "min_q"},
            "greedy": {"heuristic": "min_q", "w": 0.0},
            "admissible": {"heuristic": "admissible", "net": "none"},
        }
    if variant == "full":  # 12 and 1884 actions, words counted as in the paper; DeepCubeA's states
        c.update(domain=("cube3",), macro_depth=(1, 3), dedup=False, sync_loss=0.06)
        c.update(w=0.6, B=10_000, eval_states=500)
    if variant == "puzzle15":
        c.update(domain=("puzzle15",), macro_depth=(1,), w=0.8, B=20_000)
    return c


def sweep():
    """What the counts depend on: weight, batch, stopping rule, ties, labels, target copies, net size."""
    puzzle, lights = {"domain": (("puzzle8",),)}, {"domain": (("lightsout4",),)}
    yield from grid(
        {**puzzle, "w": (0.2, 0.6, 1.0), "B": (1, 10, 100, 1000), "stop": ("first", "bound")}
    )
    yield from grid({**lights, "tie": ("lifo", "fifo"), "w": (0.6, 1.0)})
    yield from grid({**puzzle, "lookahead": (False, True), "prune_stale": (False, True)})
    yield from grid({**lights, "target_sync": ("loss", "every"), "lr": (1e-3, 3e-3)})
    yield from grid({"widths": ((128, 128), (512, 512)), "train_steps": (2000, 10_000)})
