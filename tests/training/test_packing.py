"""Packed documents are computed as if each were alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_rows import documents_alone, loss_alone
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.data.causal_lm import CausalLMData
from gptj.data.packing import best_fit
from gptj.data.rows import Row
from gptj.layers.varlen_attention import uses_flash

WORDS = "the cat is old and the dog is new so the house is so so and quite what it was".split()
SHAPE: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "n_positions": 64,
}


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([" ".join(WORDS)], 280)


def texts(count: int, longest: int) -> Iterator[Row]:
    generator = random.Random(0)
    for number in range(count):
        words = generator.choices(WORDS, k=generator.randint(0, longest))
        yield Row({"text": " ".join(words)}, "texts", number + 1)


def pairs(count: int) -> Iterator[Row]:
    for row in texts(count, 12):
        values = {"prompt": row.values["text"], "completion": f" {row.number} so"}
        yield Row(values, "pairs", row.number)


def model_of(tokenizer: GPTJTokenizer, **fields: Any) -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=len(tokenizer), **{**SHAPE, **fields})
    return GPTJForCausalLM(config)


def batch_of(data: CausalLMData) -> dict[str, Tensor]:
    return data.collate([data[index] for index in range(len(data))])


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """By the definition: each, longest first, into the fullest row that has room."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        rooms = [capacity - sum(lengths[n] for n in row) for row in rows]
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[number]]
        if not fitting:
            rows.append([number])
        else:
            rows[min(fitting, key=lambda place: rooms[place])].append(number)
    return rows


def test_best_fit_matches_its_definition() -> None:
    generator = random.Random(1)
    for capacity in (2, 7, 64, 130):
        lengths = [generator.randint(1, capacity) for _ in range(100)]
        found, expected = best_fit(lengths, capacity), slow_best_fit(lengths, capacity)
        assert sorted(n for row in found for n in row) == list(range(100))
        assert all(sum(lengths[n] for n in row) <= capacity for row in found)
        # Rows of equal room are interchangeable, so that only their sizes must be the same.
        sizes = [sorted(sum(lengths[n] for n in row) for row in rows) for rows in (found, expected)]
        assert sizes[0] == sizes[1]
        assert best_fit(lengths, capacity) == found
    assert best_fit([], 8) == []
    for wrong in ([0], [3, 9]):
        with pytest.raises(ValueError, match=r"lengths must be in \[1, 8\], got"):
            best_fit(wrong, 8)


def test_every_document_is_in_one_row_whole_or_in_parts(tokenizer: GPTJTokenizer) -> None:
    rows = list(texts(200, 40))
    data = CausalLMData(rows, tokenizer, 32, "best_fit")
    found = []
    for index in range(len(data)):
        row = data[index]
        assert len(row.ids) == row.lengths.sum() <= 32
        found += [
            tuple(part.tolist()) for part in torch.from_numpy(row.ids).split(list(row.lengths))
        ]
    expected = []
    for row in rows:
        ids = [*tokenizer.encode(row.text("text")), tokenizer.eos_token_id]  # type: ignore[attr-defined]
        parts = [tuple(ids[start : start + 32]) for start in range(0, len(ids), 32)]
        expected += [part for part in parts if len(part) > 1]
    assert sorted(found) == sorted(expected)
    assert data.useful_share > 0.95
    assert f"{len(expected)} documents, " in data.summary()


@pytest.mark.parametrize("kind", ["texts", "completions"])
def test_logits_equal_those_of_each_document_alone(
    kind: str, tokenizer: GPTJTokenizer, device: torch.device
) -> None:
    """In fp32; only the order of summation may differ."""
    rows = texts(60, 30) if kind == "texts" else pairs(60)
    batch = batch_of(CausalLMData(rows, tokenizer, 64, "best_fit"))
    assert "cu_seqlens" in batch and (batch["attention_mask"] == 0).any()
    model = model_of(tokenizer).to(device).eval()
    here = {name: tensor.to(device) for name, tensor in batch.items()}
    packed = model(**here, use_cache=False).logits.flatten(0, 1)
    for ids, _, place in documents_alone(batch):
        alone = model(ids.to(device)).logits[0]
        torch.testing.assert_close(packed[place], alone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(
    dtype: torch.dtype, tokenizer: GPTJTokenizer, device: torch.device
) -> None:
    """On a GPU by FlashAttention, with its gradients."""
    batch = batch_of(CausalLMData(texts(60, 30), tokenizer, 64, "best_fit"))
    model = model_of(tokenizer).to(device, dtype)
    here = {name: tensor.to(device) for name, tensor in batch.items()}
    loss = model(**here, use_cache=False).loss
    expected = loss_alone(model_of(tokenizer), batch)
    torch.testing.assert_close(loss.cpu(), expected, rtol=2e-2, atol=0, check_dtype=False)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["texts", "completions"])
def test_loss_and_gradients_equal_those_of_unpacked_rows(
    kind: str, lora: bool, checkpointing: bool, tokenizer: GPTJTokenizer
) -> None:
    found = []
    for packing in ("best_fit", "none"):
        rows = texts(40, 30) if kind == "texts" else pairs(40)
        data = CausalLMData(rows, tokenizer, 64, packing)  # type: ignore[arg-type]
        model = model_of(tokenizer)
        if lora:
            add_lora(model, LoRAConfig(target_modules=("q_proj", "v_proj", "fc_in")))
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # which begins as 0
                    torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = batch_of(data)
        items = data.count_items(batch)
        loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((items, loss, gradients, batch["input_ids"].shape))
    (items, loss, gradients, shape), (items_alone, loss_of_alone, alone, padded) = found
    assert items == items_alone and shape[0] < padded[0] / 2
    assert lora == (len(gradients) < len(list(model_of(tokenizer).parameters())))
    torch.testing.assert_close(loss, loss_of_alone, rtol=0, atol=1e-5)
    assert gradients.keys() == alone.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-5, msg=name)


def test_concatenated_documents_attend_to_earlier_ones(tokenizer: GPTJTokenizer) -> None:
    batch = batch_of(CausalLMData(texts(60, 30), tokenizer, 64, "concatenate"))
    assert "cu_seqlens" not in batch
    assert batch["attention_mask"][:-1].all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation has made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_tensor_is_as_large_as_a_rows_mask(tokenizer: GPTJTokenizer) -> None:
    length = 4096
    model = model_of(tokenizer, n_embd=8, n_head=1, n_positions=length)
    ids = torch.zeros(1, length, dtype=torch.long)
    borders = torch.arange(0, length + 1, 16, dtype=torch.int32)
    with Largest() as largest:
        model(ids, labels=ids, cu_seqlens=borders, use_cache=False).loss.backward()
    assert largest.numbers <= length * len(tokenizer) < length * length / 8


def test_attention_dropout_is_applied(tokenizer: GPTJTokenizer) -> None:
    batch = batch_of(CausalLMData(texts(20, 30), tokenizer, 64, "best_fit"))
    model = model_of(tokenizer, attn_pdrop=0.5)
    with torch.no_grad():
        first, second = (model(**batch, use_cache=False).loss for _ in range(2))
        model.eval()
        expected = model(**batch, use_cache=False).loss
    assert first != second
    torch.testing.assert_close(expected, loss_alone(model, batch), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("borders", "fields", "message"),
    [
        (
            [0, 3],
            {},
            r"cu_seqlens must increase from 0 to batch \* length = 8 in steps of at most 4, got",
        ),
        ([1, 4, 8], {}, "must increase from 0"),
        ([0, 4, 4, 8], {}, "must increase from 0"),
        ([0, 6, 8], {}, "at most 4"),
        ([0, 4, 8], {"use_cache": True}, "support neither a cache nor output_attent"),
        ([0, 4, 8], {"output_attentions": True}, "support neither a cache nor output_attent"),
    ],
)
def test_invalid_document_borders_are_refused(
    borders: list[int], fields: dict[str, Any], message: str, tokenizer: GPTJTokenizer
) -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        model_of(tokenizer)(ids, cu_seqlens=torch.tensor(borders, dtype=torch.int32), **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "width", "dropout", "expected"),
    [
        ((8, 0), 256, 0.0, True),
        ((9, 0), 64, 0.0, True),
        ((7, 5), 256, 0.0, False),  # a T4
        ((8, 0), 20, 0.0, False),
        ((8, 0), 512, 0.0, False),
        ((8, 0), 256, 0.1, False),
    ],
)
def test_flash_attention_is_only_used_where_supported(
    capability: tuple[int, int],
    width: int,
    dropout: float,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    here: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    assert uses_flash(here, width, dropout) == expected
    here.dtype = torch.float32
    assert not uses_flash(here, width, dropout)


@pytest.mark.slow
def test_lines_of_a_play_fill_their_rows(shared_data: Path) -> None:
    lines = (shared_data / "tinyshakespeare.txt").read_text().splitlines()
    tokenizer = GPTJTokenizer.train(lines, 2048)
    rows = [Row({"text": line}, "lines", number) for number, line in enumerate(lines, 1) if line]
    data = CausalLMData(rows, tokenizer, 512, "best_fit")
    assert data.useful_share >= 0.98
    print(data.summary())
