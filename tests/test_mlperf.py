"""MLPerf's load generator against our service: each sample answered by the beams of `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import Request
from http_server import listening

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.checkpoint import save_model
from gptj.serving.app import new_app
from gptj.serving.completions import Choice, Completion, CompletionRequest, Usage
from gptj.serving.errors import InvalidRequestError, OverloadedError
from jobs import benchmark
from jobs.processes import HOST, free_ports

TEXTS = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
CONTEXT = 160
LONGEST = CONTEXT - 128  # of the prompts: longer ones are cut off
SAMPLES = 12


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer: GPTJTokenizer) -> GPTJForCausalLM:
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
        initializer_range=0.3,  # wide, so that beams differ
    )
    model = GPTJForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] += 2  # so that some end early
    return model


@pytest.fixture(scope="module")
def folder(
    model: GPTJForCausalLM, tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> str:
    address = str(tmp_path_factory.mktemp("mlperf") / "model")
    save_model(model, address, tokenizer=tokenizer)
    return address


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


@pytest.mark.slow
def test_both_scenarios_answer_every_sample_once_by_the_beams_of_generate(
    model: GPTJForCausalLM,
    tokenizer: GPTJTokenizer,
    folder: str,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", folder, "--dtype", "float32", "--prompts", str(prompts)]
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
        reasons = {answer["reply"]["finish_reason"] for answer in answers}
        assert reasons == {"stop", "length"}
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
    assert offline["valid"] and offline["verdict"] == "VALID"
    # MLPerf's target for a server, and its rule: hundreds of replies before it trusts the 99 %.
    assert server["settings"]["target_latency_ns"] == 20e9
    assert server["met"]["performance"] and not server["met"]["early_stopping"]
    assert not server["valid"]


def test_failures_make_a_run_invalid_and_a_full_service_is_asked_again(
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
    assert "400" in row["failures"][0] and "never works" in row["failures"][0]
    assert "29 tokens came instead of 30 to 128" in row["failures"][1]
    assert row["tokens_a_sample"] == 4 * 30 / 6
    assert len(asked) == 2 + 6 + 1 and {key for _, key in asked} == {"Bearer a-key"}
    body, _ = asked[-1]
    assert body.use_beam_search and body.early_stopping and body.length_penalty == 1
    assert (body.best_of, body.n) == (4, 1)
    assert (body.min_tokens, body.max_tokens) == (30, 128)


def test_what_cannot_be_measured_is_said_before(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt-tokens must be in \[1, 32\]"):
        benchmark.main(["mlperf", "--model", folder, "--prompt-tokens", "33"])
    with pytest.raises(ValueError, match="--target-qps must be above 0, got 0.0"):
        benchmark.main(["mlperf", "--model", folder, "--target-qps", "0"])
    (port,) = free_ports(1)
    url = f"http://{HOST}:{port}"
    arguments = ["mlperf", "--model", folder, "--prompt-tokens", "8", "--logs", str(tmp_path)]
    with pytest.raises(RuntimeError, match=f"{url}/v1/completions does not answer a prompt"):
        benchmark.main([*arguments, "--url", url])
