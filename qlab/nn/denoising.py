"""Training and judging a denoiser: the noise of each image, the step, the scores.

The noise of image i is a function of (key, i) alone, so a fixed noisy set needs no storage, every arm of a study
sees the same one, and a resumed run too. With noise_mode "fresh" the epoch enters as well. Several nets train side by
side on the same batches, each for itself: one program, in which noise and order are drawn once. Letters as in
autoencoder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.errors import UserError, nearest
from qlab.nn import denoisers
from qlab.nn import image_quality as iq
from qlab.nn.autoencoder import Denoiser

NOISE_MODES = ("fixed", "fresh")
LOSSES = ("mse", "bce")
PARTS = ("train", "val", "test")


def noisy_images(
    key: jax.Array, part: str, x: jax.Array, index: jax.Array, sigma: float, epoch: Any = 0
) -> jax.Array:
    """The noisy versions of x f[N, S, S, 1], images `index` i32[N] of a part; each part has a stream of its own."""
    return _noisy(_stream(key, part, epoch), x, index, sigma)


def _stream(key: jax.Array, part: str, epoch: Any = 0) -> jax.Array:
    return jax.random.fold_in(key, len(PARTS) * epoch + PARTS.index(part))


def _noisy(stream: jax.Array, x: jax.Array, index: jax.Array, sigma: float) -> jax.Array:
    """Image i with the noise of fold_in(stream, i); a stream for all, or one an image."""
    keys = jax.vmap(jax.random.fold_in, (0 if stream.ndim else None, 0))(stream, index)
    return jax.vmap(iq.add_noise, (0, 0, None))(keys, x, sigma)


class Train(NamedTuple):
    """Everything that changes: params of each net, optimizer state, the step, and the two keys of a seed."""

    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    k_noise: jax.Array
    k_train: jax.Array  # order of the images, shots


class Training(NamedTuple):
    """init: key -> Train. step: Train -> (Train, metrics). num_steps: of all epochs."""

    init: Callable[[jax.Array], Train]
    step: Callable[[Train], tuple[Train, dict[str, jax.Array]]]
    num_steps: int


def seed_keys(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(noise, init, training) of a seed: the same for every arm."""
    k_noise, k_init, k_train = jax.random.split(key, 3)
    return k_noise, k_init, k_train


def training(
    nets: dict[str, Denoiser],
    images: jax.Array,
    *,
    sigma: float,
    epochs: int,
    batch: int = 32,
    lr: float = 1e-3,
    noise_mode: str = "fixed",
    loss: str = "mse",
) -> Training:
    """Adam on the error of the clean image given the noisy one, all images once an epoch in a new order.

    Args:
      nets: denoisers by name. images: clean, f32[N, S, S, 1]. sigma: of the noise.
      loss: "mse" (mean over pixels) or "bce"; the metric "loss" is its mean over the nets.
      batch: the last images of an epoch that fill no batch are left out.
    Raises:
      UserError: an unknown noise mode or loss, a negative sigma, or a batch larger than the data.
    """
    if noise_mode not in NOISE_MODES:
        raise UserError(f"noise_mode {noise_mode!r} is unknown{nearest(noise_mode, NOISE_MODES)}")
    if loss not in LOSSES:
        raise UserError(f"loss {loss!r} is unknown{nearest(loss, LOSSES)}")
    if not sigma >= 0:
        raise UserError(f"sigma={sigma}; the noise's standard deviation is 0 or more")
    if not 0 < batch <= len(images):
        raise UserError(f"batch={batch} with {len(images)} images; use 1..{len(images)}")
    per_epoch = len(images) // batch
    optimizer = optax.flatten(optax.adam(lr))  # one vector: a dozen small loops less to compile

    @jax.jit  # hundreds of small programs otherwise
    def init(key):
        k_noise, k_init, k_train = seed_keys(key)
        params = {name: net.init(k_init) for name, net in nets.items()}
        return Train(params, optimizer.init(params), jnp.int32(0), k_noise, k_train)

    def step(state):
        epoch, at = state.step // per_epoch, state.step % per_epoch
        k_order, k_shots, _ = jax.random.split(state.k_train, 3)
        order = jax.random.permutation(jax.random.fold_in(k_order, epoch), len(images))
        index = jax.lax.dynamic_slice_in_dim(order, at * batch, batch)
        x = images[index]
        draw = epoch if noise_mode == "fresh" else 0
        y = noisy_images(state.k_noise, "train", x, index, sigma, draw)

        def loss_of(net, params):
            logits = net.apply(params, y, jax.random.fold_in(k_shots, state.step))
            if loss == "bce":
                return optax.sigmoid_binary_cross_entropy(logits, x).mean()
            return ((jax.nn.sigmoid(logits) - x) ** 2).mean()

        # A sum: each net gets the gradient of its own error, and Adam acts on each number.
        def loss_fn(params):
            return sum(loss_of(net, params[name]) for name, net in nets.items())

        value, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), {"loss": value / len(nets)}  # fmt: skip

    return Training(init, step, epochs * per_epoch)


def in_batches(f: Callable[..., Any], arrays: tuple[jax.Array, ...], size: int = 256) -> Any:
    """f over the leading axis, `size` rows at a time in one loop (the rest filled up and cut off)."""
    num = len(arrays[0])
    rounds = -(-num // size)
    fill = [jnp.concatenate([a, a[:1].repeat(rounds * size - num, 0)]) for a in arrays]
    out = jax.lax.map(lambda z: f(*z), tuple(a.reshape(rounds, size, *a.shape[1:]) for a in fill))
    return jax.tree.map(lambda v: v.reshape(rounds * size, *v.shape[2:])[:num], out)


def scores(x: jax.Array, restored: jax.Array) -> dict[str, jax.Array]:
    """{"mse", "psnr", "ssim"}: f[N] of each image, by the window that fits it."""
    quality = iq.ssim(x, restored, **iq.ssim_for(x.shape[1]))
    return {"mse": iq.mse(x, restored), "psnr": iq.psnr(x, restored), "ssim": quality}


def evaluate(
    nets: dict[str, Denoiser], state: Train, parts: dict[str, jax.Array], sigma: float
) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """The scores f[N] and the cross-entropy "bce" f[N] of every part and net: {part: {net: {metric: f[N]}}}.

    Args:
      parts: name -> clean images f[N, S, S, 1]; all go through one loop, so that a net is compiled once.
    """
    _, _, k_shots = jax.random.split(state.k_train, 3)
    streams = [_stream(state.k_noise, p) for p in parts]
    which = jnp.concatenate([jnp.full(len(x), i) for i, x in enumerate(parts.values())])
    index = jnp.concatenate([jnp.arange(len(x)) for x in parts.values()])

    def some(x, i, part):
        y = _noisy(jnp.stack(streams)[part], x, i, sigma)
        k_batch = jax.random.fold_in(jax.random.fold_in(k_shots, i[0]), i[-1])

        def judge(net, params):
            logits = net.apply(params, y, k_batch)
            bce = optax.sigmoid_binary_cross_entropy(logits, x).mean((1, 2, 3))
            return scores(x, jax.nn.sigmoid(logits)) | {"bce": bce}

        return {name: judge(net, state.params[name]) for name, net in nets.items()}

    arrays = (jnp.concatenate(list(parts.values())), index, which)
    out = in_batches(some, arrays)
    at = np.cumsum([0] + [len(x) for x in parts.values()])
    cuts = zip(parts, itertools.pairwise(at), strict=True)
    return {p: jax.tree.map(lambda v: v[a:b], out) for p, (a, b) in cuts}


def evaluate_classical(
    name: str, rank: int, k_noise: jax.Array, parts: dict[str, jax.Array], part: str, sigma: float
) -> dict[str, dict[str, jax.Array]]:
    """A method of `denoisers`, fitted on parts["train"] and tuned on parts["val"] of the same noise the nets see.

    Returns:
      {"train": scores, part: scores}, each f[N] an image. Runs on the host.
    """
    noisy = jax.device_get(_noisy_parts(k_noise, parts, sigma))
    train, val = ((noisy[q], np.asarray(parts[q])) for q in ("train", "val"))
    run, _ = denoisers.fit(name, train, val, rank=rank)
    judged = {q: parts[q] for q in ("train", part)}
    restored = {q: np.asarray(run(noisy[q]), np.float32) for q in judged}
    return _scores_of_parts(judged, restored)


@functools.partial(jax.jit, static_argnums=2)
def _noisy_parts(key: jax.Array, parts: dict[str, jax.Array], sigma: float) -> dict[str, jax.Array]:
    return {q: noisy_images(key, q, x, jnp.arange(len(x)), sigma) for q, x in parts.items()}


@jax.jit
def _scores_of_parts(clean: dict[str, Any], restored: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(scores, clean, restored)


def over_cells(
    cells: dict[str, str], results: dict[str, dict[str, jax.Array]]
) -> dict[str, jax.Array]:
    """Results of nets as results of cells: "cell/metric", and "mean/metric" over the cells.

    Args:
      cells: cell -> the net that stands for it (several cells may share one). results: net -> {metric: f[]}.
    """
    names = next(iter(results.values()))
    table = {m: jnp.stack([results[net][m] for net in cells.values()]) for m in names}
    out = {f"{cell}/{m}": table[m][i] for m in names for i, cell in enumerate(cells)}
    return out | {f"mean/{m}": table[m].mean(0) for m in names}
