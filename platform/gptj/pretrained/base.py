"""Base class of the model and its heads: from_pretrained, save_pretrained, resizing."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from gptj.adapters.base import Base, digest_of
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import adapter_parameters
from gptj.adapters.quantization import QuantizedLinear
from gptj.adapters.stored import put_adapter, read_adapter
from gptj.checkpoints.folder import ADAPTER_FILES, CONFIG, ModelFolder
from gptj.checkpoints.hub import upload
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SHARD_BYTES, TensorSpec
from gptj.config import GPTJConfig, check_overrides, is_field, parse_dtype
from gptj.environment.devices import check_device
from gptj.errors import CheckpointError
from gptj.layers import int4
from gptj.pretrained.resizing import resized, resized_bias
from gptj.pretrained.saving import save_adapter_folder, save_folder
from gptj.pretrained.weight_loading import load_weights
from gptj.storage.addresses import normalized
from gptj.storage.scratch import scratch_folder
from gptj.tokenizer import GPTJTokenizer

Model = TypeVar("Model", bound="GPTJPreTrainedModel")


class GPTJPreTrainedModel(nn.Module):
    """Base class of GPTJModel and its heads, which are in gptj.model."""

    config_class = GPTJConfig
    base_model_prefix = "transformer"
    gradient_checkpointing: bool | Literal["selective"] = False
    # Of a loaded model, the head's weights that its checkpoint does not have: they are random.
    new_parameters: frozenset[str] = frozenset()
    # Names of parameters that may be tied, and of those they are tied to.
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter: LoRAConfig | None = None  # unmerged adapter: see gptj.adapters.lora

    @classmethod
    def from_pretrained(
        cls: type[Model],
        address: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        config: GPTJConfig | None = None,
        verify: bool = True,
        base: str | os.PathLike[str] | None = None,
        low_cpu_mem_usage: bool | None = None,
        attn_implementation: Literal["sdpa"] | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Model:
        """Load a model folder, an `s3://` address or a hub id such as `EleutherAI/gpt-j-6B`.

        From an adapter's address, loads its base model with the adapter, which
        gptj.adapters.lora.merge_lora can merge.

        Weights are loaded straight into `dtype` on `device`, without a second copy of the model,
        and the model is in evaluation mode. 4-bit weights stay in 4 bits, and PyTorch dequantizes a
        layer for each product: see gptj.layers.int4. Logs when a head missing from the checkpoint
        is newly initialised, when mixed dtypes are unified (to the configuration's, if among them,
        else the majority's), and when a stored lm_head that differs from the embedding is kept
        although the configuration ties them. Another head's weights are skipped.

        Args:
            dtype: of the weights; None or "auto" keeps the checkpoint's. `torch_dtype` is the
                older name.
            device: of the weights; default: the CPU.
            device_map: Hugging Face's equivalent, for one device: a device, "auto" (a GPU, if there
                is one) or {"": device}.
            revision: a branch, tag or commit of a hub id.
            config: replaces the folder's `config.json`.
            verify: check each file's SHA-256 against the folder's manifest, if it has one. This
                takes one core per 1.5 GB/s, which matters only for files in the page cache.
            base: an adapter's base model; None: where it was during training, and for a hub id,
                at the commit that it was trained on.
            low_cpu_mem_usage, attn_implementation: accepted for compatibility with Hugging Face:
                memory is always saved, and attention is always PyTorch's ("sdpa").
            token, cache_dir, local_files_only, force_download: for a hub id, passed to
                huggingface_hub.
            overrides: fields of the configuration to replace, such as `num_labels`.

        Raises:
            TypeError: for an unknown argument.
            FileNotFoundError: if there is no model at the address, or no base model.
            CheckpointError: naming what is missing, truncated, altered or of the wrong shape, or
                if the base is not the model that the adapter was trained on.
            UnsupportedDeviceError: if PyTorch does not support the GPU.
        """
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation must be 'sdpa' or left out, got {attn_implementation!r}"
            )
        target = _one_device(device, device_map)
        check_device(target)
        hub = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        if any(not is_field(name) for name in overrides):  # before gigabytes are downloaded
            needed = (CONFIG, *ADAPTER_FILES)
            with ModelFolder.open(address, revision=revision, files=needed, hub=hub) as small:
                if config is not None or small.is_adapter:
                    check_overrides(overrides, vars(config) if config is not None else ())
                else:
                    check_overrides(overrides, small.read_config())
        with ModelFolder.open(
            address, revision=revision, weights=True, verify=verify, hub=hub
        ) as folder:
            return cls.from_folder(
                folder,
                dtype=torch_dtype if dtype is None else dtype,
                device=target,
                config=config,
                base=base,
                **overrides,
            )

    @classmethod
    def from_folder(
        cls: type[Model],
        folder: ModelFolder,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        config: GPTJConfig | None = None,
        base: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> Model:
        """The model of a folder opened with `weights=True`; see `from_pretrained`."""
        check_device(device)
        if folder.is_adapter:
            return cls._with_adapter(folder, base, config, dtype, device, overrides)
        if config is None:
            config = cls.config_of(folder, **overrides)
        elif overrides:
            check_overrides(overrides, vars(config))
            config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
        return cls._from_weights(folder, config, dtype, device)

    @classmethod
    def config_of(cls, folder: ModelFolder, **overrides: Any) -> GPTJConfig:
        """A folder's configuration, for this class."""
        return GPTJConfig.from_folder(folder, **overrides)

    @classmethod
    def _with_adapter(
        cls: type[Model],
        folder: ModelFolder,
        given_base: str | os.PathLike[str] | None,
        config: GPTJConfig | None,
        dtype: torch.dtype | str | None,
        device: torch.device | str,
        overrides: Mapping[str, Any],
    ) -> Model:
        adapter = read_adapter(folder)
        trained_on = adapter.known_base
        if given_base is None:
            place = Base.of(folder)
        else:
            place = Base.named(trained_on, normalized(given_base))
        with place.open(adapter.address, weights=True, verify=folder.verify) as opened:
            if opened.read_config().get(int4.CONFIG_FIELD) is not None:
                raise CheckpointError(
                    f"{place.address}, the base model of the adapter {adapter.address}, has 4-bit "
                    f"weights, to which nothing can be added; remedy: merge the adapter into the "
                    f"model that they were made from (jobs/merge_adapter.py), and quantize that"
                )
            if trained_on is not None:
                found = Base(place.address, place.revision, digest_of(opened), opened.commit)
                trained_on.check(adapter.address, found)
            if config is None:
                config = GPTJConfig.adapted_from_folder(folder, opened, **overrides)
            elif overrides:
                check_overrides(overrides, vars(config))
                config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
            if cls.can_generate() and "eos_token_id" not in overrides:
                config.add_end_tokens(opened)
            following = adapter.config.modules_to_save or ()
            model = cls._from_weights(opened, config, dtype, device, following=following)
        put_adapter(model, adapter)
        return model.eval()

    @classmethod
    def _from_weights(
        cls: type[Model],
        folder: ModelFolder,
        config: GPTJConfig,
        dtype: torch.dtype | str | None,
        device: torch.device | str,
        *,
        following: Container[str] = (),
    ) -> Model:
        quantization = getattr(config, int4.CONFIG_FIELD, None)
        if quantization is not None:
            int4.check_config_fields(quantization, folder.address)
        try:
            with without_weights():  # they are about to be replaced
                model = cls(config)
                if quantization is not None:
                    int4.quantize_blocks(model.base_model.get_submodule("h"))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{folder.address}/{CONFIG}: cannot build a model with this configuration: {error}"
            ) from error
        loaded = load_weights(
            model,
            folder.read_weights(),
            folder.address,
            dtype=None if dtype == "auto" else parse_dtype(dtype),
            stored_dtype=config.dtype,
            device=torch.device(device),
            initializer_range=config.initializer_range,
            tied=cls._tied_weights_keys if config.tie_word_embeddings else {},
            following=following,
        )
        model.new_parameters = loaded.new
        if not loaded.ties_hold:
            untied = GPTJConfig.from_dict({**config.to_dict(), "tie_word_embeddings": False})
            model.config = model.base_model.config = untied
        if loaded.in_use:  # the model maps the files
            folder.lease_for(model)
        return model.eval()

    def save_pretrained(
        self,
        address: str | os.PathLike[str],
        *,
        tokenizer: GPTJTokenizer | None = None,
        training: Mapping[str, Any] | None = None,
        max_shard_size: int = SHARD_BYTES,
    ) -> None:
        """Write, atomically, a model folder that we and Hugging Face can load.

        Args:
            address: a new folder, local or `s3://`.
            tokenizer: saved with the model.
            training: how the model was trained, for `training.json`.
            max_shard_size: most bytes of weights in one file.

        Raises:
            AlreadyExistsError: if there is a finished checkpoint at the address.
            ValueError: if the model has an unmerged adapter.
        """
        if self.adapter is not None:
            raise ValueError(
                "the model has an unmerged adapter; remedy: merge it first "
                "(gptj.adapters.lora.merge_lora), or save only the adapter (save_adapter)"
            )
        # Without the second name of a tied tensor (lm_head.weight).
        names = {name for name, _ in self.named_parameters()}
        state: dict[str, Tensor] = {n: t for n, t in self.state_dict().items() if n in names}
        specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]
        save_folder(
            address,
            self.config_to_save(),
            specs,
            state.values(),
            tokenizer=tokenizer,
            training=training,
            shard_bytes=max_shard_size,
        )

    def save_adapter(
        self,
        address: str | os.PathLike[str],
        *,
        base: Base,
        tokenizer: GPTJTokenizer | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Write, atomically, a folder with the model's adapter that PEFT can load.

        Raises:
            ValueError: if the model has no adapter.
            AlreadyExistsError: if there is a finished checkpoint at the address.
        """
        if self.adapter is None:
            raise ValueError("the model has no adapter; remedy: save_pretrained")
        parameters = adapter_parameters(self)
        save_adapter_folder(
            address,
            self.config_to_save(),
            self.adapter,
            [TensorSpec(name, tuple(p.shape), p.dtype) for name, p in parameters.items()],
            parameters.values(),
            base=base,
            tokenizer=tokenizer,
            training=training,
        )

    def config_to_save(self) -> GPTJConfig:
        """The configuration to store in a folder, with the model's class and dtype."""
        config = GPTJConfig.from_dict(self.config.to_dict())
        config.architectures = [type(self).__name__]
        config.dtype = self.dtype
        return config

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> GPTJPreTrainedModel:
        """The model without its head; itself, if it has none."""
        return cast(GPTJPreTrainedModel, getattr(self, self.base_model_prefix, self))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head with a row for each token, if the model has one."""
        return None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the embedding and, if there is one, the next-token head.

        Existing rows are kept, and a tied head stays tied. Rows without a tokenizer entry, as the
        published model has, can be used for new tokens: a model needs no resizing until
        `tokenizer.rows_needed` exceeds `config.vocab_size`.

        Args:
            new_num_tokens: new number of rows; None: unchanged.
            pad_to_multiple_of: round up, for GPU-friendly shapes.
            mean_resizing: draw new rows around the mean of the old ones, with a billionth of their
                covariance, so that new tokens are about as likely as the average one (Hewitt, 2021,
                https://nlp.stanford.edu/~johnhew/vocab-expansion.html); if False, from
                normal(0, initializer_range).

        Returns:
            The embedding.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        rows = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if rows < 1 or (pad_to_multiple_of is not None and pad_to_multiple_of < 1):
            raise ValueError(
                f"new_num_tokens and pad_to_multiple_of must be 1 or more, got {new_num_tokens} "
                f"and {pad_to_multiple_of}"
            )
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows == embedding.num_embeddings:
            return embedding
        std = None if mean_resizing else self.config.initializer_range
        tied = head is not None and head.weight is embedding.weight
        embedding.weight = resized(embedding.weight, rows, std)
        embedding.num_embeddings = rows
        if head is not None:
            head.weight = embedding.weight if tied else resized(head.weight, rows, std)
            if head.bias is not None:
                head.bias = resized_bias(head.bias, rows, mean_resizing)
            head.out_features = rows
        for each in (self, self.base_model):
            each.config.vocab_size = rows
        return embedding

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: GPTJTokenizer | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        max_shard_size: int = SHARD_BYTES,
    ) -> str:
        """Upload the model's folder to the Hugging Face hub; returns the commit's URL.

        Args:
            repo_id: owner/name; created if it does not exist.
            tokenizer: uploaded with the model.
            private: whether to make a new repository private; None: the account's default.
            token: default: HF_TOKEN, or the one of `hf auth login`.
            revision: the branch; default: main.
            max_shard_size: most bytes of weights in one file.

        Raises:
            ConnectionError: if the hub cannot be reached.
            huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
        """
        with scratch_folder() as scratch:
            folder = scratch / "model"
            self.save_pretrained(folder, tokenizer=tokenizer, max_shard_size=max_shard_size)
            return upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )

    def tie_weights(self) -> None:
        """Tie the tensors named by the configuration; none in the base model."""

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Quantized weights, which are frozen, count as the weights that they stand for."""
        layers = [m for m in self.modules() if isinstance(m, int4.Int4Linear | QuantizedLinear)]
        # Without LoRA's, which are in submodules.
        stored = {
            p for layer in layers for p in layer.parameters(recurse=False) if p is not layer.bias
        }
        numbers = [p for p in self.parameters() if p not in stored]
        count = sum(p.numel() for p in numbers if p.requires_grad or not only_trainable)
        if only_trainable:
            return count
        return count + sum(layer.in_features * layer.out_features for layer in layers)

    def check_trained(self, address: str) -> None:
        """CheckpointError if a head's weights are random, since `address` does not have them."""
        if self.new_parameters:
            raise CheckpointError(
                f"{address} has no {', '.join(sorted(self.new_parameters))}, and a "
                f"{type(self).__name__} with random weights there would give random outputs; "
                f"remedy: train the head first (jobs/finetune.py), or give a checkpoint that has it"
            )

    def gradient_checkpointing_enable(self, *, selective: bool = False) -> None:
        """Keep only each block's input for the backward pass and recompute the rest.

        Args:
            selective: keep the outputs of products and attention as well.
        """
        self.base_model.gradient_checkpointing = "selective" if selective else True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    def initialize(self) -> None:
        """New weights: normal(0, initializer_range), biases 0, norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _one_device(device: torch.device | str | None, device_map: Any) -> torch.device:
    """The device. ValueError for a map of several devices, or for both arguments."""
    if device_map is None:
        return torch.device("cpu" if device is None else device)
    if device is not None:
        raise ValueError(f"got both device={device!r} and device_map={device_map!r}: leave one out")
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, int | str | torch.device) and device_map not in _SEVERAL_DEVICES:
        return torch.device(device_map)
    raise ValueError(f"device_map={device_map!r} is for several devices; remedy: device='cuda'")


_SEVERAL_DEVICES = ("balanced", "balanced_low_0", "sequential")
