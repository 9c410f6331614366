#!/usr/bin/env python
"""Import GPT-J weights in any published format into a model folder of ours, tensor by tensor.

    jobs/import_weights.py SOURCE DESTINATION [--format FORMAT] [--dtype DTYPE] …

SOURCE is a folder, local or `s3://…`, an id on the Hugging Face hub, or the `.tar.zst` file that
GPT-J was published as. It holds safetensors or pytorch_model.bin (one file or several), a
checkpoint of mesh-transformer-jax (slim or full), flax_model.msgpack or tf_model.h5. DESTINATION is
a new folder, local or `s3://…`. It is printed when it is complete; until then it does not count
as a checkpoint. Memory holds a few tensors, never the model. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gptj.interop.formats import FORMATS
from gptj.interop.importer import import_weights
from gptj_jobs import command_line

DTYPES = ("float16", "bfloat16", "float32")


def main() -> None:
    command_line.log_to_stderr()
    arguments = read_arguments(sys.argv[1:])
    try:
        import_weights(
            arguments.source,
            arguments.destination,
            format=arguments.format,
            revision=arguments.revision,
            dtype=arguments.dtype,
            config=arguments.config,
            tokenizer=arguments.tokenizer,
            scratch=arguments.scratch,
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
    parser.add_argument("--format", choices=FORMATS, help="default: detected")
    parser.add_argument("--dtype", choices=DTYPES, help="of the new weights; default: as stored")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--config",
        metavar="JSON",
        type=command_line.address,
        help="the model's configuration, of Hugging Face or mesh-transformer-jax, where SOURCE "
        "has none; needed for checkpoints of mesh-transformer-jax that are not GPT-J-6B",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="ADDRESS",
        type=command_line.address,
        help="a folder or hub id; default: SOURCE's, if any",
    )
    parser.add_argument(
        "--scratch",
        metavar="FOLDER",
        type=command_line.folder,
        help="where a .tar.zst is unpacked temporarily; default: the system's",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
