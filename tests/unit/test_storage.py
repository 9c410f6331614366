"""storage: the same behaviour on a local folder and on a real S3 server."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from pathlib import Path

import boto3
import pytest

from gptj import storage
from gptj_local.processes import free_ports
from gptj_local.s3 import LocalS3

MANY_PARTS = 2 * storage.PART_BYTES + 12_345


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("s3")
    return f"s3://gptj/{secrets.token_hex(6)}"


def test_written_files_read_back_whole_and_in_parts(folder: str) -> None:
    address = storage.join(folder, "a", "b.bin")
    storage.write_bytes(address, b"0123456789")
    assert storage.exists(address)
    assert not storage.exists(storage.join(folder, "a"))
    assert storage.size(address) == 10
    assert storage.read_bytes(address) == b"0123456789"
    assert storage.read_bytes(address, 3, 4) == b"3456"
    with pytest.raises(storage.StorageError, match="truncated"):
        storage.read_bytes(address, 8, 4)
    with storage.open_read(address) as file:
        assert file.read(2) == b"01"
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"789"


@pytest.mark.parametrize("length", [0, 10, storage.PART_BYTES, MANY_PARTS])
def test_a_stream_of_any_length_arrives_unchanged(folder: str, length: int) -> None:
    content = os.urandom(length)
    address = storage.join(folder, "stream")
    with storage.open_write(address) as file:
        for start in range(0, length, 1_000_003):
            file.write(content[start : start + 1_000_003])
        assert not storage.exists(address), "nothing may be seen before the end"
    assert storage.read_bytes(address) == content


@pytest.mark.parametrize("length", [10, MANY_PARTS])
def test_a_stream_that_fails_leaves_nothing_behind(folder: str, length: int) -> None:
    address = storage.join(folder, "stream")
    with pytest.raises(KeyError), storage.open_write(address) as file:
        file.write(bytes(length))
        raise KeyError("the writer failed")
    assert storage.list_files(folder) == []
    if storage.is_s3(folder):
        bucket, key = storage.split_s3(folder)
        uploads = boto3.Session().client("s3").list_multipart_uploads(Bucket=bucket, Prefix=key)
        assert uploads.get("Uploads", []) == []


def test_if_absent_keeps_the_first(folder: str) -> None:
    address = storage.join(folder, "once")
    storage.write_bytes(address, b"first", if_absent=True)
    with pytest.raises(storage.AlreadyExistsError, match="already exists"):
        storage.write_bytes(address, b"second", if_absent=True)
    assert storage.read_bytes(address) == b"first"


def test_folders_are_uploaded_downloaded_and_deleted(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "deep" / "two").write_bytes(os.urandom(MANY_PARTS))
    (source / "three.1a2b.unfinished").write_bytes(b"")
    storage.upload_folder(source, folder)
    assert [(f.name, f.size) for f in storage.list_files(folder)] == [
        ("deep/two", MANY_PARTS),
        ("one", 1),
    ]
    storage.download_folder(folder, tmp_path / "back")
    assert (tmp_path / "back/deep/two").read_bytes() == (source / "deep/two").read_bytes()
    storage.download_folder(folder, tmp_path / "part", names=["one"])
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["one"]
    with pytest.raises(storage.NotFoundError, match="has no absent"):
        storage.download_folder(folder, tmp_path / "part", names=["absent"])
    storage.write_bytes(folder + "-neighbour/x", b"")
    storage.delete_folder(folder)
    assert storage.list_files(folder) == []
    assert storage.exists(folder + "-neighbour/x"), "a prefix is not a folder"


def test_a_missing_file_is_named(folder: str) -> None:
    address = storage.join(folder, "absent")
    for action in (storage.size, storage.read_bytes):
        with pytest.raises(FileNotFoundError, match="absent"):
            action(address)
    with pytest.raises(storage.NotFoundError), storage.open_read(address):
        raise AssertionError("it opened")


def test_check_writable_leaves_no_trace(folder: str) -> None:
    storage.check_writable(folder)
    assert storage.list_files(folder) == []


def test_a_missing_bucket_is_named_with_the_remedy(s3: LocalS3) -> None:
    for action in (storage.check_writable, storage.list_files, storage.size):
        with pytest.raises(storage.NotFoundError, match=r"no bucket 'absent-bucket'.*remedy"):
            action("s3://absent-bucket/key")


def test_a_wrong_key_is_refused_with_the_remedy(
    s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(storage.AccessDeniedError, match=r"s3://gptj/some/file.*remedy"):
        storage.upload(tmp_path / "file", "s3://gptj/some/file")  # by boto3's own transfers
    with pytest.raises(storage.AccessDeniedError, match=r"s3://gptj/some/.*remedy") as caught:
        storage.check_writable("s3://gptj/some")
    assert s3.secret_key not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_missing_credentials_are_named(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(storage.AccessDeniedError, match="set AWS_ACCESS_KEY_ID"):
        storage.check_writable("s3://gptj/some")


def test_an_unreachable_server_is_named(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(storage.UnreachableError, match=f"{port}.*remedy: check the network"):
        storage.read_bytes("s3://gptj/some")


class Breaking:
    """Passes connections on to a server; the first reply of more than `limit` bytes is cut off."""

    def __init__(self, server: int, limit: int) -> None:
        self._server, self._limit = server, limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = self.broken = 0
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed: the test has ended
            self.accepted += 1
            server = socket.create_connection(("127.0.0.1", self._server))
            self._connections += [client, server]
            for one, other, cuts in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._pass_on, args=(one, other, cuts))
                thread.start()
                self._threads.append(thread)

    def _pass_on(self, one: socket.socket, other: socket.socket, cuts: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):  # the other direction has been closed
            while data := one.recv(2**16):
                passed += len(data)
                if cuts and passed > self._limit and not self.broken:
                    self.broken += 1
                    break
                other.sendall(data)
        _shut_down(one, other)

    def __enter__(self) -> Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        _shut_down(self._listener)  # close() alone does not wake a thread that waits in accept()
        self._listener.close()
        self._accepting.join()
        _shut_down(*self._connections)
        for thread in self._threads:
            thread.join()
        for each in self._connections:
            each.close()


def _shut_down(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):  # it has been already
            each.shutdown(socket.SHUT_RDWR)


def test_a_broken_connection_is_retried(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(2_000_000)
    address = f"s3://gptj/{secrets.token_hex(6)}"
    storage.write_bytes(address, content)
    with Breaking(int(s3.endpoint.rpartition(":")[2]), 1_000_000) as breaking:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{breaking.port}")
        assert storage.read_bytes(address) == content
        assert breaking.broken == 1


def test_connections_are_reused(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"s3://gptj/{secrets.token_hex(6)}"
    storage.write_bytes(address, bytes(1000))
    with Breaking(int(s3.endpoint.rpartition(":")[2]), 10**9) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.port}")
        for _ in range(5):
            storage.read_bytes(address)
        assert between.accepted == 1


def test_an_address_without_a_bucket_and_a_whole_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="s3://bucket/key, got 's3:///x'"):
        storage.split_s3("s3:///x")
    with pytest.raises(ValueError, match="whole bucket"):
        storage.delete_folder("s3://gptj/")


@pytest.mark.parametrize(
    "odd", ["\x01", "\x1f", "\t", "\n", "\r", "\x7f", "\x85", "\uffff", " é&<>"]
)
def test_a_folder_with_odd_keys_is_deleted(odd: str, s3: LocalS3) -> None:
    """Other programs may write any key; XML, in which S3 is told what to delete, has not all."""
    client = boto3.client("s3")
    folder = f"odd/{secrets.token_hex(6)}"
    for name in ("a", f"b{odd}c", "d"):
        client.put_object(Bucket="gptj", Key=f"{folder}/{name}", Body=b"x")
    client.put_object(Bucket="gptj", Key=f"{folder}-beside", Body=b"x")
    storage.delete_folder(f"s3://gptj/{folder}")
    left = client.list_objects_v2(Bucket="gptj", Prefix=folder)["Contents"]
    assert [each["Key"] for each in left] == [f"{folder}-beside"]
