"""Windows, answers in them, and the best span over them, against plain searches over everything."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptj import GPTJConfig, GPTJForQuestionAnswering, GPTJTokenizer
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.sources import DataError, Row, read_rows
from gptj.data.spans import best_spans
from gptj.data.windows import Window, windows
from gptj.data.words import Words
from gptj.serving.batched_rows import Batching
from gptj.serving.question_answering import QuestionAnsweringRequest, QuestionAnsweringService

QUESTION = "Where does she live now?"
CONTEXT = (
    "  Anna was born in São Paulo.\n\nShe   moved to New York (USA) in 1999, and 👩‍👩‍👧‍👦"
    " followed her. "
    "Today she lives in a small house by the sea, with two dogs; nobody knows its address. "
)


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([QUESTION, CONTEXT, "many other words are here"] * 2, 320)


def rows_of(path: Path) -> Iterator[Row]:
    return read_rows(str(path), ["question", "context", "answers"])


def squad(text: str | None, start: int | None = None, **values: Any) -> Row:
    """A row whose answer is the first occurrence of `text`, or what is given."""
    answers = (
        {"text": [], "answer_start": []}
        if text is None
        else {
            "text": [text],
            "answer_start": [CONTEXT.index(text) if start is None else start],
        }
    )
    fields = {"question": QUESTION, "context": CONTEXT, "answers": answers, **values}
    return Row(fields, "squad.jsonl", 7)


@pytest.mark.parametrize(("max_length", "stride"), [(1000, 0), (40, 0), (40, 10), (30, 3)])
def test_windows_cover_the_context_with_the_stated_overlap(
    max_length: int, stride: int, tokenizer: GPTJTokenizer
) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, max_length, stride)
    question, context = tokenizer.encode(QUESTION), tokenizer.encode(CONTEXT)
    joined = found[0].input_ids[len(question) :]
    for window in found[1:]:
        part = window.input_ids[len(question) :]
        assert stride == 0 or joined[-stride:] == part[:stride]
        joined += part[stride:]
    assert joined == context
    for window in found:
        assert len(window.input_ids) == len(window.offsets) <= max_length
        assert window.input_ids[: len(question)] == question
        assert window.offsets[: len(question)] == [None] * len(question)
    assert (len(found) == 1) == (len(question) + len(context) <= max_length)


def test_offsets_exclude_white_space(tokenizer: GPTJTokenizer) -> None:
    (window,) = windows(tokenizer, QUESTION, CONTEXT, 1000, 0)
    question = len(tokenizer.encode(QUESTION))
    for token, offset in list(zip(window.input_ids, window.offsets, strict=True))[question:]:
        text = tokenizer.decode(token)
        if offset is None:
            assert text.isspace()
        elif "\ufffd" in text:  # a part of a character has the place of all of it
            assert text.strip("\ufffd ") in CONTEXT[slice(*offset)]
        else:
            assert CONTEXT[slice(*offset)] == text.strip() != ""
    covered = {place for offset in window.offsets if offset for place in range(*offset)}
    assert covered == {place for place, letter in enumerate(CONTEXT) if not letter.isspace()}


def test_windows_without_room_are_refused_with_the_numbers(tokenizer: GPTJTokenizer) -> None:
    tokens = len(tokenizer.encode(QUESTION))
    with pytest.raises(
        ValueError, match=f"{tokens} tokens and leaves 5 of max_length={tokens + 5}"
    ):
        windows(tokenizer, QUESTION, CONTEXT, tokens + 5, 5)
    with pytest.raises(ValueError, match="leaves 0 of max_length=4 for the context"):
        windows(tokenizer, QUESTION, CONTEXT, 4, 0)
    with pytest.raises(ValueError, match="stride must be in"):
        windows(tokenizer, QUESTION, CONTEXT, 100, -1)
    with pytest.raises(ValueError, match="the question is empty"):
        windows(tokenizer, " ", CONTEXT, 100, 0)
    with pytest.raises(ValueError, match="the context is empty"):
        windows(tokenizer, QUESTION, "\n", 100, 0)


ANSWERS = [
    "Anna",
    "São Paulo",
    "New York (USA)",
    "USA",
    "1999",
    "👩‍👩‍👧‍👦",
    "the sea",
    "two",
    "address",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(("max_length", "stride"), [(1000, 0), (40, 10), (36, 12)])
def test_an_answers_span_is_the_shortest_that_covers_it(
    answer: str, max_length: int, stride: int, tokenizer: GPTJTokenizer
) -> None:
    data = QuestionAnsweringData([squad(answer)], tokenizer, max_length, stride)
    first = CONTEXT.index(answer)
    last = first + len(answer) - 1
    whole = 0
    for index, window in enumerate(windows(tokenizer, QUESTION, CONTEXT, max_length, stride)):
        holding = [
            [
                token
                for token, offset in enumerate(window.offsets)
                if offset and place in range(*offset)
            ]
            for place in (first, last)
        ]
        expected = (0, 0)
        if all(holding):
            expected = (holding[0][0], holding[1][-1])
            whole += 1
        assert (data[index].start, data[index].end) == expected
        assert data.window(index) == window
    assert whole > 0


def test_rows_without_an_answer_point_at_the_first_token(tokenizer: GPTJTokenizer) -> None:
    rows = [squad(None), squad(None, answers=None), squad("the sea")]
    data = QuestionAnsweringData(rows, tokenizer, 1000, 0)
    assert [(data[i].start, data[i].end) for i in range(2)] == [(0, 0), (0, 0)]
    assert data[2].start > 0
    assert [question.answers for question in data.questions] == [(), (), ("the sea",)]


def test_answers_may_come_as_json_from_a_csv(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    answers = json.dumps({"text": ["b c"], "answer_start": [2]}).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'question,context,answers\nwhy?,a b c d,"{answers}"\n')
    data = QuestionAnsweringData(rows_of(tmp_path / "a.csv"), tokenizer, 100, 0)
    window = data.window(0)
    start, end = window.offsets[data[0].start], window.offsets[data[0].end]
    assert start is not None
    assert end is not None
    assert (start[0], end[1]) == (2, 5)


def test_an_empty_cell_of_answers_is_no_answer(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    (tmp_path / "a.csv").write_text(
        "question,context,answers\nwhy?,a b,\nwhen?,c d,[]\nwho?,e,null\n"
    )
    data = QuestionAnsweringData(rows_of(tmp_path / "a.csv"), tokenizer, 100, 0)
    assert [question.answers for question in data.questions] == [(), (), ()]


def test_answers_may_be_a_list_as_in_squads_own_file(tokenizer: GPTJTokenizer) -> None:
    answers = [{"text": text, "answer_start": CONTEXT.index(text)} for text in ("the sea", "sea")]
    data = QuestionAnsweringData([squad(None, answers=answers)], tokenizer, 1000, 0)
    as_columns = QuestionAnsweringData([squad("the sea")], tokenizer, 1000, 0)
    assert data[0].start == as_columns[0].start
    assert data[0].end == as_columns[0].end
    assert data.questions[0].answers == ("the sea", "sea")


@pytest.mark.parametrize("space", [" " * 70, "\n\t \u00a0\u3000"])
def test_white_space_around_a_question_is_stripped(space: str, tokenizer: GPTJTokenizer) -> None:
    """In training and in serving, where it could take all of the question's room."""
    plain = windows(tokenizer, "where?", CONTEXT, 64, 8)
    assert windows(tokenizer, f"{space}where?{space}", CONTEXT, 64, 8) == plain
    data = QuestionAnsweringData([squad("sea", question=f"{space}where?")], tokenizer, 64, 8)
    assert [data.window(index) for index in range(len(data))] == plain
    model = GPTJForQuestionAnswering(
        GPTJConfig(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8
        )
    ).eval()
    service = QuestionAnsweringService(model, tokenizer, Batching(4, 64), window=64, stride=8)

    def answer(question: str, **parameters: Any) -> Any:
        request = QuestionAnsweringRequest.model_validate(
            {"inputs": {"question": question, "context": CONTEXT}, "parameters": parameters}
        )
        return asyncio.run(service.answer(request))

    try:
        assert answer(f"{space}where?{space}") == answer("where?")
        assert answer(f"{space}👩 where?", max_question_len=1) == answer("👩")
        assert answer(f"a{space}where?", max_question_len=2) == answer("a")
        assert answer(f"{space}where?{space}", max_question_len=3) == answer(
            "where?", max_question_len=3
        )
    finally:
        service.close()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            squad("sea", 3),
            f"'sea' is not at character 3 .*'nna'.*; it is at {CONTEXT.index('sea')}",
        ),
        (squad("lake", 3), "'lake' is not at character 3 of the context, where 'nna ' is$"),
        (squad("sea", -1), "'sea' is not at character -1"),
        (squad("", 3), "must be texts with positions, got '' at 3"),
        (squad(None, answers={"text": ["a"]}), "answers.*must be .*answer_start"),
        (squad(None, answers={"text": ["a"], "answer_start": []}), "must be .*of equal lengths"),
        (squad(None, answers="{"), "column 'answers': is not valid JSON: .* got '{'"),
        (squad(None, answers="[" * 100_000), "column 'answers': is not valid JSON: .*too deeply"),
        (
            squad(None, answers='{"text": ' + "1" * 5000 + "}"),
            "answers': is not valid JSON: .*4300",
        ),
        (squad(None, answers='[{"text": "\\ud800"}]'), "answers': has half of a surrogate pair"),
        (squad(None, answers=[{"text": "sea"}]), "must be texts with positions, got 'sea' at None"),
        (squad(None, answers=["sea"]), r"must be .*got \['sea'\]"),
        (squad(None, question=" \n"), "column 'question': the question is empty"),
        (squad(None, context=""), "column 'context': the context is empty"),
        (squad(None, question="why " * 100), "column 'question': the question has .*max_length=64"),
        (squad(None, question=None), "column 'question': must be text, got None"),
    ],
)
def test_a_row_without_room_is_named(row: Row, message: str, tokenizer: GPTJTokenizer) -> None:
    with pytest.raises(DataError, match=message) as error:
        QuestionAnsweringData([squad("sea"), row], tokenizer, 64, 16)
    assert "squad.jsonl, row 7, column" in str(error.value)


def test_the_model_takes_a_batch_of_windows(tokenizer: GPTJTokenizer) -> None:
    data = QuestionAnsweringData([squad("the sea"), squad(None)], tokenizer, 44, 8)
    batch = data.collate([data[i] for i in range(len(data))])
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert batch["input_ids"].shape == (len(data), 44)
    assert data.count_items(batch) == len(data)
    assert data.count_tokens(batch) == sum(len(data[i].input_ids) for i in range(len(data)))
    model = GPTJForQuestionAnswering(
        GPTJConfig(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8
        )
    )
    assert model(**batch).loss.isfinite()


def random_logits(found: list[Window], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    starts = [3 * torch.randn(len(w.input_ids), generator=generator) for w in found]
    ends = [3 * torch.randn(len(w.input_ids), generator=generator) for w in found]
    return starts, ends


def spans_of(
    window: Window, start: Tensor, end: Tensor, max_tokens: int
) -> dict[tuple[int, int], float]:
    """The highest logit of each span of a window."""
    logits: dict[tuple[int, int], float] = {}
    places = [(t, o) for t, o in enumerate(window.offsets) if o is not None]
    for i, first in places:
        for j, last in places:
            if i <= j < i + max_tokens:
                span = first[0], last[1]
                logits[span] = max(float(start[i]) + float(end[j]), logits.get(span, -math.inf))
    return logits


def total_of(found: list[Window], logits: list[Tensor]) -> float:
    """The sum of exponentials over all places of the context."""
    at: dict[tuple[int, int], float] = {}
    for window, values in zip(found, logits, strict=True):
        for place, value in zip(window.offsets, values.tolist(), strict=True):
            if place is not None:
                at[place] = max(value, at.get(place, -math.inf))
    return sum(map(math.exp, at.values()))


def every_span(
    found: list[Window], starts: list[Tensor], ends: list[Tensor], max_tokens: int, null: bool
) -> list[tuple[int, int, float]]:
    """All spans and their scores, best first, by the definition: loops and no shortcut."""
    logits: dict[tuple[int, int], float] = {}
    for window, start, end in zip(found, starts, ends, strict=True):
        for span, logit in spans_of(window, start, end, max_tokens).items():
            logits[span] = max(logit, logits.get(span, -math.inf))
    start_total, end_total = total_of(found, starts), total_of(found, ends)
    if null:
        pairs = [(float(s[0]), float(e[0])) for s, e in zip(starts, ends, strict=True)]
        surest = min(pairs, key=sum)
        logits[0, 0] = sum(surest)
        start_total += math.exp(surest[0])
        end_total += math.exp(surest[1])
    scores = [(*s, math.exp(logit) / start_total / end_total) for s, logit in logits.items()]
    return sorted(scores, key=lambda each: -each[2])


@pytest.mark.slow
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1000, 0), (40, 10), (32, 5)]),
    top_k=st.integers(1, 40),
    max_tokens=st.integers(1, 60),
    null=st.booleans(),
)
def test_the_best_spans_equal_an_exhaustive_search(
    seed: int,
    shape: tuple[int, int],
    top_k: int,
    max_tokens: int,
    null: bool,
    tokenizer: GPTJTokenizer,
) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, *shape)
    starts, ends = random_logits(found, seed)
    spans = best_spans(
        found,
        starts,
        ends,
        top_k=top_k,
        max_answer_tokens=max_tokens,
        handle_impossible_answer=null,
    )
    expected = every_span(found, starts, ends, max_tokens, null)[:top_k]
    assert [(span.start, span.end) for span in spans] == [each[:2] for each in expected]
    for span, (_, _, score) in zip(spans, expected, strict=True):
        assert span.score == pytest.approx(score, rel=1e-9)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1000, 0), (40, 10), (32, 5)]),
    top_k=st.integers(1, 60),
    max_tokens=st.integers(1, 60),
)
def test_a_words_probability_is_the_sum_of_its_spans(
    seed: int, shape: tuple[int, int], top_k: int, max_tokens: int, tokenizer: GPTJTokenizer
) -> None:
    """By the definition: the spans of a window add up, and the window that is surest counts."""
    found = windows(tokenizer, QUESTION, CONTEXT, *shape)
    starts, ends = random_logits(found, seed)
    words = Words(CONTEXT)
    total = total_of(found, starts) * total_of(found, ends)
    expected: dict[tuple[int, int], float] = {}
    for window, start, end in zip(found, starts, ends, strict=True):
        sums: dict[tuple[int, int], float] = {}
        for span, logit in spans_of(window, start, end, max_tokens).items():
            place = words.widen(*span)
            sums[place] = sums.get(place, 0) + math.exp(logit) / total
        for place, score in sums.items():
            expected[place] = max(score, expected.get(place, 0))
    spans = best_spans(found, starts, ends, top_k=top_k, max_answer_tokens=max_tokens, words=words)
    ranked = sorted(expected, key=lambda place: -expected[place])[:top_k]
    assert [(span.start, span.end) for span in spans] == ranked
    for span in spans:
        assert span.score == pytest.approx(expected[span.start, span.end], rel=1e-9)  # type: ignore[attr-defined]
    assert sum(span.score for span in spans) < 1 + 1e-9


def test_a_single_windows_score_equals_hugging_faces_pipeline(tokenizer: GPTJTokenizer) -> None:
    """Its formula (transformers 4.57, select_starts_ends): softmax over the context's tokens."""
    found = windows(tokenizer, "why?", "a b c d e f", 1000, 0)
    starts, ends = random_logits(found, 1)
    context = torch.tensor([offset is not None for offset in found[0].offsets])
    start = starts[0].masked_fill(~context, -10000.0).softmax(dim=0)
    end = ends[0].masked_fill(~context, -10000.0).softmax(dim=0)
    scores = (start[:, None] * end[None, :]).triu().tril(15 - 1)
    first, last = divmod(int(scores.argmax()), len(start))
    (span,) = best_spans(found, starts, ends)
    begin, finish = found[0].offsets[first], found[0].offsets[last]
    assert begin is not None
    assert finish is not None
    assert (span.start, span.end) == (begin[0], finish[1])
    assert span.score == pytest.approx(float(scores.max()), rel=1e-5)


def test_an_answer_in_several_windows_counts_once(tokenizer: GPTJTokenizer) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, 40, 14)
    assert len(found) > 2
    # The place that most windows see, and all of them are sure of it.
    place = max(
        {o for w in found for o in w.offsets if o},
        key=lambda place: (sum(place in w.offsets for w in found), place),
    )
    assert sum(place in w.offsets for w in found) > 1
    logits = [torch.tensor([20.0 if o == place else 0.0 for o in w.offsets]) for w in found]
    spans = best_spans(found, logits, logits, top_k=5)
    assert (spans[0].start, spans[0].end) == place
    assert spans[0].score > 0.999
    assert len({(span.start, span.end) for span in spans}) == len(spans) == 5


def test_spans_with_padding_and_half_precision(tokenizer: GPTJTokenizer) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, 40, 10)
    starts, ends = random_logits(found, 2)
    starts = [logits.to(torch.bfloat16) for logits in starts]
    padded = [torch.cat([logits, torch.full((9,), 100.0)]) for logits in starts]
    assert best_spans(found, padded, ends) == best_spans(found, starts, ends)


def test_a_span_does_not_begin_or_end_with_white_space(tokenizer: GPTJTokenizer) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, 1000, 0)
    starts, ends = random_logits(found, 3)
    for span in best_spans(found, starts, ends, top_k=500, max_answer_tokens=8):
        text = CONTEXT[span.start : span.end]
        assert text
        assert text == text.strip()


def test_the_empty_answer_only_wins_if_allowed(tokenizer: GPTJTokenizer) -> None:
    found = windows(tokenizer, QUESTION, CONTEXT, 1000, 0)
    logits = [torch.zeros(len(found[0].input_ids))]
    logits[0][0] = 15.0
    assert best_spans(found, logits, logits)[0].end > 0
    nothing, something = best_spans(found, logits, logits, handle_impossible_answer=True, top_k=2)
    assert (nothing.start, nothing.end) == (0, 0)
    assert nothing.score > 0.99 > 0.01 > something.score


def test_every_answer_of_real_questions_is_found_in_its_window(
    tokenizer: GPTJTokenizer, shared_data: Path
) -> None:
    rows = list(rows_of(shared_data / "xquad_en_dev.jsonl"))[:100]
    data = QuestionAnsweringData(rows, tokenizer, 300, 80)
    answered = set()
    for index in range(len(data)):
        example, question = data[index], data.questions[data.question_of(index)]
        if example.start:
            window = data.window(index)
            begin, finish = window.offsets[example.start], window.offsets[example.end]
            assert begin is not None
            assert finish is not None
            found = question.context[begin[0] : finish[1]]
            assert question.answers[0].strip() in found
            assert len(found) - len(question.answers[0]) < 8  # the rest of a token, at most
            answered.add(data.question_of(index))
    assert len(answered) == len(rows)
