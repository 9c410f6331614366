"""Check a checkpoint against its manifest.

python -m gptj.checkpoints verify ADDRESS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gptj import storage
from gptj.checkpoints.manifest import verify
from gptj.storage.addresses import normalized


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptj.checkpoints",
        description="Check a checkpoint against its manifest.",
    )
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("address", help="a local folder or an s3:// address")
    arguments = parser.parse_args(given)
    try:
        address = normalized(arguments.address)
        manifest = verify(address)
    except (ValueError, storage.StorageError) as error:
        sys.exit(str(error))
    print(f"{address}: good: {len(manifest.files)} files, {manifest.size} bytes match the manifest")


if __name__ == "__main__":
    main()
