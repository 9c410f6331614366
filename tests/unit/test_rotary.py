"""Rotary embeddings alone: two well-known implementations were wrong and still wrote good text."""

from __future__ import annotations

import pytest
import torch

from gptj import GPTJConfig
from gptj.model import Rotary


def config(rotary_dim: int | None) -> GPTJConfig:
    return GPTJConfig(n_embd=48, n_head=3, rotary_dim=rotary_dim)  # heads of 16


@pytest.mark.parametrize("rotary_dim", [4, 10, 16, None])
def test_pairs_turn_as_complex_numbers_do(rotary_dim: int | None) -> None:
    """Pair (2i, 2i+1) at position p is multiplied by exp(j p / 10000^(2i/R)), in fp64."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16)
    positions = torch.tensor([[0, 1, 2, 3, 2047], [7, 7, 100, 1000, 1]])
    got = Rotary.at(positions, config(rotary_dim)).rotate(x)
    dim = 16 if rotary_dim is None else rotary_dim
    numbers = torch.view_as_complex(x[..., :dim].double().unflatten(-1, (-1, 2)))
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions.double()[..., None, None] * frequencies
    want = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    # fp32 angles near 2047 radians are exact to 1e-4.
    torch.testing.assert_close(got[..., :dim], want.float(), rtol=0, atol=5e-4)
    assert torch.equal(got[..., dim:], x[..., dim:])


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        at = [Rotary.at(torch.tensor([[p]]), config(16)) for p in (query_at, key_at)]
        return float((at[0].rotate(q) * at[1].rotate(k)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_and_not_the_angle(dtype: torch.dtype) -> None:
    """At position 2000 a bfloat16 angle would be off by up to 8 radians."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 3, 16).to(dtype)
    rotary = Rotary.at(torch.tensor([[2000]]), config(16))
    assert rotary.sin_BL1R.dtype == torch.float32
    assert torch.equal(rotary.rotate(x), rotary.rotate(x.float()).to(dtype))
