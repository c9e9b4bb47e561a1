"""Qwen2 and Llama checkpoints as params of `qlab.nn.gpt`, and back: names and layouts of Hugging Face.

    size = size_of(config)                       # config.json as a dict
    params = from_hf(size, tensors)              # {"model.layers.0.self_attn.q_proj.weight": array, ...}

Kernels here are transposes of nn.Linear.weight; q, k, v and gate, up stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.nn.gpt import GPTSize
from qlab.nn.sites import Params

KINDS = ("qwen2", "llama")


def size_of(config: Mapping[str, Any]) -> GPTSize:
    """The GPTSize of a config.json.

    Raises:
      UserError: another kind of model, or a feature this decoder does not have (scaled RoPE, biases, windows).
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model_type={kind!r} cannot be read; {' and '.join(KINDS)} can")
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UserError(f"rope_scaling={scaling}: scaled RoPE is not implemented; use a base model")
    if config.get("use_sliding_window") or config.get("mlp_bias"):
        raise UserError("sliding windows and MLP biases are not implemented")
    if kind == "llama" and config.get("attention_bias"):
        raise UserError("attention_bias=true puts a bias on o_proj too, which is not implemented")
    parameters = config.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default":
        raise UserError(f"rope_parameters={parameters}: scaled RoPE is not implemented")
    return GPTSize(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        hidden=config["intermediate_size"],
        base=float(config.get("rope_theta") or parameters.get("rope_theta") or 1e4),
        eps=config["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        head_dim=config.get("head_dim") or 0,
    )


def from_hf(s: GPTSize, tensors: Mapping[str, Any]) -> tuple[Params, ...]:
    """Params for `gpt(s)`; a checkpoint without lm_head.weight has it tied to its table.

    Raises:
      UserError: a tensor is missing or has another shape (the first is named).
    """

    def get(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"the checkpoint has no {name}; is it one of {' or '.join(KINDS)}?")
        a = np.asarray(tensors[name], np.float32)
        if a.shape != shape:
            raise UserError(f"{name} has shape {a.shape}, expected {shape}")
        return a

    q, kv = s.heads * s.width, s.kv_heads * s.width

    def block(i: int) -> Params:
        at = f"model.layers.{i}."
        parts = (("q", q), ("k", kv), ("v", kv))
        qkv: Params = {
            "kernel": np.concatenate(
                [get(f"{at}self_attn.{n}_proj.weight", w, s.dim) for n, w in parts]
            ).T
        }
        if s.qkv_bias:
            qkv["bias"] = np.concatenate([get(f"{at}self_attn.{n}_proj.bias", w) for n, w in parts])
        both = [get(f"{at}mlp.{n}_proj.weight", s.hidden, s.dim) for n in ("gate", "up")]
        return {
            "attn_norm": {"scale": get(f"{at}input_layernorm.weight", s.dim)},
            "qkv": qkv,
            "proj": {"kernel": get(f"{at}self_attn.o_proj.weight", s.dim, q).T},
            "mlp_norm": {"scale": get(f"{at}post_attention_layernorm.weight", s.dim)},
            "gate_up": {"kernel": np.concatenate(both).T},
            "down": {"kernel": get(f"{at}mlp.down_proj.weight", s.dim, s.hidden).T},
        }

    table = get("model.embed_tokens.weight", s.vocab, s.dim)
    head = get("lm_head.weight", s.vocab, s.dim) if "lm_head.weight" in tensors else table
    groups = (
        [{"table": table}],
        [block(i) for i in range(s.depth)],
        [{"norm": {"scale": get("model.norm.weight", s.dim)}, "head": {"kernel": head.T}}],
    )
    return tuple(_stacked(blocks) for blocks in groups)


def to_hf(s: GPTSize, params: tuple[Params, ...]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, the inverse of `from_hf` (lm_head.weight always written out)."""
    stem, decoder, head = params
    q, kv = s.heads * s.width, s.kv_heads * s.width
    out = {"model.embed_tokens.weight": np.asarray(stem["table"][0])}
    for i in range(s.depth):
        at = f"model.layers.{i}."
        cuts = np.cumsum([q, kv])
        weights = np.split(np.asarray(decoder["qkv"]["kernel"][i]).T, cuts)
        out |= {f"{at}self_attn.{n}_proj.weight": w for n, w in zip("qkv", weights, strict=True)}
        if s.qkv_bias:
            biases = np.split(np.asarray(decoder["qkv"]["bias"][i]), cuts)
            out |= {f"{at}self_attn.{n}_proj.bias": b for n, b in zip("qkv", biases, strict=True)}
        gate, up = np.split(np.asarray(decoder["gate_up"]["kernel"][i]).T, 2)
        out |= {
            f"{at}input_layernorm.weight": np.asarray(decoder["attn_norm"]["scale"][i]),
            f"{at}self_attn.o_proj.weight": np.asarray(decoder["proj"]["kernel"][i]).T,
            f"{at}post_attention_layernorm.weight": np.asarray(decoder["mlp_norm"]["scale"][i]),
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": np.asarray(decoder["down"]["kernel"][i]).T,
        }
    out["model.norm.weight"] = np.asarray(head["norm"]["scale"][0])
    out["lm_head.weight"] = np.asarray(head["head"]["kernel"][0]).T
    return out


def _stacked(blocks: list[Params]) -> Params:
    first = blocks[0]
    return {
        name: _stacked([b[name] for b in blocks])
        if isinstance(a, dict)
        else jnp.asarray(np.stack([b[name] for b in blocks]))
        for name, a in first.items()
    }
