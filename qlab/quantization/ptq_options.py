"""The options of the study, axis by axis, and the recipe that the held-out calibration images choose from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlab.lab.errors import UserError, nearest
from qlab.quantization.recon_losses import LOSSES
from qlab.quantization.rounding_optimizers import UNIT

Settings = Mapping[str, Any]

# AdaRound: all weights, no change of features, training images, squared error, rounding only, uniform grid, Adam.
BASE: Settings = {
    "rule": "sigmoid", "loss": "l2", "optimizer": "adam", "grid": "uniform", "constant": False,
    "select": "all", "share": 1.0, "reg": 1.0, "bias": 0.0, "scale": 0.0, "norm": 0.0,
    "drop": 0.0, "mix": 0.0, "noise": 0.0, "fp_input": False, "own_target": False,
    "calib": "train", "count": 256, "repeat": 0, "unit": "layer",
}  # fmt: skip
SETS = ("train", "classes", "photos", "synthetic")
# Of the job: what a program branches on. They change the scale of the best learning rate, so each is tuned.
BRANCHES = ("rule", "loss", "optimizer", "grid")
TUNED = (*BRANCHES, "constant", "unit")
# What the rates are multiplied with: plain gradients are small, signs are of size one; the straight-through variables
# are counted in grid steps (or in logarithms), of which V takes several to decide.
RATE = {"sgd": 1000.0, "momentum": 100.0, "lion": 0.3, "sign_sgd": 0.3}
RATE |= dict.fromkeys(("ste", "ste_free", "adaquant", "flexround"), 1 / 3)

OPTIONS: dict[str, Settings] = {
    "base": {},
    "a_random": {"select": "random", "share": 0.5},
    "a_magnitude": {"select": "magnitude", "share": 0.5},
    "a_importance": {"select": "importance", "share": 0.5},
    "a_middle": {"select": "middle"},
    "b_qdrop": {"drop": 0.5},
    "b_mixup": {"mix": 1.0},
    "b_noise": {"noise": 0.1},
    "c_classes": {"calib": "classes"},
    "c_photos": {"calib": "photos"},
    "c_synthetic": {"calib": "synthetic"},
    "c_16": {"count": 16},
    "c_64": {"count": 64},
    "c_768": {"count": 768},
    **{f"d_{name}": {"loss": name} for name in LOSSES if name != "l2"},
    "e_bias": {"bias": 1.0},
    "e_scale": {"scale": 1.0},
    "e_norm": {"norm": 1.0},
    "e_adaquant": {"rule": "adaquant"},
    "e_flexround": {"rule": "flexround"},
    "f_symmetric": {"grid": "symmetric"},
    "f_power": {"grid": "power"},
    "f_log2": {"grid": "log2"},
    "g_tanh": {"rule": "tanh"},
    "g_ste": {"rule": "ste"},
    "g_ste_free": {"rule": "ste_free"},
    **{f"g_{name}": {"optimizer": name} for name in UNIT if name != "adam"},
    "g_constant": {"constant": True},
    "h_block": {"unit": "block"},
    "h_net": {"unit": "net"},
    "x_fp_input": {"fp_input": True},
    "x_own_target": {"own_target": True},
    "rtn": {"select": "random", "share": 0.0},
    # the base again with other minibatches: what an axis without effect would show
    **{f"r_{i}": {"repeat": i} for i in range(1, 5)},
}


class Run(NamedTuple):
    """A lane to run: an option (or recipe) at a width and a learning rate. bits: f32[S, R] in place of the width."""

    option: str
    settings: Settings
    width: int
    rate: float
    bits: Any = None


def settings(name: str) -> dict[str, Any]:
    """All settings of an option; an unknown one is a one-line error."""
    if name not in OPTIONS:
        raise UserError(f"no option is called {name!r}{nearest(name, tuple(OPTIONS))}")
    return dict(BASE) | dict(OPTIONS[name])


def axis(name: str) -> str:
    """ "a" to "h", "x" (error correction off), "r" (repeats), "" for the base and nearest.

    >>> axis("d_l1"), axis("base")
    ('d', '')
    """
    return name.split("_")[0] if "_" in name else ""


def is_tuned(name: str) -> bool:
    """Whether an option has rates of its own to choose from; the others take the base's choice."""
    return name == "base" or any(key in OPTIONS[name] for key in TUNED)


def rates(option: Settings, grid: Sequence[float]) -> list[float]:
    factor = RATE.get(option["optimizer"], 1.0) * RATE.get(option["rule"], 1.0)
    return [lr * factor for lr in grid]


def shared(option: Settings) -> tuple[Any, ...]:
    """What lanes of one call must have in common."""
    augmented = bool(option["drop"] or option["mix"] or option["noise"])
    return (option["unit"], *(option[k] for k in BRANCHES), augmented)


def best(found: Mapping[str, float], names: Sequence[str]) -> str:
    """The option of least held-out KL; the base among equals."""
    return min(["base", *(n for n in names if n in found)], key=lambda n: found[n])


def recipe(found: Mapping[str, float], *, core: bool = False) -> dict[str, Any]:
    """The winners of the axes together, each chosen on its own by its held-out KL.

    Weights, features, calibration set, loss and grid come from their axes; biases, scales and norms are trained where
    that alone is better than the base; the variable is the best rule of axes E and G, the optimizer the best of G.

    Args:
      found: {option: held-out KL}. core: only what the abstract names as having best practices and a job decides
        (loss, grid, variable, optimizer).
    """

    def winner(*keys: str) -> dict[str, Any]:
        names = [
            n for n, change in OPTIONS.items() if change and set(change) <= set(keys) and axis(n)
        ]
        return dict(OPTIONS[best(found, names)])

    out = dict(BASE) | winner("loss") | winner("grid") | winner("rule")
    out |= winner("optimizer", "constant")
    if core:
        return out
    out |= winner("select", "share") | winner("drop", "mix", "noise") | winner("calib", "count")
    for gate in ("bias", "scale", "norm"):
        out |= winner(gate)
    if out["rule"] in ("adaquant", "flexround"):
        out["scale"] = 0.0  # these rules train the scale themselves
    return out
