"""Weights from S3: every byte in its place, wherever requests are split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptj import storage
from gptj.checkpoints import weights
from gptj.checkpoints.manifest import FolderWriter, Manifest
from gptj.checkpoints.weights import TensorSpec, read_weights, write_weights
from gptj_local.s3 import LocalS3

SIZES = (1, 3, 500, 499, 2000, 7, 7, 1003, 11, 5000, 250, 250)


@pytest.mark.parametrize("part_bytes", [7, 100, 1000, 10**6])
def test_tensors_may_be_anywhere_in_a_request(
    part_bytes: int, tmp_path: Path, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests within a tensor, across several, and along their edges; hashes fit as well."""
    sizes = SIZES[:3] if part_bytes == 7 else SIZES
    tensors = {f"t{i}": torch.randn(size).half() for i, size in enumerate(sizes)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    address = f"s3://gptj/{tmp_path.name}"
    with FolderWriter(address) as writer:
        write_weights(writer, specs, tensors.values(), shard_bytes=7000)
    monkeypatch.setattr(storage, "PART_BYTES", part_bytes)
    monkeypatch.setattr(weights, "RUN_BYTES", 1500)
    found = dict(read_weights(address, Manifest.read(address)))
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_reading_can_be_cancelled_at_any_time(tmp_path: Path, s3: LocalS3) -> None:
    tensors = {f"t{i}": torch.randn(100) for i in range(20)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    address = f"s3://gptj/{tmp_path.name}"
    with FolderWriter(address) as writer:
        write_weights(writer, specs, tensors.values(), shard_bytes=1000)
    coming = read_weights(address, Manifest.read(address))
    next(coming)
    coming.close()  # type: ignore[attr-defined]  # which waits for its threads: it must not hang
