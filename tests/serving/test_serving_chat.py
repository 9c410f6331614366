"""Chats by OpenAI's own client: a reply is the completion of the template's prompt."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from serving_client import CHATS, COMPLETIONS, assert_error, complete, greedy, text_of
from serving_models import KEY, PROMPTS, TEMPLATE, Models, served_with_adapters

from gptj.chat import ChatTemplate
from gptj.serving.chat.schemas import ChatRequest
from gptj.serving.completions.prompts import PromptResolver
from gptj.serving.completions.vocabulary import Vocabulary

pytest_plugins = ["serving_fixtures"]

USER = {"role": "user", "content": "Who wrote the book?"}
CHAT = [
    {"role": "system", "content": "The year 1907."},
    USER,
    {"role": "assistant", "content": "Anna"},
    {"role": "user", "content": "東京 is far away. 😀", "name": "Anna"},
]


def prompt_of(messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(TEMPLATE).render(messages, add_generation_prompt=True)


def chat(service: str, **fields: Any) -> dict[str, Any]:
    """The reply to a request; greedy, unless it says otherwise."""
    body = {"messages": [USER], "temperature": 0, "max_tokens": 12, **fields}
    reply = httpx.post(service + CHATS, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(service: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    body = {"messages": [USER], "temperature": 0, "max_tokens": 12, **fields, "stream": True}
    with httpx.stream("POST", service + CHATS, json=body, timeout=60) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
def test_an_endless_template_is_refused_while_others_are_answered(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads, for chats and for /tokenize."""
    monkeypatch.setattr("gptj.serving.chat.messages.MAX_SECONDS", 0.5)
    with served_with_adapters(models, template=ENDLESS) as service:

        async def check() -> None:
            async with httpx.AsyncClient(base_url=service, timeout=120) as client:
                paths = [*[CHATS] * 7, "/tokenize"]
                body = {"messages": [USER]}
                chats = [asyncio.ensure_future(client.post(path, json=body)) for path in paths]
                prompt = {"prompt": "a river " * 100, "max_tokens": 1}  # tokenized in a thread
                reply = await client.post(COMPLETIONS, json=prompt)
                assert reply.status_code == 200 and not all(chat.done() for chat in chats)
                for each in await asyncio.gather(*chats):
                    assert_error(each, 400, "takes more than 0.5 s of CPU time")
                    assert each.json()["error"]["code"] == "chat_template_error"

        asyncio.run(check())


def test_a_reply_is_the_completion_of_the_rendered_messages(
    client: openai.OpenAI, models: Models
) -> None:
    reply = client.chat.completions.create(
        model="generation",
        messages=CHAT,  # type: ignore[arg-type]
        max_completion_tokens=12,
        temperature=0,
    )
    prompt = prompt_of(CHAT)
    ids = greedy(models, prompt)
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.refusal is None
    assert choice.message.content == text_of(models, ids)
    assert choice.finish_reason == ("length" if len(ids) == 12 else "stop")
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(models.tokenizer.encode(prompt))
    assert reply.usage.completion_tokens == len(ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(ids)


def test_a_reply_can_be_sent_back_as_received(client: openai.OpenAI, models: Models) -> None:
    """The second prompt is the template's of all three messages, with the reply's text."""
    first = client.chat.completions.create(
        model="generation", messages=[USER], max_tokens=6, seed=1
    )
    message, question = first.choices[0].message, {"role": "user", "content": "And then?"}
    messages: list[Any] = [USER, message, question]
    second = client.chat.completions.create(
        model="generation", messages=messages, max_tokens=6, seed=1
    )
    text = {"role": "assistant", "content": message.content}
    prompt = prompt_of([USER, text, question])
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(models.tokenizer.encode(prompt))


def test_histories_of_openais_replies_are_accepted(service: str) -> None:
    answer = {"role": "assistant", "content": "Anna"}
    saved = {"annotations": [], "refusal": None, "audio": None, "function_call": None}
    for calls in (None, []):
        messages = [USER, {**answer, **saved, "tool_calls": calls}, USER]
        expected = chat(service, messages=[USER, answer, USER])["choices"]
        assert chat(service, messages=messages)["choices"] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"job": "7"}, "service_tier": "auto", "store": False},
        {"prompt_cache_key": "a", "safety_identifier": "b", "user": "c"},
        {"echo": False, "add_special_tokens": False, "documents": None, "chat_template": None},
        {"priority": 0, "tools": None, "tool_choice": None, "function_call": "none"},
    ],
)
def test_fields_without_effect_are_accepted(service: str, fields: dict[str, Any]) -> None:
    assert chat(service, **fields)["choices"] == chat(service)["choices"]


def test_max_tokens_defaults_to_the_rest_of_the_context(service: str, models: Models) -> None:
    eos = str(models.tokenizer.eos_token_id)
    fields = {"max_tokens": None, "logit_bias": {eos: 100}, "min_tokens": 30, "temperature": 0}
    reply = chat(service, **fields)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 31  # 16 would be completions' default


@pytest.mark.parametrize(("cache_tokens", "limit"), [(64, 40), (10_000, 76), (8, 1)])
def test_default_max_tokens_are_limited_by_the_cache(
    models: Models, cache_tokens: int, limit: int
) -> None:
    vocabulary = Vocabulary.of(models.tokenizer, models.generation.config.vocab_size)
    resolver = PromptResolver(
        models.tokenizer,
        vocabulary,
        context_length=100,
        cache_tokens=cache_tokens,
        max_queued=8,
    )
    request = ChatRequest.model_validate({"messages": [USER]})
    (prompt,) = resolver.resolve(request, [24 * [5]])
    assert [each.max_tokens for each in prompt.params] == [limit]
    beams = request.model_copy(update={"use_beam_search": True, "n": 2})
    (prompt,) = resolver.resolve(beams, [24 * [5]])
    assert prompt.params[0].max_tokens == {64: 8, 10_000: 76, 8: 1}[cache_tokens]


def test_a_streams_chunks_add_up_to_the_reply(client: openai.OpenAI, service: str) -> None:
    fields: Any = {"model": "generation", "messages": CHAT, "max_tokens": 12, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**fields)
    texts, reasons = ["", ""], [None, None]
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    begun = set()
    for chunk in chunks[:-1]:
        assert chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id
        assert chunk.usage is None
        for choice in chunk.choices:
            first = choice.index not in begun
            begun.add(choice.index)
            assert choice.delta.role == ("assistant" if first else None)
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None and whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_the_clients_stream_helper_collects_the_reply(client: openai.OpenAI) -> None:
    fields: Any = {"model": "generation", "messages": [USER], "max_tokens": 8, "temperature": 0}
    with client.chat.completions.stream(**fields, logprobs=True, top_logprobs=2) as stream:
        stream.until_done()
        collected = stream.current_completion_snapshot.choices[0]
    reply = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2).choices[0]
    assert collected.message.content == reply.message.content
    assert collected.finish_reason == reply.finish_reason
    assert collected.logprobs is not None and reply.logprobs is not None
    theirs, ours = collected.logprobs.content, reply.logprobs.content
    assert theirs is not None and ours is not None
    assert [each.token for each in theirs] == [each.token for each in ours]


def test_chat_logprobs_equal_those_of_completions(service: str, models: Models) -> None:
    fields = {"max_tokens": 10, "temperature": 0}
    plain = complete(service, prompt=prompt_of([USER]), logprobs=3, **fields)["choices"][0]
    choice = chat(service, logprobs=True, top_logprobs=3, **fields)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert [entry["token"] for entry in entries] == plain["logprobs"]["tokens"]
    assert [entry["logprob"] for entry in entries] == plain["logprobs"]["token_logprobs"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert text.decode(errors="replace").startswith(choice["message"]["content"].rstrip("\ufffd"))
    for entry, top in zip(entries, plain["logprobs"]["top_logprobs"], strict=True):
        assert len(entry["top_logprobs"]) == 3
        for each in entry["top_logprobs"]:
            assert top[each["token"]] == each["logprob"]
            assert len(each["bytes"]) >= 1
    bare = chat(service, logprobs=True, **fields)["choices"][0]["logprobs"]["content"]
    assert bare == [{**entry, "top_logprobs": []} for entry in entries]
    assert chat(service, **fields)["choices"][0]["logprobs"] is None
    chunks = streamed(service, logprobs=True, top_logprobs=3, **fields)
    parts = [each for chunk in chunks for each in chunk["choices"][0]["logprobs"]["content"]]
    assert parts == entries


def test_a_chat_ends_at_the_requests_stops_and_at_the_templates(
    service: str, models: Models
) -> None:
    text = text_of(models, greedy(models, prompt_of([USER])))
    stop = text[3:5]
    for field in (stop, ["@@", stop], ["@", *(f"{n}@" for n in range(14)), stop]):
        choice = chat(service, stop=field)["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    bias = {str(models.tokenizer.encode(each)[0]): 100 for each in ("\n", ">")}
    choice = chat(service, logit_bias=bias, max_tokens=40, temperature=1, seed=1)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n>")


def test_beams_and_several_replies(service: str, models: Models) -> None:
    prompt = prompt_of([USER])
    body = {"use_beam_search": True, "n": 3}
    theirs = complete(service, prompt=prompt, **body)["choices"]
    ours = chat(service, **body)["choices"]
    assert [each["message"]["content"] for each in ours] == [each["text"] for each in theirs]


def test_content_parts_and_the_developer_role_are_accepted(service: str) -> None:
    system = {"role": "system", "content": "The year\n1907."}
    expected = chat(service, messages=[system, USER])
    parts = [{"type": "text", "text": "The year"}, {"type": "text", "text": "1907."}]
    for role in ("system", "developer"):
        reply = chat(service, messages=[{"role": role, "content": parts}, USER])
        assert reply["choices"] == expected["choices"]
        assert reply["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_token_ids_are_there_if_requested(service: str, models: Models) -> None:
    prompt = models.tokenizer.encode(prompt_of([USER]))
    new = greedy(models, prompt)
    reply = chat(service, return_token_ids=True)
    assert reply["prompt_token_ids"] == prompt
    assert reply["choices"][0]["token_ids"] == new
    chunks = streamed(service, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == prompt  # where a whole reply has them
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == new
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    assert not any("prompt_token_ids" in chunk["choices"][0] for chunk in chunks)
    several = streamed(service, return_token_ids=True, n=2)
    firsts = [chunk for chunk in several if "role" in chunk["choices"][0]["delta"]]
    assert [chunk["prompt_token_ids"] for chunk in firsts] == [prompt, prompt]
    plain = chat(service)
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


def test_the_final_message_is_continued(service: str, models: Models) -> None:
    begun = {"role": "assistant", "content": "Anna wrote "}
    prompt = f"{prompt_of([USER])} Anna wrote "
    expected = complete(service, prompt=prompt, max_tokens=12)["choices"][0]["text"]
    for content in (begun["content"], [{"type": "text", "text": begun["content"]}]):
        for more in ({}, {"add_generation_prompt": False}):
            messages = [USER, {**begun, "content": content}]
            reply = chat(service, messages=messages, continue_final_message=True, **more)
            assert reply["choices"][0]["message"]["content"] == expected
            body = {"messages": messages, "continue_final_message": True, **more}
            tokens = httpx.post(f"{service}/tokenize", json=body).json()["tokens"]
            assert tokens == models.tokenizer.encode(prompt)


def test_chats_are_tokenized_as_they_are_answered(service: str, models: Models) -> None:
    for fields, begins in (({}, True), ({"add_generation_prompt": False}, False)):
        text = ChatTemplate(TEMPLATE).render(CHAT, add_generation_prompt=begins)
        reply = httpx.post(f"{service}/tokenize", json={"messages": CHAT, **fields}).json()
        assert reply["tokens"] == models.tokenizer.encode(text)
        assert reply["count"] == chat(service, messages=CHAT, **fields)["usage"]["prompt_tokens"]
    for body in ({}, {"prompt": "x", "messages": CHAT}):
        reply = httpx.post(f"{service}/tokenize", json=body)
        assert_error(reply, 400, "needs either prompt or messages")


def test_a_templates_variables_can_be_set(models: Models) -> None:
    template = "{{ mood or 'calm' }}{% for m in messages %}: {{ m.content }}{% endfor %}"
    with served_with_adapters(models, template=template) as service:
        for kwargs, text in (({}, "calm"), ({"mood": "glad"}, "glad"), ({"mood": None}, "calm")):
            body = {"messages": [USER], "chat_template_kwargs": kwargs}
            reply = httpx.post(f"{service}/tokenize", json=body).json()
            assert reply["tokens"] == models.tokenizer.encode(f"{text}: {USER['content']}")


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
TOOL = {"type": "function", "function": {"name": "f"}}
WRONG: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "at least one message", "messages"),
    ({"messages": None}, 422, "messages", "messages"),
    ({"messages": "hello"}, 422, "messages", "messages"),
    ({"messages": [{"role": "user"}]}, 400, "needs content", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, 422, "must be a string", None),
    ({"messages": [{"role": "user", "content": []}]}, 400, "needs content", None),
    ({"messages": [{"content": "x"}]}, 422, "role", "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 422, "role", "messages[0].role"),
    ({"messages": [USER, {**USER, "content": [IMAGE]}]}, 400, "reads only text", None),
    ({"messages": [{**USER, "content": [{"type": "text"}]}]}, 422, "must have a text", None),
    ({"messages": [{**USER, "content": [{"text": "x"}]}]}, 422, '"type": "text"', None),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "does not call tools", None),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [TOOL]}]},
        400,
        "does not call tools",
        "messages[1]",
    ),
    ({"tools": [TOOL]}, 400, "tools: this service does not call tools", "tools"),
    ({"functions": [TOOL]}, 400, "does not call tools", "functions"),
    *(
        ({field: choice}, 400, f"{field}: this service does not call tools", field)
        for field, choice in (
            ("tool_choice", "required"),
            ("tool_choice", {"type": "function", "function": {"name": "f"}}),
            ("tool_choice", {"type": "allowed_tools", "allowed_tools": {}}),
            ("function_call", {"name": "f"}),
            ("function_call", "f"),
        )
    ),
    (
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]},
        400,
        "does not call tools",
        "messages[1]",
    ),
    ({"messages": [USER, USER]}, 400, "roles must alternate", "messages"),
    ({"max_tokens": 0}, 400, "max_tokens must be 1 or more", "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": -1}, 400, "1 or more, got -1",
     "max_completion_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "set the same limit", "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 2048}, 400, "lower max_completion_tokens",
     "max_completion_tokens"),
    ({"messages": [{**USER, "content": "x " * 5000}]}, 400, "context is 2048", "messages"),
    ({"top_logprobs": 1}, 400, "needs logprobs=true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs must be in", "top_logprobs"),
    ({"logprobs": 2}, 422, "logprobs", "logprobs"),
    ({"n": 0}, 400, "n must be 1", "n"),
    ({"n": 129}, 400, "exceed the limit of 128", "n"),
    ({"n": 100, "max_tokens": 1000, "logprobs": True, "top_logprobs": 20}, 400,
     "may have 2100000 logprobs, more than 500000", "top_logprobs"),
    ({"temperature": -1}, 400, "temperature", "temperature"),
    ({"min_tokens": 13}, 400, "min_tokens", "min_tokens"),
    ({"stop": [""]}, 422, "empty string", "stop"),
    ({"stream_options": {}}, 400, "needs stream=true", "stream_options"),
    ({"prompt": "x"}, 422, "unknown field", "prompt"),
    ({"model": "another"}, 404, "does not exist", "model"),
    ({"use_beam_search": True, "stream": True}, 400, "does not work with stream", "stream"),
    ({"store": True}, 422, "store", "store"),
    ({"continue_final_message": True}, 400, "the role assistant", None),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "does not work with add_generation_prompt",
        "continue_final_message",
    ),
    *(
        ({"chat_template_kwargs": kwargs}, 400, reason, "chat_template_kwargs")
        for kwargs, reason in (
            ({"messages": []}, "must not set 'messages'"),
            ({"raise_exception": "x"}, "must not set 'raise_exception'"),
            ({"_generation_start": "x"}, "must not set '_generation"),
            ({"x": "a" * 2**14}, "characters in total"),
            ({f"x{number}": 1 for number in range(33)}, "may have 32 fields"),
            ({"x": "\ud800"}, "surrogate"),
        )
    ),
    ({"echo": True}, 422, "echo", "echo"),
    ({"priority": 1}, 422, "priority", "priority"),
    ({"reasoning_effort": "high"}, 422, "unknown field", "reasoning_effort"),
    ({"modalities": ["audio"]}, 422, "modalities", None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "reason", "param"), WRONG)
def test_invalid_requests_get_a_status_and_the_reason(
    service: str, fields: dict[str, Any], status: int, reason: str, param: str | None
) -> None:
    body = {"messages": [USER], "max_tokens": 12, **fields}
    reply = httpx.post(service + CHATS, content=json.dumps(body), timeout=30)
    assert_error(reply, status, reason)
    if param is not None:
        assert reply.json()["error"]["param"] == param


def test_without_a_template_the_error_says_how_to_set_one(service: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for stream in (False, True):
        body = {"messages": [USER], "stream": stream}
        reply = httpx.post(f"{service}/guarded{CHATS}", json=body, headers=headers, timeout=30)
        assert_error(reply, 400, "args.chat_template")
        assert reply.json()["error"]["code"] == "no_chat_template"
    body = {"prompt": "x", "max_tokens": 1}
    reply = httpx.post(f"{service}/guarded{COMPLETIONS}", json=body, headers=headers, timeout=30)
    assert reply.status_code == 200


@pytest.mark.slow
def test_lm_evals_chat_results_equal_transformers_in_process(
    service: str, models: Models, tmp_path: Path
) -> None:
    """The same task by lm_eval's classes for chat services and for models of transformers."""
    from lm_eval import simple_evaluate  # here, since it takes seconds
    from lm_eval.tasks import TaskManager

    folder = str(tmp_path / "model")
    tokenizer = copy.deepcopy(models.tokenizer)
    tokenizer.chat_template = TEMPLATE
    models.generation.save_pretrained(folder, tokenizer=tokenizer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": each, "right": "x"}) + "\n" for each in PROMPTS))
    task = {
        "task": "chats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "generate_until",
        "description": "The year 1907.",  # the system message
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": ["\n>", "e"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "chats.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    replies = []
    for model, arguments in (
        ("hf", {"pretrained": folder, "dtype": "float32", "device": "cpu", "batch_size": 1}),
        ("local-chat-completions", {"model": "generation", "base_url": service + CHATS}),
    ):
        results = simple_evaluate(
            model, arguments, ["chats"], task_manager=manager, apply_chat_template=True
        )
        assert results is not None
        samples = sorted(results["samples"]["chats"], key=lambda sample: sample["doc_id"])
        replies.append([sample["resps"] for sample in samples])
    assert replies[0] == replies[1]
    assert len({str(each) for each in replies[0]}) > 1
