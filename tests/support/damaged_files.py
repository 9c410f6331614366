"""Damages a model folder's files at random and reads them: a clear error, or a model.

    damaged_files.py FOLDER SEED TIMES

For test_damaged_files.py, which runs it in a process of limited memory. FOLDER has a good model
and tokenizer without a manifest, so that only reading itself can tell. Prints, as JSON, for each
file how often it was refused.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptj import GPTJForCausalLM, GPTJTokenizer
from gptj.checkpoints.folder import training_data
from gptj.checkpoints.manifest import Manifest
from gptj.errors import CheckpointError

SPARE_BYTES = 256 * 2**20  # more than a good model of this size takes; no lie may need more
SECONDS = 20  # of one file; a good one takes milliseconds

WEIRD: list[Any] = [
    None, True, -1, 0, 3, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("nan"), "", "x",
    "x" * 10_000, "\ud800", "../../x", "F64", "F16", [], {}, [[]], [0], [-1, -2], [2**62, 2**62],
    [2**40] * 9, [1e9, 2], {"a": 1}, [None, 3], "0" * 5000, [10**20, 10**20 + 8],
]  # fmt: skip


def read_weights_of(folder: Path) -> None:
    model = GPTJForCausalLM.from_pretrained(str(folder))
    sum(float(p.sum()) for p in model.parameters())  # every byte can be read


READERS: dict[str, Callable[[Path], Any]] = {
    "model-00002-of-00003.safetensors": read_weights_of,
    "model.safetensors.index.json": read_weights_of,
    "config.json": read_weights_of,
    "manifest.json": lambda folder: Manifest.read(str(folder)),
    "tokenizer.json": lambda folder: GPTJTokenizer.from_pretrained(folder),
    "tokenizer_config.json": lambda folder: GPTJTokenizer.from_pretrained(folder),
    "training.json": lambda folder: training_data(
        (folder / "training.json").read_bytes(), str(folder / "training.json")
    ),
}


def main() -> None:
    folder, seed, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    for name, read in READERS.items():  # once, for what Python and PyTorch reserve
        if (folder / name).exists():
            read(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
    signal.signal(signal.SIGALRM, hang)
    refused = {}
    for name, read in READERS.items():
        numbers = random.Random(f"{seed} {name}")
        refused[name] = sum(
            is_refused(folder, name, damaged(name, good(folder, name), numbers), read)
            for _ in range(times)
        )
    print(json.dumps(refused))


def good(folder: Path, name: str) -> bytes:
    if name == "manifest.json":
        record = {"size": 10, "sha256": "0" * 64}
        return json.dumps({"format": 1, "files": {"a/b": record, "c": record}}).encode()
    return (folder / name).read_bytes()


def is_refused(folder: Path, name: str, content: bytes, read: Callable[[Path], Any]) -> bool:
    other = folder.with_name("damaged")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    (other / name).write_bytes(content)
    signal.alarm(SECONDS)
    try:
        read(other)
        return False  # what was changed means the same, or another good model
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        assert str(other) in str(error), f"no file is named: {error!r}"
        if "tokenizer" in name:
            assert str(other / name) in str(error), f"the file is not named: {error!r}"
        else:
            assert type(error) in (CheckpointError, FileNotFoundError), error
        return True
    except BaseException:
        print(f"{name}: {content[:3000]!r}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)


def hang(*_: object) -> None:
    raise TimeoutError("it hangs")


def damaged(name: str, content: bytes, numbers: random.Random) -> bytes:
    if name.endswith(".json"):
        change = numbers.choice([flipped, cut, replaced, nested, lied, lied])
        return change(content, numbers)
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = numbers.randrange(4)
    if kind == 0:  # the length itself
        lies = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63 - 1, 2**64 - 1]
        return numbers.choice(lies).to_bytes(8, "little") + content[8:]
    if kind == 1:
        return numbers.choice([flipped, cut])(content[: 8 + length], numbers) + data
    header = numbers.choice([flipped, replaced, nested, lied, lied])(header, numbers)
    whole = len(header).to_bytes(8, "little") + header + data
    return cut(whole, numbers) if kind == 2 else whole


def flipped(content: bytes, numbers: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(numbers.choice([1, 1, 2, 8])):
        changed[numbers.randrange(len(changed))] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def cut(content: bytes, numbers: random.Random) -> bytes:
    return content[: numbers.randrange(len(content))]


def replaced(content: bytes, numbers: random.Random) -> bytes:
    start = numbers.randrange(len(content))
    length = numbers.choice([1, 10, 100])
    new = numbers.choice([b"9" * length, b"-", b"[", numbers.randbytes(length), b"1e999", b""])
    return content[:start] + new + content[start + length :]


def nested(content: bytes, numbers: random.Random) -> bytes:
    depth = numbers.choice([10, 900, 990, 100_000, 3_000_000])
    opening, closing = numbers.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * depth + b"1" + closing * depth
    start = content.find(b":", numbers.randrange(len(content))) + 1
    return content[:start] + value + b"," + content[start:] if start else value


def lied(content: bytes, numbers: random.Random) -> bytes:
    """Another value somewhere in the object, or one less."""
    fields = copy.deepcopy(json.loads(content))
    place, key = numbers.choice(list(places(fields)))
    if numbers.randrange(5) == 0:
        del place[key]
    else:
        place[key] = numbers.choice(WEIRD)
    return json.dumps(fields).encode()


def places(value: Any) -> Any:
    """Everything in a JSON value that can be changed, as (container, key)."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


if __name__ == "__main__":
    main()
