"""jobs/batch_inference.py without its cluster: answers to rows, and to OpenAI's batch files."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
import os
import pickle
import re
import shutil
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from serving_client import CHATS, COMPLETIONS, EMBEDDINGS, greedy, text_of
from serving_models import PROMPTS, SENTENCES, TEMPLATE, Models

from deployments.in_process import InProcessService
from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.checkpoints.manifest import verify
from gptj.data.answers import Chunk, Entry, Index, Plan, Record, begin, chunks, finish, write
from gptj.data.rows import DataError
from gptj.data.sources import read_rows
from gptj.serving.errors import UnavailableError
from gptj.storage.lease import Claim, LeaseLostError
from jobs import batch_inference
from jobs.batch_inference import (
    Answerer,
    Task,
    Worker,
    _pickled,
    check_custom_ids,
    holding,
    main,
    planned,
    read_settings,
)

pytest_plugins = ["serving_fixtures"]

FP32 = "args.dtype=float32"


@pytest.fixture(scope="module")
def addresses(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The models' folders by their heads."""
    folder = tmp_path_factory.mktemp("batch")
    for name in ("generation", "classification", "question_answering"):
        model = models.with_unused_ids() if name == "generation" else getattr(models, name)
        model.save_pretrained(folder / name, tokenizer=models.tokenizer)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "output")


def run(*words: str, most: int | None = None) -> Index | None:
    """What the job does, in this process; with `most`, only that many chunks."""
    task, plan = planned(read_settings(words))
    folder = words[2]
    if (done := begin(plan, folder)) is not None:
        return done
    if task.is_batch:
        check_custom_ids(plan)
    records: list[Record] = []

    async def answer_chunks(answerer: Answerer) -> None:
        for part in range(len(plan.parts)):
            for chunk in chunks(plan, part):
                if most is not None and len(records) == most:
                    return
                record = Record.find(folder, chunk)
                records.append(record or await answerer.answer(chunk))

    service = InProcessService.load(task.service, task.arguments, torch.device("cpu"))
    with closing(service):
        asyncio.run(answer_chunks(Answerer(service, task, plan, folder)))
    return finish(plan, folder, records) if most is None else None


def lines(folder: str, kind: str) -> list[dict[str, Any]]:
    """Of all files of a kind, in the order of their names; strictly JSON, without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for file in sorted(Path(folder).glob(f"{kind}*.jsonl"))
        for line in file.read_text().removesuffix("\n").split("\n")
    ]


def written(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in rows)
    )
    return str(path)


def test_prompts_are_completed_as_over_http_and_bad_rows_go_to_the_errors(
    addresses: Mapping[str, str], models: Models, tmp_path: Path, output: str
) -> None:
    rows: list[Any] = [{"text": text, "id": f"n{n}"} for n, text in enumerate(PROMPTS)]
    rows[1]["id"] = float("nan")  # as a table has it
    rows[2:2] = ["{", {"text": 5, "id": "five"}, {"id": "none"}, {"text": "x" * 5000, "id": "long"}]
    written(tmp_path / "data/a.jsonl", rows)
    written(tmp_path / "data/b.jsonl", [{"text": "Paris", "id": 7}])
    words = ["parameters.temperature=0", "parameters.max_tokens=6", "keep=id", "chunk_rows=4", FP32]
    index = run(addresses["generation"], str(tmp_path / "data"), output, *words)
    assert index is not None and (index.rows, index.failed) == (10, 4)
    verify(output)
    assert not Path(output, "unfinished").exists()
    found = lines(output, "output")
    places = [("a.jsonl", n) for n in (1, 2, 7, 8, 9)] + [("b.jsonl", 1)]
    assert [(each["file"], each["row"]) for each in found] == places
    assert [each["id"] for each in found] == ["n0", None, "n2", "n3", "n4", 7]
    for each, prompt in zip(found, [*PROMPTS, "Paris"], strict=True):
        assert each["completion"] == text_of(models, greedy(models, prompt, max_new_tokens=6))
    errors = lines(output, "errors")
    assert [(each["file"], each["row"]) for each in errors] == [
        ("a.jsonl", n) for n in (3, 4, 5, 6)
    ]
    reasons = [each["error"]["message"] for each in errors]
    for reason, part in zip(
        reasons, ("JSON", "must be text, got 5", "no column 'text'", "context is 2048"), strict=True
    ):
        assert part in reason
    assert errors[3]["id"] == "long" and errors[3]["error"]["code"] == "context_length_exceeded"


def test_every_row_is_answered_once_however_often_a_run_is_interrupted(
    addresses: Mapping[str, str], tmp_path: Path, output: str
) -> None:
    rows = [{"text": SENTENCES[n % 3][: n + 1], "n": n} for n in range(20)]
    rows[7]["text"] = ""
    data = written(tmp_path / "rows.jsonl", rows)
    words = [addresses["classification"], data, output, "keep=[n]", "chunk_rows=3", FP32]
    for most in (1, 3):
        assert run(*words, most=most) is None
        assert not Path(output, "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in Path(output).glob("*.jsonl")}
    assert done.keys() == {f"output-00000-0000{n}.jsonl" for n in range(3)} | {
        "errors-00000-00002.jsonl"
    }
    # What a killed worker has left without its record.
    Path(output, "errors-00000-00004.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError, match="was started with different parameters: choose another folder"
    ):
        run(*words, "parameters.top_k=1")
    index = run(*words)
    assert index is not None and (index.rows, index.failed) == (20, 1)
    assert {name: Path(output, name).stat().st_mtime_ns for name in done} == done
    numbers = [each["n"] for each in lines(output, "output")]
    assert numbers == [n for n in range(20) if n != 7]
    assert [each["n"] for each in lines(output, "errors")] == [7]
    assert lines(output, "errors")[0]["error"]["message"] == "inputs is empty"
    verify(output)
    assert run(*words) == index  # again: nothing is left to do
    other = written(tmp_path / "other.jsonl", rows[:3])
    with pytest.raises(DataError, match="was started with different address, parts, sizes"):
        run(words[0], other, *words[2:])


def test_answers_are_to_the_rows_that_the_files_have(
    addresses: Mapping[str, str], tmp_path: Path, output: str
) -> None:
    """Whatever their size; a copy of the same rows has the same answers."""
    data = written(tmp_path / "rows.jsonl", [{"text": "Anna"}, {"text": "Paris"}, {"text": "x"}])
    words = [addresses["classification"], data, output, "chunk_rows=1", FP32]
    assert run(*words, most=3) is None
    size = Path(data).stat().st_size
    # As many bytes in fewer rows, before the end.
    written(tmp_path / "rows.jsonl", [{"text": "Anna"}, {"text": "Maria" + " " * 14}])
    assert Path(data).stat().st_size == size
    first = Path(output, "output-00000-00000.jsonl")
    kept = first.stat().st_mtime_ns
    index = run(*words)
    assert index is not None and index.rows == 2
    assert first.stat().st_mtime_ns == kept
    verify(output)
    assert len(lines(output, "output")) == 2
    # The same after it.
    content = Path(data).read_text()
    Path(data).unlink()
    Path(data).write_text(content)
    assert run(*words) == index
    Path(data).write_text(content.replace("Anna", "Otto"))
    with pytest.raises(DataError, match="was made from other rows"):
        run(*words)


def save_adapter(models: Models, base: str, folder: Path, seed: int, *, as_peft: bool) -> None:
    """An adapter of the base with random weights; `as_peft` leaves out what PEFT does not write."""
    shutil.rmtree(folder, ignore_errors=True)
    model = copy.deepcopy(models.with_unused_ids())
    add_lora(model, LoRAConfig(2))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.5)
    model.save_adapter(str(folder), base=Base.at(base))
    if as_peft:
        for name in ("manifest.json", "base.json", "config.json", "training.json"):
            (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize("as_peft", [False, True])
@pytest.mark.parametrize("place", ["adapters", "adapter_root", "batch file", "checkpoint"])
def test_a_replaced_adapter_is_not_taken_for_the_one_that_answered(
    addresses: Mapping[str, str],
    models: Models,
    tmp_path: Path,
    output: str,
    place: str,
    as_peft: bool,
) -> None:
    """Whether the run is complete or not: its answers would be the old adapter's, or of both."""
    base = addresses["generation"]
    adapter = tmp_path / "root" / "style"
    save_adapter(models, base, adapter, 0, as_peft=as_peft)
    if place == "checkpoint":
        models.tokenizer.save_pretrained(adapter)  # it needs none of the base's
    data = written(tmp_path / "rows.jsonl", [{"text": SENTENCES[n]} for n in range(2)])
    words = [
        base,
        data,
        output,
        "chunk_rows=1",
        "parameters.max_tokens=4",
        "parameters.temperature=0",
        FP32,
    ]
    if place == "checkpoint":
        words[0] = str(adapter)
    elif place == "adapters":
        words += [f"args.adapters={{style: {adapter}}}", "parameters.model=style"]
    else:
        words += [f"args.adapter_root={adapter.parent}", "parameters.model=style"]
    if place == "batch file":
        body = {"prompt": "The tower", "max_tokens": 4, "temperature": 0}
        asked = [
            request(name, COMPLETIONS, **body, model=name) for name in ("style", "none", "..", "")
        ]
        words[1] = written(tmp_path / "batch.jsonl", [*asked, request("b", COMPLETIONS, **body)])
        words = [word for word in words if not word.startswith("parameters.")]
    assert run(*words, most=1) is None
    other = [*words[:2], str(tmp_path / "complete"), *words[3:]]
    index = run(*other)
    assert index is not None and run(*other) == index
    save_adapter(models, base, adapter, 1, as_peft=as_peft)
    if place == "checkpoint":
        models.tokenizer.save_pretrained(adapter)
    different = "digest" if place == "checkpoint" else "adapter_digests"
    for each in (words, other):
        with pytest.raises(DataError, match=f"was started with different {different}: choose"):
            run(*each)


def test_a_replaced_template_is_not_taken_for_the_one_that_answered(
    addresses: Mapping[str, str], tmp_path: Path, output: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    data = written(tmp_path / "rows.jsonl", [{"messages": HELLO}])
    words = [addresses["generation"], data, output, f"args.chat_template={template}"]
    assert begin(planned(read_settings(words))[1], output) is None
    assert begin(planned(read_settings(words))[1], output) is None
    template.write_text(TEMPLATE + "!")
    with pytest.raises(DataError, match="was started with different template_digest: choose"):
        begin(planned(read_settings(words))[1], output)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_replaced_model_without_a_manifest_is_noticed(
    addresses: Mapping[str, str], tmp_path: Path, output: str, changed: str
) -> None:
    """By each of its files, whatever others, such as answers, are written into its folder."""
    model = Path(shutil.copytree(addresses["classification"], tmp_path / "model"))
    (model / "manifest.json").unlink()
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    words = [str(model), data, output]
    assert begin(planned(read_settings(words))[1], output) is None
    (model / "answers").mkdir()
    (model / "answers" / "output-00000-00000.jsonl").write_text("{}\n")
    (model / "README.md").write_text("A model.")
    assert begin(planned(read_settings(words))[1], output) is None
    content = (model / changed).read_bytes()
    (model / changed).unlink()
    (model / changed).write_bytes(content)
    with pytest.raises(DataError, match="was started with different digest: choose another"):
        begin(planned(read_settings(words))[1], output)


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_unavailable_is_asked_again_unless_the_model_died(
    addresses: Mapping[str, str],
    tmp_path: Path,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    dies: bool,
) -> None:
    """It is no row's fault, and must not become its answer."""
    monkeypatch.setattr(batch_inference, "UNAVAILABLE_PAUSE_SECONDS", 0.0)
    data = written(tmp_path / "rows.jsonl", [{"text": "Anna"}])
    task, plan = planned(read_settings([addresses["classification"], data, output, FP32]))
    assert begin(plan, output) is None
    asked = 0

    async def classify(request: Any) -> Any:
        nonlocal asked
        asked += 1
        if dies or asked < 4:
            raise UnavailableError("the adapter cannot be read")
        return [[{"label": "good", "score": 1.0}]]

    service = InProcessService(
        {"/classification": classify}, lambda _: not dies, (), rows_at_once=1,
        ignore_unknown_fields=False,
    )  # fmt: skip
    answer = Answerer(service, task, plan, output).answer(next(chunks(plan, 0)))
    if dies:
        with pytest.raises(RuntimeError, match="has stopped working"):
            asyncio.run(answer)
        return
    assert asyncio.run(answer).failed == 0
    assert asked == 4 and lines(output, "output")[0]["labels"][0]["label"] == "good"


def test_other_heads_answer_as_over_http(
    addresses: Mapping[str, str], models: Models, tmp_path: Path, service: str
) -> None:
    """The other heads, each as over HTTP."""
    rows = [{"text": "Paris", "text_pair": "Anna", "question": "Who?", "context": SENTENCES[2]}]
    data = written(tmp_path / "rows.jsonl", rows)
    pair = {name: rows[0][name] for name in ("text", "text_pair")}
    run(addresses["classification"], data, str(tmp_path / "1"), "parameters.top_k=2", FP32)
    (line,) = lines(str(tmp_path / "1"), "output")
    body = {"inputs": pair, "parameters": {"top_k": 2}}
    (expected,) = httpx.post(f"{service}/classification", json=body).json()
    assert [each["label"] for each in line["labels"]] == [each["label"] for each in expected]

    run(addresses["question_answering"], data, str(tmp_path / "2"), "parameters.top_k=2", FP32)
    (line,) = lines(str(tmp_path / "2"), "output")
    inputs = {name: rows[0][name] for name in ("question", "context")}
    body = {"inputs": inputs, "parameters": {"top_k": 2}}
    expected = httpx.post(f"{service}/question-answering", json=body).json()
    assert [each["answer"] for each in line["answers"]] == [each["answer"] for each in expected]

    run(addresses["generation"], data, str(tmp_path / "3"), "service=embeddings", FP32)
    (line,) = lines(str(tmp_path / "3"), "output")
    expected = httpx.post(service + EMBEDDINGS, json={"input": "Paris"}).json()["data"][0]
    assert line["embedding"] == pytest.approx(expected["embedding"], abs=1e-5)

    (tmp_path / "chats.csv").write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""x""}]"\n[\n'
    )
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    words = [f"args.chat_template={template}", "parameters.max_tokens=4", "parameters.n=2", FP32]
    run(addresses["generation"], str(tmp_path / "chats.csv"), str(tmp_path / "4"), *words)
    (line,) = lines(str(tmp_path / "4"), "output")
    assert [each["finish_reason"] for each in line["choices"]] == ["length"] * 2
    (error,) = lines(str(tmp_path / "4"), "errors")
    assert "is not valid JSON" in error["error"]["message"]


def request(custom_id: Any, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


HELLO = [{"role": "user", "content": "Who wrote the book?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "model": "generation"}


@pytest.mark.slow
def test_openais_batch_file_gives_openais_result_files(
    addresses: Mapping[str, str], models: Models, tmp_path: Path, output: str, service: str
) -> None:
    """Each reply and each refusal is what the HTTP service answers to the same body."""
    requests = [
        request("a", COMPLETIONS, **GREEDY, prompt="The tower"),
        request("b", CHATS, **GREEDY, messages=HELLO),
        request("c", COMPLETIONS, **GREEDY, prompt=["x", "y"], logprobs=2),
        request("d", COMPLETIONS, **{**GREEDY, "max_tokens": -1}, prompt="x"),
        request("e", COMPLETIONS, **GREEDY, prompt="x", unknown=1),
        request("f", COMPLETIONS, **{**GREEDY, "model": "other"}, prompt="x"),
        request("g", CHATS, **GREEDY, messages=[]),
        request("h", COMPLETIONS, **GREEDY, prompt="x", response_format={"type": "json_schema"}),
        {"custom_id": "i", "method": "POST", "url": COMPLETIONS, "body": []},
        request("j", "/v1/images", prompt="x"),
        request("k", COMPLETIONS, **GREEDY, prompt="x", stream=True),
        {**request("l", COMPLETIONS, **GREEDY, prompt="x"), "method": "GET"},
        request(5, COMPLETIONS, **GREEDY, prompt="x"),
    ]
    data = written(tmp_path / "batch.jsonl", [*requests, "no JSON"])
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    words = [f"args.chat_template={template}", "chunk_rows=5", FP32]
    index = run(addresses["generation"], data, output, *words)
    assert index is not None and (index.rows, index.failed) == (14, 11)
    verify(output)
    assert {path.name for path in Path(output).iterdir()} == {
        "output.jsonl", "errors.jsonl", "index.json", "manifest.json",
    }  # fmt: skip
    found, errors = lines(output, "output"), lines(output, "errors")
    assert [each["custom_id"] for each in found] == ["a", "b", "c"]
    assert [each["custom_id"] for each in errors] == [*"defghijkl", 5, None]
    assert len({each["id"] for each in found + errors}) == 14
    for each in found:
        assert each.keys() == {"id", "custom_id", "response", "error"}
        assert each["error"] is None and each["response"]["status_code"] == 200
    for kind, each in zip((Completion, ChatCompletion, Completion), found, strict=True):
        kind.model_validate(each["response"]["body"])  # type: ignore[attr-defined]
    by_id = {each["custom_id"]: each for each in found + errors}
    for asked in requests[:9]:
        reply = httpx.post(service + asked["url"], json=asked["body"], timeout=60)
        response = by_id[asked["custom_id"]]["response"]
        assert response["status_code"] == reply.status_code, asked
        if reply.status_code == 200:
            theirs = reply.json()["choices"]
            assert len(response["body"]["choices"]) == len(theirs)
            for one, other in zip(response["body"]["choices"], theirs, strict=True):
                for name in ("text", "message", "finish_reason"):
                    assert one.get(name) == other.get(name)
        else:
            theirs = reply.json()
            if asked["custom_id"] == "i":  # where a header may be the reason
                theirs["error"]["message"] = "the body must be a JSON object"
            assert response["body"] == theirs
    assert by_id["j"]["response"]["status_code"] == 404
    assert "stream=true" in by_id["k"]["response"]["body"]["error"]["message"]
    assert by_id["l"]["response"] is None
    assert "must be POST, got 'GET'" in by_id["l"]["error"]["message"]
    assert "must be text, got 5" in errors[-2]["error"]["message"]
    assert errors[-1]["response"] is None and "row 14" in errors[-1]["error"]["message"]

    data = written(tmp_path / "unknown.jsonl", [requests[4]])
    ignored = run(addresses["generation"], data, str(tmp_path / "7"), "args.unknown_fields=ignore")
    assert ignored is not None and ignored.failed == 0
    data = written(tmp_path / "twice.jsonl", [requests[0], requests[1], requests[0]])
    with pytest.raises(DataError, match="row 3, column 'custom_id': duplicate: 'a'"):
        run(addresses["generation"], data, str(tmp_path / "twice"), *words)


@pytest.mark.parametrize("has_method", [True, False])
def test_every_request_that_is_an_object_keeps_its_id(
    addresses: Mapping[str, str], tmp_path: Path, output: str, has_method: bool
) -> None:
    """`method` may be left out by any of them, whether the first has it or not."""
    good = {**GREEDY, "prompt": "x"}
    first = request("a", COMPLETIONS, **good)
    if not has_method:
        del first["method"]
    rest: list[Any] = [
        request("b", COMPLETIONS, **good),
        {"custom_id": "c", "url": COMPLETIONS, "body": good},
        {"custom_id": "d", "method": None, "url": COMPLETIONS, "body": good},
        {"custom_id": "e", "method": "PUT", "url": COMPLETIONS, "body": good},
        {"custom_id": "f", "method": "POST", "body": good},
        {"custom_id": "g", "url": None, "body": good},
        {"custom_id": "h", "url": COMPLETIONS},
        {"custom_id": "i", "url": COMPLETIONS, "body": None},
        {"custom_id": "j", "url": COMPLETIONS, "body": json.dumps(good)},
        '{"custom_id": "k", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}',
        '{"custom_id": "l", "url": "/v1/completions", "url": "/v1/completions", "body": {}}',
        '{"custom_id": "m", "method": "POST", "method": "POST", "url": "x", "body": {}}',
        '{"custom_id": "n\\ud800", "url": "/v1/completions", "body": {}}',
        {"custom_id": 5, "url": COMPLETIONS, "body": good},
        {"url": COMPLETIONS, "body": good},
        "[]",
        '{"custom_id": "p", "url": "/v1/comple',
    ]
    data = written(tmp_path / "batch.jsonl", [first, *rest])
    index = run(addresses["generation"], data, output, FP32, "chunk_rows=7")
    assert index is not None and (index.rows, index.failed) == (18, 14)
    assert [each["custom_id"] for each in lines(output, "output")] == ["a", "b", "c", "d"]
    errors = lines(output, "errors")
    assert [each["custom_id"] for each in errors] == [*"efghijklm", "n\ud800", 5, None, None, None]
    for each in errors:
        assert (each["response"] is None) != (each["error"] is None)
    by_id = {each["custom_id"]: each for each in errors}
    assert "no column 'url'; there are 'custom_id', 'method'" in by_id["f"]["error"]["message"]
    assert "'method': must be POST, got 'PUT'" in by_id["e"]["error"]["message"]
    again = written(tmp_path / "twice.jsonl", [first, {"custom_id": "a", "body": good}])
    with pytest.raises(DataError, match=r"twice.jsonl, row 2, column 'custom_id': duplicate: 'a'"):
        run(addresses["generation"], again, str(tmp_path / "twice"), FP32)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_of_requests_need_no_method(
    addresses: Mapping[str, str], tmp_path: Path, output: str, ending: str
) -> None:
    """One file may have the column, and another not."""
    one = {"custom_id": ["a", "b"], "url": [COMPLETIONS] * 2, "body": ["{}", "{}"]}
    two = {**one, "custom_id": ["c", "d"], "verb": ["", "GET"]}
    (tmp_path / "data").mkdir()
    for name, columns in (("1", one), ("2", two)):
        table, file = pyarrow.table(columns), tmp_path / "data" / f"{name}.{ending}"
        if ending == "csv":
            pyarrow.csv.write_csv(table, file)
        else:
            pyarrow.parquet.write_table(table, file)
    words = [addresses["generation"], str(tmp_path / "data"), output, FP32, "columns.method=verb"]
    task, plan = planned(read_settings(words))
    entries = [
        entry for part in range(len(plan.parts)) for c in chunks(plan, part) for entry in c.entries
    ]
    assert task.is_batch
    rows = [entry.row for entry in entries if entry.row is not None]
    assert [row.value("custom_id") for row in rows] == ["a", "b", "c", "d"]
    assert [row.values.get("method") for row in rows] == [None, None, "", "GET"]


def test_a_batch_file_of_embeddings_needs_no_other_setting(
    addresses: Mapping[str, str], tmp_path: Path, output: str, service: str
) -> None:
    data = written(
        tmp_path / "batch.jsonl",
        [
            request("a", EMBEDDINGS, input=["Paris", "x"], encoding_format="base64"),
            request("b", COMPLETIONS, prompt="x"),
        ],
    )
    run(addresses["generation"], data, output, FP32, "args.model_name=embedder")
    (line,) = lines(output, "output")
    reply = line["response"]["body"]
    theirs = httpx.post(service + EMBEDDINGS, json={"input": ["Paris", "x"]}).json()
    assert reply.keys() == theirs.keys() and reply["usage"] == theirs["usage"]
    for each, other in zip(reply["data"], theirs["data"], strict=True):
        vector = struct.unpack("<32f", base64.b64decode(each["embedding"]))
        assert vector == pytest.approx(other["embedding"], abs=1e-5)
    (error,) = lines(output, "errors")
    assert error["response"]["body"]["error"]["message"] == (
        "no route POST '/v1/completions': this model answers /v1/embeddings"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["parameters.max_token=3"], "parameters: max_token: unknown field"),
        (["parameters.n=0"], "parameters: n must be 1 or more, got 0"),
        (["parameters.prompt=x"], "parameters.prompt: the rows have it"),
        (["parameters.stream=true"], "stream=true needs an HTTP connection"),
        (["args.max_seqs=3"], "args.max_seqs: Extra inputs"),
        (["args.dtype=int4"], "args.dtype: Input should be"),
        (["keep=[completion]"], "no column 'completion'"),
        (["keep=[none]"], "no column 'none'"),
        (["columns.text=body"], r"no column 'body' \(for text\)"),
        (["chunk_rows=0"], "chunk_rows=0"),
        (["what=1"], "what=1: unknown key"),
        (["service=chat"], "service='chat'"),
    ],
)
def test_errors_are_reported_before_a_model_is_loaded(
    addresses: Mapping[str, str], tmp_path: Path, output: str, words: list[str], reason: str
) -> None:
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=reason):
        planned(read_settings([addresses["generation"], data, output, *words]))


@pytest.mark.parametrize("place", ["", "/out"])
def test_an_output_among_the_rows_is_refused_at_once(
    addresses: Mapping[str, str], tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "rows/a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    words = [addresses["generation"], str(tmp_path / "rows"), f"rows{place}"]
    with pytest.raises(SystemExit, match=f"error: rows{place} is within .*remedy: a folder else"):
        main(words)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["a.jsonl"]


def test_an_output_within_the_model_is_refused_at_once(
    addresses: Mapping[str, str], tmp_path: Path
) -> None:
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    model = addresses["generation"]
    with pytest.raises(SystemExit, match=r"error: .*/answers is within .*/generation, which"):
        main([model, data, f"{model}/answers"])
    verify(model)


def test_text_arguments_of_the_service_stay_as_written() -> None:
    words = ["args.revision=0012345", "args.model_name=2024", "args.max_num_seqs=8"]
    assert read_settings(["m", "rows", "out", *words]).args == {
        "revision": "0012345",
        "model_name": "2024",
        "max_num_seqs": 8,
    }


def worker_reply(task: Task, plan: Plan, output: str, claim: Claim | None = None) -> Record | str:
    """What a worker makes of the first chunk, as the job's main process receives it."""
    worker = Worker(task, plan, output, claim)
    (reply,) = asyncio.run(worker(_pickled([next(chunks(plan, 0))])))["chunk"]
    found: Record | str = pickle.loads(reply)
    return found


def test_a_worker_reports_in_one_line_why_it_cannot_load_the_model(
    addresses: Mapping[str, str], tmp_path: Path, output: str
) -> None:
    """The main process can check neither the device nor the files of another node."""
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    elsewhere = str(shutil.copytree(addresses["generation"], tmp_path / "elsewhere"))
    found = planned(read_settings([elsewhere, data, output]))
    shutil.rmtree(elsewhere)
    reply = worker_reply(*found, output)
    assert isinstance(reply, str)
    assert reply.startswith(f"the model cannot be loaded: {elsewhere!r} is not an existing folder")
    assert reply.endswith("; remedy: s3://…, or a folder that all nodes can reach")
    words = [addresses["generation"], data, output, "args.quantization=fp8"]
    assert worker_reply(*planned(read_settings(words)), output) == (
        "the model cannot be loaded: quantization=fp8 is not available: fp8 needs a GPU, but the "
        "model is on cpu; remedy: quantization=int8"
    )


def test_the_job_has_help_and_reports_errors(
    addresses: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "jobs/batch_inference.py CHECKPOINT" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: usage"):
        main([addresses["generation"], "keep=[id]"])
    with pytest.raises(SystemExit, match="error: no file, folder or match at"):
        main([addresses["generation"], str(tmp_path / "none.jsonl"), str(tmp_path / "output")])


def answering(found: Mapping[str, Any]) -> InProcessService:
    """A service of classification that answers every row with the same."""

    async def classify(request: Any) -> Any:
        return [[found]]

    return InProcessService(
        {"/classification": classify}, lambda _: True, (), rows_at_once=1,
        ignore_unknown_fields=False,
    )  # fmt: skip


TERM = 1.2  # seconds


@pytest.mark.parametrize("kind", ["rows", "batch file"])
def test_two_jobs_with_one_output_do_not_write_to_it_together(
    addresses: Mapping[str, str], tmp_path: Path, output: str, kind: str
) -> None:
    """A job that was taken for dead writes nothing: not in another's run, nor once it is done."""
    if kind == "rows":
        data = written(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": "y"}])
    else:
        asked = [request(name, "/classification", inputs=name) for name in ("a", "b")]
        data = written(tmp_path / "rows.jsonl", asked)
    words = [addresses["classification"], data, output, "chunk_rows=1"]
    task, plan = planned(read_settings(words))
    one, two = chunks(plan, 0)
    with holding(output, term=TERM) as first:
        assert begin(plan, output, first) is None
        refusal = (
            f"another job is writing its answers to {output}: process {os.getpid()} on "
            f"{socket.gethostname()} is still running. Wait for it to end, stop it, or choose "
            f"another OUTPUT"
        )
        with pytest.raises(ValueError, match=re.escape(refusal)), holding(output, term=TERM):
            raise AssertionError("held twice")
        late = Answerer(answering({"label": "late"}), task, plan, output, first.claim)
        done = asyncio.run(late.answer(one))
        first._ended.set()  # as if it no longer ran
        with holding(output, term=TERM) as second:
            assert begin(plan, output, second) is None
            for fails in (
                lambda: asyncio.run(late.answer(two)),
                lambda: asyncio.run(late.answer(one)),
            ):
                with pytest.raises(LeaseLostError, match="another process has taken over"):
                    fails()
            own = Answerer(answering({"label": "own"}), task, plan, output, second.claim)
            records = [Record.find(output, one) or done, asyncio.run(own.answer(two))]
            with pytest.raises(LeaseLostError, match="another process has taken over"):
                finish(plan, output, records, first)
            assert not Path(output, "manifest.json").exists()
            finish(plan, output, records, second)
        with pytest.raises(LeaseLostError, match="another process has taken over"):
            asyncio.run(late.answer(one))
    assert not Path(output, "unfinished").exists()
    verify(output)
    assert [str(line).count("own") for line in lines(output, "output")] == [0, 1]


def test_a_job_that_waited_for_another_to_finish_leaves_its_answers(
    addresses: Mapping[str, str], tmp_path: Path, output: str
) -> None:
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    words = [addresses["classification"], data, output, FP32]
    index = run(*words)
    with holding(output, term=TERM) as lease:
        plan = planned(read_settings(words))[1]
        assert begin(plan, output, lease) == index
    time.sleep(TERM / 3)  # more than a renewal
    assert not Path(output, "unfinished").exists()
    verify(output)


def test_a_worker_reports_in_one_line_that_its_job_has_lost_the_output(
    addresses: Mapping[str, str], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda value: value)  # as there is no cluster
    data = written(tmp_path / "rows.jsonl", [{"text": "x"}])
    words = [addresses["classification"], data, output, FP32]
    task, plan = planned(read_settings(words))
    with holding(output, term=TERM) as lease:
        assert begin(plan, output, lease) is None
    with holding(output, term=TERM):
        reply = worker_reply(task, plan, output, lease.claim)
    assert isinstance(reply, str) and reply.startswith("another process has taken over")


def test_rows_of_another_kind_are_refused(addresses: Mapping[str, str], tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [{"question": "x", "context": "y"}])
    with pytest.raises(ValueError, match=r"no column 'text'.* or .*messages"):
        planned(read_settings([addresses["generation"], data, str(tmp_path / "output")]))


def test_lines_are_json_whatever_a_table_has(tmp_path: Path) -> None:
    """NaN and infinities at any depth are null; what JSON has no form for is text."""
    odd = {
        "number": math.nan,
        "list": [1.0, math.nan, -math.inf],
        "struct": {"deep": [{"er": math.inf}], "none": None},
        "decimal": Decimal("1.50"),
        "date": date(2026, 1, 2),
        "bytes": b"\xff",
        "text": "caf\u00e9 \u2028",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([odd]), tmp_path / "rows.parquet")
    (row,) = read_rows(str(tmp_path / "rows.parquet"), list(odd))
    plan = Plan("f", (("f",),), (1,), tuple(odd), {}, None, 256, {})
    entries = [Entry("f", number, row) for number in (1, 2)]
    line = {"file": "f", "row": 1, **row.values}
    write(plan, str(tmp_path), Chunk(0, 0, entries), [line], [line])
    for kind in ("output", "errors"):
        (found,) = lines(str(tmp_path), kind)
        assert found["number"] is None
        assert found["list"] == [1.0, None, None]
        assert found["struct"] == {"deep": [{"er": None}], "none": None}
        assert (found["decimal"], found["date"]) == (1.5, "2026-01-02")
        assert found["text"] == odd["text"]


@pytest.mark.parametrize("root", ["s3://bucket/rows", "/data/rows", "hf://datasets/a/b", "/"])
def test_files_are_named_relative_to_their_folder(root: str) -> None:
    names = ["0.jsonl", "a/1.jsonl", "ab/2.jsonl"]
    files = [storage.join(root, name) for name in names]
    for chosen in (files, files[1:], files[:1]):
        plan = Plan(root, (tuple(chosen),), (1,) * len(chosen), ("text",), {}, None, 1, {})
        relative = [file[len(plan.folder) :].lstrip("/") for file in chosen]
        assert relative == [file.removeprefix(root).lstrip("/") for file in chosen]


def test_answers_keep_the_rows_order_beyond_100_000_chunks(tmp_path: Path) -> None:
    """From 100,000 on their numbers have a digit more."""
    plan = Plan("rows.jsonl", (("rows.jsonl",),), (1,), ("text",), {}, None, 1, {}, whole=True)
    records = []
    for number in (100_000, 99_999):
        name = f"00000-{number:05}"
        file = f"unfinished/output-{name}.jsonl"
        storage.write_bytes(str(tmp_path / file), f"{number}\n".encode())
        records.append(Record(name, 1, 0, "", {file: {"size": 6, "sha256": ""}}))
    finish(plan, str(tmp_path), records)
    assert (tmp_path / "output.jsonl").read_text() == "99999\n100000\n"
