"""What the base model and its heads share: settings, loading, saving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from gptj.adapters.base import Base, digest_of
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import adapter_parameters
from gptj.adapters.stored import put_adapter, read_adapter
from gptj.checkpoints.folder import CONFIG, ModelFolder
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SHARD_BYTES, TensorSpec
from gptj.config import GPTJConfig, parse_dtype
from gptj.devices import check_device
from gptj.errors import CheckpointError
from gptj.saving import save_adapter_folder, save_folder
from gptj.tokenizer import GPTJTokenizer
from gptj.weight_loading import load_weights

Model = TypeVar("Model", bound="GPTJPreTrainedModel")


class GPTJPreTrainedModel(nn.Module):
    """The base class of GPTJModel and its heads; they are in gptj.model."""

    config_class = GPTJConfig
    base_model_prefix = "transformer"
    gradient_checkpointing = False
    # Parameters that may share another's tensor, by their names.
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter: LoRAConfig | None = None  # of one that is not merged: gptj.adapters.lora

    @classmethod
    def from_pretrained(
        cls: type[Model],
        address: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        config: GPTJConfig | None = None,
        verify: bool = True,
        base: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> Model:
        """Load a model folder, an `s3://` address or a hub id such as `EleutherAI/gpt-j-6B`.

        At an adapter's address, its base model with the adapter in it, of which
        gptj.adapters.lora.merge_lora makes a plain model.

        Weights go straight into `dtype` on `device`: no second copy of the model is made. The
        model comes back in evaluation mode. The log says when a head that the checkpoint lacks is
        made new, when weights of several dtypes become one (the configuration's, if it is among
        them, or else that of most), and when a stored lm_head that differs from the embedding is
        kept, whatever the configuration says of ties. Another head's weights are left out.

        Args:
            dtype: of the weights; None or "auto" keeps the checkpoint's. `torch_dtype` is its
                older name.
            revision: a branch, tag or commit of a hub id.
            config: instead of the folder's `config.json`.
            verify: compare each file's SHA-256 with the folder's manifest, if it has one. It
                takes a core for each 1.5 GB/s, which matters only for files that are in memory
                already.
            base: of an adapter: where its base model is; None: where it was in training.
            overrides: fields of the configuration to replace, such as `id2label`.

        Raises:
            FileNotFoundError: if there is no model at the address, or no base model.
            CheckpointError: naming what is missing, cut off, altered or of another shape, or if
                the base is another model than the adapter was trained on.
            UnsupportedDeviceError: if PyTorch has no code for the GPU.
        """
        check_device(device)
        with ModelFolder.open(address, revision=revision, weights=True, verify=verify) as folder:
            return cls.from_folder(
                folder,
                dtype=torch_dtype if dtype is None else dtype,
                device=device,
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
        """The model of a folder that was opened with `weights=True`: see `from_pretrained`."""
        check_device(device)
        if folder.is_adapter:
            return cls._with_adapter(folder, base, config, dtype, device, overrides)
        if config is None:
            config = GPTJConfig.from_folder(folder, **overrides)
        elif overrides:
            config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
        return cls._from_weights(folder, config, dtype, device)

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
        trained_on = Base.of(folder) if given_base is None else adapter.known_base
        place = trained_on if given_base is None else Base(os.fspath(given_base))
        assert place is not None
        try:
            opened = ModelFolder.open(
                place.address, revision=place.revision, weights=True, verify=folder.verify
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the base model of the adapter {adapter.address} is missing: {error}"
            ) from error
        with opened:
            if trained_on is not None:
                trained_on.check(adapter.address, Base(place.address, digest=digest_of(opened)))
            if config is None:
                config = GPTJConfig.adapted_from_folder(folder, opened, **overrides)
            elif overrides:
                config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
            head_follows = bool(adapter.config.modules_to_save)
            model = cls._from_weights(opened, config, dtype, device, head_follows=head_follows)
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
        head_follows: bool = False,
    ) -> Model:
        try:
            with without_weights():  # no memory, and no time for weights that are replaced at once
                model = cls(config)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder.address}/{CONFIG}: no model can be made of this configuration: {error}"
            ) from error
        in_use, ties_hold = load_weights(
            model,
            folder.read_weights(),
            folder.address,
            dtype=None if dtype == "auto" else parse_dtype(dtype),
            stored_dtype=config.dtype,
            device=torch.device(device),
            initializer_range=config.initializer_range,
            tied=cls._tied_weights_keys if config.tie_word_embeddings else {},
            head_follows=head_follows,
        )
        if not ties_hold:
            untied = GPTJConfig.from_dict({**config.to_dict(), "tie_word_embeddings": False})
            model.config = model.base_model.config = untied
        if in_use:  # the files are the model's memory
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
        """Write a model folder that we and Hugging Face can load; complete, or not there.

        Args:
            address: a new folder, local or `s3://`.
            tokenizer: to be saved beside the model.
            training: how the model came to be, for `training.json`.
            max_shard_size: bytes of weights in one file, at most.

        Raises:
            AlreadyExistsError: if there is a finished checkpoint at the address.
            ValueError: if the model has an adapter that is not merged.
        """
        if self.adapter is not None:
            raise ValueError(
                "the model has an adapter beside its weights; remedy: merge it first "
                "(gptj.adapters.lora.merge_lora), or save it alone (save_adapter)"
            )
        # Without a second name of one tensor (lm_head.weight, if it is tied).
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
        """Write the folder of the model's adapter, which PEFT can load; complete, or not there.

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
        """The configuration as a folder stores it: with the model's class and dtype."""
        config = GPTJConfig.from_dict(self.config.to_dict())
        config.architectures = [type(self).__name__]
        config.dtype = self.dtype
        return config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> GPTJPreTrainedModel:
        """The model without its head: itself, if it has none."""
        return cast(GPTJPreTrainedModel, getattr(self, self.base_model_prefix, self))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.get_input_embeddings()

    def tie_weights(self) -> None:
        """Share the tensors that the configuration ties; here none."""

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input for the backward pass, and recompute the rest."""
        self.base_model.gradient_checkpointing = True

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
