"""Streamed text: together it is the decoded ids, and nothing is sent that must be taken back."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj import GPTJTokenizer
from gptj.serving.text_stream import TextStream

TEXTS = [
    "The café stands in Paris. The café is old.",
    "naïve 東京 😀 — end\n\nUser: hello END",
]
TOKENIZER = GPTJTokenizer.train(TEXTS, vocab_size=300)
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)
# Of few letters, so that stop strings begin, overlap and repeat all the time.
LETTERS = st.text("ab東", max_size=12)
STOPS = st.lists(st.text("ab東", min_size=1, max_size=4), min_size=1, max_size=3)


def stream(
    ids: list[int], stop: list[str] | None = None, min_tokens: int = 0
) -> tuple[list[str], TextStream]:
    """What comes after each token, and at the end."""
    text = TextStream(TOKENIZER, stop or [], min_tokens)
    parts = []
    for token in ids:
        parts.append(text.push(token))
        if text.stopped:
            return parts, text
    return [*parts, text.finish()], text


def reference(ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, by decoding everything each time."""
    for count in range(1, len(ids) + 1):
        content = b"".join(TOKENIZER.token_bytes(token) for token in ids[:count])
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(content)
        if places := [text.find(each) for each in stop if each in text]:
            return text[: min(places)], True
    text = TOKENIZER.decode(ids)
    places = [text.find(each) for each in stop if each in text]
    return (text[: min(places)], True) if places else (text, False)


@given(IDS)
@settings(max_examples=300, deadline=None)
def test_the_parts_of_any_ids_are_together_the_decoded_text(ids: list[int]) -> None:
    parts, text = stream(ids)
    assert "".join(parts) == TOKENIZER.decode(ids)
    assert text.sent == text.decoded == len(TOKENIZER.decode(ids))


@given(LETTERS, STOPS)
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop_string_and_no_part_of_it_leaks(
    letters: str, stop: list[str]
) -> None:
    # Byte by byte: the finest division that there is.
    ids = [TOKENIZER.encode(letter) for letter in letters]
    flat = [token for each in ids for token in each]
    parts, text = stream(flat, stop)
    expected, stopped = reference(flat, stop)
    assert ("".join(parts), text.stopped) == (expected, stopped)
    assert text.sent == len(expected)


@given(IDS, st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_stop_strings_in_any_ids_end_the_text_as_decoding_everything_does(
    ids: list[int], stop: list[str]
) -> None:
    parts, text = stream(ids, stop)
    assert ("".join(parts), text.stopped) == reference(ids, stop)


def test_a_character_comes_whole_with_its_last_byte() -> None:
    ids = GPTJTokenizer.train(["x"], vocab_size=257).encode("a😀b")
    text = TextStream(GPTJTokenizer.train(["x"], vocab_size=257))
    assert len(ids) == 6
    assert [text.push(token) for token in ids] == ["a", "", "", "", "😀", "b"]
    assert text.finish() == ""


def test_a_character_that_is_cut_off_becomes_a_replacement_character_at_the_end() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    ids = tokenizer.encode("a😀")[:-1]
    text = TextStream(tokenizer)
    assert [text.push(token) for token in ids] == ["a", "", "", ""]
    assert text.finish() == "\ufffd"
    assert tokenizer.decode(ids) == "a\ufffd"


def test_what_may_become_a_stop_string_is_held_back_and_released_when_it_does_not() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["END"])
    pushed = [text.push(token) for token in tokenizer.encode("xENxEND")]
    assert pushed == ["x", "", "", "ENx", "", "", ""]
    assert text.stopped
    assert text.push(tokenizer.encode("y")[0]) == "" and text.finish() == ""


def test_what_is_held_back_is_sent_when_the_output_ends() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["END"])
    assert [text.push(token) for token in tokenizer.encode("EN")] == ["", ""]
    assert text.finish() == "EN"
    assert not text.stopped


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["ab"], min_tokens=3)
    pushed = [text.push(token) for token in tokenizer.encode("abxab")]
    assert "".join(pushed) == "abx" and text.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(TOKENIZER, [""])
