"""What fits on a GPU while serving: a configuration and the card's memory in, settings out.

A process needs weights, what CUDA keeps for itself, and what steps compute with; a generation
service gives the rest to its cache of keys and values, the others to the rows of a batch. All in
bytes, for weights in 16 bits.

    python -m gptj.engine.memory            GPT-J 6B on cards of 16, 24, 40 and 80 GB, as a table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptj.checkpoints.skeleton import without_weights
from gptj.config import GPTJConfig
from gptj.engine.cache_size import page_bytes
from gptj.engine.runners.base import PAGE_SIZE
from gptj.model import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj.pretrained import GPTJPreTrainedModel

GIB = 2**30
# What PyTorch reports as a card's total, the least of those that are sold with so many GB, from
# messages of memory errors: T4 (14.56 GiB), A10G and L4 (22.0), A100 (39.4), A100 and H100 (79.1).
CARDS = {16: 14.5 * GIB, 24: 22.0 * GIB, 40: 39.3 * GIB, 80: 79.0 * GIB}
# Assumptions, since no GPU was at hand: a process's CUDA context with its libraries' kernels; and,
# of a generation service, the logits, recorded graphs and the allocator's gaps.
CONTEXT_BYTES = 0.6e9
STEP_BYTES = 1.0e9
# Of what the allocator holds, how much tensors can use.
ALLOCATOR_SHARE = 0.9
# A worker pod's own memory: Ray's processes, and a replica's programs and weights on their way.
RAY_HOST_BYTES = 3 * GIB
REPLICA_HOST_BYTES = 6 * GIB
# Outputs that run together at most, and the tokens of one at its end, in k8s/sizing.md's traffic.
MAX_NUM_SEQS = 64
MEAN_REQUEST_TOKENS = 572
MOST_REPLICAS_A_CARD = 2  # of a service of rows: more compete for the same arithmetic


@dataclass(frozen=True)
class Generation:
    """Settings of a generation service that has a card for itself."""

    cache_tokens: int
    max_num_seqs: int


@dataclass(frozen=True)
class BatchSizes:
    """Settings of a service that computes batches of whole rows."""

    replicas_per_card: int
    max_batch: int  # rows, each as long as the model's context


def weight_bytes(cls: type[GPTJPreTrainedModel], config: GPTJConfig) -> int:
    """Of a model in 16 bits."""
    with without_weights():
        return 2 * cls(config).num_parameters()


def activation_bytes(config: GPTJConfig, rows: int, length: int) -> int:
    """The most that a forward pass holds beside the weights, for rows of one length, in 16 bits.

    A block has four tensors of the model's width a token (its input, the norm, attention's result,
    and one that is being made) and two of the MLP's; padding costs a mask of scores, which
    attention may copy to align it. No layer's are kept for the next one's time.
    """
    token = 2 * (4 * config.n_embd + 2 * config.inner_dim)
    mask = 2 * 2 * length
    return rows * length * (token + mask)


def generation(config: GPTJConfig, card_bytes: float) -> Generation:
    """The cache that fits, in whole pages, and how many outputs it holds at a time.

    Raises ValueError if there is no room for one request of the model's whole context.
    """
    weights = weight_bytes(GPTJForCausalLM, config)
    left = card_bytes - CONTEXT_BYTES - STEP_BYTES - weights
    most = MAX_NUM_SEQS * config.n_positions
    tokens = min(int(left // page_bytes(config, 2)) * PAGE_SIZE, most)
    if tokens < config.n_positions:
        raise ValueError(
            f"{card_bytes / 1e9:.1f} GB hold weights of {weights / 1e9:.1f} GB and a cache of "
            f"{max(0, tokens)} tokens, fewer than the model's context of {config.n_positions}"
        )
    return Generation(tokens, max(1, min(MAX_NUM_SEQS, tokens // MEAN_REQUEST_TOKENS)))


def batch_sizes(
    cls: type[GPTJPreTrainedModel], config: GPTJConfig, card_bytes: float, most: int
) -> BatchSizes:
    """How many replicas share a card, and the rows of a batch of each, a power of two up to `most`.

    As many replicas as leave room for the largest batch, and one anyway.

    Raises ValueError if there is no room for a single row of the model's whole context.
    """
    row = activation_bytes(config, 1, config.n_positions)
    for replicas in range(MOST_REPLICAS_A_CARD, 0, -1):
        left = card_bytes / replicas - CONTEXT_BYTES - weight_bytes(cls, config)
        fitting = int(left * ALLOCATOR_SHARE // row)
        if fitting >= most or (replicas == 1 and fitting >= 1):
            return BatchSizes(replicas, min(most, 2 ** (fitting.bit_length() - 1)))
    raise ValueError(
        f"{card_bytes / 1e9:.1f} GB hold no batch of one row beside a {cls.__name__}, which takes "
        f"{row / 1e9:.1f} GB"
    )


def host_bytes(replicas: int) -> int:
    """Of a worker pod: what its processes need beside shared memory and the system's file cache."""
    return RAY_HOST_BYTES + replicas * REPLICA_HOST_BYTES


def main() -> None:
    config = GPTJConfig.preset("6b", dtype=torch.float16)
    print("| card | generation: cache, outputs | classification: a card, batch | questions |")
    print("|---|---|---|---|")
    for size, card in CARDS.items():
        text = generation(config, card)
        labels = batch_sizes(GPTJForSequenceClassification, config, card, 32)
        answers = batch_sizes(GPTJForQuestionAnswering, config, card, 16)
        print(
            f"| {size} GB | {text.cache_tokens:,} tokens, {text.max_num_seqs} "
            f"| {labels.replicas_per_card}, {labels.max_batch} rows "
            f"| {answers.replicas_per_card}, {answers.max_batch} rows |"
        )


if __name__ == "__main__":
    main()
