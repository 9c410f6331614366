"""The adapters in a runner's memory: a fixed number of slots with LRU eviction.

An adapter stays while it is held: by a caller between loading and submitting, and by each request
until its end. Any thread may load and hold adapters while the engine's thread runs steps.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from gptj.engine.runners.base import Runner
from gptj.engine.runners.lora import LoRALimits, LoRAWeights


class SlotsInUseError(RuntimeError):
    """Every slot's adapter is in use: try again later."""


class Adapter:
    """An adapter in a slot of a runner."""

    def __init__(self, slot: int, digest: bytes, slots: AdapterSlots) -> None:
        self.slot = slot
        self.digest = digest  # of its weights: cached pages are specific to an adapter
        self.uses = 1  # under the slots' lock
        self._slots = slots

    @property
    def in_memory(self) -> bool:
        return self._slots.has(self)

    def hold(self) -> bool:
        """Keep it until `release`; False if it is no longer in memory."""
        return self._slots.hold(self)

    def release(self) -> None:
        self._slots.release(self)


class AdapterSlots:
    """Loads adapters into a runner's slots.

    Args:
        runner: made with these limits.
    """

    def __init__(self, runner: Runner, limits: LoRALimits) -> None:
        self.limits = limits
        self.loads = 0
        self.evictions = 0
        self._runner = runner
        self._lock = threading.Lock()
        self._free = list(reversed(range(limits.max_loras)))
        self._loaded: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first

    @property
    def loaded(self) -> int:
        return len(self._loaded)

    def load(self, weights: LoRAWeights) -> Adapter:
        """Load an adapter, which the caller holds. Takes a while: not on the engine's thread.

        Raises SlotsInUseError.
        """
        with self._lock:
            slot = self._take_slot()
        try:
            self._runner.load_adapter(slot, weights)
        except BaseException:
            with self._lock:
                self._free.append(slot)
            raise
        adapter = Adapter(slot, weights.digest, self)
        with self._lock:
            self._loaded[adapter] = None
            self.loads += 1
        return adapter

    def hold(self, adapter: Adapter) -> bool:
        """See Adapter.hold."""
        with self._lock:
            if adapter not in self._loaded:
                return False
            adapter.uses += 1
            self._loaded.move_to_end(adapter)
            return True

    def has(self, adapter: Adapter) -> bool:
        with self._lock:
            return adapter in self._loaded

    def release(self, adapter: Adapter) -> None:
        with self._lock:
            assert adapter.uses > 0
            adapter.uses -= 1
            self._loaded.move_to_end(adapter)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for adapter in self._loaded:
            if adapter.uses == 0:
                del self._loaded[adapter]
                self.evictions += 1
                return adapter.slot
        raise SlotsInUseError(
            f"all of the {self.limits.max_loras} adapters in memory are in use: try again later, "
            f"or raise max_loras"
        )
