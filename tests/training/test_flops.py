"""Model FLOPs against PyTorch's own count of a forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.adapters.quantization import quantize_blocks
from gptj.data.causal_lm import CausalLMData
from gptj.data.examples import count_pairs
from gptj.data.rows import Row
from gptj.training.flops import StepFlops, matrix_peak

SHAPE = {"vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}
ROWS, LENGTH = 2, 64


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_steps_flops_equal_pytorchs_count(kind: str) -> None:
    """PyTorch's count of attention is not PaLM's, so that it is left out of both."""
    config = GPTJConfig(**SHAPE)
    model = GPTJForCausalLM(config)
    if kind == "qlora":
        quantize_blocks(model, "int8")
    if kind != "full":
        add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj", "fc_in")))
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 500
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if "mm" in str(name))
    found = StepFlops(model, config).count(ROWS * LENGTH, 0)
    # The first layers' inputs need no gradient under an adapter.
    assert found == pytest.approx(products, rel=0.03 if kind == "full" else 0.12)
    attention = StepFlops(model, config).count(1, LENGTH) - StepFlops(model, config).count(1, 0)
    assert attention == 12 * 3 * 64 * LENGTH


def test_documents_that_share_a_row_attend_only_to_themselves() -> None:
    """However they are packed, attention takes what each takes alone; padding takes nothing."""
    texts = ["old cat " * n for n in (1, 2, 3, 5, 8, 13)]
    tokenizer = GPTJTokenizer.train(texts, 260)
    counts: dict[str, int] = {}
    for packing in ("none", "best_fit", "concatenate"):
        rows = [Row({"text": text}, "here", n) for n, text in enumerate(texts)]
        data = CausalLMData(rows, tokenizer, 200, packing)
        batch = data.collate([data[index] for index in range(len(data))])
        assert ("cu_seqlens" in batch) == (packing == "best_fit")
        counts[packing] = count_pairs(batch)
    lengths = [len(tokenizer(text).input_ids) + 1 for text in texts]  # each with its eos
    assert counts["none"] == counts["best_fit"] == sum(length**2 for length in lengths)
    assert counts["concatenate"] > 2 * counts["none"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_peak_is_plausible(dtype: torch.dtype, device: torch.device) -> None:
    assert 1e7 < matrix_peak(device, dtype) < 1e17


def test_measuring_the_peak_leaves_the_global_generators_alone(device: torch.device) -> None:
    """Training continues from their state."""
    generators = torch.cuda if device.type == "cuda" else torch.random
    state = generators.get_rng_state()
    matrix_peak(device, torch.float32)
    assert torch.equal(generators.get_rng_state(), state)
