"""Hidden states of whole rows: as transformers computes them, in every precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gptj import GPTJConfig, GPTJModel
from gptj.engine.backends import IntQuantization
from gptj.engine.row_models import KernelRowModel, RowModel, TorchRowModel, best_row_model
from gptj.engine.runners.cpu.library import UnsupportedError, level

LENGTHS = (1, 5, 16, 17, 40, 64)
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
    "initializer_range": 0.1,
}


def has_kernels() -> bool:
    try:
        level()
    except UnsupportedError:
        return False
    return True


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="needs a processor with AVX2")


@pytest.fixture(scope="module")
def model() -> GPTJModel:
    torch.manual_seed(0)
    return GPTJModel(GPTJConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(model: GPTJModel, rows: list[list[int]]) -> list[Tensor]:
    theirs = transformers.GPTJModel(transformers.GPTJConfig(**SHAPE)).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return [theirs(torch.tensor([row])).last_hidden_state[0] for row in rows]


@pytest.fixture(params=["torch", pytest.param("kernels", marks=needs_kernels)])
def row_model(request: pytest.FixtureRequest, model: GPTJModel) -> Iterator[RowModel]:
    """With steps of 24 tokens: some rows share one, and some take several."""
    if request.param == "torch":
        yield TorchRowModel(model)
        return
    found = best_row_model(model, max_rows=8, max_tokens=24)
    assert isinstance(found, KernelRowModel)
    yield found
    found.close()


def test_rows_equal_transformers(
    row_model: RowModel, rows: list[list[int]], expected: list[Tensor]
) -> None:
    for order in (slice(None), slice(None, None, -1)):
        found = row_model.hidden_states(rows[order], last_only=False)
        for states, reference in zip(found, expected[order], strict=True):
            torch.testing.assert_close(states, reference, rtol=0, atol=2e-5)
        last = row_model.hidden_states(rows[order], last_only=True)
        for states, reference in zip(last, expected[order], strict=True):
            torch.testing.assert_close(states, reference[-1:], rtol=0, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "quantization", "least"),
    [
        (torch.bfloat16, "none", 0.999),
        (torch.float32, "int8", 0.999),
        (torch.float32, "int4", 0.95),
    ],
)
def test_fewer_bits_stay_close(
    model: GPTJModel,
    rows: list[list[int]],
    expected: list[Tensor],
    dtype: torch.dtype,
    quantization: IntQuantization,
    least: float,
) -> None:
    """The cosine of each token's states and the reference's."""
    own = copy.deepcopy(model).to(dtype)
    found = best_row_model(own, max_rows=8, max_tokens=256, quantization=quantization, release=True)
    assert not own.h[0].mlp.fc_in.weight.numel()  # type: ignore[union-attr]  # released
    for states, reference in zip(found.hidden_states(rows, last_only=False), expected, strict=True):
        assert states.dtype == torch.float32
        cosines = torch.nn.functional.cosine_similarity(states, reference, dim=-1)
        assert float(cosines.min()) > least
    found.close()


@needs_kernels
def test_a_rows_states_do_not_depend_on_its_neighbours(
    model: GPTJModel, rows: list[list[int]]
) -> None:
    row_model = best_row_model(model, max_rows=8, max_tokens=256)
    together = row_model.hidden_states(rows, last_only=False)
    for row, states in zip(rows, together, strict=True):
        assert torch.equal(row_model.hidden_states([row], last_only=False)[0], states)
    row_model.close()


def test_long_calls_report_progress(model: GPTJModel, rows: list[list[int]]) -> None:
    beats: list[None] = []
    row_model = best_row_model(
        model, max_rows=8, max_tokens=24, heartbeat=lambda: beats.append(None)
    )
    row_model.hidden_states([rows[-1]], last_only=True)
    assert len(beats) >= 2
    row_model.close()


def test_quantized_weights_without_kernels_are_refused(
    model: GPTJModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJ_MAX_CPU_ISA", "none")
    with pytest.raises(UnsupportedError, match="quantization=int8 is not available"):
        best_row_model(model, max_rows=8, max_tokens=24, quantization="int8")
    assert isinstance(best_row_model(model, max_rows=8, max_tokens=24), TorchRowModel)
