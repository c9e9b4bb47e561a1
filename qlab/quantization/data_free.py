"""Quantization without data: images made of what a net's batch norms remember, and a proof that no real one is near.

`zeroq_images` (Cai et al., CVPR 2020, arXiv 2001.00281) are calibration images for any method here that takes some.
Letters: N = samples, H, W, C = height, width, channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from qlab.nn.sites import BlockNet, Params
from qlab.quantization.bn_statistics import bn_stat_loss, net_bn_inputs


@partial(jax.jit, static_argnums=(0, 3, 4), static_argnames=("num_steps", "rate", "per_sample"))
def zeroq_images(
    net: BlockNet,
    params: Sequence[Params],
    key: jax.Array,
    num: int,
    shape: tuple[int, int, int],
    *,
    mean: float | jax.Array = 0.0,
    std: float | jax.Array = 1.0,
    num_steps: int = 500,
    rate: float = 0.1,
    per_sample: bool = False,
) -> jax.Array:
    """f32[num, H, W, C]: images whose statistics at every batch norm are those that the norm remembers.

    From Gaussian noise by Adam on bn_stat_loss (standard deviations) and the same distance of the images themselves
    from mean and std; the rate falls tenfold after 50 steps without progress.

    Args:
      net, params: with norms (`ResNet.net`), evaluation mode. shape: H, W, C.
      mean, std: of the inputs that the net was trained on, [] or [C], as published with a net for its preprocessing.
      per_sample: statistics of each image, as ZeroQ's code has it; False: of the batch, less noisy on small images.
    """
    plateau = optax.contrib.reduce_on_plateau(patience=50, min_scale=1e-3)
    optimizer = optax.chain(optax.adam(rate), plateau)
    own = (jnp.zeros(shape[-1]), jnp.ones(shape[-1]))

    def loss(u):
        _, seen, running = net_bn_inputs(net, params, mean + std * u)
        return bn_stat_loss(
            {**seen, "": u}, {**running, "": own}, per_sample=per_sample, spread="std"
        )

    def body(carry, _):
        u, state = carry
        value, grad = jax.value_and_grad(loss)(u)
        updates, state = optimizer.update(grad, state, u, value=value)
        return (optax.apply_updates(u, updates), state), None

    u = jax.random.normal(key, (num, *shape))
    last: Any = jax.lax.scan(body, (u, optimizer.init(u)), None, length=num_steps)[0]
    return mean + std * last[0]


def assert_data_free(step: Callable[[Any], Any], state: Any, images: np.ndarray) -> None:
    """Checks that a training step can see none of the images: not in its state, not in a constant of its program.

    The step is traced, not run. A step that could fetch data while it runs (a host callback) is refused too.

    Args:
      step: state -> anything. images: f32[N, H, W, C], the real ones, which only this check and the evaluator hold.
    Raises:
      AssertionError: an array holds an image, or the program calls back; the message names it.
    """
    images = np.asarray(images)
    width = images[0].size
    real = {np.ascontiguousarray(a).tobytes() for a in images.reshape(len(images), -1)}
    traced = jax.make_jaxpr(step)(state)
    for where, a in [*_leaves(state), *_constants(traced)]:
        if a.dtype != images.dtype or a.size % width:
            continue
        for row in np.ascontiguousarray(a).reshape(-1, width):
            if row.tobytes() in real:
                raise AssertionError(f"{where} of the training step holds a real image")


def _leaves(state: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            yield f"state{jax.tree_util.keystr(path)}", np.asarray(leaf)


def _constants(closed: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays closed over by a traced program, and by the programs it calls."""
    for a in closed.consts:
        if hasattr(a, "dtype") and not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            yield f"a constant {a.dtype}{list(a.shape)}", np.asarray(a)
    yield from _inner(closed.jaxpr)


def _inner(jaxpr: Any) -> Iterator[tuple[str, np.ndarray]]:
    for eqn in jaxpr.eqns:
        if "callback" in eqn.primitive.name:
            raise AssertionError(f"the training step calls the host ({eqn.primitive.name})")
        for v in eqn.invars:  # small constants may stand in the program itself
            if hasattr(v, "val") and hasattr(v.val, "dtype"):
                yield "a literal", np.asarray(v.val)
        for param in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if hasattr(param, "consts"):
                yield from _constants(param)
            elif hasattr(param, "eqns"):
                yield from _inner(param)


def _is_program(x: Any) -> bool:
    return hasattr(x, "consts") or hasattr(x, "eqns")
