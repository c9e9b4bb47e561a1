"""AdaDFQ: adaptive data-free quantization (Qian et al., CVPR 2023), and its relatives GDFQ and AdaSG by the same step.

P is a trained net with batch norms, Q its quantized copy that is trained, G a generator of images. In every iteration
G takes a step on images G(z, y), then Q one on the same images:
- adaptability: p_ds = softmax(z_P - z_Q) and p_as = softmax(z_P + z_Q), z logits. The entropy H of p_ds is low where P
  insists on a class and Q does not (disagreement), high where they differ by next to nothing (agreement);
- L_G = margin(H) + a_ds CE(z_P - z_Q, y) + a_as CE(z_P + z_Q, y) + gamma L_BNS, the margin holding H between bounds;
- L_Q = -T^2 H_T: Q maximises the entropy of softmax((z_P - z_Q) / T) that G lowers. No labels.
Both nets are in evaluation mode; kernels, biases, and scales and biases of the norms of Q are trained.

The published codes of AdaDFQ and AdaSG share this algorithm and differ by its coefficients (`METHODS`). GDFQ (Xu et al.,
ECCV 2020) has L_G = CE(z_P, y) + 0.1 L_BNS and L_Q = CE(z_Q, y) + T^2 KL / C (its code averages KL over classes too).
Coefficients, widths and rates are data, so that one compiled step serves all of them.

Letters: N = samples, C = classes, T = temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.lab.errors import UserError
from qlab.nn.generator import Generator
from qlab.nn.resnet import ResNet
from qlab.nn.sites import Params
from qlab.quantization.blocks import QuantizedBlock
from qlab.quantization.bn_statistics import bn_stat_loss, net_bn_inputs
from qlab.quantization.minmax_net import (
    STE,
    apply_minmax,
    calibrate_ranges,
    init_ranges,
    minmax_blocks,
)
from qlab.quantization.observers import Correction, ema

TINY = 1e-6  # least gap of entropies in float32, below which all samples count as equal
Metrics = dict[str, jax.Array]
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Coefficients(NamedTuple):
    """What the two losses weigh; floats, or f32[] as part of a state. The defaults are AdaDFQ's.

    Attributes:
      margin: of the margin loss. low, high: l and u, bounds of the normalised entropy.
      a_ds, a_as: of CE(z_P - z_Q, y) and CE(z_P + z_Q, y); beta: of both. p: of CE(z_P, y). gamma: of L_BNS.
      entropy, kd, ce: of Q's losses -T^2 H_T, T^2 KL / C and CE(z_Q, y).
    """

    margin: Any = 1.0
    low: Any = 0.1
    high: Any = 0.8
    a_ds: Any = 0.2
    a_as: Any = 0.1
    beta: Any = 1.0
    p: Any = 0.0
    gamma: Any = 1.0
    entropy: Any = 1.0
    kd: Any = 0.0
    ce: Any = 0.0
    temperature: Any = 20.0


METHODS = {
    "ada_dfq": Coefficients(),
    "ada_sg": Coefficients(low=0.3, a_ds=0.1),
    "gdfq": Coefficients(
        margin=0.0, a_ds=0.0, a_as=0.0, p=1.0, gamma=0.1, entropy=0.0, kd=1.0, ce=1.0
    ),
}


def disagreement_entropy(z_p: jax.Array, z_q: jax.Array, temperature=1.0) -> jax.Array:
    """f32[N], the entropy in nats of softmax((z_P - z_Q) / T); z_p, z_q: f32[N, C].

    >>> z = jnp.array([[3.0, 0.0]])
    >>> float(disagreement_entropy(z, z)[0]).__round__(4)  # log 2
    0.6931
    """
    log_p = jax.nn.log_softmax((z_p - z_q) / temperature)
    return -(jnp.exp(log_p) * log_p).sum(-1)


def normalised(h: jax.Array, classes: int) -> jax.Array:
    """f32[N], H' = (H - min H) / (log C - min H), 0 where all H are log C; the least H carries gradient too."""
    low = h.min()
    gap = math.log(classes) - low
    return jnp.where(gap > TINY, (h - low) / jnp.where(gap > TINY, gap, 1.0), 0.0)


def margin_loss(h: jax.Array, classes: int, low, high) -> jax.Array:
    """f32[]: mean relu(l - H') + mean relu(H' - u). The sample of least H has H' = 0, so at least l / N remains.

    >>> h = jnp.array([0.0, 1.0]) * math.log(4)
    >>> round(float(margin_loss(h, 4, 0.1, 0.8)), 6)
    0.15
    """
    x = normalised(h, classes)
    return jax.nn.relu(low - x).mean() + jax.nn.relu(x - high).mean()


def gen_loss(z_p: jax.Array, z_q: jax.Array, y: jax.Array, bns: jax.Array, c: Coefficients):
    """f32[], L_G; bns: f32[], L_BNS of the same images. y: i32[N]."""
    h = disagreement_entropy(z_p, z_q)
    pair = c.a_ds * cross_entropy(z_p - z_q, y).mean() + c.a_as * cross_entropy(z_p + z_q, y).mean()
    margin = margin_loss(h, z_p.shape[-1], c.low, c.high)
    return c.margin * margin + c.beta * pair + c.p * cross_entropy(z_p, y).mean() + c.gamma * bns


def q_loss(z_p: jax.Array, z_q: jax.Array, temperature=20.0) -> jax.Array:
    """f32[], -T^2 mean H_T; its least value, -T^2 log C, is reached iff z_P - z_Q is constant over classes."""
    return -(temperature**2) * disagreement_entropy(z_p, z_q, temperature).mean()


def student_loss(z_p: jax.Array, z_q: jax.Array, y: jax.Array, c: Coefficients) -> jax.Array:
    """f32[], L_Q, counted from its least value in AdaDFQ's part so that losses of methods can be read together."""
    t, classes = c.temperature, z_p.shape[-1]
    least = t**2 * math.log(classes)
    log_p, log_q = jax.nn.log_softmax(z_p / t), jax.nn.log_softmax(z_q / t)
    kd = t**2 * (jnp.exp(log_p) * (log_p - log_q)).mean()
    return (
        c.entropy * (q_loss(z_p, z_q, t) + least) + c.kd * kd + c.ce * cross_entropy(z_q, y).mean()
    )


class Fit(NamedTuple):
    """How G and Q are trained; the defaults are the paper's for CIFAR (400 epochs of 200 iterations).

    Attributes:
      rate_g, rate_q: Adam (0.5, 0.999) of G, SGD with Nesterov momentum and weight decay of Q; both rates fall tenfold
        at the shares `drops` of the steps. warmup: steps in which Q is not trained. range_steps: steps in which
        activation ranges move. ste, correction: conventions, see `minmax_net` and `observers.ema`.
      wide: (site, its bits) of weights and operands whose width is fixed, as conventions for first and last layers are.
      mean, std: of P's inputs, one or one a channel: images are mean + std * G(z, y). A net's preprocessing publishes them.
    """

    num_steps: int = 80_000
    batch_size: int = 16
    rate_g: float = 1e-3
    rate_q: float = 1e-4
    momentum: float = 0.9
    decay: float = 1e-4
    warmup: int = 800
    range_steps: int = 800
    drops: tuple[float, ...] = (0.25, 0.5, 0.75)
    ste: STE = "repo"
    correction: Correction = "end"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    wide: tuple[tuple[str, int], ...] = ()


class State(NamedTuple):
    """One net at work: everything that an iteration reads. It holds P's params and no image.

    Attributes:
      key: folded with `step`, i32[]. teacher: P's params. student: what is trained of Q. ranges: of activations.
      generator, adam, sgd: G's params, the optimizers' states. coefficients, w_bits, a_bits: f32[] each. rates: f32[2],
        of G and Q before they fall.
    """

    key: jax.Array
    step: jax.Array
    teacher: tuple[Params, ...]
    generator: Params
    adam: Any
    student: tuple[Params, ...]
    sgd: Any
    ranges: dict[str, Any]
    coefficients: Coefficients
    w_bits: jax.Array
    a_bits: jax.Array
    rates: jax.Array


class DataFree(NamedTuple):
    """A trainer, its functions pure; hashable. For a trained net of your own:

        dfq = DataFree(family, generator(GeneratorSize(16, 1, 10)), Fit(num_steps=1000, warmup=100, range_steps=100))
        state = dfq.init(jax.random.key(0), params, w_bits=3, a_bits=3)
        for _ in range(5):
            state, metrics = jax.jit(dfq.epoch)(state)
        logits = dfq.logits(state, x)

    Attributes:
      family: P's. generator: G's. fit: how they are trained.
    """

    family: ResNet
    generator: Generator
    fit: Fit

    def init(self, key, teacher, c: Coefficients = Coefficients(), *, w_bits=4, a_bits=4) -> State:  # noqa: B008
        """Q a copy of P; teacher: params of `family.net`."""
        fit, s = self.fit, self.generator.size
        if fit.range_steps < 1 or not 0 <= fit.warmup <= fit.num_steps:
            raise UserError(
                f"range_steps={fit.range_steps}, warmup={fit.warmup} of {fit.num_steps} steps: activation ranges need a "
                "step, and the warm-up must end in time"
            )
        k_net, k_steps = jax.random.split(key)
        teacher = tuple(teacher)
        answers = teacher[-1]["head"]["bias"].shape[-1]
        if answers != s.classes:
            raise UserError(
                f"the net answers {answers} classes, its generator is asked for {s.classes}"
            )
        g, student = self.generator.init(k_net), learned(teacher)
        x = jax.ShapeDtypeStruct((1, s.side, s.side, s.channels), jnp.float32)
        ranges = init_ranges(self.family.net, teacher, x, self.observer)
        adam, sgd = self._adam().init(g), self._sgd().init(student)
        c = Coefficients(*map(jnp.float32, c))
        bits = jnp.float32(w_bits), jnp.float32(a_bits)
        rates = jnp.array([fit.rate_g, fit.rate_q], jnp.float32)
        return State(k_steps, jnp.int32(0), teacher, g, adam, student, sgd, ranges, c, *bits, rates)

    def step(self, s: State) -> tuple[State, Metrics]:
        """One step of G and one of Q on fresh generated images."""
        k_z, k_y = jax.random.split(jax.random.fold_in(s.key, s.step))
        size, n = self.generator.size, self.fit.batch_size
        z = jax.random.normal(k_z, (n, size.latent))
        y = jax.random.randint(k_y, (n,), 0, size.classes)

        def loss(g):
            x = self.images(g, z, y)
            z_p, seen, running = net_bn_inputs(self.family.net, s.teacher, x)
            bns = bn_stat_loss(seen, running, per_sample=False, spread="var")
            z_q, _ = self.quantized(s, s.student, x)
            return gen_loss(z_p, z_q, y, bns, s.coefficients), (x, z_p, z_q, bns)

        (value, (x, z_p, z_q, bns)), grads = jax.value_and_grad(loss, has_aux=True)(s.generator)
        updates, adam = self._adam().update(grads, s.adam)
        g = self._moved(s.generator, updates, s.rates[0], s.step)
        after, loss_q = self._student_step(s, x, z_p, y)
        h = normalised(disagreement_entropy(z_p, z_q), size.classes)
        inside = (h >= s.coefficients.low) & (h <= s.coefficients.high)
        metrics = {
            "loss": value,
            "loss_q": loss_q,
            "bns": bns,
            "entropy": disagreement_entropy(z_p, z_q).mean(),
            "inside": 100.0 * inside.mean(),
            "as_asked": 100.0 * (z_p.argmax(-1) == y).mean(),
            "differ": 100.0 * (z_p.argmax(-1) != z_q.argmax(-1)).mean(),
        }
        return after._replace(generator=g, adam=adam), metrics

    def epoch(self, s: State, num: int = 200) -> tuple[State, Metrics]:
        """num steps in one program, their metrics averaged; for your own net, and for accelerators."""

        def body(carry, _):
            s, total = carry
            s, metrics = self.step(s)
            return (s, jax.tree.map(jnp.add, total, metrics)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.step, s)[1])
        (s, total), _ = jax.lax.scan(body, (s, zeros), None, length=num)
        return s, jax.tree.map(lambda a: a / num, total)

    def step_on(self, s: State, x: jax.Array, y: jax.Array) -> tuple[State, Metrics]:
        """One step of Q alone on images from elsewhere (real ones: an upper bound); y: i32[N]."""
        z_p = self.family.net.apply(s.teacher, x)
        after, loss_q = self._student_step(s, x, z_p, y)
        z_q = self.quantized(s, s.student, x)[0]
        zero = jnp.zeros(())
        metrics = {
            "loss": loss_q, "loss_q": loss_q, "bns": zero,
            "entropy": disagreement_entropy(z_p, z_q).mean(), "inside": zero,
            "as_asked": 100.0 * (z_p.argmax(-1) == y).mean(),
            "differ": 100.0 * (z_p.argmax(-1) != z_q.argmax(-1)).mean(),
        }  # fmt: skip
        return after, metrics

    def images(self, g: Params, z: jax.Array, y: jax.Array) -> jax.Array:
        """f32[N, S, S, channels], as P takes them."""
        return self.scaled(self.generator.apply(g, z, y))

    def scaled(self, u: jax.Array) -> jax.Array:
        """Standardised f32[..., channels] as P's inputs."""
        return jnp.array(self.fit.mean) + jnp.array(self.fit.std) * u

    def quantized(self, s: State, student, x: jax.Array, learn: bool | jax.Array | None = None):
        """(Q's logits, ranges); learn: whether x moves the ranges first, None: while `range_steps` last."""
        learn = s.step < self.fit.range_steps if learn is None else learn
        params = self.family.keep(s.teacher, student)
        return apply_minmax(
            self.family.net, params, s.ranges, x, s.w_bits, s.a_bits,
            learn=learn, ste=self.fit.ste, observer=self.observer, wide=dict(self.fit.wide),
        )  # fmt: skip

    def logits(self, s: State, x: jax.Array) -> jax.Array:
        """Q as it stands, f32[N, C]."""
        return self.quantized(s, s.student, x, learn=False)[0]

    def blocks(self, s: State) -> tuple[QuantizedBlock, ...]:
        """Q as it is deployed, a QuantizedBlock per group of P's net: codes of its weights, grids of its activations."""
        return minmax_blocks(
            self.family.net, self.family.keep(s.teacher, s.student), s.ranges, s.w_bits, s.a_bits,
            observer=self.observer, wide=dict(self.fit.wide),
        )  # fmt: skip

    def calibrated(self, s: State, x: jax.Array) -> State:
        """Q as it stands, its ranges moved on by all whole batches of x, in order (rounding without training)."""
        return s._replace(ranges=_calibrated(self, s, x))

    @property
    def observer(self):
        return ema(correction=self.fit.correction)

    def _student_step(self, s: State, x, z_p, y) -> tuple[State, jax.Array]:
        x, z_p = jax.lax.stop_gradient((x, z_p))

        def loss(student):
            z_q, ranges = self.quantized(s, student, x)
            return student_loss(z_p, z_q, y, s.coefficients), ranges

        (value, ranges), grads = jax.value_and_grad(loss, has_aux=True)(s.student)
        updates, sgd = self._sgd().update(grads, s.sgd, s.student)
        moved = self._moved(s.student, updates, s.rates[1], s.step), sgd
        trained = s.step >= self.fit.warmup
        old = s.student, s.sgd
        student, sgd = jax.tree.map(lambda a, b: jnp.where(trained, a, b), moved, old)
        return s._replace(student=student, sgd=sgd, ranges=ranges, step=s.step + 1), value

    def _moved(self, params, updates, rate: jax.Array, step: jax.Array):
        """params - rate(step) * updates."""
        done = step / self.fit.num_steps
        fallen = sum((done >= share).astype(jnp.float32) for share in self.fit.drops)
        rate_now = rate * 0.1 ** jnp.asarray(fallen, jnp.float32)
        return jax.tree.map(lambda p, u: p - rate_now * u, params, updates)

    def _adam(self):
        return optax.scale_by_adam(0.5, 0.999)

    def _sgd(self):
        return optax.chain(
            optax.add_decayed_weights(self.fit.decay), optax.trace(self.fit.momentum, nesterov=True)
        )


@partial(jax.jit, static_argnums=0)
def _calibrated(dfq: DataFree, s: State, x: jax.Array) -> dict[str, Any]:
    return calibrate_ranges(
        dfq.family.net, dfq.family.keep(s.teacher, s.student), s.ranges, x, s.w_bits, s.a_bits,
        batch_size=dfq.fit.batch_size, observer=dfq.observer, wide=dict(dfq.fit.wide),
    )  # fmt: skip


def learned(params) -> tuple[Params, ...]:
    """What is trained of a net with norms: all but running statistics (`ResNet.keep` puts it back)."""
    return tuple(
        {site: {k: a for k, a in v.items() if k not in ("mean", "var")} for site, v in p.items()}
        for p in params
    )


def coefficients(method: Literal["ada_dfq", "ada_sg", "gdfq"], changes: Mapping[str, float]):
    """The coefficients of a published method, some of them changed."""
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    return METHODS[method]._replace(**changes)
