"""A small vision-language model: a ViT encoder, a projector and a causal decoder that answers with one token.

    v = projector(encoder(image))           f32[N, P, D]
    logits = head(decoder([v, question]))   of the question's last token

An input is a dict of image f32[N, H, W, C] and question i32[N, R, Q]: R questions of Q tokens about one picture, with
one answer each. They follow the picture in one sequence of P + R Q tokens but do not see one another, so each has the
logits it would have alone, and the picture is read once.

Groups: stem (patches and positions), vision (encoder blocks), join (final norm, projector, question tokens), decoder, head.
The questions travel beside the image through the first two. Sites are those of qlab.nn.vit and qlab.nn.gpt; the
projector's is "project".

Letters: N = pictures, P = patches, R = questions, Q = their tokens, E, D = widths of encoder and decoder, V = vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.gpt import LINKS as LANGUAGE_LINKS
from qlab.nn.gpt import Decoder, GPTSize, Head, Table, check_size
from qlab.nn.sites import FLOAT, BlockNet, Run, block_net
from qlab.nn.vit import EPS, Encoder, ViTSize
from qlab.nn.vit import LINKS as VISION_LINKS
from qlab.nn.vit import Stem as Patches

LINKS = (*VISION_LINKS, *LANGUAGE_LINKS)


class VLMSize(NamedTuple):
    """Hyper-parameters: fields of ViTSize (encoder, vision_*) and of GPTSize; the default is for DigitsVQA.

    image, channels, patch: of the pictures. question: Q.
    """

    image: int = 8
    channels: int = 1
    patch: int = 2
    vision_dim: int = 48
    vision_depth: int = 2
    vision_heads: int = 4
    vision_hidden: int = 96
    vocab: int = 32
    dim: int = 64
    depth: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 128
    question: int = 5

    @property
    def patches(self) -> int:
        """P."""
        return (self.image // self.patch) ** 2

    @property
    def language(self) -> GPTSize:
        return GPTSize(
            self.vocab, self.dim, self.depth, self.heads, self.kv_heads, self.hidden,
            prefix=self.patches, part=self.question,
        )  # fmt: skip

    @property
    def vision(self) -> ViTSize:
        return ViTSize(
            self.image, self.channels, self.patch, self.vision_dim, self.vision_depth,
            self.vision_heads, self.vision_hidden,
        )  # fmt: skip


class Stem(nnx.Module):
    """{image, question} -> (patch tokens f32[N, P, E], questions)."""

    def __init__(self, v: ViTSize, *, rngs: nnx.Rngs):
        self.patches = Patches(v.size, v.channels, v.patch, v.dim, rngs=rngs)

    def __call__(self, x: dict[str, jax.Array], run: Run = FLOAT):
        return self.patches(x["image"], run), x["question"]


class Vision(Encoder):
    """An encoder block beside the questions."""

    def __init__(self, v: ViTSize, *, rngs: nnx.Rngs):
        super().__init__(v.dim, v.heads, v.hidden, rngs=rngs)

    def __call__(self, x: Any, run: Run = FLOAT) -> Any:
        return super().__call__(x[0], run), x[1]


class Join(nnx.Module):
    """(f32[N, P, E], questions i32[N, R, Q]) -> tokens of the decoder f32[N, P + R Q, D]."""

    def __init__(self, s: VLMSize, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(s.vision_dim, epsilon=EPS, rngs=rngs)
        self.project = nnx.Linear(s.vision_dim, s.dim, rngs=rngs)
        self.words = Table(s.language, rngs=rngs)

    def __call__(self, x: tuple[jax.Array, jax.Array], run: Run = FLOAT) -> jax.Array:
        seen = run.linear("project", self.project, self.norm(x[0]))
        words = self.words(x[1].reshape(len(x[1]), -1))
        return jnp.concatenate([seen, words], 1)


def vlm(s: VLMSize = VLMSize()) -> BlockNet:  # noqa: B008 (a constant tuple)
    """The net as a BlockNet: stem, vision (vision_depth), join, decoder (depth), head.

    Raises:
      ValueError: a patch that does not divide the image, or heads that do not divide a width.

    >>> net = vlm(VLMSize(vision_dim=8, dim=8, depth=2, hidden=16))
    >>> net.names
    ('stem', 'vision.0', 'vision.1', 'join', 'decoder.0', 'decoder.1', 'head')
    >>> x = {"image": jnp.ones((3, 8, 8, 1)), "question": jnp.zeros((3, 2, 5), int)}
    >>> net.apply(net.init(jax.random.key(0)), x).shape
    (3, 2, 32)
    """
    if s.image % s.patch or s.vision_dim % s.vision_heads:
        raise ValueError(
            f"patch={s.patch} must divide image={s.image}, and vision_heads={s.vision_heads} "
            f"vision_dim={s.vision_dim}"
        )
    if s.question < 1:
        raise ValueError(f"question={s.question} tokens; use at least 1")
    check_size(s.language)

    def make(rngs: nnx.Rngs):
        return [
            [Stem(s.vision, rngs=rngs)],
            [Vision(s.vision, rngs=rngs) for _ in range(s.vision_depth)],
            [Join(s, rngs=rngs)],
            [Decoder(s.language, rngs=rngs) for _ in range(s.depth)],
            [Head(s.language, rngs=rngs)],
        ]

    return block_net(("stem", "vision", "join", "decoder", "head"), make)
