"""Makes a key: `python -m gptj.serving.keys NAME` prints it, and its entry in the file of keys."""

from __future__ import annotations

import argparse
import secrets

from pydantic import ValidationError

from gptj.serving.keys.keyring import Key, digest


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptj.serving.keys",
        description="Make an API key, and its entry for the file of GPTJ_KEYS_FILE.",
    )
    parser.add_argument("name", help="whose key it is; metrics have it")
    name = parser.parse_args().name
    key = f"gptj-{secrets.token_urlsafe(32)}"
    try:
        entry = Key(name=name, sha256=digest(key.encode()))
    except ValidationError:
        parser.error(f"a name has letters, digits, '.', '_' and '-', 64 at most: {name!r}")
    print(f"# The key itself, which is nowhere else: {key}")
    print(f"  - name: {entry.name}\n    sha256: {entry.sha256}")


if __name__ == "__main__":
    main()
