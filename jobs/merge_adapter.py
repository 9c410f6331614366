#!/usr/bin/env python
"""Merge a LoRA adapter into its base model: a model folder that needs neither, tensor by tensor.

    jobs/merge_adapter.py BASE ADAPTER DESTINATION [--dtype DTYPE] [--revision REVISION] …

BASE is a model: a folder, local or `s3://…`, or an id on the Hugging Face hub. ADAPTER is the
output of `jobs/finetune.py` with `adapter=…`, or one of PEFT's adapters. DESTINATION is a new
folder, local or `s3://…`; it is printed when it is complete. An adapter trained on another model is
refused. A base on the hub is read at the commit that the adapter was trained on, if it records one,
unless a revision is given. Memory holds a few tensors, never the model. Progress goes to standard
error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gptj.checkpoints.weights import SHARD_BYTES
from gptj.interop.merging import merge_adapter
from gptj_jobs import command_line

DTYPES = ("float16", "bfloat16", "float32")


def main() -> None:
    command_line.log_to_stderr()
    arguments = read_arguments(sys.argv[1:])
    try:
        merge_adapter(
            arguments.base,
            arguments.adapter,
            arguments.destination,
            dtype=arguments.dtype,
            revision=arguments.revision,
            shard_bytes=arguments.shard_bytes,
        )
    except (ValueError, OSError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")
    print(arguments.destination)


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("base", "adapter", "destination"):
        parser.add_argument(name, type=command_line.address)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the base's")
    parser.add_argument(
        "--revision",
        help="branch, tag or commit of a base on the hub; default: the commit of the training",
    )
    parser.add_argument(
        "--shard-bytes",
        type=command_line.positive,
        default=SHARD_BYTES,
        help="most bytes of weights in one file; default: %(default)s",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
