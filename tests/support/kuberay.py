"""The pods that KubeRay 1.7.0 builds of rendered manifests, as processes of this machine.

`Cluster` takes pods, services and jobs from kuberay_operator.py and does the kubelet's part: init
containers, variables, mounted config maps, the command. `Here` has all that must differ on one
machine, and nothing else differs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import httpx
import kuberay_operator
import psutil
import yaml
from manifests import Object, named, selects

from gptj_local.processes import HOST, free_ports, running, tail

BIN = Path(sys.executable).parent
HEAD_IP = "127.0.0.2"
UP_SECONDS = 90
STARTED = b"Ray runtime started."  # says `ray start`
INIT_SECONDS = 240  # for all that init containers wait for
TRIES = 6
SUFFIX = "abcde"  # of a cluster's name, where KubeRay's is random
# What needs Kubernetes' API, which is not here: no autoscaler and no disruption budget.
NOT_HERE = ("autoscaler", "disruption-budget")


@dataclass(frozen=True)
class Here:
    """Everything that is different on this machine from the cluster, in one place.

    Hosts and ports: pods have addresses on loopback, from 127.0.0.2 on (which Linux has), and free
    ports of their own, except that all of Serve's proxies listen on one of 127.0.0.1; the names of
    services are addresses. Paths: what pods mount is in `folder`. The image: Python and HOME (with
    DeepSpeed's operators, once built) are this machine's, the working directory is `workdir`, with
    a smaller training. Services: S3 is LocalS3, Redis is Debian's with the manifest's settings.
    What is not there: Kubernetes, and so the containers of NOT_HERE.
    """

    folder: Path
    workdir: Path
    serve_port: int
    names: Mapping[str, str]  # what manifests call something, and what it is here
    secrets: dict[tuple[str, str], str] = field(repr=False)  # by name and key

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
    built: Object  # as KubeRay makes it
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
        """The status that the kubelet's HTTP probe gets, which sends no token.

        As a kubelet, it tries again after a failure: on a busy machine one says little.
        """
        probe = self.built["spec"]["containers"][0][kind]
        asked = probe["httpGet"]
        host, port = (
            (HOST, self.serve_port) if asked["port"] == "serve" else (self.ip, self.ports.agent)
        )
        for left in reversed(range(probe["failureThreshold"])):
            status = httpx.get(f"http://{host}:{port}{asked['path']}", timeout=10).status_code
            if status == 200 or not left:
                break
            time.sleep(probe["periodSeconds"])
        return status


def nodes_alive(dashboard: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    reply = httpx.get(f"{dashboard}/nodes?view=summary", headers=headers, timeout=30)
    summary = reply.raise_for_status().json()["data"]["summary"]
    return sum(node["raylet"]["state"] == "ALIVE" for node in summary)


class Cluster:
    """The RayCluster of a RayService or RayJob: its head, its workers and what goes with them."""

    def __init__(self, owner: Object, objects: Sequence[Object], here: Here, token: str) -> None:
        self.owner = owner
        self.object = kuberay_operator.ray_cluster(owner, SUFFIX)
        self.object["metadata"]["uid"] = f"{self.name}-uid"
        self._objects = objects
        self._here = here
        self._token = token
        self._pods = ExitStack()
        self._sessions = Path()
        self._starts = 0
        self._waited: set[str] = set()
        self._head: Pod | None = None
        self._head_ports = Ports.free()
        head = self.object["spec"]["headGroupSpec"]
        head["rayStartParams"] |= here.head_parameters(self._head_ports)

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

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
            self.start_head()
            (group,) = self.object["spec"]["workerGroupSpecs"]
            workers = []
            # One after the other, since starting takes a raylet a core for some seconds.
            for number in range(group["replicas"]):
                workers.append(self._joined_worker(group, number, 2 + number))
            assert self._head is not None
            yield self._head, workers

    def start_head(self) -> Pod:
        """Also after its end: on the same address, as its service keeps it.

        The dashboard answers before the head's raylet has joined, which may still time out.
        """
        log = self._here.folder / f"{self.name}-head.log"
        for _ in range(TRIES):
            before = log.stat().st_size if log.exists() else 0
            cluster = deepcopy(self.object)
            group = cluster["spec"]["headGroupSpec"]
            group["rayStartParams"] |= self._parameters(HEAD_IP, self._head_ports)
            head = self._run("head", HEAD_IP, self._head_ports, kuberay_operator.head_pod(cluster))
            deadline = time.monotonic() + UP_SECONDS
            while head.process.poll() is None and time.monotonic() < deadline:
                if STARTED in log.read_bytes()[before:] and self._answers("/api/jobs/"):
                    self._head = head
                    return head
                time.sleep(0.2)
            head.kill()
        raise RuntimeError(f"the head of {self.name} is not up:\n{tail(log)}")

    def _joined_worker(self, group: Object, number: int, nodes: int) -> Pod:
        """KubeRay makes a new pod of one that ended: a raylet has 30 s to start, loaded or not."""
        for _ in range(TRIES):
            worker = self._start_worker(group, number)
            deadline = time.monotonic() + UP_SECONDS
            while worker.process.poll() is None and time.monotonic() < deadline:
                self._restart_ended_head()
                if self.nodes_alive() == nodes:
                    return worker
                time.sleep(0.2)
            worker.kill()
        raise RuntimeError(f"{worker.name} of {self.name} does not join:\n{self._logs()}")

    def _restart_ended_head(self) -> None:
        """KubeRay makes a new pod of one that ended: a head's raylet, too, has 30 s to start."""
        if self._head is not None and self._head.process.poll() is not None:
            self._head.kill()  # what it left
            self.start_head()

    def _start_worker(self, group: Object, number: int) -> Pod:
        group, ip, ports = deepcopy(group), f"127.0.0.{number + 3}", Ports.free()
        group["rayStartParams"] |= self._parameters(ip, ports)
        built = kuberay_operator.worker_pod(self.object, group, number)
        return self._run(f"worker-{number}", ip, ports, built)

    def _parameters(self, ip: str, ports: Ports) -> dict[str, str]:
        self._starts += 1  # a new pod has an empty /tmp/ray
        return self._here.parameters(ip, ports, self._sessions / f"{self._starts}")

    def submit(self, submission: str, seconds: float) -> int:
        """Run the Job that submits the RayJob's entrypoint and follows it; its exit status."""
        job = kuberay_operator.submitter(self.owner, self.object, submission)
        pod = {**job["spec"]["template"]["spec"], "metadata": job["spec"]["template"]["metadata"]}
        (container,) = pod["containers"]
        log = self._here.folder / f"{self.name}-submitter.log"
        environment = self._environment(container, pod["metadata"])
        with running(self._command(container, environment), environment=environment, log=log) as it:
            return it.wait(timeout=seconds)

    def served_by(self, pods: Sequence[Pod]) -> list[Pod]:
        """Those of the pods to which the service for requests sends them."""
        service = kuberay_operator.serve_service(self.owner, self.object)
        selector = {"matchLabels": service["spec"]["selector"]}
        return [pod for pod in pods if selects(selector, pod.built["metadata"]["labels"])]

    def wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while (alive := self.nodes_alive()) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} has {alive} nodes, not {count}:\n{self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        """The ends of its pods' logs."""
        logs = sorted(self._here.folder.glob(f"{self.name}-*.log"))
        return "\n".join(f"{log}:\n{tail(log)}" for log in logs)

    def _answers(self, path: str) -> bool:
        try:
            reply = httpx.get(f"{self.dashboard}{path}", headers=self.authorization, timeout=5)
        except httpx.TransportError:
            return False  # not yet: the caller counts the time
        return reply.status_code == 200

    def nodes_alive(self) -> int:
        return nodes_alive(self.dashboard, self._token)

    def _run(self, name: str, ip: str, ports: Ports, built: Object) -> Pod:
        """What the kubelet does with a pod: init containers, then Ray's container."""
        spec, metadata = built["spec"], {**built["metadata"], "name": f"{self.name}-{name}"}
        log = self._here.folder / f"{self.name}-{name}.log"
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            self._mount(spec, container)
        for container in spec.get("initContainers", []):
            # Each once for a cluster: what one worker has waited for is there for all.
            if container["name"] not in (*NOT_HERE, *self._waited):
                environment = self._environment(container, metadata)
                command = self._command(container, environment)
                with running(command, environment=environment, log=log, grace_seconds=0) as it:
                    deadline = time.monotonic() + INIT_SECONDS
                    while it.poll() is None and time.monotonic() < deadline:
                        self._restart_ended_head()
                        time.sleep(0.2)
                    status = it.poll()
                if status != 0:
                    what = f"ended with status {status}" if status else "does not end"
                    message = f"{container['name']} of {name} of {self.name} {what}"
                    raise RuntimeError(f"{message}:\n{self._logs()}")
                self._waited.add(container["name"])
        ray, *others = spec["containers"]
        assert all(each["name"] in NOT_HERE for each in others)
        environment = self._environment(ray, metadata)
        process = self._pods.enter_context(
            running(
                self._command(ray, environment), environment=environment, log=log, grace_seconds=0
            )
        )
        pod = Pod(name, ip, ports, process, built, log, self._here.serve_port)
        self._pods.callback(pod.kill)
        return pod

    def _mount(self, spec: Object, container: Object) -> None:
        """The config maps among the volumes, as files."""
        for mount in container.get("volumeMounts", []):
            (volume,) = (each for each in spec["volumes"] if each["name"] == mount["name"])
            if "configMap" in volume:
                data = named(self._objects, "ConfigMap", volume["configMap"]["name"])["data"]
                for name, content in data.items():
                    path = self._here.path(mount["mountPath"]) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content)

    def _command(self, container: Object, environment: Mapping[str, str]) -> list[str]:
        """The container's, in the image's working directory, with $(VARIABLES) put in."""
        words = [*container["command"], *container.get("args", [])]
        for name, value in environment.items():
            words = [word.replace(f"$({name})", value) for word in words]
        here = [self._here.command(self._name(word)) for word in words]
        return ["env", f"--chdir={self._here.workdir}", *here]

    def _name(self, text: str) -> str:
        """With addresses of this machine for the names of services, and for the head's own."""
        address = kuberay_operator.head_address(self.object)
        text = text.replace(f"{address}:8265", f"{HOST}:{self._head_ports.dashboard}")
        text = text.replace(address, HEAD_IP)
        own = f"{self._head_ports.head}"
        return self._here.value(re.sub(rf"\b127\.0\.0\.1:{own}\b", f"{HEAD_IP}:{own}", text))

    def _environment(self, container: Object, metadata: Object) -> dict[str, str]:
        """The image's variables, then `envFrom` and `env`."""
        environment = self._here.image()
        for source in container.get("envFrom", []):
            data = named(self._objects, "ConfigMap", source["configMapRef"]["name"])["data"]
            environment |= {name: self._name(value) for name, value in data.items()}
        for variable in container.get("env", []):
            value = variable.get("value")
            if value is None:
                value = self._value_from(variable["valueFrom"], metadata)
            environment[variable["name"]] = self._name(value)
        return environment

    def _value_from(self, source: Object, metadata: Object) -> str:
        if "fieldRef" in source:
            path = source["fieldRef"]["fieldPath"].removeprefix("metadata.")
            found = re.fullmatch(r"labels\['(.*)'\]", path)
            return str(metadata["labels"][found[1]] if found else metadata[path])
        reference = source["secretKeyRef"]
        if (reference["name"], reference["key"]) == (self.name, "auth_token"):
            return self._token
        return self._here.secrets[reference["name"], reference["key"]]
