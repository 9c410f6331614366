"""Checks a checkpoint while its application is built, before Serve touches a running replica.

A deploy whose checkpoint is missing, incomplete or has another head fails at once, and the running
replicas keep answering.
"""

from __future__ import annotations

import logging

import ray
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.loading import Arguments, check
from gptj.pretrained import GPTJPreTrainedModel

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300.0


def check_before_deploying(cls: type[GPTJPreTrainedModel], arguments: Arguments) -> None:
    """Check the checkpoint where replicas run, with that node's network and credentials.

    Serve builds applications on the head, which may have no access to the checkpoints. While no
    node takes replicas there is nowhere to check from, and nothing that a bad checkpoint could
    replace. Outside a cluster nothing is checked, since nothing is deployed.

    Raises:
        RayServeException: saying what is wrong with the checkpoint, or why it cannot be read. Serve
            shows such an error as it is, and builds three times more after others.
    """
    if not ray.is_initialized():  # built without being deployed
        return
    if (node := _replica_node()) is None:
        logger.warning("%s is not checked: no node takes replicas yet", arguments.checkpoint)
        return
    if node == ray.get_runtime_context().get_node_id():
        problem = _problem(cls, arguments)
    else:
        strategy = NodeAffinitySchedulingStrategy(node, soft=True)
        task = ray.remote(num_cpus=0, max_retries=3)(_problem)
        reference = task.options(scheduling_strategy=strategy).remote(cls, arguments)
        problem = ray.get(reference, timeout=TIMEOUT_SECONDS)
    if problem is not None:
        raise RayServeException(problem)


def _problem(cls: type[GPTJPreTrainedModel], arguments: Arguments) -> str | None:
    """The checkpoint's error as text, since Ray would wrap an exception in a traceback."""
    try:
        check(cls, arguments)
    except (ValueError, OSError) as error:
        return f"the checkpoint cannot be deployed: {error}"
    return None


def _replica_node() -> str | None:
    """A node that takes replicas, preferably this one."""
    nodes = [
        str(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    ]
    here = ray.get_runtime_context().get_node_id()
    return here if here in nodes else next(iter(nodes), None)
