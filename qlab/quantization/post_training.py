"""Post-training quantization of a chain of layers as an Experiment: the walk over units, for any method.

Every unit (a layer, a block of layers, the whole net) is a Phase of equal "rounds". A round takes some
gradient steps (or the closed form), hardens the unit as it then stands, and computes from the hardened
weights the inputs of the unit after. So a run may stop after any round, nothing is kept outside the
state, and the cost of hardening and of the prefix is spread over the steps of a round.

Bits, granularity, net (plain or outlier twin), calibration draw and method key are data along a task
axis T that is vmapped: one compiled round serves every task of an arm; units of one shape share it.

What a seed varies, each with a sub-key of its own (fold_in 0, 1, 2 of the seed's key): the trained net
(and its twin), the calibration draw, the method (order of minibatches, random initial values). Two tasks
may repeat another one with a fresh draw or a fresh method key: half their mean squared difference
estimates how much of the spread over seeds that part alone makes (`variance_split`).

Letters: T = tasks, n = units of one shape, N = calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Phase
from qlab.nn.chain import Chain, Layer, affine, forward
from qlab.quantization.grid import Grid, calibrate, nearest_codes, nearest_qtensor
from qlab.quantization.methods import Method, Unit, squared_error
from qlab.quantization.qtensor import QTensor, dequantize
from qlab.quantization.tasks import Task, storage, variance_split
from qlab.quantization.units import next_shape, plan_units, unit_layers

Target = Literal["same", "fp"]


class Group(NamedTuple):
    """The arrays of n units of one shape; per position in the unit a tuple entry with axes T, n.

    w, b: weights and biases. grid: their grids. q: the QTensors found so far. carry: the method's,
    of the unit at work. x_q, x_fp: its inputs; next_q, next_fp: inputs of the unit to come.
    error: f32[T, n, 2], layer MSE of the hardened unit and of rounding to nearest.
    fallbacks: f32[T, n]. b_q: biases of the quantized net, () where they are b.
    """

    w: tuple[jax.Array, ...]
    b: tuple[jax.Array, ...]
    grid: tuple[Grid, ...]
    q: tuple[QTensor, ...]
    carry: Any
    x_q: jax.Array
    x_fp: jax.Array
    next_q: jax.Array
    next_fp: jax.Array
    error: jax.Array
    fallbacks: jax.Array
    b_q: tuple[jax.Array, ...] = ()


class State(NamedTuple):
    key: jax.Array  # key[T], of the method
    step: jax.Array  # i32[], rounds done
    groups: tuple[Group, ...]


def post_training(
    chain: Chain,
    shapes: Sequence[tuple[int, ...]],
    nets: Callable[[jax.Array], Mapping[str, Sequence[Layer]]],
    pool: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    tasks: Sequence[Task],
    method: Method,
    *,
    target: Target = "fp",
    unit: str = "layer",
    num_calibration: int = 256,
    grid_options: Mapping[str, Any] | None = None,
    vary: Sequence[str] = ("net", "calibration", "method"),
    seed_layout: Literal["vmap", "map"] = "vmap",
    loop: Literal["scan", "step"] = "scan",
) -> Experiment[State]:
    """One arm of a comparison of weight-quantization methods.

    Args:
      chain: static part of the net. shapes: (out, in) of its layers.
      nets: key -> {net name: trained layers}, e.g. plain and twin.
      pool: f32[M, ...] images to draw calibration samples from. test: (images, labels i32).
      tasks: the cells; widths up to 8 bits.
      method: see qlab.quantization.methods.
      target: what a unit's output on quantized-prefix inputs is compared with: the float unit on
        float inputs ("fp") or on the same inputs ("same"). Must be equal over all arms.
      unit: "layer", "block" or "net". grid_options: of `calibrate` (symmetric, calibration, ...).
      vary: which of the three parts the seed decides; the others are
        the same for all seeds.

    Returns:
      An Experiment whose evaluate gives per task accuracy (%), fp_accuracy (%), mse_ratio
      (geometric mean over units of layer MSE / that of rounding to nearest on the same grid and
      inputs), moved and moved2 (% of weights one or more / two or more steps from nearest),
      stored_bits, bytes, fallbacks and sites_total; and the split of variance.
    """
    if target not in ("same", "fp"):
        raise ValueError(f'target={target!r}; use "same" or "fp"')
    if num_calibration > len(pool):
        raise ValueError(
            f"num_calibration={num_calibration}, but the pool holds {len(pool)} samples"
        )
    unknown = set(vary) - {"net", "calibration", "method"}
    if unknown:
        raise ValueError(f'vary={tuple(vary)}; use some of "net", "calibration", "method"')
    options = dict(grid_options or {})
    group = options.get("group", 0)
    if group and any(cols % group for _, cols in shapes):
        raise ValueError(
            f"group={group} does not divide the inputs of all layers "
            f"({', '.join(str(cols) for _, cols in shapes)}); use a divisor, or 0 for whole rows"
        )
    units = unit_layers(len(chain.names), "layer" if method.layerwise else unit)
    max_bits = max(t.bits for t in tasks)
    sample = jax.ShapeDtypeStruct((num_calibration, *pool.shape[1:]), jnp.float32)
    plans = plan_units(chain, shapes, units, sample, method.rounds)
    bits = jnp.array([t.bits for t in tasks])
    shared = jnp.array([t.granularity == "tensor" for t in tasks])
    make_grid = partial(calibrate, max_bits=max_bits, **options)
    make_grids = jax.jit(jax.vmap(jax.vmap(make_grid, (0, None, None))))

    def init(key: jax.Array) -> State:
        parts = {
            name: jax.random.fold_in(key if name in vary else jax.random.key(0), i)
            for i, name in enumerate(("net", "calibration", "method"))
        }
        made = nets(parts["net"])
        layers = [made[t.net] for t in tasks]
        draws = [jax.random.fold_in(parts["calibration"], t.draw) for t in tasks]
        images = jnp.stack(
            [pool[jax.random.permutation(k, len(pool))[:num_calibration]] for k in draws]
        )
        keys = jnp.stack([jax.random.fold_in(parts["method"], t.run) for t in tasks])
        x0 = jax.vmap(chain.pre[0])(images)
        groups: list[Group] = []
        x_shape = x0.shape
        for plan in plans:
            first = plan.layers[0]
            pick = partial(_gather, layers, plan.layers)
            w = tuple(pick(j, 0) for j in range(len(first)))
            b = tuple(pick(j, 1) for j in range(len(first)))
            grid = tuple(make_grids(a, bits, shared) for a in w)
            blank = jax.vmap(jax.vmap(method.blank or nearest_qtensor))
            q = tuple(blank(a, g) for a, g in zip(w, grid, strict=True))
            here = jax.tree.map(lambda a: a[:, 0], (w, grid))
            carry = jax.jit(jax.vmap(method.init))(*here, keys)
            x = x0 if plan.first == 0 else jnp.zeros(x_shape)
            n = len(plan.layers)
            groups.append(
                Group(
                    w,
                    b,
                    grid,
                    q,
                    carry,
                    jnp.zeros_like(x),
                    jnp.zeros_like(x),
                    x,
                    x,
                    jnp.ones((len(tasks), n, 2)),
                    jnp.zeros((len(tasks), n)),
                    b if method.biases else (),
                )
            )
            x_shape = next_shape(chain, plan, w, x_shape)
        return State(keys, jnp.zeros((), jnp.int32), tuple(groups))

    def make_step(g: int) -> Callable[[State], tuple[State, dict[str, jax.Array]]]:
        plan = plans[g]
        within = chain.pre[plan.layers[1][0]] if len(plan.layers) > 1 else None
        onward = chain.pre[plans[g + 1].layers[0][0]] if g + 1 < len(plans) else None

        def one_task(key, group: Group, i, local):
            """A round of one task; i = unit within the group, local = round within the unit."""
            at = partial(jax.tree.map, lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, False))
            w, b, grid = at(group.w), at(group.b), at(group.grid)
            new = partial(jax.tree.map, partial(jnp.where, local == 0))
            x_q, x_fp = new((group.next_q, group.next_fp), (group.x_q, group.x_fp))
            k_unit = jax.random.fold_in(key, plan.first // method.rounds + i)
            k_init, k_round = jax.random.split(k_unit)
            carry = new(method.init(w, grid, k_init), group.carry)

            def unit_forward(w_hat, x, b_hat=b):
                for j, (a, c) in enumerate(zip(w_hat, b_hat, strict=True)):
                    x = affine(Layer(a, c), x if j == 0 else chain.pre[plan.layers[0][j]](x))
                return x

            def unit_inputs(w_hat, x):
                xs = [x]
                for j, (a, c) in enumerate(zip(w_hat[:-1], b[:-1], strict=True)):
                    xs.append(chain.pre[plan.layers[0][j + 1]](affine(Layer(a, c), xs[-1])))
                return tuple(xs)

            y_fp = unit_forward(w, x_fp)
            y = y_fp if target == "fp" else unit_forward(w, x_q)
            # With target "same" the float input of a unit is its input behind the quantized prefix.
            x_ref = x_fp if target == "fp" else x_q
            task = Unit(w, grid, unit_forward, x_q, x_ref, y, b, unit_inputs)
            carry, loss = method.round(carry, task, k_round, local)
            q, fallbacks = method.hard(carry, task)
            b_q = method.biases(carry) if method.biases else b
            y_hat = unit_forward(tuple(map(dequantize, q)), x_q, b_q)
            y_near = unit_forward(
                tuple(dequantize(nearest_qtensor(a, c)) for a, c in zip(w, grid, strict=True)), x_q
            )
            error = jnp.stack([squared_error(y_hat, y), squared_error(y_near, y)])
            put = partial(
                jax.tree.map, lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, i, 0)
            )
            group = group._replace(
                q=put(group.q, q),
                carry=carry,
                x_q=x_q,
                x_fp=x_fp,
                error=put(group.error, error),
                fallbacks=put(group.fallbacks, fallbacks),
                b_q=put(group.b_q, b_q) if method.biases else (),
            )
            if within is not None:
                group = group._replace(next_q=within(y_hat), next_fp=within(y_fp))
            ahead = () if onward is None else (onward(y_hat), onward(y_fp))
            return group, ahead, loss / jnp.maximum(error[1], 1e-12), error

        def step(state: State):
            done = state.step - plan.first
            i, local = done // method.rounds, done % method.rounds
            run = jax.vmap(one_task, in_axes=(0, 0, None, None))
            group, ahead, loss, error = run(state.key, state.groups[g], i, local)
            groups = list(state.groups)
            groups[g] = group
            if ahead:
                groups[g + 1] = groups[g + 1]._replace(next_q=ahead[0], next_fp=ahead[1])
            ratio = error[:, 0] / jnp.maximum(error[:, 1], 1e-12)
            metrics = {"loss": loss.mean(), "mse_ratio": ratio.mean()}
            return State(state.key, state.step + 1, tuple(groups)), metrics

        return jax.jit(step)  # one object for all units of the group: traced once

    steps = [make_step(g) for g in range(len(plans))]
    phases = tuple(
        Phase("+".join(chain.names[i] for i in u), method.rounds, steps[g], loop)
        for g, plan in enumerate(plans)
        for u in plan.layers
    )
    x_test, y_test = jnp.asarray(test[0]), jnp.asarray(test[1])
    percent = 100.0 / len(y_test)

    def evaluate(state: State) -> dict[str, jax.Array]:
        def one_task(groups):
            layers, floats, moved = {}, {}, []
            for plan, group in zip(plans, groups, strict=True):
                for n, u in enumerate(plan.layers):
                    for j, layer in enumerate(u):
                        w, b, grid, q = jax.tree.map(
                            lambda a: a[n], (group.w[j], group.b[j], group.grid[j], group.q[j])
                        )
                        layers[layer] = Layer(dequantize(q), group.b_q[j][n] if group.b_q else b)
                        floats[layer] = Layer(w, b)
                        codes = q.codes[:, : w.shape[1]].astype(jnp.float32)
                        far = jnp.abs(codes - nearest_codes(w, grid))
                        moved.append(jnp.stack([(far >= 1).mean(), (far >= 2).mean()]) * 100.0)
            order = range(len(chain.names))
            hits = [
                (forward(chain, [net[i] for i in order], x_test).argmax(-1) == y_test).sum()
                for net in (layers, floats)
            ]
            error = jnp.concatenate([group.error for group in groups])
            floor = jnp.maximum(error, 1e-12)
            return {
                "hits": hits[0],
                "accuracy": hits[0] * percent,
                "fp_accuracy": hits[1] * percent,
                "mse_ratio": jnp.exp(jnp.log(floor[:, 0] / floor[:, 1]).mean()),
                "moved": jnp.stack(moved).mean(0)[0],
                "moved2": jnp.stack(moved).mean(0)[1],
                "fallbacks": sum(group.fallbacks.sum() for group in groups),
                "sites_total": jnp.float32(len(chain.names)),
            }

        values = jax.vmap(one_task)(state.groups)
        hits = values.pop("hits")
        stored = options | {"offset": state.groups[0].q[0].offset is not None}
        out = {}
        for t, task in enumerate(tasks):
            if task.draw == 0 and task.run == 0:
                out |= {f"{task.name}/{name}": v[t] for name, v in values.items()}
                out |= {
                    f"{task.name}/{k}": jnp.float32(v)
                    for k, v in storage(shapes, task, stored).items()
                }
        return out | variance_split(tasks, hits, percent)

    return Experiment(init, evaluate, phases, seed_layout)


def _gather(nets, units, position: int, field: int) -> jax.Array:
    """f32[T, n, ...]: a field (0 = w, 1 = b) of the layer at a position of each unit, per task."""
    return jnp.stack([jnp.stack([net[unit[position]][field] for unit in units]) for net in nets])
