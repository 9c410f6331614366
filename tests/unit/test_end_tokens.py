"""End tokens that only `generation_config.json` has, as chat models often do, are never lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification, GPTJTokenizer
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.errors import CheckpointError
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.interop.merging import merge_adapter
from gptj.quantization.quantizer import quantize_model
from gptj.training.model_config import make_config
from gptj.training.settings import Settings

END, OTHER = 7, 300
WAYS: dict[str, Callable[[str, str], Any]] = {
    "import": import_weights,
    "export": lambda source, to: export_weights(source, to, format="huggingface"),
    "quantize": lambda source, to: quantize_model(source, to, calibration=None),
    "save": lambda source, to: GPTJForCausalLM.from_pretrained(source).save_pretrained(to),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As transformers saves one, whose configuration knows one end token of three."""
    torch.manual_seed(0)
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 300)
    config = GPTJConfig(
        vocab_size=320,
        n_positions=64,
        n_embd=128,
        n_layer=1,
        n_head=4,
        rotary_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )
    folder = tmp_path / "source"
    GPTJForCausalLM(config).save_pretrained(str(folder), tokenizer=tokenizer)
    (folder / "manifest.json").unlink()
    write_ends(folder, [END, config.eos_token_id, OTHER, 10**6])
    return folder


def write_ends(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))


def ends(config: GPTJConfig) -> set[int]:
    found = config.eos_token_id
    assert found is not None
    return set(found) if isinstance(found, list) else {found}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_from_a_model_keeps_them(way: str, folder: Path, tmp_path: Path) -> None:
    made = str(tmp_path / "made")
    WAYS[way](str(folder), made)
    assert ends(GPTJConfig.from_pretrained(made)) > {END, OTHER}
    assert len(ends(GPTJConfig.from_pretrained(made))) == 3


def test_a_merged_adapter_keeps_its_bases(folder: Path, tmp_path: Path) -> None:
    """Also PEFT's, which has no configuration."""
    model = GPTJForCausalLM.from_pretrained(folder)
    add_lora(model, LoRAConfig(2))
    adapter = tmp_path / "adapter"
    model.save_adapter(str(adapter), base=Base.at(str(folder)))
    merge_adapter(str(folder), str(adapter), str(tmp_path / "ours"))
    assert ends(GPTJConfig.from_pretrained(tmp_path / "ours")) > {END, OTHER}
    for name in ("manifest.json", "config.json", "base.json"):
        (adapter / name).unlink(missing_ok=True)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(folder)
    assert ends(GPTJForCausalLM.from_pretrained(adapter).config) > {END, OTHER}
    merge_adapter(str(folder), str(adapter), str(tmp_path / "pefts"))
    assert ends(GPTJConfig.from_pretrained(tmp_path / "pefts")) > {END, OTHER}


def test_a_trained_model_keeps_its_bases(folder: Path) -> None:
    words: dict[str, Any] = {"model": {"checkpoint": str(folder)}, "data": {"sequence_length": 16}}
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    assert ends(make_config(Settings(**words), tokenizer)) > {END, OTHER}
    words["model"]["config"] = {"eos_token_id": 5}  # the user's word
    assert ends(make_config(Settings(**words), tokenizer)) == {5}


def test_generation_ends_as_in_transformers(folder: Path) -> None:
    ours = GPTJForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[3, 4, 5]])
    free = ours.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=319)
    write_ends(folder, int(free[0, 6]))  # a token of its own
    ours = GPTJForCausalLM.from_pretrained(folder)
    theirs = transformers.GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = ours.generate(prompt, max_new_tokens=12, do_sample=False)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] < free.shape[1]


def test_other_heads_and_overrides_ignore_them(folder: Path) -> None:
    (only,) = ends(GPTJForSequenceClassification.from_pretrained(folder).config)
    assert only == GPTJTokenizer.from_pretrained(folder).eos_token_id
    assert ends(GPTJForCausalLM.from_pretrained(folder, eos_token_id=5).config) == {5}


def test_what_is_no_token_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_ends(folder, "stop")
    wrong = r"generation_config.json: eos_token_id must be a whole number, .* got 'stop'"
    with pytest.raises(CheckpointError, match=wrong):
        GPTJForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=wrong):
        import_weights(str(folder), str(tmp_path / "made"))
