"""The adapters of a generation service, by the name that requests have as their `model`.

Those named in the service's settings stay in memory. With a root, the name of any folder below it
works as well: its adapter is loaded on its first request, evicting the least recently used one. A
folder whose files have changed is reloaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import TypeVar

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.stored import read_adapter, read_config
from gptj.chat import ChatTemplate, template_of
from gptj.checkpoints.folder import ADAPTER_CONFIG, ModelFolder
from gptj.config import GPTJConfig
from gptj.engine.adapter_slots import Adapter, AdapterSlots, SlotsInUseError
from gptj.engine.adapter_weights import lora_weights
from gptj.engine.runners.lora import LoRAWeights
from gptj.errors import CheckpointError, NoTokenizerError
from gptj.serving.errors import (
    SCOPE,
    APIError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from gptj.serving.metrics import Recorder
from gptj.serving.results import shared_result
from gptj.tokenizer import GPTJTokenizer
from gptj.tokenizer.files import TokenizerSettings

CHECK_SECONDS = 10.0  # between checks for changes of a folder that is in use
# How long a request waits for a check before using the version in memory, and for loading: reads
# from storage that is down can take minutes.
CHECK_WAIT_SECONDS, LOAD_WAIT_SECONDS = 1.0, 60.0
MISSING_SECONDS = 3.0  # until a name without a folder is looked up again
LOADS_AT_ONCE = 2
MAX_PENDING = 32  # names that are being looked up or loaded
MAX_KNOWN = 1024  # names with a folder, loaded or not; and as many without one
MAX_TRIES = 3  # to hold an adapter that others push out
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
# Of a folder below the root. No part begins with a dot, so that no name leads out of it.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?=.{{1,200}}\Z){_PART}(?:/{_PART})*")

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter as listed by `GET /v1/models`."""

    name: str
    address: str
    has_template: bool  # its own
    created: int  # when it was loaded or, if not in memory, inspected; seconds since 1970


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    name: str
    address: str
    version: str  # of its folder's files
    loaded: Adapter
    template: ChatTemplate | None  # its own
    created: int  # when it was loaded, in seconds since 1970

    @property
    def info(self) -> AdapterInfo:
        return AdapterInfo(self.name, self.address, self.template is not None, self.created)


@dataclass
class _Known:
    """A folder below the root."""

    served: ServedAdapter | None = None  # perhaps no longer in memory, until it is looked at
    refused: tuple[str, str] | None = None  # a version that cannot be served, and why
    checked: float = 0.0  # by time.monotonic
    described: AdapterInfo | None = None  # while it is not in memory
    described_at: float = -math.inf  # by time.monotonic


class Adapters:
    """Finds and loads adapters, on threads of its own.

    Args:
        slots: of the engine's runner.
        base: the model that the engine runs; `tokenizer` is its own.
        named: addresses by name; they are loaded now.
        root: a folder or `s3://` address; None: only the named ones.
        verify: compare files' SHA-256 with an adapter's manifest, if it has one.

    Raises:
        CheckpointError, ChatTemplateError, storage.StorageError: of a named adapter.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        config: GPTJConfig,
        base: Base,
        tokenizer: GPTJTokenizer,
        recorder: Recorder,
        *,
        named: Mapping[str, str] | None = None,
        root: str | None = None,
        verify: bool = True,
    ) -> None:
        self._slots = slots
        self._config = config
        self._base = base
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._root = root
        self._verify = verify
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()  # by name, least recently used first
        self._missing: OrderedDict[str, float] = OrderedDict()  # last miss by name; oldest first
        self._loads: dict[str, Future[ServedAdapter]] = {}
        self._lookups: dict[str, Future[AdapterInfo]] = {}
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE, "adapters")
        # Held for good.
        self._named = {
            name: self._loaded(name, address, "") for name, address in (named or {}).items()
        }

    async def hold(self, name: str) -> ServedAdapter:
        """The adapter of that name, to be released (`loaded.release`) once requests are submitted.

        Raises:
            NotFoundError: if there is none.
            InvalidRequestError: if it cannot be served, with the reason.
            OverloadedError: if all adapters in memory are in use, or too many are being loaded.
            UnavailableError: if its folder cannot be read now, or that takes too long.
        """
        for _ in range(MAX_TRIES):
            served = self._present(name) or await self._load(name)
            if served.loaded.hold():
                return served
        raise _in_use("other adapters push this one out of memory: try again later")

    async def describe(self, name: str) -> AdapterInfo:
        """Describe an adapter without loading it, which would evict others.

        Raises like `hold`, as far as its small files show.
        """
        served = self._present(name)
        if served is not None:
            return served.info
        with self._lock:
            known = self._known.get(name) or _Known()
            if known.served is not None and known.served.loaded.in_memory:
                return known.served.info
            if known.described is not None:
                if time.monotonic() - known.described_at <= CHECK_SECONDS:
                    return known.described
        lookup = self._once(self._lookups, self._described, name)
        return await _result(name, lookup, LOAD_WAIT_SECONDS)

    def may_have(self, name: str) -> bool:
        """Whether an adapter of that name may exist, without looking it up."""
        return name in self._named or self._address(name) is not None

    def present(self) -> list[ServedAdapter]:
        """The adapters in memory."""
        with self._lock:
            known = [each.served for each in self._known.values() if each.served is not None]
        in_memory = [each for each in known if each.loaded.in_memory]
        return [*self._named.values(), *sorted(in_memory, key=lambda each: each.name)]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _present(self, name: str) -> ServedAdapter | None:
        """The adapter, if its folder need not be looked at now. Raises what its version did."""
        if name in self._named:
            return self._named[name]
        with self._lock:
            if time.monotonic() - self._missing.get(name, -math.inf) < MISSING_SECONDS:
                raise unknown_model(name)
            known = self._known.get(name)
            if known is None or time.monotonic() - known.checked > CHECK_SECONDS:
                return None
            self._known.move_to_end(name)
            if known.served is not None and known.served.loaded.in_memory:
                return known.served
            if known.served is None and known.refused is not None:
                raise _refusal(name, known.refused[1])
        return None

    async def _load(self, name: str) -> ServedAdapter:
        """The adapter in its folder's version, or the version in memory if checking takes long."""
        load = self._once(self._loads, self._found, name)
        with self._lock:
            known = self._known.get(name)
        before = None if known is None else known.served
        if known is None or before is None or not before.loaded.in_memory:
            return await _result(name, load, LOAD_WAIT_SECONDS)
        try:
            return await _result(name, load, CHECK_WAIT_SECONDS)
        except UnavailableError:
            known.checked = time.monotonic()  # others need not wait
            return before

    def _once(
        self,
        pending: dict[str, Future[Found]],
        work: Callable[[str, str, _Known, str], Found],
        name: str,
    ) -> Future[Found]:
        """Run `work` on a folder in a thread; concurrent callers share the result."""
        address = self._address(name)
        if address is None:
            raise unknown_model(name)
        with self._lock:
            if name in pending:
                return pending[name]
            # Clients can make up any number of names: known ones take precedence.
            full = len(self._loads) + len(self._lookups) >= MAX_PENDING
            if full and name not in self._known:
                raise _in_use("too many adapters are being looked up: try again later")
            future = self._threads.submit(self._look_up, work, name, address)
            pending[name] = future

        def done(_: Future[Found]) -> None:
            with self._lock:
                pending.pop(name, None)

        future.add_done_callback(done)
        return future

    def _look_up(
        self, work: Callable[[str, str, _Known, str], Found], name: str, address: str
    ) -> Found:
        """Run `work` on a folder's current version. Raises APIError."""
        with self._lock:
            known = self._known.get(name) or _Known()
        if known.served is not None and not known.served.loaded.in_memory:
            known.served = None
        try:
            version = _version(address)
        except storage.NotFoundError as error:
            with self._lock:
                self._known.pop(name, None)
                self._missing[name] = time.monotonic()
                self._missing.move_to_end(name)
                self._trim()
            raise unknown_model(name) from error
        except OSError as error:
            if known.served is None:
                raise _unreadable(name, error) from error
            logger.warning("%s cannot be read; keeping the version in memory: %s", address, error)
            version = known.served.version
        return work(name, address, known, version)

    def _found(self, name: str, address: str, known: _Known, version: str) -> ServedAdapter:
        """A folder's adapter in its current version. Raises APIError."""
        before = known.served
        if before is None or before.version != version:
            if known.refused is None or known.refused[0] != version:
                self._replace(known, name, address, version)
            if known.served is None or known.served.version != version:
                assert known.refused is not None
                if before is None:
                    self._remember(name, known)
                    raise _refusal(name, known.refused[1])
        self._remember(name, known)
        assert known.served is not None
        return known.served

    def _described(self, name: str, address: str, known: _Known, version: str) -> AdapterInfo:
        """Describe a folder's adapter, in memory or not. Raises APIError."""
        if known.served is not None:  # loaded meanwhile
            return known.served.info
        if known.refused is not None and known.refused[0] == version:
            raise _refusal(name, known.refused[1])
        refused = described = None
        try:
            with ModelFolder.open(address) as folder:
                read_config(folder)
                folder.check_complete()
                if Base.named_in(folder):
                    Base.of(folder).check(address, self._base)
                has_template = self._template(folder) is not None
            described = AdapterInfo(name, address, has_template, int(time.time()))
        except OSError as error:
            raise _unreadable(name, error) from error
        except ValueError as error:  # CheckpointError and ChatTemplateError among them
            refused = version, str(error)
        with self._lock:
            known = self._known.setdefault(name, known)  # it may have been loaded meanwhile
            if refused is not None:
                known.refused, known.checked = refused, time.monotonic()
            known.described, known.described_at = described, time.monotonic()
            self._trim()
        if described is None:
            assert refused is not None
            raise _refusal(name, refused[1])
        return described

    def _replace(self, known: _Known, name: str, address: str, version: str) -> None:
        """Load a folder's new version, or note why it cannot be served."""
        start = time.monotonic()
        try:
            known.served = self._loaded(name, address, version)
            known.refused = None
        except SlotsInUseError as error:
            raise _in_use(str(error)) from error
        except OSError as error:
            raise _unreadable(name, error) from error
        except ValueError as error:  # CheckpointError and ChatTemplateError among them
            logger.error("the adapter %s cannot be served: %s", address, error)
            self._recorder.adapter_load("refused", time.monotonic() - start)
            known.refused = version, str(error)
            return
        known.served.loaded.release()
        self._recorder.adapter_load("loaded", time.monotonic() - start)

    def _remember(self, name: str, known: _Known) -> None:
        known.checked = time.monotonic()
        with self._lock:
            self._known[name] = known
            self._known.move_to_end(name)
            self._trim()

    def _trim(self) -> None:
        """Forget the oldest entries; call with the lock held."""
        for names in (self._known, self._missing):
            while len(names) > MAX_KNOWN:
                names.popitem(last=False)

    def _loaded(self, name: str, address: str, version: str) -> ServedAdapter:
        """Read an adapter, and load it into a slot; it is held."""
        weights, template = self._read(address)
        loaded = self._slots.load(weights)
        logger.info("loaded the adapter %s from %s", name, address)
        return ServedAdapter(name, address, version, loaded, template, int(time.time()))

    def _read(self, address: str) -> tuple[LoRAWeights, ChatTemplate | None]:
        """An adapter's weights and its own chat template, all checked."""
        with ModelFolder.open(address, weights=True, verify=self._verify) as folder:
            stored = read_adapter(folder)
            if stored.known_base is not None:
                stored.known_base.check(address, self._base)
            template = self._template(folder)
            return lora_weights(stored, self._config, self._slots.limits.max_lora_rank), template

    def _template(self, folder: ModelFolder) -> ChatTemplate | None:
        """An adapter's own chat template, from its own files only.

        The base that they name is an address chosen by whoever wrote them: it is never opened.

        Raises:
            CheckpointError: for a token that the base model's tokenizer does not have.
            ValueError, ChatTemplateError: for a file that cannot be read as what it is.
        """
        if any(name in folder for name in VOCABULARY_FILES):
            try:
                tokenizer = GPTJTokenizer.own(folder)
            except NoTokenizerError as error:  # files are missing: retrying does not help
                raise CheckpointError(str(error)) from error
            self._check_entries(folder.address, tokenizer.get_vocab())
            return template_of(tokenizer)
        settings = TokenizerSettings.read(folder)
        self._check_entries(folder.address, settings.entries)
        source = settings.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if source is None:
            return None
        tokens = {**self._tokenizer.special_tokens_map, **settings.special_tokens}
        return ChatTemplate(source, tokens)

    def _check_entries(self, address: str, entries: Mapping[str, int | None]) -> None:
        known = self._tokenizer.get_vocab()
        for token, number in entries.items():
            found = known.get(token)
            if found is None:
                raise CheckpointError(
                    f"{address} adds the token {shown(token)} to its base model's: adapters with "
                    f"additional tokens are not supported; remedy: merge it into its base: "
                    f"jobs/merge_adapter.py"
                )
            if number not in (None, found):
                raise CheckpointError(
                    f"{address} has a tokenizer that is not its base model's: its id of "
                    f"{shown(token)} is {number}, not {found}"
                )

    def _address(self, name: str) -> str | None:
        """A name's folder; None if the name is not valid below the root."""
        return None if self._root is None else address_below(self._root, name)


async def _result(name: str, future: Future[Found], seconds: float) -> Found:
    """The result of a shared future. UnavailableError if it takes more than `seconds`."""
    try:
        return await asyncio.wait_for(shared_result(future), seconds)
    except TimeoutError:
        raise UnavailableError(
            f"the adapter {name!r} could not be read in {seconds:g} s: try again later"
        ) from None


@asynccontextmanager
async def served_model(
    name: str | None, base: str, adapters: Adapters | None
) -> AsyncIterator[ServedAdapter | None]:
    """The adapter that a request's `model` names, held in the block; None: the base model.

    Raises NotFoundError if there is none, and what `Adapters.hold` does.
    """
    if name is None or name == base:
        yield None
    elif adapters is None:
        raise unknown_model(name)
    else:
        adapter = await adapters.hold(name)
        try:
            yield adapter
        finally:
            adapter.loaded.release()


def unknown_model(name: str | None) -> APIError:
    return NotFoundError(
        f"model {name!r:.200} does not exist; GET /v1/models lists what this service has",
        param="model",
        code="model_not_found",
    )


def check_name(name: str) -> str:
    """A name of an adapter in settings. Raises ValueError."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r:.80} is not a valid adapter name: letters, digits, . _ - and / between them"
        )
    return name


def address_below(root: str, name: str) -> str | None:
    """The folder of an adapter's name below a root; None if the name is not valid there."""
    if _NAME.fullmatch(name) is None:
        return None
    address = storage.join(root, name)
    if not storage.is_s3(address):  # nor may a link lead out
        if not Path(address).resolve().is_relative_to(Path(root).resolve()):
            return None
    return address


def check_adapter(address: str) -> None:
    """What can be known of an adapter without reading its weights.

    Raises CheckpointError, or FileNotFoundError if there is none.
    """
    with ModelFolder.open(address) as folder:
        read_config(folder)
        folder.check_complete()


def _version(address: str) -> str:
    """Differs when a folder's files have changed. NotFoundError if it holds no adapter."""
    # First: a listing of a folder of many folders takes long.
    if not storage.exists(storage.join(address, ADAPTER_CONFIG)):
        raise storage.NotFoundError(f"{address} holds no adapter")
    files = [(file.name, file.size, file.version) for file in storage.list_files(address)]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _refusal(name: str, reason: str) -> APIError:
    return InvalidRequestError(
        f"the adapter {name!r} cannot be served: {reason}", param="model", code="adapter_refused"
    )


def _unreadable(name: str, error: Exception) -> APIError:
    return UnavailableError(f"the adapter {name!r} cannot be read: {error}")


def _in_use(reason: str) -> APIError:
    # Other requests have room: the proxy must not refuse them for this.
    return OverloadedError(reason, headers={SCOPE: "adapters"})
