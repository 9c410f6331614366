"""A run's points in MLflow and Weights & Biases: their real libraries, without a server."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from gptj.environment import extras
from gptj.training import loop, trackers
from gptj.training.failures import StoppedError
from gptj.training.packages import check_packages
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.trackers import Trackers
from gptj_local.processes import HOST

# Each takes a second to import, which not each process has to.
mlflow = extras.Extra("mlflow", "these tests")
wandb = extras.Extra("wandb", "these tests")
messages = extras.Extra("wandb.proto.wandb_internal_pb2", "these tests", "wandb")
services = extras.Extra("wandb.sdk.lib.service.service_connection", "these tests", "wandb")

POINTS: list[dict[str, float]] = [
    {"step": 1, "loss": 2.5, "mfu": 0.4, "gradient_norm": 1.5},
    {"step": 2, "loss": float("nan"), "mfu": 0.5},
    {"step": 2, "evaluation_loss": 2.0},
]


def settings_of(folder: Path, **tracking: str) -> Settings:
    return Settings(
        run="reviews",
        storage=str(folder / "storage"),
        tracking=tracking,  # type: ignore[arg-type]
    )


def track(settings: Settings, scratch: Path, points: list[dict[str, float]]) -> None:
    scratch.mkdir()
    with Trackers.open(settings, scratch) as trackers:
        for point in points:
            trackers.point(point)
        trackers.publish()


@pytest.fixture
def file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # MLflow's own, of its file store
def test_mlflow_gets_the_settings_and_points_of_a_run_and_its_continuation(
    tmp_path: Path, file_store: str
) -> None:
    settings = settings_of(tmp_path, mlflow=file_store)
    with pytest.raises(RuntimeError, match="the worker died"), opened(settings, tmp_path / "one"):
        raise RuntimeError("the worker died")
    client = mlflow.MlflowClient(tracking_uri=file_store)
    experiment = client.get_experiment_by_name("gptj")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    with pytest.raises(StoppedError), opened(settings, tmp_path / "stopped"):
        raise StoppedError("stopped after step 1", "SIGTERM")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    track(settings, tmp_path / "two", POINTS)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "reviews")
    assert run.data.params["optimizer.learning_rate"] == "0.0003"
    assert run.data.params["data.sequence_length"] == "128"
    metrics = {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in ("loss", "mfu", "evaluation_loss")
    }
    assert metrics == {
        "loss": [(1, 2.5)],
        "mfu": [(1, 0.4), (2, 0.5)],
        "evaluation_loss": [(2, 2.0)],
    }


def opened(settings: Settings, scratch: Path) -> Trackers:
    scratch.mkdir()
    return Trackers.open(settings, scratch)


def records(content: bytes) -> Iterator[bytes]:
    """Of wandb's file: a header of 7 bytes, then LevelDB's log format."""
    assert content[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a block's trailer
            place += 32768 - place % 32768
        size, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole, or the last part
            yield record
            record = b""


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """It reads its environment variables once a process, unless it is torn down."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
def test_an_offline_run_of_weights_and_biases_is_kept_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_wandb: None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    # The run's end reaches its service late: finish() only posts it.
    monkeypatch.setattr(services.ServiceConnection, "inform_finish", lambda self, run_id: None)
    settings = settings_of(tmp_path, wandb="team/gptj")
    track(settings, tmp_path / "scratch", POINTS)
    (file,) = Path(settings.folder, "wandb").glob("offline-run-*/*.wandb")
    logged: list[dict[str, Any]] = []
    names: set[tuple[str, str]] = set()
    for data in records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            names.add((record.run.entity, record.run.project))
        if record.HasField("history"):
            items = record.history.item
            logged.append({(i.key or ".".join(i.nested_key)): i.value_json for i in items})
    assert names == {("team", "gptj")}
    assert [point.get("step") for point in logged] == ["1", "2", "2"]
    assert logged[0]["loss"] == "2.5" and "loss" not in logged[1]
    assert logged[2]["evaluation_loss"].startswith("2")


@pytest.mark.slow
def test_a_tracker_without_credentials_is_refused_with_the_librarys_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_wandb: None
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SettingsError, match=r"tracking\.wandb=gptj: .*(api_key|API key|login)"):
        opened(settings_of(tmp_path, wandb="gptj"), tmp_path / "scratch")
    with pytest.raises(SettingsError, match=r"tracking\.mlflow=nothing:///x: "):
        opened(settings_of(tmp_path, mlflow="nothing:///x"), tmp_path / "other")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tracker_that_is_down_as_a_run_resumes_costs_a_warning(
    tmp_path: Path,
    file_store: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker's restart does not end the run, and the other tracker goes on."""
    monkeypatch.setattr(trackers.WandbTracker, "__init__", refuse)
    settings = settings_of(tmp_path, mlflow=file_store, wandb="team/gptj")
    with pytest.raises(SettingsError, match=r"tracking\.wandb=team/gptj: the server is gone"):
        Trackers.open(settings, tmp_path)
    before = {"mlflow": file_store, "wandb": "team/gptj"}
    with (
        caplog.at_level(logging.WARNING, "gptj.training.trackers"),
        Trackers.open(settings, tmp_path, before=before) as found,
    ):
        found.point(POINTS[0])
    assert [type(each).__name__ for each in found._trackers] == ["MLflowTracker"]
    assert "without tracking.wandb=team/gptj until the next restart: the server" in caplog.text


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an MLflow server that is not there."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    return f"http://{HOST}:{port}"


@pytest.mark.parametrize(
    ("before", "opened_by", "refused"),
    [
        (None, None, True),  # a new run, or one whose workers died before they opened them
        ({}, None, True),  # the setting is new, or has changed: it may be mistyped
        ({"mlflow": "http://mlflow"}, None, True),
        ({"mlflow": "the same"}, None, False),
        (None, "other", True),  # submitted again, perhaps with another setting
        (None, "this", False),
    ],
)
def test_a_tracker_that_is_down_ends_a_run_only_if_it_never_worked(
    before: dict[str, str] | None,
    opened_by: str | None,
    refused: bool,
    down: str,
    tmp_path: Path,
    file_store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "agree", lambda value: value)
    worker = loop.Worker(0, 1, torch.device("cpu"), report=refuse)
    settings = settings_of(tmp_path, mlflow=down)
    if opened_by is not None:
        working = settings_of(tmp_path, mlflow=file_store)
        loop._trackers(working, worker, tmp_path, opened_by, None).__exit__(None, None, None)
    if before == {"mlflow": "the same"}:
        before = {"mlflow": down}
    record = Path(settings.folder) / loop.TRACKED
    written = record.read_text() if opened_by is not None else None
    with pytest.raises(SettingsError, match=down) if refused else nullcontext():
        loop._trackers(settings, worker, tmp_path, "this", before)
    # One that is down has not been opened.
    assert (record.read_text() if record.exists() else None) == written


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_damaged_record_of_opened_trackers_only_has_them_checked_again(
    file_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "agree", lambda value: value)
    worker = loop.Worker(0, 1, torch.device("cpu"), report=refuse)
    settings = settings_of(tmp_path, mlflow=file_store)
    record = Path(settings.folder) / loop.TRACKED
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("")
    with loop._trackers(settings, worker, tmp_path, "this", None):
        assert json.loads(record.read_text()) == {"submission": "this"}


@pytest.mark.parametrize(
    ("status", "code", "refused"),
    [
        (401, None, True),
        (404, None, True),
        (403, "PERMISSION_DENIED", True),
        (408, None, False),
        (400, "REQUEST_LIMIT_EXCEEDED", False),
        (400, "RESOURCE_EXHAUSTED", False),
        (429, None, False),
        (503, None, False),
    ],
)
def test_a_resumed_run_ends_if_its_tracker_refuses_but_not_if_it_is_down(
    status: int,
    code: str | None,  # MLflow's own, which counts more than HTTP's
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Credentials are given anew to each submission, and can be wrong."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if code is None:
                self.send_error(status)
                return
            content = json.dumps({"error_code": code, "message": f"error code {status}"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with HTTPServer((HOST, 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = settings_of(tmp_path, mlflow=f"http://{HOST}:{server.server_port}")
        before = {"mlflow": settings.tracking.mlflow}
        try:
            with (
                pytest.raises(SettingsError, match=f"error code {status}")
                if refused
                else nullcontext()
            ):
                Trackers.open(settings, tmp_path, before=before)
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlflow:5000", "has no scheme; remedy: http://mlflow:5000 or https://mlflow:5000"),
        ("127.0.0.1:5000", "has no scheme; remedy: http://127.0.0.1:5000"),
        ("[::1]:5000/prefix", r"has no scheme; remedy: http://\[::1\]:5000/prefix"),
        ("my_host.example.com:80", "has no scheme"),
        ("http:/mlflow:5000", "names no host; remedy: as in http://mlflow:5000"),
        ("https://", "names no host"),
        ("http://[mlflow", "is not an address: Invalid IPv6 URL"),
    ],
)
def test_a_server_without_scheme_or_host_is_refused(uri: str, message: str) -> None:
    """MLflow would take it for a folder, or name neither the setting nor the remedy."""
    with pytest.raises(SettingsError, match=rf"tracking\.mlflow.*{message}"):
        read_settings([f"tracking.mlflow='{uri}'"])


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://mlflow:hunter2@db/mlflow",
        "mysql+pymysql://db/mlflow?user=mlflow&password=hunter2",
        "http://user:hunter2@mlflow:5000",
        "https://hunter2@mlflow",
        "http://mlflow:5000?access_token=hunter2",
        *(f"http://user:hun{mark}hunter2@mlflow:5000" for mark in "/?#@:"),
        "user:hunter2@mlflow:5000",
        "hunter2@mlflow:5000",
        "//user:hunter2@mlflow",
        "user:hunter2@mlflow",
        "file://user:hunter2@host/runs",
        "sqlite+pysqlite://user:hunter2@host/a.db",
        "http://user:hunter2@h℀st",  # which urlsplit refuses, and shows
        "http://[user:hunter2@host",
    ],
)
def test_a_trackers_password_is_refused_and_never_shown(uri: str, tmp_path: Path) -> None:
    """In an argument or a file: the settings are printed, and go wherever the model goes."""
    (tmp_path / "settings.yaml").write_text(json.dumps({"tracking": {"mlflow": uri}}))
    for word in (f"tracking.mlflow='{uri}'", str(tmp_path / "settings.yaml")):
        with pytest.raises(SettingsError) as refused:
            read_settings([word])
        assert "remedy: leave it out, and set MLFLOW_TRACKING_USERNAME" in str(refused.value)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="tracking") as invalid:
        Settings(tracking={"mlflow": uri})  # type: ignore[arg-type]
    assert "hunter2" not in str(invalid.value)


def test_other_addresses_of_mlflow_are_accepted() -> None:
    for uri in (
        *("http://mlflow:5000", "./mlflow:5000", "mlruns", "databricks", "databricks://work"),
        *("sqlite:///a.db", "postgresql+psycopg2://db:5432/mlflow", "file:runs"),
        *("./me@work", "file:///home/me@work/runs", "sqlite:////home/me@work/a.db?mode=ro"),
        *("sqlite+pysqlite:////home/me@work/a.db", "http://mlflow:5000/me%40work"),
    ):
        assert read_settings([f"tracking.mlflow={uri}"]).tracking.mlflow == uri


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tracker_that_fails_later_costs_a_warning(
    tmp_path: Path, file_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path, mlflow=file_store)
    with (
        caplog.at_level(logging.WARNING, "gptj.training.trackers"),
        opened(settings, tmp_path / "scratch") as trackers,
    ):
        client = trackers._trackers[0]._client  # type: ignore[attr-defined]
        client.log_batch = refuse
        trackers.point({"step": 1, "loss": 1.0})
    assert "MLflowTracker: the server is gone" in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lost_point_does_not_affect_others(
    tmp_path: Path, file_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path, mlflow=file_store)
    with opened(settings, tmp_path / "scratch") as trackers:
        tracker: Any = trackers._trackers[0]
        log_batch = tracker._client.log_batch
        for step in (1, 2, 3):
            tracker._client.log_batch = refuse if step == 1 else log_batch
            trackers.point({"step": step, "loss": 1.0})
            wait([future for future in tracker._sent if not future.done()])
    assert "the server is gone" in caplog.text
    client = mlflow.MlflowClient(tracking_uri=file_store)
    history = client.get_metric_history(tracker._run, "loss")
    assert [each.step for each in history] == [2, 3]


def refuse(*arguments: object, **options: object) -> None:
    raise ConnectionError("the server is gone")


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["tracking.mlflow=http://m"], "mlflow", "trackers"),
        (["tracking.wandb=gptj"], "wandb", "trackers"),
        (["optimizer.moments=8bit"], "bitsandbytes", "train"),
        (["model.checkpoint=x", "adapter.quantization=nf4"], "bitsandbytes", "train"),
    ],
)
def test_a_missing_package_is_named_before_the_run_begins(
    words: list[str], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_packages(read_settings(words))
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as refused:
        check_packages(read_settings(words))
    setting = words[-1].partition("=")[0]
    assert str(refused.value).startswith(setting)
    assert f"needs the package {package}" in str(refused.value)
    assert f"pip install 'gptj-platform[{extra}]'" in str(refused.value)


def test_a_project_may_have_an_entity() -> None:
    for name in ("gptj", "team/gptj"):
        assert read_settings([f"tracking.wandb={name}"]).tracking.wandb == name
    for wrong in ("a/b/c", "https://wandb.ai", "a:b", "a" * 129):
        with pytest.raises(SettingsError, match=r"tracking\.wandb"):
            read_settings([f"tracking.wandb={wrong}"])
