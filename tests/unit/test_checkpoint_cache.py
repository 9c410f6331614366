"""The node's checkpoint cache, with a real S3 server and real processes that may be killed."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, storage
from gptj.checkpoints.cache import FOLDER_VARIABLE, SIZE_VARIABLE, CheckpointCache, Lease
from gptj.checkpoints.manifest import MANIFEST, FolderWriter, Manifest
from gptj.errors import CheckpointError
from gptj_local.s3 import LocalS3

SIZE = 100_000  # bytes of a checkpoint here
CONFIG = GPTJConfig(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)


@pytest.fixture
def bucket(s3: LocalS3, tmp_path: Path) -> str:
    return f"s3://gptj/{tmp_path.name}"


@pytest.fixture
def cache(tmp_path: Path) -> CheckpointCache:
    """Room for two checkpoints."""
    return CheckpointCache(tmp_path / "cache", int(2.5 * SIZE))


def write(address: str, size: int = SIZE) -> Manifest:
    with FolderWriter(address) as writer:
        writer.write("a.bin", os.urandom(size // 2))
        writer.write("deep/b.bin", os.urandom(size - size // 2))
    return read(address)


def read(address: str) -> Manifest:
    manifest = Manifest.read(address)
    assert manifest is not None
    return manifest


def assert_equal(lease: Lease | None, address: str) -> None:
    assert lease is not None
    for name in read(address).files:
        expected = storage.read_bytes(storage.join(address, name))
        assert Path(lease.folder, name).read_bytes() == expected, name


def use(cache: CheckpointCache, address: str, *, verify: bool = True) -> str:
    """Cache a checkpoint; returns its cached folder."""
    lease = cache.lease(address, read(address), verify=verify)
    assert_equal(lease, address)
    assert lease is not None
    lease.close()
    return lease.folder


def bytes_in(cache: CheckpointCache) -> int:
    paths = (path for path in cache.folder.rglob("*") if path.is_file())
    return sum(p.stat().st_size for p in paths if p.suffix != ".lock" and p.name != MANIFEST)


def test_a_cached_checkpoint_is_not_downloaded_again(cache: CheckpointCache, bucket: str) -> None:
    manifest = write(f"{bucket}/a")
    use(cache, f"{bucket}/a")
    for name in manifest.files:
        storage.delete(f"{bucket}/a/{name}")
    lease = cache.lease(f"{bucket}/a", manifest)
    assert lease is not None
    assert Path(lease.folder, "deep", "b.bin").stat().st_size == SIZE // 2


def test_a_replaced_checkpoint_is_downloaded_again(cache: CheckpointCache, bucket: str) -> None:
    write(f"{bucket}/a")
    first = use(cache, f"{bucket}/a")
    storage.delete_folder(f"{bucket}/a")
    write(f"{bucket}/a")
    assert use(cache, f"{bucket}/a") != first


@pytest.mark.parametrize("change", ["altered", "cut off", "missing"])
def test_a_damaged_copy_is_detected_and_downloaded_again(
    change: str, cache: CheckpointCache, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(f"{bucket}/a")
    path = Path(use(cache, f"{bucket}/a"), "a.bin")
    content = path.read_bytes()
    if change == "altered":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif change == "cut off":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    # Sizes are looked at in any case; that content is read can be left out.
    use(cache, f"{bucket}/a", verify=change == "altered")
    assert "a.bin" in caplog.text
    assert "fetching" in caplog.text


def test_the_least_recently_used_checkpoint_is_evicted_first(
    cache: CheckpointCache, bucket: str
) -> None:
    for name in "abc":
        write(f"{bucket}/{name}")
    a, b = use(cache, f"{bucket}/a"), use(cache, f"{bucket}/b")
    use(cache, f"{bucket}/a")
    c = use(cache, f"{bucket}/c")
    assert [Path(folder).exists() for folder in (a, b, c)] == [True, False, True]
    assert bytes_in(cache) == 2 * SIZE


def test_a_checkpoint_in_use_is_never_evicted(
    cache: CheckpointCache, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    leases = [cache.lease(f"{bucket}/{name}", write(f"{bucket}/{name}")) for name in "ab"]
    third = write(f"{bucket}/c")
    assert cache.lease(f"{bucket}/c", third) is None
    assert "in use" in caplog.text
    for name, lease in zip("ab", leases, strict=True):
        assert_equal(lease, f"{bucket}/{name}")
    assert leases[0] is not None
    leases[0].close()
    assert_equal(cache.lease(f"{bucket}/c", third), f"{bucket}/c")
    assert_equal(leases[1], f"{bucket}/b")


def test_a_damaged_copy_in_use_is_left_to_its_users(cache: CheckpointCache, bucket: str) -> None:
    manifest = write(f"{bucket}/a")
    user = cache.lease(f"{bucket}/a", manifest)
    assert user is not None
    path = Path(user.folder, "a.bin")
    path.write_bytes(bytes(len(path.read_bytes())))
    assert cache.lease(f"{bucket}/a", manifest) is None
    assert path.exists()
    user.close()
    use(cache, f"{bucket}/a")


def test_a_checkpoint_larger_than_the_cache_is_not_cached(
    cache: CheckpointCache, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.lease(f"{bucket}/a", write(f"{bucket}/a", 3 * SIZE)) is None
    assert f"{3 * SIZE} bytes" in caplog.text
    assert not cache.folder.exists()


def test_an_altered_checkpoint_leaves_nothing_in_the_cache(
    cache: CheckpointCache, bucket: str
) -> None:
    manifest = write(f"{bucket}/a")
    storage.write_bytes(f"{bucket}/a/a.bin", bytes(SIZE // 2))
    with pytest.raises(CheckpointError, match=r"s3://.*a\.bin was altered"):
        cache.lease(f"{bucket}/a", manifest)
    assert bytes_in(cache) == 0
    assert cache.lease(f"{bucket}/b", write(f"{bucket}/b", 2 * SIZE)), "nothing stays reserved"


PROCESS = """
import sys, time
from pathlib import Path
from gptj.checkpoints import cache as checkpoint_cache
from gptj.checkpoints.manifest import Manifest, verify

cache = checkpoint_cache.CheckpointCache(Path(sys.argv[1]), int(sys.argv[2]))
fetch, stream, fetches = cache._fetch, checkpoint_cache.stream, []
object.__setattr__(cache, "_fetch", lambda *each: fetches.append(each) or fetch(*each))

def slowly(*arguments):
    for part in stream(*arguments):
        yield part
        print("fetching", flush=True)
        time.sleep(600)

if sys.argv[4] == "slowly":
    checkpoint_cache.stream = slowly
manifest = Manifest.read(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
lease = cache.lease(sys.argv[3], manifest)
verify(lease.folder)
print(len(fetches))
"""


def start(cache: CheckpointCache, address: str, how: str) -> subprocess.Popen[str]:
    arguments = [str(cache.folder), str(cache.limit), address, how]
    command = [sys.executable, "-c", PROCESS, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.slow
def test_concurrent_processes_download_a_checkpoint_once(
    cache: CheckpointCache, bucket: str
) -> None:
    write(f"{bucket}/a")
    processes = [start(cache, f"{bucket}/a", "at once") for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        begin(each)
    fetches = [int(each.communicate(timeout=120)[0]) for each in processes]
    assert sum(fetches) == 1, fetches


@pytest.mark.slow
def test_a_process_killed_while_downloading_does_no_harm(
    cache: CheckpointCache, bucket: str
) -> None:
    write(f"{bucket}/a")
    killed = start(cache, f"{bucket}/a", "slowly")
    begin(killed)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "ready\n"
    assert killed.stdout.readline() == "fetching\n"
    # Somebody else is fetching: its room is taken, and what it has is not used.
    assert cache.lease(f"{bucket}/b", write(f"{bucket}/b", 2 * SIZE)) is None
    killed.kill()
    killed.communicate(timeout=60)
    (left,) = (path for path in cache.folder.iterdir() if path.is_dir())
    assert not (left / MANIFEST).exists()
    use(cache, f"{bucket}/b")  # which needs the room of what was left
    assert not left.exists()
    assert bytes_in(cache) == 2 * SIZE
    use(cache, f"{bucket}/a")


def test_models_come_from_the_cache(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model, another = GPTJForCausalLM(CONFIG), GPTJForCausalLM(CONFIG)
    model.save_pretrained(f"{bucket}/a/model")
    another.save_pretrained(f"{bucket}/b/model")
    size = read(f"{bucket}/a/model").size
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(SIZE_VARIABLE, str(1.5 * size / 1e9))
    loaded = GPTJForCausalLM.from_pretrained(f"{bucket}/a/model")
    assert caplog.text == ""
    storage.delete(f"{bucket}/a/model/model.safetensors")
    again = GPTJForCausalLM.from_pretrained(f"{bucket}/a/model")
    for each in (loaded, again):
        for name, tensor in model.state_dict().items():
            assert torch.equal(each.state_dict()[name], tensor), name
    # Both have its files as their memory, so it stays; the other one is read from S3.
    other = GPTJForCausalLM.from_pretrained(f"{bucket}/b/model")
    assert "in use" in caplog.text
    assert torch.equal(other.lm_head.weight, another.lm_head.weight)
    del loaded, again, each, tensor
    gc.collect()
    caplog.clear()
    GPTJForCausalLM.from_pretrained(f"{bucket}/b/model", dtype=torch.float16)  # copies only
    GPTJForCausalLM.from_pretrained(f"{bucket}/b/model", dtype=torch.float16)
    assert caplog.text == ""


def test_the_cache_is_off_unless_folder_and_size_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER_VARIABLE, SIZE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert CheckpointCache.from_environment() is None
    monkeypatch.setenv(FOLDER_VARIABLE, "/var/cache/gptj")
    with pytest.raises(ValueError, match=SIZE_VARIABLE):
        CheckpointCache.from_environment()
    monkeypatch.setenv(SIZE_VARIABLE, "60")
    assert CheckpointCache.from_environment() == CheckpointCache(
        Path("/var/cache/gptj"), 60_000_000_000
    )
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv(SIZE_VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"positive number of GB, got '{wrong}'"):
            CheckpointCache.from_environment()
