"""The loop over one arm: all seeds together, phase after phase, in chunks of jitted steps.

What is carried between chunks, and saved, is a `Carry`: the stacked states of the seeds, the sums of
the metrics in the open log window, and which seeds are still alive. A chunk may end anywhere (the
sums are in the carry), so its length follows the clock without changing a bit of the result.
Letters: S = seeds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.experiment import Experiment, Phase

CHUNK_S = 1.0  # a chunk ends about this often, so that signals, bars and checkpoints are served


class Carry(NamedTuple):
    """Everything that changes in a phase.

    states: pytree with leading axis S. sums, counts: {metric: f32[S]} over the open log window, of
    its finite values. bad: i32[S], the step in this phase at which a seed's loss became non-finite,
    -1 while it is alive. done: i32[], steps done in this phase.
    """

    states: Any
    sums: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    bad: jax.Array
    done: jax.Array


class Window(NamedTuple):
    """Means over one log window: phase_step i at its end, {metric: float[S]}."""

    phase_step: int
    means: dict[str, np.ndarray]


def stack(states: list[Any]) -> Any:
    """List of S states -> one state with leading axis S."""
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *states)


def unstack(states: Any, num: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], states) for i in range(num)]


def shardings(num_seeds: int, layout: str) -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """(of arrays with a seed axis, of the rest): seeds that run side by side are spread over all
    devices where their number divides evenly, else everything is on the first device."""
    devices = jax.devices()
    if layout == "vmap" and len(devices) > 1 and num_seeds % len(devices) == 0:
        mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
        spec = jax.sharding.PartitionSpec
        return jax.sharding.NamedSharding(mesh, spec("seed")), jax.sharding.NamedSharding(
            mesh, spec()
        )
    one = jax.sharding.SingleDeviceSharding(devices[0])
    return one, one


def place(carry: Carry, num_seeds: int, layout: str) -> Carry:
    """The carry on its devices, as every compiled chunk takes and returns it."""
    seeds, rest = shardings(num_seeds, layout)
    states, sums, counts, bad = jax.device_put(carry[:4], seeds)
    return Carry(states, sums, counts, bad, jax.device_put(carry.done, rest))


def over_seeds(f: Callable[..., Any], layout: str) -> Callable[..., Any]:
    """f on one seed -> f on all, in one program: side by side (vmap) or one after another (map)."""
    if layout == "vmap":
        return jax.vmap(f)
    return lambda *args: jax.lax.map(lambda a: f(*a), args)


def begin(states: Any, phase: Phase, num_seeds: int, bad: np.ndarray) -> Carry:
    """The carry at the start of a phase; seeds that died in an earlier phase stay dead (bad = -2)."""
    names = metric_names(phase, states)
    zeros = {n: jnp.zeros(num_seeds, jnp.float32) for n in names}
    return Carry(
        states, zeros, jax.tree.map(jnp.copy, zeros), jnp.asarray(bad, jnp.int32), jnp.int32(0)
    )


def metric_names(phase: Phase, states: Any) -> tuple[str, ...]:
    """Names of the scalar metrics of a step, found without running it; a host phase sums on the host."""
    if phase.loop == "host":
        return ()
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
    out, metrics = jax.eval_shape(phase.step, one)
    _check_state(phase, one, out)
    for name, m in metrics.items():
        if m.shape != ():
            raise TypeError(
                f"phase {phase.name!r}: step metric {name!r} has shape {m.shape}; reduce it to a scalar"
            )
    return tuple(sorted(metrics))


def _check_state(phase: Phase, before: Any, after: Any) -> None:
    a = jax.tree_util.tree_flatten_with_path(before)[0]
    b = jax.tree_util.tree_flatten_with_path(after)[0]
    if len(a) != len(b) or jax.tree.structure(before) != jax.tree.structure(after):
        raise TypeError(f"phase {phase.name!r}: step changes the structure of the state")
    for (path, x), (_, y) in zip(a, b, strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            where = jax.tree_util.keystr(path)
            raise TypeError(
                f"phase {phase.name!r}: step changes leaf {where} from {x.dtype}{list(x.shape)} "
                f"to {y.dtype}{list(y.shape)}"
            )


def _step_seed(step: Callable, state: Any, sums: dict, counts: dict, bad: Any, done: Any) -> tuple:
    """One step of one seed: adds its metrics to the window, notes the first non-finite loss."""
    state, metrics = step(state)
    values = {n: jnp.asarray(metrics[n], jnp.float32) for n in sums}
    finite = {n: jnp.isfinite(v) for n, v in values.items()}
    sums = {n: sums[n] + jnp.where(finite[n], v, 0.0) for n, v in values.items()}
    counts = {n: counts[n] + finite[n] for n in sums}
    if "loss" in values:
        bad = jnp.where((bad == -1) & ~finite["loss"], done, bad)
    return state, sums, counts, bad


def _select(alive: jax.Array, new: Any, old: Any) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(alive.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def chunk_scan(phase: Phase, layout: str) -> Callable[[Carry, jax.Array], Carry]:
    """(carry, n) -> carry after n steps. n is traced: one compilation serves every length."""

    def seed_chunk(state, sums, counts, bad, done, n):
        def body(i, c):
            state, sums, counts, bad = c
            return _step_seed(phase.step, state, sums, counts, bad, done + i)

        return jax.lax.fori_loop(0, n, body, (state, sums, counts, bad))

    def chunk(carry: Carry, n: jax.Array) -> Carry:
        if layout == "vmap":
            states, sums, counts, bad = jax.vmap(seed_chunk, in_axes=(0, 0, 0, 0, None, None))(
                *carry, n
            )
        else:
            states, sums, counts, bad = jax.lax.map(
                lambda c: seed_chunk(c[0], c[1], c[2], c[3], carry.done, n), tuple(carry[:4])
            )
        # A seed that diverged keeps the state it had at the start of this chunk.
        states = _select(bad == -1, states, carry.states)
        return Carry(states, sums, counts, bad, carry.done + n)

    return chunk


def chunk_step(phase: Phase, layout: str) -> Callable[[Carry], Carry]:
    """carry -> carry after one step, with no loop in the program (convolutions on CPU)."""

    def one(carry: Carry) -> Carry:
        f = lambda st, s, c, b: _step_seed(phase.step, st, s, c, b, carry.done)  # noqa: E731
        states, sums, counts, bad = over_seeds(f, layout)(*carry[:4])
        return Carry(_select(bad == -1, states, carry.states), sums, counts, bad, carry.done + 1)

    return one


class Runner(NamedTuple):
    """advance(carry, n) -> carry after n steps, compiled."""

    advance: Callable[[Carry, int], Carry]


def _jit(chunk: Callable[..., Carry], carry: Carry) -> Any:
    """Jitted so that what comes out lies where what went in lay, and can go in again."""
    return jax.jit(chunk, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, carry))


def compile_phase(phase: Phase, carry: Carry, num_seeds: int, layout: str) -> Runner:
    """Compiles a phase for these shapes, ahead of time, so that the wait can be shown as such."""
    if phase.loop == "host":
        return Runner(lambda c, n: _host(phase, c, n, num_seeds))
    if phase.loop == "scan":
        program = _jit(chunk_scan(phase, layout), carry)
        compiled = program.lower(carry, np.int32(1)).compile()
        return Runner(lambda c, n: compiled(c, np.int32(n)))
    if layout == "vmap" or num_seeds == 1:
        # One seed alone goes through vmap too: lax.map would put its convolutions into a loop.
        compiled = _jit(chunk_step(phase, "vmap"), carry).lower(carry).compile()
        return Runner(lambda c, n: _repeat(compiled, c, n))
    part = _pick(carry, 0)
    compiled = _jit(chunk_step(phase, "vmap"), part).lower(part).compile()
    return Runner(lambda c, n: _one_by_one(compiled, c, n, num_seeds))


def _repeat(f: Callable[[Carry], Carry], carry: Carry, n: int) -> Carry:
    for _ in range(n):
        carry = f(carry)
    return carry


def _pick(carry: Carry, i: int) -> Carry:
    part = carry._replace(done=jnp.zeros(i + 1, jnp.int32))  # any array with a seed axis
    part = jax.tree.map(lambda x: x[i : i + 1], part)
    return part._replace(done=jnp.copy(carry.done))


def _one_by_one(f: Callable[[Carry], Carry], carry: Carry, n: int, num_seeds: int) -> Carry:
    parts = [_repeat(f, _pick(carry, i), n) for i in range(num_seeds)]
    done = parts[0].done
    parts = [p._replace(done=done[None]) for p in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)._replace(done=done)


def _host(phase: Phase, carry: Carry, n: int, num_seeds: int) -> Carry:
    states, rows = unstack(carry.states, num_seeds), []
    bad, done = np.array(carry.bad), int(carry.done)
    for _ in range(n):
        for i in range(num_seeds):
            if bad[i] != -1:
                rows.append({})
                continue
            states[i], metrics = phase.step(states[i])
            metrics = {k: float(v) for k, v in metrics.items()}
            if not np.isfinite(metrics.get("loss", 0.0)):
                bad[i] = done
            rows.append(metrics)
        done += 1
    names = sorted({k for r in rows for k in r})
    value = np.array([[r.get(k, np.nan) for k in names] for r in rows], np.float32)
    value = value.reshape(n, num_seeds, len(names))
    finite = np.isfinite(value)
    sums, counts = np.where(finite, value, 0).sum(0), finite.sum(0).astype(np.float32)
    old_s, old_c = carry.sums, carry.counts
    zero = np.zeros(num_seeds, np.float32)
    return Carry(
        stack(states),
        {k: np.asarray(old_s.get(k, zero)) + sums[:, j] for j, k in enumerate(names)},
        {k: np.asarray(old_c.get(k, zero)) + counts[:, j] for j, k in enumerate(names)},
        jnp.asarray(bad),
        jnp.int32(done),
    )


def run_phase(
    phase: Phase, carry: Carry, runner: Runner, log_points: int
) -> Iterator[tuple[Carry, Window | None]]:
    """Runs a phase to its end. Yields after every chunk the carry (the caller must not use an older
    one: its buffers are donated) and, where a log window closed, its means.

    Log windows depend only on num_steps and log_points, chunk ends also on the clock.
    """
    width = 1 if phase.loop == "host" else max(1, -(-phase.num_steps // max(log_points, 1)))
    n, done = 1, int(carry.done)
    while done < phase.num_steps:
        window_end = min((done // width + 1) * width, phase.num_steps)
        n_now = min(n, window_end - done)
        start = time.perf_counter()
        carry = runner.advance(carry, n_now)
        jax.block_until_ready(carry.done)
        per_step = (time.perf_counter() - start) / n_now
        n = max(1, min(int(CHUNK_S / max(per_step, 1e-9)), width))
        done += n_now
        window = None
        if done == window_end:
            sums, counts = jax.device_get((carry.sums, carry.counts))
            means = {
                k: np.where(counts[k] > 0, sums[k] / np.maximum(counts[k], 1), np.nan) for k in sums
            }
            window = Window(done, means)
            # A host phase has no sums between steps, so that its saved tree is always the same.
            sums, counts = ({}, {}) if phase.loop == "host" else _zeros(carry)
            carry = carry._replace(sums=sums, counts=counts)
        yield carry, window


def _zeros(carry: Carry) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """New sums and counts, placed as the carry's; one program for all, dispatched once a window."""
    one = next(iter(carry.sums.values()), None)
    return ({}, {}) if one is None else _zeros_program(tuple(carry.sums), one.shape, one.sharding)()


@functools.cache
def _zeros_program(names: tuple[str, ...], shape: tuple[int, ...], place: Any) -> Any:
    def zeros():
        return tuple({n: jnp.zeros(shape, jnp.float32) for n in names} for _ in range(2))

    return jax.jit(zeros, out_shardings=place)


def compile_evaluate(
    exp: Experiment, states: Any, num_seeds: int
) -> Callable[[Any], dict[str, np.ndarray]]:
    """states -> {metric: array[S, ...]} on the host."""
    if not exp.jittable:
        return lambda s: _evaluate_host(exp, s, num_seeds)
    program = jax.jit(over_seeds(exp.evaluate, exp.seed_layout)).lower(states).compile()
    return lambda s: {k: np.asarray(v) for k, v in program(s).items()}


def _evaluate_host(exp: Experiment, states: Any, num_seeds: int) -> dict[str, np.ndarray]:
    rows = [exp.evaluate(s) for s in unstack(states, num_seeds)]
    return {k: np.stack([np.asarray(r[k]) for r in rows]) for k in rows[0]}
