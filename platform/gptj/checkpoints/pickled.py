"""PyTorch's `.bin` files: what `torch.load` makes of one, checked to be a plain state dict."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from gptj.checkpoints.tensor_file import DTYPES
from gptj.errors import CheckpointError


def state_dict(address: str, load: Callable[[], Any]) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Args:
        load: calls `torch.load` with `weights_only=True`.

    Raises:
        CheckpointError: if the file is damaged or holds anything but tensors that safetensors could
            hold; names the entry.
    """
    try:
        state = load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{address} is damaged, or holds objects other than tensors, which could run code: "
            f"refused"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise almost any type
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{address} is damaged: {reason}") from error
    if not isinstance(state, dict):
        raise _not_plain(address, f"it holds {_kind(state)}")
    for name, value in state.items():
        if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values()):
            raise CheckpointError(
                f"{address} is a training checkpoint, with the weights in its entry {shown(name)}; "
                f"remedy: torch.save(torch.load(FILE, weights_only=True)[{shown(name)}], FILE)"
            )
    for name, value in state.items():
        if not isinstance(name, str):
            raise _not_plain(address, f"it has the name {shown(name)}")
        if not isinstance(value, Tensor):
            raise _not_plain(address, f"{name} is {_kind(value)}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise _not_plain(address, f"{name} is a {value.layout} tensor on {value.device.type}")
        if value.dtype not in DTYPES.values():
            names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES.values())
            raise CheckpointError(
                f"{address}: {name} has the dtype {value.dtype}, which is not one of {names}"
            )
    return state


def _not_plain(address: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{address} is not a plain state dict of tensors by name: {reason}")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{shown(value)} of type {type(value).__name__}"
