"""`gptj serve`: build a Serve configuration for checkpoints and deploy it.

The configuration is k8s/base/serve.yaml with the checkpoints' applications.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.state import list_nodes

import deployments
from deployments.loading import Arguments, check, name_of
from gptj.chat import READY
from gptj.checkpoints.folder import ModelFolder
from gptj.config import GPTJConfig
from gptj.model import HEAD_CLASSES
from gptj.storage.addresses import absolute
from gptj.training.tasks import task_of
from gptj_cli.cluster import is_here

TEMPLATE = Path(deployments.__file__).resolve().parents[1] / "k8s" / "base" / "serve.yaml"
APPLICATIONS = {
    "GPTJForCausalLM": "generation",
    "GPTJForSequenceClassification": "classification",
    "GPTJForQuestionAnswering": "question-answering",
    "GPTJModel": "embeddings",
}
START_SECONDS = 1800  # a 6B model may take minutes to fetch and load
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")  # states of applications and of their deployments
# Variables of an application's processes, which nothing reads. Serve starts new replicas if one
# differs, and not if only the files at an address do.
CONTENT = "GPTJ_SERVED_CONTENT"
ATTEMPT = "GPTJ_SERVED_ATTEMPT"
# Of applications and routes: Serve's controller fails on others, and then deploys nothing more.
NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")
HEADING = re.compile(r"^Deploying app '.*' failed with exception:\n")  # Serve's, above an error


@dataclass(frozen=True)
class Options:
    port: int = 8000
    host: str = "127.0.0.1"
    on_gpu: bool = False
    dtype: str = "auto"
    min_replicas: int = 1
    chat_template: str | None = None  # a name or a file, of language models


@dataclass(frozen=True)
class Service:
    """One of the served checkpoints."""

    checkpoint: str
    head: str  # class name; for embeddings the base model's, whatever the checkpoint's head
    name: str  # the model's
    content: str  # changes with what the checkpoint holds
    pairs: bool = False  # whether its folder says that it classifies pairs of texts

    @property
    def kind(self) -> str:
        return APPLICATIONS[self.head]


def services(
    addresses: Sequence[str], names: Sequence[str], embeddings: str | None = None
) -> list[Service]:
    """The services for the addresses, each checked as a replica would before loading.

    Args:
        embeddings: a checkpoint with any head, for embeddings.

    Raises:
        FileNotFoundError, CheckpointError: for an address without a valid checkpoint.
        ValueError: for a head without a service, or two models with one name.
    """
    if len(names) > len(addresses):
        raise ValueError(f"{len(names)} names for {len(addresses)} models; remedy: one --name each")
    found = []
    for number, address in enumerate(addresses):
        checkpoint = absolute(address) if Path(address).exists() else address
        config = GPTJConfig.from_pretrained(checkpoint)
        head = "GPTJModel"
        if config.architectures != [head]:
            head = task_of(config, checkpoint).head.__name__
        check(HEAD_CLASSES[head], Arguments(checkpoint=checkpoint))
        name = names[number] if number < len(names) else name_of(checkpoint)
        pairs = APPLICATIONS[head] == "classification" and _reads_pairs(checkpoint)
        found.append(Service(checkpoint, head, name, _content(checkpoint), pairs))
    counted = Counter(service.name for service in found)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f"two models would be named {twice[0]!r}; remedy: a --name for each")
    if embeddings is not None:  # which have their own routes, so the name may be taken
        checkpoint = absolute(embeddings) if Path(embeddings).exists() else embeddings
        check(HEAD_CLASSES["GPTJModel"], Arguments(checkpoint=checkpoint))
        if any(service.kind == "embeddings" for service in found):
            raise ValueError(
                f"--embeddings {embeddings}: {found[-1].checkpoint} serves them already: omit one"
            )
        name, content = name_of(checkpoint), _content(checkpoint)
        found.append(Service(checkpoint, "GPTJModel", name, content))
    return found


def _content(checkpoint: str) -> str:
    with ModelFolder.open(checkpoint) as folder:
        return folder.identity


def _reads_pairs(checkpoint: str) -> bool:
    """Whether a classifier was trained on pairs; recorded only if the column was renamed."""
    with ModelFolder.open(checkpoint) as folder:
        return "text_pair" in (folder.read_training_data().get("columns") or {})


def configuration(found: Sequence[Service], options: Options) -> dict[str, Any]:
    """A configuration for `serve deploy` and `serve run`.

    A head's only model is at the head's usual route; several are at /NAME plus that route.

    Raises:
        ValueError: if a name cannot be a route, or is that of another application; for a chat
            template without a language model; outside a clone of the repository.
    """
    if not TEMPLATE.exists():
        raise ValueError(
            f"{TEMPLATE} does not exist; remedy: run gptj serve from a clone of the repository"
        )
    template = yaml.safe_load(TEMPLATE.read_text())
    by_kind = {each["name"]: each for each in template["applications"]}
    by_kind["embeddings"] = _embeddings(by_kind["classification"])
    counted = Counter(service.kind for service in found)
    template_of_chats, of_template = options.chat_template, ""
    if template_of_chats is not None:
        if not counted["generation"]:
            raise ValueError("--chat-template is for language models, but none is served")
        if Path(template_of_chats).exists() and template_of_chats not in READY:
            template_of_chats = absolute(template_of_chats)
            of_template = hashlib.sha256(Path(template_of_chats).read_bytes()).hexdigest()
    applications: list[dict[str, Any]] = []
    for service in found:
        application, content = copy.deepcopy(by_kind[service.kind]), service.content
        application["args"] |= {"checkpoint": service.checkpoint, "dtype": options.dtype}
        if service.kind in ("generation", "embeddings"):
            application["args"]["model_name"] = service.name
        if service.kind == "generation" and template_of_chats is not None:
            application["args"]["chat_template"] = template_of_chats
            content = " ".join(filter(None, [content, of_template]))
        application["runtime_env"] = {"env_vars": {CONTENT: content}}
        if counted[service.kind] > 1:
            if NAME.fullmatch(service.name) is None:
                raise ValueError(
                    f"{service.checkpoint} would be served at /{service.name}, but a name in a "
                    f"route has only A-Z, a-z, 0-9, '.', '_' and '-'; remedy: a --name for each"
                )
            application["name"] = service.name
            application["route_prefix"] = f"/{service.name}{application['route_prefix']}".rstrip(
                "/"
            )
        for deployment in application["deployments"]:
            scaling = deployment["autoscaling_config"]
            scaling["min_replicas"] = options.min_replicas
            scaling["max_replicas"] = max(scaling["max_replicas"], options.min_replicas)
            if options.on_gpu:
                deployment["ray_actor_options"]["num_gpus"] = 1
        applications.append(application)
    names = Counter(application["name"] for application in applications)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"the name {twice[0]!r} is also that of the only {twice[0]} service; remedy: another "
            f"--name"
        )
    return {
        "proxy_location": template["proxy_location"],
        "http_options": {**template["http_options"], "host": options.host, "port": options.port},
        "logging_config": template["logging_config"],
        "applications": applications,
    }


def _embeddings(classification: dict[str, Any]) -> dict[str, Any]:
    """The embeddings application, which scales like the other batch services."""
    application = copy.deepcopy(classification)
    application |= {
        "name": "embeddings",
        "route_prefix": "/v1/embeddings",
        "import_path": "deployments.embeddings:build",
    }
    application["deployments"][0]["name"] = "embeddings"
    return application


def has_gpus(dashboard: str) -> bool:
    """Whether any node of the cluster has a GPU."""
    nodes = list_nodes(address=dashboard, detail=True, filters=[("state", "=", "ALIVE")])
    return any((node.resources_total or {}).get("GPU", 0) > 0 for node in nodes)


def deploy(dashboard: str, config: dict[str, Any]) -> list[str]:
    """Make the cluster serve exactly this configuration; wait until all of it answers.

    Returns:
        The names of applications that are no longer served.

    Raises:
        ValueError: if an application cannot start, with its error but no traceback. Serve keeps
            serving what it could not replace.
        RuntimeError: if the cluster refuses the configuration.
    """
    client = ServeSubmissionClient(dashboard)
    before = client.get_serve_details()
    _check_port(dashboard, before, config["http_options"])
    config = _attempted(config, before)
    client.deploy_applications(config)
    names = [application["name"] for application in config["applications"]]
    deadline = time.monotonic() + START_SECONDS
    while not _are_running(client.get_serve_details(), config):
        if time.monotonic() > deadline:
            raise ValueError(f"{', '.join(names)} did not start within {START_SECONDS} s")
        time.sleep(0.5)
    return sorted(before["applications"].keys() - set(names))


def wait_until_healthy(url: str, seconds: float = 60) -> None:
    """Wait until a GET of the URL returns 200. RuntimeError on timeout."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url} does not answer: {error}") from error
            time.sleep(0.2)


def open_to_all(host: str, base: str, config: dict[str, Any]) -> list[str]:
    """The applications that other machines can use without a key, by name."""
    if host in ("localhost", "::1") or host.startswith("127."):
        return []
    return [
        application["name"]
        for application in config["applications"]
        if _answers(f"{base}{application['route_prefix'].rstrip('/')}/v1/models")
    ]


def _answers(url: str) -> bool:
    """Whether a GET without a key gets past the keys; an application need not have the route."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.NOT_FOUND
    except OSError:  # too busy to tell
        return False


def pages(base: str, application: dict[str, Any]) -> dict[str, str]:
    """A service's pages for people: its API's documentation, and the playground."""
    root = base + application["route_prefix"].rstrip("/")
    found = {"API": f"{root}/docs"}
    return {**found, "Playground": f"{root}/"} if _kind(application) == "generation" else found


def _kind(application: dict[str, Any]) -> str:
    module: str = application["import_path"].split(":")[0]
    return module.rpartition(".")[2]


def curl(base: str, application: dict[str, Any], *, pairs: bool = False) -> str:
    """An example curl command for a service.

    Args:
        pairs: whether a classifier takes pairs of texts.
    """
    route = application["route_prefix"].rstrip("/")
    kind = _kind(application)
    body: dict[str, Any]
    if kind == "generation":
        route += "/v1/completions"
        body = {"prompt": "Once upon a time", "max_tokens": 32}
    elif kind == "classification" and pairs:
        body = {"inputs": {"text": "A fine film", "text_pair": "It is good to the end."}}
    elif kind == "classification":
        body = {"inputs": "A fine film from beginning to end."}
    elif kind == "embeddings":
        body = {"input": "A fine film from beginning to end."}
    else:
        body = {"inputs": {"question": "Where is it?", "context": "It is in Rome."}}
    return (
        f"curl {base}{route} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body, ensure_ascii=False)}'"
    )


def error_of(message: str) -> str:
    """An error without Serve's heading: a traceback's last one, or else the whole message."""
    message = HEADING.sub("", message.strip())
    lines = [line for line in message.splitlines() if line.strip()]
    start = next(
        (number for number in reversed(range(len(lines))) if lines[number].startswith(" ")), None
    )
    if start is None or start + 1 == len(lines):
        return message
    kind, colon, rest = lines[start + 1].partition(": ")
    is_error = colon and kind.replace(".", "").replace("_", "").isalnum()
    return "\n".join([rest if is_error else lines[start + 1], *lines[start + 2 :]])


def _attempted(config: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
    """The configuration, different from what has failed, which Serve would not start again.

    What has not failed stays as it is, so that it keeps running.
    """
    config = copy.deepcopy(config)
    for wanted in config["applications"]:
        application = details["applications"].get(wanted["name"]) or {}
        attempt = _variables(application.get("deployed_app_config")).get(ATTEMPT)
        if application.get("status") in FAILED:
            attempt = secrets.token_hex(4)
        if attempt is not None:
            wanted["runtime_env"]["env_vars"][ATTEMPT] = attempt
    return config


def _variables(application: dict[str, Any] | None) -> dict[str, str]:
    """A configured application's own environment variables."""
    return ((application or {}).get("runtime_env") or {}).get("env_vars") or {}


def _are_running(details: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether all applications run as configured; ValueError if one has failed."""
    running = True
    for wanted in config["applications"]:
        application = details["applications"].get(wanted["name"])
        if application is None:
            return False
        known = application.get("deployed_app_config") or {}
        if known.get("args") != wanted["args"] or _variables(known) != _variables(wanted):
            return False  # not yet this one
        if application["status"] in FAILED:
            raise ValueError(f"{wanted['name']}: {_reason(application)}")
        running &= application["status"] == "RUNNING"
    return running


def _reason(application: dict[str, Any]) -> str:
    """Why an application has failed: its deployments know, if they were built."""
    messages = [
        deployment["message"]
        for deployment in (application.get("deployments") or {}).values()
        if deployment["status"] in FAILED and deployment["message"]
    ]
    return "\n".join(map(error_of, messages or [application["message"]]))


def _check_port(dashboard: str, details: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that Serve listens, or can listen, there; it cannot move while it runs."""
    there = details.get("http_options") or {}
    place = {key: wanted[key] for key in ("host", "port")}
    if there:
        if any(there.get(key) != value for key, value in place.items()):
            raise ValueError(
                f"this cluster already serves at {there.get('host')}:{there.get('port')}, and "
                f"cannot also serve at {place['host']}:{place['port']}; remedy: --port "
                f"{there.get('port')}, or serve shutdown -y first"
            )
    elif is_here(dashboard):
        with socket.socket() as probe:
            # As the server does: a port with only lingering (TIME_WAIT) connections counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((place["host"], place["port"]))
            except OSError as error:
                raise ValueError(
                    f"port {place['port']} on {place['host']} is not free ({error.strerror}); "
                    f"remedy: another --port, or stop the program that listens there"
                ) from error
