"""EleutherAI's lm_eval asks our service as it asks anybody's; transformers is the reference.

Both sides compute in fp32 on the CPU, so that only the order of summation differs: 1e-5 a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.checkpoint import save_model
from jobs.benchmarks.serve import MODEL_NAME, ours

pytestmark = pytest.mark.slow

TEXTS = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
CONTEXT = 256
STEPS = 25  # of training
TOLERANCE = {"rel": 1e-5, "abs": 5e-4}  # of a text's log-probability, by up to 60 tokens

TASKS: list[dict[str, Any]] = [
    {
        "task": "endings",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    {
        "task": "continuation",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{sentence}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    {
        "task": "perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
]

Found = dict[str, tuple[list[Any], dict[str, float]]]  # a task's replies in order, and its metrics


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: GPTJTokenizer) -> GPTJForCausalLM:
    """One that knows the texts in part, so that some endings are its own and others are not."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPTJForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(
    model: GPTJForCausalLM, tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> str:
    address = str(tmp_path_factory.mktemp("lm_eval") / "model")
    save_model(model, address, tokenizer=tokenizer)
    return address


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, text in enumerate(TEXTS):
        words = text.split(" ")
        for length in range(2, len(words)):
            end = "".join(f" {word}" for word in words[length:])
            other = TEXTS[number - 1][-20:]
            wrong = [end[::-1], f" {other}", " wait — 東京"]
            row = {"text": " ".join(words[:length]), "endings": [*wrong, end], "right": 3}
            rows.append({**row, "sentence": end.partition(".")[0]})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in TASKS:
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder)},
            "test_split": "test",
        }
        path = folder / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump({**task, **source}, allow_unicode=True))
    return folder


@pytest.fixture(scope="module")
def service(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ours(folder, {"dtype": "float32"}, tmp_path_factory.mktemp("service")) as address:
        yield address


def evaluate(tasks: Path, model: str, arguments: dict[str, Any]) -> Found:
    from lm_eval import simple_evaluate  # here, since it takes seconds
    from lm_eval.tasks import TaskManager

    names = [task["task"] for task in TASKS]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(
        model, arguments, names, task_manager=manager, bootstrap_iters=0, random_seed=0
    )
    assert results is not None
    found = {}
    for name in names:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        replies = [reply for sample in samples for (reply,) in sample["resps"]]
        metrics = results["results"][name]
        metrics = {name: value for name, value in metrics.items() if isinstance(value, float)}
        found[name] = (replies, metrics)
    return found


@pytest.fixture(scope="module")
def expected(folder: str, tasks: Path) -> Found:
    """By lm_eval's own class for models of transformers, in this process."""
    arguments = {"pretrained": folder, "dtype": "float32", "device": "cpu", "batch_size": 1}
    # Its cache takes texts that are the same for the same, wherever their ending begins.
    return evaluate(tasks, "hf", {**arguments, "logits_cache": False})


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenized_requests": True},
        {"tokenized_requests": False},
        {"tokenized_requests": True, "num_concurrent": 4, "batch_size": 3},
        {"tokenized_requests": False, "num_concurrent": 4, "batch_size": 3},
        {"tokenizer": None},  # then it uses our /tokenize
    ],
    ids=str,
)
def test_lm_eval_finds_over_http_what_transformers_gives_in_process(
    service: str, folder: str, tasks: Path, expected: Found, arguments: dict[str, Any]
) -> None:
    arguments = {
        "model": MODEL_NAME,
        "base_url": f"{service}/v1/completions",
        "tokenizer": folder,
        "max_length": CONTEXT,
        **arguments,
    }
    if arguments["tokenizer"] is not None:
        arguments["tokenizer_backend"] = "huggingface"
    found = evaluate(tasks, "local-completions", arguments)
    replies, metrics = found["endings"]
    right, scores = expected["endings"]
    for (one, one_greedy), (other, other_greedy) in zip(replies, right, strict=True):
        assert one == pytest.approx(other, **TOLERANCE)
        assert one_greedy == other_greedy
    assert metrics == scores
    assert found["continuation"] == expected["continuation"]
    replies, metrics = found["perplexity"]
    assert replies == pytest.approx(expected["perplexity"][0], **TOLERANCE)
    assert metrics == pytest.approx(expected["perplexity"][1], **TOLERANCE)


def test_the_reference_finds_some_right_and_some_wrong(expected: Found) -> None:
    """Otherwise it could agree with anything."""
    replies, metrics = expected["endings"]
    assert {greedy for _, greedy in replies} == {True, False}
    assert metrics["acc,none"] > 0.8
    texts, metrics = expected["continuation"]
    assert 0 < metrics["exact_match,none"] < 1
    assert any("\ufffd" in text for text in texts)  # a character that the last token cuts off
