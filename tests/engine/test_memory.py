"""What fits on a GPU: the arithmetic against what PyTorch's operations hold."""

from __future__ import annotations

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification
from gptj.checkpoints.skeleton import without_weights
from gptj.engine import memory
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.training.live_bytes import LiveBytes

SIX_B = GPTJConfig.preset("6b")


def peak(config: GPTJConfig, rows: int, length: int, *, padded: bool) -> int:
    """Of a forward pass in fp16, by shapes alone."""
    with without_weights():
        model = GPTJForSequenceClassification(config).to(torch.float16).eval()
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    mask = torch.ones(rows, length, dtype=torch.long)  # its values are looked at
    if padded:
        mask[0, -1] = 0
    with torch.inference_mode(), LiveBytes() as live:
        model.transformer(ids, attention_mask=mask, use_cache=False, return_dict=True)
    assert live.now == 0
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length"), [(1, 512), (8, 2048), (32, 2048)])
@pytest.mark.parametrize("padded", [False, True])
def test_activation_memory_of_6b_matches_the_formula(rows: int, length: int, padded: bool) -> None:
    """Never less; what it counts beside is attention's copy of the mask."""
    held = peak(SIX_B, rows, length, padded=padded)
    counted = memory.activation_bytes(SIX_B, rows, length)
    assert held <= counted <= 1.1 * held


def test_activation_memory_does_not_grow_with_layers() -> None:
    """Hidden states are kept for those who ask for them, and no others."""
    shallow, deep = (GPTJConfig(n_embd=256, n_head=4, n_layer=layers) for layers in (2, 12))
    assert peak(shallow, 4, 512, padded=False) == peak(deep, 4, 512, padded=False)


def test_tied_weights_count_once() -> None:
    config = GPTJConfig(
        vocab_size=300, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, tie_word_embeddings=True
    )
    model = GPTJForCausalLM(config).to(torch.bfloat16)
    assert memory.weight_bytes(GPTJForCausalLM, config, torch.bfloat16) == sum(
        parameter.nbytes for parameter in model.parameters()
    )


def test_weight_and_cache_sizes_match_the_model_and_the_runner() -> None:
    config = GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    model = GPTJForCausalLM(config).to(torch.float16).eval()
    assert memory.weight_bytes(GPTJForCausalLM, config) == sum(
        parameter.nbytes for parameter in model.parameters()
    )
    weights = memory.weight_bytes(GPTJForCausalLM, config)
    room = 10**7
    settings = memory.generation(config, weights + memory.CONTEXT_BYTES + memory.STEP_BYTES + room)
    with LiveBytes() as live:
        runner = TorchRunner(model, settings.cache_tokens // 16)
    assert room - 2**16 < live.now <= room
    runner.close()


def test_gpus_that_are_too_small_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"13.0 GB hold weights of 12.1 GB and a cache of only 0 tok"
    ):
        memory.generation(SIX_B, 13e9)
    with pytest.raises(ValueError, match=r"12.0 GB cannot hold a GPTJForSeq"):
        memory.batch_sizes(GPTJForSequenceClassification, SIX_B, 12e9, 32)
