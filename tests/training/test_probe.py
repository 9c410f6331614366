"""The probe batch: what it detects, for every task, and its messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from task_data import make_data

from gptj.errors import CheckpointError
from gptj.training import probe as module
from gptj.training.model_config import make_config
from gptj.training.probe import ROWS, Probe
from gptj.training.settings import Settings
from gptj.training.tasks import TASKS
from gptj.training.tokenizer import prepare_tokenizer

CPU = torch.device("cpu")
SHAPE = {
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "initializer_range": 0.3,  # so that a weight counts
}


def write_rows(path: Path, task: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {n}? ", "completion": f"{n} is {'very ' * (n % 4)}good."}
        for n in range(12)
    ]
    if task == "classification":
        rows = [{"text": f"{row['completion']}", "label": n % 2} for n, row in enumerate(rows)]
    if task == "question-answering":
        rows = [
            {
                "question": "which?",
                "context": f"it is {n} indeed",
                "answers": {"text": [str(n)], "answer_start": [6]},
            }
            for n in range(12)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", TASKS)
def test_a_stored_probe_gives_the_same_loss_until_a_weight_is_altered(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", task)
    settings = Settings(
        task=task,  # type: ignore[arg-type]
        storage=str(tmp_path),
        data={"train": str(tmp_path / "rows.jsonl"), "sequence_length": 48, **stride(task)},  # type: ignore[arg-type]
        model={"preset": "tiny", "config": SHAPE},  # type: ignore[arg-type]
        tokenizer={"vocab_size": 300},  # type: ignore[arg-type]
    )
    tokenizer = prepare_tokenizer(settings)
    data = make_data(settings, tokenizer).train
    definition = settings.task_definition
    model = definition.head(make_config(settings, tokenizer, data.labels)).train()
    rows = list(range(min(8, len(data))))
    fresh = Probe.first_rows(data, rows)
    assert len(fresh.batch["input_ids"]["values"]) <= ROWS
    fields = fresh.with_loss(fresh.measure(definition, model, CPU))
    assert model.training
    stored = Probe(**json.loads(json.dumps(fields)))
    assert stored.loss is not None and stored.loss > 0
    again = stored.measure(definition, model, CPU)
    assert again == stored.loss
    stored.check(again, "fp32", "checkpoint")
    with torch.no_grad():
        model.base_model.get_submodule("h.1.mlp.fc_in").weight *= 1.1
    altered = stored.measure(definition, model, CPU)
    with pytest.raises(CheckpointError, match=r"Versions are the same, so .*weights .* adapter"):
        stored.check(altered, "fp32", "checkpoint")
    other = {**module.versions(), "torch": "9.9", "git commit": "abc"}
    monkeypatch.setattr(module, "versions", lambda: other)
    with pytest.raises(CheckpointError) as refused:
        stored.check(altered, "fp32", "s3://b/run/checkpoint-00000003")
    assert re.search(
        r"from s3://b/run/checkpoint-00000003 is not the one that was saved: its loss on the "
        r"checkpoint's probe batch was [\d.]+ and is now [\d.]+\. Since then torch was 2\S+ and is "
        r"9\.9, git commit was \S+ and is abc\.",
        str(refused.value),
    )


def stride(task: str) -> dict[str, int]:
    return {"stride": 8} if task == "question-answering" else {}


@pytest.mark.parametrize(
    ("precision", "share", "same"),
    [("fp32", 5e-5, True), ("fp32", 3e-4, False), ("bf16", 3e-3, True), ("bf16", 2e-2, False)],
)
def test_rounding_differences_are_allowed(precision: str, share: float, same: bool) -> None:
    probe = Probe({}, 1, 2.5, {})
    if same:
        probe.check(2.5 * (1 + share), precision, "checkpoint")
        return
    with pytest.raises(CheckpointError, match="is not the one that was saved"):
        probe.check(2.5 * (1 - share), precision, "checkpoint")


def test_a_nan_loss_is_detected() -> None:
    with pytest.raises(CheckpointError, match="is now nan"):
        Probe({}, 1, 2.5, {}).check(float("nan"), "bf16", "checkpoint")
