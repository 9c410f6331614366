"""A chat's messages: checked as clients send them, and converted for a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from gptj.chat import ChatTemplate
from gptj.serving.completions.generation_request import invalid
from gptj.serving.requests import ONLY_NULL, RequestModel, bounds, checked_text, given_fields

Content = str | list[dict[str, Any]]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

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
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}


class ChatMessage(RequestModel):
    role: Annotated[Role, bounds(enum=["system", "developer", "user", "assistant"])]
    # Required, except in assistants' messages with tool calls, which are refused.
    content: Annotated[Content | None, PlainValidator(as_content), WithJsonSchema(_CONTENT)] = None
    # The speaker's, for templates that show it.
    name: Annotated[str | None, PlainValidator(as_name), WithJsonSchema({"type": "string"})] = None
    # As in OpenAI's replies, and ours; ignored.
    refusal: str | None = None
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: Annotated[list[Any], bounds(maxItems=0)] = Field(default_factory=list)
    tool_call_id: Annotated[str | None, bounds(maxLength=0)] = None
    function_call: Annotated[Any, bounds(**ONLY_NULL)] = None

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


def for_template(template: ChatTemplate, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Checked messages, with contents in the form that the template expects."""
    return [
        {
            # OpenAI's newer name for the same role, which few templates know.
            "role": "system"
            if message.role == "developer" and "developer" not in template.source
            else message.role,
            "content": _content(message.content or "", template.wants_parts),
            "name": message.name,
        }
        for message in messages
    ]


def _content(content: Content, as_parts: bool) -> Content:
    if as_parts:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
