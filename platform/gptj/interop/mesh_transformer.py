"""Checkpoints of mesh-transformer-jax, with which GPT-J was trained: shards in, tensors out.

    step_N/shard_{0..S-1}/{0..15}.npz

Each shard is one TPU core's part of every leaf of the training state: the optimizer's leaves (in
full checkpoints), then the parameters, then the step. Leaves are sorted by name as text (layer_0,
layer_1, layer_10, …) and split into equal runs, one per file.
Source: github.com/kingoflolz/mesh-transformer-jax, checkpoint.py, layers.py, to_hf_weights.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj import storage
from gptj.errors import CheckpointError
from gptj.interop.npz import Member, index_npz, open_member
from gptj.interop.tensors import StoredTensor, fill
from gptj.storage import FileInfo

SHARD_FILE = re.compile(r"(?:(?P<step>.*)/)?shard_(?P<shard>\d{1,4})/(?P<piece>\d{1,4})\.npz")
# Leaves of a checkpoint: ten per layer, two of the embedding, four of the projection, the step.
LEAVES_A_LAYER, OTHER_LEAVES = 10, 7
# A full checkpoint has the parameters three times (with Adam's two moments) and three counts.
COPIES_IN_FULL = 3

_ROWS = 256  # of the embedding, computed at a time


def is_checkpoint(files: Sequence[FileInfo]) -> bool:
    return any(SHARD_FILE.fullmatch(file.name) for file in files)


def open_checkpoint(
    address: str, files: Sequence[FileInfo], n_layer: int | None
) -> list[StoredTensor]:
    """The parameters of a checkpoint under Hugging Face's names and in its shapes.

    Args:
        files: all files below the address, which is a step's folder or its parent.
        n_layer: None: infer it from the number of leaves.

    Raises:
        CheckpointError: naming the shard, file or leaf that is missing, damaged or does not fit.
    """
    shards = _read_index(address, _files_by_shard(address, files))
    leaves = len(shards[0])
    for number, shard in enumerate(shards):
        if len(shard) != leaves:
            raise CheckpointError(
                f"{address}: shard_{number} has {len(shard)} leaves but shard_0 has {leaves}"
            )
    if n_layer is None:
        n_layer = _layers_of(leaves, address)
    wanted = LEAVES_A_LAYER * n_layer + OTHER_LEAVES
    if leaves < wanted:
        raise CheckpointError(
            f"{address} has {leaves} leaves per shard; {n_layer} layers need at least {wanted}"
        )
    first = leaves - wanted  # the optimizer's state comes first
    opened = _open_leaves([shard[first:-1] for shard in shards])
    return list(_merged(opened, n_layer))


def _layers_of(leaves: int, address: str) -> int:
    for copies in (1, COPIES_IN_FULL):
        layers, rest = divmod(leaves // copies - OTHER_LEAVES, LEAVES_A_LAYER)
        if leaves % copies == 0 and rest == 0 and layers > 0:
            return layers
    raise CheckpointError(
        f"{address} has {leaves} leaves per shard, which fits neither a slim checkpoint (10 per "
        f"layer and 7) nor a full one with Adam (three times as many); remedy: give its "
        f"configuration, if it was trained with another optimizer"
    )


def _files_by_shard(address: str, files: Sequence[FileInfo]) -> list[list[FileInfo]]:
    found: dict[str, dict[int, dict[int, FileInfo]]] = {}
    for file in files:
        if match := SHARD_FILE.fullmatch(file.name):
            step = found.setdefault(match["step"] or "", {})
            step.setdefault(int(match["shard"]), {})[int(match["piece"])] = file
    if len(found) > 1:
        raise CheckpointError(f"{address} has several checkpoints, choose one: {sorted(found)}")
    (shards,) = found.values()
    pieces = max(len(shard) for shard in shards.values())
    for number in range(max(shards) + 1):
        if number not in shards:
            raise CheckpointError(f"{address} is incomplete: shard_{number} is missing")
        if missing := set(range(pieces)) - set(shards[number]):
            raise CheckpointError(
                f"{address} is incomplete: shard_{number} has no {min(missing)}.npz"
            )
    return [[shard[piece] for piece in range(pieces)] for _, shard in sorted(shards.items())]


def _read_index(address: str, shards: list[list[FileInfo]]) -> list[list[Member]]:
    """The leaves of every shard, in the order of the state."""
    found: dict[str, list[Member]] = {}

    def index(file: FileInfo) -> None:
        found[file.name] = index_npz(file.address)

    storage.for_each(index, [file for shard in shards for file in shard])
    return [[member for file in shard for member in found[file.name]] for shard in shards]


@dataclass(frozen=True)
class _Leaf:
    """One parameter: its parts from all shards."""

    parts: list[StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype


def _open_leaves(shards: list[list[Member]]) -> list[_Leaf]:
    found: dict[tuple[int, int], StoredTensor] = {}

    def open_one(place: tuple[int, int]) -> None:
        shard, number = place
        found[place] = open_member(shards[shard][number])

    count = len(shards[0])
    storage.for_each(open_one, [(s, n) for s in range(len(shards)) for n in range(count)])
    leaves = [_Leaf([found[s, n] for s in range(len(shards))]) for n in range(count)]
    for leaf in leaves:
        for part in leaf.parts:
            if part.shape != leaf.shape or part.dtype != leaf.dtype:
                raise CheckpointError(
                    f"{part.name} has the shape {part.shape} and dtype {part.dtype}; shard 0's "
                    f"part of it, {leaf.parts[0].name}, has {leaf.shape} and {leaf.dtype}"
                )
            if not part.dtype.is_floating_point:
                raise CheckpointError(f"{part.name} is not a parameter: its dtype is {part.dtype}")
    return leaves


def _merged(leaves: list[_Leaf], n_layer: int) -> Iterator[StoredTensor]:
    """Every parameter under its name; leaves are sorted by name as text."""
    source = iter(leaves)

    def take(name: str, dimensions: int) -> _Leaf:
        leaf = next(source)
        if len(leaf.shape) != dimensions:
            raise CheckpointError(
                f"{leaf.parts[0].name} has the shape {leaf.shape}, but {name} should have "
                f"{dimensions} dimensions: this is not a GPT-J of {n_layer} layers"
            )
        return leaf

    def joined(name: str) -> StoredTensor:  # (D, N / S) per shard, joined to (N, D)
        return _joined(name, take(name, 2), axis=0, transpose=True)

    def stacked(name: str) -> StoredTensor:  # (N / S, D) per shard, joined to (D, N)
        return _joined(name, take(name, 2), axis=1, transpose=True)

    def joined_bias(name: str) -> StoredTensor:
        return _joined(name, take(name, 1), axis=0, transpose=False)

    def summed_bias(name: str) -> StoredTensor:
        return _summed(name, take(name, 1))

    def first(name: str) -> StoredTensor:  # every shard has the whole
        return take(name, 1).parts[0].renamed(name)

    bias = take("the embedding's bias", 1)
    yield _embedding("transformer.wte.weight", take("transformer.wte.weight", 2), bias)
    for layer in sorted(range(n_layer), key=lambda number: f"layer_{number}/"):
        block = f"transformer.h.{layer}"
        yield joined(f"{block}.attn.q_proj.weight")
        yield joined(f"{block}.attn.v_proj.weight")
        yield joined(f"{block}.attn.k_proj.weight")
        yield stacked(f"{block}.attn.out_proj.weight")
        yield joined_bias(f"{block}.mlp.fc_in.bias")
        yield joined(f"{block}.mlp.fc_in.weight")
        yield summed_bias(f"{block}.mlp.fc_out.bias")
        yield stacked(f"{block}.mlp.fc_out.weight")
        yield first(f"{block}.ln_1.bias")
        yield first(f"{block}.ln_1.weight")
    yield joined_bias("lm_head.bias")
    yield joined("lm_head.weight")
    yield first("transformer.ln_f.bias")
    yield first("transformer.ln_f.weight")


def _joined(name: str, leaf: _Leaf, axis: int, transpose: bool) -> StoredTensor:
    """The parts, optionally transposed, then concatenated along an axis of the result."""
    part_shape = leaf.shape[::-1] if transpose else leaf.shape
    shape = list(part_shape)
    shape[axis] *= len(leaf.parts)

    def load(dtype: torch.dtype) -> Tensor:
        target = torch.empty(shape, dtype=dtype)
        places = torch.split(target, part_shape[axis], dim=axis)
        for place, part in zip(places, leaf.parts, strict=True):
            values = part.load(part.dtype)
            fill(place, values.T if transpose else values, name)
        return target

    return StoredTensor(name, tuple(shape), leaf.dtype, load)


def _summed(name: str, leaf: _Leaf) -> StoredTensor:
    """The sum over shards: each shard's bias was added before the all-reduce."""

    def load(dtype: torch.dtype) -> Tensor:
        return fill(torch.empty(leaf.shape, dtype=dtype), _sum(leaf), name)

    return StoredTensor(name, leaf.shape, leaf.dtype, load)


def _embedding(name: str, leaf: _Leaf, bias: _Leaf) -> StoredTensor:
    """The embedding, with the sum of the shards' biases added to each row."""
    rows, width = leaf.shape

    def load(dtype: torch.dtype) -> Tensor:
        added = _sum(bias)
        target = torch.empty(rows * len(leaf.parts), width, dtype=dtype)
        for place, part in zip(torch.split(target, rows), leaf.parts, strict=True):
            values = part.load(part.dtype)
            for some, sums in zip(
                torch.split(values, _ROWS), torch.split(place, _ROWS), strict=True
            ):
                fill(sums, some + added, name)  # in float32
        return target

    if bias.shape != (width,):
        raise CheckpointError(
            f"{bias.parts[0].name} has the shape {bias.shape}, but the embedding's rows have "
            f"{width} columns"
        )
    return StoredTensor(name, (rows * len(leaf.parts), width), leaf.dtype, load)


def _sum(leaf: _Leaf) -> Tensor:
    """Sum in float32: bfloat16 would lose too much precision."""
    total = torch.zeros(leaf.shape)
    for part in leaf.parts:
        total += part.load(torch.float32)
    return total
