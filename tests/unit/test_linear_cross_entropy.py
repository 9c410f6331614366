"""The chunked loss equals F.cross_entropy of the logits, which are never materialized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.layers.linear_cross_entropy import CHUNK_NUMBERS, IGNORED_LABEL, linear_cross_entropy
from gptj.training.live_bytes import LiveBytes

VOCABULARY = 50400
CONFIG: dict[str, Any] = {"vocab_size": 500, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIG |= {"rotary_dim": 8, "n_positions": 32}


def inputs(rows: int = 40, width: int = 24, vocabulary: int = VOCABULARY) -> list[Tensor]:
    """Hidden states, weights and bias that need gradients, and labels of which some are masked."""
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    weight, bias = torch.randn(vocabulary, width) * 0.2, torch.randn(vocabulary) * 0.1
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::7] = IGNORED_LABEL
    return [*(each.requires_grad_() for each in (x, weight, bias)), labels]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def gradients(loss: Callable[..., Tensor], given: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss of a mean over the labels, and the gradients that it gives."""
    for each in given[:3]:
        each.grad = None
    found = loss(*given, **options) / int((given[3] != IGNORED_LABEL).sum())
    found.backward()
    return [found.detach(), *(each.grad for each in given[:3] if each.grad is not None)]


@pytest.mark.parametrize("chunk_rows", [16, None])
def test_loss_and_gradients_equal_those_of_the_logits(chunk_rows: int | None) -> None:
    """Of the real vocabulary, in fp32 to 1e-6, whatever the size of the chunks."""
    given = inputs()
    expected = gradients(plain, given)
    found = gradients(linear_cross_entropy, given, chunk_rows=chunk_rows)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_only_requested_gradients_are_computed() -> None:
    """A frozen head gets none, nor does an evaluation; a head without a bias works."""
    x, weight, bias, labels = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    loss = linear_cross_entropy(x, weight, bias, labels, chunk_rows=16)
    assert [each is not None for each in loss.grad_fn.gradients] == [True, False, False]
    loss.backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, bias, labels).requires_grad
        torch.testing.assert_close(
            linear_cross_entropy(x, weight, None, labels), plain(x, weight, None, labels)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_with_logits(dtype: torch.dtype) -> None:
    """The loss is fp32, and the chunks' gradients of the weight are summed in fp32."""
    wide = inputs(rows=200, vocabulary=1000)
    given = [each.detach().to(dtype).requires_grad_() for each in wide[:3]] + wide[3:]
    exact = [each.detach().float().requires_grad_() for each in given[:3]] + wide[3:]
    expected, usual = gradients(plain, exact), gradients(plain, given)
    found = gradients(linear_cross_entropy, given, chunk_rows=8)
    assert found[0].dtype == torch.float32
    for ours, theirs, right in zip(found, usual, expected, strict=True):
        ours_off, theirs_off = ((each.float() - right).norm() for each in (ours, theirs))
        assert ours_off <= 1.1 * theirs_off + 1e-6 * right.norm()


def test_a_loss_scale_beyond_fp16_reaches_the_gradients() -> None:
    """fp16 training scales the loss by 2^16 and more; the gradients themselves are small."""
    x, weight, bias, labels = inputs(rows=64, vocabulary=1000)
    given = [each.detach().half().requires_grad_() for each in (x, weight, bias)]
    (linear_cross_entropy(*given, labels) * 2.0**17 / 2.0**12).backward()
    for each in given:
        assert each.grad is not None
        assert bool(each.grad.isfinite().all())
    exact = [each.detach().requires_grad_() for each in (x, weight, bias)]
    (plain(*exact, labels) * 2.0**5).backward()  # type: ignore[call-arg]
    torch.testing.assert_close(given[0].grad.float(), exact[0].grad, rtol=2e-2, atol=0.1)


def test_a_second_backward_pass_is_refused() -> None:
    loss = linear_cross_entropy(*inputs(vocabulary=100))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        loss.backward()


def test_a_batch_without_a_label_has_no_loss_and_no_gradient() -> None:
    x, weight, bias, labels = inputs(vocabulary=100)
    loss = linear_cross_entropy(x, weight, bias, torch.full_like(labels, IGNORED_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not bool(x.grad.any())


@pytest.mark.parametrize(
    ("items", "adapter", "recompute", "tied"),
    [
        (None, False, False, False),
        (7, False, True, True),
        (7, True, False, False),
        (None, True, True, False),
    ],
)
def test_a_model_learns_the_same_without_logits(
    items: int | None, adapter: bool, recompute: bool, tied: bool
) -> None:
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(**CONFIG, tie_word_embeddings=tied))
    torch.nn.init.normal_(model.lm_head.bias)
    if adapter:
        add_lora(model, LoRAConfig(rank=2, alpha=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    if recompute:
        model.gradient_checkpointing_enable()
    model.train()
    ids = torch.randint(0, 500, (3, 20))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(3, 20) < 0.3, IGNORED_LABEL)}
    found: list[dict[str, Tensor]] = []
    for skip in (False, True):
        model.zero_grad()
        output = model(**batch, skip_logits=skip, num_items_in_batch=items)
        assert (output.logits is None) == skip
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": output.loss.detach(), **grads})
        with torch.no_grad():
            evaluated = model(**batch, skip_logits=skip, num_items_in_batch=items).loss
        torch.testing.assert_close(evaluated, output.loss.detach(), rtol=1e-6, atol=1e-6)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequences_logits_are_never_materialized(dtype: torch.dtype) -> None:
    """2048 positions of the 6B model's head: gradients and a chunk, but not 400 MB of logits."""
    rows, width = 2048, 1024
    with torch.device("meta"):
        x, weight, bias = torch.empty(rows, width), torch.empty(VOCABULARY, width), None
        labels = torch.zeros(rows, dtype=torch.long)
    chunk = CHUNK_NUMBERS * (4 + (0 if dtype == torch.float32 else dtype.itemsize))
    for trained, gradient in ((False, 0), (True, VOCABULARY * width * 4)):
        given = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)]
        with LiveBytes() as memory:
            loss = linear_cross_entropy(*given, bias, labels)  # type: ignore[call-arg]
        assert memory.peak < gradient + rows * width * 4 + 1.6 * chunk
        assert memory.peak < gradient + rows * VOCABULARY * dtype.itemsize
        del loss


def test_skipping_logits_without_labels_is_refused() -> None:
    model = GPTJForCausalLM(GPTJConfig(**CONFIG))
    with pytest.raises(ValueError, match="skip_logits"):
        model(torch.zeros(1, 2, dtype=torch.long), skip_logits=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_meta_three_chunks_show_the_memory_of_all(dtype: torch.dtype) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        x_ND = torch.zeros(40, 8, dtype=dtype, device=device, requires_grad=True)
        weight_VD = torch.zeros(30, 8, dtype=dtype, device=device, requires_grad=True)
        labels_N = torch.zeros(40, dtype=torch.long, device=device)
        with LiveBytes() as live:
            loss = linear_cross_entropy(x_ND, weight_VD, None, labels_N, chunk_rows=4)
            loss.backward()
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
