"""Rows with a prompt and a completion: loss on the completion and the eos after it only."""

from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
import zstandard
from task_data import make_data

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.data.causal_lm import CausalLMData
from gptj.data.sources import DataError, Row, find_columns, read_rows
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.tasks import TASKS
from gptj.training.tokenizer import prepare_tokenizer
from jobs.evaluate import measure
from jobs.evaluate import read_settings as read_evaluation

PAIRS = [("Q: who is old?\nA:", " the cat"), ("Q: and new?\nA:", ' the "dog", ü'), ("", "so")]
KINDS = TASKS["causal-lm"].row_kinds


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([text for pair in PAIRS for text in pair], 280)


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [
        Row({"prompt": prompt, "completion": completion}, "pairs", number)
        for number, (prompt, completion) in enumerate(pairs, 1)
    ]


def lines(prompt: str = "prompt", completion: str = "completion") -> bytes:
    records = [{"id": 1, prompt: a, completion: b} for a, b in PAIRS]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(separator: str) -> bytes:
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in pair] for pair in PAIRS]
    return "\n".join(
        [f"completion{separator}prompt", *(separator.join(p[::-1]) for p in quoted)]
    ).encode()


def array() -> bytes:
    return json.dumps([json.loads(line) for line in lines().splitlines()]).encode()


FILES = {
    "rows.jsonl": lines(),
    "rows.json": array(),
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "rows.jsonl.gz": gzip.compress(lines()),
    "rows.csv.zst": zstandard.compress(table(";")),
}


@pytest.mark.parametrize("name", [*FILES, "rows.parquet"])
def test_every_format_gives_the_same_tokens_and_mask(
    name: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    if name in FILES:
        (tmp_path / name).write_bytes(FILES[name])
    else:
        prompts, completions = zip(*PAIRS, strict=True)
        pyarrow.parquet.write_table(
            pyarrow.table({"prompt": prompts, "completion": completions}), tmp_path / name
        )
    address = str(tmp_path / name)
    columns = find_columns(address, KINDS)
    assert columns == ("prompt", "completion")
    data = CausalLMData(read_rows(address, columns), tokenizer, 64, "none")
    eos = tokenizer.eos_token_id
    for index, (prompt, completion) in enumerate(PAIRS):
        before, after = tokenizer.encode(prompt), tokenizer.encode(completion)
        assert data[index].ids.tolist() == [*before, *after, eos]
        learned = data[index].learned
        assert learned is not None
        assert learned.tolist() == [False] * len(before) + [True] * (len(after) + 1)


@pytest.mark.parametrize("packing", ["none", "concatenate", "best_fit"])
def test_the_loss_covers_the_completions(packing: str, tokenizer: GPTJTokenizer) -> None:
    """Against transformers' model, a row at a time; concatenated, prompts see what is before."""
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, rotary_dim=8
    )
    torch.manual_seed(0)
    model = GPTJForCausalLM(config).eval()
    reference = transformers.GPTJForCausalLM(transformers.GPTJConfig(**config.to_dict())).eval()
    reference.load_state_dict(model.state_dict())
    data = CausalLMData(rows(*PAIRS), tokenizer, 128, packing)  # type: ignore[arg-type]
    batch = data.collate([data[index] for index in range(len(data))])
    whole = [
        [*tokenizer.encode(prompt), *tokenizer.encode(completion), tokenizer.eos_token_id]
        for prompt, completion in PAIRS
    ]
    prompts = [len(tokenizer.encode(prompt)) for prompt, _ in PAIRS]
    labels = [[-100] * start + ids[start:] for ids, start in zip(whole, prompts, strict=True)]
    if packing == "concatenate":
        whole, labels = [list(chain(*whole))], [list(chain(*labels))]
    expected = torch.zeros(())
    for ids, learned in zip(whole, labels, strict=True):
        logits = reference(torch.tensor([ids])).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(
            logits, torch.tensor(learned[1:]), reduction="sum"
        )
    found = model(**batch, use_cache=False, num_items_in_batch=1).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    counted = sum(label != -100 for learned in labels for label in learned[1:])
    assert data.count_items(batch) == counted == len(data.predicted_tokens())


def test_a_long_prompt_loses_its_beginning_and_then_the_completion_its_end(
    tokenizer: GPTJTokenizer,
) -> None:
    def pair(prompt: int, completion: int) -> tuple[str, str]:
        return "cat" * prompt, "dog" * completion

    cat, dog = (len(tokenizer.encode(word * 8)) // 8 for word in ("cat", "dog"))
    ids = [*tokenizer.encode("cat" * 20), *tokenizer.encode("dog" * 2), tokenizer.eos_token_id]
    data = CausalLMData(rows(pair(20, 2)), tokenizer, 16, "best_fit")
    assert data[0].ids.tolist() == ids[-16:]
    assert data.cut == 1 and "1 documents were longer than a row and cut" in data.summary()
    data = CausalLMData(rows(pair(20, 20)), tokenizer, 16, "best_fit")
    prompt, completion = tokenizer.encode("cat" * 20), tokenizer.encode("dog" * 20)
    assert data[0].ids.tolist() == [*prompt[-8:], *completion[:8]]
    assert data[0].learned is not None and data[0].learned.tolist() == [False] * 8 + [True] * 8
    assert cat and dog


@pytest.mark.parametrize("packing", ["none", "concatenate", "best_fit"])
def test_every_row_has_a_label(packing: str, tokenizer: GPTJTokenizer) -> None:
    """A step of rows without it would end the run, wherever in the run it comes."""
    pairs = [("cat" * 90, " so"), ("", "so"), ("old" * 70, "dog" * 9)]
    data = CausalLMData(rows(*pairs), tokenizer, 8, packing)  # type: ignore[arg-type]
    assert all(data.count_items(data.collate([data[index]])) for index in range(len(data)))
    assert data.learned is not None and data.tokens.dtype == np.int32
    if packing == "concatenate":  # and nothing else is lost
        whole = CausalLMData(rows(*pairs), tokenizer, 4096, packing)
        assert whole.learned is not None and len(data.tokens) < len(whole.tokens)
        assert data.learned.sum() == whole.learned.sum()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("a", ""), "pairs, row 4, column 'completion': is empty"),
        (("a", None), "pairs, row 4, column 'completion': must be text, got None"),
        ((3, "a"), "pairs, row 4, column 'prompt': must be text, got 3"),
    ],
)
def test_a_row_without_a_completion_is_named(
    bad: tuple[str, str], message: str, tokenizer: GPTJTokenizer
) -> None:
    with pytest.raises(DataError, match=message):
        CausalLMData(rows(*PAIRS, bad), tokenizer, 32)


def settings_of(folder: Path, content: bytes, *words: str) -> Settings:
    (folder / "rows.jsonl").write_bytes(content)
    return read_settings(
        [
            f"storage={folder}",
            f"data.train={folder / 'rows.jsonl'}",
            "tokenizer.vocab_size=270",
            *words,
        ]
    )


def test_columns_with_other_names_can_be_set(tmp_path: Path) -> None:
    """A tokenizer that is trained on such rows learns from both columns."""
    settings = settings_of(
        tmp_path,
        lines("question", "answer"),
        "data.columns.prompt=question",
        "data.columns.completion=answer",
    )
    tokenizer = prepare_tokenizer(settings)
    assert len(tokenizer) > 257
    data = make_data(settings, tokenizer).train
    assert "of them are learned" in data.summary()


def test_ambiguous_kinds_of_rows_are_refused_unless_a_column_is_set(tmp_path: Path) -> None:
    records = [{**json.loads(line), "text": "the cat"} for line in lines().splitlines()]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    with pytest.raises(
        DataError,
        match=r"several kinds of rows \(text; prompt, completion\); remedy: "
        r"data\.columns\.text=text or data\.columns\.prompt=prompt",
    ):
        prepare_tokenizer(settings_of(tmp_path, content))
    settings = settings_of(tmp_path, content, "data.columns.prompt=prompt")
    assert make_data(settings, prepare_tokenizer(settings)).train.learned is not None  # type: ignore[attr-defined]
    settings = settings_of(tmp_path, content, "data.columns.text=text")
    assert make_data(settings, prepare_tokenizer(settings)).train.learned is None  # type: ignore[attr-defined]


def test_unknown_kinds_of_rows_and_inconsistent_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no column 'text'; there are 'id', 'prompt'.*data\.columns\.text=NAME; rows may "
        r"also have prompt and completion or messages",
    ):
        prepare_tokenizer(settings_of(tmp_path, b'{"id": 1, "prompt": "a"}\n'))
    with pytest.raises(SettingsError, match=r"data\.columns: text, prompt are not columns of one"):
        settings_of(tmp_path, b"", "data.columns.text=a", "data.columns.prompt=b")


def test_completions_are_evaluated_alone(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines())
    config = GPTJConfig.preset("tiny", vocab_size=len(tokenizer), n_positions=64)
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "model"), tokenizer=tokenizer)
    words = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), "device=cpu"]
    data = CausalLMData(rows(*PAIRS), tokenizer, 64)
    assert measure(read_evaluation(words))["tokens"] == len(data.predicted_tokens())
