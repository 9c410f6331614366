"""A sentence-transformers folder's pooling: `modules.json` and `1_Pooling/config.json` in."""

from __future__ import annotations

import json
from typing import Any

from gptj import storage
from gptj.checkpoints.folder import ModelFolder
from gptj.serving.embeddings import Pooling

MODULES = "modules.json"
FILES = (MODULES, "*_Pooling/config.json")
# Their names of the modes that we have: in `pooling_mode`, and in a field of its own.
MODES: dict[str, Pooling] = {
    "mean": "mean",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
}


def pooling_of(folder: ModelFolder) -> Pooling | None:
    """How the model was trained to pool; None if it is not a sentence-transformers folder.

    Raises ValueError if it has modules that cannot be served.
    """
    if MODULES not in folder:
        return None
    modules = _read(folder, MODULES)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ValueError(f"{folder.address}: {MODULES} must be a list of objects")
    found: Pooling | None = None
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            found = _mode(folder, f"{module.get('path')}/config.json")
        elif kind not in ("Transformer", "Normalize"):  # args.normalize decides about the last
            raise ValueError(f"{folder.address} has a module {kind}, which cannot be served")
    return found


def _mode(folder: ModelFolder, name: str) -> Pooling:
    config = _read(folder, name)
    if not isinstance(config, dict):
        raise ValueError(f"{folder.address}: {name} must be an object")
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if isinstance(config.get("pooling_mode"), str):  # newer versions
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(
            f"{folder.address}: {name} pools by {' and '.join(modes) or 'nothing'}, and this "
            f"service by mean, last token or weighted mean"
        )
    return MODES[modes[0]]


def _read(folder: ModelFolder, name: str) -> Any:
    """A JSON file, which may have been added to a finished model's folder."""
    recorded = {} if folder.manifest is None else folder.manifest.files
    if name in recorded:
        content = folder.read(name)
    else:
        content = storage.read_bytes(storage.join(folder.address, name))
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{folder.address}: {name} is not valid JSON: {error}") from error
