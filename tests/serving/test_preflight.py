"""Error messages for checkpoints that cannot be deployed, without a cluster.

tests/cluster/test_rollout.py shows where the check runs, and that it changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve.exceptions import RayServeException
from serving_models import Models

from deployments import preflight
from deployments.loading import Arguments, check
from deployments.preflight import _problem
from gptj import GPTJForCausalLM, GPTJForSequenceClassification

pytest_plugins = ["serving_fixtures"]


@pytest.fixture
def checkpoint(models: Models, tmp_path: Path) -> Path:
    models.classification.save_pretrained(tmp_path / "model", tokenizer=models.tokenizer)
    return tmp_path / "model"


def said(address: Path, cls: type = GPTJForSequenceClassification) -> str:
    problem = _problem(cls, Arguments(checkpoint=str(address)))
    assert problem is not None
    assert problem.startswith("the checkpoint cannot be deployed: ")
    return problem


def test_a_good_checkpoint_can_be_deployed(checkpoint: Path) -> None:
    assert _problem(GPTJForSequenceClassification, Arguments(checkpoint=str(checkpoint))) is None
    check(GPTJForSequenceClassification, Arguments(checkpoint=str(checkpoint)))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "missing") in said(tmp_path / "missing")


def test_what_is_wrong_is_an_error_that_serve_shows_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster of one node, this one. Serve shows a RayServeException's text alone."""
    monkeypatch.setattr(preflight.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(preflight, "_replica_node", lambda: "here")
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(preflight.ray, "get_runtime_context", lambda: here)
    arguments = Arguments(checkpoint=str(tmp_path / "missing"))
    with pytest.raises(RayServeException, match=r"cannot be deployed: .*missing"):
        preflight.check_before_deploying(GPTJForSequenceClassification, arguments)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors" in said(checkpoint)


def test_another_head_is_named(checkpoint: Path) -> None:
    problem = said(checkpoint, GPTJForCausalLM)
    assert "is a GPTJForSequenceClassification, and this deployment serves a GPTJForC" in problem
