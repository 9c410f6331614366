"""Hosts on this machine, each with its own network, name, processes and perhaps clock.

    enter_namespaces()                   # first: the program starts again in its own
    with Network.start() as network:
        head, node = network.host(), network.host(clock=True)
        subprocess.run(head.command(["ray", "start", …]), env={**os.environ, **head.environment})
        network.cut(node)

A host is a set of Linux namespaces, joined to the others by a virtual link and a bridge, which are
in the program's own network namespace. Namespaces and processes vanish with the program, however it
ends; after SIGKILL its temporary folder stays. Hosts reach only each other and the program. They
share its files, but each has a temporary folder of its own (TMPDIR).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gptj_local.processes import Host

ENTERED = "GPTJ_IN_NAMESPACES"  # set in the environment of a program that is in its namespaces
SUBNET = "198.18.0"  # reserved for benchmarks (RFC 2544), and here only in our namespaces
OWN = 254  # the program's last byte
MOST = 200  # every host's number is below this
BRIDGE = "hosts"
LINK = "eth0"
NOBODY = "02:00:00:00:ff:ff"
NAMESPACES = ("--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
PROGRAMS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}
CLOCK_SOURCE = Path(__file__).with_name("clock.c")
SECOND = 10**9  # nanoseconds


def obstacle(*, clocks: bool = False) -> str | None:
    """Why there can be no hosts here, with the remedy, in a line; None if there can.

    Args:
        clocks: whether any needs a clock of its own.
    """
    needed = PROGRAMS | ({"cc": "gcc"} if clocks else {})
    for program, package in needed.items():
        if shutil.which(program) is None:
            return f"the program `{program}` is not installed; remedy: apt-get install {package}"
    try_it = (
        f"ip link add {BRIDGE} type bridge && ip link add one type veth peer name two && "
        f"ip link set one master {BRIDGE}"
    )
    done = subprocess.run([*_unshare(), "sh", "-c", try_it], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        return (
            f"cannot create network namespaces ({said}); remedy: run it as root, in a container "
            f"with the capabilities SYS_ADMIN and NET_ADMIN"
        )
    return None


def enter_namespaces() -> None:
    """Start this program again in namespaces of its own, unless it is there already.

    Call it before there are threads. When the program ends, so do all processes that it has left.
    """
    if ENTERED in os.environ:
        return
    command = [*_unshare(), sys.executable, *sys.orig_argv[1:]]
    os.execvpe(command[0], command, {**os.environ, ENTERED: "1"})


def _unshare() -> list[str]:
    """The command that makes namespaces; with one for users, it may not need root."""
    return ["unshare", *(() if os.getuid() == 0 else ("--user", "--map-root-user")), *NAMESPACES]


@dataclass(frozen=True)
class NamespaceHost(Host):
    """One of a network's hosts. When its first process, `init`, ends, the kernel kills all."""

    number: int = 0
    init: subprocess.Popen[str] | None = field(default=None, repr=False)
    clock: Path | None = None

    @property
    def port(self) -> str:
        """Its link's end at the bridge."""
        return f"port{self.number}"

    def set_clock(self, ahead: float) -> None:
        """Let the wall clock of its processes be so many seconds ahead; a host with a clock."""
        assert self.clock is not None
        with self.clock.open("r+b") as file:
            file.write(struct.pack("=q", round(ahead * SECOND)))

    def lose(self) -> None:
        """SIGKILL to all its processes at once, as when a machine is lost."""
        assert self.init is not None
        self.init.kill()
        self.init.wait()


class Network:
    """A bridge, and the hosts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hosts: list[NamespaceHost] = []
        names = [f"{SUBNET}.{number} host-{number}" for number in range(1, MOST)]
        (folder / "hosts").write_text("\n".join(("127.0.0.1 localhost", *names, "")))
        (folder / "tmp").mkdir()
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "address", _hardware(OWN), "up")
        _run("ip", "address", "add", f"{SUBNET}.{OWN}/24", "dev", BRIDGE)

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Network]:
        """In a program that has entered its namespaces; its hosts' files last for the block."""
        assert ENTERED in os.environ
        with ExitStack() as stack:
            # Ray's sockets are in it, whose paths must be short.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptj-"))
            network = cls(Path(folder))
            stack.callback(network._close)
            yield network

    def _close(self) -> None:
        for host in self._hosts:
            host.lose()

    def host(self, *, clock: bool = False) -> NamespaceHost:
        """A new one, reachable by all others.

        Args:
            clock: whether its clock can be set (`set_clock`), for what runs with its environment.
        """
        number = len(self._hosts) + 1
        assert number < MOST
        own = self.folder / f"host-{number}"
        own.mkdir()
        temporary = self.folder / "tmp"
        begin = (
            f"hostname host-{number} && ip link set lo up && "
            f"mount --bind {own} {temporary} && mount --bind {self.folder}/hosts /etc/hosts && "
            "echo ready && { sleep infinity & wait; }"  # the shell is these processes' init
        )
        init = subprocess.Popen(
            [*_unshare(), "--uts", "sh", "-c", begin],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert init.stdout is not None
        if init.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {number} did not start")
        first = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().strip()
        environment = {"TMPDIR": str(temporary)}
        set_by = None
        if clock:
            set_by = own / "clock"
            set_by.write_bytes(bytes(8))
            environment |= {"LD_PRELOAD": str(self._clock_library()), "GPTJ_CLOCK": str(set_by)}
        host = NamespaceHost(
            f"{SUBNET}.{number}",
            (
                "nsenter",
                f"--target={first}",
                "--net",
                "--uts",
                "--pid",
                "--mount",
                f"--wd={os.getcwd()}",
            ),
            environment,
            temporary,
            number,
            init,
            set_by,
        )
        _run(
            *("ip", "link", "add", host.port, "type", "veth"),
            *("peer", "name", LINK, "netns", first),
        )
        _run("ip", "link", "set", host.port, "master", BRIDGE, "up")
        _run(*host.command(["ip", "link", "set", LINK, "address", _hardware(number), "up"]))
        _run(*host.command(["ip", "address", "add", f"{host.address}/24", "dev", LINK]))
        _set_neighbour((), BRIDGE, number, _hardware(number))
        _set_neighbour(host.prefix, LINK, OWN, _hardware(OWN))
        for other in self._hosts:
            if other.init is not None and other.init.poll() is None:
                self._acquaint(host, other)
        self._hosts.append(host)
        return host

    def cut(self, host: NamespaceHost) -> None:
        """Take its link down: packets to and from it are silently dropped."""
        _run("ip", "link", "set", host.port, "down")

    def mend(self, host: NamespaceHost) -> None:
        _run("ip", "link", "set", host.port, "up")

    def part(self, one: NamespaceHost, other: NamespaceHost) -> None:
        """Drop all packets between these two; both still reach all others."""
        _set_neighbour(one.prefix, LINK, other.number, NOBODY)
        _set_neighbour(other.prefix, LINK, one.number, NOBODY)

    def rejoin(self, one: NamespaceHost, other: NamespaceHost) -> None:
        self._acquaint(one, other)

    def throttle(self, host: NamespaceHost, kilobits: int) -> None:
        """Limit the rate at which it receives."""
        limit = ("tbf", "rate", f"{kilobits}kbit", "burst", "16kb", "latency", "300ms")
        _run("tc", "qdisc", "add", "dev", host.port, "root", *limit)

    def unthrottle(self, host: NamespaceHost) -> None:
        _run("tc", "qdisc", "del", "dev", host.port, "root")

    def _acquaint(self, one: NamespaceHost, other: NamespaceHost) -> None:
        _set_neighbour(one.prefix, LINK, other.number, _hardware(other.number))
        _set_neighbour(other.prefix, LINK, one.number, _hardware(one.number))

    def _clock_library(self) -> Path:
        library = self.folder / "clock.so"
        if not library.exists():
            flags = ("-O2", "-shared", "-fPIC", "-ldl")
            _run("cc", "-o", str(library), str(CLOCK_SOURCE), *flags)
        return library


def _set_neighbour(prefix: Sequence[str], link: str, number: int, hardware: str) -> None:
    """Fixed, so that a host that does not answer is silent, as behind a router, not unreachable."""
    _run(
        *(*prefix, "ip", "neighbour", "replace", f"{SUBNET}.{number}"),
        *("lladdr", hardware, "nud", "permanent", "dev", link),
    )


def _hardware(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
