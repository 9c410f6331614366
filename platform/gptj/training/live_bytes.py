"""Measure peak tensor memory from the storages that PyTorch operations return."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of storages allocated within the block, on any device, until they are freed.

    Works on `meta` too, where a model of any size runs instantly. Operations' internal workspace
    is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = {id(storage(each)) for each in tree_leaves((args, kwargs)) if is_tensor(each)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if is_tensor(each) and (key := id(storage(each))) not in before | self._seen:
                size = storage(each).nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                self._seen.add(key)
                weakref.finalize(storage(each), self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
