"""AQ* quantum compiler (Chen et al. 2022): Q-guided best-first search for gate words, with and without inverses, one and two qubits.

Paper: arXiv 2204.06904. Claims (abstract, which gives no numbers): shorter words and less inference time than other RL
compilers; near-optimal length; inverse-free sets scale like inverse-closed ones; two-qubit operators. The thresholds
(90 %, 1.2 times the optimum, a third of Solovay-Kitaev, slope 1.6) are ours.

A state is the word's exact element and the target, R = W^dagger U what remains; choosing gate g sends R to g^dagger R;
a goal is d(R, I) < eps, d = sqrt(1 - |Tr R| / N). Costs 1 a gate. AQ* expands edges by w g + Q(R, g) (Q* search).
Sets: v_closed, v_free: (I + 2i P) / sqrt 5 with and without inverses; ht_closed {H, T, T+}, ht_free {H, T};
ht2_closed {H, T, T+ on each qubit, both CNOTs}. Targets, drawn anew by each seed and the same for all its arms:
Haar-random at three tolerances; random words of 8 to 12 letters (two qubits: 1 to 6), to be found exactly (eps 1e-3).
Nets: two layers of 128 on the Pauli-transfer matrix of R and log eps, one net a set for all tolerances, trained without
labels: c + min Q_target over all actions of states from random words of up to k_max letters, Adam 3e-3.
The optimum: exact enumeration of the group by length (Haar), meeting in the middle (words).
Arms: aqstar; greedy (beam of one); beam (64); astar (value net, trained the same way); uninformed (no net, breadth
first with exact duplicates removed, the baseline to watch); random (walks); enumeration (all listed elements: the
optimum and its time without making the table); sk (PennyLane's Solovay-Kitaev over {H, T, T+}).
Lengths are compared over the targets that both sides compiled: vs_sk with Solovay-Kitaev (how many: with_sk),
cost_gap with the optimum (solved), slope_ratio between two sets (slope_on). Where fewer are compiled, those are
the easy ones, and both sides of a comparison have the same.
All searches end at 2000 generated nodes. What that means: an eps-ball holds 1.2 eps^3 of PU(2), 1.5e-4 at 0.05, so
2000 distinct elements reach about a quarter of the targets without any guidance, and 20,000 nearly all: at a limit
of 1e5 every arm that removes duplicates would pass. At 0.2 the node limit alone solves everything.
What fits in ten minutes on two cores, for all arms alike: 50 targets a task and seed, training batches of 128.
Seen: the V nets find all targets at 0.05 (without a net a quarter to a third), {H, T, T+} two thirds. At 0.05 a
search without a net keeps below a third of Solovay-Kitaev's length too (on the 15 % that it compiles): those words
are long, so that claim asks little. At 0.2 not even the optimum does (0.5). The optimum's own slope ratio (1.51) straddles 1.6 with 50 targets a seed, so AQ*'s cannot be
decided either. Exact words of 8 to 12 V gates with inverses are out of reach of every arm at 2000 nodes.
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

CONVENTIONS = {
    "features": ("raw",),  # real and imaginary parts of the phase-fixed matrix
    "noise": (0.5,),  # training products multiplied by a rotation of up to half of eps
    "w": (0.6, 1.0),
    "target_sync": ("loss",),
    "net": ("q_bootstrap",),  # one sampled action a state instead of all
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="aq_star_compiler",
        seeds=3,
        sets=("v_closed", "v_free", "ht_closed", "ht_free", "ht2_closed"),
        eps=(0.2, 0.1, 0.05),
        exact_eps=1e-3,  # of the word targets; different elements of these lengths are further apart
        num_targets=50,
        block=50,
        word_lengths=dict(v_closed=(8, 12), v_free=(8, 12), ht_closed=(8, 12), ht_free=(8, 12), ht2_closed=(1, 6)),
        table_len=dict(v_closed=7, v_free=11, ht_closed=26, ht_free=36, ht2_closed=6),  # of the enumeration
        costs=(),  # of the gates, () = 1 each; for sets of one size
        # Search.
        solver="best_first",  # best_first, beam, random, enumeration, sk
        mode="qstar",
        heuristic="q",  # q, h, min_q
        w=0.8,
        B=8,  # entries popped at once
        node_limit=2000,
        width=64,  # of the beam, and walkers of the random search
        max_length=40,  # of the beam's and the walkers' words
        # Training.
        net="q_bootstrap_all",  # q_bootstrap_all, q_bootstrap, h_bootstrap, none
        features="ptm",  # ptm, raw
        noise=0.0,
        widths=(128, 128),
        blocks=0,
        train_steps=1000,
        train_batch=128,
        k_max=dict(v_closed=8, v_free=12, ht_closed=24, ht_free=32, ht2_closed=6),
        lr=3e-3,
        lr_decay=0.999,
        target_sync="every",
        sync_loss=0.1,
        sync_every=40,
    )  # fmt: skip
    c.arms = {
        "aqstar": {},
        "greedy": {"solver": "beam", "width": 1},
        "beam": {"solver": "beam"},
        "astar": {"mode": "astar", "heuristic": "h", "net": "h_bootstrap"},
        "uninformed": {"net": "none"},
        "random": {"solver": "random", "net": "none"},
        "enumeration": {"solver": "enumeration", "net": "none", "sets": c.sets[:4]},
        "sk": {"solver": "sk", "net": "none", "sets": ("ht_closed",)},
    }
    if variant == "smoke":
        c.update(seeds=1, sets=("v_closed",), eps=(), num_targets=20, block=20, train_steps=300)
        c.update(exact_eps=1e-5, node_limit=10_000)
        c.word_lengths.v_closed = (1, 4)
        c.table_len.v_closed = 4
        c.k_max.v_closed = 4
        for arm in ("greedy", "beam", "astar", "random", "enumeration", "sk"):
            del c.arms[arm]
    if variant == "full":  # for an accelerator: finer tolerances, wide nets, two qubits deeper
        c.update(eps=(0.05, 0.02, 0.01), node_limit=100_000, B=1000, widths=(4000, 1000), blocks=4)
        c.update(
            sets=("v_closed", "v_free", "ht_closed", "ht_free", "ht2_closed", "ht2_free", "native2")
        )
        c.update(train_steps=20_000, train_batch=2000, lr=1e-3, lr_decay=0.9999, sync_every=200)
        c.word_lengths = dict(v_closed=(10, 16), v_free=(10, 20), ht_closed=(20, 40), ht_free=(20, 40),
                              ht2_closed=(4, 8), ht2_free=(4, 8), native2=(4, 8))  # fmt: skip
        c.table_len = dict(
            v_closed=9, v_free=13, ht_closed=34, ht_free=48, ht2_closed=6, ht2_free=6, native2=5
        )
        c.k_max = dict(
            v_closed=14, v_free=20, ht_closed=50, ht_free=70, ht2_closed=10, ht2_free=10, native2=10
        )
    return c


def sweep():
    """What the lengths depend on: weight, batch, features, noise, reach of the training words, gate prices."""
    one = {"sets": (("v_closed",),)}
    yield from grid({**one, "w": (0.4, 0.8, 1.0), "B": (1, 8)})
    yield from grid({**one, "features": ("ptm", "raw"), "noise": (0.0, 0.5)})
    yield from grid({**one, "k_max.v_closed": (4, 8)})
    yield from grid({"sets": (("ht_closed",),), "costs": ((), (0.1, 1.0, 1.0))})
