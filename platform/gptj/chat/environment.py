"""The Jinja environment of chat templates: sandboxed, with Hugging Face's helpers.

As in transformers' `apply_chat_template`: blocks are trimmed, `{% break %}` and `{% continue %}`
work, and templates can use `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML,
and `{% generation %}` around the assistant's text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Variables around each `{% generation %}` block, which print nothing unless set.
BLOCK_START, BLOCK_END = "_generation_start", "_generation_end"


def new_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, LoopControlExtension],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        # Jinja's own expose attributes of classes and instances.
        "dict": _PlainDict(),
        "namespace": _PlainNamespace,
    }
    return environment


class GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`: marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")]) for name in (BLOCK_START, BLOCK_END)]
        scope = nodes.Scope(body)
        return [node.set_lineno(line) for node in (marks[0], scope, marks[1])]


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _PlainDict:
    """Only `dict(…)` and `dict.fromkeys(…)`, not the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Sequence[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """`namespace(…)` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}: leave out the underscore")
