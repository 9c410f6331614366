"""Holds a folder on its cluster, so that another job that would write to it ends at once.

The lease in the folder is what protects it, also from other clusters. But a job reaches the lease
only once there is room for its workers, and may need a minute to tell whether it is held.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

from gptj.training.settings import SettingsError
from gptj_jobs.stop_signal import StopSignal

logger = logging.getLogger(__name__)

NAMESPACE = "gptj-runs"  # of the actors, each named after its folder
ANSWER_SECONDS = 5.0
DEAD_SECONDS = 60.0  # Ray needs half of it to find that a node is dead, and with it a holder
SUBMISSION = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in a submitted job's driver


def hold(folder: str, use: str, other: str) -> ActorHandle[Any]:
    """The job's stop signal: an actor that ends with this driver, or once no handle to it is left.

    SettingsError, naming the holder, if another driver on the cluster holds the folder.

    Args:
        use: what is then in use, in words, such as "the run 'a' is already being trained".
        other: what to choose instead.
    """
    # On the driver's node: on another it would end with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    named = StopSignal.options(  # type: ignore[attr-defined]
        name=folder, namespace=NAMESPACE, scheduling_strategy=here
    )
    deadline = time.monotonic() + DEAD_SECONDS
    while True:
        try:
            stop_signal: ActorHandle[Any] = named.remote(_this_process())
            return stop_signal
        except ActorAlreadyExistsError:
            owner = _owner(folder)
        if owner is not None or time.monotonic() > deadline:
            raise SettingsError(
                f"{use}: {owner or 'another process'} is still running. Wait for it to end, stop "
                f"it, or choose another {other}"
            )
        time.sleep(0.2)


def _owner(folder: str) -> str | None:
    """Who holds a folder; None if the holder has gone, is starting, or its node is lost."""
    try:
        holder = ray.get_actor(folder, namespace=NAMESPACE)
        return str(ray.get(holder.owner.remote(), timeout=ANSWER_SECONDS))
    except (ValueError, RayError) as error:
        logger.debug("the holder of %s does not answer: %s", folder, error)
        return None


def holding_jobs(address: str, folder: str) -> set[str]:
    """Ray's ids of jobs that hold the run in a folder, on the cluster of a dashboard."""
    actors = list_actors(
        address=address,
        filters=[("ray_namespace", "=", NAMESPACE), ("name", "=", folder), ("state", "=", "ALIVE")],
    )
    return {actor.job_id for actor in actors}


def _this_process() -> str:
    process = f"process {os.getpid()} on {socket.gethostname()}"
    metadata = json.loads(os.environ.get(SUBMISSION, "{}")).get("metadata") or {}
    job = metadata.get("job_submission_id")
    return f"{process} (job {job})" if job else process
