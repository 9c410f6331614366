"""Adapters against PEFT's, on the same tiny models: files written and read, and their outputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gapped_tokenizer import gapped
from safetensors.torch import load_file

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJTokenizer,
)
from gptj.adapters.base import Base, check_base
from gptj.adapters.config import TARGET_MODULES, LoRAConfig
from gptj.adapters.lora import NEW_HEADS, adapter_parameters, add_lora, merge_lora
from gptj.adapters.stored import StoredAdapter, read_adapter
from gptj.checkpoints.folder import ModelFolder
from gptj.checkpoints.manifest import CheckpointError, verify
from gptj.engine.backends import best_runner
from gptj.environment.extras import Extra
from gptj.interop.merging import merge_adapter
from gptj.model import GPTJPreTrainedModel
from gptj.serialization.json_object import to_json
from gptj.storage import AlreadyExistsError

peft = Extra("peft", "adapters to compare ours with")  # takes seconds to import

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HEADS: dict[type[GPTJPreTrainedModel], Any] = {
    GPTJForCausalLM: transformers.GPTJForCausalLM,
    GPTJForSequenceClassification: transformers.GPTJForSequenceClassification,
    GPTJForQuestionAnswering: transformers.GPTJForQuestionAnswering,
}
TASKS = {
    GPTJForCausalLM: "CAUSAL_LM",
    GPTJForSequenceClassification: "SEQ_CLS",
    GPTJForQuestionAnswering: "QUESTION_ANS",
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
CLASSES = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)


def read(address: Path) -> StoredAdapter:
    with ModelFolder.open(address, weights=True) as folder:
        return read_adapter(folder)


def test_a_base_at_another_commit_without_a_digest_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A commit may leave the model as it was, so another one is not an error."""
    trained_on = Base("someone/model", "main", commit="a" * 40)
    trained_on.check("adapter", Base("someone/model", commit="a" * 40))
    trained_on.check("adapter", Base("folder"))
    assert not caplog.messages
    trained_on.check("adapter", Base("someone/model", commit="b" * 40))
    (message,) = caplog.messages
    assert "a" * 40 in message and "b" * 40 in message


def check_complete(address: Path) -> None:
    with ModelFolder.open(address) as folder:
        folder.check_complete()
        check_base(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, which no test changes."""
    return write_base(tmp_path_factory.mktemp("base") / "base")


def outputs(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return scores(model, ids)


def scores(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits))
    logits: torch.Tensor = output.logits
    return logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """fp32 on a CPU: only the order of summation may differ."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def write_base(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A language model with a tokenizer and a training.json."""
    torch.manual_seed(seed)
    tokenizer = GPTJTokenizer.train(["some words to learn from"], vocab_size=260)
    model = GPTJForCausalLM(GPTJConfig(**{**SHAPE, **fields}))
    model.save_pretrained(folder, tokenizer=tokenizer, training={"steps": 7})
    return folder


def adapted(
    cls: type[GPTJPreTrainedModel], base: Path, config: LoRAConfig | None = None, **fields: Any
) -> GPTJPreTrainedModel:
    """The base with an adapter of trained-looking values."""
    model = cls.from_pretrained(base, **fields)
    add_lora(model, config or LoRAConfig(4, 8, modules_to_save=NEW_HEADS.get(cls.__name__, ())))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.2)
    return model.eval()


def theirs(cls: type[GPTJPreTrainedModel], base: Path, adapter: Path, **fields: Any) -> Any:
    """PEFT's model with an adapter, on transformers' GPT-J."""
    model = HEADS[cls].from_pretrained(base, dtype=torch.float32, **fields)
    return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


@CLASSES
@pytest.mark.parametrize(
    "config",
    [LoRAConfig(4, 8), LoRAConfig(3, 5.5, 0.1, TARGET_MODULES, rslora=True)],
    ids=["q and v", "all, rslora"],
)
def test_peft_loads_ours_and_computes_the_same(
    cls: type[GPTJPreTrainedModel], config: LoRAConfig, base: Path, tmp_path: Path
) -> None:
    fields = {"num_labels": 3} if cls is GPTJForSequenceClassification else {}
    config = LoRAConfig(
        config.rank,
        config.alpha,
        config.dropout,
        config.target_modules,
        config.rslora,
        NEW_HEADS.get(cls.__name__, ()),
    )
    model = adapted(cls, base, config, **fields)
    model.save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    expected = outputs(model)
    assert not torch.allclose(expected[0], outputs(cls.from_pretrained(base, **fields))[0])
    close(outputs(theirs(cls, base, tmp_path / "adapter", **fields)), expected)
    close(outputs(cls.from_pretrained(tmp_path / "adapter")), expected)
    verify(str(tmp_path / "adapter"))


def test_a_folder_with_a_hub_bases_name_stands_for_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy beside a program without access to the hub: it has no commits to choose from."""
    shutil.copytree(base, tmp_path / "someone/model")
    monkeypatch.chdir(tmp_path)
    on_hub = replace(Base.at("someone/model"), revision="main", commit="a" * 40)
    model = adapted(GPTJForCausalLM, base)
    model.save_adapter("adapter", base=on_hub)
    model.save_adapter("earlier", base=replace(on_hub, commit=None))
    shutil.copytree("adapter", "peft")
    for name in ("base.json", "manifest.json"):
        Path("peft", name).unlink()
    for adapter in ("adapter", "earlier", "peft"):
        for given in (None, "someone/model"):
            again = GPTJForCausalLM.from_pretrained(adapter, base=given)
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
        merge_adapter("someone/model", adapter, f"merged-{adapter}")


@CLASSES
def test_we_load_a_trained_adapter_of_peft(
    cls: type[GPTJPreTrainedModel], base: Path, tmp_path: Path
) -> None:
    """After two of PEFT's own training steps, heads included."""
    fields = {"num_labels": 3} if cls is GPTJForSequenceClassification else {}
    model = HEADS[cls].from_pretrained(base, dtype=torch.float32, **fields)
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, task_type=TASKS[cls], target_modules=["q_proj", "out_proj", "fc_out"]
    )
    model = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        scores(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert any(v.any() for k, v in load(tmp_path / "adapter").items() if "lora_B" in k)
    ours = cls.from_pretrained(tmp_path / "adapter")
    close(outputs(ours), outputs(model))
    check_complete(tmp_path / "adapter")
    config = GPTJConfig.from_pretrained(tmp_path / "adapter")
    assert config.num_labels == ours.config.num_labels
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path / "adapter")  # the base's: it has none
    assert len(tokenizer) == len(GPTJTokenizer.from_pretrained(base))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def test_a_new_adapter_changes_nothing_and_is_initialized_like_pefts(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", n_embd=256)
    model = GPTJForCausalLM.from_pretrained(base)
    before = outputs(model)
    add_lora(model, LoRAConfig(16, target_modules=TARGET_MODULES))
    assert torch.equal(outputs(model), before)
    reference = peft.get_peft_model(
        transformers.GPTJForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=16, target_modules=list(TARGET_MODULES)),
    )
    expected = dict(reference.named_parameters())
    for name, ours in adapter_parameters(model).items():
        peer = expected["base_model.model." + name.replace(".weight", ".default.weight")]
        assert ours.shape == peer.shape
        if "lora_A" in name:  # uniform in the same bounds
            assert ours.abs().max().item() == pytest.approx(peer.abs().max().item(), rel=0.02)
            assert ours.std().item() == pytest.approx(peer.std().item(), rel=0.1)
        else:
            assert not ours.any()


@CLASSES
def test_only_the_adapter_and_the_head_are_trained(
    cls: type[GPTJPreTrainedModel], base: Path, tmp_path: Path
) -> None:
    model = adapted(cls, base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    heads = {name for name in trained if ".lora_" not in name}
    assert {name.partition(".")[0] for name in heads} == set(NEW_HEADS.get(cls.__name__, ()))
    model.train()
    model.gradient_checkpointing_enable()
    scores(model).sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())


def test_dropout_applies_only_to_the_inputs_of_a_in_training(base: Path, tmp_path: Path) -> None:
    model = adapted(GPTJForCausalLM, base, LoRAConfig(4, dropout=0.5))
    assert torch.equal(outputs(model), outputs(model))
    assert not torch.equal(outputs(model.train()), outputs(model))


@CLASSES
def test_merging_computes_the_same(
    cls: type[GPTJPreTrainedModel], base: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {}
    if cls is GPTJForSequenceClassification:
        fields = {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    config = LoRAConfig(4, 6, 0.1, TARGET_MODULES, True, NEW_HEADS.get(cls.__name__, ()))
    model = adapted(cls, base, config, **fields)
    expected = outputs(model)
    tokenizer = GPTJTokenizer.from_pretrained(base)
    model.save_adapter(
        tmp_path / "adapter",
        base=Base.at(str(base)),
        tokenizer=tokenizer,
        training={"steps": 9},
    )
    merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), shard_bytes=20000)
    verify(str(tmp_path / "merged"))
    merged = cls.from_pretrained(tmp_path / "merged")
    close(outputs(merged), expected)
    close(outputs(HEADS[cls].from_pretrained(tmp_path / "merged", dtype="float32")), expected)
    assert merged.config.id2label == model.config.id2label
    assert json.loads((tmp_path / "merged/training.json").read_text()) == {"steps": 9}
    assert GPTJTokenizer.from_pretrained(tmp_path / "merged")("words") == tokenizer("words")
    merge_lora(model)
    close(outputs(model), expected)
    model.save_pretrained(tmp_path / "plain")
    gapped(tokenizer, 300).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter: the tokenizer has an id 300 .*'z'"):
        merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "beyond"))


def test_pefts_adapter_merges_as_peft_merges_it(base: Path, tmp_path: Path) -> None:
    """One that names neither task nor base, in one of the dtypes."""
    model = transformers.GPTJForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    expected = model.merge_and_unload()
    close(outputs(GPTJForCausalLM.from_pretrained(tmp_path / "merged")), outputs(expected))
    given = {"base": base}
    close(
        outputs(GPTJForCausalLM.from_pretrained(tmp_path / "adapter", **given)), outputs(expected)
    )
    with pytest.raises(CheckpointError, match="does not name the adapter's base"):
        GPTJForCausalLM.from_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "merged/training.json").read_text()) == {"steps": 7}
    merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "half"), dtype="bfloat16")
    half = GPTJForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    expected = expected.to(torch.bfloat16)
    for name, weight in half.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapted(GPTJForCausalLM, base).save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    other = write_base(tmp_path / "other", seed=1)
    for attempt in (
        lambda: merge_adapter(str(other), adapter, merged),
        lambda: GPTJForCausalLM.from_pretrained(adapter, base=other),
    ):
        with pytest.raises(CheckpointError, match=r"was not trained on .*other"):
            attempt()
    shutil.copytree(base, tmp_path / "copy")
    GPTJForCausalLM.from_pretrained(adapter, base=tmp_path / "copy")
    (tmp_path / "adapter/base.json").write_text(json.dumps({"address": str(base)}))
    (tmp_path / "adapter/manifest.json").unlink()  # as PEFT's, which knows no digests
    for fields in ({"n_embd": 64}, {"n_layer": 1}, {"n_layer": 3}, {"vocab_size": 301}):
        name = "-".join(fields)
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        wrong = write_base(tmp_path / name, **fields)
        with pytest.raises(CheckpointError, match="adapter"):
            merge_adapter(str(wrong), adapter, merged)
    assert not list(Path(merged).rglob("*"))
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match="base model of the adapter"):
        GPTJForCausalLM.from_pretrained(adapter)


def test_finished_folders_are_not_overwritten(base: Path, tmp_path: Path) -> None:
    model = adapted(GPTJForCausalLM, base)
    model.save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    with pytest.raises(AlreadyExistsError):
        model.save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    finished = shutil.copytree(base, tmp_path / "finished")
    with pytest.raises(AlreadyExistsError):
        merge_adapter(str(base), str(tmp_path / "adapter"), str(finished))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"layers_to_transform": 0}, "layers_to_transform=0"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_modules": ["q_proj", "wte"]}, "target_modules: 'wte' is not one of k_proj"),
        ({"target_modules": ".*proj"}, "is a pattern"),
        ({"target_modules": ["transformer.h.1.attn.q_proj"]}, "some layers only"),
        ({"target_modules": ["h.0.attn.q_proj", "h.0.mlp.fc_in", "h.1.mlp.fc_in"]}, "some layers"),
        ({"target_modules": None}, "must be a list"),
        ({"modules_to_save": ["wte"]}, "modules_to_save: 'wte' is not one of lm_head"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "rank must be"),
        ({"r": 2.5}, "rank must be"),
        ({"lora_alpha": "much"}, "alpha must be"),
        ({"lora_dropout": 1}, "dropout must be"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"of_a_later_version": 3}, "of_a_later_version=3 is not supported"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_unsupported_features_are_refused_by_name(
    changes: dict[str, Any], named: str, base: Path, tmp_path: Path
) -> None:
    adapted(GPTJForCausalLM, base).save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    (tmp_path / "adapter/manifest.json").unlink()
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=named) as raised:
        read(tmp_path / "adapter")
    assert str(file) in str(raised.value)


def test_a_damaged_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(GPTJForCausalLM, base)
    model.save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    weights = tmp_path / "adapter/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="was altered"):
        read(tmp_path / "adapter")
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        check_complete(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="is not an adapter folder"):
        read(base)
    for changes, wrong in (
        ({"r": 2}, "has the shape"),
        ({"target_modules": ["q_proj"]}, "adapter lacks"),
        ({"target_modules": ["q_proj", "v_proj", "fc_in"]}, "is incomplete: .*fc_in"),
    ):
        model.save_adapter(tmp_path / wrong[:5], base=Base.at(str(base)))
        (tmp_path / wrong[:5] / "manifest.json").unlink()
        file = tmp_path / wrong[:5] / "adapter_config.json"
        file.write_text(to_json({**json.loads(file.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=wrong):
            GPTJForCausalLM.from_pretrained(tmp_path / wrong[:5])
        shutil.rmtree(tmp_path / wrong[:5])


def test_an_unmerged_adapter_is_neither_saved_as_a_model_nor_run_by_kernels(
    base: Path,
    tmp_path: Path,
) -> None:
    model = adapted(GPTJForCausalLM, base)
    assert isinstance(model, GPTJForCausalLM)
    with pytest.raises(ValueError, match="merge it first"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="merged first"):
        best_runner(model, 64)
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(model, LoRAConfig())
    merge_lora(model)
    best_runner(model, 64)
    with pytest.raises(ValueError, match="has no adapter"):
        model.save_adapter(tmp_path / "adapter", base=Base("somewhere"))


def test_an_adapter_in_bf16_and_for_other_heads(base: Path, tmp_path: Path) -> None:
    """The base model loads its part, and other heads skip a classifier's head."""
    model = adapted(GPTJForSequenceClassification, base, num_labels=3)
    model.save_adapter(tmp_path / "adapter", base=Base.at(str(base)))
    half = GPTJForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(half).float(), outputs(model), rtol=0.1, atol=0.3)
    plain = GPTJModel.from_pretrained(tmp_path / "adapter")
    expected = model.transformer(IDS).last_hidden_state
    close(plain(IDS).last_hidden_state.detach(), expected.detach())
    GPTJForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": -1}, "alpha must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("lm_head",)}, "'lm_head' is not one of"),
        ({"modules_to_save": ("wte",)}, "'wte' is not one of"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoRAConfig(**fields)


def test_heads_that_cannot_be_trained_are_named(tmp_path: Path) -> None:
    model = GPTJForCausalLM(GPTJConfig(**SHAPE, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="tied to the embedding"):
        add_lora(model, LoRAConfig(modules_to_save=("lm_head",)))
    with pytest.raises(ValueError, match="has no score"):
        add_lora(model, LoRAConfig(modules_to_save=("score",)))
