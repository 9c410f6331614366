"""Completions: prompts, streams, sampling and stops, against the library's own generate."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import openai
import pytest
import torch
from serving_client import assert_alike, complete, greedy, streamed, text_of
from serving_models import PROMPTS, Models
from slow_cases import slow

from gptj.sampling import SamplingParams, adjust

pytest_plugins = ["serving_fixtures"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions_equal_generate(
    client: openai.OpenAI, models: Models, prompt: str
) -> None:
    reply = client.completions.create(
        model="generation", prompt=prompt, max_tokens=12, temperature=0
    )
    ids = greedy(models, prompt)
    assert reply.choices[0].text == text_of(models, ids)
    assert reply.choices[0].finish_reason == ("length" if len(ids) == 12 else "stop")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(models.tokenizer.encode(prompt))
    assert reply.usage.completion_tokens == len(ids)


def test_a_prompt_can_be_text_or_ids_or_several_of_either(service: str, models: Models) -> None:
    ids = [models.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [text_of(models, greedy(models, prompt)) for prompt in PROMPTS]
    for prompt, texts in (
        (PROMPTS, expected),
        (ids, expected),
        (ids[1], expected[1:2]),
        (PROMPTS[1], expected[1:2]),
    ):
        choices = complete(service, prompt=prompt)["choices"]
        assert [choice["text"] for choice in choices] == texts
        assert [choice["index"] for choice in choices] == list(range(len(texts)))


def test_a_missing_or_empty_prompt_starts_a_new_text(service: str, models: Models) -> None:
    bos = models.tokenizer.bos_token_id
    expected = text_of(models, greedy(models, [bos], eos_token_id=[]))
    for fields in ({}, {"prompt": ""}, {"prompt": None}, {"prompt": [bos]}):
        reply = complete(service, **fields, ignore_eos=True)
        assert reply["choices"][0]["text"] == expected
        assert reply["usage"]["prompt_tokens"] == 1


STREAMS: list[dict[str, Any]] = [
    {},
    {"prompt": PROMPTS, "logprobs": 3},
    {"prompt": PROMPTS[:2], "n": 3, "temperature": 1, "seed": 5, "logprobs": 1},
    {"echo": True, "logprobs": 2, "n": 2},
    {"echo": True, "max_tokens": 0, "logprobs": 0},
    {"temperature": 1.2, "seed": 11, "max_tokens": 200, "stop": ["e", " a"], "logprobs": 0},
    {"temperature": 1.5, "seed": 3, "max_tokens": 100, "ignore_eos": True, "min_tokens": 20},
]


@pytest.mark.parametrize("fields", [*STREAMS[:5], *slow(STREAMS[5:])], ids=str)
def test_a_stream_adds_up_to_the_unstreamed_reply(service: str, fields: dict[str, Any]) -> None:
    fields = {"prompt": PROMPTS[0], **fields}
    # Batches differ between the two, and so the order of summation in fp32.
    assert_alike(streamed(service, **fields), complete(service, **fields)["choices"])


def test_openais_client_reads_a_stream_and_its_usage(client: openai.OpenAI, models: Models) -> None:
    chunks = list(
        client.completions.create(
            model="generation",
            prompt=PROMPTS[0],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    ids = greedy(models, PROMPTS[0])
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == text_of(models, ids)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openais_async_client_reads_several_streams_at_once(service: str, models: Models) -> None:
    """One of them is left after its first chunk, which the others do not notice."""

    async def read(client: openai.AsyncOpenAI, prompt: str, leave: bool) -> str:
        stream = await client.completions.create(
            model="generation", prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
        text = ""
        async with stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                if leave and text:
                    break
        return text

    async def read_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service}/v1", api_key="none") as client:
            return await asyncio.gather(
                *(read(client, prompt, leave=prompt == PROMPTS[0]) for prompt in PROMPTS)
            )

    texts = asyncio.run(read_all())
    expected = [text_of(models, greedy(models, prompt)) for prompt in PROMPTS]
    assert texts[1:] == expected[1:]
    assert texts[0]
    assert expected[0].startswith(texts[0])


@pytest.mark.slow
def test_concurrent_requests_get_what_they_get_alone(service: str, models: Models) -> None:
    """More than a batch holds, of all lengths, streamed and not, greedy and drawn."""

    def ask(number: int) -> Any:
        prompt = PROMPTS[number % len(PROMPTS)]
        fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 4 + number % 9}
        if number % 3 == 0:
            return streamed(service, **fields)[0]["text"]
        if number % 3 == 1:
            fields |= {"temperature": 1, "seed": number, "ignore_eos": True}
        return complete(service, **fields)["choices"][0]["text"]

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, range(48)))
    for number, text in enumerate(together):
        if number % 3 != 1:
            prompt = PROMPTS[number % len(PROMPTS)]
            assert text == text_of(models, greedy(models, prompt, max_new_tokens=4 + number % 9))
        elif number % 4 == 1:
            assert text == ask(number)


def test_a_stop_string_ends_the_text_before_it(service: str) -> None:
    full = complete(service, prompt="x", temperature=1, seed=1, max_tokens=40, ignore_eos=True)
    text = full["choices"][0]["text"]
    stop = text[12:15]
    before = text[: text.index(stop)]
    assert stop and before, "nothing to stop at, or nothing before it"
    for fields in ({"stop": stop}, {"stop": ["never seen", stop]}):
        choice = complete(
            service, prompt="x", temperature=1, seed=1, max_tokens=40, ignore_eos=True, **fields
        )["choices"][0]
        assert choice["text"] == before
        assert choice["finish_reason"] == "stop"


def test_the_stop_string_or_token_can_be_included(service: str, models: Models) -> None:
    """vLLM's meaning: of stop strings and stop tokens, but eos has no text; streamed as well."""
    fields: dict[str, Any] = {"prompt": "x", "temperature": 1, "seed": 1, "max_tokens": 40}
    fields |= {"ignore_eos": True, "logprobs": 0}
    (full,) = complete(service, **fields)["choices"]
    stop = full["text"][12:15]
    end = full["text"].index(stop) + len(stop)
    included: dict[str, Any] = {**fields, "include_stop_str_in_output": True}
    for stops in (stop, ["never seen", stop]):
        choices = complete(service, **included, stop=stops)["choices"]
        assert choices[0]["text"] == full["text"][:end]
        assert choices[0]["finish_reason"] == "stop"
        assert_alike(streamed(service, **included, stop=stops), choices)
    token = models.tokenizer.encode("T")[0]
    forced: dict[str, Any] = {"prompt": "x", "logit_bias": {str(token): 100}, "min_tokens": 2}
    for include, text in ((False, ""), (True, "T")):
        reply = complete(
            service, **forced, stop_token_ids=[token], include_stop_str_in_output=include
        )
        before = reply["choices"][0]["text"]
        assert before.endswith(text)
        assert before.count("T") == len(text)
        assert reply["choices"][0]["finish_reason"] == "stop"
    eos = models.tokenizer.eos_token_id
    reply = complete(
        service, prompt="x", logit_bias={str(eos): 100}, include_stop_str_in_output=True
    )
    assert (reply["choices"][0]["text"], reply["usage"]["completion_tokens"]) == ("", 1)
    beams: dict[str, Any] = {"prompt": PROMPTS[0], "use_beam_search": True, "best_of": 2}
    found = complete(service, **beams)["choices"][0]["text"]
    stop = found[3:5]
    text = complete(service, **beams, stop=stop, include_stop_str_in_output=True)
    assert text["choices"][0]["text"] == found[: found.index(stop) + len(stop)]


def token_of(models: Models, content: bytes) -> int:
    """The id of a single byte."""
    tokenizer = models.tokenizer
    return next(i for i in range(len(tokenizer)) if tokenizer.token_bytes(i) == content)


@pytest.mark.parametrize(
    ("first", "following", "alone"),
    [
        ("東".encode()[:2], "東".encode()[2:], "東"),
        ("é".encode()[:1], "é".encode()[1:], "é"),
        ("😀".encode()[:3], "😀".encode()[3:], "😀"),
        ("東".encode()[:2], b"a", "a"),
        ("😀".encode()[:1], b" ", " "),
    ],
    ids=str,
)
def test_a_prompt_of_ids_may_end_within_a_character(
    service: str, models: Models, first: bytes, following: bytes, alone: str
) -> None:
    """Echoed, it is as if all were decoded together; alone, the output begins with a character."""
    tokenizer = models.tokenizer
    prompt = [*tokenizer.encode("The "), *(token_of(models, bytes([byte])) for byte in first)]
    new = token_of(models, following)
    fields: dict[str, Any] = {"prompt": prompt, "logit_bias": {str(new): 100}, "max_tokens": 1}
    whole = tokenizer.decode([*prompt, new])
    for extra in ({}, {"n": 2}, {"use_beam_search": True, "best_of": 2}):
        for echo, expected in ((False, alone), (True, whole)):
            choices = complete(service, **fields, **extra, echo=echo)["choices"]
            assert [choice["text"] for choice in choices] == [expected] * len(choices)
    for echo in (False, True):
        (choice,) = complete(service, **fields, echo=echo, logprobs=1)["choices"]
        assert_alike(streamed(service, **fields, echo=echo, logprobs=1), [choice])
        before = len("The ") if echo else 0
        assert choice["logprobs"]["text_offset"][-1] == before
    (choice,) = complete(service, prompt=prompt, max_tokens=0, echo=True)["choices"]
    assert choice["text"] == tokenizer.decode(prompt)
    eos = {str(tokenizer.eos_token_id): 100}
    for echo, expected in ((False, ""), (True, tokenizer.decode(prompt))):
        (choice,) = complete(service, prompt=prompt, logit_bias=eos, echo=echo)["choices"]
        assert choice["text"] == expected


@pytest.mark.parametrize("separator", ["\u0085", "\u2028", "\u2029"], ids=ascii)
def test_line_breaks_in_texts_do_not_break_a_stream(
    service: str, models: Models, separator: str
) -> None:
    """Whatever a client takes for the end of a line: echoed, and generated."""
    *first, last = separator.encode()
    ids = [token_of(models, bytes([byte])) for byte in first]
    generated = {"prompt": ids, "logit_bias": {str(token_of(models, bytes([last]))): 100}}
    for fields, expected in (
        ({"prompt": f"a{separator}b", "echo": True, "max_tokens": 0}, f"a{separator}b"),
        ({**generated, "max_tokens": 1}, separator),
    ):
        body = {**fields, "stream": True}
        reply = httpx.post(f"{service}/v1/completions", json=body, timeout=30)
        lines = [line for line in reply.text.splitlines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert streamed(service, **fields)[0]["text"] == expected


def test_usage_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="generation",
            prompt="The",
            max_tokens=5,
            stream=True,
            extra_body={
                "ignore_eos": True,
                "stream_options": {
                    "include_usage": True,
                    "continuous_usage_stats": True,
                    "include_obfuscation": False,
                },
            },
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_each_sampling_field_has_its_effect(service: str, models: Models) -> None:
    prompt = PROMPTS[2]
    plain = greedy(models, prompt, eos_token_id=[])
    token = models.tokenizer.encode("T")[0]

    def ids(**fields: Any) -> list[str]:
        reply = complete(service, prompt=prompt, logprobs=0, ignore_eos=True, **fields)
        return reply["choices"][0]["logprobs"]["tokens"]

    base = ids()
    assert ids(temperature=1, top_k=1) == ids(temperature=1, top_p=1e-6) == base
    assert ids(temperature=1, min_p=1.0) == base
    assert ids(temperature=2, top_p=0, seed=1) == ids(temperature=2, top_p=0, n=1) == base
    assert ids(logit_bias={str(token): 100}) == ["T"] * 12
    assert base[0] not in ids(logit_bias={str(plain[0]): -100})
    forced = {"logit_bias": {str(token): 50}}
    assert ids(**forced) == ["T"] * 12
    stopped = ids(**forced, stop_token_ids=[token], min_tokens=3)
    assert "T" not in stopped[:3]
    assert stopped[3:] == ["T"]
    assert ids(temperature=1, seed=4) == ids(temperature=1, seed=4) != ids(temperature=1, seed=5)
    penalised = greedy(models, prompt, eos_token_id=[], repetition_penalty=1.3)
    assert penalised != plain
    text = complete(service, prompt=prompt, ignore_eos=True, repetition_penalty=1.3)
    assert text["choices"][0]["text"] == models.tokenizer.decode(penalised)


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}],
    ids=str,
)
def test_a_penalty_makes_another_token_the_likeliest(
    service: str, models: Models, penalty: dict[str, float]
) -> None:
    """Of two that are favoured almost alike, so that both repeat; step by step."""
    prompt = models.tokenizer.encode(PROMPTS[2])
    one, other = models.tokenizer.encode("Tx")

    @cache
    def logits(output: tuple[int, ...]) -> torch.Tensor:
        return models.generation(torch.tensor([[*prompt, *output]])).logits[0, -1].detach()

    def expected(gap: int, penalties: dict[str, float]) -> list[int]:
        params = SamplingParams(logit_bias={one: 60.0, other: 60.0 - gap}, **penalties)
        output: list[int] = []
        for _ in range(12):
            adjusted = adjust(logits(tuple(output)).clone(), params, prompt, output, [])
            output.append(int(adjusted.argmax()))
        return output

    gap = next(each for each in range(-15, 15) if expected(each, {}) != expected(each, penalty))
    fields: dict[str, Any] = {"prompt": prompt, "ignore_eos": True}
    fields["logit_bias"] = {str(one): 60.0, str(other): 60.0 - gap}
    for penalties in ({}, penalty):
        (choice,) = complete(service, **fields, **penalties)["choices"]
        assert choice["text"] == models.tokenizer.decode(expected(gap, penalties))


def test_eos_ends_an_output_and_is_not_shown(service: str, models: Models) -> None:
    eos = models.tokenizer.eos_token_id
    reply = complete(service, prompt="x", logit_bias={str(eos): 100})
    assert reply["choices"][0]["text"] == ""
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 1


def test_beam_search_equals_generate(service: str, models: Models) -> None:
    reply = complete(
        service, prompt=PROMPTS[:2], use_beam_search=True, n=2, best_of=4, length_penalty=0.5
    )
    expected = []
    for prompt in PROMPTS[:2]:
        ids = models.tokenizer.encode(prompt)
        found = models.generation.generate(
            torch.tensor([ids]),
            num_beams=4,
            num_return_sequences=2,
            length_penalty=0.5,
            max_new_tokens=12,
        )
        expected += [text_of(models, row[len(ids) :]) for row in found.tolist()]
    assert [choice["text"] for choice in reply["choices"]] == expected
