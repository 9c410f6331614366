from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptj import GPTJConfig
from gptj.engine import cache_size
from gptj.engine.cache_size import cache_tokens, free_bytes

CONFIG = GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=128)
CPU = torch.device("cpu")
PAGE = 2 * 2 * 16 * 64 * 2  # keys and values, 2 layers, 16 positions of width 64 in 2 bytes


def tokens_of(monkeypatch: pytest.MonkeyPatch, free: int, share: float, most: int = 10**9) -> int:
    monkeypatch.setattr(cache_size, "free_bytes", lambda device: free)
    return cache_tokens(CONFIG, share=share, device=CPU, element_size=2, most=most)


def test_the_cache_is_whole_pages_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens_of(monkeypatch, 100 * PAGE + 1, 0.5) == 50 * 16
    assert tokens_of(monkeypatch, 100 * PAGE - 2, 0.5) == 49 * 16


def test_the_cache_is_no_larger_than_requests_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens_of(monkeypatch, 10**12, 0.5, most=1000) == 1000


def test_a_share_that_holds_no_whole_context_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="fewer than the model's context of 128.*cache_tokens"):
        tokens_of(monkeypatch, 10 * PAGE, 0.5)


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache_size, "CGROUP", tmp_path)
    unlimited = free_bytes(CPU)
    assert unlimited > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**20


def test_free_memory_is_known_on_every_device(device: torch.device) -> None:
    assert free_bytes(device) > 0
