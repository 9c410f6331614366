"""An outage of S3 while a job's new processes start costs time, not the job."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from faulty_s3 import Fault, FaultyS3

from gptj import GPTJTokenizer, storage
from gptj.checkpoints.manifest import FolderWriter
from gptj.data import answers
from gptj.data.preparing import Plan, chunks, tokenizer_at
from gptj.storage import retries, s3_client
from gptj.training.settings import read_settings
from gptj_jobs import preparing
from gptj_local.s3 import LocalS3
from jobs import batch_inference, finetune

OUTAGE = 3 * retries.FIRST_TRIES  # failed requests


@pytest.fixture
def outages(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Begins an outage for what is then a new process: its client has had no answer yet."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_SECONDS", 0.02)
    # Values stand for their references, without a cluster.
    monkeypatch.setattr("ray.get", lambda value: value)
    with ExitStack() as stack:

        def begin() -> list[Fault]:
            proxy = stack.enter_context(FaultyS3.before(s3.endpoint))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            coming: list[Fault] = ["reset"] * OUTAGE
            proxy.fault = lambda request: coming.pop() if coming else None
            return coming

        yield begin


def test_a_job_outlasts_an_outage_while_its_data_are_prepared(outages: Any) -> None:
    folder = f"s3://gptj/{secrets.token_hex(6)}"
    raw, shards, saved = (f"{folder}/{name}" for name in ("raw.jsonl", "shards", "tokenizer"))
    storage.write_bytes(raw, b'{"text": "an old cat"}\n' * 9)
    tokenizer = GPTJTokenizer.train(["an old cat"], 260)
    with FolderWriter(saved) as writer:
        for name, content in tokenizer.files().items():
            writer.write(name, content)
    plan, addresses = Plan.of(raw, tokenizer, names={}), (raw, shards, saved)
    coming = outages()
    read = list(preparing._read({"part": [0]}, plan, addresses))
    assert not coming, "the outage was not felt"
    found = [pickle.loads(each) for row in read for each in row["chunk"]]
    assert found == list(chunks(plan, 0))
    load = partial(tokenizer_at, saved)
    coming = outages()
    written = preparing._write({"chunk": read[0]["chunk"]}, plan, shards, load, addresses)
    assert not coming, "the outage was not felt"
    (shard,) = map(pickle.loads, written["shard"])
    assert shard.rows == 9


def test_a_job_outlasts_an_outage_while_rows_are_answered(outages: Any) -> None:
    folder = f"s3://gptj/{secrets.token_hex(6)}"
    storage.write_bytes(f"{folder}/raw.jsonl", b'{"text": "an old cat"}\n' * 9)
    plan = answers.Plan.of(f"{folder}/raw.jsonl", ["text"], {}, None, settings={})
    coming = outages()
    (row,) = batch_inference._read({"part": [0]}, plan, f"{folder}/answers")
    assert not coming, "the outage was not felt"
    (chunk,) = map(pickle.loads, row["chunk"])
    assert len(chunk.entries) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "patient"),
    [
        (["storage=s3://gptj/runs"], True),
        (["data.train=s3://gptj/rows"], True),
        (["data.train=/rows", "data.evaluation=s3://gptj/held-out"], True),
        (["model.checkpoint=s3://gptj/model"], True),
        (["tokenizer.address=s3://gptj/tokenizer"], True),
        ([], False),
    ],
)
def test_a_worker_is_patient_whichever_address_is_on_s3(
    words: list[str], patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StartedError(Exception):
        pass

    def started() -> None:
        raise StartedError

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{secrets.token_hex(6)}:1")  # for a new client
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(finetune, "_log_to_stdout", lambda: None)
    monkeypatch.setattr("ray.train.get_context", started)
    settings = read_settings(["storage=/runs", *words])
    with pytest.raises(StartedError):
        finetune.work({"settings": settings.model_dump(exclude_unset=True)})
    assert s3_client.retry_policy().patient == patient
