"""Folders of models that no machine here could load."""

from __future__ import annotations

import json

from gptj import storage
from gptj.checkpoints.folder import CONFIG
from gptj.checkpoints.manifest import MANIFEST, Manifest, describe

LARGE = {"n_embd": 16384, "n_layer": 64, "n_head": 64, "rotary_dim": 64}


def enlarge(address: str, shape: dict[str, int] = LARGE) -> None:
    """Give a complete folder the configuration of a larger model, and leave its weights."""
    path = storage.join(address, CONFIG)
    config = json.loads(storage.read_bytes(path))
    storage.write_bytes(path, json.dumps({**config, **shape}).encode())
    manifest = Manifest.read(address)
    assert manifest is not None
    changed = describe(address, manifest.files)
    storage.delete(storage.join(address, MANIFEST))
    changed.write()


def parameters(vocab_size: int) -> int:
    """Of a language model of that shape: its blocks, embedding, last norm and head."""
    width, layers = LARGE["n_embd"], LARGE["n_layer"]
    attention, norm = 4 * width**2, 2 * width
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    embedding, head = vocab_size * width, vocab_size * width + vocab_size
    return layers * (attention + norm + mlp) + embedding + norm + head
