"""What a deployment loads, and what it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from serving_models import Models

from deployments.loading import Arguments, load, name_of
from gptj import GPTJForCausalLM

pytest_plugins = ["serving_fixtures"]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("s3://bucket/runs/my-run/model", "my-run"),
        ("s3://bucket/my-model/", "my-model"),
        ("EleutherAI/gpt-j-6B", "EleutherAI/gpt-j-6B"),
        ("./outputs/my-run/model", "my-run"),
        ("/models/gptj", "gptj"),
    ],
)
def test_a_model_is_called_by_its_address(address: str, name: str) -> None:
    assert name_of(address) == name


def test_another_heads_checkpoint_and_unknown_arguments_are_refused(
    models: Models, tmp_path: Path
) -> None:
    address = str(tmp_path / "model")
    models.classification.save_pretrained(address, tokenizer=models.tokenizer)
    with pytest.raises(ValueError, match="is a GPTJForSequenceClassification, and this deployment"):
        load(GPTJForCausalLM, Arguments(checkpoint=address))
    with pytest.raises(ValidationError, match="max_batches"):
        Arguments.model_validate({"checkpoint": address, "max_batches": 3})
