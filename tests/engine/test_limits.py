from __future__ import annotations

import pytest
import torch
from engine_caller import submit, tiny_model

from gptj.engine.engine import Engine
from gptj.engine.limits import Limits
from gptj.engine.runners.torch_runner import TorchRunner

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "cache_tokens", "given", "expected"),
    [
        (CPU, 10**6, {}, (64, 256)),
        (CPU, 10**6, {"max_num_seqs": 400}, (400, 400)),
        (CPU, 10**6, {"max_num_batched_tokens": 32}, (32, 32)),
        (GPU, 133_000, {}, (256, 1024)),  # 6B on 80 GB
        (GPU, 600_000, {}, (256, 1024)),
        (GPU, 23_000, {}, (44, 256)),  # on 24 GB
        (GPU, 6_000, {}, (11, 256)),  # on 16 GB
        (GPU, 2_048, {}, (8, 256)),
        (GPU, 133_000, {"max_num_seqs": 400}, (400, 1600)),
        (GPU, 133_000, {"max_num_seqs": 3000}, (3000, 3000)),
        (GPU, 133_000, {"max_num_batched_tokens": 2048}, (256, 2048)),
        (GPU, 133_000, {"max_num_batched_tokens": 128}, (128, 128)),
        (GPU, 133_000, {"max_num_seqs": 8, "max_num_batched_tokens": 64}, (8, 64)),
    ],
)
def test_defaults_depend_on_the_device(
    device: torch.device, cache_tokens: int, given: dict[str, int], expected: tuple[int, int]
) -> None:
    limits = Limits.of(device, cache_tokens, 2048, **given)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == expected


def test_short_contexts_need_less_of_the_cache() -> None:
    assert Limits.of(GPU, 133_000, 128).max_num_seqs == 256
    assert Limits.of(GPU, 6_400, 128).max_num_seqs == 50


def test_an_engine_without_limits_uses_its_runners_defaults() -> None:
    model = tiny_model()
    engine = Engine(TorchRunner(model, 64), eos_ids=[])
    assert engine._scheduler.max_num_seqs == 64
    assert engine._scheduler._max_num_batched_tokens == 256
    assert len(submit(engine, [4, 5]).ids) == 12
    engine.close()
