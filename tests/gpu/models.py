"""Models, runners and engines of the check: GPT-J 6B's shapes with random weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
from checking import Check
from plain_operations import PlainOperations

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine import backends as choice
from gptj.engine.cache_size import free_bytes, page_bytes, tokens_within
from gptj.engine.engine import Engine
from gptj.engine.runners.base import PAGE_SIZE, StepBatch
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Operations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.weights import Format
from gptj_bench.decode import TEXT_IDS, random_model

SPREAD = 0.02  # of weights; norms and biases differ from 1 and 0 by five times as much


def new_model(check: Check, config: GPTJConfig, dtype: torch.dtype) -> GPTJForCausalLM:
    """On the device, with norms and biases that do something."""
    model = random_model(config, dtype, check.device.kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=5 * SPREAD)
    return model.requires_grad_(False)


def new_runner(
    check: Check,
    model: GPTJForCausalLM,
    pages: int,
    *,
    quantization: Format | None = None,
    kv_cache_dtype: choice.KVCacheDtype = "auto",
    interpreted: bool = False,
) -> CudaRunner:
    """The runner that a deployment gets, which takes the model's weights.

    AssertionError if it is another one than that with our kernels: the log has the reason.

    Args:
        quantization: of the weights.
        kv_cache_dtype: fp8, or auto: the model's.
        interpreted: a rehearsal, too, has our kernels, and not the plain operations, which take
            a hundredth of the time.
    """
    if check.rehearsal:
        operations: Operations = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
        if interpreted:
            operations = TritonOperations(model.config, model.dtype, processors=1)
        dtype = choice.cache_dtype(kv_cache_dtype, model.dtype)
        return CudaRunner(
            model,
            pages,
            operations,
            quantization=quantization,
            cache_dtype=dtype,
            release=True,
        )
    runner = choice.best_runner(
        model,
        pages * CudaRunner.page_size,
        quantization=quantization or "none",
        kv_cache_dtype=kv_cache_dtype,
        release=True,
    )
    assert isinstance(runner, CudaRunner), f"the model got a {type(runner).__name__}"
    return runner


def plain_runner(
    model: GPTJForCausalLM, pages: int, *, quantization: Format | None = None
) -> CudaRunner:
    """The same steps in PyTorch, without graphs."""
    operations = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
    with mock.patch("gptj.engine.runners.cuda.runner.Graphs", return_value=None):
        return CudaRunner(model, pages, operations, quantization=quantization)


def new_engine(runner: CudaRunner, max_num_seqs: int, max_num_batched_tokens: int) -> Engine:
    """Without prefix caching: every prompt is computed."""
    return Engine(
        runner,
        eos_ids=[],
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        prefix_caching=False,
    )


def prompts(config: GPTJConfig, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random ids."""
    numbers, below = random.Random(seed), min(TEXT_IDS, config.vocab_size)
    return [[numbers.randrange(below) for _ in range(length)] for length in lengths]


def one_chunk(ids: Sequence[int], pages: Sequence[int]) -> StepBatch:
    """A step of one new sequence's tokens, with logits after the last."""
    count = len(ids)
    return StepBatch(
        np.array(ids, np.int32),
        np.arange(count, dtype=np.int32),
        np.array([0, count], np.int32),
        np.array([pages], np.int32),
        np.array([count - 1], np.int32),
    )


def cache_tokens(check: Check, model: GPTJForCausalLM, share: float, sequences: int) -> int:
    """Positions that fit in a share of the free memory, and that so many sequences can use."""
    config = model.config
    return check.pick(
        tokens_within(
            config,
            free_bytes(model.device),
            share=share,
            dtype=model.dtype,
            most=sequences * config.n_positions,
        ),
        128,
    )


def cache_bytes_a_token(config: GPTJConfig, dtype: torch.dtype) -> int:
    """Keys and values of a position, in all layers; in fp8 with their scales."""
    return page_bytes(config, dtype) // PAGE_SIZE


def matrix_parameters(config: GPTJConfig) -> int:
    """Weights that every token is multiplied by, the head's apart."""
    width, inner = config.n_embd, config.inner_dim
    return config.n_layer * (4 * width * width + 2 * width * inner)


def prefill_operations(config: GPTJConfig, tokens: int) -> float:
    """Floating-point operations of a prompt, with logits after its last token."""
    products = 2 * matrix_parameters(config) * tokens + 2 * config.n_embd * config.vocab_size
    attention = config.n_layer * 2 * config.n_embd * tokens * (tokens + 1)  # causal: the half
    return float(products + attention)
