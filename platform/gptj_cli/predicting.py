"""`gptj predict`: a checkpoint and rows in, one JSON object per row out; no cluster.

The services' own code runs in this process, so answers equal those over HTTP.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from deployments.in_process import ARGUMENTS, InProcessService, ServiceName
from gptj.config import GPTJConfig
from gptj.data.examples import groups
from gptj.data.rows import Row
from gptj.data.sources import data_files, find_columns, read_rows
from gptj.serving.errors import APIError
from gptj_jobs.row_requests import KINDS, fields_of, request_of, service_of

Answer = Callable[[Row], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Options:
    batch_size: int = 16  # rows, or windows of rows, computed together
    columns: Mapping[str, str] = field(default_factory=dict)  # our column name: the file's
    delimiter: str | None = None
    max_tokens: int = 32  # most new tokens (language models)
    temperature: float = 0.0  # 0: greedy
    device: str | None = None  # default: cuda if available
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


async def predict(address: str, data: str, options: Options) -> AsyncIterator[dict[str, Any]]:
    """The rows' results, in order, as they become ready.

    A row the model cannot handle gives `{"row": …, "error": …}`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: if something cannot be loaded or read.
    """
    name = service_of(GPTJConfig.from_pretrained(address), address)
    known = dict.fromkeys(column for kind in KINDS[name] for column in kind)
    if unknown := options.columns.keys() - known:
        raise ValueError(f"{name} reads {', '.join(known)}, not {min(unknown)}")
    columns = find_columns(data, KINDS[name], options.columns, delimiter=options.delimiter)
    rows = read_rows(data, columns, options.columns, delimiter=options.delimiter)
    running = "max_num_seqs" if name == "generation" else "max_batch"
    fields: dict[str, Any] = {
        "checkpoint": address,
        "dtype": options.dtype,
        "max_queued": max(256, 64 * options.batch_size),
        running: options.batch_size,
    }
    arguments = ARGUMENTS[name](**fields)
    service = InProcessService.load(name, arguments, device_of(options))
    with closing(service):
        answer = answerer(name, service, options)
        async for result in _in_order(rows, answer, 4 * options.batch_size):
            yield result


def check_output(output: Path, data: str) -> None:
    """ValueError if the output cannot be written, or would replace some of the data."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise ValueError(
            f"--output {output}: the folder {folder} does not exist; remedy: mkdir -p {folder}"
        )
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; remedy: name a file in it")
    if (output.is_file() or not output.exists()) and not os.access(folder, os.W_OK):
        raise ValueError(
            f"--output {output}: results are first written beside it, but {folder} is not "
            f"writable; remedy: choose another folder"
        )
    if output.exists():
        for each in data_files(data):
            if Path(each.address).exists() and output.samefile(each.address):
                raise ValueError(
                    f"--output {output} is one of the files of {data}, which it would replace: "
                    f"choose another name"
                )


def device_of(options: Options) -> torch.device:
    """The device to use. ValueError if the requested GPU does not exist."""
    on_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not on_gpu:
        raise ValueError("--device cuda: this machine has no CUDA device; leave it out")
    return torch.device(options.device or ("cuda" if on_gpu else "cpu"))


def answerer(name: ServiceName, service: InProcessService, options: Options) -> Answer:
    """A function that answers a row."""
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    parameters = sampling if name == "generation" else {}

    async def answer(row: Row) -> dict[str, Any]:
        route, body = request_of(name, row, parameters)
        reply = await service.answer(route, body)
        shown = {key: value for key, value in row.values.items() if key != "context"}
        return {**shown, **fields_of(route, reply)}

    return answer


async def _in_order(
    rows: Iterable[Row], answer: Answer, at_once: int
) -> AsyncIterator[dict[str, Any]]:
    async def numbered(number: int, row: Row) -> dict[str, Any]:
        try:
            return {"row": number, **await answer(row)}
        except (APIError, ValueError) as error:
            return {"row": number, "error": str(error)}

    number = 0
    for group in groups(rows, at_once):
        tasks = [numbered(number + place, row) for place, row in enumerate(group, 1)]
        for result in await asyncio.gather(*tasks):
            yield result
        number += len(group)
