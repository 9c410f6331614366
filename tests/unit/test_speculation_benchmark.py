"""`python -m gptj_bench speculation`: its model computes what the small one does."""

from __future__ import annotations

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj_bench.speculation import UNLIKELY, widened

pytestmark = pytest.mark.slow


def test_a_widened_model_computes_the_same() -> None:
    torch.manual_seed(0)
    small = GPTJForCausalLM(
        GPTJConfig(vocab_size=11, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    ).eval()
    for parameter in small.parameters():  # norms and biases that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    wide = widened(small, width=3, layers=4, vocabulary=20)
    assert (wide.config.n_embd, wide.config.n_layer, wide.config.n_head) == (48, 4, 6)
    ids = torch.randint(11, (2, 9))
    with torch.inference_mode():
        expected, found = small(ids).logits, wide(ids).logits
    torch.testing.assert_close(found[..., :11], expected, rtol=0, atol=1e-4)
    assert (found[..., 11:] == UNLIKELY).all()
