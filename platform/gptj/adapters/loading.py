"""An adapter's address in, its base model with the adapter in it out."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

from gptj.adapters.base import Base
from gptj.adapters.folder import put_adapter, read_adapter
from gptj.checkpoints.checkpoint import load_config, load_model
from gptj.checkpoints.manifest import CheckpointError
from gptj.config import GPTJConfig
from gptj.model import GPTJPreTrainedModel
from gptj.storage.addresses import normalized

Model = TypeVar("Model", bound=GPTJPreTrainedModel)


def load_adapted(
    cls: type[Model],
    address: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    config: GPTJConfig | None = None,
    verify: bool = True,
    **overrides: Any,
) -> Model:
    """The base model with an adapter in it; `from_pretrained` of an adapter's address does this.

    See `from_pretrained` for the other arguments. gptj.adapters.lora.merge_lora makes a plain model
    of it.

    Args:
        base: where the base model is; None: where it was when the adapter was trained.

    Raises:
        FileNotFoundError: if there is no adapter, or no base model.
        CheckpointError: naming what is damaged, does not fit or is not supported, or if the base
            is another model than the adapter was trained on.
    """
    adapter = read_adapter(address, revision=revision, verify=verify)
    trained_on = adapter.base if base is None else _known_base(adapter)
    place, place_revision = normalized(base or trained_on.address), None
    if base is None:
        place_revision = trained_on.revision
    try:
        trained_on.check(adapter.address, Base.at(place, place_revision))
        found = load_config(place, revision=place_revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of the adapter {adapter.address} is missing: {error}"
        ) from error
    if config is None:
        config = adapter.model_config(found, overrides)
    elif overrides:
        config = GPTJConfig.from_dict({**config.to_dict(), **overrides})
    model = load_model(
        cls,
        place,
        dtype=dtype,
        device=device,
        revision=place_revision,
        config=config,
        verify=verify,
        head_follows=bool(adapter.config.modules_to_save),
    )
    put_adapter(model, adapter)
    return model.eval()


def _known_base(adapter: Any) -> Base:
    try:
        base: Base = adapter.base
    except CheckpointError:  # PEFT's may name none, and one was given
        return Base("")
    return base
