"""A chat as token ids, with a mask of the assistant's, for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptj.chat.errors import ChatTemplateError
from gptj.chat.template import ChatTemplate, Message, Span
from gptj.tokenizer import GPTJTokenizer

ASSISTANT = "assistant"


@dataclass(frozen=True)
class EncodedChat:
    ids: list[int]
    assistant: list[bool]  # for each id, whether it is the assistant's


def template_of(tokenizer: GPTJTokenizer, source: str | None = None) -> ChatTemplate | None:
    """A template with the tokenizer's special tokens; None if there is no template.

    Args:
        source: default: the tokenizer's own, `tokenizer.chat_template`.

    Raises:
        ChatTemplateError: if it is not valid Jinja.
    """
    source = tokenizer.default_chat_template if source is None else source
    if source is None:
        return None
    return ChatTemplate(source, tokenizer.special_tokens_map)


def encode_chat(
    tokenizer: GPTJTokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    variables: Mapping[str, Any] | None = None,
) -> EncodedChat:
    """A whole chat's ids, and which of them belong to the assistant's turns.

    The turns are the template's `{% generation %}` blocks. Without blocks, they are found by
    rendering the chat up to each reply and up to its end; both must be prefixes of the whole text.

    Args:
        variables: of the template.

    Raises:
        ChatTemplateError: if the template rejects the messages, none of them is the assistant's, or
            its turns cannot be located.
    """
    if not any(message.get("role") == ASSISTANT for message in messages):
        raise ChatTemplateError(
            "the chat has no message with the role assistant: there is nothing to learn from"
        )
    if template.marks_turns:
        text, spans = template.render_blocks(messages, variables=variables)
    else:
        text, spans = _render_turns(template, messages, variables)
    if not any(span.end > span.start for span in spans):
        raise ChatTemplateError("the chat template omits the assistant's messages")
    ids = tokenizer.encode(text)
    return EncodedChat(ids, _within(tokenizer, text, ids, spans))


def _render_turns(
    template: ChatTemplate, messages: Sequence[Message], variables: Mapping[str, Any] | None
) -> tuple[str, list[Span]]:
    text = template.render(messages, variables=variables)
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") != ASSISTANT:
            continue
        before = template.render(messages[:number], add_generation_prompt=True, variables=variables)
        after = template.render(messages[: number + 1], variables=variables)
        if not (text.startswith(after) and after.startswith(before)):
            raise ChatTemplateError(
                f"the text of message {number} of the chat cannot be located: without it, the "
                f"template renders earlier messages differently; remedy: put {{% generation %}} "
                f"and {{% endgeneration %}} around the assistant's text in the template"
            )
        spans.append(Span(len(before), len(after)))
    return text, spans


def _within(
    tokenizer: GPTJTokenizer, text: str, ids: Sequence[int], spans: Sequence[Span]
) -> list[bool]:
    """For each token, whether it overlaps one of the spans."""
    pieces = [tokenizer.token_bytes(token) for token in ids]
    if b"".join(pieces) != text.encode():
        raise ChatTemplateError(
            "the tokenizer changes the chat's text: the assistant's tokens cannot be located"
        )
    bounds = _in_bytes(text, spans)
    within, place = [], 0
    for piece in pieces:
        end = place + len(piece)
        within.append(any(start < end and place < stop for start, stop in bounds))
        place = end
    return within


def _in_bytes(text: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [
        (len(text[: span.start].encode()), len(text[: span.end].encode()))
        for span in spans
        if span.end > span.start
    ]
