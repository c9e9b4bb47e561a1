"""Plain PyTorch loops for the ptq bench: the same algorithms, eager, as one writes them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qlab.benches.kernel_peers import _need
from qlab.nn.vit import EPS


def torch_gptq(
    w: np.ndarray, h: np.ndarray, scale: np.ndarray, q_min: int, q_max: int, *, block: int = 128
) -> Callable[[], np.ndarray]:
    """() -> f32[out, in] codes by GPTQ with lazy updates, damping 1 % (arXiv 2210.17323, Algorithm 1)."""
    torch = _need("torch")
    w0, h0, s = (torch.tensor(a) for a in (w, h, scale[:, 0]))
    n = len(h)

    def call() -> np.ndarray:
        with torch.no_grad():
            damped = h0 + 0.01 * h0.diagonal().mean() * torch.eye(n)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            u = torch.linalg.cholesky(inverse, upper=True)
            left, codes = w0.clone(), torch.zeros_like(w0)
            for first in range(0, n, block):
                last = min(first + block, n)
                part, errors = left[:, first:last].clone(), torch.zeros_like(w0[:, first:last])
                for i in range(last - first):
                    row = u[first + i, first + i : last]
                    q = torch.clamp(torch.round(part[:, i] / s), q_min, q_max)
                    error = (part[:, i] - q * s) / row[0]
                    part[:, i:] -= torch.outer(error, row)
                    codes[:, first + i], errors[:, i] = q, error
                left[:, last:] -= errors @ u[first:last, last:]
        return codes.numpy()

    return call


def torch_adaround(
    params: Mapping[str, Any],
    acts: Mapping[str, Any],
    grids: Mapping[str, Any],
    x: Any,
    y: Any,
    heads: int,
    num_iters: int,
    batch: int,
    *,
    learning_rate: float = 3e-2,
) -> Callable[[], dict[str, np.ndarray]]:
    """() -> {site: codes} of AdaRound on an encoder block of `qlab.nn.vit`, its activations fake-quantized.

    Args:
      params: of the block, as its nnx state. acts: Affine by site. grids: of the weights, by site.
    """
    torch = _need("torch")
    functional = torch.nn.functional
    tensor = lambda a: torch.tensor(np.asarray(a, np.float32))  # noqa: E731
    xs, ys = tensor(x), tensor(y)
    norms = {k: (tensor(params[k]["scale"]), tensor(params[k]["bias"])) for k in ("norm1", "norm2")}
    weights = {k: tensor(params[k]["kernel"].T) for k in grids}
    biases = {k: tensor(params[k]["bias"]) for k in grids}
    scales = {k: tensor(g.scale) for k, g in grids.items()}
    zeros = {
        k: tensor(g.zero) if g.zero is not None else torch.zeros(1, 1) for k, g in grids.items()
    }
    rails = {k: (float(g.q_min), float(g.q_max)) for k, g in grids.items()}
    records = {
        k: tuple(float(v) for v in (a.scale, a.zero, a.q_min, a.q_max)) for k, a in acts.items()
    }
    dim = xs.shape[-1]

    def up(v):
        return torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)

    def hard(site, v):
        down = torch.floor(weights[site] / scales[site])
        return torch.clamp(down + (v >= 0).float() + zeros[site], *rails[site])

    def fake(site, a):
        scale, zero, low, high = records[site]
        u = a / scale
        u = u + (torch.round(u) - u).detach()
        return (torch.clamp(u + zero, low, high) - zero) * scale

    def forward(v, a):
        def linear(site, a):
            down = torch.floor(weights[site] / scales[site])
            q = torch.clamp(down + up(v[site]) + zeros[site], *rails[site])
            return functional.linear(fake(site, a), scales[site] * (q - zeros[site]), biases[site])

        def norm(name, a):
            return functional.layer_norm(a, (dim,), *norms[name], eps=EPS)

        apart = lambda a: a.reshape(*a.shape[:-1], heads, -1)  # noqa: E731
        q, k, value = (apart(b) for b in linear("qkv", norm("norm1", a)).chunk(3, -1))
        scores = torch.einsum("nqhd,nkhd->nhqk", fake("q", q), fake("k", k)) * q.shape[-1] ** -0.5
        probs = fake("probs", torch.softmax(scores, -1))
        mixed = torch.einsum("nhqk,nkhd->nqhd", probs, fake("v", value)).reshape(a.shape)
        a = a + linear("proj", mixed)
        return a + linear("fc2", functional.gelu(linear("fc1", norm("norm2", a))))

    def loss_fn(v, a, want, t):
        error = ((forward(v, a) - want) ** 2).sum(-1).mean()
        if t < 0.2:
            return error
        beta = 2 + 18 * (1 - (t - 0.2) / 0.8)
        undecided = sum((1 - (2 * up(u) - 1).abs() ** beta).sum() for u in v.values())
        return error + 0.01 * undecided

    def start() -> dict[str, Any]:
        v = {}
        for site, w in weights.items():
            u = w / scales[site]
            v[site] = -torch.log(1.2 / (u - torch.floor(u) + 0.1) - 1)
        return v

    def call() -> dict[str, np.ndarray]:
        v = {k: u.requires_grad_() for k, u in start().items()}
        optimizer = torch.optim.Adam(list(v.values()), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iters)
        for i in range(num_iters):
            picked = torch.randint(len(xs), (batch,))
            loss = loss_fn(v, xs[picked], ys[picked], i / num_iters)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {k: hard(k, u).numpy() for k, u in v.items()}

    return call
