"""What KubeRay 1.7 makes of rendered manifests, as processes of this machine instead of pods.

A pod of Ray is one `ray start --block`, with parameters and variables from the manifest and from
the operator. `Cluster` takes them from a rendered RayService or RayJob; `Here` has all that must
differ on one machine, and nothing else differs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import yaml
from manifests import Object, named

from jobs.processes import HOST, free_ports, running, tail

BIN = Path(sys.executable).parent
HEAD_IP = "127.0.0.2"
UP_SECONDS = 90
BINARY = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Here:
    """Everything that is different on this machine from the cluster, in one place.

    Hosts and ports: pods have addresses on loopback, from 127.0.0.2 on (which Linux has), and free
    ports of their own, except that all of Serve's proxies listen on one of 127.0.0.1; the names of
    services are addresses. Paths: what pods mount is in `folder`. Sizes: object stores of 80 MB.
    The image: Python and HOME (with DeepSpeed's operators, once built) are this machine's, the
    working directory is `workdir`, with a smaller training. Services: S3 is LocalS3, Redis is
    Debian's with the manifest's settings. What is not there: Kubernetes, so that no autoscaler runs
    and no init container waits.
    """

    folder: Path
    workdir: Path
    serve_port: int
    names: Mapping[str, str]  # what manifests call something, and what it is here
    secrets: Mapping[tuple[str, str], str] = field(repr=False)  # by name and key
    object_store_bytes: int = 80_000_000

    def value(self, text: str) -> str:
        for name, here in self.names.items():
            text = text.replace(name, here)
        return text

    def path(self, mounted: str) -> Path:
        return self.folder / "mounted" / mounted.removeprefix("/")

    def command(self, text: str) -> str:
        """With the paths of what is mounted."""
        return text.replace("/etc/gptj", str(self.path("/etc/gptj")))

    def serve_config(self, text: str) -> Object:
        config: Object = yaml.safe_load(text)
        config["http_options"] |= {"host": HOST, "port": self.serve_port}
        return config

    def parameters(self, ip: str, ports: Ports, sessions: Path) -> dict[str, str]:
        """Of `ray start`, in place of the operator's and the manifest's."""
        return {
            "node-ip-address": ip,
            "metrics-export-port": str(ports.metrics),
            "dashboard-agent-listen-port": str(ports.agent),
            "object-store-memory": str(self.object_store_bytes),
            "temp-dir": str(sessions),
        }

    def head_parameters(self, ports: Ports) -> dict[str, str]:
        return {
            "port": str(ports.head),
            "dashboard-host": HOST,
            "dashboard-port": str(ports.dashboard),
            "ray-client-server-port": str(ports.client),
        }

    def image(self) -> dict[str, str]:
        """The variables that the container image sets."""
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": os.environ["HOME"],
            "LANG": "C.UTF-8",
        }


@dataclass(frozen=True)
class Ports:
    head: int
    dashboard: int
    client: int
    agent: int
    metrics: int

    @classmethod
    def free(cls) -> Ports:
        return cls(*free_ports(5))


@dataclass
class Pod:
    """A container of Ray that runs."""

    name: str
    ip: str
    ports: Ports
    process: Popen[bytes]
    container: Object
    log: Path
    serve_port: int

    def kill(self) -> None:
        """SIGKILL for all processes of it at once, as when its node is lost."""
        processes = self.processes()
        for each in processes:
            with suppress(psutil.NoSuchProcess):  # one of them may end by the end of another
                each.kill()
        psutil.wait_procs(processes, timeout=10)
        self.process.wait(timeout=10)

    def processes(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def probe(self, kind: str) -> int:
        """The status that the kubelet's HTTP probe gets; it sends no token."""
        probe = self.container[kind]["httpGet"]
        host, port = (
            (HOST, self.serve_port) if probe["port"] == "serve" else (self.ip, self.ports.agent)
        )
        return httpx.get(f"http://{host}:{port}{probe['path']}", timeout=10).status_code


def nodes_alive(dashboard: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    reply = httpx.get(f"{dashboard}/nodes?view=summary", headers=headers, timeout=30)
    summary = reply.raise_for_status().json()["data"]["summary"]
    return sum(node["raylet"]["state"] == "ALIVE" for node in summary)


class Cluster:
    """The head and the workers of a rayClusterSpec."""

    def __init__(
        self, name: str, spec: Object, objects: Sequence[Object], here: Here, token: str
    ) -> None:
        self.name = name
        self._spec = spec
        self._objects = objects
        self._here = here
        self._token = token
        self._pods = ExitStack()
        self._sessions = Path()
        self._starts = 0
        self._head_ports = Ports.free()

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self._head_ports.dashboard}"

    @property
    def authorization(self) -> dict[str, str]:
        """KubeRay sends the cluster's token with each call."""
        return {"Authorization": f"Bearer {self._token}"}

    @contextmanager
    def pods(self) -> Iterator[tuple[Pod, list[Pod]]]:
        """The head and as many workers as the manifest has; all are killed at the end."""
        # Ray's socket paths must stay under 107 bytes.
        with tempfile.TemporaryDirectory(prefix="k8s-ray-") as sessions, self._pods:
            self._sessions = Path(sessions)
            head = self.start_head()
            (group,) = self._spec["workerGroupSpecs"]
            workers = []
            # One after the other, since starting takes a raylet a core for some seconds.
            for number in range(group["replicas"]):
                workers.append(self._start(f"worker-{number}", group, Ports.free()))
                self.wait_for_nodes(1 + len(workers))
            yield head, workers

    def start_head(self) -> Pod:
        """Also after its end: on the same address, as its service keeps it."""
        head = self._start("head", self._spec["headGroupSpec"], self._head_ports)
        deadline = time.monotonic() + UP_SECONDS
        while not self._answers("/api/jobs/"):
            if head.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head of {self.name} is not up:\n{tail(head.log)}")
            time.sleep(0.2)
        return head

    def wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while (alive := self.nodes_alive()) != count:
            if time.monotonic() > deadline:
                logs = sorted(self._here.folder.glob(f"{self.name}-*.log"))
                ends = "\n".join(f"{log}:\n{tail(log)}" for log in logs)
                raise TimeoutError(f"{self.name} has {alive} nodes, not {count}; {ends}")
            time.sleep(0.2)

    def _answers(self, path: str) -> bool:
        try:
            reply = httpx.get(f"{self.dashboard}{path}", headers=self.authorization, timeout=5)
        except httpx.TransportError:
            return False  # not yet: the caller counts the time
        return reply.status_code == 200

    def nodes_alive(self) -> int:
        return nodes_alive(self.dashboard, self._token)

    def _start(self, name: str, group: Object, ports: Ports) -> Pod:
        head = name == "head"
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        self._mount(spec)
        environment = self._operator_environment(head) | self._environment(container)
        parameters = self._operator_parameters(container, head) | group["rayStartParams"]
        ip = HEAD_IP if head else f"127.0.0.{int(name.removeprefix('worker-')) + 3}"
        self._starts += 1  # a new pod has an empty /tmp/ray
        parameters |= self._here.parameters(ip, ports, self._sessions / f"{self._starts}")
        if head:
            parameters |= self._here.head_parameters(ports)
        command = ["env", f"--chdir={self._here.workdir}", str(BIN / "ray"), "start", "--block"]
        command += ["--head"] if head else [f"--address={environment['RAY_ADDRESS']}"]
        for key, value in parameters.items():
            # The pod's shell puts the variable in.
            value = value.replace("$REDIS_PASSWORD", environment.get("REDIS_PASSWORD", ""))
            command.append(f"--{key}" if value == "true" else f"--{key}={value}")
        log = self._here.folder / f"{self.name}-{name}.log"
        process = self._pods.enter_context(
            running(command, environment=environment, log=log, grace_seconds=0)
        )
        pod = Pod(name, ip, ports, process, container, log, self._here.serve_port)
        self._pods.callback(pod.kill)
        return pod

    def _mount(self, spec: Object) -> None:
        """The config maps among the volumes, as files."""
        for mount in spec["containers"][0].get("volumeMounts", []):
            (volume,) = (each for each in spec["volumes"] if each["name"] == mount["name"])
            if "configMap" in volume:
                data = named(self._objects, "ConfigMap", volume["configMap"]["name"])["data"]
                for name, content in data.items():
                    path = self._here.path(mount["mountPath"]) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content)

    def _operator_parameters(self, container: Object, head: bool) -> dict[str, str]:
        """What KubeRay adds: the limits, and where it has things of its own."""
        limits = container["resources"]["limits"]
        parameters = {
            "num-cpus": str(ceil(quantity(limits["cpu"]))),
            "memory": str(int(quantity(limits["memory"]))),
        }
        if head and self._spec.get("enableInTreeAutoscaling"):
            parameters["no-monitor"] = "true"
        if head and "gcsFaultToleranceOptions" in self._spec:
            parameters["redis-password"] = "$REDIS_PASSWORD"
        return parameters

    def _operator_environment(self, head: bool) -> dict[str, str]:
        environment = self._here.image() | {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_ADDRESS": f"{HEAD_IP}:{self._head_ports.head}",
            "RAY_PORT": str(self._head_ports.head),
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        }
        if self._spec.get("authOptions", {}).get("mode") == "token":
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        options = self._spec.get("gcsFaultToleranceOptions")
        if options and head:
            environment |= {
                "RAY_REDIS_ADDRESS": self._here.value(options["redisAddress"]),
                "REDIS_PASSWORD": self._secret(options["redisPassword"]["valueFrom"]),
                "RAY_external_storage_namespace": f"{self.name}-uid",
            }
        return environment

    def _environment(self, container: Object) -> dict[str, str]:
        """`envFrom` and `env` of the manifest."""
        environment: dict[str, str] = {}
        for source in container.get("envFrom", []):
            data = named(self._objects, "ConfigMap", source["configMapRef"]["name"])["data"]
            environment |= {name: self._here.value(value) for name, value in data.items()}
        for variable in container.get("env", []):
            if "value" in variable:
                environment[variable["name"]] = self._here.value(variable["value"])
            else:
                environment[variable["name"]] = self._secret(variable["valueFrom"])
        return environment

    def _secret(self, source: Object) -> str:
        reference = source["secretKeyRef"]
        return self._here.secrets[reference["name"], reference["key"]]


def quantity(text: str) -> float:
    """Kubernetes' notation of an amount: 500m, 4Gi."""
    number = text.rstrip("".join(set("".join(BINARY))))
    return float(number) * BINARY[text[len(number) :]]
