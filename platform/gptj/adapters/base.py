"""Which model an adapter belongs to: its address, and what is known of its content.

In a folder of ours `base.json` says so; in one of PEFT's its configuration names an address.
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
        revision: of a hub id.
        digest: of its manifest (Manifest.digest); None if it has none, or it is not known.
    """

    address: str
    revision: str | None = None
    digest: str | None = None

    @classmethod
    def at(cls, address: str, revision: str | None = None) -> Base:
        """The model that is now at an address. FileNotFoundError if there is none."""
        with ModelFolder.open(address, revision=revision, files=()) as folder:
            return cls(address, revision, digest_of(folder))

    @classmethod
    def of(cls, folder: ModelFolder) -> Base:
        """What an adapter's folder says. CheckpointError if it does not say it."""
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
        """Whether an adapter's folder names a base; one of PEFT's need not."""
        return BASE in folder or bool(
            folder.read_object(ADAPTER_CONFIG).get("base_model_name_or_path")
        )

    def to_dict(self) -> dict[str, Any]:
        return {"address": self.address, "revision": self.revision, "digest": self.digest}

    def check(self, adapter: str, found: Base) -> None:
        """CheckpointError if the model that was found is another than the one trained on."""
        if self.digest is not None and found.digest is None:
            logger.warning(
                "%s has no manifest, so that only its shapes tell whether it is the base of %s",
                found.address,
                adapter,
            )
        elif self.digest not in (None, found.digest):
            raise CheckpointError(
                f"{adapter} was trained on another model than {found.address}: on {self.address} "
                f"with the manifest's digest {self.digest}, and this one's is {found.digest}"
            )


def digest_of(folder: ModelFolder) -> str | None:
    return None if folder.manifest is None else folder.manifest.digest


def check_base(folder: ModelFolder) -> None:
    """Check that the base of an adapter is complete; see ModelFolder.check_complete."""
    base = Base.of(folder)
    with ModelFolder.open(base.address, revision=base.revision) as found:
        found.check_complete()


def check_plain(address: str, revision: str | None = None) -> None:
    """ValueError if there is an adapter at the address, where a whole model is needed."""
    with ModelFolder.open(address, revision=revision, files=[ADAPTER_CONFIG]) as folder:
        if folder.is_adapter:
            raise ValueError(
                f"{address} is an adapter, and a whole model is needed here; remedy: merge it into "
                f"its base first: jobs/merge_adapter.py"
            )
