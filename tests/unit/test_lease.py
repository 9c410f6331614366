"""One holder at a time, on a disk and on S3; a killed one loses it, a living one does not."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import secrets
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gptj import storage
from gptj.storage import lease
from gptj.storage.lease import Lease, LeaseHeldError, LeaseLostError, take_over

FORK = multiprocessing.get_context("fork")
TERM = 1.2  # seconds


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "lease")
    request.getfixturevalue("s3")
    return f"s3://gptj/{secrets.token_hex(4)}/lease"


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all holders were on other machines, whose processes cannot be checked."""
    monkeypatch.setattr(lease, "identity", lambda process: None)


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_second_holder_is_refused_while_the_first_lives(
    folder: str, same_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not same_machine:
        elsewhere(monkeypatch)
    with Lease(folder, term=TERM) as first:
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .* is still running"):
            Lease(folder, term=TERM)
        first.claim.check()
    with Lease(folder, term=TERM) as second:  # at once
        assert second.claim.generation == 2
        with pytest.raises(LeaseLostError, match="generation 2, ours was 1"):
            first.claim.check()


def hold(folder: str, held: threading.Event) -> None:
    Lease(folder, term=TERM)
    held.set()
    signal.pause()


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_killed_holder_loses_the_lease(
    same_machine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same machine at once, even with a term of hours; else after a term."""
    folder = str(tmp_path / "lease")
    if not same_machine:
        elsewhere(monkeypatch)
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, held))
    process.start()
    assert held.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Lease(folder, term=9999 if same_machine else TERM) as second:
        second.claim.check()


def test_a_stalled_holder_finds_the_lease_lost(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    stalled = Lease(folder, term=TERM)
    with Lease(folder, term=TERM) as second:
        with pytest.raises(LeaseLostError):
            stalled.claim.check()
        stalled.release()  # which is not the second's
        second.claim.check()
        with pytest.raises(LeaseLostError):
            stalled.claim.check()


def test_a_late_process_does_not_take_over_from_one_started_later(folder: str) -> None:
    """The token says which was started later, whenever they get to claim the folder."""
    storage.write_bytes(f"{folder}/00000001.json", b'{"owner": "of a version without tokens"}')
    first, third = take_over(folder, (1, 2)), take_over(folder, (2, 1))
    for late in ((), (1, 2), (1, 3), (2, 0)):
        with pytest.raises(LeaseLostError, match=r"started later .* token \(2, 1\), ours is \("):
            take_over(folder, late)
    third.check()
    with pytest.raises(LeaseLostError):
        first.check()
    take_over(folder, (2, 2)).check()


def test_only_a_later_claim_or_none_at_all_ends_a_claim(folder: str) -> None:
    """A node may list a shared folder late, so that its own attempt's claim is not there yet."""
    first, second = take_over(folder), take_over(folder)
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
    storage.delete(f"{folder}/00000002.json")
    second.check()
    storage.delete_folder(folder)
    with pytest.raises(LeaseLostError):
        second.check()


def test_an_outage_of_the_storage_is_not_its_holders_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can read or write meanwhile; then the holder renews, though not at once."""
    elsewhere(monkeypatch)
    folder = str(tmp_path / "lease")
    read, write = lease._read, Lease._write
    away = threading.Event()
    reads = iter(range(100))

    def slow_read(*arguments: Any) -> Any:
        found = read(*arguments)
        if next(reads) == 1:  # the second waits for more than a term
            away.wait(1.5 * TERM)
            away.set()
        return found

    def slow_write(self: Lease, record: Any) -> None:
        away.wait()
        time.sleep(TERM / 3)
        write(self, record)

    with Lease(folder, term=TERM):
        monkeypatch.setattr(lease, "_read", slow_read)
        monkeypatch.setattr(Lease, "_write", slow_write)
        with pytest.raises(LeaseHeldError, match="still running"):
            Lease(folder, term=TERM)


def test_a_storage_that_stays_slow_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a holder lives cannot be told from reads that take longer than it may be silent."""
    elsewhere(monkeypatch)
    folder, term, read = str(tmp_path / "lease"), 0.1, lease._read

    def slow_read(*arguments: Any) -> Any:
        time.sleep(0.6 * term)
        return read(*arguments)

    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    with Lease(folder, term=term) as first:
        monkeypatch.setattr(lease, "_read", slow_read)
        with pytest.raises(storage.StorageError, match="takes too long to read"):
            Lease(folder, term=term)
        first.claim.check()


def test_one_of_many_successors_wins(folder: str) -> None:
    Lease(folder, term=TERM).release()
    won: list[Lease] = []
    refused: list[LeaseHeldError] = []

    def contend() -> None:
        try:
            won.append(Lease(folder, term=TERM))
        except LeaseHeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 3)
    won[0].release()
    names = [file.name for file in storage.list_files(folder)]
    assert names == ["00000001.json", "00000002.json"]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_holder_renews_after_errors_of_its_file_system(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network file systems return them now and then, for a listing or a file."""
    folder, failed = str(tmp_path / "lease"), threading.Event()
    scandir, opened = os.scandir, builtins.open
    listed, written = storage.list_files, storage.write_bytes  # errors that these do not translate

    def failing(function: Any) -> Any:
        def once(path: Any, *arguments: Any) -> Any:
            if str(path).startswith(folder) and not failed.is_set():
                failed.set()
                raise OSError(code, os.strerror(code))
            return function(path, *arguments)

        return once

    with Lease(folder, term=TERM) as held:
        for module, name, function in (
            *((os, "scandir", scandir), (builtins, "open", opened)),
            *((storage, "list_files", listed), (storage, "write_bytes", written)),
        ):
            failed.clear()
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing(function))
                assert failed.wait(60)
            before = storage.read_bytes(f"{folder}/00000001.json")
            while storage.read_bytes(f"{folder}/00000001.json") == before:
                assert held._thread.is_alive()
                time.sleep(TERM / 10)
        held.claim.check()
