"""SQuAD rows: their answers, and which tokens of a context can begin or end one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptj.data.arrays import Array
from gptj.data.json_rows import lone_surrogate, parse_json
from gptj.data.rows import Row, shown

NO_OFFSET = (-1, -1)

Offsets = tuple[int, int]


def read_answers(row: Row) -> list[tuple[str, int]]:
    """The (text, first character) of each of a row's answers.

    Raises:
        DataError: if question, context or an answer is empty or not text, or an answer is not at
            its position in the context.
    """
    for column in ("question", "context"):
        if not row.text(column).strip():
            raise row.error(column, f"the {column} is empty")
    context = row.text("context")
    value = row.value("answers")
    if isinstance(value, str):
        value = _parsed(row, value)
    match value:
        case None:
            return []
        case {"text": list(texts), "answer_start": list(starts)} if len(texts) == len(starts):
            pass
        case list(items) if all(isinstance(item, dict) for item in items):
            texts = [item.get("text") for item in items]
            starts = [item.get("answer_start") for item in items]
        case _:
            raise row.error(
                "answers",
                f'must be {{"text": [...], "answer_start": [...]}} of equal lengths, '
                f"got {shown(value)}",
            )
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise row.error(
                "answers", f"must be texts with positions, got {shown(text)} at {shown(start)}"
            )
        if start < 0 or context[start : start + len(text)] != text:
            found = context[max(start, 0) : max(start, 0) + len(text)]
            elsewhere = context.find(text)
            raise row.error(
                "answers",
                f"{text!r:.80} is not at character {start} of the context, where {found!r:.80} is"
                + (f"; it is at {elsewhere}" if elsewhere >= 0 else ""),
            )
        answers.append((text, start))
    return answers


def usable_offsets(text: str, offsets: Sequence[Offsets]) -> Array:
    """(tokens, 2): each token's span of characters without surrounding white space.

    NO_OFFSET for tokens of only white space.
    """
    found = [without_space(text, *each) or NO_OFFSET for each in offsets]
    return np.array(found, np.int32).reshape(len(found), 2)


def without_space(text: str, start: int, end: int) -> Offsets | None:
    """A token's span without surrounding white space; None if it has nothing else."""
    token = text[start:end]
    stripped = token.strip()
    if not stripped:
        return None
    start += len(token) - len(token.lstrip())
    return start, start + len(stripped)


def _parsed(row: Row, text: str) -> Any:
    """Parse answers given as text, as in CSV; None if empty."""
    if not text.strip():
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise row.error("answers", f"is not valid JSON: {error}; got {shown(text)}") from error
    if (half := lone_surrogate(value)) is not None:
        raise row.error("answers", f"has half of a surrogate pair in {shown(half)}")
    return value
