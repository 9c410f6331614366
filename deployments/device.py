"""The device that Ray gave to this replica."""

from __future__ import annotations

import ray
import torch


def replica_device() -> torch.device:
    """CUDA if the replica has a GPU: Ray hides other replicas' GPUs."""
    # Outside a cluster, get_gpu_ids would start one.
    return torch.device("cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu")
