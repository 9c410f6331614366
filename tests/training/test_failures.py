"""Which errors end a run at once, and which are retried."""

from __future__ import annotations

import json
import pickle
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from shutil import _ntuple_diskusage as usage  # type: ignore[attr-defined]
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from gptj import storage
from gptj.checkpoints.manifest import Manifest, describe
from gptj.data.sources import DataError
from gptj.errors import CheckpointError
from gptj.storage.lease import take_over
from gptj.storage.scratch import scratch_folder
from gptj.training import engine_state, room
from gptj.training.failures import (
    DiskFullError,
    DivergedError,
    StoppedError,
    UnrecoverableError,
    naming_full_disk,
    unrecoverable,
)
from gptj.training.settings import Settings, SettingsError
from gptj.training.state import PROGRESS, manifest_name
from gptj_bench import training_faults
from gptj_jobs import preparing
from gptj_jobs.stopping import PREEMPTED, Notices
from jobs import finetune
from jobs.finetune import EndAtOnce, check_address, explained


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "error",
    [
        SettingsError("why"),
        DataError("why"),
        CheckpointError("why"),
        DivergedError("why"),
        DiskFullError("why"),
        StoppedError("why", "SIGTERM"),
        storage.NotFoundError("why"),
        storage.AccessDeniedError("why"),
    ],
)
def test_permanent_errors_end_the_run(error: Exception) -> None:
    assert unrecoverable(error) == "why"
    assert unrecoverable(pickle.loads(pickle.dumps(error))) == "why"


@pytest.mark.parametrize(
    "error",
    [
        storage.UnreachableError("no answer"),
        storage.StorageError("s3://b/k: an internal error"),
        RuntimeError("Connection closed by peer"),
        TimeoutError(),
        MemoryError(),
        ValueError("some library's"),
    ],
)
def test_transient_errors_are_retried(error: Exception) -> None:
    assert unrecoverable(error) is None


def test_a_full_disk_is_named_whichever_library_fails(small_disk: Path) -> None:
    """PyTorch's writer says "iostream error" or the like, and numbers no file."""
    with pytest.raises(storage.StorageError) as full:
        storage.write_bytes(str(small_disk / "results"), bytes(2**21))
    message = unrecoverable(full.value)
    assert message is not None
    assert "the disk is full" in message
    assert "results" in message
    with (
        pytest.raises(
            DiskFullError,
            match=f"the disk of {small_disk}, 0.00105 GB in all, is full: 0.00419 GB are needed "
            f"there and 0.00105 GB are available; remedy: free space there, or set TMPDIR",
        ),
        naming_full_disk(small_disk, 2**22),
    ):
        torch.save(torch.zeros(2**20), small_disk / "shard.pt")


def disks(monkeypatch: pytest.MonkeyPatch, *needs: tuple[str, int, int]) -> None:
    """What each rank says of its disk: (boot, bytes needed, bytes free)."""

    def gathered(found: list[object], mine: object) -> None:
        found[:] = [[room.Need("node", boot, 7, "/tmp", *sizes)] for boot, *sizes in needs]

    monkeypatch.setattr(room.dist, "get_world_size", lambda: len(needs))
    monkeypatch.setattr(room.dist, "all_gather_object", gathered)


def test_ranks_on_one_machine_share_its_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks(monkeypatch, ("a", 60, 100), ("b", 60, 100))
    room.check_room(tmp_path, "s3://bucket/run", 60)
    disks(monkeypatch, ("a", 60, 100), ("a", 60, 100))
    with pytest.raises(DiskFullError, match="on node node has no room for a checkpoint"):
        room.check_room(tmp_path, "s3://bucket/run", 60)


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with 1 GB for our files, of which a part of a checkpoint takes 0.4 GB."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GPTJ_SCRATCH_GB", "1")
    with scratch_folder() as folder:
        with (folder / "part").open("wb") as file:
            file.truncate(4 * 10**8)
        monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(10**13, 0, 10**13))
        yield folder


def test_a_checkpoint_fits_into_what_temporary_files_may_take(
    limited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all ranks in the pod, though the disk, which is larger than the volume, has room."""
    monkeypatch.setattr(room.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        room.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(2), [mine] * 2)
    )
    room.check_room(limited, "s3://bucket/run", 2 * 10**8)
    with pytest.raises(
        DiskFullError,
        match=r"^GPTJ_SCRATCH_GB=1 leaves 0\.6 GB in .* on node .* for a checkpoint, of which its "
        r"2 workers write 0\.867 GB; remedy: enlarge the volume",
    ):
        room.check_room(limited, "s3://bucket/run", 4 * 10**8)
    room.check_room_for("s3://b/r/shard", 6 * 10**8, limited)
    with pytest.raises(DiskFullError, match=r" in .* for s3://b/r/shard, which needs 0\.7 GB; "):
        room.check_room_for("s3://b/r/shard", 7 * 10**8, limited)
    room.check_room_for("s3://b/r/shard", 7 * 10**8, Path("/elsewhere"))
    monkeypatch.setenv("GPTJ_SCRATCH_GB", "all")
    with pytest.raises(ValueError, match="GPTJ_SCRATCH_GB must be a positive number") as invalid:
        room.check_room_for("s3://b/r/shard", 1, limited)
    assert unrecoverable(invalid.value) == str(invalid.value)


def test_a_file_system_without_sizes_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As buckets do that are mounted."""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    assert room._need(tmp_path / "not" / "there", 10**12).free > 10**12
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(9, 9, 0))
    assert room._need(tmp_path, 1).free == 0


def test_a_checkpoints_file_is_fetched_only_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(10**10, 0, 10**9))
    room.check_room_for("s3://b/r/shard", 10**9, tmp_path)
    with pytest.raises(
        DiskFullError, match=f"{tmp_path} has no room for s3://b/r/shard: 2 GB are needed there"
    ):
        room.check_room_for("s3://b/r/shard", 2 * 10**9, tmp_path)


def test_a_checkpoints_file_that_no_manifest_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shard is not in the folder's manifest"):
        engine_state._fetch("s3://b/r", "shard", Manifest("s3://b/r", {}), tmp_path)


def test_the_benchmark_of_faults_brings_the_storage_back_after_one_that_failed() -> None:
    called: list[str] = []

    def watch(seconds: float) -> None:
        raise RuntimeError("the run does not go on")

    cluster: Any = SimpleNamespace(
        end_s3=lambda: called.append("end"), restart_s3=lambda: called.append("restart")
    )
    run: Any = SimpleNamespace(watch=watch)
    with pytest.raises(RuntimeError, match="does not go on"):
        training_faults._s3_down(cluster, run)
    assert called == ["end", "restart"]


@pytest.mark.parametrize(
    ("count", "gpus", "wanted"), [(2, 0, 2), ((1, 3), 0, 3), ((1, 9), 0, 4), ((1, 9), 1, 2)]
)
def test_elastic_workers_start_as_many_as_all_nodes_could_hold(
    count: int | tuple[int, int], gpus: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train counts what others use as well, and would wait for it for ever."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    ]
    monkeypatch.setattr(finetune.ray, "nodes", lambda: nodes)
    settings = Settings(workers={"count": count, "cpus": 2})  # type: ignore[arg-type]
    assert finetune.workers_to_start(settings, bool(gpus)) == wanted


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError("Task was killed.\nRefer to the documentation."), "Task was killed"),
        (RayTaskError("map", "ray::map()\nValueError: odd", ValueError()), "ValueError: odd"),
    ],
)
def test_what_ray_says_while_data_are_prepared_is_one_line(error: Exception, reason: str) -> None:
    def rows() -> Iterator[Any]:
        raise error
        yield

    with pytest.raises(OSError, match=f"preparing the data: {reason}.*; rerun the command"):
        list(preparing._rows(SimpleNamespace(iter_rows=rows)))


def test_a_controller_that_was_killed_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line, and not in a traceback; the workers have ended with it."""

    def fit() -> None:
        raise ActorDiedError

    counted: list[str] = []
    monkeypatch.setattr(finetune, "check_inputs", lambda settings, shared: (None, 9, None))
    monkeypatch.setattr(finetune, "_has_fitted", lambda settings: True)
    monkeypatch.setattr(finetune, "OnSigterm", lambda stop_signal: nullcontext())
    monkeypatch.setattr(finetune, "build_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(finetune, "count_failure", counted.append)
    with pytest.raises(SystemExit, match=r"controller has ended: .* the same command resumes"):
        finetune.fine_tune(
            Settings(run="r"),
            False,
            take_over(str(tmp_path / "lease")),
            "submission",
            tmp_path,
            None,
        )
    assert counted == ["r"]


def test_other_errors_are_unchanged_if_the_disk_has_room(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a collective"), naming_full_disk(tmp_path):
        raise RuntimeError("a collective failed")
    assert list(tmp_path.iterdir()) == []


def test_the_cause_is_reported_once_with_the_tries_if_any() -> None:
    settings = Settings(run="r", storage="s3://b", workers={"max_failures": 3})  # type: ignore[arg-type]
    workers = {1: RuntimeError("a peer left"), 0: DivergedError("the loss is nan at step 7")}
    with pytest.raises(ControllerError) as ended:
        EndAtOnce().after_exception(None, workers)
    again = pickle.loads(pickle.dumps(ended.value))  # as it comes from the controller
    assert isinstance(again.controller_failure, UnrecoverableError)
    assert explained(again, settings) == "the loss is nan at step 7"
    EndAtOnce().after_exception(None, {1: RuntimeError("a peer left")})  # for Ray's own policy

    repeated: TrainingFailedError = WorkerGroupError("a peer left", {1: RuntimeError()})
    assert "failed 4 times in all. The checkpoints in s3://b/r are kept" in explained(
        repeated, settings
    )
    once: TrainingFailedError = ControllerError(OSError("no snapshot"))
    assert "no snapshot" in explained(once, settings)
    assert "times" not in explained(once, settings)
    settings = Settings(workers={"max_failures": 0})  # type: ignore[arg-type]
    assert "times" not in explained(repeated, settings)


def test_the_jobs_apis_address_is_not_taken_for_the_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SettingsError, match=r"http://127.0.0.1:8265 is where jobs are submitted"):
        check_address()
    for address in ("127.0.0.1:6379", "auto", "ray://10.0.0.1:10001"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_address()


@pytest.mark.parametrize("reason", [PREEMPTED, "the job was told to stop (SIGTERM)"])
def test_a_worker_without_a_notice_stops_like_the_others(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tells the workers of a preemption one after the other, and all stop with the first."""

    def stopped(*_: object) -> None:
        raise StoppedError("stopped after step 3", reason)

    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(finetune, "_log_to_stdout", lambda: None)
    monkeypatch.setattr(finetune, "train", stopped)
    monkeypatch.setattr(
        finetune, "Notices", lambda stop_signal: SimpleNamespace(reason=lambda: None)
    )
    monkeypatch.setattr(finetune, "TrainingMetrics", _NoMetrics)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("GPTJ_ATTEMPT", "1")
    claim = {"folder": "", "generation": 1, "owner": ""}
    config = {
        "settings": {},
        "claim": claim,
        "stop_signal": None,
        "submission": "s",
        "prepared": {},
    }
    config["commit"] = None
    with pytest.raises((RayActorError, StoppedError)) as ended:
        finetune.work(config)
    elsewhere = isinstance(ended.value, RayActorError) and ended.value.preempted
    assert elsewhere == (reason == PREEMPTED)


def test_a_stop_request_takes_precedence_over_a_preemption() -> None:
    """For a run that is to end must not start elsewhere."""
    notices = Notices.__new__(Notices)
    preemption = SimpleNamespace(preemption_info=None)
    notices._context = SimpleNamespace(preemption_context=preemption)  # type: ignore[assignment]
    notices._asked = None
    assert notices.reason() is None
    preemption.preemption_info = object()
    assert notices.reason() == PREEMPTED
    notices._asked = "SIGTERM"
    assert notices.reason() == "SIGTERM"


@pytest.mark.parametrize(
    ("change", "fitted"),
    [
        ({}, True),
        ({"log_every": 1, "keep_checkpoints": 9}, True),
        ({"workers": {"count": 1}}, False),
        ({"deepspeed": {"stage": 0}}, False),
        ({"micro_batch_size": 4}, False),
    ],
)
def test_changes_of_a_resumed_run_may_need_more_memory(
    change: dict[str, object], fitted: bool, tmp_path: Path
) -> None:
    fields = {"storage": str(tmp_path), "micro_batch_size": 2, "workers": {"count": 2}}
    settings = Settings(**fields)  # type: ignore[arg-type]
    assert not finetune._has_fitted(settings)
    folder = Path(settings.folder, "checkpoint-00000001")
    content = json.dumps({"step": 1, "settings": settings.model_dump(mode="json")})
    storage.write_bytes(str(folder / PROGRESS), content.encode())
    Manifest(str(folder), describe(str(folder), [PROGRESS]).files).write(manifest_name(0, 1))
    assert finetune._has_fitted(Settings(**{**fields, **change})) == fitted  # type: ignore[arg-type]


class _NoMetrics(nullcontext[None]):
    def __init__(self, run: str) -> None:
        super().__init__()

    def point(self, point: object) -> None:
        """Nobody looks."""
