"""DigitsVQA: five questions about each of scikit-learn's digits, with known answers of one word.

Every question has five words, so that all have one length. Letters: N pictures, R = 5 questions, Q = 5 words.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from qlab.data.images import digits

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOPS = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)  # closed loops of 0 to 9 as printed; the four is open


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


# Name of the question: (its words, digit -> answer).
QUESTIONS: Mapping[str, tuple[str, Callable[[int], str]]] = {
    "digit": ("which digit is this ?", lambda d: NUMBERS[d]),
    "odd": ("is this digit odd ?", lambda d: _yes(d % 2 == 1)),
    "above": ("is it above four ?", lambda d: _yes(d > 4)),
    "next": ("which digit comes next ?", lambda d: NUMBERS[(d + 1) % 10]),
    "loops": ("how many closed loops ?", lambda d: NUMBERS[LOOPS[d]]),
}
VOCABULARY = tuple(
    dict.fromkeys(
        [w for text, _ in QUESTIONS.values() for w in text.split()] + ["yes", "no", *NUMBERS]
    )
)


class VQA(NamedTuple):
    """Three disjoint parts of pictures with all questions, in the order of QUESTIONS, about each.

    x_*: {"image": f32[N, 8, 8, 1] in [0, 1], "question": i32[N, R, Q]}; y_*: i32[N, R], the answers. Ids are
    places in VOCABULARY.
    """

    x_train: dict[str, np.ndarray]
    y_train: np.ndarray
    x_val: dict[str, np.ndarray]
    y_val: np.ndarray
    x_test: dict[str, np.ndarray]
    y_test: np.ndarray

    def held_out(self, split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(x, y) to judge on: of validation for "val" (to tune), else of test."""
        return (self.x_val, self.y_val) if split == "val" else (self.x_test, self.y_test)


def digits_vqa() -> VQA:
    """DigitsVQA: 1,797 pictures of digits, 5 questions each, split as `digits` is (1200 / 240 / 357 pictures).

    >>> s = digits_vqa()
    >>> " ".join(VOCABULARY[i] for i in s.x_test["question"][0, 3]), s.y_test.shape
    ('which digit comes next ?', (357, 5))
    """
    d = digits()
    place = {w: i for i, w in enumerate(VOCABULARY)}
    asked = np.array([[place[w] for w in t.split()] for t, _ in QUESTIONS.values()], np.int32)
    told = np.array(
        [[place[answer(i)] for _, answer in QUESTIONS.values()] for i in range(10)], np.int32
    )

    def part(x: np.ndarray, y: np.ndarray):
        return {"image": x, "question": np.tile(asked, (len(x), 1, 1))}, told[y]

    return VQA(*part(d.x_train, d.y_train), *part(d.x_val, d.y_val), *part(d.x_test, d.y_test))
