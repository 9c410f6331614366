"""Defaults of max_num_seqs and max_num_batched_tokens, by device.

A few sequences saturate a CPU. A GPU reads its weights once per step, for one sequence or hundreds,
and becomes compute-bound at about a thousand tokens per step; the cache limits its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU_MAX_NUM_SEQS = 64
CPU_MAX_NUM_BATCHED_TOKENS = 256
GPU_MAX_NUM_SEQS = (8, 256)  # minimum, and maximum: the largest CUDA graph
GPU_MAX_NUM_BATCHED_TOKENS = (256, 2048)
STEP_SHARE = 4  # tokens per step and sequence: one for decoding, three for prefill
TYPICAL_TOKENS = 512  # of a running sequence, to estimate how many the cache holds


@dataclass(frozen=True)
class Limits:
    """Limits of one step."""

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
        """The given values, with defaults for the device in place of None.

        Args:
            cache_tokens: positions in the cache.
            context_length: the model's.
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
