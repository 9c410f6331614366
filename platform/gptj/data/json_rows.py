"""A JSON file's bytes in, records out: JSON lines, an array of objects, or SQuAD's nested file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from gptj.data.records import (
    BadRecordError,
    MissingColumnsError,
    OnBadRecord,
    Record,
    decoded,
    refuse,
)
from gptj.data.rows import shown

CHUNK = 2**20  # characters of an array that are read at a time, at least

_BOM = b"\xef\xbb\xbf"


def read_json(
    file: IO[bytes], wanted: Sequence[str], on_bad: OnBadRecord = refuse
) -> Iterator[Record]:
    """The wanted columns of each record.

    Records are numbered by their lines, by their place in an array, or as SQuAD's questions come.
    Lines and arrays are read as they are asked for; SQuAD's file is one object, and read at once.

    Args:
        on_bad: takes the error of a line that is then left out, or of an array's object that lacks
            a column; other errors are raised.
    """
    start = file.peek(64)  # type: ignore[attr-defined]  # all of our files are buffered
    if start.removeprefix(_BOM).lstrip().startswith(b"["):
        return _read_array(file, wanted, on_bad)
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


def _read_lines(file: IO[bytes], wanted: Sequence[str], on_bad: OnBadRecord) -> Iterator[Record]:
    is_first = True
    for number, line in enumerate(file, 1):
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
            if is_first and cut_off and (document := _rest_as_squad(text, file)) is not None:
                yield from _squad(document, wanted)
                return
            wrong = _not_an_object(number, text, error)
            wrong.__cause__ = error
            on_bad(wrong)
            continue
        if is_first and _is_squad(value):
            if any(rest.strip() for rest in file):
                raise BadRecordError(number + 1, "SQuAD's object must be all of the file")
            yield from _squad(value, wanted)
            return
        is_first = False
        try:
            fields = _fields(value, text, number, wanted)
        except (BadRecordError, MissingColumnsError) as error:
            on_bad(error)
            continue
        yield number, fields


def _read_array(file: IO[bytes], wanted: Sequence[str], on_bad: OnBadRecord) -> Iterator[Record]:
    """The elements one after the other; memory holds the largest of them, not the array."""
    with decoded(file) as reader:
        yield from _elements(reader, wanted, on_bad)


def _elements(
    reader: io.TextIOWrapper, wanted: Sequence[str], on_bad: OnBadRecord
) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    buffer, position, at_end = reader.read(CHUNK), 0, False
    number = 0
    separator = "["

    def fill() -> None:
        nonlocal buffer, position, at_end
        more = reader.read(max(CHUNK, len(buffer) - position))
        buffer, position, at_end = buffer[position:] + more, 0, not more

    def next_character() -> str:
        """What comes after white space; "" at the end."""
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            if position < len(buffer) or at_end:
                return buffer[position : position + 1]
            fill()

    while True:
        found = next_character()
        if number and found == "]":
            break
        if found != separator:
            raise BadRecordError(
                number + 1, f"expected {separator!r} of the array, got {shown(buffer[position:])}"
            )
        position += 1
        if next_character() == "]" and not number:
            break
        number, separator = number + 1, ","
        while True:
            try:
                value, end = decoder.raw_decode(buffer, position)
                break
            except json.JSONDecodeError as error:
                # What is only cut off goes wrong where the buffer ends, or is an open string.
                is_open = error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16
                if at_end or not is_open:
                    raise _not_an_object(number, buffer[position:], error) from error
                fill()
            except RecursionError as error:
                raise BadRecordError(number, "it is nested too deeply") from error
            except ValueError as error:
                raise _not_an_object(number, buffer[position:], error) from error
        text = buffer[position:end]
        position = end
        try:
            fields = _fields(value, text, number, wanted)
        except (BadRecordError, MissingColumnsError) as error:
            on_bad(error)
            continue
        yield number, fields
    position += 1
    if next_character():
        raise BadRecordError(number + 1, f"is beyond the array: {shown(buffer[position:])}")


def _fields(value: Any, text: str, number: int, wanted: Sequence[str]) -> dict[str, Any]:
    """The wanted columns of a record, which `text` is the JSON of."""
    if not isinstance(value, dict):
        raise _not_an_object(number, text)
    if any(text.count(f'"{name}"') > 1 for name in wanted):
        _check_unique(text, number, wanted)
    fields = _wanted(value, number, wanted)
    if not text.isascii() or "\\ud" in text or "\\uD" in text:
        _check_characters(fields, number)
    return fields


def _wanted(value: dict[str, Any], number: int, wanted: Sequence[str]) -> dict[str, Any]:
    if any(name not in value for name in wanted):
        raise MissingColumnsError(number, list(value))
    return {name: value[name] for name in wanted}


def _check_unique(text: str, number: int, wanted: Sequence[str]) -> None:
    """BadRecordError if an object has a wanted key twice, of which json takes the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for name in wanted:
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
        f"must be a JSON object: one in each line, or an array of them; got {shown(text)}{why}",
    )


def _rest_as_squad(start: str, file: IO[bytes]) -> dict[str, Any] | None:
    """A file that begins with an unfinished line, as one object, if it is SQuAD's."""
    try:
        value = parse_json(start + "\n" + file.read().decode())
    except ValueError:  # the first line's own error says more
        return None
    return value if _is_squad(value) else None


def _is_squad(value: Any) -> bool:
    match value:
        case {"data": list(articles)}:
            return all(isinstance(each, dict) and "paragraphs" in each for each in articles)
    return False


def _squad(document: dict[str, Any], wanted: Sequence[str]) -> Iterator[Record]:
    """A row for each question of SQuAD's articles and paragraphs."""
    number = 0
    for article in document["data"]:
        if not isinstance(article["paragraphs"], list):
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
