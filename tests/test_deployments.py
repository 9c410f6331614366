"""The three services on a real cluster, over HTTP, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import openai
import pytest
import torch
import yaml
from fastapi import Request
from http_server import listening
from huggingface_hub import InferenceClient
from pydantic import ValidationError

from deployments.loading import Arguments, load, name_of
from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
)
from gptj.checkpoint import save_model
from gptj.data.question_answering import best_spans, windows
from gptj.serving.app import new_app
from gptj.serving.completions import Choice, Completion
from gptj.serving.errors import APIError, OverloadedError, UnavailableError
from gptj.serving.keys import Keys
from gptj.serving.limits import MAX_BODY_BYTES
from gptj.serving.question_answering import whole_words
from gptj.serving.vocabulary import Vocabulary
from jobs.local_ray import LocalRay
from jobs.local_s3 import LocalS3
from jobs.processes import HOST, free_ports, running, tail

pytestmark = pytest.mark.slow  # most of them need the cluster

SERVE_CONFIG = Path(__file__).resolve().parents[1] / "k8s" / "base" / "serve.yaml"
SENTENCES = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
PROMPTS = ["The tower", "A café opens", "Who wrote the book?", "x", "東京 is far away. 😀 Anna"]
CONTEXT = 2048  # tokens
SHORT_CONTEXT = 64  # of the other two
UNUSED = 20  # rows of the embedding that stand for no text
KEY = "a-key-of-the-test"


@dataclass(frozen=True)
class Models:
    """What is behind the services, to compare their replies with."""

    tokenizer: GPTJTokenizer
    generation: GPTJForCausalLM
    classification: GPTJForSequenceClassification
    question_answering: GPTJForQuestionAnswering


def make_models() -> Models:
    tokenizer = GPTJTokenizer.train(SENTENCES, vocab_size=300)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer) + UNUSED,
        "n_positions": SHORT_CONTEXT,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,  # wide, so that probabilities differ
    }
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    return Models(
        tokenizer,
        GPTJForCausalLM(GPTJConfig(**{**shape, "n_positions": CONTEXT})).eval(),
        GPTJForSequenceClassification(GPTJConfig(**shape, id2label=labels)).eval(),
        GPTJForQuestionAnswering(GPTJConfig(**shape)).eval(),
    )


@pytest.fixture(scope="module")
def models() -> Models:
    return make_models()


@pytest.fixture(scope="module")
def service(
    models: Models, s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of the three services, and of one behind a key (/guarded)."""
    folder = tmp_path_factory.mktemp("services")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        save_all(config, models, "s3://gptj/test-deployments")
        guarded = json.loads(json.dumps(config["applications"][0]))
        guarded |= {"name": "guarded", "route_prefix": "/guarded"}
        guarded["args"] |= {"max_running": 1, "max_waiting": 1, "model_name": "org/guarded"}
        options = guarded["deployments"][0]["ray_actor_options"]
        options["runtime_env"] = {"env_vars": {"GPTJ_API_KEYS": f"another, {KEY}"}}
        config["applications"].append(guarded)
        with serving(config, folder) as (address, _):
            yield address


def save_all(config: dict[str, Any], models: Models, storage: str) -> None:
    """Save the models, and let the configuration's applications serve them in fp32."""
    unused = len(models.tokenizer)
    with torch.no_grad():
        # Without the ban on them, every output would be of these.
        models.generation.lm_head.bias[unused:] = 100.0
    for application in config["applications"]:
        name = application["name"].replace("-", "_")
        address = f"{storage}/{name}/model"
        save_model(getattr(models, name), address, tokenizer=models.tokenizer)
        application["args"] |= {"checkpoint": address, "dtype": "float32"}
    with torch.no_grad():
        models.generation.lm_head.bias[unused:] = -torch.inf


@contextmanager
def serving(config: dict[str, Any], folder: Path, cpus: int = 4) -> Iterator[tuple[str, LocalRay]]:
    """`serve run` of a configuration, on a free port and a cluster of its own."""
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    address = f"http://{HOST}:{port}"
    with LocalRay.start(folder, cpus=cpus) as node:
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        with running(command, environment={**os.environ, **node.environment()}, log=log) as process:
            deadline = time.monotonic() + 180
            for application in config["applications"]:
                url = address + application["route_prefix"].rstrip("/") + "/health"
                while not _answers(url):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{url} does not answer:\n{tail(log, 6000)}")
                    time.sleep(0.2)
            yield address, node


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_keys_come_from_the_environment_and_an_empty_setting_is_refused() -> None:
    keys = Keys.from_environment({"GPTJ_API_KEYS": "one, two,"})
    assert keys.allow(b"Bearer one") and keys.allow(b"bearer two")
    assert not keys.allow(b"Bearer three") and not keys.allow(b"Bearer ") and not keys.allow(None)
    with pytest.raises(ValueError, match="names no key"):
        Keys.from_environment({"GPTJ_API_KEYS": " ,"})


def test_without_keys_everybody_may_ask_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Keys.from_environment({}).allow(None)
    assert "everybody" in caplog.text


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("s3://bucket/runs/my-run/model", "my-run"),
        ("s3://bucket/my-model/", "my-model"),
        ("EleutherAI/gpt-j-6B", "EleutherAI/gpt-j-6B"),
        ("./outputs/my-run/model", "my-run"),
        ("/models/gptj", "gptj"),
    ],
)
def test_a_model_is_called_by_its_address(address: str, name: str) -> None:
    assert name_of(address) == name


def test_another_heads_checkpoint_and_unknown_arguments_are_refused(
    models: Models, tmp_path: Path
) -> None:
    address = str(tmp_path / "model")
    save_model(models.classification, address, tokenizer=models.tokenizer)
    with pytest.raises(ValueError, match="is a GPTJForSequenceClassification, and this deployment"):
        load(GPTJForCausalLM, Arguments(checkpoint=address))
    with pytest.raises(ValidationError, match="max_batches"):
        Arguments.model_validate({"checkpoint": address, "max_batches": 3})


def test_rows_of_the_embedding_without_text_are_found(models: Models) -> None:
    known = len(models.tokenizer)
    vocabulary = Vocabulary.of(models.tokenizer, known + UNUSED)
    assert vocabulary.unused_ids == tuple(range(known, known + UNUSED))
    assert vocabulary.text_ids == set(range(known))
    for text in SENTENCES:
        assert vocabulary.least_tokens(text) <= len(models.tokenizer.encode(text))


@pytest.fixture(scope="module")
def client(service: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0, timeout=60)


def complete(service: str, **fields: Any) -> dict[str, Any]:
    """The reply to a request; greedy, unless it says otherwise."""
    body = {"temperature": 0, "max_tokens": 12, **fields}
    reply = httpx.post(f"{service}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(service: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream make together, as a reply has them."""
    body = {"temperature": 0, "max_tokens": 12, **fields, "stream": True}
    choices: dict[int, dict[str, Any]] = {}
    with httpx.stream("POST", f"{service}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part)
            assert part is whole or whole["finish_reason"] is None
            if part is not whole:
                whole["text"] += part["text"]
                whole["finish_reason"] = part["finish_reason"]
                for name in part["logprobs"] or ():
                    whole["logprobs"][name] += part["logprobs"][name]
    return [choices[index] for index in sorted(choices)]


def greedy(models: Models, prompt: str | list[int], **arguments: Any) -> list[int]:
    """The new ids by the library's own generate."""
    ids = models.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    arguments = {"max_new_tokens": 12, **arguments}
    return models.generation.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist()


def text_of(models: Models, ids: Sequence[int]) -> str:
    eos = models.tokenizer.eos_token_id
    return models.tokenizer.decode([token for token in ids if token != eos])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completion_is_that_of_generate(
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


def test_no_prompt_or_an_empty_one_begins_a_new_text(service: str, models: Models) -> None:
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


@pytest.mark.parametrize("fields", STREAMS, ids=str)
def test_a_stream_is_together_what_comes_without_streaming(
    service: str, fields: dict[str, Any]
) -> None:
    fields = {"prompt": PROMPTS[0], **fields}
    # Batches differ between the two, and so the order of summation in fp32.
    assert_alike(streamed(service, **fields), complete(service, **fields)["choices"])


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal; numbers but for 1e-4."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4)
    else:
        assert ours == theirs


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
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
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
                if leave:
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
    assert expected[0].startswith(texts[0])


def test_openais_client_shows_the_raw_reply(client: openai.OpenAI, models: Models) -> None:
    raw = client.completions.with_raw_response.create(
        model="generation", prompt=PROMPTS[0], max_tokens=12, temperature=0
    )
    assert (raw.status_code, raw.retries_taken) == (200, 0)
    assert raw.headers["content-type"] == "application/json"
    reply = raw.parse()
    assert reply.choices[0].text == text_of(models, greedy(models, PROMPTS[0]))
    assert reply._request_id == raw.headers["x-request-id"]
    assert reply.id == f"cmpl-{reply._request_id}"


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


def test_echo_with_logprobs_scores_the_prompt(service: str, models: Models) -> None:
    prompt = PROMPTS[4]
    reply = complete(service, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    ids = models.tokenizer.encode(prompt)
    expected = models.generation(torch.tensor([ids])).logits[0].detach().log_softmax(dim=-1)
    choice = reply["choices"][0]
    assert choice["text"] == prompt and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        [float(expected[place, token]) for place, token in enumerate(ids[1:])], abs=1e-4
    )
    for place, top in enumerate(logprobs["top_logprobs"][1:]):
        best = expected[place].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)
    for place, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert token.startswith("bytes:") or prompt[place:].startswith(token)
    assert "bytes:\\xf0" in "".join(logprobs["tokens"]) or "😀" in "".join(logprobs["tokens"])
    assert reply["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "total_tokens": len(ids),
    }


def test_a_stop_string_ends_the_text_before_it(service: str) -> None:
    full = complete(service, prompt="x", temperature=1, seed=1, max_tokens=40, ignore_eos=True)
    text = full["choices"][0]["text"]
    stop = text[12:15]
    before = text[: text.index(stop)]
    for fields in ({"stop": stop}, {"stop": ["never seen", stop]}):
        choice = complete(
            service, prompt="x", temperature=1, seed=1, max_tokens=40, ignore_eos=True, **fields
        )["choices"][0]
        assert choice["text"] == before
        assert choice["finish_reason"] == "stop"


def test_best_of_returns_those_of_the_highest_mean_logprob(service: str) -> None:
    fields = {"prompt": "The", "temperature": 1, "seed": 9, "logprobs": 0, "ignore_eos": True}
    candidates = complete(service, **fields, n=5)["choices"]
    assert len({choice["text"] for choice in candidates}) == 5

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = complete(service, **fields, n=2, best_of=5)
    expected = sorted(candidates, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [each["text"] for each in expected]
    assert best["usage"]["completion_tokens"] == 5 * 12
    without = complete(service, **{**fields, "logprobs": None}, n=1, best_of=5)["choices"]
    assert without[0]["text"] == expected[0]["text"] and without[0]["logprobs"] is None


def test_best_of_counts_the_probability_of_ending(service: str, models: Models) -> None:
    """An output that ends at once is no better than the others for having no tokens."""
    eos = models.tokenizer.eos_token_id
    fields = {
        "prompt": "The",
        "temperature": 1,
        "logprobs": 0,
        "max_tokens": 2,
        "logit_bias": {str(eos): 6},
    }
    empty = 0
    for seed in range(6):
        candidates = complete(service, **fields, seed=seed, n=4)["choices"]
        if len({choice["text"] == "" for choice in candidates}) == 1:
            continue
        best = complete(service, **fields, seed=seed, n=1, best_of=4)["choices"][0]
        empty += best["text"] == ""
    assert empty == 0  # by the model alone, eos is far less likely than the other tokens


def test_the_chosen_token_is_among_the_top_logprobs(service: str) -> None:
    reply = complete(service, prompt="The", temperature=2, seed=1, logprobs=1, echo=True)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] is None
    sizes = set()
    for token, value, top in list(
        zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top[token] == value
        sizes.add(len(top))
    assert 2 in sizes and sizes <= {1, 2}


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
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 5


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
    assert ids(logit_bias={str(token): 100}) == ["T"] * 12
    assert base[0] not in ids(logit_bias={str(plain[0]): -100})
    forced = {"logit_bias": {str(token): 50}}
    assert ids(**forced) == ["T"] * 12
    assert ids(**forced, stop_token_ids=[token], min_tokens=3)[:3] != ["T"] * 3
    assert ids(repetition_penalty=100.0) != base or len(set(base)) == len(base)
    assert len(set(ids(presence_penalty=2.0, frequency_penalty=2.0))) >= len(set(base))
    assert ids(temperature=1, seed=4) == ids(temperature=1, seed=4) != ids(temperature=1, seed=5)
    penalised = greedy(models, prompt, eos_token_id=[], repetition_penalty=1.3)
    text = complete(service, prompt=prompt, ignore_eos=True, repetition_penalty=1.3)
    assert text["choices"][0]["text"] == models.tokenizer.decode(penalised)


def test_eos_ends_an_output_and_is_not_shown(service: str, models: Models) -> None:
    eos = models.tokenizer.eos_token_id
    reply = complete(service, prompt="x", logit_bias={str(eos): 100})
    assert reply["choices"][0]["text"] == "" and reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 1


def test_eos_is_among_the_logprobs_as_the_last_token(service: str, models: Models) -> None:
    """With text before it, echoed and without, and streamed."""
    tokenizer = models.tokenizer
    eos, prompt = tokenizer.eos_token_id, tokenizer.encode(PROMPTS[0])
    expected = models.generation(torch.tensor([prompt])).logits[0, -1].detach().log_softmax(dim=-1)
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "logprobs": 2, "logit_bias": {str(eos): 100}}
    for echo in (False, True):
        (choice,) = complete(service, **fields, echo=echo)["choices"]
        logprobs, before = choice["logprobs"], len(prompt) if echo else 0
        assert logprobs["tokens"][before:] == [tokenizer.eos_token]
        assert logprobs["text_offset"][before:] == [len(choice["text"])]
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[eos]), abs=1e-4)
        top = logprobs["top_logprobs"][-1]
        assert sorted(top.values())[-2:] == pytest.approx(
            sorted(expected.topk(2).values.tolist()), abs=1e-4
        )
        assert_alike(streamed(service, **fields, echo=echo), [choice])
    after = complete(service, **fields, min_tokens=3)
    assert after["choices"][0]["logprobs"]["tokens"][3:] == [tokenizer.eos_token]
    assert after["usage"]["completion_tokens"] == 4


def test_beam_search_is_that_of_generate(service: str, models: Models) -> None:
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


def test_a_client_that_leaves_frees_the_engine(service: str, client: openai.OpenAI) -> None:
    """Four batches of two thousand steps take half a minute, for which the next would wait."""
    long: dict[str, Any] = {"prompt": "x", "max_tokens": CONTEXT - 10, "temperature": 1, "n": 64}
    for stream in (True, False):
        started = time.monotonic()
        if stream:
            url = f"{service}/v1/completions"
            body = {**long, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", url, json=body) as reply:
                lines = reply.iter_lines()
                assert next(lines).startswith("data: ")
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=1.0).completions.create(
                    model="generation", **long, extra_body={"ignore_eos": True}
                )
        complete(service, prompt="x", max_tokens=1)
        assert time.monotonic() - started < 8


def test_the_model_is_listed_under_its_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "generation" and model.object == "model"
    assert client.models.retrieve("generation").id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert "'another'" in caught.value.message and caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")


def test_the_tokenizer_can_be_asked(service: str, models: Models) -> None:
    text = PROMPTS[4]
    ids = models.tokenizer.encode(text)
    url = f"{service}/tokenize"
    assert httpx.post(url, json={"prompt": text, "model": "generation"}).json() == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
    }
    with_texts = httpx.post(url, json={"prompt": text, "return_token_strs": True}).json()
    assert with_texts["token_strs"] == models.tokenizer.convert_ids_to_tokens(ids)
    assert httpx.post(url, json={"prompt": ""}).json()["tokens"] == []
    back = httpx.post(f"{service}/detokenize", json={"tokens": ids})
    assert back.json() == {"prompt": text}
    info = httpx.get(f"{service}/tokenizer_info").json()
    assert info["tokenizer_class"] and info["vocab_size"] == len(models.tokenizer)


def scores(models: Models, text: str) -> dict[str, float]:
    """Each label's probability by the model alone."""
    ids = torch.tensor([models.tokenizer.encode(text)])
    probabilities = models.classification(ids).logits[0].softmax(dim=-1).tolist()
    return dict(zip(models.classification.config.id2label.values(), probabilities, strict=True))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's client asks our service, though the tests ask no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_hugging_faces_client_classifies(service: str, models: Models) -> None:
    client = InferenceClient(model=f"{service}/classification")
    found = client.text_classification(PROMPTS[1])
    expected = sorted(scores(models, PROMPTS[1]).items(), key=lambda each: -each[1])
    assert [each.label for each in found] == [label for label, _ in expected]
    assert [each.score for each in found] == pytest.approx([s for _, s in expected], abs=1e-5)
    (best,) = client.text_classification(PROMPTS[1], top_k=1, function_to_apply="sigmoid")
    assert best.label == expected[0][0] and best.score != pytest.approx(expected[0][1])


def test_concurrent_texts_are_classified_as_alone(service: str, models: Models) -> None:
    texts = [sentence[:length] for sentence in SENTENCES for length in range(1, 14)]

    def ask(text: str) -> dict[str, float]:
        reply = httpx.post(f"{service}/classification", json={"inputs": text}, timeout=30)
        (labels,) = reply.json()
        return {each["label"]: each["score"] for each in labels}

    together = httpx.post(f"{service}/classification", json={"inputs": texts}, timeout=30).json()
    with ThreadPoolExecutor(16) as pool:
        for text, found, listed in zip(texts, pool.map(ask, texts), together, strict=True):
            expected = scores(models, text)
            assert found == pytest.approx(expected, abs=1e-5)
            assert {e["label"]: e["score"] for e in listed} == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("online")
def test_hugging_faces_client_gets_the_best_span_over_all_windows(
    service: str, models: Models
) -> None:
    client = InferenceClient(model=f"{service}/question-answering")
    question, context = "Who wrote it?", " ".join(SENTENCES)
    parts = windows(models.tokenizer, question, context, 40, 8)
    assert len(parts) > 2
    outputs = [models.question_answering(torch.tensor([part.input_ids])) for part in parts]
    spans = best_spans(
        parts,
        [output.start_logits[0] for output in outputs],
        [output.end_logits[0] for output in outputs],
        top_k=3,
        max_answer_tokens=7,
        handle_impossible_answer=True,
    )
    asked = {"max_seq_len": 40, "doc_stride": 8, "max_answer_len": 7, "align_to_words": False}
    found = client.question_answering(
        question=question, context=context, top_k=3, handle_impossible_answer=True, **asked
    )
    assert isinstance(found, list)
    for answer, span in zip(found, spans, strict=True):
        assert (answer.start, answer.end) == (span.start, span.end)
        assert answer.answer == context[span.start : span.end]
        assert answer.score == pytest.approx(span.score, abs=1e-5)
    best = client.question_answering(question=question, context=context, **asked)
    assert best.answer == context[best.start : best.end]


@pytest.mark.usefixtures("online")
def test_answers_are_whole_words_unless_asked_otherwise(service: str) -> None:
    text = "It was built in 1951, by O'Neil's firm."
    for cut, whole in (("uil", "built"), ("95", "1951"), ("rm", "firm"), ("by", "by")):
        start = text.index(cut)
        found = whole_words(text, start, start + len(cut))
        assert text[slice(*found)] == whole
    client = InferenceClient(model=f"{service}/question-answering")
    context = " ".join(SENTENCES)
    answer = client.question_answering(question="Where is it?", context=context)
    assert (answer.start, answer.end) == whole_words(context, answer.start, answer.end)


@pytest.mark.usefixtures("online")
def test_a_questions_length_can_be_limited(service: str) -> None:
    client = InferenceClient(model=f"{service}/question-answering")
    context = " ".join(SENTENCES)
    long = client.question_answering(
        question="Where " * 50, context=context, max_question_len=1, align_to_words=False
    )
    limited = client.question_answering(
        question="Where", context=context, max_question_len=1, align_to_words=False
    )
    assert long.score == pytest.approx(limited.score, abs=1e-5)


def test_concurrent_questions_are_answered_as_alone(service: str) -> None:
    bodies = [
        {"inputs": {"question": question, "context": " ".join(SENTENCES)[start:]}}
        for question in ("Who?", "Where is the tower?")
        for start in range(8)
    ]

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        reply = httpx.post(f"{service}/question-answering", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, bodies))
    assert_alike(together, [ask(body) for body in bodies])


COMPLETIONS, CLASSIFICATION, ANSWERS = "/v1/completions", "/classification", "/question-answering"
HERE = {"question": "Who?", "context": "Anna wrote it."}
LONG = "The tower " * 1000
WRONG: list[tuple[str, Any, int, str]] = [
    (COMPLETIONS, b"", 422, "JSON object"),
    (COMPLETIONS, b"{", 400, "no JSON"),
    (COMPLETIONS, b"\xff\xfe{}", 400, "JSON"),
    (COMPLETIONS, b'{"prompt": "\xc3("}', 400, "JSON"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000, 400, "JSON"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 800 + b"]" * 800 + b"}", 422, "prompt"),
    (COMPLETIONS, b'{"n": 1' + b"0" * 5000 + b"}", 400, "JSON"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 422, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": Infinity}', 422, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "top_p": -Infinity}', 422, "top_p"),
    (COMPLETIONS, b'{"prompt": "x", "logit_bias": {"1": NaN}}', 422, "logit_bias"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 422, "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "stop": "\\ud800"}', 422, "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "model": "\\ud800"}', 404, "no model"),
    (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', 422, "body: Input should be"),
    (COMPLETIONS, b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}', 422, "logit_bias"),
    (COMPLETIONS, b'{"prompt": "x", "model": "\\u0000"}', 404, "no model"),
    (COMPLETIONS, [], 422, "JSON object"),
    (COMPLETIONS, None, 422, "JSON object"),
    (COMPLETIONS, "x", 422, "JSON object"),
    (COMPLETIONS, {"prompt": []}, 422, "empty list"),
    (COMPLETIONS, {"prompt": [[]]}, 422, "empty list"),
    (COMPLETIONS, {"prompt": 5}, 422, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [1, "x"]}, 422, "mixture"),
    (COMPLETIONS, {"prompt": [True]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [[1], ["x"]]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "-1"),
    (COMPLETIONS, {"prompt": [305]}, 400, "305 is not in the vocabulary"),
    (COMPLETIONS, {"prompt": [10**30]}, 400, "vocabulary"),
    (COMPLETIONS, {"prompt": LONG}, 400, f"context is {CONTEXT} tokens, but "),
    (COMPLETIONS, {"prompt": LONG * 50}, 400, "asked for: at least "),
    (COMPLETIONS, {"prompt": [5] * 2000, "max_tokens": 49}, 400, "2049 are asked for: 2000 of"),
    (COMPLETIONS, {"prompt": ["x"] * 129}, 400, "129 prompts"),
    (COMPLETIONS, {"n": 129}, 400, "129 outputs"),
    (COMPLETIONS, {"n": 10**30}, 400, "outputs"),
    (COMPLETIONS, {"n": 0}, 400, "n must be 1 or more, got 0"),
    (COMPLETIONS, {"n": 1.5}, 422, "n: "),
    (COMPLETIONS, {"n": "2"}, 422, "n: "),
    (COMPLETIONS, {"n": True}, 422, "n: "),
    (COMPLETIONS, {"n": 3, "best_of": 2}, 400, "best_of=2"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, 400, "best"),
    (COMPLETIONS, {"suffix": "end"}, 400, "suffix"),
    (COMPLETIONS, {"max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "echo"),
    (COMPLETIONS, {"max_tokens": 10**30}, 400, "context"),
    (COMPLETIONS, {"max_tokens": 5, "min_tokens": 6}, 400, "min_tokens"),
    (COMPLETIONS, {"min_tokens": -1}, 400, "min_tokens"),
    (COMPLETIONS, {"min_tokens": 5000}, 400, "context"),
    (COMPLETIONS, {"temperature": -0.1}, 400, "temperature must be in"),
    (COMPLETIONS, {"temperature": 10**300}, 400, "temperature must be in"),
    (COMPLETIONS, {"temperature": 10**400}, 422, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, 422, "temperature"),
    (COMPLETIONS, {"top_p": 0}, 400, "top_p must be in (0, 1], got 0"),
    (COMPLETIONS, {"top_p": 1.1}, 400, "top_p"),
    (COMPLETIONS, {"top_k": -2}, 400, "top_k"),
    (COMPLETIONS, {"min_p": 2}, 400, "min_p"),
    (COMPLETIONS, {"repetition_penalty": 0}, 400, "repetition_penalty"),
    (COMPLETIONS, {"presence_penalty": 3}, 400, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -3}, 400, "frequency_penalty"),
    (COMPLETIONS, {"logprobs": 6}, 400, "logprobs must be in [0, 5]"),
    (COMPLETIONS, {"logprobs": -1}, 400, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, 422, "logprobs"),
    (COMPLETIONS, {"stop": ""}, 422, "empty"),
    (COMPLETIONS, {"stop": ["a", 1]}, 422, "stop"),
    (COMPLETIONS, {"stop": ["x"] * 17}, 400, "stop"),
    (COMPLETIONS, {"stop": "x" * 1001}, 400, "stop"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream"),
    (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, 422, "stream_options.x"),
    (COMPLETIONS, {"stream": "yes"}, 422, "stream"),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, 422, "'x' is no token id"),
    (COMPLETIONS, {"logit_bias": {"310": 1}}, 400, "310"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, 422, "-1"),
    (COMPLETIONS, {"logit_bias": {"1": 101}}, 422, "101"),
    (COMPLETIONS, {"logit_bias": {"1": "2"}}, 422, "logit_bias"),
    (COMPLETIONS, {"logit_bias": [1]}, 422, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(n): 1 for n in range(1025)}}, 400, "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [310]}, 400, "310"),
    (COMPLETIONS, {"stop_token_ids": [-5]}, 400, "-5"),
    (COMPLETIONS, {"stop_token_ids": 5}, 422, "stop_token_ids"),
    (COMPLETIONS, {"seed": 1.5}, 422, "seed"),
    (COMPLETIONS, {"nonsense": 1}, 422, "nonsense: there is no such field"),
    (COMPLETIONS, {"model": "other"}, 404, "'other'"),
    (COMPLETIONS, {"model": 5}, 422, "model"),
    (COMPLETIONS, {"use_beam_search": True, "stream": True}, 400, "stream"),
    (COMPLETIONS, {"use_beam_search": True, "temperature": 0.5}, 400, "temperature"),
    (COMPLETIONS, {"use_beam_search": True, "logprobs": 1}, 400, "logprobs"),
    (COMPLETIONS, {"use_beam_search": True, "n": 100}, 400, "num_beams"),
    (COMPLETIONS, {"use_beam_search": True, "length_penalty": 1e300}, 400, "length_penalty"),
    (COMPLETIONS, {"length_penalty": 2.0}, 400, "use_beam_search"),
    ("/tokenize", {}, 422, "prompt"),
    ("/tokenize", {"prompt": ["x"]}, 422, "prompt"),
    ("/tokenize", b'{"prompt": "\\udfff"}', 422, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "other"}, 404, "'other'"),
    ("/detokenize", {"tokens": [999]}, 400, "999"),
    ("/detokenize", {"tokens": [-1]}, 400, "-1"),
    ("/detokenize", {"tokens": [10**30]}, 400, "vocabulary"),
    ("/detokenize", {"tokens": "x"}, 422, "tokens"),
    (CLASSIFICATION, b"{", 400, "no JSON"),
    (CLASSIFICATION, {}, 422, "inputs"),
    (CLASSIFICATION, {"inputs": []}, 422, "empty list"),
    (CLASSIFICATION, {"inputs": [1]}, 422, "inputs"),
    (CLASSIFICATION, {"inputs": {"text": "x"}}, 422, "inputs"),
    (CLASSIFICATION, b'{"inputs": "\\ud800"}', 422, "surrogate"),
    (CLASSIFICATION, {"inputs": ""}, 400, "empty"),
    (CLASSIFICATION, {"inputs": ["x", ""]}, 400, "inputs[1]"),
    (CLASSIFICATION, {"inputs": ["x"] * 257}, 400, "257"),
    (CLASSIFICATION, {"inputs": LONG}, 400, f"context is {SHORT_CONTEXT}"),
    (CLASSIFICATION, {"inputs": LONG * 50}, 400, "has at least "),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": 0}}, 400, "top_k"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": "all"}}, 422, "top_k"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"function_to_apply": "f"}}, 422, "softmax"),
    (CLASSIFICATION, {"inputs": "x", "parameters": []}, 422, "parameters"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"other": 1}}, 422, "parameters.other"),
    (ANSWERS, b"{", 400, "no JSON"),
    (ANSWERS, {}, 422, "inputs"),
    (ANSWERS, {"inputs": "x"}, 422, "inputs"),
    (ANSWERS, {"inputs": {"question": "x"}}, 422, "inputs.context"),
    (ANSWERS, {"inputs": {**HERE, "question": " "}}, 422, "inputs.question: must not be empty"),
    (ANSWERS, {"inputs": {**HERE, "context": ""}}, 422, "inputs.context: must not be empty"),
    (ANSWERS, b'{"inputs": {"question": "\\ud800", "context": "x"}}', 422, "inputs.question"),
    (ANSWERS, {"inputs": {**HERE, "question": LONG}}, 400, f"of the {SHORT_CONTEXT} of a window"),
    (ANSWERS, {"inputs": {**HERE, "context": LONG * 50}}, 400, "windows of"),
    (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 0}}, 400, "top_k"),
    (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 10**30}}, 400, "top_k"),
    (ANSWERS, {"inputs": HERE, "parameters": {"max_answer_len": 0}}, 400, "max_answer_len"),
    (ANSWERS, {"inputs": HERE, "parameters": {"max_seq_len": 65}}, 400, "max_seq_len"),
    (ANSWERS, {"inputs": HERE, "parameters": {"doc_stride": 64}}, 400, "doc_stride"),
    (ANSWERS, {"inputs": HERE, "parameters": {"doc_stride": -1}}, 400, "doc_stride"),
    (ANSWERS, {"inputs": HERE, "parameters": {"handle_impossible_answer": 1}}, 422, "impossible"),
    (ANSWERS, {"inputs": HERE, "parameters": {"other": 1}}, 422, "parameters.other"),
]


def assert_error(reply: httpx.Response, status: int, reason: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert reason in error["message"], error


@pytest.mark.parametrize(
    ("route", "body", "status", "reason"), WRONG, ids=lambda each: str(each)[:40]
)
def test_what_is_wrong_gets_its_status_and_the_reason(
    service: str, route: str, body: Any, status: int, reason: str
) -> None:
    if route == COMPLETIONS and isinstance(body, dict):
        body = {"prompt": "x", **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(service + route, content=content, headers=headers, timeout=30)
    assert_error(reply, status, reason)


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/classification", 405),
        ("GET", "/classification/nothing", 404),
        ("PUT", "/question-answering", 405),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff", 404),
    ],
)
def test_a_wrong_route_or_method_is_an_error_of_the_same_form(
    service: str, method: str, route: str, status: int
) -> None:
    assert_error(httpx.request(method, service + route), status, "")


def test_a_body_of_another_type_is_refused_with_the_remedy(service: str) -> None:
    reply = httpx.post(f"{service}/v1/completions", data={"prompt": "x"})
    assert_error(reply, 422, "Content-Type: application/json")


@pytest.mark.parametrize("route", [COMPLETIONS, CLASSIFICATION, ANSWERS])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(service: str, route: str, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'

    def parts() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    headers = {"Content-Type": "application/json"}
    content = parts() if chunked else body
    reply = httpx.post(service + route, content=content, headers=headers, timeout=30)
    assert_error(reply, 413, str(MAX_BODY_BYTES))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
def test_without_a_right_key_nothing_but_health_answers(
    service: str, headers: dict[str, Any]
) -> None:
    for method, route in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/nothing")):
        reply = httpx.request(method, f"{service}/guarded{route}", headers=headers)
        assert_error(reply, 401, "Authorization: Bearer")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{service}/guarded/health").status_code == 200


def test_each_of_the_keys_is_right(service: str) -> None:
    for key in (KEY, "another"):
        guarded = openai.OpenAI(base_url=f"{service}/guarded/v1", api_key=key, max_retries=0)
        reply = guarded.completions.create(model="org/guarded", prompt="x", max_tokens=2)
        assert reply.model == "org/guarded"
        assert guarded.models.retrieve("org/guarded").id == "org/guarded"
    wrong = openai.OpenAI(base_url=f"{service}/guarded/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_a_full_queue_answers_429_with_retry_after_and_takes_requests_again(service: str) -> None:
    """This service has room for one request in work and one that waits."""
    url = f"{service}/guarded/v1/completions"
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "x", "max_tokens": CONTEXT - 10, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as in_work:
        lines = in_work.iter_lines()  # by a name, since its end would be the stream's
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(4) as pool:
            small = {"prompt": "x", "max_tokens": 1}
            replies = list(
                pool.map(
                    lambda _: httpx.post(url, json=small, headers=headers, timeout=30), range(4)
                )
            )
    # More than one gets through only if the one in work ends meanwhile.
    assert {reply.status_code for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert_error(reply, 429, "try again later")
            assert int(reply.headers["retry-after"]) >= 1
    assert httpx.post(url, json=small, headers=headers, timeout=30).status_code == 200
    many = httpx.post(url, json={**small, "n": 5}, headers=headers)
    assert_error(many, 400, "5 outputs are more than")


@pytest.mark.parametrize(
    ("fields", "error", "status", "param", "code"),
    [
        ({"n": 0}, openai.BadRequestError, 400, "n", None),
        ({"prompt": LONG}, openai.BadRequestError, 400, "prompt", "context_length_exceeded"),
        ({"model": "another"}, openai.NotFoundError, 404, "model", "model_not_found"),
        ({"prompt": "x" * MAX_BODY_BYTES}, openai.APIStatusError, 413, None, None),
        ({"extra_body": {"no": 1}}, openai.UnprocessableEntityError, 422, "no", None),
    ],
    ids=lambda each: str(each)[:40],
)
def test_openais_client_tells_an_error_by_its_class(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    status: int,
    param: str | None,
    code: str | None,
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "generation", "prompt": "x", **fields})
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (
        status,
        param,
        code,
    )
    assert caught.value.body["message"] in caught.value.message  # type: ignore[index]


def test_openais_client_gets_through_to_a_full_service_by_trying_again(service: str) -> None:
    """The long request is in work, one more may wait, and the others are refused at first."""
    refused = asyncio.Event()
    waits: list[str] = []

    async def note(reply: Any) -> None:
        if reply.status_code == 429:
            waits.append(reply.headers["retry-after"])
            refused.set()

    async def ask() -> list[Any]:
        http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        url = f"{service}/guarded/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key=KEY, max_retries=8, http_client=http_client
        ) as client:
            model = {"model": "org/guarded", "prompt": "x"}
            long = await client.completions.create(
                **model, max_tokens=CONTEXT - 10, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(long)
            create = client.completions.with_raw_response.create
            asked = [asyncio.create_task(create(**model, max_tokens=1)) for _ in range(3)]
            await asyncio.wait_for(refused.wait(), 30)
            await long.close()
            return await asyncio.gather(*asked)

    replies = asyncio.run(ask())
    assert all(reply.parse().choices for reply in replies)
    assert sum(reply.retries_taken for reply in replies) == len(waits) >= 1
    assert all(int(wait) >= 1 for wait in waits)


@pytest.mark.parametrize("error", [OverloadedError("full"), UnavailableError("not now")], ids=str)
def test_openais_client_tries_again_after_both_errors_that_pass(error: APIError) -> None:
    app = new_app("a service that is in trouble once")
    asked: list[str] = []

    @app.post("/v1/completions")
    async def complete(request: Request) -> Completion:
        asked.append(request.headers["x-stainless-retry-count"])
        if len(asked) == 1:
            raise error
        return Completion(model="a-model", choices=[Choice(index=0, text="at last")])

    with listening(app) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1)
        reply = client.completions.create(model="a-model", prompt="x")
    assert reply.choices[0].text == "at last"
    assert asked == ["0", "1"]


def test_every_service_is_healthy_after_all_of_this(service: str) -> None:
    for route in ("/health", "/classification/health", "/question-answering/health"):
        reply = httpx.get(service + route)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
