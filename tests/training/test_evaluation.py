"""Metrics against their definitions, and the same from one rank or from several."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gapped_tokenizer import gapped
from hypothesis import given
from hypothesis import strategies as st

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
)
from gptj.data.causal_lm import CausalLMData
from gptj.data.classification import ClassificationData
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.sources import Row, read_rows
from gptj.data.spans import best_spans
from gptj.data.words import Words
from gptj.training.evaluation import collect, evaluate, metrics
from gptj.training.tasks import TASKS, AnyTask, Part, question_answering
from gptj.training.tasks.causal_lm import unigram_perplexity
from gptj.training.tasks.question_answering import (
    MAX_ANSWER_TOKENS,
    Answer,
    exact_match,
    overlap_f1,
)

TEXTS = [
    f"the {noun} is {word}" for noun in ("cat", "dog", "house") for word in ("old", "new", "so")
]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([*TEXTS, "where what"], 280)


def rows(**columns: list[Any]) -> list[Row]:
    count = len(next(iter(columns.values())))
    return [Row({k: v[i] for k, v in columns.items()}, "f", i + 1) for i in range(count)]


def classification(tokenizer: GPTJTokenizer, labels: list[Any]) -> ClassificationData:
    texts = [TEXTS[i % len(TEXTS)] for i in range(len(labels))]
    return ClassificationData(rows(text=texts, label=labels), tokenizer, 16)


def questions(tokenizer: GPTJTokenizer, answerable: bool = True) -> QuestionAnsweringData:
    """Questions of several windows each; some have two answers, or none."""
    contexts = [". ".join(TEXTS[i:]) + "." for i in range(5)]
    answers = [
        {"text": [word, TEXTS[5]], "answer_start": [context.index(word), context.index(TEXTS[5])]}
        for word, context in zip(("the cat", "old", "house", "dog", "new"), contexts, strict=True)
    ]
    if not answerable:
        answers[2] = {"text": [], "answer_start": []}
    table = rows(question=["what is where"] * 5, context=contexts, answers=answers)
    return QuestionAnsweringData(table, tokenizer, 32, 8)


def part(outputs: Iterable[Any]) -> Part:
    outputs = dict(enumerate(outputs))
    return Part(loss=2.0 * len(outputs), items=len(outputs), outputs=outputs)


def model(cls: type[Any], tokenizer: GPTJTokenizer, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8,
        initializer_range=0.2, **fields,
    )  # fmt: skip
    return cls(config)


def task_of(data: Any) -> AnyTask:
    names = {
        CausalLMData: "causal-lm",
        ClassificationData: "classification",
        QuestionAnsweringData: "question-answering",
    }
    return TASKS[names[type(data)]]


def case(name: str, tokenizer: GPTJTokenizer) -> tuple[Any, Any]:
    """A model and data of each kind."""
    if name == "causal-lm":
        data = CausalLMData(rows(text=TEXTS * 5), tokenizer, 11)
        return model(GPTJForCausalLM, tokenizer), data
    if name == "question-answering":
        return model(GPTJForQuestionAnswering, tokenizer), questions(tokenizer)
    labels: dict[str, list[Any]] = {
        "single-label": ["a", "b", "c", "a", "b"],
        "multi-label": [["x"], ["y", "z"], [], ["x", "z"], ["y"]],
        "regression": [0.5, 1.5, -1.0, 2.0, 0.0],
    }
    data = classification(tokenizer, labels[name])
    names, kind = data.labels.id2label, data.labels.problem_type  # type: ignore[attr-defined]
    head = model(GPTJForSequenceClassification, tokenizer, id2label=names, problem_type=kind)
    return head, data


CASES = ["causal-lm", "single-label", "multi-label", "regression", "question-answering"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_metrics_do_not_depend_on_the_number_of_ranks(
    name: str, world_size: int, tokenizer: GPTJTokenizer
) -> None:
    head, data = case(name, tokenizer)
    alone = evaluate(task_of(data), head, data, batch_size=4, device="cpu")
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    parts, calls_of_rank = [], []
    for rank in range(world_size):
        parts.append(
            collect(
                task_of(data),
                head,
                data,
                batch_size=3,
                device="cpu",
                rank=rank,
                world_size=world_size,
            )
        )
        calls_of_rank.append(len(calls))
        calls.clear()
    gathered = pickle.loads(pickle.dumps(parts))
    # Batches are composed differently, which changes the order of summation in the model.
    assert metrics(task_of(data), data, gathered) == pytest.approx(alone, rel=1e-5)
    assert len(set(calls_of_rank)) == 1  # ZeRO-3 waits for ever otherwise


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_mean_over_all_items(name: str, tokenizer: GPTJTokenizer) -> None:
    head, data = case(name, tokenizer)
    total, items = 0.0, 0
    for index in range(len(data)):
        batch = data.collate([data[index]])
        real = int(batch["attention_mask"].sum())
        unpadded = {
            key: tensor[:, :real] if tensor.shape == batch["input_ids"].shape else tensor
            for key, tensor in batch.items()
        }
        with torch.no_grad():
            total += float(head.eval()(**unpadded).loss) * data.count_items(batch)
        items += data.count_items(batch)
    expected = total / items
    found = evaluate(task_of(data), head, data, batch_size=len(data) - 1, device="cpu")
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    if name == "causal-lm":
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert found["tokens"] == items


def test_metrics_on_a_device_equal_the_cpus(tokenizer: GPTJTokenizer, device: torch.device) -> None:
    for name in CASES:
        head, data = case(name, tokenizer)
        expected = evaluate(task_of(data), head, data, batch_size=3, device="cpu")
        found = evaluate(task_of(data), head.to(device), data, batch_size=3, device=device)
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_models_mode_is_restored(tokenizer: GPTJTokenizer) -> None:
    head, data = case("causal-lm", tokenizer)
    head.transformer.drop.p = 0.5
    results = [
        evaluate(task_of(data), head.train(), data, batch_size=4, device="cpu") for _ in range(2)
    ]
    assert results[0] == results[1]  # no dropout
    assert head.training
    assert all(parameter.grad is None for parameter in head.parameters())
    head.eval()
    evaluate(task_of(data), head, data, batch_size=4, device="cpu")
    assert not head.training


def test_single_label_scores_equal_a_manual_count(tokenizer: GPTJTokenizer) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 60).tolist()
    logits = generator.normal(size=(60, 4))
    data = ClassificationData(
        rows(text=["the cat"] * 60, label=truth), tokenizer, 16, label_names=list("abcd")
    )
    predictions = logits.argmax(axis=1).tolist()
    scores = []
    for number in sorted({*truth, *predictions}):
        pairs = list(zip(predictions, truth, strict=True))
        hits = sum(p == t == number for p, t in pairs)
        precision = hits / max(1, sum(p == number for p, _ in pairs))
        recall = hits / max(1, sum(t == number for _, t in pairs))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    found = metrics(task_of(data), data, [part(logits.tolist())])
    assert len(scores) == 4  # one class is predicted and never true
    assert found["f1"] == pytest.approx(sum(scores) / 4)
    assert found["accuracy"] == sum(p == t for p, t in zip(predictions, truth, strict=True)) / 60
    assert found["loss"] == 2.0


def test_multi_label_scores_equal_a_manual_count(tokenizer: GPTJTokenizer) -> None:
    data = classification(tokenizer, [["x", "y"], [], ["z"]])
    logits = [[1.0, -1.0, 2.0], [-1.0, -0.1, -3.0], [-1.0, -1.0, 0.1]]
    found = metrics(task_of(data), data, [part(logits)])
    # Two hits, one false alarm, one miss; the last two rows are right as a whole.
    assert found == pytest.approx({"loss": 2.0, "accuracy": 2 / 3, "f1": 2 * 2 / (2 * 2 + 1 + 1)})


def test_regression_scores_equal_numpy(tokenizer: GPTJTokenizer) -> None:
    targets, outputs = [0.5, 1.5, -1.0, 2.0], [0.4, 1.0, -2.0, 0.1]
    data = classification(tokenizer, targets)
    found = metrics(task_of(data), data, [part([[value] for value in outputs])])
    assert found["mse"] == pytest.approx(np.mean((np.array(targets) - outputs) ** 2))
    assert found["pearson"] == pytest.approx(np.corrcoef(targets, outputs)[0, 1])
    constant = metrics(task_of(data), data, [part([[1.0]] * 4)])
    assert set(constant) == {"loss", "mse"}  # of a constant there is no correlation


def test_a_contexts_words_are_found_once_for_all_its_windows(
    tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A book has hundreds of windows, each of which would go through all of it."""
    made: list[str] = []

    def counted(text: str) -> Words:
        made.append(text)
        return Words(text)

    monkeypatch.setattr(question_answering, "Words", counted)
    question_answering._words.cache_clear()
    data = questions(tokenizer)
    logits = torch.zeros(len(data), 256)
    output = SimpleNamespace(start_logits=logits, end_logits=logits)
    TASKS["question-answering"].outputs(data, output, range(len(data)))
    assert len(data) > len(data.questions) == len(made)


def test_an_answer_is_the_best_of_all_windows(tokenizer: GPTJTokenizer) -> None:
    """As the service finds it, in whole words; the reference answer that fits best counts."""
    head, data = case("question-answering", tokenizer)
    found = evaluate(task_of(data), head, data, batch_size=4, device="cpu")
    exact, f1 = [], []
    for number, question in enumerate(data.questions):
        mine = [i for i in range(len(data)) if data.question_of(i) == number]
        assert len(mine) > 1
        outputs = [head(torch.from_numpy(data[i].input_ids).long()[None]) for i in mine]
        (span,) = best_spans(
            [data.window(i) for i in mine],
            [output.start_logits[0] for output in outputs],
            [output.end_logits[0] for output in outputs],
            max_answer_tokens=MAX_ANSWER_TOKENS,
            words=Words(question.context),
        )
        text = question.context[span.start : span.end]
        exact.append(max(exact_match(text, answer) for answer in question.answers))
        f1.append(max(overlap_f1(text, answer) for answer in question.answers))
    assert found["exact_match"] == pytest.approx(np.mean(exact))
    assert found["f1"] == pytest.approx(np.mean(f1))
    assert found["f1"] > 0


def test_the_empty_answer_is_only_right_without_an_answer(tokenizer: GPTJTokenizer) -> None:
    data = questions(tokenizer, answerable=False)
    silent = [Answer(0, 7, logit=0.0, null_logit=1.0) for _ in range(len(data))]
    assert metrics(task_of(data), data, [part(silent)])["exact_match"] == 1 / 5
    # One window that is sure of an answer is enough.
    mine = [i for i in range(len(data)) if data.question_of(i) == 0]
    silent[mine[-1]] = Answer(0, 7, logit=2.0, null_logit=-1.0)
    assert data.questions[0].answers[0] == data.questions[0].context[:7]
    assert metrics(task_of(data), data, [part(silent)])["exact_match"] == 2 / 5
    # Where every question has an answer, silence is none.
    answerable = questions(tokenizer)
    silent = [Answer(0, 7, logit=0.0, null_logit=9.0) for _ in range(len(answerable))]
    assert metrics(task_of(answerable), answerable, [part(silent)])["f1"] > 0


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The Cat.", "cat", 1, 1),
        ("a cat", "the cat!", 1, 1),
        ("  old\nhouse ", "Old House", 1, 1),
        ("theatre", "atre", 0, 0),
        ("New York City", "in New York", 0, 4 / 6),
        ("cat cat dog", "cat dog dog", 0, 4 / 6),
        ("U.S.", "us", 1, 1),
        ("", "cat", 0, 0),
        ("the", "", 1, 1),
        ("São Paulo", "são paulo", 1, 1),
    ],
)
def test_answers_are_scored_by_squads_rules(
    prediction: str, answer: str, exact: float, f1: float
) -> None:
    """The cases as SQuAD's official script (evaluate-v2.0.py) scores them."""
    assert exact_match(prediction, answer) == exact
    assert overlap_f1(prediction, answer) == pytest.approx(f1)


@given(st.text("ab the.,", max_size=12), st.text("ab the.,", max_size=12))
def test_word_overlap_is_a_similarity(left: str, right: str) -> None:
    assert 0 <= overlap_f1(left, right) == overlap_f1(right, left) <= 1
    assert overlap_f1(left, left) == 1 >= exact_match(left, right)
    assert exact_match(left, right) <= overlap_f1(left, right)


def test_unigram_perplexity_uses_smoothed_frequencies(tokenizer: GPTJTokenizer) -> None:
    train = CausalLMData(rows(text=TEXTS), tokenizer, 16)
    held_out = CausalLMData(rows(text=["the old house is so new", "what"]), tokenizer, 5)
    counts = dict.fromkeys(range(len(tokenizer)), 1)
    for index in range(len(train)):
        for token in train[index].ids.tolist():
            counts[token] += 1
    total = sum(counts.values())
    predicted = [t for i in range(len(held_out)) for t in held_out[i].ids.tolist()[1:]]
    mean = sum(-math.log(counts[token] / total) for token in predicted) / len(predicted)
    assert unigram_perplexity(train, held_out) == pytest.approx(math.exp(mean))
    batch = held_out.collate([held_out[i] for i in range(len(held_out))])
    assert len(predicted) == held_out.count_items(batch)
    other = CausalLMData(rows(text=TEXTS), GPTJTokenizer.train(TEXTS, 257), 16)
    with pytest.raises(ValueError, match=r"vocabularies of 257 and 280|one tokenizer"):
        unigram_perplexity(other, held_out)
    gaps = gapped(tokenizer, 999)
    found = unigram_perplexity(
        CausalLMData(rows(text=TEXTS), gaps, 16), CausalLMData(rows(text=["z"] * 4), gaps, 4)
    )
    assert math.isfinite(found)


def test_a_missing_part_is_detected(tokenizer: GPTJTokenizer) -> None:
    head, data = case("single-label", tokenizer)
    one = collect(task_of(data), head, data, batch_size=1, device="cpu", rank=0, world_size=2)
    with pytest.raises(ValueError, match="parts of 3 examples, but there are 5"):
        metrics(task_of(data), data, [one])
    with pytest.raises(ValueError, match=r"reduce is for world_size > 1 only.* got 2"):
        evaluate(task_of(data), head, data, batch_size=1, device="cpu", rank=0, world_size=2)


@pytest.mark.slow
def test_a_tiny_model_learns_the_synthetic_questions(tokenizer: GPTJTokenizer) -> None:
    """From scratch, in a few hundred steps: the first run of the product rests on this."""
    train, held_out = (
        list(read_rows(f"sample://questions{end}", TASKS["question-answering"].columns))
        for end in ("", "/evaluation")
    )
    texts = [row.text(column) for row in train for column in ("question", "context")]
    tokenizer = GPTJTokenizer.train(texts, 1024)
    data = QuestionAnsweringData(train, tokenizer, 128, 32)
    torch.manual_seed(0)
    head = GPTJForQuestionAnswering(GPTJConfig.preset("tiny", vocab_size=len(tokenizer)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    held = QuestionAnsweringData(held_out, tokenizer, 128, 32)
    found = 0.0
    for step in range(300):
        examples = range(step * 16 % len(data), min(step * 16 % len(data) + 16, len(data)))
        loss = head(**data.collate([data[i] for i in examples])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            found = evaluate(task_of(held), head, held, batch_size=32, device="cpu")["f1"]
            if found > 0.9:
                break
    assert found > 0.9


def test_half_precision_can_be_evaluated(tokenizer: GPTJTokenizer) -> None:
    for name in CASES:
        head, data = case(name, tokenizer)
        expected = evaluate(task_of(data), head, data, batch_size=3, device="cpu")["loss"]
        found = evaluate(task_of(data), head.to(torch.bfloat16), data, batch_size=3, device="cpu")[
            "loss"
        ]
        assert found == pytest.approx(expected, rel=0.05)
