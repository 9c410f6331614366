"""Flax's and TensorFlow's GPT-J of transformers 4: loads and saves folders, says what it computes.

    theirs.py PLAN.json

For the environment of tests/interop/requirements.txt; tests/interop/parity.py runs it. The plan is
a list of {"class", "folder", "output"}, and of models that are to be made also "config" (fields of
GPTJConfig), "seed" and "shard" (a size such as 5GB). The output gets {"input_ids", "outputs"}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import tensorflow as tf
import transformers

SCALE = 0.5  # of new weights: enough for logits that a wrong layout would change


def main() -> None:
    for step in json.loads(Path(sys.argv[1]).read_text()):
        cls = getattr(transformers, step["class"])
        if "config" in step:
            model = make(cls, step)
            model.save_pretrained(step["folder"], max_shard_size=step["shard"])
        else:
            # What is loaded is compared with what the class has: nothing may be missing or left.
            arguments = {} if step["class"].startswith("Flax") else {"output_loading_info": True}
            model = cls.from_pretrained(step["folder"], **arguments)
            if arguments:
                model, information = model
                assert not any(information.values()), f"{step}: {information}"
        outputs = run(model, step["input_ids"])
        result = {"input_ids": step["input_ids"], "outputs": outputs}
        Path(step["output"]).write_text(json.dumps(result))


def make(cls: Any, step: dict[str, Any]) -> Any:
    """A model with random weights, biases and norms."""
    random = np.random.default_rng(step["seed"])
    config = transformers.GPTJConfig(**step["config"])

    def new(old: Any) -> np.ndarray:
        return random.normal(0, SCALE, old.shape).astype(np.float32)

    model = cls(config)
    if step["class"].startswith("Flax"):
        model.params = jax.tree_util.tree_map(new, model.params)
    else:
        model(tf.constant([[0]]))  # makes the weights
        for weight in model.weights:
            weight.assign(new(weight))
    return model


def run(model: Any, input_ids: list[list[int]]) -> dict[str, Any]:
    """What the model makes of tokens, as lists of numbers."""
    result = model(np.asarray(input_ids, dtype=np.int32))
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return {name: np.asarray(result[name]).tolist() for name in names if name in result}


if __name__ == "__main__":
    main()
