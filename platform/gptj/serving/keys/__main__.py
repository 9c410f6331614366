"""Generate a key: `python -m gptj.serving.keys NAME` prints it and its entry for the keys file."""

from __future__ import annotations

import argparse
import secrets

from pydantic import ValidationError

from gptj.serving.keys.keyring import Key, digest


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptj.serving.keys",
        description="Generate an API key and its entry for the file named by GPTJ_KEYS_FILE.",
    )
    parser.add_argument("name", help="the key's name, shown in metrics")
    name = parser.parse_args().name
    key = f"gptj-{secrets.token_urlsafe(32)}"
    try:
        entry = Key(name=name, sha256=digest(key.encode()))
    except ValidationError:
        parser.error(f"a name has at most 64 letters, digits, '.', '_' and '-', got {name!r}")
    print(f"# The key itself, which is stored nowhere: {key}")
    print(f"  - name: {entry.name}\n    sha256: {entry.sha256}")


if __name__ == "__main__":
    main()
