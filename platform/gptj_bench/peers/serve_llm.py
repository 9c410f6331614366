"""Ray Serve LLM with vLLM on this machine's CPU: serve_llm.py --model DIR --name … --port …

Runs a Ray cluster of its own with one replica until SIGTERM. With RAY_SERVE_ENABLE_HA_PROXY=1 and
RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 HAProxy hands requests to vLLM's own server in the replica,
which answers at /health when the model is loaded.
"""

import argparse
import os
import signal
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
import ray
from ray import serve
from ray.serve.llm import build_openai_app

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--name", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--max-model-len", type=int, required=True)
given = parser.parse_args()

ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
cpus = os.cpu_count() or 1
# The replica itself asks for a core beside those of its engine.
ray.init(num_cpus=cpus + 1, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": given.port})
model = {
    "model_loading_config": {"model_id": given.name, "model_source": given.model},
    "accelerator_config": {"kind": "cpu"},
    "placement_group_config": {"bundles": [{"CPU": cpus}]},
    "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    "engine_kwargs": {"dtype": "bfloat16", "max_model_len": given.max_model_len},
}
serve.run(build_openai_app({"llm_configs": [model]}))
ended.wait()
