"""Limits of a chat template's rendering: CPU time, and the size of what it makes.

A template comes with a model or an adapter, so its author is not trusted, and a thread cannot be
stopped from outside. So the environment calls `Budget.check` in each block, and passes each value
that an operation makes to `Budget.made`; operations that can multiply a value's size are estimated
before. Sizes are in characters of the value's text, roughly.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

MAX_SECONDS = 2.0  # of CPU time; 4,096 messages take published templates at most 0.35
MAX_CHARACTERS = 2**22  # of one value; this and the next are far above a model's context
MAX_MADE = 2**27  # of all values together
MAX_BITS = 4096  # of an integer
MAX_ITEMS = 2**16  # for filters that are slow, or in which a small number means much work
MAX_SLOW_CHARACTERS = 2**16
PER_ITEM = 8  # characters that an item of a list counts, besides its own
MAX_KNOWN = 10_000  # containers whose size is remembered

_TEXTS = (str, bytes)
_VIEWS: tuple[type[Collection[Any]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[type[Collection[Any]], ...] = (list, tuple, dict, set, frozenset, *_VIEWS)
_active = threading.local()


class LimitError(TemplateRuntimeError):
    """A rendering exceeds a limit; the message says which."""


class TimeLimitError(LimitError):
    """A rendering takes too long."""


class Budget:
    """Of one rendering, which is the thread's until it ends.

    Args:
        seconds: of CPU time.
    """

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self._seconds = seconds
        self._end = time.thread_time() + seconds
        self._made = 0
        # Of containers in containers: one may be in another many times over, and so be measured
        # again and again. The containers are kept, so that no other gets their id.
        self._known: dict[int, tuple[Any, int]] = {}

    def check(self) -> None:
        """Raises TimeLimitError if the time is up."""
        if time.thread_time() > self._end:
            raise TimeLimitError(f"it takes more than {self._seconds:g} s of CPU time")

    def made(self, value: Any) -> Any:
        """The value, which is new or was returned by a call. Raises LimitError if it is large."""
        self.check()
        if isinstance(value, _TEXTS):
            self._charge(self.bounded(len(value)))
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        elif isinstance(value, _CONTAINERS):
            self.bounded(self.size(value))
            self._charge(PER_ITEM * len(value))
        return value

    def bounded(self, size: int) -> int:
        """The size of a value that is to be made, if it may be."""
        if size > MAX_CHARACTERS:
            raise LimitError(f"it makes a text or list of more than {MAX_CHARACTERS} characters")
        return size

    def check_bits(self, bits: int) -> None:
        if bits > MAX_BITS:
            raise LimitError(f"it makes an integer of more than {MAX_BITS} bits")

    def check_items(self, count: Any) -> None:
        """Of a filter's number."""
        if isinstance(count, int) and abs(count) > MAX_ITEMS:
            raise LimitError(f"it gives a filter the number {count}, more than {MAX_ITEMS}")

    def check_slow(self, value: Any) -> None:
        """Of what a slow filter reads."""
        if self.size(value) > MAX_SLOW_CHARACTERS:
            raise LimitError(
                f"it gives a slow filter a value of more than {MAX_SLOW_CHARACTERS} characters"
            )

    def size(self, value: Any) -> int:
        """Characters of a value's text, a container's items included as often as they occur."""
        if isinstance(value, _TEXTS):
            return len(value)
        if isinstance(value, int):
            return PER_ITEM + value.bit_length() // 3
        if not isinstance(value, _CONTAINERS):
            return PER_ITEM
        known = self._known.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        size, nested = 2, False
        items = value.items() if isinstance(value, dict) else value
        for item in items:
            parts = item if isinstance(value, dict) else (item,)
            for part in parts:
                nested = nested or isinstance(part, _CONTAINERS)
                size += PER_ITEM + self.size(part)
            self.bounded(size)
        if nested:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[id(value)] = value, size
        return size

    def check_repeat(self, left: Any, right: Any) -> None:
        """Before left * right."""
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, (*_TEXTS, list, tuple)):
                self.bounded(self.size(value) * max(0, times))
        if isinstance(left, int) and isinstance(right, int):
            self.check_bits(left.bit_length() + right.bit_length() - 1)

    def check_power(self, left: Any, right: Any) -> None:
        """Before left ** right."""
        if isinstance(left, int) and isinstance(right, int) and right > 0 and abs(left) > 1:
            self.check_bits((left.bit_length() - 1) * right)

    def check_printf(self, text: Any, values: Any) -> None:
        """Before text % values."""
        if not isinstance(text, _TEXTS):
            return
        shown = text.decode("latin-1") if isinstance(text, bytes) else text
        widths = self.widths(shown)
        if "*" in shown:  # a width among the values
            given = values if isinstance(values, tuple) else (values,)
            widths += sum(abs(each) for each in given if isinstance(each, int))
        conversions = shown.count("%")
        self.bounded(len(text) + conversions * (self.size(values) + widths))

    def widths(self, text: str) -> int:
        """A bound on the widths and precisions in a format."""
        numbers = re.findall(r"\d+", text)
        if any(len(each) > 7 for each in numbers):
            raise LimitError("it has a format with a number of more than 7 digits")
        return max(map(int, numbers), default=0)

    def listed(self, items: Any) -> Any:
        """What a generator yields as a list; other items as they are."""
        if not isinstance(items, Iterator):
            return items
        found, size = [], 0
        for each in items:
            found.append(each)
            size = self.bounded(size + PER_ITEM + self.size(each))
        return found

    def checked_arguments(
        self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Before a call of a text's or an integer's method that can multiply its size."""
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "")
        if isinstance(owner, int) and name == "to_bytes":
            for each in (*args, *kwargs.values()):
                if isinstance(each, int):
                    self.bounded(each)
        if not isinstance(owner, _TEXTS):
            return args
        if name in ("ljust", "rjust", "center", "zfill"):
            for each in args:
                if isinstance(each, int):
                    self.bounded(each)
        elif name == "expandtabs":
            for each in (*args, *kwargs.values()):
                if isinstance(each, int):
                    self.bounded(len(owner) * max(1, each))
        elif name == "replace":
            if len(args) > 1:
                self.check_replace(owner, args[0], args[1])
        elif name == "translate":
            if args and isinstance(args[0], _CONTAINERS):
                self.bounded(len(owner) * self.size(args[0]))
        elif name == "join":
            if args:
                items = self.listed(args[0])
                self.bounded(self.size(items) + len(owner) * len(items))
                return (items, *args[1:])
        return args

    def check_replace(self, text: Any, old: Any, new: Any) -> None:
        """Before each occurrence of `old` is replaced."""
        if all(isinstance(each, str) for each in (text, old, new)) or all(
            isinstance(each, bytes) for each in (text, old, new)
        ):
            self.bounded(len(text) + text.count(old) * len(new))

    def _charge(self, size: int) -> None:
        self._made += size
        if self._made > MAX_MADE:
            raise LimitError(f"it makes texts and lists of more than {MAX_MADE} characters in all")


@contextmanager
def limited(seconds: float = MAX_SECONDS) -> Iterator[Budget]:
    """A budget for what this thread renders in the block."""
    _active.budget = Budget(seconds)
    try:
        yield _active.budget
    finally:
        _active.budget = None


def budget() -> Budget:
    """The present one; outside of `limited`, one for a single operation."""
    return getattr(_active, "budget", None) or Budget()
