"""What the three deployments share: their arguments, and a checkpoint on the right device."""

from __future__ import annotations

import os
import posixpath
import tempfile
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gptj import GPTJConfig, GPTJForCausalLM, GPTJModel, GPTJTokenizer
from gptj.adapters.base import check_base
from gptj.adapters.lora import merge_lora
from gptj.checkpoints.folder import ModelFolder
from gptj.config import parse_dtype
from gptj.int4 import CONFIG_FIELD, check_config_fields
from gptj.pretrained import GPTJPreTrainedModel
from gptj.serving.app import HTTPOptions
from gptj.serving.middleware.cors import check_origin
from gptj.serving.middleware.limits import LARGEST_BODY_BYTES, MAX_BODY_BYTES
from gptj.storage.addresses import normalized
from gptj.storage.file_lock import turn

Model = TypeVar("Model", bound=GPTJPreTrainedModel)

RENAMED = {  # deprecated keys of `args`, by their present names
    "max_waiting": "max_queued",
    "max_running": "max_num_seqs",
    "step_tokens": "max_num_batched_tokens",
}


class Arguments(BaseModel):
    """`args` of an application in serve.yaml; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # A folder, an s3:// address or a hub id; of a model, or of an adapter, which is merged into its
    # base in memory.
    checkpoint: Annotated[str, AfterValidator(normalized)]
    revision: str | None = None  # of a hub id
    # auto: float16 on a GPU; on a CPU bfloat16 where it computes in it (AMX, AVX512-BF16), or
    # else float32, since emulation is slower than float32 itself.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    verify: bool = True  # compare each file's SHA-256 with the checkpoint's manifest
    # Replicas that load on one node at the same time; the others wait, and then find the files in
    # the system's memory. What a replica needs only while it loads is there so many times at most.
    loads_at_once: Annotated[int, Field(ge=1)] = 1
    max_queued: Annotated[int, Field(ge=1)] = 256  # rows that wait; beyond it clients get 429
    # Without a step for so long while there is work, the replica counts as dead and is replaced.
    stalled_seconds: Annotated[float, Field(gt=0)] = 120

    # Origins of other pages that may ask (CORS), such as https://chat.example.org; * for all.
    cors_origins: tuple[Annotated[str, AfterValidator(check_origin)], ...] = ()
    unknown_fields: Literal["refuse", "ignore"] = "refuse"  # of bodies; ignored ones are logged

    # Of a request's body, for whose texts a replica needs a hundred times the memory to tokenize.
    max_body_bytes: Annotated[int, Field(ge=1, le=LARGEST_BODY_BYTES)] = MAX_BODY_BYTES

    def http_options(self) -> HTTPOptions:
        return HTTPOptions(self.cors_origins, self.unknown_fields == "ignore", self.max_body_bytes)

    def check_others(self, config: GPTJConfig, tokenizer: GPTJTokenizer) -> None:
        """What an application needs beside the checkpoint. Raises ValueError, FileNotFoundError."""

    def check_tokenizer(self, tokenizer: GPTJTokenizer) -> None:
        """What an application needs of the tokenizer beside its size. Raises ValueError."""

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed(cls, fields: Any) -> Any:
        """Take deprecated keys for the fields that this application has, with a warning."""
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        for old, new in RENAMED.items():
            if old not in fields or new not in cls.model_fields:
                continue
            if new in fields:
                raise ValueError(f"{old} is the former name of {new}: remove {old}")
            # Python shows users a FutureWarning, but no DeprecationWarning.
            warnings.warn(f"args: {old} is deprecated: use {new}", FutureWarning, stacklevel=2)
            fields[new] = fields.pop(old)
        return fields


class BatchArguments(Arguments):
    """Of a service that computes whole rows, in batches."""

    max_batch: Annotated[int, Field(ge=1)] = 16  # rows that are computed together


def loading_turn(arguments: Arguments) -> AbstractContextManager[None]:
    """Wait until this replica may load; a block's length of a place that the node's users share.

    A replica that is killed meanwhile leaves its place at once.
    """
    places = Path(tempfile.gettempdir()) / f"gptj-loading-{os.getuid()}"
    return turn(places, arguments.loads_at_once)


def check(cls: type[GPTJPreTrainedModel], arguments: Arguments) -> None:
    """Check what can be known of a checkpoint without reading its weights.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if files are missing, cut off or damaged.
        ValueError: if it has another head, or a tokenizer that does not fit.
    """
    with ModelFolder.open(arguments.checkpoint, revision=arguments.revision) as folder:
        config, tokenizer = _config_and_tokenizer(cls, folder, arguments)
        arguments.check_tokenizer(tokenizer)
        folder.check_complete()
        if folder.is_adapter:
            check_base(folder)
    arguments.check_others(config, tokenizer)


def load(
    cls: type[Model], arguments: Arguments, device: torch.device | None = None
) -> tuple[Model, GPTJTokenizer]:
    """The model, ready to compute, and its tokenizer. Raises what `check` does.

    Args:
        device: None: a GPU, if this process sees one.
    """
    with open_checkpoint(arguments) as folder:
        return load_from(folder, cls, arguments, device)


def open_checkpoint(arguments: Arguments) -> ModelFolder:
    """The checkpoint's folder, to be loaded from."""
    return ModelFolder.open(
        arguments.checkpoint, revision=arguments.revision, weights=True, verify=arguments.verify
    )


def load_from(
    folder: ModelFolder,
    cls: type[Model],
    arguments: Arguments,
    device: torch.device | None = None,
) -> tuple[Model, GPTJTokenizer]:
    """As `load`, from a checkpoint that is open already."""
    config, tokenizer = _config_and_tokenizer(cls, folder, arguments)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = best_dtype(device) if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    model = cls.from_folder(folder, config=config, dtype=dtype, device=device)
    merge_lora(model)  # an adapter's, where the address is one's
    return model, tokenizer


def _config_and_tokenizer(
    cls: type[GPTJPreTrainedModel], folder: ModelFolder, arguments: Arguments
) -> tuple[GPTJConfig, GPTJTokenizer]:
    config = GPTJConfig.from_folder(folder)
    found = config.architectures or [cls.__name__]
    if cls.__name__ not in found and cls is not GPTJModel:  # which is a part of all others
        raise ValueError(
            f"{arguments.checkpoint} is a {found[0]}, and this deployment serves a {cls.__name__}"
        )
    if hasattr(config, CONFIG_FIELD):
        check_config_fields(getattr(config, CONFIG_FIELD), arguments.checkpoint)
        if cls is not GPTJForCausalLM:
            raise ValueError(
                f"{arguments.checkpoint} has 4-bit weights, with which only generation computes; "
                f"remedy: the model that they were made from"
            )
    tokenizer = GPTJTokenizer.from_folder(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{arguments.checkpoint}: the tokenizer has {len(tokenizer)} entries, and the model's "
            f"vocab_size is {config.vocab_size}"
        )
    return config, tokenizer


def best_dtype(device: torch.device) -> torch.dtype:
    """What `dtype: auto` means: see Arguments."""
    if device.type == "cuda":
        return torch.float16
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def name_of(address: str) -> str:
    """A model's name by its address: a hub id itself, the run of `s3://bucket/run/model`."""
    if "://" not in address and address.count("/") == 1 and not address.startswith((".", "/")):
        return address
    parts = [part for part in posixpath.normpath(address).split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
