"""The study as an Experiment: one net an arm; options, recipe, mixed precision and closed forms from two programs.

Steps (one after another, a run may stop between any two): every option of the axes at every width, in calls of a few
lanes that share a compiled program; the recipe for each width; importances; nets of mixed widths; GPTQ and decoupleQ.

Learning rates and the recipe are chosen inside each run, for each width, by the KL to the float net on 256 held-out
training images; the test images are never looked at. Options that change loss, variable, grid or optimizer (a new
scale for the rate) are tuned over the same number of rates as the base; the others run at the base's rate.

What a seed varies, each with a key of its own (fold_in 0, 1, 2): the trained net, the calibration and held-out
images, the method (minibatches, random selections, random allocations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, Phase
from qlab.quantization import ptq_options as opt
from qlab.quantization.calibration_sets import photo_patches, remembered, synthetic
from qlab.quantization.gradient_ptq import METRICS, Data, site_importance, walk
from qlab.quantization.gradient_ptq_tables import PLANS, allocations, budget_name, summaries
from qlab.quantization.methods import Method
from qlab.quantization.ptq_options import Run
from qlab.quantization.ptq_stages import (
    Stages,
    forward,
    num_sites,
    site_inputs,
    weight_saliency,
)
from qlab.quantization.rounding_lanes import GRIDS, RULES, SELECTIONS, Job, Lane, Space

NUM_HELDOUT = 256
FIELDS = (*METRICS, "lr")


class Net(NamedTuple):
    """stages: {unit: how the net is walked}. params: (unit, trained) -> their params. plain: see `walk`."""

    stages: Mapping[str, Stages]
    params: Callable[[str, Any], Any]
    plain: bool


class Plan(NamedTuple):
    """The static side of a study."""

    options: tuple[str, ...]
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    num_iters: int
    batch_size: int
    reg_weight: float
    budgets: tuple[float, ...]
    menu: tuple[int, ...]
    midpoints: int
    closed: Mapping[str, Method]


class State(NamedTuple):
    """trained: the float net. data: per unit. table: f32[rows, FIELDS], one row a (task, width). importance:
    f32[3, B, S or S * R]."""

    step: jax.Array
    key: jax.Array
    trained: Any
    data: Any
    table: jax.Array
    omega: jax.Array
    row_omega: jax.Array


def study(
    net: Net,
    train: Callable[[jax.Array], Any],
    pool: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    plan: Plan,
) -> Experiment[State]:
    """One arm: a net through all options.

    Args:
      train: key -> trained net. pool: (images, labels) of training. test: (images, labels).
    Returns:
      An Experiment whose evaluate gives "w2_<option>/accuracy" and the like, and "axis_<a>/spread" and "/gain".
    """
    for name in plan.options:
        opt.settings(name)
    if "base" not in plan.options:
        raise UserError("options: the base is missing, which all others are compared with")
    widths, tasks = plan.widths, list(plan.options)
    recipes = ["recipe", "recipe_core"] if len(plan.options) > 1 else []
    mixed = [f"{p}_{budget_name(b)}" for b in plan.budgets for p in PLANS]
    rows = [(t, w) for t in (*tasks, *recipes, *plan.closed) for w in widths]
    rows += [(t, 0) for t in mixed]
    place = {row: i for i, row in enumerate(rows)}
    layer = net.stages["layer"]
    sites, most = num_sites(layer), max(s.rows for stage in layer for s in stage.sites)
    infos = [s for stage in layer for _ in range(stage.n) for s in stage.sites]
    lanes = len(plan.rates) * len(widths)
    calls = _calls(plan)
    space = _space(plan)
    sets = tuple(k for k in opt.SETS if k in {opt.settings(n)["calib"] for n in plan.options})
    most_images = max(opt.settings(n)["count"] for n in plan.options)
    if most_images + NUM_HELDOUT > len(pool[0]):
        raise UserError(
            f"{most_images} calibration and {NUM_HELDOUT} held-out images are more than the pool's {len(pool[0])}"
        )

    def init(key: jax.Array) -> State:
        k_net, k_draw, k_method = (jax.random.fold_in(key, i) for i in range(3))
        trained = train(k_net)
        order = np.asarray(jax.random.permutation(k_draw, len(pool[0])))
        held, drawn = order[:NUM_HELDOUT], order[NUM_HELDOUT:]
        params = net.params("layer", trained)
        bank = _bank(layer, params, pool, drawn, most_images, k_draw, sets)
        heldout, x_test = jnp.asarray(pool[0][held]), jnp.asarray(test[0])
        fp = _forward(layer, params, jnp.concatenate([heldout, x_test]))
        data = {}
        for unit, stages in net.stages.items():
            own = net.params(unit, trained)
            saliency = _saliency(stages, own, bank[0, :256])
            data[unit] = Data(bank, heldout, x_test, jnp.asarray(test[1]), fp, saliency)
        table = jnp.full((len(rows), len(FIELDS)), jnp.nan)
        omega = jnp.zeros((2, len(plan.menu), sites))
        row_omega = jnp.zeros((len(plan.menu), sites, most))
        return State(jnp.int32(0), k_method, trained, data, table, omega, row_omega)

    def call(state: State, runs: Sequence[Run]) -> dict[int, dict[str, float]]:
        """One call of the compiled walk; runs share job and unit. Spare lanes repeat the last run."""
        first = opt.shared(runs[0].settings)
        assert all(opt.shared(r.settings) == first for r in runs)
        unit = first[0]
        padded = [*runs, *[runs[-1]] * (lanes - len(runs))]
        lane = _lanes(padded, sites, most, state.key, sets)
        params = net.params(unit, state.trained)
        own = space if unit == "layer" else space._replace(
            rules=("sigmoid",), losses=("l2",), optimizers=("adam",), grids=("uniform",), batch_size=32,
            augment=False,
        )  # fmt: skip
        job = _job(runs[0].settings, own)
        plain = net.plain and unit == "layer"
        out = _walks(
            net.stages[unit], own, unit != "layer", plain, params, state.data[unit], lane, job
        )
        out = {k: np.asarray(v) for k, v in out.items()}
        return {
            i: {**{k: float(v[i]) for k, v in out.items()}, "lr": r.rate}
            for i, r in enumerate(runs)
        }

    def put(state: State, found: Mapping[tuple[str, int], Mapping[str, float]]) -> State:
        table = np.array(state.table)
        for row, values in found.items():
            table[place[row]] = [values[f] for f in FIELDS]
        return state._replace(table=jnp.asarray(table))

    def of(state: State, task: str, width: int) -> dict[str, float]:
        return dict(zip(FIELDS, np.asarray(state.table[place[task, width]]).tolist(), strict=True))

    def tuned(state: State, runs: Sequence[Run]) -> State:
        """Runs a call and keeps for each (option, width) the rate of least held-out KL."""
        out = call(state, runs)
        found: dict[tuple[str, int], dict[str, float]] = {}
        for i, r in enumerate(runs):
            at = (r.option, r.width)
            value = out[i]["heldout_kl"]
            if at not in found or value < found[at]["heldout_kl"]:
                found[at] = out[i]
        return put(state, found)

    def counted(step: Callable[[State, int], State], first: int):
        def one(state: State):
            i = int(state.step) - first
            state = step(state, i)
            return state._replace(step=state.step + 1), {"tasks": float(i + 1)}

        return one

    def option_step(state: State, i: int) -> State:
        runs = [
            r._replace(rate=of(state, "base", r.width)["lr"]) if np.isnan(r.rate) else r
            for r in calls[i]
        ]
        return tuned(state, runs)

    def recipe_step(state: State, i: int) -> State:
        width = widths[i]
        held = {n: of(state, n, width)["heldout_kl"] for n in plan.options}
        for name in recipes:
            chosen = opt.recipe(held, core=name == "recipe_core")
            runs = [Run(name, chosen, width, lr) for lr in opt.rates(chosen, plan.rates)]
            state = tuned(state, runs)
        return state

    def importance_step(state: State, i: int) -> State:
        params, x = net.params("layer", state.trained), state.data["layer"].bank[0, :256]
        values, by_row, error = _importance(layer, plan.midpoints, params, x, float(plan.menu[i]))
        return state._replace(
            omega=state.omega.at[:, i].set(jnp.stack([values, error])),
            row_omega=state.row_omega.at[i].set(by_row),
        )

    def mixed_step(state: State, i: int) -> State:
        budget = plan.budgets[i]
        seed = int(jax.random.randint(jax.random.fold_in(state.key, i), (), 0, 2**31 - 1))
        near = min(widths, key=lambda w: abs(w - budget))
        lr = of(state, "base", near)["lr"]
        bits = allocations(
            np.asarray(state.omega), np.asarray(state.row_omega), infos, plan.menu, budget, seed
        )
        base = opt.settings("base")
        runs = [Run(f"{p}_{budget_name(budget)}", base, 0, lr, bits[p]) for p in PLANS]
        for start in range(0, len(runs), lanes):
            state = tuned(state, runs[start : start + lanes])
        return state

    def closed_step(state: State, i: int) -> State:
        name = list(plan.closed)[i]
        base = opt.settings("base")
        lane = _lanes([Run(name, base, w, 0.0) for w in widths], sites, most, state.key, sets)
        params = net.params("layer", state.trained)
        out = _closed(layer, plan.closed[name], params, state.data["layer"], lane)
        found: dict[tuple[str, int], dict[str, float]] = {}
        for j, w in enumerate(widths):
            found[name, w] = {"lr": 0.0, **{k: float(v[j]) for k, v in out.items()}}
        return put(state, found)

    stretches = [
        ("options", len(calls), option_step),
        ("recipe", len(widths) * bool(recipes), recipe_step),
        ("importance", len(plan.menu) * bool(plan.budgets), importance_step),
        ("mixed precision", len(plan.budgets), mixed_step),
        ("closed forms", len(plan.closed), closed_step),
    ]
    phases, first = [], 0
    for name, count, step in stretches:
        if count:
            phases.append(Phase(name, count, counted(step, first), "host"))
        first += count

    def evaluate(state: State) -> dict[str, jax.Array]:
        table = np.asarray(state.table)
        num_held = state.data["layer"].heldout.shape[0]
        fp = np.asarray(state.data["layer"].fp[num_held:])
        fp_accuracy = 100.0 * (fp.argmax(-1) == np.asarray(test[1])).mean()
        out = {}
        for (task, width), i in place.items():
            name = f"w{width}_{task}" if width else f"mp_{task}"
            out |= {f"{name}/{f}": table[i, j] for j, f in enumerate(FIELDS)}
            out[f"{name}/soft_gap"] = table[i, 3] - table[i, 1]
        for width in widths:
            out[f"w{width}_base/fp_accuracy"] = fp_accuracy
        at = {row: of(state, *row) for row in place}
        out |= summaries(at, plan.options, widths)
        for b in plan.budgets:
            parts = [at[f"random_{j}_{budget_name(b)}", 0]["accuracy"] for j in range(2)]
            out[f"mp_random_{budget_name(b)}/accuracy"] = np.mean(parts)
        return {k: jnp.float32(v) for k, v in out.items()}

    return Experiment(init, evaluate, tuple(phases), seed_layout="map", jittable=False)


def _calls(plan: Plan) -> list[list[Run]]:
    """The options as calls: the base first, then the tuned ones alone, then the others packed by what they share."""
    lanes = len(plan.rates) * len(plan.widths)
    calls, rest = [], {}
    for name in plan.options:
        own = opt.settings(name)
        if opt.is_tuned(name):
            rates = opt.rates(own, plan.rates)
            calls.append([Run(name, own, w, lr) for w in plan.widths for lr in rates])
        else:
            runs = [Run(name, own, w, float("nan")) for w in plan.widths]
            rest.setdefault(opt.shared(own), []).extend(runs)
    calls.sort(key=lambda runs: runs[0].option != "base")
    for runs in rest.values():
        calls += [runs[i : i + lanes] for i in range(0, len(runs), lanes)]
    return calls


def _space(plan: Plan) -> Space:
    """What the options (and so the recipe) may branch on: a program without unused branches compiles faster."""
    own = [opt.settings(n) for n in plan.options]

    def used(key: str, every: Sequence[str]) -> tuple[str, ...]:
        return tuple(v for v in every if v in {o[key] for o in own})

    return Space(
        used("rule", RULES), used("loss", tuple(opt.LOSSES)), used("optimizer", tuple(opt.UNIT)),
        used("grid", GRIDS), plan.num_iters, plan.batch_size, plan.reg_weight,
        any(opt.shared(o)[-1] for o in own),
    )  # fmt: skip


def _job(s: opt.Settings, space: Space) -> Job:
    def at(names: Sequence[str], key: str) -> jax.Array:
        return jnp.int32(names.index(s[key]))

    return Job(
        at(space.rules, "rule"),
        at(space.losses, "loss"),
        at(space.optimizers, "optimizer"),
        at(space.grids, "grid"),
        jnp.asarray(opt.shared(s)[-1]),
    )


def _lanes(runs: Sequence[Run], sites: int, most: int, key: jax.Array, sets: Sequence[str]) -> Lane:
    def floats(k):
        return jnp.array([r.settings[k] for r in runs], jnp.float32)

    bits = [np.full((sites, most), r.width, np.float32) if r.bits is None else r.bits for r in runs]
    keys = [jax.random.fold_in(key, 1000 + r.settings["repeat"]) for r in runs]
    return Lane(
        lr=jnp.array([r.rate for r in runs], jnp.float32),
        constant=jnp.array([r.settings["constant"] for r in runs]),
        bits=jnp.asarray(np.stack(bits)),
        select=jnp.array([SELECTIONS.index(r.settings["select"]) for r in runs]),
        **{k: floats(k) for k in ("share", "reg", "bias", "scale", "norm", "drop", "mix", "noise")},
        fp_input=jnp.array([r.settings["fp_input"] for r in runs]),
        own_target=jnp.array([r.settings["own_target"] for r in runs]),
        calib=jnp.array([sets.index(r.settings["calib"]) for r in runs]),
        count=jnp.array([r.settings["count"] for r in runs]),
        key=jnp.stack(keys),
    )


def _bank(stages, params, pool, drawn, num: int, key, sets: Sequence[str]) -> jax.Array:
    """f32[sets, num, ...]; sets of 256 images are repeated up to `num`."""
    images, labels = pool
    shape = images.shape[1:]

    def made(name: str):
        if name == "train":
            return images[drawn[:num]]
        if name == "classes":
            return images[drawn[labels[drawn] < (labels.max() + 1) // 2][:256]]
        if name == "photos":
            seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
            return photo_patches(256, shape, seed)
        running = _remembered(stages, params, jnp.asarray(images))
        return np.asarray(synthetic(stages, params, running, key, (256, *shape)))

    return jnp.stack([jnp.asarray(np.resize(made(k), (num, *shape)), jnp.float32) for k in sets])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _walks(stages, space, joint, plain, params, data, lane, job):
    def one(lane):
        return walk(stages, params, data, lane, job, space, joint=joint, plain=plain)

    return jax.vmap(one)(lane)


@partial(jax.jit, static_argnums=(0, 1))
def _closed(stages, method, params, data, lane):
    def one(lane):
        job = _job(opt.settings("base"), Space())  # not looked at
        return walk(stages, params, data, lane, job, Space(), method=method)

    return jax.vmap(one)(lane)


@partial(jax.jit, static_argnums=(0, 1))
def _importance(stages, midpoints, params, x, bits):
    logits = forward(stages, params, x)
    return site_importance(stages, params, x, logits, bits, midpoints, 2)


_forward = partial(jax.jit, static_argnums=0)(forward)
_saliency = partial(jax.jit, static_argnums=0)(weight_saliency)
_remembered = partial(jax.jit, static_argnums=0)(
    lambda stages, params, x: remembered(site_inputs(stages, params, x))
)
