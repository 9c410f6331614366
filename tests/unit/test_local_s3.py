"""LocalS3, a SeaweedFS server on loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gptj_local import s3
from gptj_local.processes import HOST, free_ports
from gptj_local.s3 import LocalS3


@pytest.mark.slow
def test_a_server_whose_port_was_taken_meanwhile_starts_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[int]] = []

    def ports(count: int) -> list[int]:
        found.append(free_ports(count))
        if len(found) == 1:
            taken.bind((HOST, found[0][s3._PORT_FLAGS.index("admin.port")]))
            taken.listen()
        return found[-1]

    monkeypatch.setattr(s3, "free_ports", ports)
    with socket.socket() as taken, LocalS3.start(tmp_path / "s3") as server:
        assert len(found) == 2
        assert server.ports == tuple(found[1])


@pytest.mark.slow
def test_so_does_one_that_notices_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SeaweedFS checks its ports and opens them later; what it then writes was seen once."""
    late = tmp_path / "late"
    late.write_text(
        "#!/bin/sh\n"
        "echo 'Admin server error: listen tcp 127.0.0.1:1: bind: address already in use'\n"
        "exec sleep 60\n"
    )
    late.chmod(0o755)
    programs = [str(late), s3._program()]
    monkeypatch.setattr(s3, "_program", lambda: programs.pop(0))
    with LocalS3.start(tmp_path / "s3"):
        assert programs == []


@pytest.mark.slow
def test_the_ports_of_a_server_started_again_must_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalS3.start(tmp_path / "s3") as first:
        pass
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, first.ports[s3._PORT_FLAGS.index("admin.port")]))
        taken.listen()
        with (
            pytest.raises(RuntimeError, match="Port allocation failed"),
            LocalS3.start(tmp_path / "s3", again=first),
        ):
            pass
