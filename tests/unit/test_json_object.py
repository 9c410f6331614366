"""JSON that we write is valid for any reader, whatever the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.checkpoints.folder import TRAINING
from gptj.serialization.json_object import to_json
from gptj.serving.errors import json_response
from gptj.training.progress import HISTORY, ProgressLog
from gptj.training.state import Progress


def strict(text: str | bytes) -> Any:
    """Parse by RFC 8259: Python's own reader also accepts NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_nonfinite_numbers_become_null(number: float) -> None:
    value = {"a": number, "b": [1.5, (number, "NaN")], "c": {"d": {"e": number}}}
    expected = {"a": None, "b": [1.5, [None, "NaN"]], "c": {"d": {"e": None}}}
    assert strict(to_json(value)) == expected
    assert strict(to_json(value, indent=2)) == expected
    assert strict(json_response(200, value, {}).body) == expected


@pytest.mark.slow
def test_a_runs_files_are_valid_json_after_any_measurement(tmp_path: Path) -> None:
    """A step that overflowed in fp16 has an infinite norm; a bad model's perplexity is infinite."""
    progress = Progress()
    log = ProgressLog(progress, tmp_path / "scratch", 2, 1, lambda point: None)
    progress.step = 1
    log.step(2.5, 1e-3, math.inf, tokens=10, room=10, seconds=1.0)
    log.evaluation({"loss": 800.0, "perplexity": math.inf})
    log.publish(str(tmp_path / "run"), log.snapshot())
    log.close()
    lines = (tmp_path / "run" / HISTORY).read_text().splitlines()
    assert [strict(line).get("gradient_norm", "none") for line in lines] == [None, "none"]
    assert strict(lines[1])["evaluation_perplexity"] is None

    # As a checkpoint brings it back: the curve is drawn all the same.
    again = Progress(history=[strict(line) for line in lines])
    log = ProgressLog(again, tmp_path / "again", 2, 1, lambda point: None)
    log.publish(str(tmp_path / "run"), log.snapshot())
    log.close()
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"

    config = GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    training = {"metrics": {"perplexity": math.inf}, "history": progress.history}
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "model"), training=training)
    found = strict((tmp_path / "model" / TRAINING).read_bytes())
    assert found["metrics"] == {"perplexity": None}
