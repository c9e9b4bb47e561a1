"""Sequences of ids: selective copying, generated, and windows of a text. Letters: N sequences, T ids."""

import numpy as np

from qlab.data.images import Classification
from qlab.data.text import Text
from qlab.lab.errors import UserError

NOISE, ASK = 0, 1  # ids of selective copying; the tokens to copy are 2, 3, ...


def selective_copy(
    length: int = 24, num_tokens: int = 4, num_kinds: int = 8, size: int = 8192
) -> Classification:
    """Selective copying (Gu & Dao, arXiv 2312.00752, sec. 4.1.1): tokens among noise, to be said again in order.

    The first `length` ids hold `num_tokens` tokens of `num_kinds` kinds at random places among noise (id 0);
    then come num_tokens times the id 1, whose outputs are the answer.

    Returns:
      x_*: i32[N, length + num_tokens]; y_*: i32[N, num_tokens], ids in 0 .. num_kinds + 1. `size` training
      sequences, and an eighth of that for validation and for test each.

    >>> s = selective_copy(length=6, num_tokens=2, size=8)
    >>> s.x_train.shape, s.y_train[0].tolist() == [i for i in s.x_train[0] if i > 1]
    ((8, 8), True)
    """
    if not 1 <= num_tokens <= length or num_kinds < 1 or size < 8:
        raise UserError(
            f"selective_copy(length={length}, num_tokens={num_tokens}, num_kinds={num_kinds}, "
            f"size={size}): use 1 <= num_tokens <= length, num_kinds >= 1 and size >= 8"
        )
    rng = np.random.RandomState(0)  # a stream frozen by NumPy's policy: the same set for ever

    def part(n: int):
        y = rng.randint(ASK + 1, ASK + 1 + num_kinds, (n, num_tokens)).astype(np.int32)
        x = np.full((n, length + num_tokens), NOISE, np.int32)
        at = np.sort(np.argsort(rng.rand(n, length), 1)[:, :num_tokens], 1)
        np.put_along_axis(x, at, y, 1)
        x[:, length:] = ASK
        return x, y

    return Classification(*part(size), *part(size // 8), *part(size // 8))


def windows(ids: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next ids, i32[N, T] each, of the windows of `length` that start every `stride` ids.

    >>> x, y = windows(np.arange(6), 2, 3)
    >>> x.tolist(), y.tolist()
    ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
    """
    starts = np.arange(0, len(ids) - length, stride)[:, None] + np.arange(length)
    return ids[starts].astype(np.int32), ids[starts + 1].astype(np.int32)


def next_char(text: Text, length: int = 64) -> Classification:
    """A text as windows of `length` characters with their next ones, i32[N, length].

    Training windows overlap by half. The held-out tenth is cut in two: validation, then test.
    """
    cut = len(text.val) // 2
    train = windows(text.train, length, max(length // 2, 1))
    val, test = (windows(part, length, length) for part in (text.val[:cut], text.val[cut:]))
    return Classification(*train, *val, *test)
