"""Our code survives clock jumps: it relies on monotonic clocks, or on the storage's."""

from __future__ import annotations

import ast
import os
import re
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.auth
import pytest
from botocore.compat import get_current_datetime
from faulty_s3 import FaultyS3, Reply

from gptj import storage
from gptj.storage import s3_clock
from gptj_local.s3 import LocalS3

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCK = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
# Where we read the time of day, and why a jump does not matter.
READS = {
    "platform/gptj/chat/environment.py": "today's date in a prompt",
    "platform/gptj/serving/adapters.py": "`created` in a reply",
    "platform/gptj/serving/chat/schemas.py": "`created` in a reply",
    "platform/gptj/serving/completions/schemas.py": "`created` in a reply",
    "platform/gptj/serving/completions/request_trace.py": "read once, for relative times",
    "platform/gptj/storage/s3_clock.py": "compared with the server's",
    "platform/gptj/training/trackers.py": "shown by MLflow",
    "deployments/generation.py": "`created` in a reply",
}

Jump = Callable[[timedelta], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Sets how far this process's clock is off, for what signs requests."""
    off = [timedelta()]

    def now(remove_tzinfo: bool = True) -> datetime:
        return get_current_datetime(remove_tzinfo) + off[0]

    monkeypatch.setattr(botocore.auth, "get_current_datetime", now)
    here = SimpleNamespace(time=lambda: now(False).timestamp())
    monkeypatch.setattr(s3_clock, "time", here)

    def jump(by: timedelta) -> None:
        off[0] = by

    return jump


@pytest.mark.parametrize("hours", [1, -1, 24 * 400])
def test_storage_works_by_the_servers_clock(
    s3: LocalS3, tmp_path: Path, jump: Jump, hours: int
) -> None:
    """Each operation, right after the jump, which is the first to notice."""
    folder = f"s3://gptj/{secrets.token_hex(6)}"
    content = os.urandom(storage.PART_BYTES + 12_345)
    (tmp_path / "large").write_bytes(content)
    storage.write_bytes(f"{folder}/there", b"0123456789")

    def streamed() -> None:
        with storage.open_write(f"{folder}/streamed") as file:
            file.write(content)

    for action, result in (
        (lambda: storage.size(f"{folder}/there"), 10),
        (lambda: storage.read_bytes(f"{folder}/there", 2, 3), b"234"),
        (lambda: storage.write_bytes(f"{folder}/a", b"a"), None),
        (lambda: storage.write_bytes(f"{folder}/b", b"b", if_absent=True), None),
        (lambda: storage.upload(tmp_path / "large", f"{folder}/large"), None),
        (streamed, None),
        (lambda: storage.download(f"{folder}/large", tmp_path / "back"), None),
        (lambda: len(storage.list_files(folder)), 5),
        (lambda: storage.check_writable(folder), None),
        (lambda: storage.delete_folder(folder), None),
    ):
        for off in (timedelta(hours=hours), timedelta()):
            jump(off)
            if off:
                assert action() == result
            else:  # set right again
                assert storage.list_files("s3://gptj/none") == []
    assert (tmp_path / "back").read_bytes() == content


def test_a_difference_is_logged_once_and_then_costs_nothing(
    s3: LocalS3, jump: Jump, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        jump(timedelta(hours=-2))
        for _ in range(3):
            assert not storage.exists("s3://gptj/none")
        assert len(proxy.requests) == 1 + 2 * 3  # a missing file: is there the bucket?
    assert len(re.findall("differ by (719|720)\\d s", caplog.text)) == 1
    assert "remedy: set the clocks" in caplog.text


@pytest.mark.parametrize(
    ("headers", "attempts"),
    [
        ({"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}, 2),
        ({"Date": "Thu, 01 Jan 2026 00:00:00 -0000"}, 1),  # of an unknown zone
        ({"Date": "?"}, 1),
    ],
)
def test_a_server_that_refuses_any_time_is_named(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], attempts: int
) -> None:
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.fault = lambda request: Reply(403, "RequestTimeTooSkewed", headers=headers)
        with pytest.raises(storage.StorageError, match=r"clocks of this machine.*remedy: set them"):
            storage.write_bytes("s3://gptj/none", b"")
        assert len(proxy.requests) == attempts


@pytest.mark.parametrize("code", ["AccessDenied", "RequestTimeTooSkewed", ""])
def test_a_wrong_date_of_a_refusal_does_not_stay(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """A gateway's clock, say: that request fails, and all others go on. A HEAD has no code."""
    wrong = {"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}
    address = f"s3://gptj/{secrets.token_hex(6)}"
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.write_bytes(address, b"there")
        proxy.fault = lambda request: Reply(403, code, headers=wrong)
        with pytest.raises(storage.StorageError):
            if code:
                storage.write_bytes(address, b"refused")
            else:
                storage.size(address)
        proxy.fault = lambda request: None
        assert storage.size(address) == 5
        storage.write_bytes(address, b"again")


def test_requests_are_signed_by_boto3_while_clocks_agree(s3: LocalS3) -> None:
    client = boto3.Session().client("s3")
    clock = s3_clock.ServerClock()
    clock.register(client.meta.events)
    assert clock._choose_signer(s3_clock.SIGNATURE, {}) is None


@pytest.mark.slow
def test_nothing_else_of_ours_depends_on_the_time_of_day() -> None:
    """Deadlines, leases and retries go by time.monotonic; the rest is listed above."""
    found = set()
    for package in ("platform/gptj", "jobs", "deployments"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if (node.value.id, node.attr) in WALL_CLOCK:
                        found.add(str(path.relative_to(ROOT)))
                elif isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert "time" not in {each.name for each in node.names}, path
    assert found == READS.keys()
