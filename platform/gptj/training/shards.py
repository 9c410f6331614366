"""Optimizer state as fragments of parameters: fp32 masters and moments at any ZeRO stage.

DeepSpeed packs fp32 masters and Adam's moments into flat tensors, whose layout depends on the ZeRO
stage and the number of ranks. A shard is a safetensors file of one rank's fragments, each named
`KIND/START/PARAMETER`: the kind (master, exp_avg, exp_avg_sq), the index of its first number in
the flattened parameter, and the parameter. A run can thus resume at another stage or with another
number of ranks: each reads the fragments that it now holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptj.checkpoints.manifest import FileRecord, HashingFile
from gptj.checkpoints.mapping import map_range
from gptj.checkpoints.tensor_file import StoredTensor, read_header
from gptj.checkpoints.weights import TensorSpec, write_tensors
from gptj.environment.extras import Extra
from gptj.errors import CheckpointError
from gptj.training.optimizer import KINDS, moment_kinds, restore_moments, stored_moments

# Imported by the processes that train, and by no driver: it takes seconds.
fp16 = Extra("deepspeed.runtime.fp16", "training", "deepspeed")
zero = Extra("deepspeed.runtime.zero", "training", "deepspeed")

MASTER = "master"
# Attributes of DeepSpeed's two kinds of loss scaler.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """A part of one parameter that this rank's optimizer updates."""

    name: str  # the parameter's
    start: int  # its first element in the flattened parameter
    length: int
    flat: Tensor  # fp32, may hold other parameters too; keys the optimizer's state
    offset: int  # where the fragment begins in `flat`

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment in `flat`, or in a tensor of the same shape, as a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def fragments(engine: Any) -> list[Fragment]:
    """All fragments of this rank; at stage 0 every rank has all parameters whole."""
    optimizer, names = engine.optimizer, engine.param_names
    found: list[Fragment] = []
    if isinstance(optimizer, zero.stage3.DeepSpeedZeroOptimizer_Stage3):
        # Each parameter is cut into as many parts as there are ranks; the last may be padded.
        rank = dist.get_rank(optimizer.dp_process_group)
        for group, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                length = max(0, min(size, parameter.ds_numel - rank * size))
                found.append(Fragment(names[parameter], rank * size, length, flat, offset))
                offset += size
    elif isinstance(optimizer, zero.stage_1_and_2.DeepSpeedZeroOptimizer):
        # The parameters are concatenated, and the whole is cut into equal parts.
        for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            first = dist.get_rank(optimizer.real_dp_process_group[number]) * flat.numel()
            for parameter, begin in zip(
                optimizer.round_robin_bit16_groups[number],
                optimizer.round_robin_bit16_offsets[number],
                strict=True,
            ):
                start = max(0, first - begin)
                end = min(parameter.numel(), first + flat.numel() - begin)
                found.append(
                    Fragment(names[parameter], start, end - start, flat, begin + start - first)
                )
    elif isinstance(optimizer, fp16.fused_optimizer.FP16_Optimizer):
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                found.append(Fragment(names[parameter], 0, parameter.numel(), flat, offset))
                offset += parameter.numel()
    elif isinstance(optimizer, fp16.unfused_optimizer.FP16_UnfusedOptimizer):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, flat in zip(group, masters, strict=True):
                found.append(Fragment(names[parameter], 0, parameter.numel(), flat, 0))
    else:  # fp32 at stage 0: the plain optimizer, which holds the parameters themselves
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.append(Fragment(names[parameter], 0, parameter.numel(), parameter, 0))
    return [each for each in found if each.length > 0]


def write_shard(engine: Any, path: Path) -> FileRecord:
    """Write this rank's fragments, one at a time; all ranks must call it."""
    if isinstance(engine.optimizer, zero.stage3.DeepSpeedZeroOptimizer_Stage3):
        # Release parameters that the last loss left gathered.
        engine.optimizer.checkpoint_event_prologue()
        engine.optimizer.checkpoint_event_epilogue()
    mine = fragments(engine)
    kinds = dict.fromkeys(kind for each in mine for kind in _kinds(engine, each.flat))

    def tensors() -> Iterator[Tensor]:
        for fragment in mine:
            yield fragment.of(fragment.flat)
            moments = _moments(engine, fragment)
            for kind in kinds:
                # A parameter without a gradient so far has no moments.
                moment = moments.get(kind)
                yield torch.zeros(fragment.length) if moment is None else moment

    specs = [
        TensorSpec(f"{kind}/{each.start}/{each.name}", (each.length,), torch.float32)
        for each in mine
        for kind in (MASTER, *kinds)
    ]
    with path.open("wb") as raw:
        file = HashingFile(raw)
        write_tensors(file, specs, tensors())
    return FileRecord(file.size, file.hash.hexdigest())


def counters(engine: Any) -> dict[str, Any]:
    """DeepSpeed's counters, to resume from; equal on all ranks."""
    scaler = _scaler(engine)
    return {
        # At stage 0, FusedAdam counts only in the last state of a group.
        "updates": max(
            (int(state["step"]) for state in engine.basic_optimizer.state.values() if state),
            default=0,
        ),
        "scheduled": engine.lr_scheduler.last_epoch,
        "loss_scale": {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
    }


class Restoration:
    """Restores this rank's fragments, and with them the model, from shards.

    Call `read` for each shard that `needs` selects; then all ranks call `finish` together.
    """

    def __init__(self, engine: Any, counters: dict[str, Any]) -> None:
        self._engine = engine
        self._counters = counters
        self._optimizer = engine.optimizer
        if isinstance(self._optimizer, zero.stage3.DeepSpeedZeroOptimizer_Stage3):
            self._optimizer.checkpoint_event_prologue()  # drops parameters that are gathered
        self._mine: dict[str, list[Fragment]] = {}
        for fragment in fragments(engine):
            self._mine.setdefault(fragment.name, []).append(fragment)
        self._unknown: set[str] = set()
        self._read = 0  # numbers
        self._kinds: set[str] = set()

    def needs(self, address: str) -> bool:
        """Whether this rank needs a shard, judging by its header."""
        return bool(list(self._overlaps(read_header(address).tensors, address)))

    def read(self, path: Path) -> None:
        """Copy from a shard in a local, verified file."""
        with path.open("rb") as file:
            for stored, kind, begin, fragment in self._overlaps(
                read_header(str(path)).tensors, str(path)
            ):
                source = stored.view(map_range(file.fileno(), stored.start, stored.size))
                first = max(begin, fragment.start)
                end = min(begin + len(source), fragment.start + fragment.length)
                target = fragment.of(self._target(fragment.flat, kind))
                target[first - fragment.start : end - fragment.start].copy_(
                    source[first - begin : end - begin]
                )
                self._read += end - first
                self._kinds.add(kind)

    def finish(self, address: str) -> None:
        """Check that nothing is missing, then derive the weights from the masters.

        Raises:
            CheckpointError: if the shards belong to another model, or are incomplete.
        """
        engine, optimizer = self._engine, self._optimizer
        mine = [each for fragments in self._mine.values() for each in fragments]
        expected = sum(each.length for each in mine) * len(self._kinds)
        if mine and (self._read != expected or MASTER not in self._kinds):
            raise CheckpointError(
                f"{address} is not of this model, or damaged: it has {self._read} of the "
                f"{expected} numbers that this worker needs"
            )
        if self._unknown:
            raise CheckpointError(
                f"{address} is not of this model, which has no {', '.join(sorted(self._unknown))}"
            )
        updates = self._counters["updates"]
        torchs = isinstance(engine.basic_optimizer, torch.optim.AdamW)  # counts in a tensor
        for state in engine.basic_optimizer.state.values():
            state["step"] = torch.tensor(float(updates)) if torchs else updates
        restore_moments(engine.basic_optimizer)
        scaler = _scaler(engine)
        for name, value in self._counters["loss_scale"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
        self._schedule(self._counters["scheduled"])
        with torch.no_grad():
            if isinstance(optimizer, zero.stage3.DeepSpeedZeroOptimizer_Stage3):
                for number in range(len(optimizer.fp16_groups)):
                    optimizer._reassign_or_swap_out_partitioned_parameters(number)
                optimizer.checkpoint_event_epilogue()  # gathers those that are kept whole
            elif isinstance(optimizer, zero.stage_1_and_2.DeepSpeedZeroOptimizer):
                optimizer.update_lp_params()
            else:
                names = {name: parameter for parameter, name in engine.param_names.items()}
                for each in mine:
                    if each.flat is not names[each.name]:
                        names[each.name].view(-1).copy_(each.of(each.flat))

    def _overlaps(
        self, tensors: Iterable[StoredTensor], address: str
    ) -> Iterator[tuple[StoredTensor, str, int, Fragment]]:
        """(tensor, its kind, its start in the parameter, a fragment of ours that it overlaps)."""
        known = set(self._engine.param_names.values())
        for stored in tensors:
            kind, start, name = [*stored.name.split("/", 2), "", ""][:3]
            if not start.isdecimal() or stored.dtype != torch.float32 or len(stored.shape) != 1:
                raise CheckpointError(
                    f"{address} is damaged: {stored.name!r} is not a part of a parameter"
                )
            begin = int(start)
            if name not in known:
                self._unknown.add(name)
            for fragment in self._mine.get(name, []):
                if (
                    begin < fragment.start + fragment.length
                    and fragment.start < begin + stored.shape[0]
                ):
                    yield stored, kind, begin, fragment

    def _target(self, flat: Tensor, kind: str) -> Tensor:
        if kind == MASTER:
            return flat
        state: dict[str, Tensor] = self._engine.basic_optimizer.state[flat]
        if kind not in state:
            # Unquantized moments may not fit the device; restore_moments moves them in parts.
            device = torch.device("cpu") if kind in KINDS else flat.device
            state[kind] = torch.zeros_like(flat.detach(), device=device)
        return state[kind]

    def _schedule(self, steps: int) -> None:
        """Set the scheduler to after `steps` steps, by the run's current length."""
        scheduler = self._engine.lr_scheduler
        scheduler.last_epoch = steps - 1
        scheduler._step_count = max(steps, 1) + 1
        scheduler.step()


def _kinds(engine: Any, flat: Tensor) -> Sequence[str]:
    """Names of the optimizer's per-element state of a flat tensor."""
    state = engine.basic_optimizer.state.get(flat, {})
    return moment_kinds(state) or [
        kind
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == flat.numel()
    ]


def _moments(engine: Any, fragment: Fragment) -> dict[str, Tensor]:
    """One fragment's moments; only one, since 8-bit moments are stored several times as large."""
    state = engine.basic_optimizer.state.get(fragment.flat, {})
    if moment_kinds(state):
        return stored_moments(state, fragment.offset, fragment.offset + fragment.length)
    return {kind: fragment.of(state[kind]) for kind in _kinds(engine, fragment.flat)}


def _scaler(engine: Any) -> Any:
    """DeepSpeed's loss scaler; None in fp32 at stage 0."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
