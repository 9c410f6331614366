"""The gradients of a step's micro-batches are added up in fp32, with a real DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import run_ranks, settings_of
from torch import Tensor, nn

from gptj.environment.extras import Extra
from gptj.training import deepspeed_config as plans
from gptj.training.loop import _Run
from gptj.training.operators import guarded_builds
from gptj.training.settings import Settings

deepspeed = Extra("deepspeed", "training")

MICRO_BATCHES = 320  # equal gradients: in bf16 their sum is stuck at 256 of them
SIZE = 8


class Weighted(nn.Module):
    """A model whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def norm_of_sum(plan: dict[str, Any]) -> float:
    """Of the mean of gradients that are all 1, by DeepSpeed."""
    model = Weighted().bfloat16()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=plan, dist_init_required=False
    )
    ones = torch.ones(SIZE, SIZE, dtype=torch.bfloat16)
    for _ in range(MICRO_BATCHES):
        engine.backward(engine(ones))
        engine.step()
    return float(engine.optimizer._global_grad_norm)


def main(rank: int, world_size: int, port: int, runs: list[Settings]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0")
    os.environ["WORLD_SIZE"] = "1"
    torch.set_num_threads(1)
    with guarded_builds():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
        for settings in runs:
            plan = plans.deepspeed_config(settings, "cpu", 1)
            Path(settings.storage, f"{settings.run}.norm").write_text(str(norm_of_sum(plan)))


@pytest.mark.slow
def test_micro_batches_add_up_however_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "word"}\n')
    runs = [
        settings_of(
            tmp_path,
            f"stage-{stage}",
            batch_size=MICRO_BATCHES,
            micro_batch_size=1,
            deepspeed={"stage": stage, "precision": "bf16"},
        )
        for stage in (3, 2)
    ]
    run_ranks(1, runs, main)
    for settings in runs:
        assert float((tmp_path / f"{settings.run}.norm").read_text()) == pytest.approx(
            SIZE, rel=1e-2
        )


@pytest.mark.parametrize(
    ("spread", "batch_size", "warned"),
    [
        ({"stage": 0}, 8, True),
        ({"stage": 1}, 8, True),
        ({"stage": 2, "offload_optimizer": True}, 8, True),
        ({"stage": 2}, 8, False),
        ({"stage": 3, "offload_optimizer": True}, 8, False),
        ({"stage": 0}, 2, False),  # of a single micro-batch
        ({"stage": 0, "precision": "fp32"}, 8, False),
    ],
)
def test_sums_in_bf16_are_warned_of(
    spread: dict[str, Any], batch_size: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        batch_size=batch_size,
        micro_batch_size=2,
        deepspeed={"precision": "bf16", **spread},  # type: ignore[arg-type]
    )
    run = _Run.__new__(_Run)
    run.settings = settings
    plan = plans.deepspeed_config(settings, "cuda", 1)
    run._warn_of_sums(plan["gradient_accumulation_steps"])
    remedy = "4 micro-batches are added up in bf16, with 8 bits: deepspeed.stage=2 without"
    assert (remedy in caplog.text) == warned


def test_sums_in_fp32_are_where_deepspeed_has_them() -> None:
    def summed(micro_batches: int, **fields: Any) -> bool:
        fields = {"precision": "bf16", **fields}
        return plans.sums_in_fp32(plans.DeepSpeedSettings(**fields), micro_batches)

    assert summed(2, stage=2) and summed(2, stage=3)
    assert summed(2, stage=3, offload_optimizer=True, offload_parameters=True)
    assert not summed(1, stage=2)  # there is no sum
    assert not summed(2, stage=2, precision="fp32")
    assert not summed(2, stage=2, offload_optimizer=True)  # on the GPU it would take 4 bytes
    assert not summed(2, stage=0) and not summed(2, stage=1)
