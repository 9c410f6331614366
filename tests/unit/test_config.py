"""GPTJConfig reads, writes and means the same as Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from gptj import GPTJConfig


def test_defaults_equal_transformers() -> None:
    theirs = transformers.GPTJConfig()
    for name, value in GPTJConfig().to_dict().items():
        if name not in ("id2label",):  # JSON's keys are text; compared below
            assert getattr(theirs, name) == value, name
    assert GPTJConfig().id2label == theirs.id2label


def test_transformers_reads_what_we_write_and_back() -> None:
    ours = GPTJConfig(n_layer=3, n_head=2, n_embd=32, rotary_dim=8, num_labels=3, dtype="float16")
    theirs = transformers.GPTJConfig.from_dict(ours.to_dict())
    assert (theirs.n_layer, theirs.num_labels, theirs.dtype) == (3, 3, torch.float16)
    again = GPTJConfig.from_dict(theirs.to_dict())
    assert (again.n_layer, again.num_labels, again.dtype) == (3, 3, torch.float16)


def test_aliases_read_and_write_their_fields() -> None:
    config = GPTJConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=5, rotary_dim=8)
    assert (config.n_embd, config.n_head, config.n_layer) == (64, 4, 5)
    config.max_position_embeddings = 99
    assert config.n_positions == 99 == config.max_position_embeddings


def test_label_fields_are_derived_from_each_other() -> None:
    assert GPTJConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = GPTJConfig(id2label={"0": "no", "1": "yes"})
    assert (named.num_labels, named.label2id) == (2, {"no": 0, "yes": 1})
    assert GPTJConfig(label2id={"a": 0, "b": 1, "c": 2}).id2label == {0: "a", 1: "b", 2: "c"}


def test_unknown_fields_survive_a_round_trip() -> None:
    config = GPTJConfig(task_specific_params={"text-generation": {"do_sample": True}})
    again = GPTJConfig.from_dict(config.to_dict())
    assert again.task_specific_params == {"text-generation": {"do_sample": True}}  # type: ignore[attr-defined]
    assert again == config


def test_presets_take_overrides() -> None:
    tiny = GPTJConfig.preset("tiny", vocab_size=300, n_layer=3)
    assert (tiny.vocab_size, tiny.n_layer, tiny.n_embd) == (300, 3, 128)
    assert GPTJConfig.preset("6b") == GPTJConfig()
    with pytest.raises(ValueError, match="'huge'; there are tiny, small, 6b"):
        GPTJConfig.preset("huge")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd=30 and n_head=4"),
        ({"n_embd": 32, "n_head": 4, "rotary_dim": 16}, "head width of 8 .* got 16"),
        ({"n_embd": 32, "n_head": 4, "rotary_dim": 3}, "even"),
        ({"activation_function": "tanh"}, "'tanh'"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop must be in \[0, 1\), got 1.0"),
        ({"n_layer": 0}, "n_layer .* got 0"),
        ({"n_inner": 0}, "n_inner .* got 0"),
        ({"problem_type": "guess"}, "'guess'"),
        ({"num_labels": 0}, "num_labels .* got 0"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels=3 contradicts"),
        ({"id2label": {1: "a"}}, "from 0"),
        ({"hidden_size": 64, "n_embd": 32}, "hidden_size=64 contradicts n_embd=32"),
        ({"dtype": "int8"}, "'int8'"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTJConfig(**fields)


def test_another_models_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="'llama' model"):
        GPTJConfig.from_dict({"model_type": "llama"})
