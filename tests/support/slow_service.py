"""A service whose requests take as long as they say, for tests of what ends meanwhile."""

import asyncio

import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(name="slow", ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=60)
class Slow:
    """Answers with the id of the node that it is on."""

    async def __call__(self, request: Request) -> str:
        await asyncio.sleep(float(request.query_params.get("seconds", 0)))
        return ray.get_runtime_context().get_node_id()


app = Slow.bind()  # type: ignore[attr-defined]
