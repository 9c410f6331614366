"""Waits until a cluster has room for a training, or says what occupies it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import ray
from ray.util.state import list_actors

from gptj.training.settings import SettingsError

ROOM_SECONDS = 10.0


def wait_for_room(needed: Mapping[str, float]) -> None:
    """Wait until the resources are free: a run that has just ended releases its workers soon.

    SettingsError, saying what holds the rest, if they are not free after ROOM_SECONDS.
    """
    deadline = time.monotonic() + ROOM_SECONDS
    while lacking := {
        name: free
        for name, amount in needed.items()
        if (free := ray.available_resources().get(name, 0.0)) < amount
    }:
        if time.monotonic() > deadline:
            name, free = next(iter(lacking.items()))
            raise SettingsError(
                f"the workers need {needed[name]:g} {name}s, but {free:g} of the cluster's "
                f"{ray.cluster_resources().get(name, 0):g} are free; {holders(name)}; remedy: stop "
                f"that, lower workers.count or workers.cpus, or set workers.autoscaling=true to "
                f"wait until the cluster has grown"
            )
        time.sleep(0.5)


def holders(resource: str) -> str:
    """What holds how much of a resource: Serve's deployments by name, others by class."""
    held: Counter[str] = Counter()
    actors = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("state", "=", "ALIVE")],
        detail=True,
        limit=1000,
    )
    for actor in actors:
        if amount := (actor.required_resources or {}).get(resource, 0.0):
            held[_holder(actor.name or "", actor.class_name)] += amount
    if not held:
        return "the rest is not held by actors"
    return "the rest is held by " + ", ".join(f"{who} ({amount:g})" for who, amount in held.items())


def _holder(name: str, class_name: str) -> str:
    if name.startswith("SERVE_REPLICA::"):  # SERVE_REPLICA::application#deployment#id
        return f"the service {name.removeprefix('SERVE_REPLICA::').split('#')[0]}"
    if class_name == "RayTrainWorker":
        return "another training"
    return class_name
