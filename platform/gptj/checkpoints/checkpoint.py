"""A model folder: a model, its tokenizer and how it came to be; saved, loaded and verified.

`config.json`, `model.safetensors` or shards with an index, the tokenizer's files, `training.json`
and, written last, `manifest.json` (see gptj.checkpoints.manifest). Hugging Face's `from_pretrained`
reads the same folder, and folders from Hugging Face load here.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gptj import storage
from gptj.checkpoints.cache import CheckpointCache, Lease
from gptj.checkpoints.hub import locate
from gptj.checkpoints.manifest import (
    CheckpointError,
    FolderWriter,
    Manifest,
    read_verified,
    verify,
)
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import (
    SHARD_BYTES,
    TensorSpec,
    one_dtype,
    read_weights,
    weight_files,
    write_weights,
)
from gptj.config import GPTJConfig, parse_dtype
from gptj.devices import check_device
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJPreTrainedModel,
)
from gptj.serialization.json_object import parse_object, to_json
from gptj.storage.addresses import normalized
from gptj.tokenizer import GPTJTokenizer

__all__ = [
    "CheckpointError",
    "check_complete",
    "load_config",
    "load_model",
    "save_folder",
    "save_model",
    "training_data",
    "verify",
]

logger = logging.getLogger(__name__)

CONFIG = "config.json"
TRAINING = "training.json"
SAFETENSORS_PATTERNS = ("*.json", "*.safetensors")
PICKLE_PATTERNS = ("*.json", "pytorch_model*.bin")

# Buffers of old checkpoints, which hold no knowledge: the causal mask and its value.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")
# What the heads add to the base model; another head's may be left out, and one's own made new.
HEADS = ("lm_head.", "score.", "qa_outputs.")

UNTIED = (
    "%s has an lm_head.weight that differs from its embedding, though its configuration says "
    "tie_word_embeddings: it is kept, and the two are not tied"
)

Model = TypeVar("Model", bound=GPTJPreTrainedModel)


def save_model(
    model: GPTJPreTrainedModel,
    address: str | os.PathLike[str],
    *,
    tokenizer: GPTJTokenizer | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; it is complete, or it is not there.

    Args:
        address: a new folder, local or `s3://`.
        training: how the model came to be, for `training.json`.

    Raises:
        AlreadyExistsError: if there is a finished checkpoint at the address.
    """
    state = _without_shared(model)
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    save_folder(
        address,
        config_of(model),
        specs,
        state.values(),
        tokenizer=tokenizer,
        training=training,
    )


def save_folder(
    address: str | os.PathLike[str],
    config: GPTJConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    *,
    tokenizer: GPTJTokenizer | None = None,
    training: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """As save_model, with tensors that come one at a time in the order of `specs`.

    So a model that is spread over many processes is written without being gathered. `fence` is
    FolderWriter's.
    """
    with FolderWriter(address, fence=fence) as writer:
        write_weights(writer, specs, tensors, shard_bytes)
        write_small_files(writer, config, tokenizer, training)


def write_small_files(
    writer: FolderWriter,
    config: GPTJConfig,
    tokenizer: GPTJTokenizer | None,
    training: Mapping[str, Any] | None,
) -> None:
    """What a folder has beside its weights, to be written after them.

    Without a configuration nothing takes an unfinished folder for a model.
    """
    for name, content in (tokenizer.files() if tokenizer is not None else {}).items():
        writer.write(name, content)
    if training is not None:
        writer.write(TRAINING, (to_json(training, indent=2) + "\n").encode())
    writer.write(CONFIG, config.to_json().encode())


def config_of(model: GPTJPreTrainedModel) -> GPTJConfig:
    """The configuration as a folder stores it: with the model's class and dtype."""
    config = GPTJConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if isinstance(model, GPTJForQuestionAnswering):
        config.num_labels = 2  # start and end: Hugging Face makes as many outputs as labels
    return config


def load_config(
    address: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any
) -> GPTJConfig:
    """The configuration of a folder, an `s3://` address or a hub id.

    Raises:
        FileNotFoundError: if there is no config.json.
        CheckpointError: if it is damaged, or another model's.
    """
    folder = locate(address, revision=revision, patterns=(CONFIG, "manifest.json"))
    return _read_config(folder, Manifest.read(folder), overrides)


def check_complete(address: str, *, revision: str | None = None) -> None:
    """Check that all files are there in their full size, without reading the weights.

    Of a folder without a manifest only the names are known, of a hub id nothing.

    Raises:
        FileNotFoundError: if there is no folder.
        CheckpointError: if a file is missing or cut off.
    """
    folder = locate(address, revision=revision, patterns=(CONFIG, "manifest.json"))
    if folder != address.rstrip("/"):  # from the hub, and only these files of it are here
        return
    manifest = Manifest.read(folder)
    if manifest is not None:
        manifest.check_sizes()
    weight_files(folder, {file.name for file in storage.list_files(folder)}, manifest)


def training_data(content: bytes, address: str) -> dict[str, Any]:
    """How a training read its data, by its `training.json`; empty if that does not say.

    Raises CheckpointError if the file is damaged.
    """
    fields: Any = parse_object(content, address)
    for name in ("settings", "data"):
        fields = fields.get(name, {})
        if not isinstance(fields, dict):
            raise CheckpointError(f"{address} is damaged: its {name} must be an object")
    return cast(dict[str, Any], fields)


def load_model(
    cls: type[Model],
    address: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    config: GPTJConfig | None = None,
    verify: bool = True,
    **overrides: Any,
) -> Model:
    """What `from_pretrained` does; see there for the arguments.

    A head that the checkpoint lacks is made new, another head's weights are left out; weights
    that are stored in several dtypes become one (the configuration's, if it is among them, or that
    of most), and a stored lm_head that differs from the embedding is kept, whatever the
    configuration says of ties. The log says so.

    Raises:
        FileNotFoundError: if there is no model at the address.
        CheckpointError: naming what is missing, cut off, altered or of another shape.
        UnsupportedDeviceError: if PyTorch has no code for the GPU.
    """
    address = normalized(address)
    check_device(device)
    folder = locate(address, revision=revision, patterns=SAFETENSORS_PATTERNS)
    from_hub = folder != address
    if from_hub and not any(f.name.endswith(".safetensors") for f in storage.list_files(folder)):
        folder = locate(address, revision=revision, patterns=PICKLE_PATTERNS)
    manifest = Manifest.read(folder)
    lease = _lease(folder, manifest, verify)
    try:
        if lease is not None and manifest is not None:
            folder, verify = lease.folder, False  # the cache has done it
            manifest = Manifest(folder, manifest.files)
        elif manifest is not None and not from_hub:  # of a hub id only what is needed is here
            manifest.check_sizes()
        if config is None:
            config = _read_config(folder, manifest, overrides)
        elif overrides:
            config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
        target = None if dtype == "auto" else parse_dtype(dtype)
        tensors = read_weights(folder, manifest, verify=verify)
        model, in_use = _assembled(cls, config, folder, tensors, target, torch.device(device))
    except BaseException:
        if lease is not None:
            lease.close()
        raise
    if lease is not None:
        if in_use:  # its files are the model's memory: they stay as long as it does
            weakref.finalize(model, lease.close)
        else:
            lease.close()
    return model.eval()


def _lease(folder: str, manifest: Manifest | None, verify: bool) -> Lease | None:
    """A copy in this node's cache, if there is a cache, for a finished folder of S3."""
    cache = CheckpointCache.from_environment()
    if cache is None or manifest is None or not storage.is_s3(folder):
        return None
    return cache.lease(folder, manifest, verify=verify)


def _assembled(
    cls: type[Model],
    config: GPTJConfig,
    folder: str,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[Model, bool]:
    """The model of these tensors, and whether it uses their memory and not only copies."""
    try:
        with without_weights():  # no memory, and no time for weights that are replaced at once
            model = cls(config)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}/{CONFIG}: no model can be made of this configuration: {error}"
        ) from error
    expected = dict(model.named_parameters(remove_duplicate=False))
    loaded: set[str] = set()
    in_use = False
    for stored_name, stored in tensors:
        name = _own_name(stored_name, expected)
        if name is None:
            _check_expendable(stored_name, folder)
            continue
        if stored.shape != expected[name].shape:
            raise CheckpointError(
                f"{stored_name} of {folder} has the shape {tuple(stored.shape)}; a "
                f"{cls.__name__} of this configuration has {tuple(expected[name].shape)}"
            )
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{stored_name} of {folder} has the dtype {stored.dtype}, which is no weight's"
            )
        weight = stored.to(device=device, dtype=dtype or stored.dtype)
        in_use |= weight is stored
        _assign(model, name, weight)
        loaded.add(name)
        del stored, weight  # before the next one is read
    if dtype is None:
        _unite_dtypes(model, loaded, folder)
    if isinstance(model, GPTJForCausalLM) and config.tie_word_embeddings:
        _tie(model, loaded, folder)
    _make_missing(model, set(expected) - loaded, folder, device)
    return model, in_use


def _read_config(
    folder: str, manifest: Manifest | None, overrides: Mapping[str, Any]
) -> GPTJConfig:
    try:
        content = read_verified(folder, CONFIG, manifest)
    except storage.NotFoundError as error:
        storage.list_files(folder)  # raises, if it is the bucket that is missing
        raise storage.NotFoundError(
            f"{folder} is no model folder: it has no {CONFIG} (or the writing of it was cut short)"
        ) from error
    fields = parse_object(content, storage.join(folder, CONFIG))
    if "num_labels" in overrides or "id2label" in overrides or "label2id" in overrides:
        fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
    try:
        return GPTJConfig.from_dict({**fields, **overrides})
    except ValueError as error:
        raise CheckpointError(f"{folder}/{CONFIG}: {error}") from error


def _own_name(stored: str, expected: Mapping[str, Tensor]) -> str | None:
    """The parameter that a stored tensor is for: base models have no prefix, heads do."""
    prefix = GPTJPreTrainedModel.base_model_prefix + "."
    for name in (stored, prefix + stored, stored.removeprefix(prefix)):
        if name in expected:
            return name
    return None


def _check_expendable(name: str, folder: str) -> None:
    if not name.endswith(OLD_BUFFERS) and not name.startswith(HEADS):
        raise CheckpointError(
            f"{folder} has weights that no GPT-J of this configuration has: {name}"
        )


def _assign(model: GPTJPreTrainedModel, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(tensor))


def _unite_dtypes(model: GPTJPreTrainedModel, loaded: set[str], folder: str) -> None:
    """Convert what has another dtype than the others; what has not stays as it is."""
    numbers: Counter[torch.dtype] = Counter()
    for name in loaded:
        weight = model.get_parameter(name)
        numbers[weight.dtype] += weight.numel()
    if len(numbers) < 2:
        return
    target = one_dtype(numbers, model.config.dtype)
    logger.warning(
        "%s has weights in %s: all become %s", folder, ", ".join(sorted(map(str, numbers))), target
    )
    for name in loaded:
        weight = model.get_parameter(name)
        if weight.dtype == target:
            continue
        converted = weight.detach().to(target)
        if bool((converted.isinf() & weight.isfinite()).any()):
            raise CheckpointError(
                f"{name} of {folder} has values that are too large for {target}, the dtype of its "
                f"other weights; remedy: dtype=float32"
            )
        _assign(model, name, converted)


def _tie(model: GPTJForCausalLM, loaded: set[str], folder: str) -> None:
    """One matrix for embedding and head, unless two different ones are stored."""
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    if head in loaded and embedding not in loaded:
        _assign(model, embedding, model.lm_head.weight.detach())
        loaded.add(embedding)
    if head in loaded and not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
        logger.warning(UNTIED, folder)
        config = GPTJConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
        model.config = model.transformer.config = config
        return
    model.tie_weights()
    loaded.add(head)


def _make_missing(
    model: GPTJPreTrainedModel, missing: set[str], folder: str, device: torch.device
) -> None:
    if not missing:
        return
    if lacking := sorted(name for name in missing if not name.startswith(HEADS)):
        more = f" and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise CheckpointError(f"{folder} is incomplete: {', '.join(lacking[:20])}{more} missing")
    logger.warning(
        "%s has no %s: new weights, to be trained before use", folder, ", ".join(sorted(missing))
    )
    for name in missing:
        shape = model.get_parameter(name).shape
        new = torch.zeros(shape, device=device, dtype=model.dtype)
        if not name.endswith("bias"):
            new.normal_(std=model.config.initializer_range)
        _assign(model, name, new)


def _without_shared(model: GPTJPreTrainedModel) -> dict[str, Tensor]:
    """The state dict without a second name of one tensor (lm_head.weight, if it is tied)."""
    names = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


HEAD_CLASSES: dict[str, type[GPTJPreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        GPTJModel,
        GPTJForCausalLM,
        GPTJForSequenceClassification,
        GPTJForQuestionAnswering,
    )
}
