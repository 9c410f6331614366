#!/usr/bin/env python
"""Quantize a language model's weights to 4 bits: a model folder a third the size.

    jobs/quantize.py CHECKPOINT OUTPUT --data DATA [--rows 256] [--sequence-length 512] …
    jobs/quantize.py CHECKPOINT OUTPUT --rounding nearest

CHECKPOINT is a model: a folder, local or `s3://…`, or an id on the Hugging Face hub. OUTPUT is a
new folder, local or `s3://…`; it is printed when it is complete; until then it does not count as a
model. DATA is text like what the model will read: Parquet, JSON, CSV or text with the column
`text`, a file, folder or pattern, local or `s3://…`, or `sample://NAME`. Its first rows calibrate
GPTQ, which rounds weights so that the outputs on these rows change least; `--rounding nearest`
needs no data and loses more. The layers of the blocks are quantized, in groups of 64 weights with a
scale each; embedding, norms and head stay as they are.

`gptj serve`, the generation deployment and the library load OUTPUT as any other model, on a CPU or
a GPU, where its weights stay in 4 bits. Memory holds one block in fp32, four square matrices of the
MLP's width and the rows' activations. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from gptj.checkpoints.weights import SHARD_BYTES
from gptj.quantization.quantizer import Calibration, Rounding, quantize_model
from gptj_jobs import command_line


def main() -> None:
    command_line.log_to_stderr()
    arguments = read_arguments(sys.argv[1:])
    calibration = None
    if arguments.rounding == "gptq":
        calibration = Calibration(arguments.data, arguments.rows, arguments.sequence_length)
    try:
        quantize_model(
            arguments.checkpoint,
            arguments.output,
            calibration,
            revision=arguments.revision,
            device=arguments.device,
            shard_bytes=arguments.shard_bytes,
        )
    except (ValueError, OSError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")
    print(arguments.output)


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=command_line.address)
    parser.add_argument("output", type=command_line.address)
    parser.add_argument("--data", type=command_line.data_address, help="text for GPTQ")
    parser.add_argument(
        "--rows", type=command_line.positive, default=256, help="rows of text; default: %(default)s"
    )
    parser.add_argument(
        "--sequence-length",
        type=command_line.positive,
        default=512,
        help="tokens of a row, at most the model's context; default: %(default)s",
    )
    parser.add_argument(
        "--rounding", choices=get_args(Rounding), default="gptq", help="default: %(default)s"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to quantize on; default: a GPU, if there is one",
    )
    parser.add_argument(
        "--shard-bytes",
        type=command_line.positive,
        default=SHARD_BYTES,
        help="most bytes of weights in one file; default: %(default)s",
    )
    given = parser.parse_args(words)
    if given.rounding == "gptq" and given.data is None:
        parser.error("GPTQ needs --data, text like what the model will read; or --rounding nearest")
    if given.rounding == "nearest" and given.data is not None:
        parser.error("--rounding nearest uses no --data: leave one of them out")
    return given


if __name__ == "__main__":
    main()
