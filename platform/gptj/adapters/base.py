"""An adapter's base model: its address and, if known, a digest of its content.

Our adapter folders record it in `base.json`; PEFT's configuration names an address.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gptj import storage
from gptj.checkpoints.folder import ADAPTER_CONFIG, BASE, SMALL_FILES, ModelFolder
from gptj.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Attributes:
        address: a folder, an `s3://` address or a hub id.
        revision: branch, tag or commit of a hub id.
        digest: of its manifest (Manifest.digest); None if there is none, or it is unknown.
        commit: of a hub id, what the revision stood for; None if that is unknown.
    """

    address: str
    revision: str | None = None
    digest: str | None = None
    commit: str | None = None

    @classmethod
    def at(cls, address: str, revision: str | None = None, commit: str | None = None) -> Base:
        """The model at an address: at the commit, if one is given, or now.

        FileNotFoundError if there is none.
        """
        with ModelFolder.open(address, revision=commit or revision, files=()) as folder:
            return cls(address, revision, digest_of(folder), folder.commit)

    @classmethod
    def of(cls, folder: ModelFolder) -> Base:
        """The base that an adapter's folder records. CheckpointError if it records none."""
        name = BASE if BASE in folder else ADAPTER_CONFIG
        address = storage.join(folder.address, name)
        fields = folder.read_object(name)
        key = "address" if name == BASE else "base_model_name_or_path"
        base, revision = fields.get(key), fields.get("revision")
        digest, commit = fields.get("digest"), fields.get("commit")
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{address} does not name the adapter's base model ({key} is {shown(base)}); "
                f"remedy: give its address: jobs/merge_adapter.py BASE {folder.address} …"
            )
        for value in (revision, digest, commit):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"{address} is damaged: {shown(value)} is not a string")
        if name != BASE:  # digest and commit are not PEFT's
            return cls(base, revision or None)
        return cls(base, revision or None, digest, commit or None)

    @classmethod
    def named(cls, recorded: Base | None, address: str, revision: str | None = None) -> Base:
        """The base that a user names for an adapter.

        The recorded one, with its commit, if the address is the same and no revision is given.
        """
        if recorded is not None and revision is None and recorded.address == address:
            return recorded
        return cls(address, revision)

    @property
    def pin(self) -> str | None:
        """The revision to read: the commit, if it is known, since a branch may have moved.

        None if a folder of the hub id's name now stands for it.
        """
        if Path(self.address).is_dir():
            return None
        return self.commit or self.revision

    def open(
        self,
        adapter: str,
        *,
        weights: bool = False,
        files: Sequence[str] = SMALL_FILES,
        verify: bool = True,
    ) -> ModelFolder:
        """Open the base of an adapter; see ModelFolder.open.

        FileNotFoundError, naming the adapter and the remedy, if it cannot be had.
        """
        try:
            return ModelFolder.open(
                self.address, revision=self.pin, weights=weights, files=files, verify=verify
            )
        except FileNotFoundError as error:
            raise self.missing(adapter, error) from error

    def missing(self, adapter: str, error: FileNotFoundError) -> FileNotFoundError:
        """The error for an adapter whose base cannot be read, and why."""
        reason = f"the base model of the adapter {adapter} is missing: {error}"
        if self.commit is None:
            return FileNotFoundError(reason)
        return FileNotFoundError(
            f"{reason}; {adapter} was trained on {self.address} at {self.commit}; remedy: make "
            f"that commit available, or merge the adapter into a base that you choose: "
            f"jobs/merge_adapter.py {self.address} {adapter} … --revision {self.revision or 'main'}"
        )

    @staticmethod
    def named_in(folder: ModelFolder) -> bool:
        """Whether an adapter's folder names a base; PEFT's need not."""
        return BASE in folder or bool(
            folder.read_object(ADAPTER_CONFIG).get("base_model_name_or_path")
        )

    def to_dict(self) -> dict[str, Any]:
        found = {"address": self.address, "revision": self.revision, "digest": self.digest}
        return found if self.commit is None else {**found, "commit": self.commit}

    def check(self, adapter: str, found: Base) -> None:
        """CheckpointError if `found` is not the model that the adapter was trained on."""
        if self.digest is not None and found.digest is None:
            logger.warning(
                "%s has no manifest, so only shapes can tell whether it is the base of %s",
                found.address,
                adapter,
            )
        elif self.digest not in (None, found.digest):
            raise CheckpointError(
                f"{adapter} was not trained on {found.address}, but on {self.address} with the "
                f"manifest digest {self.digest}; this one's is {found.digest}"
            )
        elif (
            self.digest is None
            and None not in (self.commit, found.commit)
            and (self.address, self.commit) != (found.address, found.commit)
        ):
            logger.warning(
                "%s was trained on %s at %s, not on %s at %s; only shapes can tell whether it fits",
                adapter,
                self.address,
                self.commit,
                found.address,
                found.commit,
            )


def digest_of(folder: ModelFolder) -> str | None:
    return None if folder.manifest is None else folder.manifest.digest


def check_base(folder: ModelFolder) -> None:
    """Check that the base of an adapter is complete; see ModelFolder.check_complete."""
    with Base.of(folder).open(folder.address) as found:
        found.check_complete()


def check_plain(address: str, revision: str | None = None) -> None:
    """ValueError if the address holds an adapter rather than a whole model."""
    with ModelFolder.open(address, revision=revision, files=[ADAPTER_CONFIG]) as folder:
        if folder.is_adapter:
            raise ValueError(
                f"{address} is an adapter, but a whole model is needed here; remedy: merge it into "
                f"its base first: jobs/merge_adapter.py"
            )
