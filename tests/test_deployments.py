"""The three services on a real cluster, over HTTP, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from huggingface_hub import InferenceClient

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
)
from gptj.checkpoint import save_model
from gptj.data.question_answering import best_spans, windows
from jobs.local_ray import LocalRay
from jobs.local_s3 import LocalS3
from jobs.processes import HOST, free_ports, running, tail

SERVE_CONFIG = Path(__file__).resolve().parents[1] / "k8s" / "base" / "serve.yaml"
SENTENCES = [
    "The tower stands in Paris, and the river runs past it.",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
    "Who wrote the book? Anna wrote the book in the year 1907.",
]
CONTEXT = 64  # tokens
KEY = "a-key-of-the-test"


@dataclass(frozen=True)
class Models:
    """What is behind the services, to compare their replies with."""

    tokenizer: GPTJTokenizer
    generation: GPTJForCausalLM
    classification: GPTJForSequenceClassification
    question_answering: GPTJForQuestionAnswering


def make_models() -> Models:
    tokenizer = GPTJTokenizer.train(SENTENCES, vocab_size=300)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 20,  # rows that stand for no text
        "n_positions": CONTEXT,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,  # wide, so that probabilities differ
    }
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    return Models(
        tokenizer,
        GPTJForCausalLM(GPTJConfig(**shape)).eval(),
        GPTJForSequenceClassification(GPTJConfig(**shape, id2label=labels)).eval(),
        GPTJForQuestionAnswering(GPTJConfig(**shape)).eval(),
    )


@contextmanager
def serving(
    config: dict[str, Any], folder: Path, environment: dict[str, str], cpus: int = 4
) -> Iterator[tuple[str, LocalRay]]:
    """`serve run` of a configuration on a cluster of its own; the services' address."""
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    address = f"http://{HOST}:{port}"
    with LocalRay.start(folder, cpus=cpus, environment=environment) as node:
        command = [str(Path(os.sys.executable).parent / "serve"), "run", str(path)]
        variables = {**environment, **node.environment()}
        with running(command, environment=variables, log=log) as process:
            deadline = time.monotonic() + 120
            for application in config["applications"]:
                url = address + application["route_prefix"].rstrip("/") + "/health"
                while not _answers(url):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{url} does not answer:\n{tail(log, 6000)}")
                    time.sleep(0.2)
            yield address, node


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
