"""The command: a checkpoint and data in, one JSON object or a one-line error out."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gapped_tokenizer import gapped

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJTokenizer,
    storage,
)
from gptj.data.causal_lm import CausalLMData
from gptj.data.preparing import Plan
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.rows import DataError
from gptj.data.sources import read_rows
from gptj.training.evaluation import evaluate
from gptj.training.sections import DataSettings
from gptj.training.tasks import TASKS
from gptj.training.tasks.causal_lm import unigram_perplexity
from gptj_local.s3 import LocalS3
from jobs import batch_inference, prepare_data
from jobs.evaluate import measure, read, read_settings

PROGRAM = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"
TEXTS = ["the cat sat on the mat", "a dog and a cat"] * 30


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 280)


def saved(
    cls: type[Any], tokenizer: GPTJTokenizer, address: object, training: Any = None, **fields: Any
) -> str:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8,
        initializer_range=0.2, **fields,
    )  # fmt: skip
    cls(config).save_pretrained(str(address), tokenizer=tokenizer, training=training)
    return str(address)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained_with(**data: Any) -> dict[str, Any]:
    return {"settings": {"data": data}}


@pytest.mark.slow
def test_the_command_prints_one_json_object(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    checkpoint = saved(GPTJForCausalLM, tokenizer, tmp_path / "model")
    data = written(tmp_path / "data.jsonl", [{"body": text} for text in TEXTS])
    result = subprocess.run(
        [PROGRAM, checkpoint, data, "columns.text=body", "batch_size=4", f"unigram={data}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    expected = CausalLMData(read_rows(data, ["text"], {"text": "body"}), tokenizer, 64)
    model = GPTJForCausalLM.from_pretrained(checkpoint)
    metrics = evaluate(TASKS["causal-lm"], model, expected, batch_size=4, device=model.device)
    assert found.pop("seconds") > 0
    assert (found.pop("checkpoint"), found.pop("data")) == (checkpoint, data)
    assert found == pytest.approx(
        {
            "examples": len(expected),
            "unigram_perplexity": unigram_perplexity(expected, expected),
            **metrics,
        },
        rel=1e-3,
    )
    assert f"batch {-(-len(expected) // 4)} of" in result.stderr


def test_every_head_has_its_own_metrics(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    reviews = written(
        tmp_path / "reviews.jsonl",
        [{"text": text, "label": label} for text, label in zip(TEXTS, "ab" * 30, strict=True)],
    )
    answers = {"text": ["cat"], "answer_start": [4]}
    squad = written(
        tmp_path / "squad.jsonl",
        [{"question": "a dog", "context": TEXTS[0], "answers": answers}] * 3,
    )
    classifier = saved(
        GPTJForSequenceClassification, tokenizer, tmp_path / "c", id2label={0: "a", 1: "b"}
    )
    reader = saved(GPTJForQuestionAnswering, tokenizer, tmp_path / "q")
    found = measure(read_settings([classifier, reviews, "limit=7", "device=cpu"]))
    assert found["examples"] == 7
    assert {"loss", "accuracy", "f1"} < set(found)
    assert found["labels"] == ["a", "b"]
    confusion, classes = found["confusion_matrix"], found["classes"]
    assert sum(map(sum, confusion)) == 7
    assert (confusion[0][0] + confusion[1][1]) / 7 == found["accuracy"]
    assert [classes[name]["support"] for name in "ab"] == [4, 3]
    found = measure(read_settings([reader, squad, "device=cpu", "dtype=bfloat16"]))
    assert found["examples"] == 3
    assert {"loss", "exact_match", "f1"} < set(found)


def test_raw_data_are_mapped_from_the_disk_and_not_held(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    raw = written(tmp_path / "data.jsonl", [{"body": text} for text in TEXTS])
    settings = read_settings(["model", raw, "columns.text=body"])
    data = read(settings, raw, TASKS["causal-lm"], tokenizer, DataSettings(sequence_length=64))
    assert isinstance(data.tokens, np.memmap)
    rows = read_rows(raw, ["text"], {"text": "body"})
    held = CausalLMData(rows, tokenizer, 64, data.packing)
    assert data.tokens.tolist() == held.tokens.tolist()


def test_raw_data_without_text_is_named(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    """By its own address, and not by where it lies prepared."""
    raw = written(tmp_path / "data.jsonl", [{"text": ""}])
    settings = read_settings(["model", raw])
    with pytest.raises(DataError, match=f"^{raw}: fewer than two tokens"):
        read(settings, raw, TASKS["causal-lm"], tokenizer, DataSettings(sequence_length=64))


def test_a_limit_counts_the_sequences_of_a_text(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    """A text file is one row, however long it is."""
    checkpoint = saved(GPTJForCausalLM, tokenizer, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    words = [checkpoint, str(text), "sequence_length=16", "device=cpu"]
    all_of_it = measure(read_settings(words))
    part = measure(read_settings([*words, "limit=2"]))
    assert all_of_it["examples"] > 2
    assert (part["examples"], part["tokens"]) == (2, 30)


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "none"])
def test_a_limit_reads_no_more_of_a_text_than_it_needs(
    packing: str, tokenizer: GPTJTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sequences as without it, of shards that are small here; the rest is never read."""
    monkeypatch.setattr(Plan, "of", partial(Plan.of, chunk_characters=200))
    rows = [{"text": text} for text in TEXTS]
    raw = written(tmp_path / "data.jsonl", rows)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(Path(raw).read_text() + '{"text": 1}\n')
    settings = read_settings(["model", raw, f"packing={packing}"])
    options = DataSettings(sequence_length=16, packing=settings.packing)
    whole, some, start = (
        read(settings, data, TASKS["causal-lm"], tokenizer, options, limit=limit)
        for data, limit in ((raw, None), (str(damaged), 9), (raw, 10**6))
    )
    assert len(whole) > len(some) == 9
    for one, other in ((whole.first(9), some), (whole, start)):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.row_ends.tolist() == other.row_ends.tolist()
        assert one.document_ends.tolist() == other.document_ends.tolist()
    with pytest.raises(DataError, match="'text'"):
        read(settings, str(damaged), TASKS["causal-lm"], tokenizer, options)


def test_data_is_cut_as_in_training_by_default(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    squad = written(
        tmp_path / "squad.jsonl",
        [{"question": "a dog", "context": " ".join(TEXTS), "answers": None}],
    )
    training = trained_with(sequence_length=40, stride=10)
    trained = saved(GPTJForQuestionAnswering, tokenizer, tmp_path / "trained", training)
    other = saved(GPTJForQuestionAnswering, tokenizer, tmp_path / "other")

    def examples(checkpoint: str, *words: str) -> object:
        return measure(read_settings([checkpoint, squad, "device=cpu", *words]))["examples"]

    def windows(length: int, stride: int) -> int:
        return len(
            QuestionAnsweringData(
                read_rows(squad, TASKS["question-answering"].columns), tokenizer, length, stride
            )
        )

    assert examples(trained) == windows(40, 10)
    assert examples(trained, "stride=30") == windows(40, 30)
    assert examples(trained, "sequence_length=50") == windows(50, 10)
    assert examples(other) == windows(64, 16)
    assert len({windows(40, 10), windows(40, 30), windows(50, 10), windows(64, 16)}) == 4


def test_checkpoint_and_data_may_be_in_s3(
    tokenizer: GPTJTokenizer, tmp_path: Path, s3: LocalS3
) -> None:
    folder = f"s3://{s3.bucket}/evaluate-job"
    training = trained_with(sequence_length=32)
    remote = saved(GPTJForCausalLM, tokenizer, f"{folder}/model", training)
    local = saved(GPTJForCausalLM, tokenizer, tmp_path / "model", training)
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    storage.upload(tmp_path / "data.txt", f"{folder}/data.txt")
    ours = measure(read_settings([remote, f"{folder}/data.txt", "device=cpu"]))
    theirs = measure(read_settings([local, str(tmp_path / "data.txt"), "device=cpu"]))
    assert ours["examples"] == theirs["examples"]
    assert ours["loss"] == theirs["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CHECKPOINT DATA"),
        (["model"], "CHECKPOINT DATA"),
        (["model", "data", "fast"], "CHECKPOINT DATA"),
        (["model", "data", "colour=red"], "colour=red: unknown key"),
        (["model", "data", "batch_size=0"], "batch_size=0: .*greater than or equal to 1"),
        (["model", "data", "limit=some"], "limit='some': .*integer"),
        (["model", "data", "stride=-1"], "stride=-1: .*greater than or equal to 0"),
        (["model", "data", "data.batch_size=4"], "data.batch_size=4: unknown key"),
        (["model", "data", "delimiter=;;"], "delimiter=';;': .*must be one character"),
        (
            ["model", "data", "label_names={1: a, 1: b}"],
            "label_names=.* the key '1' is repeated",
        ),
        (["model", "data", "limit=" + "9" * 5000], "the value is not valid YAML: .*4300"),
    ],
)
def test_a_wrong_command_line_is_explained(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(words)


def test_label_names_are_text_as_written() -> None:
    """Also where YAML has numbers and truth values."""
    words = ["model", "data", "label_names={01: no, 1e1: yes, 2026-11-28: 1.50}"]
    expected = {"01": "no", "1e1": "yes", "2026-11-28": "1.50"}
    assert read_settings(words).label_names == expected
    prepared = prepare_data.read_settings([*words, "tokenizer=t", "task=classification"])
    assert prepared.label_names == expected
    regression = [*words, "tokenizer=t", "task=classification", "problem_type=regression"]
    with pytest.raises(ValueError, match=r"label_names= must be a list for a regression"):
        prepare_data.read_settings(regression)
    regression[2] = "label_names=[score]"
    assert prepare_data.read_settings(regression).problem_type == "regression"
    with pytest.raises(ValueError, match=r"problem_type= has no effect with task=causal-lm"):
        prepare_data.read_settings(["in", "out", "tokenizer=t", "problem_type=regression"])
    words = ["model", "data", "out", "keep=[01, no]", "chunk_rows=010"]
    inferred = batch_inference.read_settings(words)
    assert (inferred.keep, inferred.chunk_rows) == (("01", "no"), 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sequence_length=65"], "sequence_length=65 exceeds the model's n_positions=64"),
        (["stride=3"], "stride=3 is for question-answering models, not GPTJForCausalLM"),
        (["dtype=int8"], "dtype must be a floating-point type such as float16, got 'int8'"),
        (["columns.text=body"], "no column 'body' .*there are 'text'; remedy: data.columns.text="),
        (
            ["data.columns.label=x"],
            "columns.label: unknown column; a causal-lm model reads",
        ),
        (
            ["label_names={1: a}"],
            "label_names={'1': 'a'} is for classification models, not GPTJForCausalLM",
        ),
        (["data.delimiter=;"], "data.delimiter=';' is for CSV"),
        (["revision=main"], "only hub ids have revisions"),
    ],
)
def test_settings_that_do_not_match_the_checkpoint_are_explained(
    words: list[str], message: str, tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    checkpoint = saved(GPTJForCausalLM, tokenizer, tmp_path / "model")
    data = written(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(ValueError, match=message):
        measure(read_settings([checkpoint, data, "device=cpu", *words]))


def test_a_checkpoint_that_cannot_be_evaluated_is_refused(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    data = written(tmp_path / "data.jsonl", [{"text": text, "label": "b"} for text in TEXTS])
    base = saved(GPTJModel, tokenizer, tmp_path / "base")
    with pytest.raises(ValueError, match=r"architectures=\['GPTJModel'\], which must name one of"):
        measure(read_settings([base, data]))
    classifier = saved(GPTJForSequenceClassification, tokenizer, tmp_path / "c")
    with pytest.raises(ValueError, match=r"row 1, column 'label': 'b' is not one of .* LABEL_0"):
        measure(read_settings([classifier, data]))
    with pytest.raises(ValueError, match=r"unigram=.* is for causal-lm models"):
        labelled = written(tmp_path / "l.jsonl", [{"text": "a", "label": 1}])
        measure(read_settings([classifier, labelled, f"unigram={data}"]))
    with pytest.raises(FileNotFoundError, match="not an existing folder"):
        measure(read_settings([str(tmp_path / "nothing here"), data]))
    beyond = saved(GPTJForCausalLM, tokenizer, tmp_path / "beyond")
    (tmp_path / "beyond/manifest.json").unlink()
    gapped(tokenizer, 999).save_pretrained(beyond)
    with pytest.raises(ValueError, match=r"beyond: the tokenizer has an id 999 .*'z'"):
        measure(read_settings([beyond, data]))
    torch.manual_seed(0)
    broken = GPTJForCausalLM(GPTJConfig.preset("tiny", vocab_size=len(tokenizer)))
    torch.nn.init.constant_(broken.lm_head.bias, float("nan"))
    broken.save_pretrained(str(tmp_path / "broken"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"loss is nan.*remedy: dtype=float32"):
        measure(read_settings([str(tmp_path / "broken"), data]))


def test_labels_are_read_as_in_training_or_as_set(
    tokenizer: GPTJTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Class numbers that begin with 1: by the training's settings, or by the command line's."""
    (tmp_path / "test.csv").write_text(
        "Class Index;Description\n" + "".join(f"{n % 2 + 1};{TEXTS[n % 2]}\n" for n in range(8))
    )
    labels = {"id2label": {0: "World", 1: "Sports"}}
    written = {"1": "World", "2": "Sports"}
    trained = saved(
        GPTJForSequenceClassification, tokenizer, tmp_path / "t",
        trained_with(label_names=written), **labels,
    )  # fmt: skip
    other = saved(GPTJForSequenceClassification, tokenizer, tmp_path / "o", **labels)
    words = [
        str(tmp_path / "test.csv"),
        "data.columns.text=Description",
        "columns.label=Class Index",
        "device=cpu",
    ]
    with caplog.at_level("INFO"):
        expected = measure(read_settings([trained, *words]))
    assert "8 rows, single_label_classification, labels as data.label_names has" in caplog.text
    assert "World: 4, Sports: 4" in caplog.text
    with pytest.raises(ValueError, match=r"data.label_names=\{1: World, 2: Sports\}"):
        measure(read_settings([other, *words]))
    for key in ("label_names", "data.label_names"):
        found = measure(read_settings([other, *words, f"{key}={{1: World, 2: Sports}}"]))
        assert found["loss"] == expected["loss"]
    swapped = measure(read_settings([other, *words, "label_names={1: Sports, 2: World}"]))
    assert swapped["accuracy"] == pytest.approx(1 - float(expected["accuracy"]))


def test_a_part_of_the_labels_is_evaluated_as_training_read_them(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    """Only ones of 0 and 1, by the record in training.json; without it, both readings are named."""
    rows = [{"text": TEXTS[n % 2], "label": 1} for n in range(8)]
    ones = written(tmp_path / "ones.jsonl", rows)
    named = written(tmp_path / "named.jsonl", [{**row, "label": "pos"} for row in rows])
    labels = {"id2label": {0: "neg", 1: "pos"}}
    record = {"written": {"neg": 0, "pos": 1, "0": 0, "1": 1}, "multi_hot": None}
    folders = [
        saved(GPTJForSequenceClassification, tokenizer, tmp_path / name, training, **labels)
        for name, training in (("now", {"labels": record}), ("earlier", trained_with()))
    ]
    expected, earlier = [measure(read_settings([each, named])) for each in folders]
    assert measure(read_settings([folders[0], ones]))["loss"] == expected["loss"]
    both = "data.label_names={0: neg, 1: pos} or data.label_names={1: neg, 2: pos}"
    with pytest.raises(ValueError, match=both):
        measure(read_settings([folders[1], ones]))
    for words in ([folders[0], named], [folders[0], ones], [folders[1], named]):
        found = measure(read_settings([*words, "label_names=[neg, pos]"]))
        assert found["loss"] == earlier["loss"]
    found = measure(read_settings([folders[1], ones, "label_names={0: neg, 1: pos}"]))
    assert found["loss"] == earlier["loss"]
    for wrong, message in (("[pos, neg]", "ordered differently"), ("[a, b, c]", "has 3")):
        with pytest.raises(ValueError, match=message):
            measure(read_settings([folders[0], ones, f"label_names={wrong}"]))


def test_labels_of_a_model_without_names_are_named_by_a_list_or_a_mapping(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    rows = [{"text": TEXTS[n % 2], "label": n % 2} for n in range(6)]
    numbers = written(tmp_path / "numbers.jsonl", rows)
    words = [{**row, "label": ["neg", "pos"][row["label"]]} for row in rows]
    named = written(tmp_path / "named.jsonl", words)
    model = saved(GPTJForSequenceClassification, tokenizer, tmp_path / "m")

    def loss(data: str, names: str) -> float:
        return float(measure(read_settings([model, data, f"label_names={names}"]))["loss"])

    expected = loss(numbers, "[neg, pos]")
    for data, names in (
        (named, "[neg, pos]"),
        (numbers, "{0: neg, 1: pos}"),
        (numbers, "{1: pos, 0: neg}"),
        (named, "{0: neg, 1: pos}"),
        (named, "{neg: LABEL_0, pos: LABEL_1}"),
        (named, "{pos: LABEL_1, neg: LABEL_0}"),
        (numbers, "{1: LABEL_1, 0: LABEL_0}"),
    ):
        assert loss(data, names) == expected, names
    assert loss(named, "{pos: LABEL_0, neg: LABEL_1}") != expected
    part = written(tmp_path / "part.jsonl", words[:1])
    assert loss(part, "{neg: LABEL_0}") == loss(part, "[neg, pos]")
    for wrong, message in (("{0: a, 1: b, 2: c}", "has 3"), ("{0: a}", "has 1")):
        with pytest.raises(ValueError, match=message):
            loss(numbers, wrong)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "csv.gz"])
def test_a_classifier_with_numeric_names_is_evaluated_by_name(
    ending: str, tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    rows = [{"text": TEXTS[n % 2], "label": n % 2 + 1} for n in range(8)]
    path = tmp_path / f"data.{ending}"
    if "csv" in ending:
        text = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    elif ending == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    model = saved(
        GPTJForSequenceClassification, tokenizer, tmp_path / "m",
        id2label={0: "1", 1: "2", 2: "unknown"},
    )  # fmt: skip
    found = measure(read_settings([model, str(path), "device=cpu"]))
    by_name = [{**row, "label": str(row["label"])} for row in rows]
    expected = measure(
        read_settings([model, written(tmp_path / "names.jsonl", by_name), "device=cpu"])
    )
    assert found["loss"] == expected["loss"]


def test_a_question_answerer_is_evaluated_on_squads_own_file(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    answers = [{"text": "cat", "answer_start": 4}]
    question = {"question": "  which?", "id": "1", "answers": answers}
    paragraph = {"context": TEXTS[0], "qas": [question, {**question, "answers": []}]}
    document = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(document))
    reader = saved(GPTJForQuestionAnswering, tokenizer, tmp_path / "q")
    found = measure(read_settings([reader, str(tmp_path / "dev-v2.0.json"), "device=cpu"]))
    squad = [
        {"question": "which?", "context": TEXTS[0], "answers": given}
        for given in ({"text": ["cat"], "answer_start": [4]}, None)
    ]
    expected = measure(read_settings([reader, written(tmp_path / "s.jsonl", squad), "device=cpu"]))
    assert found["examples"] == 2
    assert {**found, **{k: expected[k] for k in ("data", "seconds")}} == expected


def test_text_pairs_are_evaluated_as_pairs(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    checkpoint = saved(
        GPTJForSequenceClassification, tokenizer, tmp_path / "model", id2label={0: "a", 1: "b"}
    )
    rows = [
        {"text": text, "other": text[::-1], "label": "ab"[n % 2]}
        for n, text in enumerate(TEXTS[:6])
    ]
    pairs = measure(
        read_settings(
            [checkpoint, written(tmp_path / "pairs.jsonl", rows), "columns.text_pair=other"]
        )
    )
    joined = [{"text": row["text"] + row["other"], "label": row["label"]} for row in rows]
    alone = measure(read_settings([checkpoint, written(tmp_path / "alone.jsonl", joined)]))
    assert pairs["loss"] == pytest.approx(alone["loss"], rel=1e-4)
