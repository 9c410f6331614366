"""Outages of S3 cost time, not the work. Pauses are shortened here; retries are not."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from faulty_s3 import Fault, FaultyS3, Reply, Request

from gptj import storage
from gptj.checkpoints.manifest import FolderWriter, verify
from gptj.storage import retries
from gptj.storage import s3_upload as storage_s3
from gptj_local.s3 import LocalS3

PARTS = 2 * storage.PART_BYTES + 12_345


@pytest.fixture
def folder() -> str:
    return f"s3://gptj/{secrets.token_hex(6)}"


@pytest.fixture
def faulty(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """Through a proxy that has answered once."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_SECONDS", 0.02)
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.exists("s3://gptj/anything")
        proxy.requests.clear()
        yield proxy


def times(faulty: FaultyS3, faults: list[Fault], where: Callable[[Request], bool]) -> list[Fault]:
    """The faults in turn for the requests that are meant; returns those that are to come."""
    coming = list(faults)
    faulty.fault = lambda request: coming.pop(0) if coming and where(request) else None
    return coming


OUTAGE: list[Fault] = [
    "reset",
    Reply(500, "InternalError"),
    Reply(503, "SlowDown"),
    Reply(503),
    Reply(502),
    "lost",
] * 2


def test_every_operation_outlasts_an_outage(faulty: FaultyS3, folder: str, tmp_path: Path) -> None:
    content = os.urandom(PARTS)
    (tmp_path / "large").write_bytes(content)
    storage.write_bytes(f"{folder}/there", b"0123456789")

    def streamed() -> None:
        with storage.open_write(f"{folder}/streamed") as file:
            file.write(content)

    for action, check in (
        (lambda: storage.write_bytes(f"{folder}/a", b"a"), None),
        (lambda: storage.write_bytes(f"{folder}/b", b"b", if_absent=True), None),
        (lambda: storage.read_bytes(f"{folder}/there", 2, 3), b"234"),
        (lambda: storage.size(f"{folder}/there"), 10),
        (lambda: len(storage.list_files(folder)), 3),
        (lambda: storage.upload(tmp_path / "large", f"{folder}/large"), None),
        (streamed, None),
        (lambda: storage.download(f"{folder}/large", tmp_path / "back"), None),
        (lambda: storage.delete(f"{folder}/a"), None),
        (lambda: storage.check_writable(folder), None),
    ):
        left = times(faulty, OUTAGE, lambda request: True)
        assert action() == check
        assert not left, "the outage was not felt"
    assert (tmp_path / "back").read_bytes() == content
    assert storage.read_bytes(f"{folder}/streamed") == content
    names = [file.name for file in storage.list_files(folder)]
    assert names == ["b", "large", "streamed", "there"]
    times(faulty, OUTAGE, lambda request: True)
    storage.delete_folder(folder)
    assert storage.list_files(folder) == []


def test_a_server_that_never_answered_fails_fast(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.fault = lambda request: "reset"
        with pytest.raises(storage.UnreachableError, match="remedy: check the network"):
            storage.write_bytes(f"{folder}/a", b"a")
        assert len(proxy.requests) == retries.FIRST_TRIES
        storage.be_patient([folder])
        times(proxy, ["reset"] * 9, lambda request: True)
        storage.write_bytes(f"{folder}/a", b"a")


def test_retries_end_after_the_deadline(
    faulty: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.3)
    faulty.fault = lambda request: Reply(503, "SlowDown")
    with pytest.raises(storage.StorageError, match="SlowDown"):
        storage.write_bytes(f"{folder}/a", b"a")
    assert len(faulty.requests) > retries.FIRST_TRIES
    assert "503 SlowDown" in caplog.text
    assert "retrying" in caplog.text


def test_requests_are_retried_for_two_to_five_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only pauses advance. Pauses are random, so clients do not retry together."""
    now = [1000.0]
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: now[0]))
    policy = retries.Retries("http://s3")
    policy.patient = True

    def ask(outage: float) -> tuple[bool, list[float]]:
        """Whether a request in an outage of so many seconds succeeds, and its pauses."""
        began, pauses = now[0], list[float]()
        while now[0] < began + outage:
            pause = policy.pause(len(pauses) + 1, began, "503 SlowDown")
            if pause is None:
                return False, pauses
            pauses.append(pause)
            now[0] += pause
        return True, pauses

    tries = [ask(120) for _ in range(50)]
    assert all(succeeded for succeeded, _ in tries)
    assert max(len(pauses) for _, pauses in tries) < 25  # the server is not flooded
    assert len({pauses[0] for _, pauses in tries}) > 25
    began = now[0]
    assert not ask(10_000)[0]
    assert retries.PATIENCE_SECONDS < now[0] - began < retries.PATIENCE_SECONDS + 20


def test_a_refusal_is_not_retried(faulty: FaultyS3, folder: str) -> None:
    faulty.fault = lambda request: Reply(403, "AccessDenied")
    with pytest.raises(storage.AccessDeniedError):
        storage.write_bytes(f"{folder}/a", b"a")
    assert len(faulty.requests) == 1


def is_conditional(request: Request) -> bool:
    return "if-none-match" in request.headers


def test_a_retried_write_recognizes_its_own_file(faulty: FaultyS3, folder: str) -> None:
    """The second try finds the file of the first."""
    for content in (b"manifest", b""):
        address = f"{folder}/{len(content)}"
        times(faulty, ["lost"], is_conditional)
        storage.write_bytes(address, content, if_absent=True)
        with pytest.raises(storage.AlreadyExistsError):
            storage.write_bytes(address, content, if_absent=True)


def test_a_retried_write_does_not_claim_anothers_file(faulty: FaultyS3, folder: str) -> None:
    address = f"{folder}/once"
    storage.write_bytes(address, b"theirs")
    for content in (b"ours", b"longer", b"theirS"):
        times(faulty, ["reset"], is_conditional)
        with pytest.raises(storage.AlreadyExistsError):
            storage.write_bytes(address, content, if_absent=True)
    assert storage.read_bytes(address) == b"theirs"


def is_complete(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.path


def test_an_upload_whose_reply_was_lost_is_complete(
    faulty: FaultyS3, folder: str, tmp_path: Path
) -> None:
    content = os.urandom(PARTS)
    (tmp_path / "large").write_bytes(content)
    left = times(faulty, ["lost"], is_complete)
    storage.upload(tmp_path / "large", f"{folder}/large")
    assert not left
    assert storage.read_bytes(f"{folder}/large") == content


def test_a_lost_upload_is_not_taken_for_complete(
    faulty: FaultyS3, folder: str, tmp_path: Path
) -> None:
    """An older object of the same size is there."""
    (tmp_path / "large").write_bytes(bytes(PARTS))
    storage.upload(tmp_path / "large", f"{folder}/large")
    (tmp_path / "large").write_bytes(os.urandom(PARTS))
    times(faulty, ["reset", Reply(404, "NoSuchUpload")], is_complete)
    with pytest.raises(storage.StorageError, match="NoSuchUpload"):
        storage.upload(tmp_path / "large", f"{folder}/large")
    assert storage.read_bytes(f"{folder}/large") == bytes(PARTS)


def test_flipped_bits_are_sent_again(faulty: FaultyS3, folder: str) -> None:
    flips = [1000, 2000]

    def flip(request: Request) -> Request:
        if request.method != "PUT" or not flips:
            return request
        body = bytearray(request.body)
        body[flips.pop()] ^= 1
        return Request(request.method, request.path, request.headers, bytes(body))

    faulty.change = flip
    content = os.urandom(5000)
    storage.write_bytes(f"{folder}/a", content)
    assert not flips
    assert faulty.count("PUT") == 3
    assert storage.read_bytes(f"{folder}/a") == content


def test_a_repeatedly_broken_body_is_downloaded(
    faulty: FaultyS3, folder: str, tmp_path: Path
) -> None:
    content = os.urandom(100_000)
    storage.write_bytes(f"{folder}/a", content)
    left = times(faulty, ["cut"] * 9, lambda request: request.method == "GET")
    assert storage.read_bytes(f"{folder}/a") == content
    assert not left
    left = times(faulty, ["cut"] * 9, lambda request: request.method == "GET")
    storage.download(f"{folder}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content
    assert not left


def test_the_next_run_cleans_up_after_dead_writers(
    faulty: FaultyS3, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = boto3.Session().client("s3")
    bucket, key = storage.split_s3(folder)
    for name in ("run/x", "run/y", "running/z"):
        client.create_multipart_upload(Bucket=bucket, Key=f"{key}/{name}")
    storage.delete_unfinished(f"{folder}/run")
    uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=key)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [f"{key}/running/z"]
    faulty.fault = lambda request: Reply(403, "AccessDenied")
    storage.delete_unfinished(f"{folder}/running")
    assert "cannot abort unfinished uploads" in caplog.text

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.1a2b.unfinished").write_bytes(b"half")
    (tmp_path / "deep/a").write_bytes(b"whole")
    storage.delete_unfinished(str(tmp_path))
    storage.delete_unfinished(str(tmp_path / "absent"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


class TakenOverError(Exception):
    """Of a fence: another process has the folder now."""


@dataclass
class Rival:
    """Another process, which takes over while a request of ours is on its way."""

    folder: str
    taken: bool = False

    def fence(self) -> None:
        if self.taken:
            raise TakenOverError

    def finish(self, names: Iterable[str]) -> None:
        self.taken = True
        with FolderWriter(self.folder) as writer:
            for name in names:
                writer.write(name, b"good")


@pytest.mark.parametrize("fate", ["lost on the way", "arrives late", "arrives, reply lost"])
@pytest.mark.parametrize("size", [4, storage_s3.WRITE_PART_BYTES + 1], ids=["small", "parts"])
@pytest.mark.parametrize("leftover", [False, True], ids=["new", "leftover"])
def test_a_writer_whose_request_stalls_never_alters_a_finished_folder(
    fate: str, size: int, leftover: bool, faulty: FaultyS3, folder: str
) -> None:
    """The request that publishes a file, which may be tried again for minutes."""
    rival, stalled = Rival(folder), []
    if leftover:
        storage.write_bytes(f"{folder}/weights", b"of a writer that died")

    def publishes(request: Request) -> bool:
        if "weights" not in request.path:
            return False
        return (
            "uploadId" in request.path
            if request.method == "POST"
            else (request.method == "PUT" and "uploadId" not in request.path)
        )

    def stall(request: Request) -> Fault:
        if stalled or not publishes(request):
            return None
        stalled.append(request)
        rival.finish(["weights", "config.json"])
        return {"lost on the way": Reply(503), "arrives, reply lost": "lost"}.get(fate)  # type: ignore[return-value]

    faulty.fault = stall
    with (
        pytest.raises((TakenOverError, storage.AlreadyExistsError)),
        FolderWriter(folder, fence=rival.fence) as late,
    ):
        with late.open("weights", size) as file:
            file.write(b"l" * size)
        late.write("config.json", b"late")
    assert stalled
    verify(folder)
    assert storage.read_bytes(f"{folder}/weights") == b"good"


@pytest.mark.parametrize("delete", [storage.delete, storage.delete_folder])
def test_a_fenced_process_deletes_nothing_after_another_took_over(
    delete: Callable[[str], None], faulty: FaultyS3, folder: str
) -> None:
    rival, stalled = Rival(folder), []
    storage.write_bytes(f"{folder}/weights", b"of a writer that died")

    def stall(request: Request) -> Fault:
        if stalled or not (request.method == "DELETE" or "?delete" in request.path):
            return None
        stalled.append(request)
        rival.finish(["weights"])
        return Reply(503)

    faulty.fault = stall
    address = folder if delete is storage.delete_folder else f"{folder}/weights"
    with pytest.raises(TakenOverError), storage.fenced(folder, rival.fence):
        delete(address)
    assert stalled
    verify(folder)
    delete(address)  # no longer fenced


def test_a_fence_lets_its_holder_outlast_an_outage(faulty: FaultyS3, folder: str) -> None:
    """Though the fence itself needs S3."""
    checks = []

    def fence() -> None:
        checks.append(storage.list_files(folder))

    left = times(faulty, OUTAGE, lambda request: request.method in ("PUT", "POST"))
    with FolderWriter(folder, fence=fence) as writer:
        writer.write("a", b"a")
        with writer.open("b", PARTS) as file:
            file.write(bytes(PARTS))
    assert not left and len(checks) > len(OUTAGE)
    verify(folder)
