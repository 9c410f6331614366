"""A chat's messages: checked as clients send them, and converted for a template."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from gptj.chat import ChatTemplate, ChatTemplateError, SlowTemplateError
from gptj.chat.environment import new_environment
from gptj.chat.limits import MAX_SECONDS
from gptj.chat.template import QUICK_SECONDS
from gptj.serving.completions.generation_request import invalid
from gptj.serving.errors import InvalidRequestError
from gptj.serving.requests import (
    MAX_MESSAGES,
    ONLY_NULL,
    RequestModel,
    bounds,
    checked_text,
    examples,
    given_fields,
)
from gptj.serving.text_threads import LONG, SLOW, in_quick_thread

Content = str | list[dict[str, Any]]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

# chat_template_kwargs may not set these: they are fields of their own, not supported, or what
# templates call.
RESERVED = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"}
    | {"chat_template", "tokenize", "stop", *new_environment().globals}
)
PER_PART = 64  # characters that take as long to tokenize as a message's part to render
MAX_VARIABLES = 32
MAX_VARIABLE_CHARACTERS = 2**14  # of their JSON

NO_TOOLS = "this service does not call tools: leave them out"


def as_content(value: Any) -> Content:
    """A string, or parts with a type. Raises ValueError for anything else."""
    if isinstance(value, str):
        return checked_text(value)
    if not isinstance(value, list) or not all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    ):
        raise ValueError('must be a string or a list of {"type": "text", "text": …}')
    return [_as_part(part) if part["type"] == "text" else part for part in value]


def _as_part(value: dict[str, Any]) -> dict[str, Any]:
    part = given_fields(value, ("type", "text"))
    if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
        raise ValueError("a text part must have a text, and nothing else")
    checked_text(part["text"])
    return part


def as_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return checked_text(value)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": ONLY_NULL,
}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _PART, "minItems": 1, "maxItems": MAX_MESSAGES},
    ]
}


def _requiring_content(schema: dict[str, Any]) -> None:
    schema["required"] = [*schema["required"], "content"]
    examples({"role": "user", "content": "Where do penguins live?"})(schema)


class ChatMessage(RequestModel):
    model_config = ConfigDict(json_schema_extra=_requiring_content)

    role: Annotated[Role, bounds(enum=["system", "developer", "user", "assistant"])]
    # Required, except in assistants' messages with tool calls, which are refused.
    content: Annotated[Content | None, PlainValidator(as_content), WithJsonSchema(_CONTENT)] = None
    # The speaker's, for templates that show it.
    name: Annotated[str | None, PlainValidator(as_name), WithJsonSchema({"type": "string"})] = None
    # As in OpenAI's replies, and ours; ignored.
    refusal: str | None = None
    annotations: Annotated[list[Any], bounds(maxItems=MAX_MESSAGES)] = Field(default_factory=list)
    tool_calls: Annotated[list[Any], bounds(maxItems=0)] = Field(default_factory=list)
    tool_call_id: Annotated[str | None, bounds(maxLength=0)] = None
    function_call: Annotated[Any, bounds(**ONLY_NULL)] = None

    @property
    def size(self) -> int:
        """In characters, and at least PER_PART a part."""
        content = self.content or ""
        parts = [content] if isinstance(content, str) else [each.get("text") for each in content]
        return PER_PART * len(parts) + sum(len(each) for each in parts if isinstance(each, str))

    def check(self, place: str) -> None:
        """Raises InvalidRequestError for what this model cannot do; `place` names the message."""
        calls = self.tool_calls or self.tool_call_id or self.function_call is not None
        if calls or self.role in ("tool", "function"):
            raise invalid(place, f"{place}: {NO_TOOLS}")
        if self.content is None or self.content == []:
            raise invalid(f"{place}.content", f"{place}: the message needs content")
        for part in self.content if isinstance(self.content, list) else ():
            if part["type"] != "text":
                raise invalid(
                    f"{place}.content",
                    f"{place}: this model reads only text, not a part of type {part['type']!r:.40}",
                )


class TemplateFields(RequestModel):
    """How messages become a prompt, as in vLLM."""

    add_generation_prompt: bool | None = None  # begin a reply; default: unless one is continued
    continue_final_message: bool = False  # the last message is the assistant's, and goes on
    chat_template_kwargs: Annotated[dict[str, Any], bounds(maxProperties=MAX_VARIABLES)] = Field(
        default_factory=dict
    )  # further variables of the template

    def check_template_fields(self, messages: Sequence[ChatMessage]) -> None:
        """Raises InvalidRequestError."""
        if not messages:
            raise invalid("messages", "messages must have at least one message")
        for number, message in enumerate(messages):
            message.check(f"messages[{number}]")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise invalid(
                    "continue_final_message",
                    "continue_final_message does not work with add_generation_prompt: leave one "
                    "out",
                )
            if messages[-1].role != "assistant":
                raise invalid(
                    "continue_final_message",
                    "continue_final_message needs the last message to have the role assistant",
                )
        name = "chat_template_kwargs"
        given = self.chat_template_kwargs
        for reserved in given:
            if reserved in RESERVED or reserved.startswith("_"):
                raise invalid(name, f"{name} must not set {reserved!r:.40}")
        try:
            size = len(checked_text(json.dumps(given, ensure_ascii=False)))
        except (ValueError, RecursionError) as error:
            raise invalid(name, f"{name}: {error}") from error
        if len(given) > MAX_VARIABLES or size > MAX_VARIABLE_CHARACTERS:
            raise invalid(
                name,
                f"{name} may have {MAX_VARIABLES} fields of {MAX_VARIABLE_CHARACTERS} characters "
                f"in total, got {len(given)} of {size}",
            )

    def rendered(self, template: ChatTemplate, messages: Sequence[ChatMessage]) -> str:
        """Checked messages as a prompt; run in a thread for `rendering_size`.

        Raises InvalidRequestError if the template rejects them, and SlowTemplateError if they take
        long and the thread is not the one for such chats.
        """
        begins = self.add_generation_prompt
        quick = QUICK_SECONDS * max(1.0, _size(messages) / LONG)
        is_quick = in_quick_thread()
        seconds = min(quick, MAX_SECONDS) if is_quick else MAX_SECONDS
        start = time.thread_time()
        try:
            text = template.render(
                for_template(template, messages, seconds),
                add_generation_prompt=not self.continue_final_message if begins is None else begins,
                continue_final_message=self.continue_final_message,
                variables=self.chat_template_kwargs,
                seconds=seconds,
            )
        except ChatTemplateError as error:
            if isinstance(error, SlowTemplateError) and is_quick:
                template.note(is_slow=True)
                raise
            raise InvalidRequestError(
                str(error), param="messages", code="chat_template_error"
            ) from error
        is_slow = time.thread_time() - start > quick
        if is_quick or not is_slow:  # the thread for slow ones may render again what was noted
            template.note(is_slow=is_slow)
        return text


def rendering_size(template: ChatTemplate, messages: Sequence[ChatMessage]) -> int:
    """About how many characters a chat has as a prompt, or takes as long as: see text_threads."""
    return SLOW if template.is_slow else _size(messages)


def _size(messages: Sequence[ChatMessage]) -> int:
    return sum(message.size for message in messages)


def for_template(
    template: ChatTemplate, messages: Sequence[ChatMessage], seconds: float
) -> list[dict[str, Any]]:
    """Checked messages, with contents in the form that the template expects.

    Raises SlowTemplateError if it takes more CPU time than `seconds` to find that out.
    """
    wants_parts = template.wants_parts(seconds)
    return [
        {
            # OpenAI's newer name for the same role, which few templates know.
            "role": "system"
            if message.role == "developer" and "developer" not in template.source
            else message.role,
            "content": _content(message.content or "", wants_parts),
            "name": message.name,
        }
        for message in messages
    ]


def _content(content: Content, as_parts: bool) -> Content:
    if as_parts:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
