"""Shared by the deployments: their arguments, and loading a checkpoint on the right device."""

from __future__ import annotations

import gc
import os
import posixpath
import tempfile
import warnings
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gptj import GPTJConfig, GPTJForCausalLM, GPTJModel, GPTJTokenizer
from gptj.adapters.base import check_base
from gptj.adapters.lora import merge_lora
from gptj.checkpoints.folder import ModelFolder
from gptj.config import parse_dtype
from gptj.engine.backends import IntQuantization
from gptj.engine.cache_size import free_bytes
from gptj.engine.memory import weight_bytes
from gptj.environment.devices import cpu_computes_bf16
from gptj.layers.int4 import CONFIG_FIELD, check_config_fields, is_quantized
from gptj.pretrained import GPTJPreTrainedModel
from gptj.serving.app import HTTPOptions
from gptj.serving.batched_rows import Batching
from gptj.serving.middleware.cors import check_origin
from gptj.serving.middleware.limits import LARGEST_BODY_BYTES, MAX_BODY_BYTES
from gptj.storage.addresses import normalized
from gptj.storage.file_lock import turn

Model = TypeVar("Model", bound=GPTJPreTrainedModel)

PACKED_BITS = {"int8": 8, "int4": 4}
RENAMED = {  # deprecated keys of `args`, by their current names
    "max_waiting": "max_queued",
    "max_running": "max_num_seqs",
    "step_tokens": "max_num_batched_tokens",
}


class Arguments(BaseModel):
    """`args` of an application in serve.yaml; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # A folder, an s3:// address or a hub id of a model, or of an adapter, which is merged into its
    # base in memory.
    checkpoint: Annotated[str, AfterValidator(normalized)]
    revision: str | None = None  # of a hub id
    # auto: float16 on a GPU; on a CPU bfloat16 with native support (AMX, AVX512-BF16), else
    # float32, since emulated bfloat16 is slower.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    verify: bool = True  # compare each file's SHA-256 with the checkpoint's manifest
    # Replicas that load concurrently on one node; the others wait, and then find the files in the
    # page cache. This bounds the memory that replicas need only while loading.
    loads_at_once: Annotated[int, Field(ge=1)] = 1
    max_queued: Annotated[int, Field(ge=1)] = 256  # waiting rows; beyond it clients get 429
    # Longest that a row may be expected to wait, by the recent pace; beyond it clients get 429.
    max_queue_seconds: Annotated[float, Field(gt=0)] | None = None
    # A replica that makes no step for so long while there is work is replaced.
    stalled_seconds: Annotated[float, Field(gt=0)] = 120

    # Allowed CORS origins, such as https://chat.example.org; * for all.
    cors_origins: tuple[Annotated[str, AfterValidator(check_origin)], ...] = ()
    unknown_fields: Literal["refuse", "ignore"] = "refuse"  # in bodies; ignored ones are logged

    # Per request body; tokenizing takes a hundred times a text's memory.
    max_body_bytes: Annotated[int, Field(ge=1, le=LARGEST_BODY_BYTES)] = MAX_BODY_BYTES

    def http_options(self) -> HTTPOptions:
        return HTTPOptions(self.cors_origins, self.unknown_fields == "ignore", self.max_body_bytes)

    def check_others(self, config: GPTJConfig, tokenizer: GPTJTokenizer) -> None:
        """Check an application's further inputs. Raises ValueError, FileNotFoundError."""

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Check an application's requirements of where it computes. Raises UnsupportedError.

        Args:
            dtype: of the weights.
        """

    @property
    def packed_bits(self) -> int | None:
        """Bits of a weight once it is packed for the CPU; None: it is not."""
        return PACKED_BITS.get(getattr(self, "quantization", "none"))  # an application's own

    def check_tokenizer(self, tokenizer: GPTJTokenizer) -> None:
        """Check an application's further requirements of the tokenizer. Raises ValueError."""

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed(cls, fields: Any) -> Any:
        """Accept deprecated keys of this application's fields, with a warning."""
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        for old, new in RENAMED.items():
            if old not in fields or new not in cls.model_fields:
                continue
            if new in fields:
                raise ValueError(f"{old} is the former name of {new}: remove {old}")
            # Python shows users a FutureWarning, but not a DeprecationWarning.
            warnings.warn(f"args: {old} is deprecated: use {new}", FutureWarning, stacklevel=2)
            fields[new] = fields.pop(old)
        return fields


class BatchArguments(Arguments):
    """`args` of a service that computes batches of whole rows."""

    max_batch: Annotated[int, Field(ge=1)] = 16  # rows per batch
    # Tokens per batch; a longer row is a batch of its own. Default: 256 on a CPU; on a GPU what
    # max_batch rows can have.
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    # int8, int4: weights in 8 or 4 bits, faster and smaller on a CPU.
    quantization: IntQuantization = "none"

    def batching(self) -> Batching:
        return Batching(
            self.max_batch,
            self.max_queued,
            self.max_num_batched_tokens,
            self.quantization,
            release=True,  # one copy of the weights
            max_queue_seconds=self.max_queue_seconds,
        )


def loading_turn(arguments: Arguments) -> AbstractContextManager[None]:
    """Hold one of the node's loading slots during the block; waits until one is free.

    A killed replica frees its slot at once.
    """
    places = Path(tempfile.gettempdir()) / f"gptj-loading-{os.getuid()}"
    return turn(places, arguments.loads_at_once)


def freeze_loaded() -> None:
    """Exempt all that a replica has loaded from garbage collection, for as long as it runs.

    A collection of the oldest generation would go through all of it, and a large body's objects
    start several of them, which stop every stream for half a second.
    """
    gc.collect()
    gc.freeze()


def check(cls: type[GPTJPreTrainedModel], arguments: Arguments) -> None:
    """Check a checkpoint as far as possible without reading its weights.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if files are missing, truncated or damaged.
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
    """The model, ready to compute, and its tokenizer.

    Raises what `check` and `Arguments.check_device` do, and ValueError if the weights are larger
    than the device's free memory.

    Args:
        device: None: a GPU, if this process sees one.
    """
    with open_checkpoint(arguments, cls, device) as folder:
        return load_from(folder, cls, arguments, device)


def open_checkpoint(
    arguments: Arguments, cls: type[GPTJPreTrainedModel], device: torch.device | None = None
) -> ModelFolder:
    """Open the checkpoint's folder for loading, unless the device cannot take it.

    Raises what `load` does.
    """
    device, dtype = _device_and_dtype(arguments, device)
    arguments.check_device(device, dtype)
    return ModelFolder.open(
        arguments.checkpoint,
        revision=arguments.revision,
        weights=True,
        verify=arguments.verify,
        before_weights=partial(_check_room, cls, arguments, device, dtype),
    )


def load_from(
    folder: ModelFolder,
    cls: type[Model],
    arguments: Arguments,
    device: torch.device | None = None,
) -> tuple[Model, GPTJTokenizer]:
    """As `load`, from a checkpoint that `open_checkpoint` has opened."""
    config, tokenizer = _config_and_tokenizer(cls, folder, arguments)
    device, dtype = _device_and_dtype(arguments, device)
    model = cls.from_folder(folder, config=config, dtype=dtype, device=device)
    model.check_trained(arguments.checkpoint)
    merge_lora(model)  # the adapter's, if the address is one
    return model, tokenizer


def _check_room(
    cls: type[GPTJPreTrainedModel],
    arguments: Arguments,
    device: torch.device,
    dtype: torch.dtype,
    folder: ModelFolder,
) -> None:
    """Otherwise the system would kill the process, or another one, after minutes of loading."""
    config = GPTJConfig.from_folder(folder)
    needed, free = weight_bytes(cls, config, dtype), free_bytes(device)
    bits = arguments.packed_bits
    if bits is not None and device.type == "cpu" and config.dtype == dtype != torch.float32:
        needed = needed * bits // 16  # weights stored in this dtype are mapped, not copied
    if needed <= free:
        return
    name = str(dtype).removeprefix("torch.")
    where = "the GPU" if device.type == "cuda" else "this machine, or its container,"
    remedies = ["a device with more memory", "a smaller model"]
    if dtype == torch.float32:
        remedies.insert(0, "dtype: bfloat16")
    if cls is GPTJForCausalLM and not is_quantized(config):
        remedies.insert(0, "a folder made by jobs/quantize.py, in 4 bits")
    raise ValueError(
        f"{arguments.checkpoint} does not fit: its weights take {needed / 1e9:.1f} GB in {name}, "
        f"and {where} has {free / 1e9:.1f} GB free (replicas of the version that it replaces run "
        f"until it is ready); remedy: {', or '.join(remedies)}"
    )


def _device_and_dtype(
    arguments: Arguments, device: torch.device | None
) -> tuple[torch.device, torch.dtype]:
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = parse_dtype(None if arguments.dtype == "auto" else arguments.dtype)
    return device, dtype or best_dtype(device)


def _config_and_tokenizer(
    cls: type[GPTJPreTrainedModel], folder: ModelFolder, arguments: Arguments
) -> tuple[GPTJConfig, GPTJTokenizer]:
    config = cls.config_of(folder)
    found = config.architectures or [cls.__name__]
    if cls.__name__ not in found and cls is not GPTJModel:  # which every head includes
        raise ValueError(
            f"{arguments.checkpoint} is a {found[0]}, and this deployment serves a {cls.__name__}"
        )
    if is_quantized(config):
        check_config_fields(getattr(config, CONFIG_FIELD), arguments.checkpoint)
        if cls is not GPTJForCausalLM:
            raise ValueError(
                f"{arguments.checkpoint} has 4-bit weights, with which only generation computes; "
                f"remedy: the model that they were made from"
            )
    tokenizer = GPTJTokenizer.from_folder(folder)
    tokenizer.check_rows(config.vocab_size, arguments.checkpoint)
    return config, tokenizer


def best_dtype(device: torch.device) -> torch.dtype:
    """The dtype of `dtype: auto`: see Arguments."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_computes_bf16() else torch.float32


def name_of(address: str) -> str:
    """A model's name from its address: a hub id itself, the run of `s3://bucket/run/model`."""
    if "://" not in address and address.count("/") == 1 and not address.startswith((".", "/")):
        return address
    parts = [part for part in posixpath.normpath(address).split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
