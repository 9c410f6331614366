"""Rows in, documents out: token ids, and a mask of those that the loss may count.

A row is a `text`, which is learned in full; a `prompt` and `completion`, of which only the
completion is learned; or a chat's `messages`, of which only the assistant's are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptj.chat import READY, ChatTemplateError, encode_chat, template_of
from gptj.data.arrays import Array
from gptj.data.examples import Ids, compact, groups
from gptj.data.json_rows import parse_json
from gptj.data.rows import DataError, Row, refuse_row, shown
from gptj.tokenizer import GPTJTokenizer

DOCUMENTS_AT_ONCE = 64  # they may be long

OnBadRow = Callable[[DataError], None]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Document(NamedTuple):
    """A row's tokens, ended by eos."""

    ids: Ids
    learned: Mask | None  # (tokens): those the loss may count; None: all


class Documents(NamedTuple):
    """Concatenated documents: document i is ids[ends[i]:ends[i + 1]]."""

    ids: Ids
    ends: Array
    learned: Mask | None

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Documents:
        ids = np.concatenate([np.empty(0, np.int32), *(each.ids for each in documents)])
        ends = np.cumsum([0, *(len(each.ids) for each in documents)])
        if all(each.learned is None for each in documents):
            return cls(ids, ends, None)
        learned = [
            np.ones(len(each.ids), bool) if each.learned is None else each.learned
            for each in documents
        ]
        return cls(ids, ends, np.concatenate(learned))


def read_documents(
    rows: Iterable[Row],
    tokenizer: GPTJTokenizer,
    on_bad: OnBadRow = refuse_row,
) -> Iterator[Document]:
    """The rows' documents, in order; all rows must be of one kind.

    Args:
        on_bad: receives the error of a bad row, which is then skipped.

    Raises:
        DataError: naming a row whose text is not a string, or whose completion is empty.
        ValueError: if the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end documents with")
    for group in groups(rows, DOCUMENTS_AT_ONCE):
        kind = ROW_KINDS[tuple(group[0].values)]
        good = []
        for row in group:
            try:
                kind.check(row)
            except DataError as error:
                on_bad(error)
            else:
                good.append(row)
        if good:
            yield from kind.read(good, tokenizer, tokenizer.eos_token_id, on_bad)


def windows(documents: Iterable[Document], tokens: int) -> Iterator[Documents]:
    """Group documents into windows of at least `tokens` tokens; the last may have fewer."""
    waiting: list[Document] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += len(document.ids)
        if size >= tokens:
            yield Documents.of(waiting)
            waiting, size = [], 0
    if waiting:
        yield Documents.of(waiting)


def messages_of(row: Row) -> list[dict[str, Any]]:
    """A row's chat; JSON in CSV files. DataError if it is not valid."""
    value = row.value("messages")
    if not row.typed:
        try:
            value = parse_json(value)
        except ValueError as error:
            raise row.error("messages", f"is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise row.error("messages", f"must be a list of messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise row.error(
                "messages", f"must have messages with a role and a content, got {shown(message)}"
            )
    return value


def _texts(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, eos: int, on_bad: OnBadRow
) -> Iterator[Document]:
    for ids in _encoded([row.text("text") for row in rows], tokenizer):
        yield Document(compact([*ids, eos]), None)


def _completions(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, eos: int, on_bad: OnBadRow
) -> Iterator[Document]:
    """Tokenize prompt and completion separately, as in serving, which only gets the prompt."""
    prompts = _encoded([row.text("prompt") for row in rows], tokenizer)
    completions = _encoded([row.text("completion") for row in rows], tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = compact([*prompt, *completion, eos])
        yield Document(ids, np.arange(len(ids)) >= len(prompt))


def _chats(
    rows: Sequence[Row], tokenizer: GPTJTokenizer, eos: int, on_bad: OnBadRow
) -> Iterator[Document]:
    """Render chats by the template, which also determines how a reply ends."""
    template = template_of(tokenizer)
    if template is None:
        raise DataError(
            f"{rows[0].source} has messages, but the tokenizer has no chat template; remedy: "
            f"tokenizer.chat_template=, a Jinja file or one of {', '.join(READY)}"
        )
    for row in rows:
        try:
            chat = encode_chat(tokenizer, template, messages_of(row))
        except ChatTemplateError as error:
            on_bad(row.error("messages", str(error)))
            continue
        yield Document(compact(chat.ids), np.array(chat.assistant, dtype=bool))


def _check_text(row: Row) -> None:
    row.text("text")


def _check_completion(row: Row) -> None:
    row.text("prompt")
    if not row.text("completion"):
        raise row.error("completion", "is empty")


def _check_messages(row: Row) -> None:
    messages_of(row)


class RowKind(NamedTuple):
    check: Callable[[Row], None]  # DataError for a row that cannot be learned from
    read: Callable[[Sequence[Row], GPTJTokenizer, int, OnBadRow], Iterator[Document]]  # …, eos, …


ROW_KINDS: Mapping[tuple[str, ...], RowKind] = {  # by their columns
    ("text",): RowKind(_check_text, _texts),
    ("prompt", "completion"): RowKind(_check_completion, _completions),
    ("messages",): RowKind(_check_messages, _chats),
}


def _encoded(texts: list[str], tokenizer: GPTJTokenizer) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return ids
