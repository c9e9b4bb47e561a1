"""Text as bytes: one id a character, the usual 90/10 split."""

from typing import NamedTuple

import numpy as np

from qlab.data.files import read
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError


class Text(NamedTuple):
    """A text and its ids. Letters: N characters, V of them distinct.

    text: the N characters.
    ids: u8[N], indices into `vocab`.
    vocab: the V distinct characters, sorted.
    train, val: u8[...], the first nine tenths of `ids` and the rest.
    """

    text: str
    ids: np.ndarray
    vocab: tuple[str, ...]
    train: np.ndarray
    val: np.ndarray

    def decode(self, ids) -> str:
        """The characters of `ids`."""
        return "".join(self.vocab[i] for i in np.asarray(ids).tolist())


def parse_text(data: bytes, where: str) -> Text:
    """A text of single-byte (ASCII) characters.

    >>> t = parse_text(b"abracadabra", "spell.txt")
    >>> t.vocab, len(t.train), t.decode(t.val)
    (('a', 'b', 'c', 'd', 'r'), 9, 'ra')
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: byte {data[e.start]:#04x} at offset {e.start} is not ASCII; "
            "the file holds other data or is damaged"
        ) from e
    if len(text) < 10:
        raise UserError(f"{where}: {len(text)} characters, expected at least 10 for a 90/10 split")
    chars, ids = np.unique(np.frombuffer(data, np.uint8), return_inverse=True)
    ids = ids.astype(np.uint8)
    cut = len(ids) * 9 // 10
    return Text(text, ids, tuple(map(chr, chars.tolist())), ids[:cut], ids[cut:])


def tiny_shakespeare() -> Text:
    """Tiny Shakespeare: 1,115,394 characters, 65 distinct."""
    return parse_text(*read(DATASETS["tiny_shakespeare"], "input.txt"))
