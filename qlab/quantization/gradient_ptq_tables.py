"""What a study's numbers add up to: the range and the gain of each axis, and which row gets how many bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qlab.quantization import ptq_options as opt
from qlab.quantization.bit_allocation import greedy_bits, random_bits, solve_bits
from qlab.quantization.ptq_stages import SiteInfo

PLANS = ("ig", "ig_rows", "greedy", "mse", "random_0", "random_1")


def budget_name(budget: float) -> str:
    """Of a budget in bits a weight, for names of tasks.

    >>> budget_name(2.5), budget_name(3.0)
    ('2p5', '3')
    """
    return f"{budget:g}".replace(".", "p")


def summaries(
    at: Mapping[tuple[str, int], Mapping[str, float]], options: Sequence[str], widths: Sequence[int]
) -> dict[str, float]:
    """Per axis, means over widths. spread: range of test accuracy over base and options; spread_rest: without the
    worst of them; gain: what the option that the held-out images choose adds to the base on test images."""
    out: dict[str, float] = {}
    axes = sorted({opt.axis(n) for n in options} - {""})
    for a in axes:
        names = ["base", *(n for n in options if opt.axis(n) == a)]
        spread, rest, gain = [], [], []
        for w in widths:
            values = sorted(at[n, w]["accuracy"] for n in names)
            spread.append(values[-1] - values[0])
            rest.append(values[-1] - values[1])
            held = {n: at[n, w]["heldout_kl"] for n in names}
            gain.append(at[opt.best(held, names[1:]), w]["accuracy"] - at["base", w]["accuracy"])
        out |= {
            f"axis_{a}/spread": float(np.mean(spread)),
            f"axis_{a}/spread_rest": float(np.mean(rest)),
            f"axis_{a}/gain": float(np.mean(gain)),
        }
    for group in ("abc", "defg"):
        own = [a for a in axes if a in group]
        for what in ("spread", "spread_rest", "gain") if own else ():
            out[f"axes_{group}/{what}"] = float(np.mean([out[f"axis_{a}/{what}"] for a in own]))
    return out


def allocations(
    omega: np.ndarray,
    row_omega: np.ndarray,
    infos: Sequence[SiteInfo],
    menu: Sequence[int],
    budget: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """{plan: f32[S, R] bits of every row}, of at most `budget` bits a weight.

    ig: by importance, exactly solved; ig_rows: every row a layer of its own; greedy: importance, greedy; mse: by the
    squared error of the weights; random_*: at random.

    Args:
      omega: f[2, B, S], importance and squared error. row_omega: f[B, S, R]. infos: of the sites. menu: widths.
    """
    sizes = np.array([s.rows * s.columns for s in infos])
    cost = sizes[:, None] * np.array(menu)
    room = budget * sizes.sum()
    rng = np.random.default_rng(seed)
    most = row_omega.shape[-1]
    by_site = {
        "ig": solve_bits(omega[0].T, cost, room),
        "greedy": greedy_bits(omega[0].T, cost, room),
        "mse": solve_bits(omega[1].T, cost, room),
        **{f"random_{j}": random_bits(rng, cost, room) for j in range(2)},
    }
    bits = np.array(menu, np.float32)
    out = {k: np.repeat(bits[v][:, None], most, 1) for k, v in by_site.items()}
    rows = [(s, r) for s, info in enumerate(infos) for r in range(info.rows)]
    values = np.stack([row_omega[:, s, r] for s, r in rows])
    row_cost = np.array([infos[s].columns for s, _ in rows])[:, None] * np.array(menu)
    by_row = np.full(row_omega.shape[1:], bits[0], np.float32)
    for (s, r), column in zip(rows, solve_bits(values, row_cost, room), strict=True):
        by_row[s, r] = bits[column]
    return out | {"ig_rows": by_row}
