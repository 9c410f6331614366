"""Limits of a chat template's rendering: CPU time, and the size of what it makes.

A template comes with a model or an adapter, so its author is not trusted, and a thread cannot be
stopped from outside. So the environment calls `Budget.check` in each block and before operations
that read long values, and passes each value that an operation makes to `Budget.made`. While a
single call runs in C, neither a check nor another thread does: so calls that can multiply a value's
size, or whose time is not linear in it, are estimated before. Sizes are in characters of the
value's text, roughly.
"""

from __future__ import annotations

import codecs
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

MAX_SECONDS = 2.0  # of CPU time; 4,096 messages take published templates at most 0.35
MAX_CHARACTERS = 2**22  # of one value; this and the next are far above a model's context
MAX_MADE = 2**27  # of all values together
MAX_BITS = 4096  # of an integer
MAX_ITEMS = 2**16  # for filters that are slow, or in which a small number means much work
MAX_SLOW_CHARACTERS = 2**16  # that a slow function reads
MAX_COMPARED = 2**26  # pairs of characters, where each is compared with each: 0.1 s
MAX_KEYS = 2**11  # of a dictionary that are not texts: all may have the same hash; 0.1 s
MAX_PATH = 2**10  # characters of an attribute's path, or of a date's format
PER_ITEM = 8  # characters that an item of a list counts, besides its own
PER_CONTAINER = 64  # that a new container counts, besides its items
MAX_KNOWN = 10_000  # containers whose size is remembered

_TEXTS = (str, bytes)
_VIEWS: tuple[type[Collection[Any]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[type[Collection[Any]], ...] = (list, tuple, dict, set, frozenset, *_VIEWS)
# Methods that may compare each character of a text with each of another. Those that search from the
# left, such as find, count, replace and split, take linear time: CPython has an algorithm for that.
_COMPARING = frozenset(["rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"])
# Of other encodings, punycode's time is quadratic; and some ways to handle errors add much text.
_ENCODINGS = frozenset(
    ["ascii", "iso8859-1", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
_ERRORS = frozenset(["strict", "ignore", "replace"])
MAX_ENCODED = 2**10  # characters, otherwise

# A conversion in a printf-style format: its width, its precision, and what is after them.
_CONVERSION = re.compile(
    r"%(?:\([^()]*\))?[#0\- +]*([0-9]+|\*)?(?:\.([0-9]+|\*)?)?[hlL]?(.)?", re.DOTALL
)
_NESTED_KEY = re.compile(r"%\([^()]*\(")
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
        # Reading the CPU time is slow, and it never passes faster than real time: it is not read
        # before that much real time has passed.
        self._soonest = time.perf_counter() + seconds
        self._made = 0
        # Of containers in containers: one may be in another many times over, and so be measured
        # again and again. The containers are kept, so that no other gets their id.
        self._known: dict[int, tuple[Any, int]] = {}

    def check(self) -> None:
        """Raises TimeLimitError if the time is up."""
        now = time.perf_counter()
        if now >= self._soonest:
            left = self._end - time.thread_time()
            if left < 0:
                raise TimeLimitError(f"it takes more than {self._seconds:g} s of CPU time")
            self._soonest = now + left

    def made(self, value: Any) -> Any:
        """The value, which is new or was returned by a call. Raises LimitError if it is large."""
        self.check()
        if isinstance(value, _TEXTS):
            self._charge(self.bounded(len(value)))
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        elif isinstance(value, _CONTAINERS):
            self.bounded(self.size(value))
            self._charge(PER_CONTAINER + PER_ITEM * len(value))
        return value

    def sliced(self, value: Any) -> Any:
        """As `made`, for a part of a value that was."""
        self.check()
        if isinstance(value, _TEXTS):
            self._charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self._charge(PER_CONTAINER + PER_ITEM * len(value))
        return value

    def given(self, args: Collection[Any], kwargs: Mapping[str, Any]) -> None:
        """Of a call's arguments: a macro sees them as containers, and may keep them."""
        self.bounded(self.size(args) + self.size(kwargs))
        self._charge(PER_ITEM * (len(args) + len(kwargs)))

    def watched(self, items: Iterable[Any]) -> Iterator[Any]:
        """Items, within the limits while they are read, whoever reads them."""
        for each in items:
            self.check()
            self._charge(PER_ITEM)
            yield each

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

    def check_slow(self, value: Any, most: int = MAX_SLOW_CHARACTERS) -> None:
        """Of what a slow filter or method reads."""
        if self.size(value) > most:
            raise LimitError(f"it gives a slow function a value of more than {most} characters")

    def check_compared(self, text: Any, other: Any) -> None:
        """Before a call that compares each character of a text with each of another."""
        if isinstance(text, _TEXTS) and isinstance(other, _TEXTS):
            if len(text) * len(other) > MAX_COMPARED:
                raise LimitError(
                    f"it gives a text of {len(text)} characters to a slow method with another of "
                    f"{len(other)}, more than {MAX_COMPARED} to compare"
                )

    def check_path(self, path: Any, what: str = "an attribute's path") -> None:
        """Of an attribute, such as a.b.c, or of what else takes time for each of its parts."""
        if isinstance(path, str) and len(path) > MAX_PATH:
            raise LimitError(f"it has {what} of more than {MAX_PATH} characters")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Before they are put into a dictionary or set.

        A template can find other values than texts with the same hash, each of which is then
        compared with all others.
        """
        others = 0
        for key in keys:
            others += not isinstance(key, _TEXTS)
            if others > MAX_KEYS:
                raise LimitError(f"it makes a dict of more than {MAX_KEYS} keys that are not texts")

    def check_encoding(self, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before text.encode(…) or text.decode(…)."""
        named = dict(zip(("encoding", "errors"), args, strict=False)) | dict(kwargs)
        encoding, errors = named.get("encoding", "utf-8"), named.get("errors", "strict")
        known = isinstance(encoding, str) and codecs.lookup(encoding).name in _ENCODINGS
        if not known or errors not in _ERRORS:
            self.check_slow(text, MAX_ENCODED)

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
        conversions, starred, widest = 0, False, 0
        for found in _CONVERSION.finditer(shown):
            self.check()
            width, precision, after = found.groups()
            conversions += after != "%" or width is not None
            for each in (width, precision):
                if each == "*":  # it is among the values
                    starred = True
                elif each:
                    widest = max(widest, self.widths(each))
        if _NESTED_KEY.search(shown):  # where that is not sure
            widest, conversions, starred = self.widths(shown), shown.count("%"), "*" in shown
        if starred:
            given = values if isinstance(values, tuple) else (values,)
            widest += sum(abs(each) for each in given if isinstance(each, int))
        self.bounded(len(text) + conversions * (self.size(values) + widest))

    def widths(self, text: str) -> int:
        """A bound on the widths and precisions in a value's format."""
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
        """Before a call of a method that can multiply a value's size, or take long."""
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "")
        if isinstance(owner, int) and name == "to_bytes":
            for each in (*args, *kwargs.values()):
                if isinstance(each, int):
                    self.bounded(each)
        if owner is dict and name == "fromkeys" and args:
            keys = self.listed(args[0])
            self.check_keys(keys)
            return (keys, *args[1:])
        if not isinstance(owner, _TEXTS):
            return args
        if name in _COMPARING:
            for each in (*args, *kwargs.values()):
                self.check_compared(owner, each)
        elif name in ("encode", "decode"):
            self.check_encoding(owner, args, kwargs)
        elif name in ("striptags", "unescape"):  # of Markup
            self.check_slow(owner)
        elif name in ("ljust", "rjust", "center", "zfill"):
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
            if args:  # at least an item for each character, since looking it up takes long
                self.bounded(len(owner) * max(PER_ITEM, self.size(args[0])))
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
