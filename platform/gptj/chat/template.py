"""A chat template: messages in, the text of a prompt or a whole chat out.

    template = ChatTemplate("{% for message in messages %}…{% endfor %}", {"eos_token": "…"})
    template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)

Equivalent to transformers' `apply_chat_template` for the same source and special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError

from gptj.chat.environment import (
    BLOCK_END,
    BLOCK_START,
    LimitedEnvironment,
    new_environment,
)
from gptj.chat.errors import ChatTemplateError, SlowTemplateError
from gptj.chat.limits import MAX_SECONDS, LimitError, TimeLimitError, limited
from gptj.chat.sources import check_size

Message = Mapping[str, Any]  # role, content, and any other fields that a template uses

# Variable for strings that end replies, besides eos: {% set stop = ["### End"] %}.
STOP = "stop"

# Marks the end of a message to continue; trimming it drops the blank, as in transformers.
_OPEN_END = "\ue000CONTINUED\ue000 "

QUICK_SECONDS = 0.25  # of CPU time; usual chats take milliseconds
# In a row, after which the next is taken for slow: a single one may be chance, such as a garbage
# collection.
SLOW_CHATS = 2

# Errors that a template's code can raise; anything else is our bug.
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


MAX_REASON = 1000  # characters of why a template rejects the messages
# And that its source can, in Jinja or in Python, to which Jinja translates it.
_INVALID = (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError, OverflowError)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int


class ChatTemplate:
    """A template, compiled once; `render` is thread-safe.

    Args:
        source: Jinja.
        special_tokens: `bos_token`, `eos_token` and the like, for the template to use.

    Raises:
        ChatTemplateError: if the source is not valid Jinja, or too long.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        check_size(len(source.encode(errors="surrogatepass")), "the chat template")
        self.source = source
        self._wants_parts: bool | None = None  # not known yet
        self._slow_chats = 0  # the last ones, in a row
        self._special_tokens = dict(special_tokens or {})
        environment = new_environment()
        try:
            self._tree = environment.parse(source)
            code = environment.compile(self._tree)
        except _INVALID as error:
            line = getattr(error, "lineno", None)
            where = "" if line is None else f", line {line}"
            raise ChatTemplateError(
                f"the chat template is not valid Jinja: {error}{where}"
            ) from error
        self._template = Template.from_code(environment, code, dict(environment.globals))
        # Strings that end a reply, from the template's `{% set stop = […] %}` if it has one.
        self.stop = self._stop(environment)

    def _stop(self, environment: LimitedEnvironment) -> tuple[str, ...]:
        for node in self._tree.body:
            if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
                if node.target.name == STOP:
                    return _strings(environment, node.node)
        return ()

    @property
    def is_slow(self) -> bool:
        """Whether the last chats took long: see `note`."""
        return self._slow_chats >= SLOW_CHATS

    def note(self, *, is_slow: bool) -> None:
        """Of a chat that was rendered, in any thread."""
        self._slow_chats = self._slow_chats + 1 if is_slow else 0

    @cached_property
    def marks_turns(self) -> bool:
        """Whether it has `{% generation %}` blocks."""
        return any(name.name == BLOCK_START for name in self._tree.find_all(nodes.Name))

    def wants_parts(self, seconds: float = MAX_SECONDS) -> bool:
        """Whether it accepts contents only as lists of parts, not as strings.

        Determined by trying both, the first time.

        Args:
            seconds: most CPU time for each.

        Raises:
            SlowTemplateError: if it takes more; the next call tries again.
        """
        if self._wants_parts is None:
            text = "a text to find"
            parts = [{"type": "text", "text": text}]
            self._wants_parts = not self._shows(text, text, seconds) and self._shows(
                parts, text, seconds
            )
        return self._wants_parts

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        seconds: float = MAX_SECONDS,
    ) -> str:
        """The text of a chat.

        Args:
            messages: fields that are None are treated as missing.
            add_generation_prompt: end with the beginning of the assistant's reply.
            continue_final_message: end with the last message's content, so that it goes on.
            variables: of the template, besides messages and special tokens.
            seconds: most CPU time.

        Raises:
            SlowTemplateError: if it takes more time.
            ChatTemplateError: if the template rejects the messages, fails on them, or exceeds
                another limit.
        """
        if continue_final_message:
            *before, last = messages
            text = self.render(
                [*before, _with_open_end(last)], variables=variables, seconds=seconds
            )
            end = text.rfind(_OPEN_END.strip())
            if end < 0:
                raise ChatTemplateError("the chat template omits the message to be continued")
            kept = text[:end]
            return kept if text.startswith(_OPEN_END, end) else kept.rstrip()
        given = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": [_without_nulls(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited(seconds) as budget:
                parts, size = [], 0
                for part in self._template.generate(given):
                    parts.append(part)
                    size = budget.bounded(size + len(part))
            text = "".join(parts)
            text.encode()
            return text
        except TimeLimitError as error:
            raise SlowTemplateError(f"the chat template does too much: {error}") from error
        except LimitError as error:
            raise ChatTemplateError(f"the chat template does too much: {error}") from error
        except UnicodeEncodeError as error:
            raise ChatTemplateError(
                f"the chat template's text has a lone surrogate at character {error.start}, which "
                f"is not valid Unicode"
            ) from error
        except _FAILURES as error:
            # Of a template, or of a value that it failed on: either may have any length.
            reason = str(error)[:MAX_REASON] or type(error).__name__
            raise ChatTemplateError(f"the chat template rejects the messages: {reason}") from error

    def render_blocks(
        self, messages: Sequence[Message], *, variables: Mapping[str, Any] | None = None
    ) -> tuple[str, list[Span]]:
        """A whole chat's text, and the spans of its `{% generation %}` blocks. Raises as `render`.

        Renders again with marker characters around each block; the text must otherwise be the same.
        """
        text = self.render(messages, variables=variables)
        start, end = _unused_characters(text)
        marks = {BLOCK_START: start, BLOCK_END: end}
        marked = self.render(messages, variables={**(variables or {}), **marks})
        plain, spans, begun = "", [], 0
        for piece in re.split(f"([{start}{end}])", marked):
            if piece == start:
                begun = len(plain)
            elif piece == end:
                spans.append(Span(begun, len(plain)))
            else:
                plain += piece
        if plain != text:
            raise ChatTemplateError(
                "the chat template modifies the output of its {% generation %} blocks: the "
                "assistant's turns cannot be located"
            )
        return text, spans

    def _shows(self, content: Any, text: str, seconds: float) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return text in self.render(messages, seconds=seconds)
        except SlowTemplateError:
            raise
        except ChatTemplateError:
            return False


def _with_open_end(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _OPEN_END}
    *before, last = content or [{}]
    if not isinstance(last.get("text"), str):
        raise ChatTemplateError("the message to be continued does not end with a text")
    return {**message, "content": [*before, {**last, "text": last["text"] + _OPEN_END}]}


def _without_nulls(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _strings(environment: LimitedEnvironment, node: nodes.Node) -> tuple[str, ...]:
    """The strings of an expression without variables; none if it is anything else."""
    if isinstance(node, nodes.Name) or node.find(nodes.Name) is not None:
        return ()
    # Not by as_const: it leaves out the operators that the sandbox checks, such as +.
    name = nodes.Name(STOP, "store", lineno=node.lineno)
    body: list[nodes.Node] = [nodes.Assign(name, node, lineno=node.lineno)]
    expression = environment.from_string(nodes.Template(body, lineno=node.lineno))
    try:
        with limited():
            value = getattr(expression.make_module(), STOP)
    except _FAILURES:
        return ()
    if isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    return ()


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that the text does not contain."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)
