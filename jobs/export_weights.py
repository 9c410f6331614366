#!/usr/bin/env python
"""Export a model folder for other programs, tensor by tensor.

    jobs/export_weights.py SOURCE DESTINATION --format huggingface|flax|tensorflow [--dtype DTYPE]

SOURCE is a model folder, local or `s3://…`, or an id on the Hugging Face hub; DESTINATION is a new
folder, local or `s3://…`, and is printed when it is complete. `huggingface` writes safetensors,
`flax` flax_model.msgpack for transformers' FlaxGPTJModel and FlaxGPTJForCausalLM, `tensorflow`
tf_model.h5 for its TFGPTJ classes. Weights above 5 GB are split into several files with an index.
Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gptj.checkpoints.weights import SHARD_BYTES
from gptj.interop.exporter import EXPORT_FORMATS, export_weights
from gptj_jobs import command_line
from jobs.import_weights import DTYPES


def main() -> None:
    command_line.log_to_stderr()
    arguments = read_arguments(sys.argv[1:])
    try:
        export_weights(
            arguments.source,
            arguments.destination,
            format=arguments.format,
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
    parser.add_argument("source", type=command_line.address)
    parser.add_argument("destination", type=command_line.address)
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--shard-bytes",
        type=command_line.positive,
        default=SHARD_BYTES,
        help="most bytes of weights in one file; default: %(default)s",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
