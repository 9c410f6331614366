"""Shared by all models: from_pretrained's arguments, resizing, transformers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
)
from gptj.checkpoints.folder import ModelFolder

CONFIG = GPTJConfig(
    vocab_size=290, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=256
)
TEXTS = ["some text to learn from, and some more text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m"
    model = GPTJForSequenceClassification(GPTJConfig(**{**CONFIG.to_dict(), "task": "films"}))
    model.save_pretrained(path, tokenizer=GPTJTokenizer.train(TEXTS, 290))
    return path


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"bogus": 1}, r"bogus=1 is neither an argument.*leave it out"),
        ({"num_label": 4}, r"num_label=4 .*did you mean num_labels\?"),
        ({"load_in_8bit": True}, r"load_in_8bit=True .*remedy: .*quantization: int8"),
        ({"model_type": "gptj"}, "model_type"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_unknown_arguments_are_refused_by_name(
    argument: dict[str, Any],
    message: str,
    with_config: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any weights are read."""
    given = {"config": CONFIG} if with_config else {}
    monkeypatch.setattr(ModelFolder, "read_weights", lambda self: pytest.fail("weights were read"))
    with pytest.raises(TypeError, match=message):
        GPTJForSequenceClassification.from_pretrained(folder, **argument, **given)
    if not with_config:
        with pytest.raises(TypeError, match=message):
            GPTJConfig.from_pretrained(folder, **argument)


def test_supported_hugging_face_arguments_are_accepted(folder: Path) -> None:
    model = GPTJForSequenceClassification.from_pretrained(
        folder,
        num_labels=2,
        use_cache=False,
        max_position_embeddings=64,  # an alias
        task="news",  # a field of the folder's own
        torch_dtype=torch.float16,
        device_map="cpu",
        low_cpu_mem_usage=True,
        attn_implementation="sdpa",
        token=None,
        local_files_only=True,
    )
    assert (model.config.num_labels, model.config.use_cache) == (2, False)
    assert model.config.to_dict()["task"] == "news"
    assert model.dtype == torch.float16
    for device_map in ("auto", {"": "cpu"}, torch.device("cpu")):
        GPTJForSequenceClassification.from_pretrained(folder, device_map=device_map)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"device_map": "balanced"}, "device_map='balanced' is for several devices; remedy"),
        ({"device_map": {"transformer": 0, "score": 1}}, "for several devices; remedy"),
        ({"device_map": "cpu", "device": "cpu"}, "leave one out"),
        ({"attn_implementation": "flash_attention_2"}, "must be 'sdpa' or left out, got 'flash"),
    ],
)
def test_unsupported_hugging_face_arguments_are_refused(
    argument: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        GPTJForSequenceClassification.from_pretrained(folder, **argument)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [270, 290, 310])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resized_rows_equal_transformers(tied: bool, rows: int, mean_resizing: bool) -> None:
    """Old ones exactly; new ones around the same mean, within a ten-thousandth, or of one size."""
    torch.manual_seed(0)
    config = GPTJConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**config.to_dict()))
    ours = GPTJForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.resize_token_embeddings(rows, mean_resizing=mean_resizing)
    found = ours.resize_token_embeddings(rows, mean_resizing=mean_resizing)
    assert found is ours.get_input_embeddings()
    assert found.num_embeddings == expected.num_embeddings == rows
    assert ours.config.vocab_size == ours.transformer.config.vocab_size == rows
    assert ours.lm_head.out_features == rows
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    assert ours.num_parameters() == theirs.num_parameters()
    kept = min(rows, 290)
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name)
        assert mine.shape == parameter.shape and mine.requires_grad, name
        if "wte" in name or "lm_head" in name:
            assert torch.equal(mine[:kept], parameter[:kept]), name
            if mean_resizing:
                torch.testing.assert_close(mine[kept:], parameter[kept:], rtol=0, atol=1e-4)
            elif name.endswith("weight") and rows > kept:
                assert 0.01 < float(mine[kept:].detach().std()) < 0.03  # initializer_range is 0.02
            else:
                assert torch.equal(mine[kept:], parameter[kept:]), name
    logits = ours(torch.tensor([[1, rows - 1]])).logits
    assert logits.shape == (1, 2, rows)


def test_resizing_is_saved_and_rounds_up(tmp_path: Path) -> None:
    tokenizer = GPTJTokenizer.train(TEXTS, 290)
    tokenizer.add_tokens("<tool>")
    model = GPTJForSequenceClassification(CONFIG)
    assert model.resize_token_embeddings().num_embeddings == 290
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.config.vocab_size == 320
    model.save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    back = GPTJForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(back.transformer.wte.weight, model.transformer.wte.weight)
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        model.resize_token_embeddings(0)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["folder", "model"])
@pytest.mark.parametrize("cls", [GPTJForCausalLM, GPTJForSequenceClassification])
def test_transformers_pipelines_accept_our_folders_and_models(
    cls: type[Any], given: str, tmp_path: Path
) -> None:
    """With the numbers that our own classes have."""
    torch.manual_seed(0)
    model, tokenizer = cls(CONFIG).eval(), GPTJTokenizer.train(TEXTS, 290)
    task = "text-generation" if model.can_generate() else "text-classification"
    model.save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    pipeline = transformers.pipeline(
        task,
        model=str(tmp_path / "m") if given == "folder" else model,
        tokenizer=theirs,
        device="cpu",
    )
    texts = ["some text", "other text, and longer"]
    found = pipeline(texts, **({"do_sample": False, "max_new_tokens": 6} if "gen" in task else {}))
    for text, result in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        if model.can_generate():
            assert result[0]["generated_text"] == tokenizer.decode(
                model.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True
            )
        else:
            expected = model(ids).logits[0].softmax(dim=-1).max()
            assert result["score"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_pipeline_samples_from_our_model_with_its_own_defaults(tmp_path: Path) -> None:
    tokenizer = GPTJTokenizer.train(TEXTS, 290)
    model = GPTJForCausalLM(CONFIG).eval()
    model.save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    pipeline = transformers.pipeline(
        "text-generation", model=model, tokenizer=theirs, device="cpu", max_new_tokens=3
    )
    (found,) = pipeline("some text", num_return_sequences=1, return_full_text=False)
    assert set(found) == {"generated_text"}
    with pytest.raises(ValueError, match="the prompt must have at least one token"):
        pipeline("")
    assert not GPTJForQuestionAnswering.can_generate()


def test_a_question_answering_folder_loads_in_transformers(tmp_path: Path) -> None:
    """transformers 5 has no pipeline for it any more."""
    model = GPTJForQuestionAnswering(CONFIG).eval()
    model.save_pretrained(tmp_path / "m", tokenizer=GPTJTokenizer.train(TEXTS, 290))
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).start_logits, theirs(ids).start_logits)
