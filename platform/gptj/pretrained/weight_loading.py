"""Load stored tensors, in any order, into the parameters of a model without weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptj.checkpoints.weights import OLD_BUFFERS, PREFIX, one_dtype
from gptj.errors import CheckpointError
from gptj.layers.int4 import PARAMETERS, Int4Linear

logger = logging.getLogger(__name__)

# Parameters of heads: another head's are skipped, missing ones newly initialised.
HEADS = ("lm_head.", "score.", "qa_outputs.")

UNTIED = (
    "%s has an lm_head.weight that differs from its embedding, although its configuration has "
    "tie_word_embeddings: keeping it untied"
)


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` found.

    Attributes:
        in_use: whether the model uses the stored tensors' memory.
        ties_hold: whether tied parameters were equal; if not, they keep their own values.
        new: names of the head's weights that are stored nowhere, and are random.
    """

    in_use: bool
    ties_hold: bool
    new: frozenset[str]


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
    following: Container[str] = (),
) -> Loaded:
    """Replace every parameter of a model on the meta device.

    Args:
        folder: where the tensors come from, for error messages.
        dtype: of the parameters; None: as stored. Mixed dtypes are unified to `stored_dtype`, if
            it is among them, else to the majority's. 4-bit weights stay what they are.
        initializer_range: standard deviation of a missing head's new weights.
        tied: names of tied parameters, and of those they are tied to. They need not be stored.
        following: names of modules that will be loaded from elsewhere, if missing here.

    Raises:
        CheckpointError: naming what is missing, has the wrong shape, or is unexpected.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    coded = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if isinstance(module, Int4Linear)
        for leaf in PARAMETERS
    }
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
        if name in coded and stored.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{stored_name} of {folder} has the dtype {stored.dtype}, and should have "
                f"{expected[name].dtype}"
            )
        if name not in coded and not stored.is_floating_point():
            raise CheckpointError(
                f"{stored_name} of {folder} has the dtype {stored.dtype}, which is not floating "
                f"point"
            )
        keeps_dtype = dtype is None or name in coded
        weight = stored.to(device=device, dtype=stored.dtype if keeps_dtype else dtype)
        in_use |= weight is stored
        assign(model, name, weight)
        loaded.add(name)
        del stored, weight  # before the next one is read
    if dtype is None:
        _unite_dtypes(model, loaded - coded, folder, stored_dtype)
    differing = [name for name, source in tied.items() if not _tie(model, name, source, loaded)]
    if differing:
        logger.warning(UNTIED, folder)
    missing = set(expected) - loaded
    _make_missing(model, missing, folder, device, initializer_range)
    new = [name for name in sorted(missing) if name.partition(".")[0] not in following]
    if new:
        names = ", ".join(new)
        logger.warning("%s has no %s: newly initialised, train before use", folder, names)
    drawn = frozenset(name for name in new if not name.endswith("bias"))
    return Loaded(in_use, not differing, drawn)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter, given its name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    requires_grad = getattr(module, leaf).requires_grad
    setattr(module, leaf, nn.Parameter(tensor, requires_grad))


def _own_name(stored: str, expected: Mapping[str, Tensor]) -> str | None:
    """The parameter for a stored tensor; only models with heads have the prefix."""
    for name in (stored, PREFIX + stored, stored.removeprefix(PREFIX)):
        if name in expected:
            return name
    return None


def _check_expendable(name: str, folder: str) -> None:
    if not name.endswith(OLD_BUFFERS) and not name.startswith(HEADS):
        raise CheckpointError(
            f"{folder} has a weight that no GPT-J of this configuration has: {name}"
        )


def _unite_dtypes(
    model: nn.Module, loaded: set[str], folder: str, preferred: torch.dtype | None
) -> None:
    """Convert the weights to one dtype."""
    numbers: Counter[torch.dtype] = Counter()
    for name in loaded:
        weight = model.get_parameter(name)
        numbers[weight.dtype] += weight.numel()
    if len(numbers) < 2:
        return
    target = one_dtype(numbers, preferred)
    logger.warning(
        "%s has weights in %s: converting all to %s",
        folder,
        ", ".join(sorted(map(str, numbers))),
        target,
    )
    for name in loaded:
        weight = model.get_parameter(name)
        if weight.dtype == target:
            continue
        converted = weight.detach().to(target)
        if bool((converted.isinf() & weight.isfinite()).any()):
            raise CheckpointError(
                f"{name} of {folder} has values too large for {target}, the dtype of the other "
                f"weights; remedy: dtype=float32"
            )
        assign(model, name, converted)


def _tie(model: nn.Module, name: str, source: str, loaded: set[str]) -> bool:
    """Tie a parameter to another's tensor; if they differ, return False and do nothing."""
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
) -> None:
    if lacking := sorted(name for name in missing if not name.startswith(HEADS)):
        more = f" and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise CheckpointError(f"{folder} is incomplete: {', '.join(lacking[:20])}{more} missing")
    for name in missing:
        dtype = next(each.dtype for each in model.parameters() if not each.is_meta)
        new = torch.zeros(model.get_parameter(name).shape, device=device, dtype=dtype)
        if not name.endswith("bias"):
            new.normal_(std=std)
        assign(model, name, new)
