"""Post-training quantization: learned rounding and GPTQ beside plain PyTorch loops, compile time, memory.

Contestants of a task do the same work on the same data:
    qlab    the lab's own: whole loops under jit
    torch   the same algorithm as one writes it in PyTorch, eager, a Python loop over steps or columns
Tasks:
    adaround   Adam steps on the rounding of all weights of a transformer block, activations quantized too
    gptq       a square matrix: inverse factor of the Hessian and the loop over columns
    blocks     a net of identical blocks, quantized one after another (GPTQ): compiling, and a block after it
    memory     temporaries of those two programs, with four times the calibration samples over once
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches import ptq_peers
from qlab.benches.kernel_peers import Absent
from qlab.benches.measure import Number, Sample, Tell, find, interleave, ratio, seconds_per_call
from qlab.lab.experiment import Claim, Figure, Metric
from qlab.nn.vit import ViTSize, vit
from qlab.quantization import adaround
from qlab.quantization.activations import affine, minmax
from qlab.quantization.block_rounding import learn_block
from qlab.quantization.blocks import (
    fake_run,
    gptq_weight,
    nearest_weight,
    quantize_block,
    site_by_site,
)
from qlab.quantization.gptq import gptq_solve
from qlab.quantization.grid import calibrate
from qlab.quantization.methods import squared_error
from qlab.quantization.quantize_net import quantize_net

METRICS = {
    "steps_per_s": Metric("1/s", "higher", "gradient steps a second, compiled"),
    "ms": Metric("ms", "lower", "one matrix, compiled"),
    "loss": Metric("", "none", "what the contestant's weights leave of the objective"),
    "to_torch": Metric("times", "higher", "torch's time over this one's"),
    "compile_s": Metric("s", "lower", "first call of all blocks less a later one"),
    "block_ms": Metric("ms", "lower", "one block, compiled"),
    "temporaries_mb": Metric(
        "MB", "lower", "memory of the program beside its arguments and results"
    ),
    "growth": Metric("times", "lower", "temporaries with four times the samples over once"),
}


def _goal(text: str, name: str, relation: Any, target: float) -> Claim:
    return Claim(text, "goal", ("qlab", name), relation, target)


GOALS = (
    _goal("Block steps: 3 times a PyTorch loop", "adaround/to_torch", ">=", 3.0),
    _goal("GPTQ: 3 times the loop in PyTorch", "gptq/to_torch", ">=", 3.0),
    _goal("12 blocks compile in 10 s", "blocks/compile_s", "<=", 10.0),
    _goal("Steps: 1.1 times the memory at 4 times the samples", "memory_steps/growth", "<=", 1.1),
    _goal("A block: 1.1 times the memory at 4 times the samples", "memory_block/growth", "<=", 1.1),
)
FIGURES = (Figure("Over a PyTorch loop", "bars", "to_torch", ylabel="times"),)
SIZE = ViTSize()  # width 64, 16 tokens, four heads


def settings(quick: bool) -> dict[str, Any]:
    return {
        "steps": 100 if quick else 1000,
        "samples": 256,
        "batch": 32,
        "width": 256 if quick else 1024,
        "depth": 3 if quick else 12,
        "memory": not quick,
        "repetitions": 3 if quick else 7,
        "budget_s": 8.0 if quick else 90.0,
    }


def _blocks(samples: int, depth: int = 1):
    """(net, params, calibration images f32[samples, 8, 8, 1]) of random numbers."""
    net = vit(SIZE._replace(depth=depth))
    x = jax.random.uniform(jax.random.key(1), (samples, SIZE.size, SIZE.size, SIZE.channels))
    return net, net.init(jax.random.key(0)), x


def _minmax_act(i):
    return affine(*minmax(i.x), i.bits)


def _encoder(samples: int):
    """(block, params, x, y, the block to nearest at W4A8) of the first encoder block."""
    net, params, images = _blocks(samples)
    stem, encoder = (jax.tree.map(lambda a: a[0], p) for p in params[:2])
    x = net.groups[0].block(stem, images)
    block = net.groups[1].block
    made = partial(quantize_block, block, act=_minmax_act, weight=nearest_weight())
    q, _ = jax.jit(made)(encoder, x, x, jnp.float32(4), jnp.float32(8), jax.random.key(2))
    return block, encoder, x, block(encoder, x), q


def _learn(block, s: dict[str, Any]) -> Callable[..., Any]:
    rule = adaround()

    def run(q, x, y, key):
        return learn_block(
            block, q, x, y, jnp.float32(4), key, rule, num_iters=s["steps"], batch_size=s["batch"]
        )

    return jax.jit(run)


def steps(s: dict[str, Any]) -> list[Number]:
    """Gradient steps on one block."""
    block, params, x, y, q = _encoder(s["samples"])
    run, absent = _learn(block, s), []

    def timed(call: Callable[[], Any]) -> Sample:
        return {"steps_per_s": s["steps"] / seconds_per_call(call)}

    calls: dict[str, Callable[[], Any]] = {"qlab": lambda: run(q, x, y, jax.random.key(3))}
    grids = {
        site: calibrate(params[site]["kernel"].T, 4.0, False, max_bits=8, calibration="shares")
        for site in q.weights
    }
    try:
        calls["torch"] = ptq_peers.torch_adaround(
            params, q.acts, grids, x, y, SIZE.heads, s["steps"], s["batch"]
        )
    except Absent as e:
        absent = [Number("torch", "adaround/steps_per_s", status="absent", note=str(e))]

    def left(weights) -> Number:
        """The block's error with these weights."""
        done = block(params, x, fake_run(q._replace(weights=weights)))
        return Number("", "loss", (float(squared_error(done, y)),))

    found = [left(q.weights)._replace(arm="nearest")]
    for arm, call in calls.items():
        made = call()
        if arm == "torch":
            made = {k: grids[k].qtensor(jnp.asarray(v), v.shape) for k, v in made.items()}
        else:
            made = made.weights
        found.append(left(made)._replace(arm=arm))
    ways = {arm: partial(timed, call) for arm, call in calls.items()}
    found += interleave(ways, s["repetitions"], s["budget_s"])
    if "torch" in calls:
        found.append(ratio(found, "qlab", "torch", "steps_per_s", "to_torch"))
    return [n._replace(name=f"adaround/{n.name}") for n in found] + absent


def matrix(s: dict[str, Any]) -> list[Number]:
    """GPTQ of one matrix f32[width, width] at 4 bits."""
    n, rng = s["width"], np.random.default_rng(0)
    w = rng.normal(size=(n, n)).astype(np.float32)
    x = (rng.normal(size=(2 * n, n)) + rng.normal(size=(2 * n, 1))).astype(np.float32)
    h = x.T @ x / len(x)
    scale = np.abs(w).max(1, keepdims=True) / 7
    run = jax.jit(lambda w, h, s: gptq_solve(w, h, s, jnp.zeros_like(s), -8, 7)[0])
    operands = [jnp.asarray(a) for a in (w, h, scale)]
    calls: dict[str, Callable[[], Any]] = {"qlab": lambda: np.asarray(run(*operands))}
    found = []
    try:
        calls["torch"] = ptq_peers.torch_gptq(w, h, scale, -8, 7)
    except Absent as e:
        found = [Number("torch", "ms", status="absent", note=str(e))]

    def timed(call: Callable[[], Any]) -> Sample:
        return {"ms": 1e3 * seconds_per_call(call)}

    for arm, call in calls.items():
        error = call() * scale.astype(np.float64) - w
        loss = float(np.einsum("ri,ij,rj->", error, h.astype(np.float64), error) / n)
        found.append(Number(arm, "loss", (loss,)))
    ways = {arm: partial(timed, call) for arm, call in calls.items()}
    found += interleave(ways, s["repetitions"], s["budget_s"])
    if "torch" in calls:
        found.append(ratio(found, "torch", "qlab", "ms", "to_torch")._replace(arm="qlab"))
    return [n._replace(name=f"gptq/{n.name}") for n in found]


def blocks(s: dict[str, Any]) -> list[Number]:
    """A net of identical blocks: they share one program."""
    net, params, x = _blocks(s["samples"], s["depth"])
    method = site_by_site(act=_minmax_act, weight=gptq_weight())

    def once() -> float:
        begun = time.perf_counter()
        done = quantize_net(net, params, x, method, w_bits=4, a_bits=8)
        jax.block_until_ready(done.blocks)
        return time.perf_counter() - begun

    first = once()
    later = [once() for _ in range(3)]
    return [
        Number("qlab", "blocks/compile_s", (first - min(later),)),
        Number("qlab", "blocks/block_ms", tuple(1e3 * t / len(net.names) for t in later)),
    ]


def memory(s: dict[str, Any]) -> list[Number]:
    """Temporaries as the compiler counts them, at 1 and 4 times the samples."""

    def temporaries(f: Callable[..., Any], *args: Any) -> float:
        made = jax.jit(f).lower(*args).compile().memory_analysis()
        assert made is not None  # every backend that compiles this tells it
        return made.temp_size_in_bytes / 1e6

    found, bits, key = [], jnp.float32(4), jax.random.key(3)
    of: dict[str, list[float]] = {"memory_steps": [], "memory_block": []}
    for times in (1, 4):
        block, params, x, y, q = _encoder(times * s["samples"])
        of["memory_steps"].append(temporaries(_learn(block, s), q, x, y, key))
        walk = partial(quantize_block, block, act=_minmax_act, weight=gptq_weight())
        of["memory_block"].append(temporaries(walk, params, x, x, bits, bits, key))
    for task, (once, more) in of.items():
        found.append(Number("qlab", f"{task}/temporaries_mb", (once,)))
        found.append(Number("qlab", f"{task}/growth", (more / once,)))
    return found


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    numbers: list[Number] = []
    for part in (steps, matrix, blocks, *(memory,) * s["memory"]):
        tell(f"ptq: {(part.__doc__ or '').splitlines()[0]}")
        numbers += part(s)
    return numbers


def summary(numbers: list[Number]) -> str:
    number = lambda name: find(numbers, "qlab", name).median  # noqa: E731

    def over_torch(task: str) -> str:
        times = find(numbers, "qlab", f"{task}/to_torch")
        return f" ({times.median:.2g} x PyTorch)" if times.values else ""

    texts = [
        f"{number('adaround/steps_per_s'):.0f} block steps/s{over_torch('adaround')}",
        f"GPTQ {number('gptq/ms'):.3g} ms{over_torch('gptq')}",
        f"blocks compile in {number('blocks/compile_s'):.1f} s",
    ]
    growth = [find(numbers, "qlab", f"memory_{what}/growth") for what in ("steps", "block")]
    if all(n.values for n in growth):
        texts.append(
            "memory at 4 x the samples: {:.2f} x (steps), {:.2f} x (a block)".format(
                *(n.median for n in growth)
            )
        )
    return ", ".join(texts)
