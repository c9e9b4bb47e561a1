"""Image classification sets as NumPy arrays: pixels in [0, 1], fixed splits.

Letters: N examples, H height, W width, C channels.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from qlab.data.files import read
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError


class Classification(NamedTuple):
    """Three disjoint parts; validation comes out of the training part, never out of test.

    x_*: f32[N, H, W, C] in [0, 1] (f32[N, H*W*C] after `flat()`); y_*: i32[N].
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(max(self.y_train.max(), self.y_val.max(), self.y_test.max())) + 1

    def held_out(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) to judge on: of validation for "val" (to tune), else of test."""
        return (self.x_val, self.y_val) if split == "val" else (self.x_test, self.y_test)

    def flat(self) -> "Classification":
        """The same set with every image as one row: f32[N, H*W*C]."""

        def rows(x):
            return x.reshape(len(x), -1)

        return self._replace(
            x_train=rows(self.x_train), x_val=rows(self.x_val), x_test=rows(self.x_test)
        )


def stratified_pick(labels: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Which `num` examples to take so that every class keeps its share (largest remainder).

    Args:
      labels: i[N].
      num: how many to take.
      seed: fixes the choice.
    Returns:
      bool[N], exactly `num` true.

    >>> int(stratified_pick(np.array([0] * 6 + [1] * 3), 3, seed=0)[:6].sum())
    2
    """
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * num / counts.sum()
    take = np.floor(share).astype(int)
    # A stable sort gives equal remainders to the lower class: the choice is fixed for ever.
    order = np.argsort(-(share - take), kind="stable")
    take[order[: num - take.sum()]] += 1
    # RandomState's stream is frozen by NumPy's policy; Generator's may change between versions.
    rng = np.random.RandomState(seed)
    picked = np.zeros(len(labels), bool)
    for c, k in zip(classes, take, strict=True):
        picked[rng.permutation(np.flatnonzero(labels == c))[:k]] = True
    return picked


def digits() -> Classification:
    """scikit-learn's 1,797 handwritten 8x8 digits, split 1200 / 240 / 357 by class shares."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    x = (raw.images[..., None] / 16.0).astype(np.float32)
    y = raw.target.astype(np.int32)
    test = stratified_pick(y, 357, seed=0)
    rest = np.flatnonzero(~test)
    val = rest[stratified_pick(y[rest], 240, seed=1)]
    train = np.setdiff1d(rest, val)
    return Classification(x[train], y[train], x[val], y[val], x[test], y[test])


def digits16() -> Classification:
    """The same digits at 16x16, each pixel twice in either direction."""
    d = digits()

    def twice(x):
        return x.repeat(2, 1).repeat(2, 2)

    return d._replace(x_train=twice(d.x_train), x_val=twice(d.x_val), x_test=twice(d.x_test))


def from_uint8(x_train, y_train, x_test, y_test, num_val: int) -> Classification:
    """Scale pixels to [0, 1] and make the last `num_val` training examples the validation part.

    Args:
      x_train, x_test: u8[N, H, W, C]; y_train, y_test: u8[N].
    """

    def scale(x):
        return np.divide(x, 255, dtype=np.float32)

    def label(y):
        return y.astype(np.int32)

    cut = len(x_train) - num_val
    return Classification(
        scale(x_train[:cut]),
        label(y_train[:cut]),
        scale(x_train[cut:]),
        label(y_train[cut:]),
        scale(x_test),
        label(y_test),
    )


def check_labels(y: np.ndarray, num_classes: int, where: str) -> None:
    """One line that names the first label outside 0..num_classes - 1."""
    if y.size and y.max() >= num_classes:
        at = int(np.argmax(y >= num_classes))
        raise UserError(
            f"{where}: label {int(y[at])} at example {at}, expected 0..{num_classes - 1}; "
            "the file holds other data or is damaged"
        )


def parse_idx(data: bytes, where: str, num_dims: int) -> np.ndarray:
    """An idx file of bytes: magic 0x0800 + num_dims, big-endian sizes, then u8 values.

    Args:
      data: the gunzipped file.
      where: its name, for the error line.
      num_dims: 3 for images, 1 for labels.
    Returns:
      u8[...], `num_dims` axes.

    >>> parse_idx(b"\\0\\0\\x08\\x01" + b"\\0\\0\\0\\x02" + b"\\x07\\x09", "labels", 1).tolist()
    [7, 9]
    """
    header = 4 + 4 * num_dims
    if len(data) < header:
        raise UserError(
            f"{where}: {len(data)} bytes, expected at least {header} for an idx{num_dims} header; "
            "the file is truncated"
        )
    magic, want = int.from_bytes(data[:4], "big"), 0x0800 + num_dims
    if magic != want:
        raise UserError(
            f"{where}: magic number {magic:#010x}, expected {want:#010x} "
            f"(idx, unsigned bytes, {num_dims} dimensions); this is another kind of file"
        )
    shape = tuple(np.frombuffer(data, ">u4", num_dims, offset=4).tolist())
    size = header + math.prod(shape)
    if len(data) != size:
        what = "is truncated" if len(data) < size else "has trailing bytes"
        raise UserError(
            f"{where}: {len(data)} bytes, expected {size} for dimensions {shape}; the file {what}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def idx_pair(
    images: tuple[bytes, str], labels: tuple[bytes, str], side: int = 28, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[N, side, side, 1] and labels u8[N] from two idx files, each (contents, name)."""
    x, y = parse_idx(*images, num_dims=3), parse_idx(*labels, num_dims=1)
    if x.shape[1:] != (side, side):
        raise UserError(f"{images[1]}: images of {x.shape[1]}x{x.shape[2]}, expected {side}x{side}")
    if len(x) != len(y):
        raise UserError(
            f"{images[1]} has {len(x)} images but {labels[1]} has {len(y)} labels; "
            "take both from the same set"
        )
    check_labels(y, num_classes, labels[1])
    return x[..., None], y


def idx_set(name: str) -> Classification:
    """MNIST or Fashion-MNIST: the last 5,000 of the 60,000 training images are validation."""
    dataset = DATASETS[name]

    def pair(part):
        images = read(dataset, f"{part}-images-idx3-ubyte.gz")
        return idx_pair(images, read(dataset, f"{part}-labels-idx1-ubyte.gz"))

    return from_uint8(*pair("train"), *pair("t10k"), num_val=5000)
