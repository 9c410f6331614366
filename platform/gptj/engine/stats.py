"""A snapshot of an engine's statistics, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def gauge(description: str) -> Any:
    """A field with a current value."""
    return field(metadata={"gauge": True, "description": description})


def counter(description: str) -> Any:
    """A field that counts from the engine's start."""
    return field(metadata={"gauge": False, "description": description})


@dataclass(frozen=True)
class EngineStats:
    """Each field's metadata says what it counts, and whether it is a gauge."""

    running: int = gauge("Running sequences; a beam search counts once for each beam.")
    waiting: int = gauge("Waiting requests, including preempted ones.")
    pages_used: int = gauge("Pages of the KV cache used by running sequences.")
    pages_cached: int = gauge("Unused pages that hold a prefix; they count as free.")
    pages_total: int = gauge("Pages of the KV cache.")
    last_batch_size: int = gauge("Sequences of the last step.")
    adapters: int = gauge("Adapters in memory.")
    steps: int = counter("Steps.")
    tokens_in: int = counter("Prefilled tokens; those of preempted requests count again.")
    tokens_out: int = counter(
        "Sampled tokens, including stop tokens; of a beam search, those of its results."
    )
    prefix_tokens_asked: int = counter("Tokens of prompts looked up in the prefix cache.")
    prefix_tokens_hit: int = counter("Tokens of prompts found in the prefix cache.")
    preemptions: int = counter("Preemptions of sequences.")
    cancellations: int = counter("Cancelled requests.")
    constrained_tokens_out: int = counter("Tokens sampled under a grammar.")
    adapter_evictions: int = counter("Adapters removed from memory to make room.")
    mask_wait_ms: int = counter(
        "Milliseconds that steps waited for the masks of constrained requests."
    )
    spec_decode_num_drafts: int = counter("Verified drafts of prompt lookup, of any length.")
    spec_decode_num_draft_tokens: int = counter("Tokens of those drafts.")
    spec_decode_num_accepted_tokens: int = counter("Accepted tokens of those drafts.")
