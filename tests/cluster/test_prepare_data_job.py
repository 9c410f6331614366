"""jobs/prepare_data.py with Ray Data on a real cluster: same bytes, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs_in_turn import run_in_turn
from task_data import packed

from gptj import GPTJTokenizer, storage
from gptj.checkpoints.manifest import FolderWriter, verify
from gptj.data.causal_lm import CausalLMData
from gptj.data.prepared import Prepared
from gptj.data.sources import read_rows
from gptj_local.processes import running, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RAW, TOKENIZER = "s3://gptj/prepare-raw", "s3://gptj/prepare-tokenizer"
TEXTS = [f"{'very ' * (n % 7)}old cat {n} and new dog {n * n}" for n in range(600)]


@pytest.fixture(scope="module")
def cluster(
    s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    environment = {**os.environ, **s3_server.environment()}
    folder = tmp_path_factory.mktemp("ray")
    with LocalRay.start(folder, cpus=4, environment=environment) as node:
        yield {**environment, **node.environment()}


def words(destination: str, *more: str, data: str = RAW) -> list[str]:
    return [data, destination, f"tokenizer={TOKENIZER}", "shard_characters=1000", *more]


def contents(address: str) -> dict[str, bytes]:
    return {file.name: storage.read_bytes(file.address) for file in storage.list_files(address)}


def test_prepared_data_is_the_same_for_any_number_of_workers_and_after_a_kill(
    cluster: dict[str, str], s3: LocalS3, tmp_path: Path
) -> None:
    tokenizer = GPTJTokenizer.train(TEXTS, 300)
    with FolderWriter(TOKENIZER) as writer:
        for name, content in tokenizer.files().items():
            writer.write(name, content)
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number::3]]
        storage.write_bytes(f"{RAW}/{number}.jsonl", "".join(lines).encode())
    storage.write_bytes("s3://gptj/prepare-bad/0.jsonl", b'{"text": "a"}\n{"text": 1}\n')

    killed, log = "s3://gptj/prepared-killed", tmp_path / "log"
    program = [sys.executable, str(ROOT / "jobs" / "prepare_data.py")]
    with running([*program, *words(killed, "workers=2")], environment=cluster, log=log) as process:
        deadline = time.monotonic() + 300
        while len(storage.list_files(f"{killed}/unfinished")) < 3:
            assert process.poll() is None, tail(log)
            assert time.monotonic() < deadline, tail(log)
            time.sleep(0.02)
        process.kill()
    assert not storage.exists(f"{killed}/manifest.json")

    undisturbed = "s3://gptj/prepared-undisturbed"
    commands = [
        words(killed, "workers=3"),
        words(undisturbed, "workers=1"),
        words("s3://gptj/prepared-bad", data="s3://gptj/prepare-bad"),
    ]
    resumed, whole, bad = run_in_turn("jobs.prepare_data", commands, cluster, ROOT)
    for done in (resumed, whole):
        assert done.status == 0, done.stdout + done.stderr
        assert "600 rows, " in done.stdout
    verify(undisturbed)
    prepared = Prepared.at(undisturbed)
    assert prepared is not None and len(prepared.index.shards) > 10
    found = packed(tmp_path / "packed", undisturbed, tokenizer, 64, "none")
    expected = CausalLMData(read_rows(RAW, ["text"]), tokenizer, 64, "none")
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert contents(killed) == contents(undisturbed)

    assert bad.status != 0 and "Traceback" not in bad.stderr
    assert bad.stderr.strip().splitlines()[-1] == (
        "error: s3://gptj/prepare-bad/0.jsonl, row 2, column 'text': must be text, got 1"
    )
