"""An engine's numbers at one moment, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Gauges say how it is now; counters count since the engine's start and only grow."""

    # Gauges.
    running: int  # sequences that the engine works on; a beam search counts its beams
    waiting: int  # requests, those that were preempted too
    pages_used: int  # of the cache, by what runs
    pages_cached: int  # unused ones that still hold a prefix, free for whoever needs them
    pages_total: int
    last_batch_size: int  # sequences of the last step
    # Counters.
    steps: int
    tokens_in: int  # computed of prompts, and again of what was preempted
    tokens_out: int  # chosen, with stop tokens; of a beam search those of its results
    prefix_tokens_asked: int  # of prompts that were looked up in the prefix cache
    prefix_tokens_hit: int  # of them, found and not computed again
    preemptions: int
    cancellations: int
