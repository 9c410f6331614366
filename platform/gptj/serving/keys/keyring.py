"""A service's API keys: plain ones in GPTJ_API_KEYS, and named, hashed ones in a file.

    keys:
      - name: search-team
        sha256: 5e88…                # of the key; `python -m gptj.serving.keys NAME` makes both
        applications: [generation]   # default: all
        models: [team-a/*]           # the base model and adapters; default: all
        requests_per_minute: 600     # default: no limit, as for the next two
        tokens_per_minute: 100000
        concurrent_requests: 8

GPTJ_KEYS_FILE names the file. Its changes take effect within a second, without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

logger = logging.getLogger(__name__)

VARIABLE = "GPTJ_API_KEYS"  # comma separated
FILE_VARIABLE = "GPTJ_KEYS_FILE"
SCHEME = b"bearer "
CHECK_SECONDS = 1.0  # between checks for changes of the file

Limit = Annotated[int, Field(ge=1)] | None


class Key(BaseModel):
    """A named key; the key itself is stored nowhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    applications: frozenset[str] | None = None  # by name in serve.yaml; None: all
    # The base model and adapters by name, or patterns such as team-a/*; None: all.
    models: frozenset[str] | None = None
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrent_requests: Limit = None

    @property
    def limited(self) -> bool:
        limits = (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests)
        return any(limit is not None for limit in limits)

    def opens(self, application: str) -> bool:
        return self.applications is None or application in self.applications

    def opens_model(self, name: str) -> bool:
        return self.models is None or any(fnmatchcase(name, each) for each in self.models)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]


class Keys:
    """A service's keys; without any, and without a file, every request is allowed.

    Args:
        keys: plain ones, without limits; named key-1, key-2, … in metrics.
        path: the keys file; a missing file has no keys.

    Raises:
        ValueError: if the file is not valid.
    """

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None) -> None:
        self._fixed = [
            Key(name=f"key-{number}", sha256=digest(key.encode()))
            for number, key in enumerate(keys, 1)
        ]
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._checked = time.monotonic()
        self._named = self._read() if path is not None else []

    def __bool__(self) -> bool:
        return bool(self._fixed) or self._path is not None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """The keys of GPTJ_API_KEYS and GPTJ_KEYS_FILE.

        Raises ValueError if they are set but hold no key, or the file is not valid.
        """
        text, file = environment.get(VARIABLE), environment.get(FILE_VARIABLE)
        if text is None and file is None:
            logger.warning(
                "%s is not set: everyone who can reach this service can use it", VARIABLE
            )
            return cls()
        keys = [key.strip() for key in (text or "").split(",") if key.strip()]
        if text is not None and not keys:
            raise ValueError(
                f"{VARIABLE}={text!r} has no keys: set some, or unset it to allow every request"
            )
        found = cls(keys, Path(file) if file else None)
        if not found._fixed and not found._named:
            raise ValueError(f"{FILE_VARIABLE}={file} has no keys, and {VARIABLE} is not set")
        return found

    def allow(self, authorization: bytes | None) -> bool:
        """Whether a header's value has a valid key, in constant time; always true without keys."""
        return not self or self.find(authorization) is not None

    def find(self, authorization: bytes | None) -> Key | None:
        """The key in an Authorization header, in constant time."""
        if authorization is None or not authorization.lower().startswith(SCHEME):
            return None
        given = digest(authorization[len(SCHEME) :].strip())
        # Compare all: stopping at the first match would leak by timing which key it was.
        same = [key for key in self._present() if hmac.compare_digest(given, key.sha256)]
        return same[0] if same else None

    def _present(self) -> list[Key]:
        now = time.monotonic()
        if self._path is not None and now - self._checked >= CHECK_SECONDS:
            self._checked = now
            try:
                self._named = self._read()
            except ValueError as error:
                logger.error("keeping the previous keys: %s", error)
        return self._fixed + self._named

    def _read(self) -> list[Key]:
        """The file's keys, reread if it changed. Raises ValueError."""
        assert self._path is not None
        try:
            found = self._path.stat()  # follows links: mounted secrets are updated by relinking
        except FileNotFoundError:
            self._stamp = None
            return []
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read: {error.strerror}") from error
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp == self._stamp:
            return self._named
        try:
            content = self._path.read_bytes()
        except OSError as error:  # the stamp is unset, so the next check retries
            raise ValueError(f"{self._path} cannot be read: {error.strerror}") from error
        self._stamp = stamp
        try:
            keys = _File.model_validate(yaml.safe_load(content)).keys
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValidationError) as error:
            raise ValueError(f"{self._path} cannot be used: {_reason(error)}") from None
        names = [key.name for key in keys]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{self._path} has several keys named {', '.join(sorted(twice))}")
        logger.info("%s has %d keys: %s", self._path, len(keys), ", ".join(names))
        return keys


def digest(key: bytes) -> str:
    """The hash in the file. Keys are long and random, so a plain hash cannot be reversed."""
    return hashlib.sha256(key).hexdigest()


def _reason(error: Exception) -> str:
    """The reason, without the file's content, which may contain a plain key by mistake."""
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5]
        )
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"it is not valid YAML in line {error.problem_mark.line + 1}"
    return type(error).__name__
