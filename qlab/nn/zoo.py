"""Trained nets, made once and cached: `train(name, key)` is deterministic in its arguments.

Files lie in the user's own cache folder, named by a hash of everything that decides their content.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab import data
from qlab.data.sequences import next_char
from qlab.lab.errors import UserError, nearest
from qlab.nn.gpt import PRESETS, GPTSize, gpt
from qlab.nn.mamba import MambaSize, mamba
from qlab.nn.models import cnn, mlp
from qlab.nn.resnet import ResNetSize, resnet
from qlab.nn.vit import ViTSize, vit
from qlab.nn.vlm import VLMSize, vlm

RECIPE_VERSION = 1  # raise it when training changes: old cache files are then no longer found


class Net(Protocol):
    """What can be trained here: pure functions of a pytree of parameters."""

    def init(self, key: jax.Array) -> Any: ...
    def apply(self, params: Any, x: Any) -> jax.Array: ...


@runtime_checkable
class Learner(Net, Protocol):
    """A net that behaves otherwise in training and keeps running statistics among its params.

    learn: (logits, statistics moved on); keep: params with those in their place.
    """

    def learn(self, params: Any, x: Any) -> tuple[jax.Array, Any]: ...
    def keep(self, params: Any, stats: Any) -> Any: ...


# A family makes a net of its sizes: mlp of all widths, cnn of channels, others of their size record.
FAMILIES = {
    "mlp": mlp,
    "cnn": cnn,
    "vit": lambda sizes: vit(ViTSize(*sizes)),
    "mamba": lambda sizes: mamba(MambaSize(*sizes)),
    "resnet": lambda sizes: resnet(ResNetSize(*sizes)),
    "gpt": lambda sizes: gpt(GPTSize(*sizes)),
    "vlm": lambda sizes: vlm(VLMSize(*sizes)),
}


class Recipe(NamedTuple):
    """How a net of the zoo is made: AdamW, one cosine to 0 after a short warm-up."""

    kind: str  # a key of FAMILIES
    widths: tuple  # its sizes
    dataset: str
    num_steps: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    augment: int = 0  # images are shifted at random by up to so many pixels either way


ZOO = {
    # Narrow and deep: a net with no width to spare, where two bits hurt.
    "digits_deep": Recipe("mlp", (64,) + (24,) * 7 + (10,), "digits", 3000),
    "digits_wide": Recipe("mlp", (64, 64, 64, 10), "digits", 1000),
    "digits_small": Recipe("mlp", (64, 24, 24, 10), "digits", 600),
    "digits_shallow": Recipe("mlp", (64, 24, 10), "digits", 600),
    "digits_cnn": Recipe("cnn", (8, 16, 16), "digits", 800),
    "mnist_cnn": Recipe("cnn", (8, 16, 16), "mnist", 1200),
    # A transformer of 16 tokens, width 64, four blocks.
    "digits_vit": Recipe("vit", tuple(ViTSize()), "digits", 3000, 32, 2e-3, 0.1, augment=1),
    "digits_vit_small": Recipe("vit", (8, 1, 2, 32, 1, 2, 64, 10), "digits", 400, 32, 3e-3, 0.1),
    # ResNet-8 with batch norm on digits of 16 x 16, ResNet-20 on CIFAR-10.
    "digits_resnet": Recipe("resnet", tuple(ResNetSize()), "digits16", 500),
    "digits_resnet_small": Recipe(
        "resnet", tuple(ResNetSize(widths=(8,))), "digits16", 200, 32, 2e-2
    ),
    "cifar10_resnet": Recipe(
        "resnet",
        tuple(ResNetSize(3, (16, 32, 64), 3)),
        "cifar10",
        60_000,
        128,
        3e-3,
        5e-2,
        augment=4,
    ),
    # Mamba on digits scanned by row: 16 tokens, width 32, three blocks; the answer is the last token's.
    "digits_mamba": Recipe("mamba", tuple(MambaSize()), "digits", 400, 64, 4e-3, 0.1),
    "digits_mamba_small": Recipe(
        "mamba", tuple(MambaSize(dim=16, depth=2)), "digits", 100, 64, 1e-2
    ),
    "copy_mamba": Recipe(
        "mamba", tuple(MambaSize(vocab=10, depth=2, answers=4)), "selective_copy", 3000, 64, 4e-3
    ),
    "text_mamba": Recipe(
        "mamba",
        tuple(MambaSize(vocab=65, dim=64, outputs=65, answers=0)),
        "tiny_shakespeare",
        1500,
        32,
        4e-3,
    ),
    # Vision-language: a picture of a digit and a question of five words, answered with one.
    "digits_vlm": Recipe("vlm", tuple(VLMSize()), "digits_vqa", 1600, 16, 3e-3, 0.1),
    "digits_vlm_small": Recipe(
        "vlm",
        tuple(VLMSize(vision_dim=16, vision_depth=1, vision_hidden=32, dim=32, depth=1, hidden=64)),
        "digits_vqa",
        200,
        16,
        6e-3,
    ),
    "text_gpt": Recipe("gpt", tuple(PRESETS["tiny"]), "tiny_shakespeare", 1500, 32, 4e-3, 0.1),
    "text_mamba_large": Recipe(
        "mamba",
        tuple(
            MambaSize(
                vocab=65,
                dim=256,
                depth=8,
                states=16,
                rank=16,
                outputs=65,
                answers=0,
                scan="associative",
            )
        ),
        "tiny_shakespeare",
        5000,
        64,
        1e-3,
        0.1,
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; an unknown name is a one-line error."""
    if name not in ZOO:
        raise UserError(f"no net is called {name!r} in the zoo{nearest(name, tuple(ZOO))}")
    return ZOO[name]


@lru_cache
def model(kind: str, widths: tuple) -> Any:
    """The net of a family (kept: its functions are keys of compiled programs)."""
    return FAMILIES[kind](widths)


def train(name: str, key: jax.Array, *, cache: Path | None = None):
    """(model, params) of the zoo's net `name`, trained with `key` or read from the cache.

    Args:
      name: a key of ZOO. key: decides initialisation and order of the data.
      cache: folder of the files; None: the user's own cache folder.
    """
    r = recipe(name)
    net = model(r.kind, r.widths)
    path = (data.cache_dir("zoo") if cache is None else cache) / f"{name}-{_digest(r, key)}.npz"
    shapes = jax.eval_shape(net.init, key)
    params = _read(path, shapes)
    if params is None:
        set_ = examples(r.dataset)
        params = _fit(net, r, key, *jax.tree.map(jnp.asarray, (set_.x_train, set_.y_train)))
        _write(path, params)
    return net, params


def examples(dataset: str) -> Any:
    """Inputs and labels of a data set by its name; a text gives windows and their next characters."""
    set_ = data.load(dataset)
    return next_char(set_) if isinstance(set_, data.Text) else set_


def _digest(r: Recipe, key: jax.Array) -> str:
    what = [
        RECIPE_VERSION,
        r if r.augment else r[:-1],  # files of recipes from before `augment` are still found
        np.asarray(jax.random.key_data(key)).tolist(),
        str(jax.random.key_impl(key)),
    ]
    what += [jax.__version__, jax.default_backend()]  # other versions may round otherwise
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


@partial(jax.jit, static_argnums=(0, 1))
def _fit(net: Net, r: Recipe, key: jax.Array, x: Any, y: jax.Array):
    """All steps of training in one program; x f32[N, H, W, C], i32[N, T] or a dict of such, y i32[N] or i32[N, T]."""
    rate = optax.warmup_cosine_decay_schedule(0.0, r.learning_rate, r.num_steps // 20, r.num_steps)
    optimizer = optax.adamw(rate, weight_decay=r.weight_decay)
    k_init, k_data = jax.random.split(key)
    params = net.init(k_init)

    def loss_fn(params, images, labels):
        if isinstance(net, Learner):
            logits, stats = net.learn(params, images)
        else:
            logits, stats = net.apply(params, images), None
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

    def body(carry, i):
        params, opt_state = carry
        k_batch = jax.random.fold_in(k_data, i)
        batch = jax.random.randint(k_batch, (r.batch_size,), 0, len(y))
        images = jax.tree.map(lambda a: a[batch], x)
        if r.augment:
            images = _moved(images, r.augment, jax.random.fold_in(k_batch, 1))
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, images, y[batch])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        if isinstance(net, Learner):
            new = net.keep(new, stats)
        return (new, opt_state), None

    (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), jnp.arange(r.num_steps))
    return params


def _moved(x: Any, most: int, key: jax.Array) -> Any:
    """`shifted` images; of a dict its "image"."""
    if isinstance(x, dict):
        return x | {"image": shifted(x["image"], most, key)}
    return shifted(x, most, key)


def shifted(x: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Each image of f32[N, H, W, C] moved by its own draw from -most .. most in either axis, filled with 0.

    >>> moved = shifted(jnp.ones((50, 3, 3, 1)), 1, jax.random.key(0)).sum((1, 2, 3))
    >>> sorted({float(v) for v in moved})
    [4.0, 6.0, 9.0]
    """
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    at = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)
    cut = jax.vmap(lambda a, i: jax.lax.dynamic_slice(a, (i[0], i[1], 0), x.shape[1:]))
    return cut(padded, at)


def _read(path: Path, shapes):
    """Params from a cache file (its zip checksums are verified), None if it is absent or unfit."""
    if not path.is_file():
        return None
    leaves, tree = jax.tree.flatten(shapes)
    try:
        with np.load(path, allow_pickle=False) as f:
            found = [f[str(i)] for i in range(len(leaves))]
        if [(a.shape, a.dtype) for a in found] != [(a.shape, a.dtype) for a in leaves]:
            raise ValueError("other shapes than the recipe's")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as e:
        print(f"zoo: {path.name} is damaged ({e}); training again", flush=True)
        return None
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in found])


def _write(path: Path, params) -> None:
    """Whole or not at all: written beside, then renamed."""
    leaves = [np.asarray(a) for a in jax.tree.leaves(params)]
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            arrays: dict[str, Any] = {str(i): a for i, a in enumerate(leaves)}
            np.savez(f, **arrays)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Percent right, f32[]."""
    return 100.0 * (logits.argmax(-1) == labels).mean()
