"""Writes checkpoints as mesh-transformer-jax does, for tests: it shares nothing with the importer.

Follows its checkpoint.py and layers.py: a tree of parameters named as Haiku names modules, each
leaf stacked over shards; flattened with sorted keys, as JAX flattens dictionaries; cut into 16 runs
a shard; each run saved by numpy.savez.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PIECES = 16
ROOT = "causal_transformer_shard/~/"
Tree = dict[str, dict[str, np.ndarray]]


def write_checkpoint(
    folder: Path,
    state: dict[str, torch.Tensor],
    *,
    shards: int,
    dtype: str = "bf16",
    full: bool = False,
    equal_biases: bool = True,
) -> int:
    """Write a step's folder from a language model's weights; returns the leaves of a shard.

    Args:
        dtype: bf16 (which NumPy reads back as two bytes without a meaning), f16 or f32.
        full: with the state of Adam, as training writes it; else slim.
        equal_biases: the summed biases as resharding leaves them, the same in every shard; else
            different in each, as training could.
    """
    numbers = {name: tensor.float().numpy() for name, tensor in state.items()}
    params = {
        module: {leaf: cast(values, dtype) for leaf, values in leaves.items()}
        for module, leaves in shard_params(numbers, shards, equal_biases).items()
    }
    training: dict[str, Any] = {"params": params, "step": np.zeros(shards, np.int32)}
    if full:
        noise = np.random.default_rng(1)

        def moments() -> Tree:
            return {
                module: {
                    leaf: noise.normal(size=values.shape).astype(np.float32)
                    for leaf, values in leaves.items()
                }
                for module, leaves in params.items()
            }

        counts = {"adam": np.ones(shards, np.int32), "schedule": np.ones(shards, np.int32)}
        training["opt_state"] = {
            "a_count": counts["adam"],
            "b_mu": moments(),
            "c_nu": moments(),
            "d_count": counts["schedule"],
        }
    leaves = list(flatten(training))
    for shard in range(shards):
        place = folder / f"shard_{shard}"
        place.mkdir(parents=True)
        for number, run in enumerate(split([leaf[shard] for leaf in leaves], PIECES)):
            np.savez(place / f"{number}.npz", *run)
    return len(leaves)


def shard_params(state: dict[str, np.ndarray], shards: int, equal_biases: bool) -> Tree:
    """The tree, each leaf with the shards in front."""
    random = np.random.default_rng(0)
    width = state["transformer.wte.weight"].shape[1]

    def columns(name: str) -> np.ndarray:  # a shard computes some outputs
        return np.stack(np.split(state[name].T, shards, axis=1))

    def rows(name: str) -> np.ndarray:  # a shard takes some inputs, and all are added up
        return np.stack(np.split(state[name].T, shards, axis=0))

    def parts(name: str) -> np.ndarray:
        return np.stack(np.split(state[name], shards))

    def added(total: np.ndarray) -> np.ndarray:  # each shard adds its own
        if equal_biases:
            return np.stack([total / shards] * shards)
        others = random.integers(-8, 8, (shards - 1, *total.shape)) / 64
        return np.concatenate([others, (total - others.sum(0))[None]]).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:  # the first shard's counts
        rest = random.normal(size=(shards - 1, width)).astype(np.float32)
        return {
            "offset": np.concatenate([state[f"{name}.bias"][None], rest]),
            "scale": np.concatenate([state[f"{name}.weight"][None], rest]),
        }

    bias = (random.integers(-16, 16, width) / 64).astype(np.float32)
    embedding = state["transformer.wte.weight"] - bias
    tree: Tree = {
        f"{ROOT}embedding_shard/~/linear": {
            "w": np.stack(np.split(embedding, shards)),
            "b": added(bias),
        },
        f"{ROOT}projection_shard/~/linear": {
            "w": columns("lm_head.weight"),
            "b": parts("lm_head.bias"),
        },
        f"{ROOT}projection_shard/~/replicated_layer_norm": norm("transformer.ln_f"),
    }
    layers = sum(name.endswith("ln_1.weight") for name in state)
    for layer in range(layers):
        block, module = f"transformer.h.{layer}", f"{ROOT}layer_{layer}/~/"
        tree[f"{module}linear"] = {"w": columns(f"{block}.attn.q_proj.weight")}
        tree[f"{module}linear_1"] = {"w": columns(f"{block}.attn.v_proj.weight")}
        tree[f"{module}linear_2"] = {"w": columns(f"{block}.attn.k_proj.weight")}
        tree[f"{module}linear_3"] = {"w": rows(f"{block}.attn.out_proj.weight")}
        tree[f"{module}linear_4"] = {
            "w": columns(f"{block}.mlp.fc_in.weight"),
            "b": parts(f"{block}.mlp.fc_in.bias"),
        }
        tree[f"{module}linear_5"] = {
            "w": rows(f"{block}.mlp.fc_out.weight"),
            "b": added(state[f"{block}.mlp.fc_out.bias"]),
        }
        tree[f"{module}replicated_layer_norm"] = norm(f"{block}.ln_1")
    return tree


def flatten(tree: Any) -> Iterator[np.ndarray]:
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from flatten(tree[key])
    else:
        yield tree


def split(leaves: list[np.ndarray], count: int) -> Iterator[list[np.ndarray]]:
    """Runs of equal length, the first ones longer by one if they must."""
    length, longer = divmod(len(leaves), count)
    start = 0
    for number in range(count):
        end = start + length + (number < longer)
        yield leaves[start:end]
        start = end


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16)
        return bits.numpy().view("V2")
    return values.astype({"f16": np.float16, "f32": np.float32}[dtype])
