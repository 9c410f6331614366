"""Sizes the KV cache as a share of the device's memory, in tokens.

On a GPU the model first runs the largest possible steps with a small cache; the share applies to
what weights, graphs, workspaces and steps leave free.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from gptj.config import GPTJConfig
from gptj.engine.limits import Limits
from gptj.engine.rehearsal import rehearse
from gptj.engine.runners.base import PAGE_SIZE, ResizableRunner
from gptj.engine.runners.cuda.fp8 import FP8
from gptj.environment.host_memory import available_bytes

logger = logging.getLogger(__name__)

# The rest is for fragmentation on a GPU, and for other programs on a CPU.
DEFAULT_SHARES = {"cuda": 0.95, "cpu": 0.3}


@dataclass(frozen=True)
class CacheShare:
    """A cache sized as a share of the device's free memory, at most what the limits can use."""

    share: float  # of the memory free after loading the weights; in (0, 1)
    limits: Limits  # of the steps, which also need GPU memory


def fit_cache(runner: ResizableRunner, size: CacheShare, dtype: torch.dtype) -> None:
    """Give a GPU's runner the largest cache that fits.

    Args:
        runner: with the smallest possible cache.
        dtype: of its cache.

    Raises:
        ValueError: see `tokens_within`.
    """
    torch.cuda.empty_cache()  # loading leaves memory in the allocator
    before, _ = torch.cuda.mem_get_info(runner.device)
    rehearse(runner, size.limits)
    free, _ = torch.cuda.mem_get_info(runner.device)
    most = size.limits.max_num_seqs * runner.config.n_positions
    tokens = tokens_within(runner.config, free, share=size.share, dtype=dtype, most=most)
    runner.resize(-(-tokens // PAGE_SIZE))
    logger.info(
        "the largest steps take %.2f GB; the cache holds %d tokens in %.2f of the other %.2f GB",
        (before - free) / 1e9,
        tokens,
        runner.num_pages * page_bytes(runner.config, dtype) / 1e9,
        free / 1e9,
    )


def tokens_within(
    config: GPTJConfig, free: int, *, share: float, dtype: torch.dtype, most: int
) -> int:
    """Positions that fit in a share of `free` bytes, in whole pages and at most `most`.

    Args:
        dtype: of the cache.
        most: positions that all running requests together can use.

    Raises:
        ValueError: if one request with a full context does not fit.
    """
    page = page_bytes(config, dtype)
    tokens = min(int(free * share / page) * PAGE_SIZE, most)
    if tokens < min(config.n_positions, most):
        needed = -(-min(config.n_positions, most) // PAGE_SIZE) * page
        raise ValueError(
            f"cache_share={share} of {free / 1e9:.1f} GB free memory holds {tokens} tokens, fewer "
            f"than the model's context of {config.n_positions} ({needed / 1e9:.1f} GB): raise it, "
            f"set cache_tokens, or use a device with more memory"
        )
    return tokens


def room(
    config: GPTJConfig, device: torch.device, share: float, dtype: torch.dtype, freed: int = 0
) -> int:
    """Positions that fit in a share of the free memory, in whole pages.

    Args:
        dtype: of the cache.
        freed: bytes that packing the weights will additionally free.
    """
    free = free_bytes(device) + freed
    return int(free * share) // page_bytes(config, dtype) * PAGE_SIZE


def page_bytes(config: GPTJConfig, dtype: torch.dtype) -> int:
    """Bytes of a page of the cache: keys and values of PAGE_SIZE positions in all layers.

    In fp8 with a scale in fp32 for each head of either.
    """
    token = config.n_embd * dtype.itemsize
    if dtype == FP8:
        token += config.n_head * torch.float32.itemsize
    return 2 * config.n_layer * PAGE_SIZE * token


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; on a CPU, of this machine or its container."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available_bytes()
