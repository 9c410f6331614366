"""An adapter's base model: its address and, if known, a digest of its content.

Our adapter folders record it in `base.json`; PEFT's configuration names an address.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from gptj import storage
from gptj.checkpoints.folder import ADAPTER_CONFIG, BASE, ModelFolder
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
        base, revision, digest = (fields.get(each) for each in (key, "revision", "digest"))
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{address} does not name the adapter's base model ({key} is {shown(base)}); "
                f"remedy: give its address: jobs/merge_adapter.py BASE {folder.address} …"
            )
        for value in (revision, digest):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"{address} is damaged: {shown(value)} is not a string")
        return cls(base, revision or None, digest if name == BASE else None)

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


def digest_of(folder: ModelFolder) -> str | None:
    return None if folder.manifest is None else folder.manifest.digest


def check_base(folder: ModelFolder) -> None:
    """Check that the base of an adapter is complete; see ModelFolder.check_complete."""
    base = Base.of(folder)
    with ModelFolder.open(base.address, revision=base.revision) as found:
        found.check_complete()


def check_plain(address: str, revision: str | None = None) -> None:
    """ValueError if the address holds an adapter rather than a whole model."""
    with ModelFolder.open(address, revision=revision, files=[ADAPTER_CONFIG]) as folder:
        if folder.is_adapter:
            raise ValueError(
                f"{address} is an adapter, but a whole model is needed here; remedy: merge it into "
                f"its base first: jobs/merge_adapter.py"
            )
