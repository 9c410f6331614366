"""Clients nobody here wrote ask the service: lm_eval, and MLPerf's load generator.

For openai's and Hugging Face's, see test_serving_*.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastapi import Request
from http_server import listening

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.serving.app import new_app
from gptj.serving.completions.generation_request import Usage
from gptj.serving.completions.schemas import Choice, Completion, CompletionRequest
from gptj.serving.errors import InvalidRequestError, OverloadedError
from gptj_bench import __main__ as benchmark
from gptj_bench.serve import MODEL_NAME, ours
from gptj_local.processes import HOST, free_ports

pytestmark = pytest.mark.slow

TEXTS = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
CONTEXT = 192
LONGEST = CONTEXT - 128  # of MLPerf's prompts: longer ones are cut off
STEPS = 25  # of training
SAMPLES = 12


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: GPTJTokenizer) -> GPTJForCausalLM:
    """One that knows the texts in part: where they end, and not all that is in them."""
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
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(
    model: GPTJForCausalLM, tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> str:
    address = str(tmp_path_factory.mktemp("clients") / "model")
    model.save_pretrained(address, tokenizer=tokenizer)
    return address


@pytest.fixture(scope="module")
def service(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the generation service on a cluster of its own, in fp32."""
    with ours(folder, {"dtype": "float32"}, tmp_path_factory.mktemp("service")) as address:
        yield address


# Both sides compute in fp32 on the CPU: only the order of summation differs, 1e-5 a token.
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
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, text in enumerate(TEXTS):
        words = text.split(" ")
        for length in range(2, len(words), 2):
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
        {"tokenized_requests": False, "num_concurrent": 4, "batch_size": 3},
        {"tokenizer": None},  # then it uses our /tokenize
    ],
    ids=str,
)
def test_lm_eval_over_http_equals_transformers_in_process(
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


def test_the_reference_is_partly_right(expected: Found) -> None:
    """Otherwise it could agree with anything."""
    replies, metrics = expected["endings"]
    assert {greedy for _, greedy in replies} == {True, False}
    assert metrics["acc,none"] > 0.8
    texts, metrics = expected["continuation"]
    assert 0 < metrics["exact_match,none"] < 1
    assert any("\ufffd" in text for text in texts)  # a character that the last token cuts off


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for each sample."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [TEXTS[number % 3][number // 3 :] for number in range(SAMPLES)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The measurements that the command prints, after the machine and the settings."""
    benchmark.main(["mlperf", *arguments])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["settings"]["command"] == "mlperf"
    return rows[1:]


def test_both_scenarios_answer_every_sample_once_with_generates_beams(
    model: GPTJForCausalLM,
    tokenizer: GPTJTokenizer,
    folder: str,
    service: str,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", folder, "--url", service, "--prompts", str(prompts)]
    arguments += ["--samples", str(SAMPLES), "--min-duration", "0", "--target-qps", "20"]
    rows = measured(capsys, *arguments, "--logs", str(tmp_path))
    assert [row["scenario"] for row in rows] == ["offline", "server"]
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    for row in rows:
        logs = Path(row["logs"])
        summary = (logs / "mlperf_log_summary.txt").read_text()
        assert f"Result is : {row['verdict']}\n" in summary
        assert f"Scenario : {row['scenario'].capitalize()}\n" in summary
        assert "No errors encountered" in summary
        assert (row["samples"], row["failed"]) == (SAMPLES, 0)
        assert row["settings"]["min_sample_count"] == SAMPLES
        assert row["changed"]["min_duration_ms"] == [600000, 0]
        answers = [json.loads(line) for line in (logs / "replies.jsonl").read_text().splitlines()]
        assert len({answer["query"] for answer in answers}) == SAMPLES
        assert sorted(answer["sample"] for answer in answers) == list(range(SAMPLES))
        assert all(30 <= answer["reply"]["tokens"] <= 128 for answer in answers)
        for answer in answers[:4]:
            ids = tokenizer.encode(texts[answer["sample"]])[:LONGEST]
            beam = model.generate(
                torch.tensor([ids]),
                num_beams=4,
                early_stopping=True,
                min_new_tokens=30,
                max_new_tokens=128,
            )[0, len(ids) :].tolist()
            assert answer["reply"]["tokens"] == len(beam)
            new = [token for token in beam if token != tokenizer.eos_token_id]
            assert answer["reply"]["text"] == tokenizer.decode(new)
    offline, server = rows
    assert offline["valid"]
    assert offline["verdict"] == "VALID"
    # MLPerf's target for a server, and its rule: hundreds of replies before it trusts the 99 %.
    assert server["settings"]["target_latency_ns"] == 20e9
    assert server["met"]["performance"]
    assert not server["met"]["early_stopping"]
    assert not server["valid"]


def test_failures_invalidate_a_run_and_a_full_service_is_retried(
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service that runs elsewhere: its 3rd, 4th and 5th request, after two to warm up, fail."""
    app = new_app("a service in trouble")
    asked: list[tuple[CompletionRequest, str]] = []

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Completion:
        body.check()
        asked.append((body, request.headers["authorization"]))
        if len(asked) == 3:
            raise InvalidRequestError("never works")
        if len(asked) == 5:
            raise OverloadedError("try again later")
        tokens = 29 if len(asked) == 4 else 30
        return Completion(
            model="a-model",
            choices=[Choice(index=0, text="…", finish_reason="stop")],
            usage=Usage(prompt_tokens=8, completion_tokens=tokens, total_tokens=8 + tokens),
        )

    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    arguments = ["--model", folder, "--scenario", "offline", "--prompt-tokens", "8"]
    arguments += ["--samples", "6", "--min-duration", "0", "--concurrency", "1"]
    with listening(app) as address:
        (row,) = measured(capsys, *arguments, "--url", address, "--logs", str(tmp_path))
    assert (row["verdict"], row["valid"]) == ("VALID", False)
    assert (row["samples"], row["failed"]) == (6, 2)
    assert "400" in row["failures"][0]
    assert "never works" in row["failures"][0]
    assert "got 29 tokens instead of 30 to 128" in row["failures"][1]
    assert row["tokens_a_sample"] == 4 * 30 / 6
    assert len(asked) == 2 + 6 + 1
    assert {key for _, key in asked} == {"Bearer a-key"}
    body, _ = asked[-1]
    assert body.use_beam_search
    assert body.early_stopping
    assert body.length_penalty == 1
    assert (body.best_of, body.n) == (4, 1)
    assert (body.min_tokens, body.max_tokens) == (30, 128)


def test_invalid_measurements_are_refused_up_front(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--prompt-tokens must be in \[1, {LONGEST}\]"):
        benchmark.main(["mlperf", "--model", folder, "--prompt-tokens", str(LONGEST + 1)])
    with pytest.raises(ValueError, match=r"--target-qps must be above 0, got 0.0"):
        benchmark.main(["mlperf", "--model", folder, "--target-qps", "0"])
    (port,) = free_ports(1)
    url = f"http://{HOST}:{port}"
    arguments = ["mlperf", "--model", folder, "--prompt-tokens", "8", "--logs", str(tmp_path)]
    with pytest.raises(RuntimeError, match=f"{url}/v1/completions does not answer"):
        benchmark.main([*arguments, "--url", url])
