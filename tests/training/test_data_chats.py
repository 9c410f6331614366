"""Rows with messages: rendered by a chat template, with loss on the assistant's turns only."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from task_data import make_data, packed

from gptj import GPTJTokenizer
from gptj.chat import ChatTemplateError, read_template
from gptj.data.causal_lm import CausalLMData
from gptj.data.documents import read_documents
from gptj.data.preparing import Plan, prepare
from gptj.data.rows import DataError, Row
from gptj.data.sources import find_columns, read_rows
from gptj.training.settings import Settings, read_settings
from gptj.training.tasks import TASKS
from gptj.training.tokenizer import load_tokenizer, prepare_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
CHATS = [
    [
        {"role": "user", "content": "who is old?"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "and new?"},
        {"role": "assistant", "content": 'the "dog", ü'},
    ],
    [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "so"}],
]


@pytest.fixture
def tokenizer() -> GPTJTokenizer:
    contents = [message["content"] for chat in CHATS for message in chat]
    tokenizer = GPTJTokenizer.train(contents, 280)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(folder: Path, name: str) -> str:
    path = folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), path)
    elif name.endswith("csv"):
        cells = ['"' + json.dumps(chat).replace('"', '""') + '"' for chat in CHATS]
        path.write_text("\n".join(["messages", *cells]) + "\n")
    else:
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return str(path)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.csv", "chats.parquet"])
def test_the_loss_covers_the_assistants_messages(
    name: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """Against transformers' ids and mask for the same template."""
    address = written(tmp_path, name)
    columns = find_columns(address, TASKS["causal-lm"].row_kinds)
    assert columns == ("messages",)
    (tmp_path / "tokenizer").mkdir()
    for file, content in tokenizer.files().items():
        (tmp_path / "tokenizer" / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    data = CausalLMData(read_rows(address, columns), tokenizer, 128, "none")
    for index, chat in enumerate(CHATS):
        expected = theirs.apply_chat_template(
            chat,
            chat_template=TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learned = data[index].learned
        assert learned is not None
        assert data[index].ids.tolist() == expected["input_ids"]
        assert learned.tolist() == [bool(flag) for flag in expected["assistant_masks"]]


def settings_of(folder: Path, *words: str) -> Settings:
    address = written(folder, "chats.jsonl")
    words = (f"storage={folder}", f"data.train={address}", "tokenizer.vocab_size=270", *words)
    return read_settings(words).resolved()


def test_a_run_takes_a_builtin_template_and_its_model_keeps_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "tokenizer.chat_template=alpaca")
    prepare_tokenizer(settings)
    tokenizer = load_tokenizer(settings)
    assert tokenizer.chat_template == read_template("alpaca")
    assert len(make_data(settings, tokenizer).train)
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        load_tokenizer(settings_of(tmp_path, f"tokenizer.chat_template={tmp_path}/broken.jinja"))


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with pytest.raises(DataError, match=r"has messages.*tokenizer\.chat_template=.*alpaca"):
        make_data(settings, prepare_tokenizer(settings))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"chats, row 7, column 'messages': must be a list of messages, got 'hello'"),
        ([], r"must be a list of messages"),
        ([{"content": "a"}], r"must have messages with a role and a content"),
        ([{"role": "user", "content": "a"}], r"row 7, column 'messages': .*assistant"),
    ],
)
def test_an_unusable_chat_is_named_or_skipped(
    messages: object, message: str, tokenizer: GPTJTokenizer
) -> None:
    rows = [Row({"messages": messages}, "chats", 7), Row({"messages": CHATS[1]}, "chats", 8)]
    with pytest.raises(DataError, match=message):
        list(read_documents(rows, tokenizer))
    bad: list[DataError] = []
    assert len(list(read_documents(rows, tokenizer, bad.append))) == 1
    assert len(bad) == 1


def test_prepared_chats_are_those_of_their_template(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    address, folder = written(tmp_path, "chats.jsonl"), str(tmp_path / "prepared")
    plan = Plan.of(address, tokenizer, names={})
    prepare(plan, folder, tokenizer)
    data = packed(tmp_path / "a", folder, tokenizer, 128, "none")
    expected = CausalLMData(read_rows(address, ["messages"]), tokenizer, 128, "none")
    assert data.tokens.tolist() == expected.tokens.tolist()
    tokenizer.chat_template = TEMPLATE + "\n"
    with pytest.raises(DataError, match="prepared with another chat template"):
        packed(tmp_path / "b", folder, tokenizer, 128)
