"""Whole rows in, their final hidden states out, for heads that read one pass over a text.

Token ids of several rows in, (W, D) for each out: W is 1 (the last token's) or the row's length.
Rows are concatenated, never padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from gptj.engine.backends import IntQuantization, fall_back, kind_of
from gptj.engine.limits import CPU_MAX_NUM_BATCHED_TOKENS
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.model import GPTJModel
from gptj.pretrained import GPTJPreTrainedModel

Rows = Sequence[Sequence[int]]


class RowModel(Protocol):
    """A model that computes rows; not thread-safe."""

    def hidden_states(self, rows: Rows, *, last_only: bool) -> list[Tensor]:
        """(W, D) of each row, on the model's device."""

    def close(self) -> None:
        """Free the memory."""


def best_row_model(
    model: GPTJPreTrainedModel,
    *,
    max_rows: int,
    max_tokens: int,
    quantization: IntQuantization = "none",
    release: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> RowModel:
    """Our kernels on CPUs with AVX2; otherwise PyTorch, with a warning on a CPU.

    Args:
        model: in evaluation mode, on its device; its head is not used.
        max_rows: of a call.
        max_tokens: of a step; a longer row takes several with the kernels.
        quantization: int8 and int4 store weights in 8 and 4 bits, whatever the model's dtype.
        release: move the weights out of the model instead of copying them; its head stays.
        heartbeat: called again and again while a call computes.

    Raises:
        UnsupportedError: for int8 and int4 where the kernels cannot run.
        ValueError: if the model has an unmerged adapter, which the kernels would ignore.
    """
    if model.adapter is not None:
        raise ValueError("the model's adapter must be merged first: gptj.adapters.lora.merge_lora")
    body = cast(GPTJModel, model.base_model)
    if body.device.type != "cpu" and quantization == "none":
        return TorchRowModel(body, heartbeat)
    try:
        kind = kind_of(body, quantization)
        page = CpuRunner.page_size
        in_a_step = max_tokens // page + min(max_rows, max_tokens)  # each row has its own last page
        pages = max(-(-body.config.n_positions // page), in_a_step)
        runner = CpuRunner(body, pages, kind, release=release)
    except UnsupportedError as error:
        fall_back(error, quantization)
        return TorchRowModel(body, heartbeat)
    return KernelRowModel(runner, max_tokens, heartbeat)


def default_max_tokens(device: torch.device, max_rows: int, context_length: int) -> int:
    """Default token limit of a batch: the engine's on a CPU; on a GPU, `max_rows` full contexts."""
    if device.type == "cpu":
        return CPU_MAX_NUM_BATCHED_TOKENS
    return max_rows * context_length


class TorchRowModel:
    """The model's own modules, with attention within each row: gptj.layers.varlen_attention."""

    def __init__(self, model: GPTJModel, heartbeat: Callable[[], None] = lambda: None) -> None:
        self._model = model
        self._hooks = [block.register_forward_hook(lambda *_: heartbeat()) for block in model.h]

    @torch.inference_mode()
    def hidden_states(self, rows: Rows, *, last_only: bool) -> list[Tensor]:
        device, lengths = self._model.device, [len(row) for row in rows]
        ids_1T = torch.tensor([list(chain.from_iterable(rows))], device=device)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        output = self._model(ids_1T, cu_seqlens=ends, use_cache=False, return_dict=True)
        x_TD: Tensor = output.last_hidden_state[0]
        if last_only:
            return list(x_TD[ends[1:].long() - 1][:, None])
        return list(x_TD.split(lengths))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class KernelRowModel:
    """A CpuRunner without a head: rows up to `max_tokens` share a step, longer ones take several.

    Results do not depend on which rows share a step.
    """

    def __init__(
        self, runner: CpuRunner, max_tokens: int, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self._runner = runner
        self._max_tokens = max_tokens
        self._heartbeat = heartbeat

    def hidden_states(self, rows: Rows, *, last_only: bool) -> list[Tensor]:
        found: list[Tensor] = []
        for group in self._groups(rows):
            if len(group) == 1:
                found.append(self._in_chunks(group[0], last_only))
            else:
                found += self._step(group, [0] * len(group), last_only)
        return found

    def close(self) -> None:
        self._runner.close()

    def _groups(self, rows: Rows) -> Iterator[list[Sequence[int]]]:
        """The rows in order, in groups of at most `max_tokens`; a longer row alone."""
        group: list[Sequence[int]] = []
        for row in rows:
            if group and sum(map(len, group)) + len(row) > self._max_tokens:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _in_chunks(self, row: Sequence[int], last_only: bool) -> Tensor:
        count = -(-len(row) // self._max_tokens)
        borders = [len(row) * number // count for number in range(count + 1)]
        parts = [
            self._step([row[start:end]], [start], last_only)[0] for start, end in pairwise(borders)
        ]
        return parts[-1] if last_only else torch.cat(parts)

    def _step(self, rows: Rows, starts: Sequence[int], last_only: bool) -> list[Tensor]:
        """(W, D) of each row's tokens, which follow `starts` earlier ones."""
        lengths = [len(row) for row in rows]
        ends = np.array([0, *accumulate(lengths)], np.int32)
        page = self._runner.page_size
        pages = [
            -(-(start + length) // page) for start, length in zip(starts, lengths, strict=True)
        ]
        table_RP = np.zeros((len(rows), max(pages)), np.int32)
        for row, (first, count) in enumerate(zip(accumulate([0, *pages]), pages, strict=False)):
            table_RP[row, :count] = np.arange(first, first + count)
        positions = [
            np.arange(start, start + length, dtype=np.int32)
            for start, length in zip(starts, lengths, strict=True)
        ]
        x_WD = self._runner.step(
            StepBatch(
                np.fromiter(chain.from_iterable(rows), np.int32, ends[-1]),
                np.concatenate(positions),
                ends,
                table_RP,
                ends[1:] - 1 if last_only else np.arange(ends[-1], dtype=np.int32),
            )
        )
        self._heartbeat()
        return list(x_WD.split(1 if last_only else lengths))
