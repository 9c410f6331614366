"""Check, before training, that all ranks have read the same data; if not, fail on all of them.

A rank with different data, or none, would leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gptj.tokenizer import GPTJTokenizer
from gptj.training.dataset import TaskData, node_data
from gptj.training.failures import UnrecoverableError, unrecoverable
from gptj.training.settings import Settings, SettingsError
from gptj.training.tokenizer import load_tokenizer


def agree(value: str | None) -> str | None:
    """Broadcast rank 0's value."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def read_alike(
    settings: Settings, world_size: int, shared: Path, prepared: Mapping[str, str] | None = None
) -> tuple[GPTJTokenizer, TaskData]:
    """Read the tokenizer and the data, and compare them across ranks.

    Args:
        shared: the folder that this node's processes share.
        prepared: see node_data.

    Raises:
        SettingsError: on all ranks, if the data differs.
        UnrecoverableError, RuntimeError: on all ranks, with the message of the one that failed;
            the latter if a retry may succeed.
    """
    read: tuple[GPTJTokenizer, TaskData] | None = None
    fault: tuple[str, bool] | None = None  # a message, and whether a retry is pointless
    try:
        tokenizer = load_tokenizer(settings)
        read = tokenizer, node_data(settings, tokenizer, shared, prepared)
    except (ValueError, OSError, UnrecoverableError) as error:
        final = unrecoverable(error)
        fault = (final or str(error), final is not None)
    mine = read[1].fingerprints if read is not None else {}
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, (fault, mine))
    for rank, (each, _) in enumerate(found):
        if each is not None:
            message = f"worker {rank} could not read the data: {each[0]}"
            raise UnrecoverableError(message) if each[1] else RuntimeError(message)
    for rank, (_, theirs) in enumerate(found):
        for name, first in found[0][1].items():
            if theirs[name] != first:
                address = settings.train_data if name == "train" else settings.evaluation_data
                raise SettingsError(
                    f"the workers have read different data from data.{name}={address}: worker 0 "
                    f"{first}, worker {rank} {theirs[name]}. Put it on S3 or in a folder that all "
                    f"nodes share"
                )
    assert read is not None
    return read
