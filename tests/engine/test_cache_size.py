from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_caller import tiny_model
from plain_operations import PlainOperations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptj import GPTJConfig
from gptj.engine.backends import best_runner
from gptj.engine.cache_size import CacheShare, fit_cache, free_bytes, page_bytes, tokens_within
from gptj.engine.limits import Limits
from gptj.engine.rehearsal import rehearse
from gptj.engine.runners.base import ResizableRunner
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.torch_runner import TorchRunner

CONFIG = GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=128)
CPU = torch.device("cpu")
PAGE = 2 * 2 * 16 * 64 * 2  # keys and values, 2 layers, 16 positions of width 64 in 2 bytes


def tokens_of(free: int, share: float, most: int = 10**9) -> int:
    return tokens_within(CONFIG, free, share=share, dtype=torch.float16, most=most)


def test_the_cache_is_whole_pages_within_its_share() -> None:
    assert tokens_of(100 * PAGE + 1, 0.5) == 50 * 16
    assert tokens_of(100 * PAGE - 2, 0.5) == 49 * 16


def test_the_cache_is_no_larger_than_requests_can_use() -> None:
    assert tokens_of(10**12, 0.5, most=1000) == 1000


def test_a_share_smaller_than_one_context_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"fewer than the model's context of 128.*cache_tokens"):
        tokens_of(10 * PAGE, 0.5)


def test_on_a_cpu_a_share_is_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    page = page_bytes(model.config, torch.float32)
    monkeypatch.setattr("gptj.engine.backends.free_bytes", lambda device: 100 * page)
    runner = best_runner(model, CacheShare(0.4, Limits(64, 256)))
    assert runner.num_pages == 40
    runner.close()


class Card(TorchDispatchMode):
    """The memory of a card, with tensors of the CPU on it: what was once taken stays reserved."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.reserved = 0
        self._taken = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._taken += storage.nbytes()
        self.reserved = max(self.reserved, self._taken)
        weakref.finalize(storage, self._give_back, storage.nbytes())

    def _give_back(self, size: int) -> None:
        self._taken -= size

    def empty_cache(self) -> None:
        self.reserved = self._taken

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return self.size - self.reserved, self.size


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("fused", 42_000_000), ("plain", 24_000_000)])
def test_the_cache_takes_only_what_the_largest_steps_leave_free(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that fills a step, with logits of all its tokens, beside rows at a context's end.

    The same steps again with the large cache stay within the card.
    """
    model = tiny_model(n_positions=128)
    card = Card(size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", card.mem_get_info)
    monkeypatch.setattr(torch.cuda, "empty_cache", card.empty_cache)
    limits = Limits(max_num_seqs=500, max_num_batched_tokens=1000)
    page = page_bytes(model.config, torch.float32)
    with card:
        runner: ResizableRunner
        if kind == "plain":
            runner = TorchRunner(model, 1)
        else:
            operations = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
            runner = CudaRunner(model, 1, operations)
        before, _ = card.mem_get_info()
        fit_cache(runner, CacheShare(0.95, limits), torch.float32)
        cache = runner.num_pages * page
        assert card.size * 0.3 < cache < before - 500_000  # less than without a measurement
        rehearse(runner, limits)
        assert 0.9 * card.size < card.reserved < card.size
    runner.close()


def test_free_memory_is_known_on_every_device(device: torch.device) -> None:
    assert free_bytes(device) > 0
