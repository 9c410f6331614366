"""Models of shapes only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gptj
from gptj import GPTJConfig, GPTJForCausalLM
from gptj.checkpoints.skeleton import without_weights


def test_shapes_equal_those_of_a_model_with_weights() -> None:
    config = GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2, rotary_dim=4)
    with without_weights():
        model = GPTJForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    there = GPTJForCausalLM(config).state_dict()
    assert {n: (p.shape, p.dtype) for n, p in model.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in there.items()
    }


def test_modules_created_afterwards_have_initialized_weights() -> None:
    with pytest.raises(RuntimeError, match="inside"), without_weights():
        raise RuntimeError("inside")
    layer = nn.Linear(64, 64)
    assert layer.weight.device.type == "cpu"
    assert layer.weight.std() > 0.01
    nn.init.constant_(layer.weight, 3.0)
    assert torch.all(layer.weight == 3)


@pytest.mark.slow
def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Which takes a second, before anything is read."""
    config = GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "model"))
    code = (
        "import sys; from gptj import GPTJForCausalLM; "
        "GPTJForCausalLM.from_pretrained(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        env={"PYTHONPATH": str(Path(gptj.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
