"""Size a service for a GPU: a configuration and the GPU's memory in, settings out.

A process needs memory for weights, the CUDA context and activations; generation uses the rest for
its KV cache, the other services for the rows of a batch. In bytes, with 16-bit weights.

    python -m gptj.engine.memory            GPT-J 6B on cards of 16, 24, 40 and 80 GB, as a table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptj.checkpoints.skeleton import without_weights
from gptj.config import GPTJConfig
from gptj.engine.cache_size import page_bytes
from gptj.engine.limits import GPU_MAX_NUM_SEQS
from gptj.engine.runners.base import PAGE_SIZE
from gptj.layers.int4 import is_quantized, quantize_blocks
from gptj.model import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj.pretrained import GPTJPreTrainedModel

GIB = 2**30
# Total memory as PyTorch reports it: the minimum among models of that nominal size, from published
# out-of-memory errors: T4 (14.56 GiB), A10G and L4 (22.0), A100 (39.4), A100 and H100 (79.1).
CARDS = {16: 14.5 * GIB, 24: 22.0 * GIB, 40: 39.3 * GIB, 80: 79.0 * GIB}
# A process's CUDA context with its libraries' kernels; and, for generation, logits, CUDA graphs and
# fragmentation. Measured on an H100 of 85.02 GB: beside 12.1 GB of weights and a cache of 153,680
# tokens (70.5 GB), 128 streams left 0.58 GB free. So the two took 1.84 GB: 0.5 to 0.55 the context,
# 1.3 the rest. For smaller cards, both numbers are assumptions.
CONTEXT_BYTES = 0.6e9
STEP_BYTES = 1.5e9
# The share of the allocator's memory that tensors can use.
ALLOCATOR_SHARE = 0.9
# A worker pod's host memory: Ray's processes, and a replica's process while it loads weights.
RAY_HOST_BYTES = 3 * GIB
REPLICA_HOST_BYTES = 6 * GIB
# A request's mean final length, for k8s/sizing.md.
MEAN_REQUEST_TOKENS = 572
MAX_REPLICAS_PER_CARD = 2  # of batch services: more would compete for the same compute


@dataclass(frozen=True)
class Generation:
    """Settings of a generation service with its own card."""

    cache_tokens: int
    max_num_seqs: int


@dataclass(frozen=True)
class BatchSizes:
    """Settings of a service that batches whole rows."""

    replicas_per_card: int
    max_batch: int  # rows, each as long as the model's context


def weight_bytes(
    cls: type[GPTJPreTrainedModel], config: GPTJConfig, dtype: torch.dtype = torch.float16
) -> int:
    """Bytes of a model's weights in `dtype`, as from_pretrained loads them (int4 stays int4)."""
    with without_weights():
        model = cls(config)
        if is_quantized(config):
            quantize_blocks(model.base_model.get_submodule("h"))
    tensors = {
        id(each): each for each in model.state_dict(keep_vars=True).values()
    }  # tied ones once
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for tensor in tensors.values()
    )


def activation_bytes(config: GPTJConfig, rows: int, length: int) -> int:
    """Peak activations of a forward pass, for rows of one length, in 16 bits.

    For each token a block holds four tensors of the model's width (input, norm, attention output,
    and a temporary) and two of the MLP's; padding needs a mask of scores, which attention may copy
    to align it. Layers reuse the same memory.
    """
    token = 2 * (4 * config.n_embd + 2 * config.inner_dim)
    mask = 2 * 2 * length
    return rows * length * (token + mask)


def generation(config: GPTJConfig, card_bytes: float) -> Generation:
    """The cache that fits, in whole pages, and how many sequences it holds.

    Raises ValueError if one request with a full context does not fit.
    """
    weights = weight_bytes(GPTJForCausalLM, config)
    left = card_bytes - CONTEXT_BYTES - STEP_BYTES - weights
    _, most = GPU_MAX_NUM_SEQS
    tokens = min(
        int(left // page_bytes(config, torch.float16)) * PAGE_SIZE, most * config.n_positions
    )
    if tokens < config.n_positions:
        raise ValueError(
            f"{card_bytes / 1e9:.1f} GB hold weights of {weights / 1e9:.1f} GB and a cache of "
            f"only {max(0, tokens)} tokens, less than the model's context of {config.n_positions}"
        )
    return Generation(tokens, max(1, min(most, tokens // MEAN_REQUEST_TOKENS)))


def batch_sizes(
    cls: type[GPTJPreTrainedModel], config: GPTJConfig, card_bytes: float, most: int
) -> BatchSizes:
    """How many replicas share a GPU, and each one's batch size, a power of two up to `most`.

    As many replicas as fit with the largest batch, but at least one.

    Raises ValueError if one row with a full context does not fit.
    """
    row = activation_bytes(config, 1, config.n_positions)
    for replicas in range(MAX_REPLICAS_PER_CARD, 0, -1):
        left = card_bytes / replicas - CONTEXT_BYTES - weight_bytes(cls, config)
        fitting = int(left * ALLOCATOR_SHARE // row)
        if fitting >= most or (replicas == 1 and fitting >= 1):
            return BatchSizes(replicas, min(most, 2 ** (fitting.bit_length() - 1)))
    raise ValueError(
        f"{card_bytes / 1e9:.1f} GB cannot hold a {cls.__name__} and a batch of one row, which "
        f"takes {row / 1e9:.1f} GB"
    )


def host_bytes(replicas: int) -> int:
    """Memory of a worker pod's processes, without shared memory and the page cache."""
    return RAY_HOST_BYTES + replicas * REPLICA_HOST_BYTES


def main() -> None:
    config = GPTJConfig.preset("6b", dtype=torch.float16)
    print(
        "| card | generation: cache, outputs | classification: replicas, batch "
        "| question answering |"
    )
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
