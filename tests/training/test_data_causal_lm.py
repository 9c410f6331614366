"""Documents become full rows of tokens, with none lost and no padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.data.causal_lm import CausalLMData
from gptj.data.sources import DataError, Row, read_rows

TEXTS = ["the cat sat on the mat", "", "a dog", "the mat the mat the mat the mat, and a cat"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 280)


def rows(*texts: str) -> list[Row]:
    return [Row({"text": text}, "texts", number) for number, text in enumerate(texts, 1)]


def stream(tokenizer: GPTJTokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]


def test_rows_are_the_documents_tokens_each_with_a_final_eos(tokenizer: GPTJTokenizer) -> None:
    data = CausalLMData(rows(*TEXTS), tokenizer, 32)
    expected = stream(tokenizer, TEXTS)
    assert [token for i in range(len(data)) for token in data[i].ids.tolist()] == expected
    assert {len(data[i].ids) for i in range(len(data) - 1)} == {32}
    with pytest.raises(IndexError):
        data[len(data)]


def test_only_the_last_row_is_padded_and_padding_is_not_a_label(tokenizer: GPTJTokenizer) -> None:
    data = CausalLMData(rows("cat " * 21), tokenizer, 16)
    tail = len(data[len(data) - 1].ids)
    assert 1 < tail < 16
    batch = data.collate([data[i] for i in range(len(data))])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert (batch["labels"] == -100).sum() == 16 - tail
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert data.count_tokens(batch) == len(data.tokens)
    assert data.count_items(batch) == len(data.tokens) - len(data)  # a row's first is not predicted


def test_eos_is_learned_although_padding_is_the_same_token(tokenizer: GPTJTokenizer) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = CausalLMData(rows("a dog", "a dog"), tokenizer, 64)
    labels = data.collate([data[0]])["labels"]
    assert (labels == tokenizer.eos_token_id).sum() == 2  # type: ignore[attr-defined]


def test_padding_does_not_change_the_loss(tokenizer: GPTJTokenizer) -> None:
    torch.manual_seed(0)
    model = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8
        )
    ).eval()
    data = CausalLMData(rows(*TEXTS), tokenizer, 50)
    examples = [data[0], data[len(data) - 1]]
    assert len(examples[0].ids) != len(examples[1].ids)
    batch = data.collate(examples)
    alone = [torch.from_numpy(example.ids).long()[None] for example in examples]
    sums = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in alone]
    found = model(**batch).loss * data.count_items(batch)
    torch.testing.assert_close(found, sum(sums), rtol=1e-5, atol=0)


def test_a_row_of_one_token_is_dropped(tokenizer: GPTJTokenizer) -> None:
    tokens = stream(tokenizer, TEXTS)
    length = len(tokens) - 1
    data = CausalLMData(rows(*TEXTS), tokenizer, length)
    assert len(data) == 1
    assert data[0].ids.tolist() == tokens[:length]
    with pytest.raises(DataError, match="texts: fewer than two tokens"):
        CausalLMData(rows(""), tokenizer, 8)


def test_lengths_are_padded_to_a_multiple_of_eight_within_the_limit(
    tokenizer: GPTJTokenizer,
) -> None:
    for count, limit, expected in [(3, 100, 8), (8, 100, 8), (9, 100, 16), (9, 12, 12)]:
        ids = [tokenizer.encode("a")[0]] * (count - 1)
        data = CausalLMData(rows(tokenizer.decode(ids)), tokenizer, limit)
        assert len(data[0].ids) == count
        assert data.collate([data[0]])["input_ids"].shape == (1, expected)


def test_unusable_training_data_is_refused(tokenizer: GPTJTokenizer) -> None:
    with pytest.raises(ValueError, match="sequence_length must be 2 or more, got 1"):
        CausalLMData(rows("text"), tokenizer, 1)
    with pytest.raises(DataError, match="row 2, column 'text': must be text, got None"):
        CausalLMData([*rows("a"), Row({"text": None}, "f", 2)], tokenizer, 8)


@pytest.mark.slow
def test_a_real_book_is_packed_without_loss(tokenizer: GPTJTokenizer, shared_data: Path) -> None:
    path = shared_data / "tinyshakespeare.txt"
    data = CausalLMData(read_rows(str(path), ["text"]), tokenizer, 128)
    text = tokenizer.decode(torch.from_numpy(data.tokens).long(), skip_special_tokens=True)
    assert path.read_text().startswith(text)
    assert len(path.read_text()) - len(text) <= 10  # a last token that predicts nothing
