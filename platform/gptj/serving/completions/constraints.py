"""Request fields that constrain an output's tokens: structured output, and bans."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from gptj.engine.constraints.compiler import CompiledGrammar, GrammarCompiler
from gptj.engine.constraints.grammar import MAX_CHARACTERS, MAX_CHOICES, Grammar, GrammarError
from gptj.environment.extras import MissingPackageError
from gptj.serving.errors import SCOPE, APIError, InvalidRequestError, OverloadedError
from gptj.serving.metrics import Recorder
from gptj.serving.requests import FailFastList, RequestModel, bounds, checked_text, examples
from gptj.serving.results import shared_result
from gptj.tokenizer import GPTJTokenizer
from gptj.workers.errors import QueueFullError

MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 4096  # of all together
MAX_ALLOWED_TOKENS = 4096
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS}


class NamedSchema(RequestModel):
    """OpenAI's `json_schema`."""

    model_config = ConfigDict(
        json_schema_extra=examples({"name": "answer", "schema": {"type": "object"}})
    )

    name: str
    description: str = ""  # ignored
    strict: bool = True  # ignored: outputs always follow the schema
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(RequestModel):
    """OpenAI's: `text`, `json_object` or `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None  # for that type

    def grammar(self) -> Grammar | None:
        """Raises GrammarError."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise GrammarError("json_schema and type=json_schema need each other")
        if self.json_schema is not None:
            return Grammar.of_json_schema(self.json_schema.schema_)
        return None if self.type == "text" else Grammar.of_json_object()


class StructuredOutputs(RequestModel):
    """vLLM's: one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None  # a JSON Schema
    json_object: bool = False
    # Of the whole output, in the syntax of Rust's regex crate.
    regex: Annotated[str | None, bounds(**_TEXT)] = None
    choice: Annotated[
        FailFastList[str] | None,
        bounds(items={"type": "string"}, minItems=1, maxItems=MAX_CHOICES),
    ] = None
    # In Lark's syntax as llguidance has it, or in GBNF.
    grammar_: Annotated[str | None, bounds(**_TEXT), Field(alias="grammar")] = None
    disable_any_whitespace: bool = False  # between JSON's tokens

    def grammar(self) -> Grammar | None:
        """Raises GrammarError."""
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar_]
        if sum(each is not None for each in given) != 1:
            raise GrammarError(
                "exactly one of json, json_object, regex, choice and grammar must be given"
            )
        if self.json_ is not None:
            return Grammar.of_json_schema(self.json_, compact=self.disable_any_whitespace)
        if self.regex is not None:
            return Grammar.of_regex(self.regex)
        if self.choice is not None:
            return Grammar.of_choices(self.choice)
        if self.grammar_ is not None:
            return Grammar.of_grammar(self.grammar_)
        return Grammar.of_json_object(compact=self.disable_any_whitespace)


class ConstraintFields(RequestModel):
    """Constraint fields of a body that generates text."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Banned words, as tokenized alone and after a space.
    bad_words: Annotated[
        FailFastList[str], bounds(items={"type": "string", "minLength": 1}, maxItems=MAX_BAD_WORDS)
    ] = Field(default_factory=list)
    # Only these tokens; eos must be among them for an output to end by itself.
    allowed_token_ids: Annotated[
        FailFastList[int] | None,
        bounds(items={"type": "integer", "minimum": 0}, minItems=1, maxItems=MAX_ALLOWED_TOKENS),
    ] = None

    @property
    def has_grammar(self) -> bool:
        """Whether an output has to follow a format."""
        form = self.response_format
        return self.structured_outputs is not None or (form is not None and form.type != "text")

    def check_constraints(self, beams: bool) -> None:
        """Raises InvalidRequestError for contradictions and exceeded limits."""
        field, grammar = self._grammar()
        if grammar is not None and beams:
            raise _invalid(field, f"beam search does not work with {field}: leave one out")
        if not all(word.strip() for word in self.bad_words):
            raise _invalid("bad_words", "bad_words must not have an empty or blank word")
        count, size = len(self.bad_words), sum(map(len, self.bad_words))
        if count > MAX_BAD_WORDS or size > MAX_BAD_WORD_CHARACTERS:
            raise _invalid(
                "bad_words",
                f"bad_words may have {MAX_BAD_WORDS} words of {MAX_BAD_WORD_CHARACTERS} characters "
                f"in total, got {count} of {size}",
            )
        allowed = self.allowed_token_ids
        if allowed is not None and not 1 <= len(allowed) <= MAX_ALLOWED_TOKENS:
            raise _invalid(
                "allowed_token_ids",
                f"allowed_token_ids may have 1 to {MAX_ALLOWED_TOKENS} tokens, got {len(allowed)}",
            )

    def bad_words_ids(self, tokenizer: GPTJTokenizer) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens at the start of a text and, if they differ, after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in self.bad_words:
            try:
                checked_text(word)
            except ValueError as error:
                raise _invalid("bad_words", f"bad_words: {word!r:.40} {error}") from error
            for text in (word, " " + word.lstrip()):
                found[tuple(tokenizer.encode(text))] = None
        return tuple(found)

    async def compiled(
        self, compiler: GrammarCompiler, recorder: Recorder
    ) -> CompiledGrammar | None:
        """The request's grammar, compiled; None if it has none.

        Raises InvalidRequestError with the reason, OverloadedError or ClosedError.
        """
        field, grammar = self._grammar()
        if grammar is None:
            return None
        loop = asyncio.get_running_loop()
        start = loop.time()
        known = compiler.knows(grammar)
        try:
            compiled = await shared_result(compiler.submit(grammar))
        except QueueFullError as error:
            # There is room for requests without a grammar: the proxy must not reject those.
            raise OverloadedError(str(error), headers={SCOPE: "grammars"}) from error
        except GrammarError as error:
            recorder.grammar("refused", loop.time() - start)
            raise _invalid(field, f"{field}: {error}") from error
        except MissingPackageError as error:
            raise _invalid(field, f"{field} is not supported by this server: {error}") from error
        recorder.grammar("cached" if known else "compiled", loop.time() - start)
        return compiled

    def _grammar(self) -> tuple[str, Grammar | None]:
        """The field with the grammar, and the grammar. Raises InvalidRequestError."""
        given: Sequence[tuple[str, ResponseFormat | StructuredOutputs | None]] = (
            ("response_format", self.response_format),
            ("structured_outputs", self.structured_outputs),
        )
        found = []
        for field, value in given:
            try:
                grammar = None if value is None else value.grammar()
            except GrammarError as error:
                raise _invalid(field, f"{field}: {error}") from error
            if grammar is not None:
                found.append((field, grammar))
        if len(found) > 1:
            raise _invalid(
                "structured_outputs",
                "response_format and structured_outputs both ask for a format: leave one out",
            )
        return found[0] if found else ("response_format", None)


def _invalid(param: str, message: str) -> APIError:
    return InvalidRequestError(message, param=param)
