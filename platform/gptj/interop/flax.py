"""Map Flax's names and layouts to Hugging Face's and back: `flax_model.msgpack`.

transformer/h/0/attn/q_proj/kernel    transformer.h.0.attn.q_proj.weight, transposed
transformer/h/0/ln_1/scale            transformer.h.0.ln_1.weight
transformer/wte/embedding             transformer.wte.weight
"""

from __future__ import annotations

from gptj.interop.layout import Layout
from gptj.interop.msgpack_file import SEPARATOR, index_msgpack, plan_msgpack
from gptj.interop.tensors import StoredTensor

SINGLE_FILE = "flax_model.msgpack"
INDEX_FILE = "flax_model.msgpack.index.json"


def open_file(address: str) -> list[StoredTensor]:
    """The tensors of a file under Hugging Face's names. CheckpointError if it is damaged."""
    return [_from_flax(tensor) for tensor in index_msgpack(address)]


def flax_name(name: str) -> tuple[str, bool]:
    """Flax's path of a parameter, and whether Flax stores its transpose."""
    module, _, leaf = name.rpartition(".")
    transpose = False
    if leaf == "weight":
        kind = module.rpartition(".")[2]
        transpose = not kind.startswith("ln_") and kind != "wte"
        leaf = "kernel" if transpose else "embedding" if kind == "wte" else "scale"
    return SEPARATOR.join([*module.split("."), leaf]), transpose


def _from_flax(tensor: StoredTensor) -> StoredTensor:
    *module, leaf = tensor.name.split(SEPARATOR)
    if leaf == "kernel":
        tensor = tensor.transposed()
    if leaf in ("kernel", "embedding", "scale"):
        leaf = "weight"
    return tensor.renamed(".".join([*module, leaf]))


LAYOUT = Layout(
    classes=("GPTJModel", "GPTJForCausalLM"),
    single=SINGLE_FILE,
    shard="flax_model-{:05}-of-{:05}.msgpack",
    index=INDEX_FILE,
    name=lambda name, _: flax_name(name),
    index_name=lambda name, _: name,
    plan=lambda specs, *_: plan_msgpack({spec.name: spec for spec in specs}),
)
