"""Free and total memory, on a machine and within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from gptj.environment import host_memory
from gptj.environment.host_memory import available_bytes, total_bytes


@pytest.fixture(autouse=True)
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit_memory_is_the_machines() -> None:
    assert total_bytes() == psutil.virtual_memory().total
    assert available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_a_containers_limit_counts(cgroup: Path) -> None:
    (cgroup / "memory.current").write_text("1000\n")
    (cgroup / "memory.max").write_text("5000\n")
    assert (total_bytes(), available_bytes()) == (5000, 4000)


def test_the_page_cache_of_a_container_is_free(cgroup: Path) -> None:
    """After a download of weights it is as large as they are; shared memory is not part of it."""
    (cgroup / "memory.current").write_text("4900\n")
    (cgroup / "memory.max").write_text("5000\n")
    (cgroup / "memory.stat").write_text(
        "anon 900\nfile 3900\nshmem 1000\ninactive_file 2000\nactive_file 900\n"
        "slab_reclaimable 100\nslab_unreclaimable 50\n"
    )
    assert available_bytes() == 5000 - (4900 - 3000)


def test_max_is_no_limit(cgroup: Path) -> None:
    (cgroup / "memory.current").write_text("1000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert total_bytes() == psutil.virtual_memory().total
    assert available_bytes() > 2**20


def test_a_container_that_has_all_but_used_its_limit_has_nothing_free(cgroup: Path) -> None:
    (cgroup / "memory.current").write_text("5100\n")
    (cgroup / "memory.max").write_text("5000\n")
    assert available_bytes() == 0
