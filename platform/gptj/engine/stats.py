"""A snapshot of an engine's statistics, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Gauges are current values; counters count from the engine's start."""

    # Gauges.
    running: int  # sequences; a beam search counts once for each beam
    waiting: int  # requests, including preempted ones
    pages_used: int  # by running sequences
    pages_cached: int  # unused pages that hold a prefix; they count as free
    pages_total: int
    last_batch_size: int  # sequences of the last step
    adapters: int  # in memory
    # Counters.
    steps: int
    tokens_in: int  # prefilled; tokens of preempted requests count again
    tokens_out: int  # sampled, including stop tokens; of a beam search, those of its results
    prefix_tokens_asked: int  # tokens of prompts looked up in the prefix cache
    prefix_tokens_hit: int  # tokens found there
    preemptions: int
    cancellations: int
    constrained_tokens_out: int  # sampled under a grammar
    adapter_evictions: int
    mask_wait_ms: int  # milliseconds that steps waited for the masks of constrained requests
    spec_decode_num_drafts: int  # verified, of any length
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
