"""A JSON file's bytes in, records out: JSON lines, an array of objects, or SQuAD's nested file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from gptj.data.records import (
    BadRecordError,
    Columns,
    MissingColumnsError,
    OnBadRecord,
    Record,
    decoded,
    refuse,
)
from gptj.data.rows import shown

CHUNK = 2**20  # fewest characters of an array that are read at a time
AT_ONCE = 2**26  # most bytes of a multi-line object that does not begin like SQuAD's files

_BOM = b"\xef\xbb\xbf"
# {"version": "v2.0", "data": [{"title": "…", "paragraphs": …
_SQUAD = re.compile(
    rb'\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[\s*'
    rb'\{\s*("title"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*)?"paragraphs"\s*:'
)


def read_json(file: IO[bytes], wanted: Columns, on_bad: OnBadRecord = refuse) -> Iterator[Record]:
    """The wanted columns of each record.

    Records are numbered by line, by position in an array, or by question in SQuAD's file. They are
    read lazily: memory holds one line, one element, or one of SQuAD's articles.

    Args:
        on_bad: receives the error of a line, or of an array's object that lacks a column, which is
            then skipped; other errors are raised.
    """
    peeked = file.peek(512)  # type: ignore[attr-defined]  # all of our files are buffered
    start = peeked.removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return _read_array(file, wanted, on_bad)
    if _SQUAD.match(start):
        return _read_squad(file, wanted)
    return _read_lines(file, wanted, on_bad)


def parse_json(text: str) -> Any:
    """Parse JSON; any failure is a ValueError with the reason.

    Includes nesting that is too deep and integers of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lone_surrogate(value: Any) -> str | None:
    """The first string in a value, at any depth, with a lone surrogate (`\\ud800`), if any."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                try:
                    text.encode()
                except UnicodeEncodeError:
                    return text
            case list(items):
                waiting += items
            case dict(fields):
                waiting += [*fields, *fields.values()]
    return None


def _read_lines(file: IO[bytes], wanted: Columns, on_bad: OnBadRecord) -> Iterator[Record]:
    lines, number, is_first = iter(file), 0, True
    while (line := next(lines, None)) is not None:
        number += 1
        content = line.removeprefix(_BOM) if number == 1 else line
        if not content.strip():
            continue
        try:
            text = _decoded(content, number).strip()
            value = parse_json(text)
        except BadRecordError as error:
            on_bad(error)
            continue
        except ValueError as error:
            cut_off = isinstance(error, json.JSONDecodeError) and error.pos >= len(text)
            wrong = _not_an_object(number, text, error)
            if is_first and cut_off:  # perhaps an object over several lines
                rest = file.read(AT_ONCE)
                if (more := file.readline()) and not _is_line(rest + more):
                    wrong = _too_large(number)
                elif (document := _as_squad(text, rest + more)) is not None:
                    yield from _squad(document, wanted)
                    return
                lines = chain(io.BytesIO(rest + more), file)
            is_first = False
            wrong.__cause__ = error
            on_bad(wrong)
            continue
        if is_first and _is_squad(value):
            if any(rest.strip() for rest in file):
                raise BadRecordError(number + 1, "SQuAD's object must be all of the file")
            yield from _squad(value, wanted)
            return
        is_first = False
        yield from _checked(value, text, number, wanted, on_bad)


def _read_array(file: IO[bytes], wanted: Columns, on_bad: OnBadRecord) -> Iterator[Record]:
    """The elements one after the other; memory holds the largest of them, not the array."""
    with decoded(file) as reader:
        yield from _elements(reader, wanted, on_bad)


def _elements(reader: io.TextIOWrapper, wanted: Columns, on_bad: OnBadRecord) -> Iterator[Record]:
    values = _Values(reader)
    for _ in values.array():
        number, (value, text) = values.record, values.next()
        values.record += 1
        yield from _checked(value, text, number, wanted, on_bad)
    if values.peek():
        raise BadRecordError(values.record, f"follows the end of the array: {shown(values.rest())}")


def _checked(
    value: Any, text: str, number: int, wanted: Columns, on_bad: OnBadRecord
) -> Iterator[Record]:
    """Yield the record, or pass its error to `on_bad`."""
    try:
        fields = _fields(value, text, number, wanted)
    except (BadRecordError, MissingColumnsError) as error:
        if isinstance(value, dict):
            error.values = wanted.of(value)
        on_bad(error)
    else:
        yield number, fields


class _Values:
    """Parses a JSON text incrementally; memory holds the largest value.

    Attributes:
        record: the next record's number, for errors.
    """

    def __init__(self, reader: io.TextIOWrapper) -> None:
        self.record = 1
        self._reader = reader
        self._decoder = json.JSONDecoder()
        self._buffer, self._position, self._at_end = reader.read(CHUNK), 0, False

    def array(self) -> Iterator[None]:
        """Stop before each element of the array that follows; BadRecordError if none does."""
        self.expect("[", "the array")
        if self.peek() != "]":
            yield
            while self.peek() != "]":
                self.expect(",", "the array")
                yield
        self._position += 1

    def peek(self) -> str:
        """The next character after white space; "" at the end."""
        while True:
            buffer = self._buffer
            while self._position < len(buffer) and buffer[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(buffer) or self._at_end:
                return buffer[self._position : self._position + 1]
            self._fill()

    def expect(self, character: str, what: str) -> None:
        """Consume the expected character. BadRecordError if another follows."""
        if self.peek() != character:
            why = f"expected {character!r} of {what}, got {shown(self.rest())}"
            raise BadRecordError(self.record, why)
        self._position += 1

    def rest(self) -> str:
        """The text that was read but not consumed."""
        return self._buffer[self._position :]

    def next(self) -> tuple[Any, str]:
        """The next value and its text. BadRecordError if it is not valid."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # An incomplete value fails at the end of the buffer, or as an open string.
                at_border = error.pos > len(self._buffer) - 16
                if self._at_end or not (error.msg.startswith("Unterminated") or at_border):
                    raise _not_an_object(self.record, self.rest(), error) from error
            except RecursionError as error:
                raise BadRecordError(self.record, "it is nested too deeply") from error
            except ValueError as error:
                raise _not_an_object(self.record, self.rest(), error) from error
            else:
                # A number may continue, even after "1." or "1e-".
                left = len(self._buffer) - end
                if left > 2 or self._at_end or not isinstance(value, int | float):
                    break
            self._fill()
        text = self._buffer[self._position : end]
        self._position = end
        return value, text

    def _fill(self) -> None:
        more = self._reader.read(max(CHUNK, len(self._buffer) - self._position))
        self._buffer, self._position, self._at_end = self.rest() + more, 0, not more


def _fields(value: Any, text: str, number: int, wanted: Columns) -> dict[str, Any]:
    """The wanted columns of a record; `text` is its JSON."""
    if not isinstance(value, dict):
        raise _not_an_object(number, text)
    if any(text.count(f'"{name}"') > 1 for name in wanted.all):
        _check_unique(text, number, wanted)
    fields = _wanted(value, number, wanted)
    if not text.isascii() or "\\ud" in text or "\\uD" in text:
        _check_characters(fields, number)
    return fields


def _wanted(value: dict[str, Any], number: int, wanted: Columns) -> dict[str, Any]:
    if any(name not in value for name in wanted.needed):
        raise MissingColumnsError(number, list(value))
    return wanted.of(value)


def _check_unique(text: str, number: int, wanted: Columns) -> None:
    """BadRecordError if an object repeats a wanted key; json would keep only the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for name in wanted.all:
            if keys.count(name) > 1:
                raise BadRecordError(number, f"has the key {name!r} twice")
        return dict(pairs)

    json.loads(text, object_pairs_hook=unique)


def _check_characters(fields: dict[str, Any], number: int) -> None:
    for name, value in fields.items():
        if (text := lone_surrogate(value)) is not None:
            raise BadRecordError(
                number,
                f"has an invalid character: half of a surrogate pair, or bytes that are not "
                f"UTF-8, in {shown(text)}",
                name,
            )


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError(number, f"is not UTF-8: {error}") from error


def _not_an_object(number: int, text: str, error: Exception | None = None) -> BadRecordError:
    why = "" if error is None else f" ({getattr(error, 'msg', error)})"
    return BadRecordError(
        number,
        f"must be a JSON object, one per line or in an array; got {shown(text)}{why}",
    )


def _too_large(number: int) -> BadRecordError:
    return BadRecordError(
        number,
        f"is an object of more than {AT_ONCE >> 20} MiB over several lines; remedy: one object "
        f"per line, or SQuAD's own format, which begins with version or data, and whose articles "
        f"begin with title or paragraphs",
    )


def _is_line(rest: bytes) -> bool:
    """Whether its first line is a whole JSON object."""
    try:
        return isinstance(parse_json(rest.partition(b"\n")[0].decode()), dict)
    except ValueError:
        return False


def _as_squad(start: str, rest: bytes) -> dict[str, Any] | None:
    """SQuAD's object from a file's unfinished first line and the rest; None if it is not one."""
    try:
        value = parse_json(start + "\n" + rest.decode())
    except ValueError:  # the first line's own error says more
        return None
    return value if _is_squad(value) else None


def _is_squad(value: Any) -> bool:
    match value:
        case {"data": list(articles)}:
            return all(isinstance(each, dict) and "paragraphs" in each for each in articles)
    return False


def _read_squad(file: IO[bytes], wanted: Columns) -> Iterator[Record]:
    """A row for each question; memory holds an article, not the file."""
    what = "SQuAD's object"
    with decoded(file) as reader:
        values = _Values(reader)
        values.expect("{", what)
        while True:
            key, _ = values.next()
            values.expect(":", what)
            if key == "data":
                for _ in values.array():
                    article, _ = values.next()
                    for number, fields in _squad({"data": [article]}, wanted, values.record):
                        yield number, fields
                        values.record = number + 1
            else:
                values.next()
            if values.peek() == "}":
                break
            values.expect(",", what)
        values.expect("}", what)
        if values.peek():
            raise BadRecordError(values.record, "SQuAD's object must be all of the file")


def _squad(document: dict[str, Any], wanted: Columns, first: int = 1) -> Iterator[Record]:
    """A row for each question of SQuAD's articles and paragraphs, numbered from `first`."""
    number = first - 1
    for article in document["data"]:
        if not isinstance(article, dict) or not isinstance(article.get("paragraphs"), list):
            raise BadRecordError(number + 1, "SQuAD's paragraphs must be a list")
        for paragraph in article["paragraphs"]:
            match paragraph:
                case {"context": str(context), "qas": list(questions)}:
                    pass
                case _:
                    raise BadRecordError(
                        number + 1,
                        f"SQuAD's paragraphs have a context and qas, got {shown(paragraph)}",
                    )
            for question in questions:
                number += 1
                if not isinstance(question, dict):
                    raise BadRecordError(number, f"must be an object, got {shown(question)}")
                values = {"title": article.get("title"), **question, "context": context}
                fields = _wanted(values, number, wanted)
                _check_characters(fields, number)
                yield number, fields
