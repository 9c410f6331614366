"""The Jinja environment of chat templates: sandboxed, with Hugging Face's helpers.

As in transformers' `apply_chat_template`: blocks are trimmed, `{% break %}` and `{% continue %}`
work, and templates can use `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML,
and `{% generation %}` around the assistant's text. Within limits (limits.py), and without `lipsum`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS, make_attrgetter, make_multi_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_eval_context
from markupsafe import Markup

from gptj.chat.limits import MAX_SLOW_CHARACTERS, PER_ITEM, budget

# Variables around each `{% generation %}` block, which print nothing unless set.
BLOCK_START, BLOCK_END = "_generation_start", "_generation_end"


def new_environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, LoopControlExtension],
        optimized=False,  # do not compute constants while compiling
    )
    filters = {**FILTERS, "tojson": _to_json, "join": _join}
    environment.filters = {name: _limited(name, each) for name, each in filters.items()}
    environment.tests = {
        name: each if name in _QUICK_TESTS else _checked(each)  # type: ignore[arg-type]
        for name, each in TESTS.items()
    }
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        # Jinja's own expose attributes of classes and instances.
        "dict": _PlainDict(),
        "namespace": _PlainNamespace,
    }
    return environment


class LimitedCode(CodeGenerator):
    """Generates code that keeps a rendering's budget."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.check()")
        super().blockvisit(nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.made({")
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):  # its hash may take long
                self._check()
            self.visit(pair.key, frame)
            self.write(": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("})")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._passed("sliced", super().visit_Getitem, node, frame)
        elif isinstance(node.arg, nodes.Const):
            super().visit_Getitem(node, frame)
        else:
            self._checked(super().visit_Getitem, node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        (first, *others) = node.ops
        sides = (node.expr, first.expr)
        if others or "in" in first.op or not any(isinstance(each, nodes.Const) for each in sides):
            self._checked(super().visit_Compare, node, frame)
        else:  # with a constant, which takes no longer than that has characters
            super().visit_Compare(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:
            check = nodes.EnvironmentAttribute("check()")  # code, for each item; it returns None
            node.test = nodes.Or(check, node.test, lineno=node.test.lineno)
        super().visit_For(node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self._passed("made", visit, node, frame)

    def _passed(
        self, method: str, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame
    ) -> None:
        """An expression's value, through a method of the environment."""
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        """An expression that may take long, such as a comparison of long texts."""
        self.write("(")
        self._check()
        visit(node, frame)
        self.write(")")

    def _check(self) -> None:
        """Before the code of an expression."""
        self.write("environment.check() or ")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("environment.made(")  # the text of a list, or an escaped one, is new
        super()._output_child_pre(node, frame, finalize)

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_post(node, frame, finalize)
        self.write(")")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible  # it is not computed while compiling
        return super()._output_child_to_const(node, frame, finalize)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose operations keep to the budget of the rendering: see limits.py."""

    code_generator_class = LimitedCode
    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])  # - of a dictionary's keys too

    def check(self) -> None:
        budget().check()

    def made(self, value: Any) -> Any:
        return budget().made(value)

    def sliced(self, value: Any) -> Any:
        return budget().sliced(value)

    def joined(self, context: Context, values: Sequence[Any]) -> Any:
        """The result of the operator ~."""
        limits = budget()
        limits.bounded(sum(map(limits.size, values)))
        return limits.made((markup_join if context.eval_ctx.autoescape else str_join)(values))

    def concat(self, texts: Iterable[str]) -> str:
        """A block's output, of its parts."""
        limits, parts = budget(), list(texts)
        limits.bounded(sum(map(len, parts)))
        text: str = limits.made("".join(parts))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            budget().check_repeat(left, right)
        elif operator == "**":
            budget().check_power(left, right)
        elif operator == "%":
            budget().check_printf(left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        limits = budget()
        limits.check()
        args = limits.checked_arguments(__obj, args, kwargs)
        limits.given(args, kwargs)
        return limits.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__
        escape = text.escape if isinstance(text, Markup) else None
        formatter = (
            _LimitedFormatter(self)
            if escape is None
            else _LimitedEscapeFormatter(self, escape=escape)
        )

        @wraps(value)
        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                if kwargs or len(args) != 1:
                    raise TypeError("format_map() takes one argument")
                return type(text)(formatter.vformat(text, (), args[0]))
            return type(text)(formatter.vformat(text, args, kwargs))

        return formatted


class _FieldLimit:
    """Limits the fields of a `str.format`, whose specifications may have fields too."""

    def parse(self, format_string: str) -> Iterator[Any]:
        for each in super().parse(format_string):  # type: ignore[misc]
            budget().check()
            yield each

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        budget().check_path(field_name)
        return super().get_field(field_name, args, kwargs)  # type: ignore[misc]

    def format_field(self, value: Any, format_spec: str) -> str:
        budget().bounded(budget().size(value) + budget().widths(format_spec))
        text: str = super().format_field(value, format_spec)  # type: ignore[misc]
        budget().made(text)
        return text


class _LimitedFormatter(_FieldLimit, SandboxedFormatter): ...


class _LimitedEscapeFormatter(_FieldLimit, SandboxedEscapeFormatter): ...


# What filters' arguments are checked for; those of the others can only make linear work.
_SLOW = dict.fromkeys(
    ("pprint", "striptags", "title", "urlencode", "urlize", "wordcount", "xmlattr"),
    MAX_SLOW_CHARACTERS,
) | {"wordwrap": MAX_SLOW_CHARACTERS // 4}  # its time is quadratic
_NUMBERED = frozenset(["batch", "center", "indent", "round", "slice", "tojson", "wordwrap"])
# Whose argument `attribute` may be a path, and its place; None: only with its name.
_ATTRIBUTE = {"groupby": 0, "join": 1, "map": None, "max": 1, "min": 1, "rejectattr": 0}
_ATTRIBUTE |= {"selectattr": 0, "sort": 2, "sum": 0, "unique": 1}
# That go through items one by one, or take them all before they return.
_STEPPING = frozenset(["batch", "map", "reject", "rejectattr", "select", "selectattr", "slice"])
_GATHERING = frozenset(["groupby", "max", "min", "sort", "sum", "unique"])
# That do not read values; others' time may be linear in a value's size.
_QUICK_TESTS = frozenset(
    "boolean callable defined divisibleby escaped even false filter float integer iterable mapping "
    "none number odd sameas sequence string test true undefined".split()
)


def _checked(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test within the time."""

    @wraps(test)
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget().check()
        return test(*args, **kwargs)

    return checked


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the limits."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after a context or environment

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        limits = budget()
        given = args[first:]
        settings = [*given[1:], *kwargs.values()]
        if name in _ATTRIBUTE:
            place = _ATTRIBUTE[name]
            placed = () if place is None else given[1 + place : 2 + place]
            attribute = kwargs.get("attribute", *placed[:1] or (None,))
            limits.check_path(attribute)
            if name in _GATHERING:
                given = (_gathered(name, args[0], given, attribute, kwargs), *given[1:])
        if name in _STEPPING and given[0]:
            given = (limits.watched(given[0]), *given[1:])
        if name == "urlencode":
            given = (limits.listed(given[0]), *given[1:])
        if name in _SLOW:
            limits.check_slow(given[0], _SLOW[name])
        if name in _NUMBERED:
            for each in settings:
                limits.check_items(each)
        if name == "format":
            limits.check_printf(given[0], kwargs or given[1:])
        elif name == "replace" and len(settings) > 1:
            limits.check_replace(str(given[0]), str(settings[0]), str(settings[1]))
        elif name in ("indent", "tojson", "urlize", "wordwrap"):
            _check_added(given[0], settings)
        elif name == "trim":
            for each in settings:
                limits.check_compared(str(given[0]), each)
        result = function(*args[:first], *given, **kwargs)
        if name in ("batch", "slice"):
            return map(limits.made, result)
        if name in ("items", "reverse", "unique") and isinstance(result, Iterator):
            return limits.watched(result)
        return limits.made(result)

    return limited


def _gathered(
    name: str, environment: Any, given: Sequence[Any], attribute: Any, named: Mapping[str, Any]
) -> list[Any]:
    """The items of what a filter gathers; their attributes are within the limits too.

    Args:
        given: the filter's value, then its arguments without names; after `attribute`, these are
            groupby's `default` and sum's `start`.
    """
    limits = budget()
    placed = dict.fromkeys(("default", "start"), given[2]) if len(given) > 2 else {}
    other = placed | dict(named)
    if attribute is None:
        key = None
    elif name == "sort":  # by several
        key = make_multi_attrgetter(environment, attribute)
    else:
        default = other.get("default") if name == "groupby" else None
        key = make_attrgetter(environment, attribute, default=default)
    items, keys, size = [], [], 0
    for each in limits.watched(given[0]):
        items.append(each)
        keys.append(each if key is None else key(each))
        size = limits.bounded(size + PER_ITEM + limits.size(keys[-1]))
    if name == "unique":
        limits.check_keys(keys)
    elif name == "sum":
        if isinstance(other.get("start"), list | tuple):  # adds them to it, each time to a new one
            limits.check_slow([other["start"], keys])
    return items


def _check_added(value: Any, settings: Sequence[Any]) -> None:
    """For filters that may add a text, or some blanks, to each line or item of a value."""
    limits = budget()
    longest = max(
        (each if isinstance(each, int) else limits.size(each) for each in settings), default=0
    )
    if longest > 256:
        lines = value.count("\n") + 1 if isinstance(value, str) else limits.size(value)
        limits.bounded(limits.size(value) + lines * longest)


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, which stops at the limit."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    items, size = [], 0
    for each in budget().watched(value):
        items.append(each)
        size = budget().bounded(size + budget().size(each) + len(str(d)))
    joined: str = FILTERS["join"](context, items, d)
    return joined


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
    budget().check_path(format, "a date's format")
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    parts, size = [], 0  # one by one: each line is indented by its depth
    for part in encoder.iterencode(value):
        parts.append(part)
        size = budget().bounded(size + len(part))
    return "".join(parts)


class _PlainDict:
    """Only `dict(…)` and `dict.fromkeys(…)`, not the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return _new_dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        keys = budget().listed(keys)
        budget().check_keys(keys)
        return dict.fromkeys(keys, value)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """As `dict`, within the limits."""
    if args and not isinstance(args[0], dict):
        pairs = budget().listed(args[0])
        budget().check_keys(
            pair[0] if isinstance(pair, list | tuple | str) and pair else None for pair in pairs
        )
        args = (pairs, *args[1:])
    return dict(*args, **kwargs)


class _PlainNamespace(Namespace):
    """`namespace(…)` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may set `self`
        self, *rest = args
        attributes = budget().made(_new_dict(*rest, **kwargs))
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __repr__(self) -> str:
        return "<Namespace>"  # its values may have it among them many times over

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}: leave out the underscore")
