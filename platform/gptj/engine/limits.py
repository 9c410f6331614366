"""How many sequences run together, and how many new tokens a step has: by the device.

A CPU is busy with few of both. A GPU reads its weights in the same time for one sequence and for
hundreds, and a step of a thousand tokens is where its arithmetic, and not its memory, sets the
pace; what bounds it is room in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU_MAX_NUM_SEQS = 64
CPU_MAX_NUM_BATCHED_TOKENS = 256
GPU_MAX_NUM_SEQS = (8, 256)  # at least and at most; for so many rows there are graphs
GPU_MAX_NUM_BATCHED_TOKENS = (256, 2048)
STEP_SHARE = 4  # tokens of a step for each sequence: three for prompts beside its own
TYPICAL_TOKENS = 512  # of a sequence in the middle of its life: then so many fit in the cache


@dataclass(frozen=True)
class Limits:
    """Of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(
        cls,
        device: torch.device,
        cache_tokens: int,
        context_length: int,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> Limits:
        """What is given, and for None what suits the device.

        Args:
            cache_tokens: positions that the cache has room for.
            context_length: of the model.
        """
        if device.type == "cpu":
            running, tokens = CPU_MAX_NUM_SEQS, max(CPU_MAX_NUM_BATCHED_TOKENS, max_num_seqs or 0)
        else:
            least, most = GPU_MAX_NUM_SEQS
            running = cache_tokens // min(TYPICAL_TOKENS, context_length)
            running = max(least, min(running, most))
            least, most = GPU_MAX_NUM_BATCHED_TOKENS
            together = max_num_seqs or running
            tokens = max(least, min(STEP_SHARE * together, most), together)
        if max_num_seqs is None:
            max_num_seqs = (
                running if max_num_batched_tokens is None else min(running, max_num_batched_tokens)
            )
        return cls(
            max_num_seqs, tokens if max_num_batched_tokens is None else max_num_batched_tokens
        )
