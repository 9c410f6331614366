"""Adam's moments in 8 bits: against the definition of their codes, and against moments in fp32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptj.training.optimizer import (
    BLOCK,
    KINDS,
    SMALLEST,
    own_optimizer,
    restore_moments,
    stored_moments,
)
from gptj.training.sections import OptimizerSettings
from gptj.training.settings import SettingsError, read_settings
from gptj.training.shards import Restoration, counters, write_shard

EIGHT = OptimizerSettings(moments="8bit", learning_rate=1e-2)


def dynamic_values(signed: bool) -> np.ndarray:
    """The data type of Dettmers et al., 2021, section 1.3: a decimal exponent of varying length.

    With n zeros before the marking bit the exponent is -n, and the bits that are left are the means
    of equal parts of [0.1, 1].
    """
    found = [0.0, 1.0]
    for zeros in range(7):
        edges = np.linspace(0.1, 1, 2 ** (6 - zeros + (not signed)) + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0**-zeros
        found += [*means, *(-means if signed else [])]
    return np.sort(np.array(found))


def dequantized(state: dict[str, torch.Tensor], moment: int) -> np.ndarray:
    codes = state[f"state{moment}"].flatten().cpu().numpy()
    scales = np.repeat(state[f"absmax{moment}"].cpu().numpy(), BLOCK)[: len(codes)]
    found: np.ndarray = state[f"qmap{moment}"].cpu().numpy()[codes] * scales
    return found


@pytest.mark.slow
def test_moments_are_stored_in_the_papers_data_type(device: torch.device) -> None:
    """After a step from zero they are 0.1 g and 0.001 g^2, to the nearest value or one beside it.

    Of numbers below 1e-4 of the scale the CPU's kernel may be a few codes off.
    """
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(70, 100, device=device))
    optimizer = own_optimizer(EIGHT, [{"params": [weight], "weight_decay": 0.0}])
    assert optimizer is not None
    weight.grad = torch.randn_like(weight) * 10 ** torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    gradient = weight.grad.double().flatten().cpu().numpy()
    for moment, exact in ((1, 0.1 * gradient), (2, 0.001 * gradient**2)):
        values = dynamic_values(signed=moment == 1)
        np.testing.assert_allclose(
            np.sort(state[f"qmap{moment}"].cpu())[-100:], values[-100:], 1e-6
        )
        scales = np.repeat(
            [abs(exact[n : n + BLOCK]).max() for n in range(0, len(exact), BLOCK)], BLOCK
        )[: len(exact)]
        place = np.searchsorted(values, exact / scales)
        gap = values[np.minimum(place + 1, len(values) - 1)] - values[np.maximum(place - 2, 0)]
        off = abs(dequantized(state, moment) - exact) / scales
        assert (off <= gap + 3e-5).all()
        assert off.mean() < 0.01


def test_a_trajectory_stays_close_to_that_of_moments_in_fp32(device: torch.device) -> None:
    """A least-squares problem, with noise on the gradients, for a hundred steps."""
    torch.manual_seed(0)
    target = torch.randn(64, 128, device=device)
    ours, theirs = (nn.Parameter(torch.zeros_like(target)) for _ in range(2))
    eight = own_optimizer(EIGHT, [{"params": [ours], "weight_decay": 0.01}])
    assert eight is not None
    exact = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.01)
    for _ in range(100):
        noise = torch.randn_like(target)
        for weight, optimizer in ((ours, eight), (theirs, exact)):
            weight.grad = (weight.detach() - target) + noise
            optimizer.step()
    moved = theirs.detach().norm()
    assert (ours - theirs).norm() < 0.03 * moved
    loss, expected = ((weight.detach() - target).square().mean() for weight in (ours, theirs))
    assert float(loss) == pytest.approx(float(expected), rel=0.01)


def test_moments_in_fp32_are_left_to_deepspeed() -> None:
    assert own_optimizer(OptimizerSettings(), []) is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optimizer.moments=4bit"], r"optimizer\.moments: .*'fp32' or '8bit', got '4bit'"),
        (
            ["optimizer.moments=8bit", "deepspeed.offload_optimizer=true"],
            r"optimizer\.moments=8bit and deepspeed\.offload_optimizer: .* choose one of the two",
        ),
    ],
)
def test_impossible_settings_are_refused(words: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read_settings(words)


def test_checkpointed_moments_are_bit_identical_or_requantized() -> None:
    """The same layout gives the same bits; another one moments that are close."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(10_000))
    optimizer = own_optimizer(EIGHT, [{"params": [weight], "weight_decay": 0.0}])
    assert optimizer is not None
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    before = dict(optimizer.state[weight])
    stored = stored_moments(before, 0, len(weight))
    assert all(each.numel() == len(weight) for each in stored.values())
    optimizer.state[weight] = {"step": 3, **{kind: each.clone() for kind, each in stored.items()}}
    restore_moments(optimizer)
    after = optimizer.state[weight]
    assert after.keys() == before.keys()
    for kind in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
        assert torch.equal(after[kind], before[kind]), kind
    moved = {kind: each.roll(100) for kind, each in stored.items()}  # other blocks
    optimizer.state[weight] = {"step": 3, **moved}
    restore_moments(optimizer)
    for moment in (1, 2):
        exact = np.roll(dequantized(before, moment), 100)
        found = dequantized(optimizer.state[weight], moment)
        assert abs(found - exact).max() < 0.03 * abs(exact).max()


@pytest.mark.parametrize("before", [(100, 3000, 5000), (8100,), (2700, 2700, 2700), (4096, 4004)])
@pytest.mark.parametrize("after", [(8100,), (100, 3000, 5000), (2700, 2700, 2700), (1, 8099)])
def test_fp32_moments_of_small_tensors_load_in_any_layout(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """As at another stage, where parameters are joined, or among other ranks, who cut elsewhere."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(size)) for size in before]
    optimizer = own_optimizer(EIGHT, [{"params": weights, "weight_decay": 0.0}])
    assert optimizer is not None
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    exact = {n: np.concatenate([numbers(optimizer, w, n) for w in weights]) for n in (1, 2)}
    parts = [
        stored_moments(optimizer.state[weight], start, min(start + 1000, len(weight)))
        for weight in weights
        for start in range(0, len(weight), 1000)
    ]
    whole = {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS}
    others = [nn.Parameter(torch.zeros(size)) for size in after]
    fresh = own_optimizer(EIGHT, [{"params": others, "weight_decay": 0.0}])
    assert fresh is not None
    for position, other in zip(np.cumsum([0, *after]), others, strict=False):
        cut = {kind: each[position : position + len(other)] for kind, each in whole.items()}
        fresh.state[other] = {"step": 3, **cut}
    restore_moments(fresh)
    for number, expected in exact.items():
        found = np.concatenate([numbers(fresh, other, number) for other in others])
        assert abs(found - expected).max() < (1e-9 if after == before else 0.03 * expected.max())
    for other in others:
        other.grad = torch.randn_like(other)
    fresh.step()
    assert all(other.isfinite().all() for other in others)


def test_a_shard_restores_both_kinds_of_moments_bit_for_bit(tmp_path: Path) -> None:
    """At stage 0 in fp32, where DeepSpeed leaves the parameters to the optimizer as they are."""
    torch.manual_seed(0)
    written, read = (engine_of([(10, 10), (70, 100), (50, 90)]) for _ in range(2))
    for _ in range(3):
        for weight in written.param_names:
            weight.grad = torch.randn_like(weight)
        written.optimizer.step()
        written.lr_scheduler.step()
    write_shard(written, tmp_path / "shard.safetensors")
    restoration = Restoration(read, counters(written))
    assert restoration.needs(str(tmp_path / "shard.safetensors"))
    restoration.read(tmp_path / "shard.safetensors")
    restoration.finish("checkpoint")
    for weight, other in zip(written.param_names, read.param_names, strict=True):
        state, restored = written.optimizer.state[weight], read.optimizer.state[other]
        assert restored.keys() == state.keys()
        assert restored["step"] == state["step"] == 3
        for name in state.keys() - {"step"}:
            assert restored[name].dtype == state[name].dtype
            assert torch.equal(restored[name], state[name]), name
        weight.grad = other.grad = torch.randn_like(weight)
    for engine in (written, read):
        engine.optimizer.step()
    for weight, other in zip(written.param_names, read.param_names, strict=True):
        assert torch.equal(weight, other)


def engine_of(shapes: list[tuple[int, int]]) -> Any:
    """What the shards need of DeepSpeed's engine."""
    weights = {nn.Parameter(torch.randn(shape)): f"weight-{n}" for n, shape in enumerate(shapes)}
    optimizer = own_optimizer(EIGHT, [{"params": list(weights), "weight_decay": 0.0}])
    assert optimizer is not None
    return SimpleNamespace(
        optimizer=optimizer,
        basic_optimizer=optimizer,
        param_names=weights,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    )


def numbers(optimizer: torch.optim.Optimizer, weight: torch.Tensor, moment: int) -> np.ndarray:
    """A moment in fp32, however it is kept."""
    state = optimizer.state[weight]
    assert (f"absmax{moment}" in state) == (len(weight) >= SMALLEST)
    found: np.ndarray = state[f"state{moment}"].numpy()
    return dequantized(state, moment) if len(weight) >= SMALLEST else found
