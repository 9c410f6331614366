"""The source of a constraint on an output: a JSON Schema, a regex, choices or a grammar.

Nothing is compiled here; bounded sizes make validation cheap. process.py and token_mask.py bound
the cost of compiling and of computing masks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptj.engine.constraints.one_of import without_one_of

Kind = Literal["json", "regex", "grammar"]

MAX_CHARACTERS = 2**17  # of a grammar; OpenAI's limit is 120,000
MAX_DEPTH = 48  # of a schema's objects and arrays; the compiler's own limit is about 128
MAX_CHOICES = 4096
SPECIAL = r"\.+*?()|[]{}^$#&-~/"  # in a regex


class GrammarError(ValueError):
    """A grammar cannot be compiled, is too large, or takes too long; the message says why."""


@dataclass(frozen=True)
class Grammar:
    """The source of a constraint.

    Attributes:
        kind: `json`: a JSON Schema; `regex`: of the whole output, in the syntax of Rust's regex
            crate without look-around and backreferences; `grammar`: context-free, in llguidance's
            variant of Lark or llama.cpp's GBNF.
        compact: whether JSON has no whitespace between its tokens.
    """

    kind: Kind
    source: str
    compact: bool = False

    def __post_init__(self) -> None:
        if len(self.source) > MAX_CHARACTERS:
            raise GrammarError(
                f"it has {len(self.source)} characters, but at most {MAX_CHARACTERS} are allowed"
            )

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, Any] | str, *, compact: bool = False) -> Grammar:
        """JSON that is valid under a schema, given as an object or as JSON text."""
        if isinstance(schema, str):
            if len(schema) > MAX_CHARACTERS:
                return cls("json", schema)  # raises
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"it is not valid JSON: {error}") from error
        if not isinstance(schema, Mapping):
            raise GrammarError(f"a JSON Schema is an object, got {type(schema).__name__}")
        _check_depth(schema)
        if "x-guidance" in schema:
            raise GrammarError("x-guidance, options of the grammar's compiler, is not supported")
        schema = without_one_of(schema)
        source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        return cls("json", source, compact)

    @classmethod
    def of_json_object(cls, *, compact: bool = False) -> Grammar:
        """Any JSON object."""
        return cls.of_json_schema({"type": "object"}, compact=compact)

    @classmethod
    def of_regex(cls, pattern: str) -> Grammar:
        """Text that fully matches a pattern."""
        if not pattern:
            raise GrammarError("it is empty: give a pattern")
        return cls("regex", pattern)

    @classmethod
    def of_choices(cls, texts: Sequence[str]) -> Grammar:
        """One of the texts."""
        if not texts or not all(texts):
            raise GrammarError("it must have at least one choice, and no empty ones")
        if len(texts) > MAX_CHOICES:
            raise GrammarError(f"it may have {MAX_CHOICES} choices, got {len(texts)}")
        if (size := sum(map(len, texts))) > MAX_CHARACTERS:  # before escaping, which is slow
            raise GrammarError(
                f"its choices have {size} characters, but at most {MAX_CHARACTERS} are allowed"
            )
        return cls("regex", "|".join("".join(map(_escaped, text)) for text in texts))

    @classmethod
    def of_grammar(cls, text: str) -> Grammar:
        """Text of a context-free grammar."""
        if not text.strip():
            raise GrammarError(
                "it is empty: give a grammar whose first rule is `start` (or `root`)"
            )
        return cls("grammar", text)

    @property
    def key(self) -> bytes:
        """A digest of its content."""
        content = f"{self.kind}:{self.compact}:{self.source}"
        return hashlib.sha256(content.encode(errors="surrogatepass")).digest()


def _check_depth(schema: Mapping[str, Any]) -> None:
    """Reject deep nesting; iterative, since clients decide the depth."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            each
            for value in level
            for each in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(each, Mapping | list)
        ]
        if not level:
            return
    raise GrammarError(f"it is nested more than {MAX_DEPTH} levels deep")


def _escaped(character: str) -> str:
    if character in SPECIAL:
        return "\\" + character
    return character if character.isprintable() else f"\\x{{{ord(character):x}}}"
