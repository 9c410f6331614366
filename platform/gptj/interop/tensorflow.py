"""Map TensorFlow's names and layouts to Hugging Face's and back: `tf_model.h5`.

    transformer/h_._0/attn/q_proj/kernel:0    transformer.h.0.attn.q_proj.weight, transposed
    transformer/h_._0/ln_1/gamma:0, beta:0    transformer.h.0.ln_1.weight, bias
    transformer/wte/weight:0                  transformer.wte.weight

An unsharded file groups them by top-level layer and then by the model's scope; a shard has them at
its root.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gptj.checkpoints.weights import TensorSpec
from gptj.errors import CheckpointError
from gptj.interop.hdf5 import Group, index_hdf5, plan_hdf5
from gptj.interop.layout import Layout
from gptj.interop.pieces import Piece
from gptj.interop.tensors import StoredTensor

SINGLE_FILE = "tf_model.h5"
INDEX_FILE = "tf_model.h5.index.json"
TOP = "transformer"
LAYERS = (TOP, "lm_head", "score", "qa_outputs")  # the classes' top-level layers
SCOPES = {  # class names as Keras writes them
    "GPTJModel": "tfgptj_model",
    "GPTJForCausalLM": "tfgptj_for_causal_lm",
    "GPTJForSequenceClassification": "tfgptj_for_sequence_classification",
    "GPTJForQuestionAnswering": "tfgptj_for_question_answering",
}


def open_file(address: str) -> list[StoredTensor]:
    """The tensors of a file under Hugging Face's names. CheckpointError if it is damaged."""
    return [_from_tensorflow(tensor, address) for tensor in index_hdf5(address)]


def tensorflow_name(name: str, cls: str) -> tuple[str, bool]:
    """TensorFlow's name of a parameter, without the scope, and whether it is transposed."""
    if cls == "GPTJModel":
        name = f"{TOP}.{name}"  # every class has it, the base model too
    *module, leaf = name.split(".")
    transpose = False
    if module[-1].startswith("ln_"):
        leaf = "gamma" if leaf == "weight" else "beta"
    elif leaf == "weight" and module[-1] != "wte":
        leaf, transpose = "kernel", True
    path = re.sub(r"/h/(\d+)/", r"/h_._\1/", "/".join([*module, leaf]))
    return f"{path}:0", transpose


def _from_tensorflow(tensor: StoredTensor, address: str) -> StoredTensor:
    parts = tensor.name.removesuffix(":0").split("/")
    tops = [number for number, part in enumerate(parts) if part in LAYERS]
    if not tops:
        raise CheckpointError(f"{address} has a weight that no TensorFlow GPT-J has: {tensor.name}")
    *module, leaf = parts[tops[-1] :]
    if leaf == "kernel":
        tensor = tensor.transposed()
    leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    module = [re.sub(r"^h_\._(\d+)$", r"h.\1", part) for part in module]
    return tensor.renamed(".".join([*module, leaf]))


def _plan(specs: Sequence[TensorSpec], cls: str, only: bool) -> list[Piece]:
    if not only:
        names = sorted(spec.name for spec in specs)
        arrays = [(spec.name, spec) for spec in specs]
        return plan_hdf5([Group("/", arrays, {"layer_names": names})])
    layers: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        layers.setdefault(spec.name.split("/")[0], []).append(spec)
    groups = [Group("/", [], {"layer_names": list(layers)})]
    for layer, members in layers.items():
        scoped = [(f"{SCOPES[cls]}/{spec.name}", spec) for spec in members]
        groups.append(Group(layer, scoped, {"weight_names": [name for name, _ in scoped]}))
    return plan_hdf5(groups)


LAYOUT = Layout(
    classes=tuple(SCOPES),
    single=SINGLE_FILE,
    shard="tf_model-{:05}-of-{:05}.h5",
    index=INDEX_FILE,
    name=tensorflow_name,
    index_name=lambda name, cls: f"{SCOPES[cls]}/{name}",
    plan=_plan,
)
