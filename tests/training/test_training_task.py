"""A task's parts fit the checkpoint that a run starts from, or are refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gapped_tokenizer import gapped
from task_data import make_data

from gptj import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification, GPTJTokenizer
from gptj.data.classification import ClassificationData
from gptj.data.rows import DataError
from gptj.training.model_config import make_config
from gptj.training.settings import Settings, SettingsError
from gptj.training.tokenizer import prepare_tokenizer

TEXTS = ["good and fine", "bad", "so so, and rather long for a review"]
SHAPE = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 270)


def saved(folder: Path, cls: type[Any], tokenizer: GPTJTokenizer | None, **fields: Any) -> str:
    torch.manual_seed(0)
    config = GPTJConfig(**{"vocab_size": 270, "initializer_range": 0.3, **SHAPE, **fields})
    cls(config).save_pretrained(str(folder), tokenizer=tokenizer)
    return str(folder)


def settings_of(folder: Path, labels: list[Any], **fields: Any) -> Settings:
    rows = [{"text": TEXTS[n % 3], "label": label} for n, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"task": "classification", "storage": str(folder), **fields}
    data = {"train": str(folder / "rows.jsonl"), "sequence_length": 16}
    values["data"] = {**data, **fields.get("data", {})}
    return Settings(**values)


def parts(settings: Settings) -> tuple[GPTJTokenizer, ClassificationData, GPTJConfig]:
    tokenizer = prepare_tokenizer(settings)
    data = make_data(settings, tokenizer).train
    assert isinstance(data, ClassificationData)
    return tokenizer, data, make_config(settings, tokenizer, data.labels)


@pytest.fixture
def classifier(tmp_path: Path, tokenizer: GPTJTokenizer) -> str:
    return saved(
        tmp_path / "m",
        GPTJForSequenceClassification,
        tokenizer,
        id2label={0: "positive", 1: "negative"},
        problem_type="single_label_classification",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"label_names": ["negative", "positive"]},
            "data.label_names .negative, positive. is ordered diff",
        ),
        ({"label_names": ["positive", "neutral"]}, "has 2 labels .*has 2 .positive, neutr"),
        ({"label_names": ["a", "b", "c"]}, "has 2 labels .* data.label_names has 3"),
        ({"label_names": {"1": "positive", "2": "good"}}, "has 2 labels"),
        (
            {"problem_type": "regression"},
            "data.problem_type=regression, but .*m is trained for sin",
        ),
        ({"problem_type": "multi_label_classification"}, "is trained for single_label_classif"),
    ],
)
def test_settings_that_contradict_a_classifiers_labels_are_refused(
    data: dict[str, Any], message: str, tmp_path: Path, classifier: str
) -> None:
    settings = settings_of(
        tmp_path, ["positive", "negative"], model={"checkpoint": classifier}, data=data
    )
    with pytest.raises(SettingsError, match=message):
        parts(settings)


@pytest.mark.parametrize(
    ("labels", "data"),
    [
        (["positive", "negative"], {}),
        (["positive", "negative"], {"label_names": ["positive", "negative"]}),
        (["positive", "negative"], {"problem_type": "single_label_classification"}),
        ([0, 1], {}),
        ([2, 1], {"label_names": {"1": "negative", "2": "positive"}}),
    ],
)
def test_settings_that_repeat_a_classifiers_labels_are_accepted(
    labels: list[Any], data: dict[str, Any], tmp_path: Path, classifier: str
) -> None:
    settings = settings_of(tmp_path, labels, model={"checkpoint": classifier}, data=data)
    _, found, config = parts(settings)
    assert found.targets.tolist() == [0, 1]
    assert config.id2label == {0: "positive", 1: "negative"}


def test_a_classifier_without_label_names_may_get_some(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    model = saved(tmp_path / "m", GPTJForSequenceClassification, tokenizer, num_labels=2)
    settings = settings_of(
        tmp_path, [0, 1], model={"checkpoint": model}, data={"label_names": ["good", "bad"]}
    )
    _, found, config = parts(settings)
    assert found.targets.tolist() == [0, 1]
    assert config.id2label == {0: "good", 1: "bad"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"n_layer": 4},
            "model.config.n_layer=4, but the weights of .*m require n_layer=2",
        ),
        ({"num_hidden_layers": 4}, "model.config.n_layer=4, but .*m require n_layer=2"),
        ({"vocab_size": 320}, "model.config.vocab_size=320, but .*m require vocab_size=270"),
        ({"rotary_dim": 4}, "model.config.rotary_dim=4, but"),
        ({"activation_function": "relu"}, "model.config.activation_function='relu', but"),
        ({"n_positions": 8}, "data.sequence_length=16 is beyond the model's n_positions=8"),
    ],
)
@pytest.mark.parametrize("task", ["causal-lm", "classification", "question-answering"])
def test_a_checkpoints_shape_cannot_be_changed(
    task: str, fields: dict[str, Any], message: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """Said before workers start, and not by weights that do not fit."""
    model = saved(tmp_path / "m", GPTJForCausalLM, tokenizer)
    row = {
        "text": "good and fine",
        "label": "good",
        "question": "good?",
        "context": "good and fine, " * 3,
        "answers": {"text": ["fine"], "answer_start": [9]},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": "b"}))
    values: dict[str, Any] = {
        "task": task,
        "storage": str(tmp_path),
        "data": {"train": str(tmp_path / "rows.jsonl"), "sequence_length": 16},
        "model": {"checkpoint": model, "config": fields},
    }
    if task == "question-answering":
        values["data"]["stride"] = 4
    settings = Settings(**values)
    found = prepare_tokenizer(settings)
    data = make_data(settings, found).train
    with pytest.raises(SettingsError, match=message):
        make_config(settings, found, data.labels)
    same = {"n_layer": 2, "n_inner": 128, "vocab_size": 270, "resid_pdrop": 0.1, "n_positions": 64}
    values["model"]["config"] = same
    config = make_config(Settings(**values), found, data.labels)
    assert (config.n_layer, config.resid_pdrop, config.n_positions) == (2, 0.1, 64)


def test_a_checkpoint_without_a_tokenizer_takes_one_from_elsewhere(
    tmp_path: Path, tokenizer: GPTJTokenizer, classifier: str
) -> None:
    bare = saved(tmp_path / "bare", GPTJForCausalLM, None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    fields: dict[str, Any] = {"model": {"checkpoint": bare}}
    with pytest.raises(SettingsError, match=r"bare has no tokenizer: .*remedy: tokenizer.address="):
        prepare_tokenizer(settings_of(tmp_path, ["a", "b"], **fields))
    given = {"tokenizer": {"address": str(tmp_path / "tokenizer")}}
    found, _, config = parts(settings_of(tmp_path, ["a", "b"], **fields, **given))
    assert len(found) == 270
    assert config.vocab_size == 270
    with pytest.raises(SettingsError, match=r"tokenizer.address=.* which has its own tokenizer"):
        prepare_tokenizer(settings_of(tmp_path, ["a"], model={"checkpoint": classifier}, **given))
    GPTJTokenizer.train(TEXTS * 20, 280).save_pretrained(tmp_path / "larger")
    given = {"tokenizer": {"address": str(tmp_path / "larger")}}
    settings = settings_of(tmp_path, ["a", "b"], **fields, **given)
    with pytest.raises(
        SettingsError, match=r"the tokenizer has an id 2.*larger is not the tokenizer of"
    ):
        parts(settings)


def test_a_model_has_a_row_for_every_id_of_a_tokenizer_with_gaps(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    gapped(tokenizer, 999).save_pretrained(tmp_path / "gapped")
    given = {"tokenizer": {"address": str(tmp_path / "gapped")}}
    assert parts(settings_of(tmp_path, ["a", "b"], **given))[2].vocab_size == 1000
    small = {"model": {"config": {"vocab_size": 999}}}
    with pytest.raises(SettingsError, match=r"an id 999 .*'z'.*; raise model.config.vocab_size"):
        parts(settings_of(tmp_path, ["a", "b"], **given, **small))
    bare = saved(tmp_path / "bare", GPTJForCausalLM, None)
    with pytest.raises(SettingsError, match=r"an id 999 .*gapped is not the tokenizer of"):
        parts(settings_of(tmp_path, ["a", "b"], **given, model={"checkpoint": bare}))


def test_a_model_from_a_checkpoint_without_padding_runs_in_transformers(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """A batch of two texts of different lengths, as the published model has no padding token."""
    tokenizer.save_pretrained(tmp_path / "plain")
    plain = GPTJTokenizer.from_pretrained(tmp_path / "plain")
    plain.pad_token = None
    base = saved(tmp_path / "base", GPTJForCausalLM, plain, eos_token_id=plain.eos_token_id)
    assert GPTJConfig.from_pretrained(base).pad_token_id is None
    settings = settings_of(tmp_path, ["a", "b"], model={"checkpoint": base})
    found, _, config = parts(settings)
    torch.manual_seed(0)
    model = GPTJForSequenceClassification(config).eval()
    model.save_pretrained(str(tmp_path / "trained"), tokenizer=found)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "trained")
    batch = encode(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**batch).logits
        for row, text in enumerate(TEXTS):
            expected = model(torch.tensor([found.encode(text)])).logits[0]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)
    given = settings_of(
        tmp_path, ["a", "b"], model={"checkpoint": base, "config": {"pad_token_id": 3}}
    )
    assert parts(given)[2].pad_token_id == 3


def test_missing_columns_are_named_before_a_tokenizer_is_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.csv").write_text("Class Index;Description\n1;good\n")
    settings = settings_of(tmp_path, [], data={"train": str(tmp_path / "a.csv")})
    with pytest.raises(
        DataError, match="no column 'text' and no column 'label'; there are 'Class I"
    ):
        prepare_tokenizer(settings)
    assert not (tmp_path / "finetune").exists()
