"""The GPU's drawing kernel against a plain computation; without a GPU Triton interprets it."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gptj.engine.runners.cuda import sampling
from gptj.engine.runners.cuda.sampling import draw
from gptj.engine.sampler import Sampler
from gptj.sampling import SamplingParams

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Restrictions(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


CASES = {
    "free": Restrictions(),
    "top_k": Restrictions(0.7, top_k=5),
    "top_k of one": Restrictions(2.0, top_k=1),
    "top_k of more than all": Restrictions(top_k=10**6, min_p=0.2),
    "top_p": Restrictions(1.3, top_p=0.9),
    "top_p of one": Restrictions(top_p=1e-6),
    "top_p of nearly all": Restrictions(top_p=1 - 1e-6),
    "top_k and top_p": Restrictions(top_k=40, top_p=0.8),
    "top_p and min_p": Restrictions(top_p=0.95, min_p=0.05),
    "all": Restrictions(0.5, top_k=3, top_p=0.5, min_p=0.3),
}
UNIFORMS = (0.0, 0.3, 0.77, 1 - 2**-53)


def drawn(
    logits_RV: Tensor, rows: list[int], restrictions: list[Restrictions], uniforms: Tensor
) -> list[int]:
    columns = [
        torch.tensor(values, dtype=dtype, device=DEVICE)
        for values, dtype in zip(
            zip(*restrictions, strict=True),
            (torch.float32, torch.int32, torch.float32, torch.float32),
            strict=True,
        )
    ]
    numbers = torch.tensor(rows, device=DEVICE)
    return draw(logits_RV.to(DEVICE), numbers, *columns, uniforms.to(DEVICE)).tolist()  # type: ignore[call-arg]


def cumulative(logits_V: Tensor, restrictions: Restrictions) -> Tensor:
    """Probabilities (V) in fp64 of the tokens up to each, after Hugging Face's restrictions."""
    scores = logits_V.double() / restrictions.temperature
    if 0 < restrictions.top_k < len(scores):
        scores[scores < scores.topk(restrictions.top_k).values[-1]] = -torch.inf
    if restrictions.top_p < 1:
        best = scores.sort(descending=True).values
        probabilities = best.softmax(0)
        above = probabilities.cumsum(0) - probabilities
        kept = max(1, int((above < restrictions.top_p).sum()))
        scores[scores < best[kept - 1]] = -torch.inf
    if restrictions.min_p > 0:
        scores[scores < scores.max() + math.log(restrictions.min_p)] = -torch.inf
    return scores.softmax(0).cumsum(0)


def near(token: int, cumulative_V: Tensor, uniform: float) -> bool:
    """Whether the number lies in the token's share, but for rounding, which is not empty."""
    below = float(cumulative_V[token - 1]) if token else 0.0
    above = float(cumulative_V[token])
    return below < above and below - 1e-6 <= uniform < above + 1e-6


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of hundreds has several."""
    monkeypatch.setattr(sampling, "BLOCK", 256)
    monkeypatch.setattr(sampling, "DRAW_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [7, 700])
@pytest.mark.parametrize("restrictions", CASES.values(), ids=CASES)
def test_a_number_draws_the_token_in_whose_share_it_lies(
    restrictions: Restrictions, size: int
) -> None:
    """In rows of any order, of which one is nearly flat and one has tokens that must not come."""
    torch.manual_seed(0)
    logits_RV = 3 * torch.randn(6, size)
    logits_RV[2] /= 300
    logits_RV[5, ::2] = -torch.inf
    rows, uniforms = [0, 2, 5, 3], torch.tensor(UNIFORMS, dtype=torch.float64)
    tokens = drawn(logits_RV, rows, [restrictions] * 4, uniforms)
    for row, token, uniform in zip(rows, tokens, UNIFORMS, strict=True):
        assert near(token, cumulative(logits_RV[row], restrictions), uniform)
        assert logits_RV[row, token] > -torch.inf


@pytest.mark.usefixtures("small_blocks")
def test_rows_do_not_influence_each_other() -> None:
    torch.manual_seed(1)
    logits_RV = torch.randn(len(CASES), 500)
    uniforms = torch.rand(len(CASES), dtype=torch.float64)
    together = drawn(logits_RV, list(range(len(CASES))), list(CASES.values()), uniforms)
    for row, restrictions in enumerate(CASES.values()):
        alone = drawn(logits_RV, [row], [restrictions], uniforms[row : row + 1])
        assert alone == [together[row]]


@pytest.mark.usefixtures("small_blocks")
def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits_RV = torch.zeros(1, 600)
    logits_RV[0, 200:500] = 1.0
    uniforms = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    for restrictions in (Restrictions(top_k=1), Restrictions(top_p=1e-3), Restrictions(min_p=0.9)):
        tokens = drawn(logits_RV, [0] * 20, [restrictions] * 20, uniforms)
        assert tokens == [200 + int(300 * float(uniform)) for uniform in uniforms]


@pytest.mark.usefixtures("small_blocks")
def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    """Evenly spread numbers: each token's count is its share, but for one."""
    torch.manual_seed(2)
    logits_RV, restrictions, count = (
        2 * torch.randn(1, 100),
        Restrictions(0.8, top_k=20, top_p=0.9),
        60,
    )
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = drawn(logits_RV, [0] * count, [restrictions] * count, uniforms)
    shares = cumulative(logits_RV[0], restrictions).diff(prepend=torch.zeros(1)).tolist()
    for token, share in enumerate(shares):
        assert abs(tokens.count(token) - share * count) <= 1


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_end_with_a_token_of_the_vocabulary(logit: float) -> None:
    """The request fails, but the kernel must end."""
    logits_RV = torch.full((1, 300), logit)
    uniforms = torch.tensor([0.5], dtype=torch.float64)
    (token,) = drawn(logits_RV, [0], [CASES["all"]], uniforms)
    assert 0 <= token < 300


@pytest.mark.usefixtures("small_blocks")
def test_top_k_may_be_any_integer() -> None:
    """More than an int32 holds would fail all requests of the step."""
    sampler = Sampler([], DEVICE, 300, draw)
    sampler.add(0, SamplingParams(seed=1, top_k=2**70), [1], [])
    plain = Sampler([], DEVICE, 300)
    plain.add(0, SamplingParams(seed=1), [1], [])
    logits_RV = torch.randn(1, 300, device=DEVICE)
    assert sampler.sample(logits_RV.clone(), [0]).tokens == plain.sample(logits_RV, [0]).tokens
    for each in (sampler, plain):
        each.close()


@pytest.mark.usefixtures("small_blocks")
def test_the_sampler_draws_the_same_tokens_with_and_without_the_kernel() -> None:
    """Beside greedy rows, with drafts, penalties and masks; but for rounding, as often as not."""
    torch.manual_seed(4)
    params = [
        SamplingParams(seed=number, max_tokens=50, **restrictions._asdict())
        for number, restrictions in enumerate(CASES.values())
    ]
    params[3:3] = [SamplingParams(temperature=0), SamplingParams(seed=9, repetition_penalty=2.0)]
    params.append(SamplingParams(seed=10, allowed_token_ids=(3, 5, 299), logprobs=2))
    samplers = [Sampler([7], DEVICE, 300, kernel) for kernel in (draw, None)]
    for sampler in samplers:
        for key, each in enumerate(params):
            sampler.add(key, each, [1, 2], [])
    for step in range(4):
        logits_RV = 2 * torch.randn(len(params) + 2, 300, device=DEVICE)
        drafts = {4: [8, 9]} if step == 2 else {}
        if not drafts:
            logits_RV = logits_RV[2:]
        ours, theirs = (
            sampler.sample(logits_RV.clone(), list(range(len(params))), drafts)
            for sampler in samplers
        )
        assert ours.tokens == theirs.tokens
        assert ours.counts == theirs.counts
    for sampler in samplers:
        sampler.close()


def test_blocks_cover_gpt_js_vocabulary() -> None:
    torch.manual_seed(3)
    logits_RV = torch.randn(2, 50_400)
    assert logits_RV.shape[1] > sampling.BLOCK and logits_RV.shape[1] % sampling.DRAW_BLOCK
    uniforms = torch.tensor([0.999999, 0.5], dtype=torch.float64)
    tokens = drawn(logits_RV, [0, 1], [Restrictions(), Restrictions(top_p=0.95)], uniforms)
    for row, restrictions in enumerate((Restrictions(), Restrictions(top_p=0.95))):
        assert near(tokens[row], cumulative(logits_RV[row], restrictions), float(uniforms[row]))
