"""What the runner's bench runs: steps of known length, and a clock around the runner's own functions."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab import arm as arms
from qlab.lab import checkpoint, loop
from qlab.lab import config as configs
from qlab.lab.console import Console
from qlab.lab.experiment import Experiment
from qlab.lab.signals import Stop

# ---- steps --------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """x f32[d] goes through w f32[d, d] again and again."""

    x: jax.Array
    w: jax.Array


def dense(width: int, depth: int) -> Callable[[], tuple[Callable, Callable]]:
    """depth products of width x width matrices a step: little state, and time that depth sets."""

    def make():
        def init(key):
            w = jax.random.normal(key, (width, width)) / np.sqrt(width)
            return Dense(jnp.ones((width, width)), w)

        def step(s):
            x = s.x
            for _ in range(depth):
                x = jnp.tanh(x @ s.w)
            return s._replace(x=x), {"loss": jnp.mean(x**2)}

        return init, step

    return make


class Train(NamedTuple):
    key: jax.Array
    step: jax.Array
    params: list[jax.Array]
    opt_state: Any


def mlp() -> tuple[Callable, Callable]:
    """Adam on a 64-128-128-10 net, batches of 128 drawn from 1500 samples held fixed."""
    widths = (64, 128, 128, 10)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((1500, 64)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 1500))
    tx = optax.adam(1e-3)

    def init(key):
        keys = jax.random.split(key, len(widths))
        pairs = zip(keys, widths[:-1], widths[1:], strict=False)
        params = [jax.random.normal(k, (a, b)) / np.sqrt(a) for k, a, b in pairs]
        return Train(keys[-1], jnp.int32(0), params, tx.init(params))

    def loss(params, x, y):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        logits = x @ params[-1]
        hits = (logits.argmax(-1) == y).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), hits

    def step(s):
        at = jax.random.randint(jax.random.fold_in(s.key, s.step), (128,), 0, len(images))
        (value, hits), grads = jax.value_and_grad(loss, has_aux=True)(
            s.params, images[at], labels[at]
        )
        updates, opt_state = tx.update(grads, s.opt_state)
        params: Any = optax.apply_updates(s.params, updates)
        norm = optax.global_norm(grads)
        metrics = {"loss": value, "accuracy": hits, "grad_norm": norm}
        return Train(s.key, s.step + 1, params, opt_state), metrics

    return init, step


STEPS = {"0.1ms": dense(64, 6), "1ms": dense(128, 12), "mlp": mlp}


# ---- clocks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, Any]]:
    """Times what the runner calls while it runs: the loop, the chunks in it, the checkpoints.

    cpu: processor time of the loop outside of its chunks.
    """
    t: dict[str, Any] = {"loop": 0.0, "chunks": 0.0, "cpu": 0.0, "windows": 0, "saves": []}
    compile_phase, run_phase, save = loop.compile_phase, loop.run_phase, checkpoint.save

    def timed_compile(*args):
        advance = compile_phase(*args).advance

        def timed(carry, n):
            start, cpu = time.perf_counter(), time.process_time()
            carry = jax.block_until_ready(advance(carry, n))
            t["chunks"] += time.perf_counter() - start
            t["cpu"] -= time.process_time() - cpu
            return carry

        return loop.Runner(timed)

    def timed_phase(*args):
        start, cpu = time.perf_counter(), time.process_time()
        for carry, window in run_phase(*args):
            t["windows"] += window is not None
            yield carry, window
        t["loop"] += time.perf_counter() - start
        t["cpu"] += time.process_time() - cpu

    def timed_save(*args):
        start = time.perf_counter()
        save(*args)
        t["saves"].append(time.perf_counter() - start)

    loop.compile_phase, loop.run_phase, checkpoint.save = timed_compile, timed_phase, timed_save
    try:
        yield t
    finally:
        loop.compile_phase, loop.run_phase, checkpoint.save = compile_phase, run_phase, save


def run_arm(exp: Experiment, seeds: int, **values: Any) -> dict[str, Any]:
    """One arm through qlab.lab.arm in a folder of its own; the clocks' times."""
    config = configs.arm_config(
        configs.base("bench", seeds=seeds, arms={"runner": {}}, **values), "runner"
    )
    columns = {"commit": ""}
    with tempfile.TemporaryDirectory(prefix="qlab-bench-") as folder, clocks() as t:
        context = arms.Context(Path(folder), "", columns, {}, Console(True), Stop(), "bench")
        arms.run_arm(lambda _: exp, config, context)
    return t
