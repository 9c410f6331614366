"""The checkpoints and arguments that a deployment accepts or refuses."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from gapped_tokenizer import gapped
from large_models import enlarge, parameters
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from serving_models import Models

from deployments import loading
from deployments.embeddings import Arguments as EmbeddingsArguments
from deployments.embeddings import load_service as load_embeddings
from deployments.generation import Arguments as GenerationArguments
from deployments.in_process import InProcessService, as_json
from deployments.loading import Arguments, BatchArguments, check, load, name_of
from gptj import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.checkpoints.cache import FOLDER_VARIABLE, SIZE_VARIABLE
from gptj.checkpoints.manifest import CheckpointError
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj_local.s3 import LocalS3
from jobs.evaluate import measure, read_settings

pytest_plugins = ["serving_fixtures"]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("s3://bucket/runs/my-run/model", "my-run"),
        ("s3://bucket/my-model/", "my-model"),
        ("EleutherAI/gpt-j-6B", "EleutherAI/gpt-j-6B"),
        ("./outputs/my-run/model", "my-run"),
        ("/models/gptj", "gptj"),
    ],
)
def test_a_model_is_named_after_its_address(address: str, name: str) -> None:
    assert name_of(address) == name


def test_another_heads_checkpoint_and_unknown_arguments_are_refused(
    models: Models, tmp_path: Path
) -> None:
    address = str(tmp_path / "model")
    models.classification.save_pretrained(address, tokenizer=models.tokenizer)
    with pytest.raises(ValueError, match="is a GPTJForSequenceClassification, and this deployment"):
        load(GPTJForCausalLM, Arguments(checkpoint=address))
    with pytest.raises(ValidationError, match="max_batches"):
        Arguments.model_validate({"checkpoint": address, "max_batches": 3})


def test_a_tokenizer_with_an_id_beyond_the_embedding_is_refused(
    models: Models, tmp_path: Path
) -> None:
    """One client's text with it would fail the batch; the number of entries does not show it."""
    rows = models.generation.config.vocab_size
    heads = {
        GPTJForCausalLM: models.generation,
        GPTJForSequenceClassification: models.classification,
        GPTJForQuestionAnswering: models.question_answering,
        GPTJModel: models.generation,
    }
    for cls, model in heads.items():
        address = str(tmp_path / cls.__name__)
        model.save_pretrained(address, tokenizer=gapped(models.tokenizer, rows - 1))
        check(cls, Arguments(checkpoint=address))
        (Path(address) / "manifest.json").unlink()
        gapped(models.tokenizer, rows).save_pretrained(address)
        for refuse in (check, load):
            with pytest.raises(ValueError, match=rf"an id {rows} \(for the token 'z'\)"):
                refuse(cls, Arguments(checkpoint=address, dtype="float32"))


@pytest.mark.slow
def test_what_is_loaded_is_not_collected_again() -> None:
    loaded = [{"name": [number]} for number in range(1000)]
    gc.unfreeze()
    try:
        loading.freeze_loaded()
        assert gc.get_freeze_count() > len(loaded)
        found = {id(each) for each in gc.get_objects()}
        assert not any(id(each) in found for each in loaded)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_larger_than_the_free_memory_is_refused_before_its_weights_are_fetched(
    models: Models, s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Rather than have the system kill the replica, or the one that it replaces."""
    address = f"s3://{s3.bucket}/too-large-{dtype}"
    models.generation.save_pretrained(address, tokenizer=models.tokenizer)
    enlarge(address)
    cache = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(cache))
    monkeypatch.setenv(SIZE_VARIABLE, "1")
    arguments = GenerationArguments(checkpoint=address, dtype=dtype)
    with pytest.raises(ValueError, match="does not fit: its weights take") as error:
        InProcessService.load("generation", arguments, torch.device("cpu"))
    size = parameters(models.generation.config.vocab_size) * {"float32": 4, "bfloat16": 2}[dtype]
    assert f"take {size / 1e9:.1f} GB in {dtype}" in str(error.value)
    assert ("or dtype: bfloat16" in str(error.value)) == (dtype == "float32")
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("stored", "dtype", "quantization", "share"),
    [
        ("float32", "float32", "none", 1.0),
        ("bfloat16", "bfloat16", "none", 1.0),
        ("bfloat16", "bfloat16", "int8", 0.5),  # mapped until they are packed
        ("bfloat16", "bfloat16", "int4", 0.25),
        ("float32", "bfloat16", "int8", 1.0),  # converted first
    ],
)
@pytest.mark.parametrize("fits", [True, False])
def test_a_model_needs_free_memory_for_what_loading_makes_of_its_weights(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    dtype: str,
    quantization: str,
    share: float,
    fits: bool,
) -> None:
    model = copy.deepcopy(models.generation).to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "model", tokenizer=models.tokenizer)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    needed = int(count * getattr(torch, dtype).itemsize * share)
    monkeypatch.setattr(loading, "free_bytes", lambda device: needed if fits else needed - 1)
    arguments = GenerationArguments(
        checkpoint=str(tmp_path / "model"), dtype=dtype, quantization=quantization
    )
    if fits:
        load(GPTJForCausalLM, arguments, torch.device("cpu"))
        return
    with pytest.raises(ValueError, match=r"does not fit.*remedy: .*jobs/quantize\.py"):
        load(GPTJForCausalLM, arguments, torch.device("cpu"))


def test_formats_are_prepared_before_generation_is_ready(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first request with one it would hold the GIL, and pause running streams."""
    models.generation.save_pretrained(tmp_path / "model", tokenizer=models.tokenizer)
    prepared: list[GrammarCompiler] = []
    monkeypatch.setattr(GrammarCompiler, "prepare", lambda self: prepared.append(self))
    arguments = GenerationArguments(checkpoint=str(tmp_path / "model"), dtype="float32")
    InProcessService.load("generation", arguments, torch.device("cpu")).close()
    assert len(prepared) == 1


MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
WEIGHTED = {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}


def sentence_transformer(folder: Path, config: dict[str, Any], *more: str) -> None:
    """Make a model's folder one of sentence-transformers."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", **{each: each for each in more}}
    modules = [
        {"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))


def test_a_sentence_transformers_folder_says_how_to_pool(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    models.generation.save_pretrained(folder, tokenizer=models.tokenizer)

    def pooling(**fields: Any) -> str:
        arguments = EmbeddingsArguments(checkpoint=str(folder), dtype="float32", **fields)
        check(GPTJModel, arguments)
        service = load_embeddings(arguments, torch.device("cpu"))
        service.close()
        return service._pooling

    assert (pooling(), pooling(pooling="last")) == ("weighted_mean", "last")
    for config, expected in (
        (MEAN, "mean"),
        (WEIGHTED, "weighted_mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ):
        sentence_transformer(folder, config, "Normalize")
        assert pooling() == pooling(pooling=expected) == expected
        other = "last" if expected == "mean" else "mean"
        with pytest.raises(
            ValueError, match=f"pooling={other} contradicts .* trained with {expected}"
        ):
            pooling(pooling=other)
    sentence_transformer(folder, {"pooling_mode_cls_token": True})
    with pytest.raises(ValueError, match="pools by pooling_mode_cls_token"):
        pooling()
    sentence_transformer(folder, MEAN, "Dense")
    with pytest.raises(ValueError, match="a module Dense"):
        pooling()


def test_a_checkpoint_with_any_head_serves_embeddings(models: Models, tmp_path: Path) -> None:
    for name in ("generation", "classification", "question_answering"):
        model, address = getattr(models, name), str(tmp_path / name)
        model.save_pretrained(address, tokenizer=models.tokenizer)
        arguments = EmbeddingsArguments(checkpoint=address, dtype="float32")
        check(GPTJModel, arguments)
        loaded, _ = load(GPTJModel, arguments, torch.device("cpu"))
        torch.testing.assert_close(loaded.state_dict(), model.transformer.state_dict())
    with pytest.raises(ValidationError, match="'mean', 'last' or 'weighted_mean'"):
        EmbeddingsArguments.model_validate({"checkpoint": address, "pooling": "cls"})


@pytest.mark.parametrize("name", ["generation", "classification", "question_answering"])
def test_a_checkpoint_without_its_heads_weights_is_refused(
    name: str, models: Models, tmp_path: Path
) -> None:
    """Each replica would draw other ones. So evaluate, but training starts from such folders."""
    model = getattr(models, name)
    model.save_pretrained(tmp_path / "whole", tokenizer=models.tokenizer)
    model.transformer.save_pretrained(tmp_path / "base", tokenizer=models.tokenizer)
    (tmp_path / "base/manifest.json").unlink()
    config = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    cls, address = type(model), str(tmp_path / "base")
    check(cls, Arguments(checkpoint=address))
    head = {"classification": "score.weight", "question_answering": "qa_outputs.weight"}
    with pytest.raises(CheckpointError, match=f"base has no {head.get(name, 'lm_head')}.*random"):
        load(cls, Arguments(checkpoint=address, dtype="float32"), torch.device("cpu"))
    (tmp_path / "data.jsonl").write_text(
        '{"text": "a", "label": "neutral", "question": "q", "context": "a b", "answers": '
        '{"text": ["a"], "answer_start": [0]}}\n'
    )
    with pytest.raises(CheckpointError, match="train the head first"):
        measure(read_settings([address, str(tmp_path / "data.jsonl"), "device=cpu"]))
    assert cls.from_pretrained(address).new_parameters
    weights = load_file(tmp_path / "whole/model.safetensors")
    without_bias = {key: each for key, each in weights.items() if key != "lm_head.bias"}
    save_file(without_bias, tmp_path / "base/model.safetensors")  # a bias of zeros is not random
    load(cls, Arguments(checkpoint=address, dtype="float32"), torch.device("cpu"))
    assert not cls.from_pretrained(tmp_path / "whole").new_parameters


def test_an_adapters_address_serves_its_merged_model(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", list)  # which starts a cluster, if there is none
    base, address = str(tmp_path / "base"), str(tmp_path / "adapter")
    models.generation.save_pretrained(base, tokenizer=models.tokenizer)
    model = GPTJForCausalLM.from_pretrained(base)
    add_lora(model, LoRAConfig(4))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    model.save_adapter(address, base=Base.at(base))
    loaded, tokenizer = load(GPTJForCausalLM, Arguments(checkpoint=address, dtype="float32"))
    assert loaded.adapter is None
    assert len(tokenizer) == len(models.tokenizer)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base is incomplete: model\.safetensors"):
        load(GPTJForCausalLM, Arguments(checkpoint=address))


def test_a_chat_template_is_checked_before_anything_is_deployed(
    models: Models, tmp_path: Path
) -> None:
    address, own = str(tmp_path / "model"), str(tmp_path / "own")
    models.generation.save_pretrained(address, tokenizer=models.tokenizer)
    broken = copy.deepcopy(models.tokenizer)
    broken.chat_template = "{% for %}"
    models.generation.save_pretrained(own, tokenizer=broken)
    mine, wrong = tmp_path / "mine.jinja", tmp_path / "wrong.jinja"
    mine.write_text("{% set stop = ['x'] %}{{ bos_token }}{{ messages[0].content }}")
    wrong.write_text("{{ messages")
    for checkpoint, given, stop in (
        (address, "dolly", ("\n\n### End", "### End")),
        (address, str(mine), ("x",)),
        (own, str(mine), ("x",)),
    ):
        arguments = GenerationArguments(checkpoint=checkpoint, chat_template=given)
        check(GPTJForCausalLM, arguments)
        template = arguments.template(models.tokenizer)
        assert template is not None and template.stop == stop
    bos = models.tokenizer.bos_token
    assert template.render([{"content": "x"}]) == f"{bos}x"
    plain = GenerationArguments(checkpoint=address)
    check(GPTJForCausalLM, plain)
    assert plain.template(models.tokenizer) is None
    for checkpoint, given, reason in (
        (address, "doly", "doly is neither a file nor a built-in chat template"),
        (address, str(tmp_path / "none.jinja"), "neither a file"),
        (address, str(wrong), r"not valid Jinja.*wrong\.jinja"),
        (own, None, "not valid Jinja.*which chat_template replaces"),
    ):
        with pytest.raises(ValueError, match=reason):
            check(GPTJForCausalLM, GenerationArguments(checkpoint=checkpoint, chat_template=given))


@pytest.mark.slow
def test_outputs_also_end_at_the_end_tokens_of_the_generation_config(
    models: Models, tmp_path: Path
) -> None:
    """One or several, besides those of config.json; its other fields have no effect."""
    models.with_unused_ids().save_pretrained(tmp_path, tokenizer=models.tokenizer)
    (tmp_path / "manifest.json").unlink()  # as others save models
    file = tmp_path / "generation_config.json"
    arguments = GenerationArguments(checkpoint=str(tmp_path), dtype="float32")
    body = {"prompt": "The tower", "temperature": 0, "max_tokens": 8, "return_token_ids": True}

    def choice(**fields: Any) -> Any:
        file.write_text(json.dumps({"max_length": 1, "do_sample": True, **fields}))
        service = InProcessService.load("generation", arguments, torch.device("cpu"))
        with closing(service):
            reply = asyncio.run(service.answer("/v1/completions", body))
        return as_json(reply)["choices"][0]

    plain = choice()
    ids = plain["token_ids"]
    end = ids[3]
    assert len(ids) == 8 and plain["finish_reason"] == "length"
    for value in (end, [10**6, end], [end, models.tokenizer.eos_token_id]):
        found = choice(eos_token_id=value)
        assert found["finish_reason"] == "stop"
        first = ids.index(end)
        assert found["token_ids"][:first] == ids[:first]
        assert len(found["token_ids"]) <= first + 1
    loaded, _ = load(GPTJForCausalLM, arguments, torch.device("cpu"))
    assert set(loaded.config.eos_token_id or []) == {end, models.tokenizer.eos_token_id}
    file.write_text('{"eos_token_id": "stop"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be a"):
        check(GPTJForCausalLM, arguments)


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        (GenerationArguments, "max_running", "max_num_seqs"),
        (GenerationArguments, "step_tokens", "max_num_batched_tokens"),
        (GenerationArguments, "max_waiting", "max_queued"),
        (BatchArguments, "max_waiting", "max_queued"),
    ],
)
def test_deprecated_arguments_work_with_a_warning(
    arguments: type[Arguments], old: str, new: str
) -> None:
    with pytest.warns(FutureWarning, match=f"{old} is deprecated: use {new}"):
        renamed = arguments.model_validate({"checkpoint": "model", old: 7})
    assert renamed == arguments.model_validate({"checkpoint": "model", new: 7})
    with pytest.raises(ValidationError, match=f"{old} is the former name of {new}"):
        arguments.model_validate({"checkpoint": "model", old: 7, new: 7})


def test_a_deprecated_argument_of_another_application_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_running"):
        BatchArguments.model_validate({"checkpoint": "model", "max_running": 7})
