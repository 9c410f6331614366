"""storage on unusual servers, disks and settings."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trustme
from faulty_s3 import Fault, FaultyS3, Reply, Request

from gptj import storage
from gptj.data.sources import data_files, read_rows
from gptj.storage.addresses import AddressError
from gptj.storage.scratch import scratch_folder
from gptj.training.state import delete_old_checkpoints
from gptj_local.s3 import LocalS3


@pytest.fixture
def folder() -> str:
    return f"s3://gptj/{secrets.token_hex(6)}"


@pytest.fixture
def faulty(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def conditional(request: Request) -> bool:
    return "if-none-match" in request.headers


def test_the_consoles_folder_marker_is_not_a_file(s3: LocalS3, folder: str) -> None:
    """A folder made in the console is an object of zero bytes whose key ends with a slash."""
    import boto3

    key = storage.split_s3(folder)[1]
    boto3.Session().client("s3").put_object(Bucket="gptj", Key=f"{key}/mk/", Body=b"")
    boto3.Session().client("s3").put_object(Bucket="gptj", Key=f"{key}/mk/deeper/", Body=b"")
    storage.write_bytes(f"{folder}/mk/rows.txt", b"one")
    for address in (f"{folder}/mk/", f"{folder}/mk"):
        assert not storage.exists(address)
        assert [file.name for file in storage.list_files(address)] == ["rows.txt"]
        assert [row.values for row in read_rows(address, ["text"])] == [{"text": "one"}]
    storage.delete_folder(f"{folder}/mk/")
    assert storage.list_files(folder) == []


def test_a_key_outside_the_folder_is_refused_and_writes_nothing(
    faulty: FaultyS3, folder: str, tmp_path: Path
) -> None:
    """What a server lists becomes names of local files."""
    key = storage.split_s3(folder)[1]
    for name in ("../outside/x", "/outside", "a//b"):
        listing = (
            f"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>{key}/{name}</Key>"
            f"<Size>1</Size></Contents></ListBucketResult>"
        )
        faulty.fault = lambda request, text=listing: (
            Reply(200, text=text) if "list-type" in request.path else None
        )
        with pytest.raises(AddressError, match=r"contains //, \. or \.\."):
            storage.download_folder(folder, tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_conditional_writes_is_refused_at_the_start(
    faulty: FaultyS3, folder: str
) -> None:
    faulty.fault = lambda request: (
        Reply(501, "NotImplemented", "A header you provided implies functionality")
        if conditional(request)
        else None
    )
    with pytest.raises(storage.StorageError, match=r"lacks.*If-None-Match.*remedy"):
        storage.check_writable(folder)
    assert storage.list_files(folder) == []


def test_a_server_that_ignores_conditions_is_refused_at_the_start(
    faulty: FaultyS3, folder: str
) -> None:
    faulty.fault = lambda request: (
        Reply(200, headers={"ETag": '"1"'})
        if conditional(request) and faulty.count("PUT") > 1
        else None
    )
    with pytest.raises(storage.StorageError, match=r"ignores If-None-Match.*remedy"):
        storage.check_writable(folder)
    assert storage.list_files(folder) == []


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda r: conditional(r), "access denied"),
        (lambda r: "uploads" in r.path, "access denied"),
        (lambda r: "partNumber" in r.path, "access denied"),
        (lambda r: r.method == "POST" and "uploadId" in r.path, "access denied"),
        (lambda r: r.method == "DELETE" or "delete" in r.path, "access denied"),
    ],
    ids=["conditional", "create", "part", "complete", "delete"],
)
def test_the_final_operations_are_tried_at_the_start(
    faulty: FaultyS3, folder: str, refused: Callable[[Request], bool], says: str
) -> None:
    faulty.fault = lambda request: Reply(403, "AccessDenied") if refused(request) else None
    with pytest.raises(storage.AccessDeniedError, match=says):
        storage.check_writable(folder)
    faulty.fault = lambda request: None
    left = storage.list_files(folder)
    storage.delete_folder(folder)
    assert len(left) in (0, 2)  # two, where they may not be deleted


def test_a_write_conflict_is_retried(faulty: FaultyS3, folder: str) -> None:
    replies = [Reply(409, "ConditionalRequestConflict"), Reply(400, "RequestTimeout")]
    conflicts = iter(replies)
    faulty.fault = lambda request: next(conflicts, None) if conditional(request) else None
    storage.write_bytes(f"{folder}/once", b"first", if_absent=True)
    assert storage.read_bytes(f"{folder}/once") == b"first"
    assert faulty.count("PUT") == 3


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, "MissingContentMD5", "Missing required header for this request: Content-MD5"),
        Reply(400, "InvalidRequest", "Missing required header for this request: Content-MD5"),
        Reply(501, "NotImplemented"),
    ],
    ids=lambda reply: reply.code,
)
def test_files_are_deleted_one_by_one_without_batch_deletes(
    faulty: FaultyS3, folder: str, reply: Reply
) -> None:
    faulty.fault = lambda request: reply if request.method == "POST" else None
    for name in "abc":
        storage.write_bytes(f"{folder}/{name}", b"x")
    storage.delete_folder(folder)
    assert storage.list_files(folder) == []
    assert faulty.count("DELETE") == 3


def test_failed_pruning_is_a_warning(
    faulty: FaultyS3, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        storage.write_bytes(f"{folder}/checkpoint-{step}/manifest-00000-of-00001.json", b"{}")
    faulty.fault = lambda request: Reply(403, "AccessDenied") if request.method == "POST" else None
    with caplog.at_level(logging.WARNING):
        delete_old_checkpoints(folder, keep=1)
    assert "cannot delete an old checkpoint" in caplog.text
    assert "access denied" in caplog.text
    faulty.fault = lambda request: None
    delete_old_checkpoints(folder, keep=1)
    assert [f.name.partition("/")[0] for f in storage.list_files(folder)] == ["checkpoint-2"]


def test_a_bucket_in_another_region_works(faulty: FaultyS3, folder: str) -> None:
    """As AWS answers: 301, with the region in a header, to what is signed for another one."""

    def elsewhere(request: Request) -> Fault:
        if "/eu-west-1/s3/" in request.headers.get("authorization", ""):
            return None
        return Reply(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-1"})

    faulty.fault = elsewhere
    storage.check_writable(folder)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def test_a_custom_certificate_authority_works(
    s3: LocalS3,
    authority: trustme.CA,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with FaultyS3.before(s3.endpoint, tls=context) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(storage.UnreachableError, match="remedy: set AWS_CA_BUNDLE"):
            storage.check_writable(folder)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        storage.check_writable(folder)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "absent.pem"))
        with pytest.raises(storage.StorageError, match=r"absent.pem"):
            storage.check_writable(folder)


@pytest.mark.parametrize("style", ["auto", "path"])
def test_shared_configuration_files_and_profiles_work(
    s3: LocalS3, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    for name in s3.environment():
        if name != "AWS_EC2_METADATA_DISABLED":
            monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n"
        f"credential_process = {sys.executable} {tmp_path}/credentials.py\n"
        f"s3 =\n  addressing_style = {style}\n"
    )
    (tmp_path / "credentials.py").write_text(
        "import json\nprint(json.dumps(dict(Version=1, "
        f"AccessKeyId={s3.access_key!r}, SecretAccessKey={s3.secret_key!r})))"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    storage.check_writable(folder)


def test_an_endpoint_that_is_not_a_url_is_named(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(storage.StorageError, match=r"localhost.*remedy: correct AWS_ENDPOINT_URL"):
        storage.check_writable("s3://gptj/x")


def test_a_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT, and some network and FUSE file systems; mounting one takes root."""

    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert kind
    message = (
        f"^{tmp_path}: the file system .*mounted at /.* does not allow hard links "
        rf"\(Operation not permitted\).*remedy: a folder on another one"
    )
    with pytest.raises(storage.StorageError, match=message):
        storage.check_writable(str(tmp_path))
    with pytest.raises(storage.StorageError, match=message):
        storage.write_bytes(str(tmp_path / "once"), b"x", if_absent=True)
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    for folder, message in (
        ("/proc/run", "cannot write to /proc/run: .*remedy: choose another.*type proc"),
        (f"{tmp_path}/file/run", f"{tmp_path}/file is a file, not a folder; remedy"),
        (f"{tmp_path}/file", f"{tmp_path}/file is a file, not a folder; remedy"),
        (f"{tmp_path}/link", f"{tmp_path}/link is a broken link; remedy: delete the link"),
        (f"{tmp_path}/{'x' * 300}", "File name too long; remedy: choose another"),
    ):
        with pytest.raises(storage.StorageError, match=message) as caught:
            storage.check_writable(folder)
        assert ".writable" not in str(caught.value)
        with pytest.raises(storage.StorageError, match=message):
            storage.write_bytes(f"{folder}/name", b"")
        with pytest.raises(storage.StorageError, match="cannot write to"), scratch_folder(folder):
            raise AssertionError("it was made")


@pytest.mark.slow
def test_another_users_folder_is_named() -> None:
    """As another user, since root may write anywhere."""
    if os.getuid() != 0:
        pytest.skip("takes root, to become another user")
    program = """
import os, sys
from gptj import storage
os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        storage.check_writable(folder)
    except storage.AccessDeniedError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others
        closed = Path(name) / "closed"
        closed.mkdir()
        for each in (Path(name), closed):
            each.chmod(0o755)
        command = [sys.executable, "-c", program, str(closed / "run"), str(closed)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    for folder, line in zip((closed / "run", closed), lines, strict=True):
        assert f"cannot write to {folder}: Permission denied; remedy:" in line
        assert f"let user 65534 write to {closed}, which belongs to user 0 (mode 755)" in line


def test_files_behind_links_are_listed_once(tmp_path: Path) -> None:
    """Folders and files, at any depth, as cp -RL copies them; loops end."""
    root, other = tmp_path / "data", tmp_path / "other"
    for file in ("own.txt", "deep/er/own.txt"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("row")
    (other / "deep").mkdir(parents=True)
    (other / "file.txt").write_text("row")
    (other / "deep" / "file.txt").write_text("row")
    (root / "deep" / "file.txt").symlink_to(other / "file.txt")
    (root / "deep" / "folder").symlink_to(other, target_is_directory=True)
    (tmp_path / "linked").symlink_to(root)
    subprocess.run(["cp", "-RL", root, tmp_path / "copy"], check=True)
    copied = sorted(
        os.path.relpath(os.path.join(folder, name), tmp_path / "copy")
        for folder, _, names in os.walk(tmp_path / "copy")
        for name in names
    )
    (root / "loop").symlink_to(root)
    (other / "deep" / "up").symlink_to(root)
    for folder in (root, tmp_path / "linked"):
        assert [file.name for file in storage.list_files(str(folder))] == copied
    rows = data_files(f"{root}/*/*/*.txt")
    assert [os.path.relpath(each.address, root) for each in rows] == [
        "deep/er/own.txt",
        "deep/folder/file.txt",
    ]


def test_deleting_never_follows_links(tmp_path: Path) -> None:
    """As rm -r: the link goes, and what it leads to stays."""
    for name in ("other/model/manifest.json", "other/x.1234.unfinished", "run/own/file"):
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    (tmp_path / "other/x.1234.unfinished").write_text("someone writes it")
    run = tmp_path / "run"
    for name in ("linked", "own/linked"):
        (run / name).symlink_to(tmp_path / "other")
    (run / "broken").symlink_to(tmp_path / "nowhere")
    (run / "loop").symlink_to(run / "loop")
    found = [file.name for file in storage.list_files(str(run), follow_links=False)]
    assert found == ["own/file"]
    storage.delete_unfinished(str(run))
    storage.delete_folder(f"{run}/linked")
    assert not (run / "linked").is_symlink()
    storage.delete_folder(str(run))
    assert not run.exists()
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "model",
        "x.1234.unfinished",
    ]
    assert (tmp_path / "other/model/manifest.json").exists()


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_is_not_chosen_is_not_listed(kind: str, tmp_path: Path, s3: LocalS3) -> None:
    folder = str(tmp_path) if kind == "local" else f"s3://{s3.bucket}/chosen"
    for name in ("a", "b", "in/a", "in/deep/a", "out/a"):
        storage.write_bytes(f"{folder}/{name}", b"")
    chosen = {"a", "in/", "in/a", "in/deep/a", "out/a"}
    found = [file.name for file in storage.list_files(folder, chosen.__contains__)]
    assert found == ["a", "in/a"]


@pytest.mark.slow
def test_what_may_not_be_read_is_not_left_out(tmp_path: Path) -> None:
    """A folder, as another user, or a link to a file that is not there."""
    (tmp_path / "part").symlink_to(tmp_path / "not" / "mounted")
    with pytest.raises(storage.StorageError, match=r"part is a broken link to .*mounted; remedy:"):
        read_rows(str(tmp_path), ["text"])
    if os.getuid() != 0:
        pytest.skip("takes root, to become another user")
    program = """
import os, sys
from gptj import storage
os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        print([file.name for file in storage.list_files(folder)])
    except storage.AccessDeniedError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        for part in ("data/open", "data/closed", "disk/lost+found"):
            (Path(name) / part).mkdir(parents=True)
            (Path(name) / part / "rows.txt").write_text("row")
        os.chmod(name, 0o755)
        for closed in ("data/closed", "disk/lost+found"):
            (Path(name) / closed).chmod(0o700)
        folders = [f"{name}/{each}" for each in ("data", "data/closed", "data/open", "disk")]
        command = [sys.executable, "-c", program, *folders]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    denied = f"{name}/data/closed: Permission denied; remedy: check its owner and mode"
    assert lines == [denied, denied, "['rows.txt']", "[]"]


def test_files_that_others_delete_meanwhile_are_no_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a folder's listing and a look at what is in it: a file, a folder, then all."""
    for name in ("kept", "gone", "gone-folder/file", "kept-folder/gone"):
        storage.write_bytes(f"{tmp_path}/run/{name}", b"")
    run, scandir = tmp_path / "run", os.scandir
    inside = run / "kept-folder"

    def slow(path: Any) -> Any:
        with scandir(path) as listing:
            entries = list(listing)
        if path == run:
            (run / "gone").unlink(missing_ok=True)
            shutil.rmtree(run / "gone-folder", ignore_errors=True)
        if path == inside:
            shutil.rmtree(inside)
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", slow)
    assert [file.name for file in storage.list_files(str(run))] == ["kept"]
    monkeypatch.undo()
    shutil.rmtree(run)
    assert storage.list_files(str(run)) == []
