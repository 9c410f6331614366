"""Stored tensors into the parameters of a model without weights, in any order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gptj.checkpoints.weights import one_dtype
from gptj.errors import CheckpointError

logger = logging.getLogger(__name__)

PREFIX = "transformer."  # of the base model's parameters in a model with a head
# Buffers of old checkpoints, which hold no knowledge: the causal mask and its value.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")
# What the heads add to the base model. Another head's weights are left out, missing ones made new.
HEADS = ("lm_head.", "score.", "qa_outputs.")

UNTIED = (
    "%s has an lm_head.weight that differs from its embedding, though its configuration says "
    "tie_word_embeddings: it is kept, and the two are not tied"
)


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    folder: str,
    *,
    dtype: torch.dtype | None,
    stored_dtype: torch.dtype | None,
    device: torch.device,
    initializer_range: float,
    tied: Mapping[str, str],
    head_follows: bool = False,
) -> tuple[bool, bool]:
    """Replace every parameter of a model on the meta device.

    Args:
        folder: where the tensors are from, for errors.
        dtype: of the parameters; None: as stored. Several become `stored_dtype`, if it is among
            them, or else that of most.
        initializer_range: standard deviation of a missing head's new weights.
        tied: parameters that share another's tensor, by name. They need not be stored.
        head_follows: a missing head comes from elsewhere, and is not logged.

    Returns:
        Whether the model uses the stored tensors' memory, and whether the tied parameters are
        equal. If not, they keep their own values.

    Raises:
        CheckpointError: naming what is missing, has another shape, or belongs to another model.
    """
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
                f"{type(model).__name__} of this configuration has {tuple(expected[name].shape)}"
            )
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{stored_name} of {folder} has the dtype {stored.dtype}; weights are floats"
            )
        weight = stored.to(device=device, dtype=dtype or stored.dtype)
        in_use |= weight is stored
        assign(model, name, weight)
        loaded.add(name)
        del stored, weight  # before the next one is read
    if dtype is None:
        _unite_dtypes(model, loaded, folder, stored_dtype)
    differing = [name for name, source in tied.items() if not _tie(model, name, source, loaded)]
    if differing:
        logger.warning(UNTIED, folder)
    _make_missing(model, set(expected) - loaded, folder, device, initializer_range, head_follows)
    return in_use, not differing


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by its name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def _own_name(stored: str, expected: Mapping[str, Tensor]) -> str | None:
    """The parameter that a stored tensor is for: base models have no prefix, heads do."""
    for name in (stored, PREFIX + stored, stored.removeprefix(PREFIX)):
        if name in expected:
            return name
    return None


def _check_expendable(name: str, folder: str) -> None:
    if not name.endswith(OLD_BUFFERS) and not name.startswith(HEADS):
        raise CheckpointError(
            f"{folder} has weights that no GPT-J of this configuration has: {name}"
        )


def _unite_dtypes(
    model: nn.Module, loaded: set[str], folder: str, preferred: torch.dtype | None
) -> None:
    """Convert what has another dtype than the rest."""
    numbers: Counter[torch.dtype] = Counter()
    for name in loaded:
        weight = model.get_parameter(name)
        numbers[weight.dtype] += weight.numel()
    if len(numbers) < 2:
        return
    target = one_dtype(numbers, preferred)
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
        assign(model, name, converted)


def _tie(model: nn.Module, name: str, source: str, loaded: set[str]) -> bool:
    """Give one parameter another's tensor; False, and nothing done, if they differ."""
    if name in loaded and source not in loaded:
        assign(model, source, model.get_parameter(name).detach())
        loaded.add(source)
    shared = model.get_parameter(source)
    if name in loaded and not torch.equal(model.get_parameter(name), shared):
        return False
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, shared)
    loaded.add(name)
    return True


def _make_missing(
    model: nn.Module,
    missing: set[str],
    folder: str,
    device: torch.device,
    std: float,
    head_follows: bool,
) -> None:
    if not missing:
        return
    if lacking := sorted(name for name in missing if not name.startswith(HEADS)):
        more = f" and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise CheckpointError(f"{folder} is incomplete: {', '.join(lacking[:20])}{more} missing")
    if not head_follows:
        names = ", ".join(sorted(missing))
        logger.warning("%s has no %s: new weights, to be trained before use", folder, names)
    dtype = next(each.dtype for each in model.parameters() if not each.is_meta)
    for name in missing:
        new = torch.zeros(model.get_parameter(name).shape, device=device, dtype=dtype)
        if not name.endswith("bias"):
            new.normal_(std=std)
        assign(model, name, new)
