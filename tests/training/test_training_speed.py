"""`python -m gptj_bench.training_speed`: what it measures and compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj_bench import training_speed


def test_runs_are_compared_with_what_they_replace() -> None:
    rates = {"full": 30.0, "transformers, fp32": 20.0, "lora": 60.0}
    assert training_speed.ratios(rates) == {"full / transformers, fp32": 1.5, "lora / full": 2.0}
    assert training_speed.ratios({"packed": 50.0, "padded": 10.0}) == {"packed / padded": 5.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--runs", "full,lara"], "unknown runs lara"), (["--runs", "padded"], "need --data FILE")],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        training_speed.main(["--model", "m", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_a_tiny_model_is_measured_beside_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"line {number}" for number in range(40)]
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = GPTJTokenizer.train(texts, vocab_size=300)
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 8}
    model = GPTJForCausalLM(GPTJConfig(vocab_size=50400, **shape))
    model.save_pretrained(str(tmp_path / "model"), tokenizer=tokenizer)
    training_speed.main(
        [
            *("--model", str(tmp_path / "model"), "--data", str(data)),
            *("--runs", "full,lora,packed,padded", "--peer", sys.executable),
            *("--rows", "2", "--length", "64", "--steps", "1", "--threads", "1"),
        ]
    )
    _, *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    found = {row["engine"]: row for row in rows}
    peers = ["transformers, all in bf16", "transformers, fp32 masters"]
    assert [*found] == ["full", *peers, "lora", "packed", "padded"]
    assert found["padded"]["useful_tokens_per_s"] < found["padded"]["tokens_per_s"] / 2
    assert found["packed"]["useful_tokens_per_s"] > 0.8 * found["packed"]["tokens_per_s"]
    assert 0 <= found["full"]["outside_operators"] < 1
    assert last["ratios"].keys() == {
        *(f"full / {peer}" for peer in peers),
        "lora / full",
        "packed / padded",
    }
