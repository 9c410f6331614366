"""Log a run's points to MLflow and Weights & Biases through their own libraries.

Addresses, credentials and offline modes come from their own environment variables, such as
WANDB_API_KEY, WANDB_MODE=offline and MLFLOW_TRACKING_TOKEN. A resumed run continues the same run
there, identified by the run's folder.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gptj import storage
from gptj.environment.extras import Extra
from gptj.training.failures import StoppedError
from gptj.training.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
mlflow = Extra("mlflow", "tracking.mlflow")
wandb = Extra("wandb", "tracking.wandb")

FOLDER = "wandb"  # for offline runs, in the run's folder
FOLDER_TAG = "gptj.folder"
PARAMETERS = 100  # MLflow's limit per request
LONGEST = 6000  # MLflow's limit on a parameter's characters
IN_TIME = 60.0  # seconds to wait for the last points to be sent


Ending = Literal["finished", "stopped", "failed"]  # stopped: and to be resumed


class Tracker(ABC):
    """A destination of a run's points."""

    @abstractmethod
    def point(self, point: Mapping[str, float]) -> None:
        """Log a point: finite numbers, including `step`."""

    @abstractmethod
    def publish(self) -> None:
        """Copy local files, if any, to the run's folder."""

    @abstractmethod
    def close(self, ending: Ending) -> None: ...

    @staticmethod
    @abstractmethod
    def is_refusal(error: Exception) -> bool:
        """Whether opening failed because of the address or the credentials: trying later is no
        use."""


class Trackers:
    """All of a run's trackers; a context manager.

    Errors after opening are only logged: the run does not depend on trackers.
    """

    def __init__(self, trackers: list[Tracker], *, complete: bool = True) -> None:
        self._trackers = trackers
        self.complete = complete  # none is missing because it failed

    @classmethod
    def open(
        cls,
        settings: Settings,
        scratch: Path,
        *,
        before: Mapping[str, Any] | None = None,
        accepted: bool = False,
    ) -> Trackers:
        """Open the settings' trackers.

        One that has worked for this run before may be down now: it costs a warning, not the run.

        Args:
            before: settings.tracking of the checkpoint that the run resumes from, if any.
            accepted: whether this submission has opened them before: nobody watches its restarts.

        Raises:
            SettingsError: with the library's message, if another one fails, or one refuses the
                address or the credentials.
        """
        found: list[Tracker] = []
        complete = True
        kinds: list[tuple[str, str | None, type[MLflowTracker] | type[WandbTracker]]] = [
            ("mlflow", settings.tracking.mlflow, MLflowTracker),
            ("wandb", settings.tracking.wandb, WandbTracker),
        ]
        for name, given, kind in kinds:
            if not given:
                continue
            try:
                found.append(kind(settings, scratch))
            except Exception as error:  # both libraries pass on any error of their transports
                known = before is not None and before.get(name) == given
                if accepted or (known and not kind.is_refusal(error)):
                    logger.warning(
                        "going on without tracking.%s=%s until the next restart: %s",
                        name,
                        given,
                        error,
                    )
                    complete = False
                    continue
                for each in found:
                    each.close("failed")
                raise SettingsError(
                    f"tracking.{name}={given}: {error}; remedy: start the server if it is down, "
                    f"correct the setting or the credentials in the workers' environment, or leave "
                    f"it out"
                ) from error
        return cls(found, complete=complete)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stopped = isinstance(error, StoppedError)
        ending: Ending = "finished" if error is None else "stopped" if stopped else "failed"
        for tracker in self._trackers:
            self._guarded(tracker, lambda each: each.close(ending))
            self._guarded(tracker, lambda each: each.publish())

    def point(self, point: Mapping[str, float]) -> None:
        """Log a point of the run's history, without non-finite values."""
        finite = {name: value for name, value in point.items() if math.isfinite(value)}
        for tracker in self._trackers:
            self._guarded(tracker, lambda each: each.point(finite))

    def publish(self) -> None:
        for tracker in self._trackers:
            self._guarded(tracker, lambda each: each.publish())

    def _guarded(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(tracker)
        except Exception as error:  # whatever a library or the network raises
            logger.warning("%s: %s", type(tracker).__name__, error)


class MLflowTracker(Tracker):
    """Logs to the MLflow experiment `gptj`, from a thread, since servers may be slow."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self._client = mlflow.MlflowClient(tracking_uri=settings.tracking.mlflow)
        known = self._client.get_experiment_by_name("gptj")
        experiment = (
            self._client.create_experiment("gptj") if known is None else known.experiment_id
        )
        escaped = settings.folder.replace("'", "")
        runs = self._client.search_runs(
            [experiment], filter_string=f"tags.`{FOLDER_TAG}` = '{escaped}'", max_results=1
        )
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            run = self._client.create_run(
                experiment, run_name=settings.run, tags={FOLDER_TAG: escaped}
            )
            self._run = run.info.run_id
            parameters = [
                mlflow.entities.Param(name, str(value)[:LONGEST])
                for name, value in flat(settings.model_dump(mode="json")).items()
            ]
            for start in range(0, len(parameters), PARAMETERS):
                self._client.log_batch(self._run, params=parameters[start : start + PARAMETERS])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future[None]] = []

    def point(self, point: Mapping[str, float]) -> None:
        now, step = int(time.time() * 1000), int(point["step"])
        metrics = [
            mlflow.entities.Metric(name, float(value), now, step)
            for name, value in point.items()
            if name != "step"
        ]
        self._sent.append(self._thread.submit(self._client.log_batch, self._run, metrics=metrics))
        while self._sent and self._sent[0].done():
            self._sent.pop(0).result()

    def publish(self) -> None:
        """Nothing is kept locally."""

    def close(self, ending: Ending) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending]
        self._sent.append(
            self._thread.submit(self._client.set_terminated, self._run, status=status)
        )
        deadline = time.monotonic() + IN_TIME
        try:
            for sent in self._sent:
                sent.result(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def is_refusal(error: Exception) -> bool:
        """If the server, or the library before it asked one, reports a client error of HTTP."""
        if not isinstance(error, mlflow.exceptions.MlflowException):
            return False
        status = int(error.get_http_status_code())
        return 400 <= status < 500 and status not in (408, 429)  # a timeout, too many requests


class WandbTracker(Tracker):
    """Logs to a W&B project. Offline runs are copied to the run's folder."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        assert settings.tracking.wandb is not None
        entity, _, project = settings.tracking.wandb.rpartition("/")
        self._folder = scratch / FOLDER
        self._folder.mkdir()
        self._address = storage.join(settings.folder, FOLDER)
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            name=settings.run,
            id=hashlib.sha256(settings.folder.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(scratch),
            config=flat(settings.model_dump(mode="json")),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps

    def point(self, point: Mapping[str, float]) -> None:
        self._run.log(dict(point))

    def publish(self) -> None:
        """Upload an offline run's file, for `wandb sync`."""
        for file in self._folder.glob("offline-run-*/*.wandb"):
            storage.upload(file, storage.join(self._address, file.parent.name, file.name))

    def close(self, ending: Ending) -> None:
        code = int(ending == "failed")
        try:
            self._run.finish(exit_code=code)
        finally:
            # finish() does not wait until the service has written an offline run's file: of a short
            # run, not even the first record may be there. This ends the service, which no other run
            # of a training process uses, and waits for it.
            wandb.teardown(exit_code=code)

    @staticmethod
    def is_refusal(error: Exception) -> bool:
        return isinstance(error, (wandb.errors.UsageError, wandb.errors.AuthenticationError))


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
