"""Streamed text: it adds up to the decoded ids, and nothing sent is ever retracted."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj import GPTJTokenizer
from gptj.serving.completions.detokenizer import TextStream, unfinished

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


@pytest.mark.slow
@given(IDS)
@settings(max_examples=300)
def test_the_parts_of_any_ids_add_up_to_the_decoded_text(ids: list[int]) -> None:
    parts, text = stream(ids)
    assert "".join(parts) == TOKENIZER.decode(ids)
    assert text.sent == text.decoded == len(TOKENIZER.decode(ids))


@pytest.mark.slow
@given(LETTERS, STOPS)
@settings(max_examples=500)
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


@pytest.mark.slow
@given(IDS, st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=2))
@settings(max_examples=300)
def test_stop_strings_in_any_ids_match_decoding_everything(ids: list[int], stop: list[str]) -> None:
    parts, text = stream(ids, stop)
    assert ("".join(parts), text.stopped) == reference(ids, stop)


def test_a_character_is_sent_with_its_last_byte() -> None:
    ids = GPTJTokenizer.train(["x"], vocab_size=257).encode("a😀b")
    text = TextStream(GPTJTokenizer.train(["x"], vocab_size=257))
    assert len(ids) == 6
    assert [text.push(token) for token in ids] == ["a", "", "", "", "😀", "b"]
    assert text.finish() == ""


def test_a_truncated_character_becomes_a_replacement_character_at_the_end() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    ids = tokenizer.encode("a😀")[:-1]
    text = TextStream(tokenizer)
    assert [text.push(token) for token in ids] == ["a", "", "", ""]
    assert text.finish() == "\ufffd"
    assert tokenizer.decode(ids) == "a\ufffd"


def test_a_possible_stop_string_is_held_back_until_it_cannot_match() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["END"])
    pushed = [text.push(token) for token in tokenizer.encode("xENxEND")]
    assert pushed == ["x", "", "", "ENx", "", "", ""]
    assert text.stopped
    assert text.push(tokenizer.encode("y")[0]) == ""
    assert text.finish() == ""


def test_held_back_text_is_sent_when_the_output_ends() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["END"])
    assert [text.push(token) for token in tokenizer.encode("EN")] == ["", ""]
    assert text.finish() == "EN"
    assert not text.stopped


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["ab"], min_tokens=3)
    pushed = [text.push(token) for token in tokenizer.encode("abxab")]
    assert "".join(pushed) == "abx"
    assert text.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(TOKENIZER, [""])


def with_stop(ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The text up to the end of the stop string that begins first, by decoding it all each time."""
    text, stopped = reference(ids, stop)
    if not stopped:
        return text, False
    for count in range(1, len(ids) + 1):
        content = b"".join(TOKENIZER.token_bytes(token) for token in ids[:count])
        whole = codecs.getincrementaldecoder("utf-8")("replace").decode(content)
        if any(each in whole for each in stop):
            break
    else:
        whole = TOKENIZER.decode(ids)
    ends = [len(text) + len(each) for each in stop if whole.startswith(each, len(text))]
    return whole[: min(ends)], True


@pytest.mark.slow
@given(LETTERS, STOPS)
@settings(max_examples=500)
def test_text_can_end_after_the_stop_string_instead(letters: str, stop: list[str]) -> None:
    flat = [token for letter in letters for token in TOKENIZER.encode(letter)]
    text = TextStream(TOKENIZER, stop, include_stop=True)
    parts = []
    for token in flat:
        parts.append(text.push(token))
        if text.stopped:
            break
        # Nothing of it is taken back, and so nothing held back.
        assert text.sent == text.decoded
    else:
        parts.append(text.finish())
    assert ("".join(parts), text.stopped) == with_stop(flat, stop)


@pytest.mark.slow
@given(IDS, st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=2))
@settings(max_examples=300)
def test_text_of_any_ids_can_end_after_the_stop_string(ids: list[int], stop: list[str]) -> None:
    text = TextStream(TOKENIZER, stop, include_stop=True)
    parts = []
    for token in ids:
        if not text.stopped:
            parts.append(text.push(token))
    parts.append(text.finish())
    assert ("".join(parts), text.stopped) == with_stop(ids, stop)


def test_a_stop_string_before_min_tokens_does_not_count_for_having_been_sent() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    text = TextStream(tokenizer, ["ab"], min_tokens=3, include_stop=True)
    pushed = [text.push(token) for token in tokenizer.encode("abxaby")]
    assert pushed == ["a", "b", "x", "a", "b", ""]
    assert text.stopped


def test_a_stop_tokens_text_is_shown_with_the_stop_unless_it_is_special() -> None:
    tokenizer = GPTJTokenizer.train(["x"], vocab_size=257)
    (letter,) = tokenizer.encode("y")
    for include, token, expected in (
        (False, letter, "x"),
        (True, letter, "xy"),
        (True, tokenizer.eos_token_id, "x"),
    ):
        text = TextStream(tokenizer, include_stop=include)
        assert text.push(tokenizer.encode("x")[0]) + text.finish(token) == expected


@pytest.mark.slow
@given(IDS, st.integers(0, 30), st.booleans())
@settings(max_examples=500)
def test_a_character_started_by_the_prompt_belongs_to_the_output(
    ids: list[int], cut: int, echoed: bool
) -> None:
    prompt, output = ids[:cut], ids[cut:]
    begun = unfinished(b"".join(TOKENIZER.token_bytes(token) for token in prompt[-3:]))
    shown = TOKENIZER.decode(prompt)
    shown = shown[:-1] if begun else shown
    text = TextStream(TOKENIZER, begun=begun, echoed=echoed)
    parts = [text.push(token) for token in output]
    got = "".join([*parts, text.finish()])
    assert text.sent == text.decoded == len(got)
    whole = TOKENIZER.decode(ids)
    if echoed:
        assert shown + got == whole
    elif begun and whole[len(shown) :].startswith("\ufffd"):
        assert shown + "\ufffd" + got == whole  # the rest of a character that there is not
    else:
        assert shown + got == whole


def test_unfinished_bytes_are_those_of_a_truncated_character() -> None:
    for character in "é東😀":
        content = character.encode()
        for before in (b"", b"a", "東".encode(), b"\xff", b"\x9d"):
            assert unfinished(before + content) == b""
            for length in range(1, len(content)):
                assert unfinished(before + content[:length]) == content[:length]
    for surrogate in (b"\xed\xa0", b"\xed\xa2", b"\xed\xbf"):
        assert unfinished(b"a" + surrogate) == b""
