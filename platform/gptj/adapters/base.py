"""Which model an adapter belongs to: its address, and what is known of its content.

In a folder of ours `base.json` says so; in one of PEFT's its configuration names an address.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from gptj import storage
from gptj.checkpoints.hub import locate
from gptj.checkpoints.manifest import MANIFEST, CheckpointError, Manifest, read_verified
from gptj.serialization.json_object import parse_object

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base.json"

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
        manifest = Manifest.read(locate(address, revision=revision, patterns=(MANIFEST,)))
        return cls(address, revision, None if manifest is None else manifest.digest)

    @classmethod
    def of(cls, folder: str, manifest: Manifest | None) -> Base:
        """What an adapter's folder says. CheckpointError if it does not say it."""
        name = BASE if has_file(folder, BASE, manifest) else ADAPTER_CONFIG
        address = storage.join(folder, name)
        fields = parse_object(read_verified(folder, name, manifest), address)
        key = "address" if name == BASE else "base_model_name_or_path"
        base, revision, digest = (fields.get(each) for each in (key, "revision", "digest"))
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{address} does not name the adapter's base model ({key} is {shown(base)}); "
                f"remedy: give the base model's address: jobs/merge_adapter.py BASE {folder} …"
            )
        for value in (revision, digest):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"{address} is damaged: {shown(value)} is no text")
        return cls(base, revision or None, digest if name == BASE else None)

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


def check_plain(address: str, revision: str | None = None) -> None:
    """ValueError if there is an adapter at the address, where a whole model is needed."""
    folder = locate(address, revision=revision, patterns=(ADAPTER_CONFIG, MANIFEST))
    if is_adapter(folder, Manifest.read(folder)):
        raise ValueError(
            f"{address} is an adapter, and a whole model is needed here; remedy: merge it into its "
            f"base first: jobs/merge_adapter.py"
        )


def is_adapter(folder: str, manifest: Manifest | None) -> bool:
    """Whether a folder holds an adapter, and not a model."""
    return has_file(folder, ADAPTER_CONFIG, manifest)


def has_file(folder: str, name: str, manifest: Manifest | None) -> bool:
    if manifest is not None:
        return name in manifest.files
    return storage.exists(storage.join(folder, name))
