"""Runs the largest possible steps once, to measure the memory they need besides the cache.

PyTorch's allocator keeps a step's memory, and libraries allocate workspaces on first use, so what
is free after a rehearsal is free for the cache.
"""

from __future__ import annotations

import numpy as np
import torch

from gptj.engine.limits import Limits
from gptj.engine.runners.base import Ints, Runner, StepBatch
from gptj.engine.sampler import Sampler
from gptj.sampling import SamplingParams

# Exercises the whole sampler. With equal logits top_p keeps all tokens.
EVERY_PARAMETER = SamplingParams(
    temperature=0.5,
    top_k=1000,
    top_p=0.99,
    min_p=1e-6,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    logit_bias={0: 1.0},
    bad_words_ids=((0,),),  # a mask, as grammars have one
    logprobs=20,
)
PROMPT_LOGPROBS = 20


@torch.inference_mode()
def rehearse(runner: Runner, limits: Limits) -> None:
    """Decode with all sequences at the end of their context, then fill the step with prompts.

    All positions are in page 0, whose content is overwritten.
    """
    context, vocabulary = runner.config.n_positions, runner.config.vocab_size
    sampler = Sampler((), runner.device, vocabulary, runner.draw)
    keys = list(range(limits.max_num_seqs))
    for key in keys:
        sampler.add(key, EVERY_PARAMETER, [0], [])
    logits_RV = runner.step(_batch(runner, [1] * limits.max_num_seqs))
    sampler.sample(logits_RV.zero_(), keys)
    del logits_RV
    decoding = min(limits.max_num_seqs - 1, limits.max_num_batched_tokens - 1)
    left = limits.max_num_batched_tokens - decoding
    chunks = [min(context, left - start) for start in range(0, left, context)]
    logits_LV = runner.step(_batch(runner, [1] * decoding + chunks))
    following = [0] * len(logits_LV)
    sampler.prompt_logprobs(logits_LV, following, min(PROMPT_LOGPROBS, vocabulary))
    sampler.close()


def _batch(runner: Runner, lengths: list[int]) -> StepBatch:
    """`lengths` tokens at the end of full contexts, with logits of all tokens."""
    context = runner.config.n_positions
    query_start_loc: Ints = np.cumsum([0, *lengths]).astype(np.int32)
    positions = [np.arange(context - length, context) for length in lengths]
    tokens = int(query_start_loc[-1])
    pages = np.zeros((len(lengths), -(-context // runner.page_size)), np.int32)
    return StepBatch(
        np.zeros(tokens, np.int32),
        np.concatenate(positions).astype(np.int32),
        query_start_loc,
        pages,
        np.arange(tokens, dtype=np.int32),
    )
