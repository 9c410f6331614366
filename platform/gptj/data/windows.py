"""A question and its context in, windows of token ids out.

A window is the question followed by as much of the context as fits; a longer context makes several
overlapping windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptj.data.arrays import Array
from gptj.data.examples import Ids
from gptj.data.questions import NO_OFFSET, Offsets, without_space
from gptj.tokenizer import GPTJTokenizer

NO_ANSWER = 0  # the token that stands for "not in this window": the question's first


@dataclass(frozen=True)
class Window:
    """A question and a part of its context."""

    input_ids: list[int]
    # (start, end) of each token in characters of the context, without surrounding white space;
    # None for tokens that cannot begin or end an answer: the question's, and white space.
    offsets: list[Offsets | None]


def windows(
    tokenizer: GPTJTokenizer, question: str, context: str, max_length: int, stride: int
) -> list[Window]:
    """A question with each part of a context that fits into `max_length` tokens.

    White space around the question is stripped.

    Args:
        stride: tokens of the context by which consecutive windows overlap.

    Raises:
        ValueError: if the question or the context is empty, or the question leaves no room for
            more than `stride` tokens of the context.
    """
    question = question.strip()
    if not question or not context.strip():
        raise ValueError(f"the {'context' if question else 'question'} is empty")
    try:
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_sequence_ids=True,
        )
    except ValueError as error:
        room = max_length - len(tokenizer.encode(question))
        if room > stride:
            raise
        raise _no_room(room, max_length, stride) from error
    return [
        Window(
            input_ids,
            [
                without_space(context, *offset) if sequence == 1 else None
                for offset, sequence in zip(offsets, sequence_ids, strict=True)
            ],
        )
        for input_ids, offsets, sequence_ids in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["sequence_ids"], strict=True
        )
    ]


def cut_windows(
    question: Ids, context: Ids, offsets: Array, max_length: int, stride: int
) -> list[tuple[Ids, Array]]:
    """Like `windows`, from ids: each window's ids and offsets (tokens, 2), or NO_OFFSET.

    Args:
        offsets: (tokens of the context, 2), by gptj.data.questions.usable_offsets.

    Raises:
        ValueError: as in windows.
    """
    room = max_length - len(question)
    if len(context) > room and room <= stride:
        raise _no_room(room, max_length, stride)
    none = np.full((len(question), 2), NO_OFFSET, np.int32)
    found = []
    for start in range(0, max(len(context) - stride, 1), max(room - stride, 1)):
        part = slice(start, start + room)
        ids = np.concatenate([question, context[part]])
        found.append((ids, np.concatenate([none, offsets[part]])))
    return found


def _no_room(room: int, max_length: int, stride: int) -> ValueError:
    return ValueError(
        f"the question has {max_length - room} tokens and leaves {max(room, 0)} of "
        f"max_length={max_length} for the context, which must be more than stride={stride}; "
        f"remedy: a shorter question, a larger max_length or a smaller stride"
    )
