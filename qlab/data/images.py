"""Image classification sets as NumPy arrays: pixels in [0, 1], fixed splits.

Letters: N examples, H height, W width, C channels.
"""

from typing import Any, NamedTuple

import numpy as np


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
