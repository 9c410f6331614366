"""The adapters of a generation service, by the name that requests have as their `model`.

Some are named in the service's settings, and stay in memory. With a root, the name of any folder
below it works as well: its adapter is loaded at its first request, and the least recently used one
gives way. A folder whose files have changed is read again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.stored import read_adapter, read_config
from gptj.chat import ChatTemplate, template_of
from gptj.chat.sources import decoded
from gptj.checkpoints.folder import ADAPTER_CONFIG, CHAT_TEMPLATE, TOKENIZER_FILES, ModelFolder
from gptj.config import GPTJConfig
from gptj.engine.adapter_slots import Adapter, AdapterSlots, SlotsInUseError
from gptj.engine.adapter_weights import lora_weights
from gptj.engine.runners.lora import LoRAWeights
from gptj.errors import CheckpointError
from gptj.serving.errors import (
    SCOPE,
    APIError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from gptj.serving.metrics import Recorder
from gptj.tokenizer import GPTJTokenizer

LOOK_SECONDS = 10.0  # between checks for changes of a folder that is in use
LOADS_AT_ONCE = 2
MAX_PENDING = 32  # names that are being looked up or loaded
MAX_KNOWN = 1024  # names with a folder, loaded or not
MAX_TRIES = 3  # to hold an adapter that others push out
# Of a folder below the root. No part begins with a dot, so that no name leads out of it.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?=.{{1,200}}\Z){_PART}(?:/{_PART})*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    name: str
    address: str
    version: str  # of its folder's files
    loaded: Adapter
    template: ChatTemplate | None  # its own
    created: int  # when it was loaded, in seconds since 1970


@dataclass
class _Known:
    """A folder below the root."""

    served: ServedAdapter | None = None  # perhaps no longer in memory, until it is looked at
    refused: tuple[str, str] | None = None  # a version that cannot be served, and why
    looked: float = 0.0  # by time.monotonic


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
        self._pending: dict[str, Future[ServedAdapter]] = {}
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
            UnavailableError: if its folder cannot be read now.
        """
        for _ in range(MAX_TRIES):
            served = self._present(name)
            if served is None:
                served = await asyncio.shield(asyncio.wrap_future(self._look(name)))
            if served.loaded.hold():
                return served
        raise _in_use("other adapters push this one out of memory: try again later")

    def may_have(self, name: str) -> bool:
        """Whether there could be an adapter of that name, without looking."""
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
            known = self._known.get(name)
            if known is None or time.monotonic() - known.looked > LOOK_SECONDS:
                return None
            self._known.move_to_end(name)
            if known.served is not None and known.served.loaded.in_memory:
                return known.served
            if known.served is None and known.refused is not None:
                raise _refusal(name, known.refused[1])
        return None

    def _look(self, name: str) -> Future[ServedAdapter]:
        """Look at a folder, and load its adapter if necessary; once for all who wait for it."""
        address = self._address(name)
        if address is None:
            raise unknown_model(name)
        with self._lock:
            if name in self._pending:
                return self._pending[name]
            if len(self._pending) >= MAX_PENDING:
                raise _in_use("too many adapters are being loaded: try again later")
            future = self._threads.submit(self._found, name, address)
            self._pending[name] = future
        future.add_done_callback(lambda _: self._done(name))
        return future

    def _done(self, name: str) -> None:
        with self._lock:
            self._pending.pop(name, None)

    def _found(self, name: str, address: str) -> ServedAdapter:
        """A folder's adapter in its present version. Raises APIError."""
        with self._lock:
            known = self._known.get(name) or _Known()
        before = known.served
        if before is not None and not before.loaded.in_memory:
            before = known.served = None
        try:
            version = _version(address)
        except storage.NotFoundError as error:
            with self._lock:
                self._known.pop(name, None)
            raise unknown_model(name) from error
        except (storage.StorageError, OSError) as error:
            if before is None:
                raise UnavailableError(f"the adapter {name!r} cannot be read: {error}") from error
            logger.warning("%s cannot be read, and stays as it is in memory: %s", address, error)
            version = before.version
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

    def _replace(self, known: _Known, name: str, address: str, version: str) -> None:
        """Load a folder's new version, or note why it cannot be served."""
        start = time.monotonic()
        try:
            known.served = self._loaded(name, address, version)
            known.refused = None
        except SlotsInUseError as error:
            raise _in_use(str(error)) from error
        except storage.StorageError as error:
            raise UnavailableError(f"the adapter {name!r} cannot be read: {error}") from error
        except ValueError as error:  # CheckpointError and ChatTemplateError among them
            logger.error("the adapter %s cannot be served: %s", address, error)
            self._recorder.adapter_load("refused", time.monotonic() - start)
            known.refused = version, str(error)
            return
        known.served.loaded.release()
        self._recorder.adapter_load("loaded", time.monotonic() - start)

    def _remember(self, name: str, known: _Known) -> None:
        known.looked = time.monotonic()
        with self._lock:
            self._known[name] = known
            self._known.move_to_end(name)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

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
        """Raises CheckpointError for a tokenizer that is not the base model's."""
        if not any(name in folder for name in TOKENIZER_FILES if name != CHAT_TEMPLATE):
            if CHAT_TEMPLATE not in folder:
                return None
            place = storage.join(folder.address, CHAT_TEMPLATE)
            return template_of(self._tokenizer, decoded(folder.read(CHAT_TEMPLATE), place))
        tokenizer = GPTJTokenizer.from_folder(folder)
        if len(tokenizer) != len(self._tokenizer):
            raise CheckpointError(
                f"{folder.address} has a tokenizer with {len(tokenizer)} entries, and its base "
                f"model's has {len(self._tokenizer)}: adapters with tokens of their own are not "
                f"supported"
            )
        return template_of(tokenizer, None)

    def _address(self, name: str) -> str | None:
        """A name's folder; None if it is no name of a folder below the root."""
        if self._root is None or _NAME.fullmatch(name) is None:
            return None
        address = storage.join(self._root, name)
        if not storage.is_s3(address):  # nor may a link lead out
            if not Path(address).resolve().is_relative_to(Path(self._root).resolve()):
                return None
        return address


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
            f"{name!r:.80} is not a name of an adapter: letters, digits, . _ - and / between them"
        )
    return name


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


def _in_use(reason: str) -> APIError:
    # Other requests have room: the proxy must not refuse them for this.
    return OverloadedError(reason, headers={SCOPE: "adapters"})
