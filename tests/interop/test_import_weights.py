"""jobs/import_weights.py: files of Hugging Face in, a model folder out, or what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gapped_tokenizer import gapped
from test_hub import MAIN, OLD, REPOSITORY, Client, Hub, serving

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJTokenizer,
    storage,
)
from gptj.checkpoints.folder import check_outside
from gptj.checkpoints.manifest import verify
from gptj.checkpoints.weights import read_weights
from gptj.errors import CheckpointError
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.interop.merging import merge_adapter
from gptj.pretrained import GPTJPreTrainedModel
from gptj.quantization.quantizer import quantize_model
from gptj_local.s3 import LocalS3

JOB = Path(__file__).parents[2] / "jobs" / "import_weights.py"
CONFIG = GPTJConfig(
    vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, num_labels=3
)
CLASSES = [
    GPTJModel,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    GPTJForQuestionAnswering,
]


def make(cls: type[GPTJPreTrainedModel] = GPTJForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = GPTJConfig.from_dict({**CONFIG.to_dict(), **fields})
    if cls is GPTJForQuestionAnswering:
        config.num_labels = 2
    return cls(config).eval()


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return make()  # type: ignore[no-any-return]


def check_equal(address: str, model: GPTJPreTrainedModel) -> None:
    """The folder is finished, of the model's class, and has each of its weights, bit by bit."""
    verify(address)
    found = type(model).from_pretrained(address)
    assert found.config.architectures == [type(model).__name__]
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def write_theirs(kind: str, model: GPTJForCausalLM, folder: Path) -> None:
    """A folder as Hugging Face's programs, old and new, have written them."""
    folder.mkdir()
    state = dict(model.state_dict())
    # Old checkpoints carry the causal mask and its value.
    for layer in range(model.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    if kind.startswith("safetensors"):
        config = transformers.GPTJConfig(**model.config_to_save().to_dict())
        theirs = transformers.GPTJForCausalLM(config)
        theirs.load_state_dict(model.state_dict())
        theirs.save_pretrained(folder, max_shard_size="40KB" if "sharded" in kind else "5GB")
        return
    (folder / "config.json").write_text(model.config.to_json())
    if kind == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "pickle before PyTorch 1.6":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "pickle of views":
        # Some lie transposed, or side by side in one storage.
        name = "transformer.h.0.mlp.fc_in.weight"
        state[name] = state[name].T.contiguous().T
        both = torch.stack([state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]])
        state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = both
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "pickle sharded":
        weight_map = {}
        for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save({name: state[name] for name in names}, folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


KINDS = [
    "safetensors",
    "safetensors sharded",
    "pickle",
    "pickle sharded",
    "pickle of views",
    "pickle before PyTorch 1.6",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_every_kind_of_hugging_face_folder_imports(
    kind: str, place: str, model: GPTJForCausalLM, tmp_path: Path, s3: LocalS3
) -> None:
    write_theirs(kind, model, tmp_path / "theirs")
    source, destination = str(tmp_path / "theirs"), str(tmp_path / "ours")
    if place == "s3":
        source, destination = (f"s3://gptj/{tmp_path.name}/{name}" for name in ("theirs", "ours"))
        storage.upload_folder(tmp_path / "theirs", source)
    import_weights(source, destination)
    check_equal(destination, model)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_head_imports(cls: type[GPTJPreTrainedModel], tmp_path: Path) -> None:
    """Saved by transformers, whose base model has no prefix and whose config names the class."""
    ours = make(cls)
    theirs = getattr(transformers, cls.__name__)(
        transformers.GPTJConfig(**ours.config_to_save().to_dict())
    )
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    check_equal(str(tmp_path / "ours"), ours)
    found = GPTJConfig.from_pretrained(str(tmp_path / "ours"))
    assert found.id2label == ours.config.id2label


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=True)
    write_theirs("pickle", model, tmp_path / "theirs")  # which has both names
    import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert "lm_head.weight" not in dict(read_weights(str(tmp_path / "ours"), None))
    check_equal(str(tmp_path / "ours"), model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_converted_to_the_requested_dtype(
    dtype: str, model: GPTJForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(str(tmp_path / "source"))
    import_weights(str(tmp_path / "source"), str(tmp_path / "ours"), dtype=dtype)
    check_equal(str(tmp_path / "ours"), make().to(getattr(torch, dtype)))
    assert GPTJConfig.from_pretrained(str(tmp_path / "ours")).dtype == getattr(torch, dtype)


def test_an_overflow_is_named_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """float16 ends at 65504; infinities that were there before are the model's own matter."""
    model = make()
    with torch.no_grad():
        model.lm_head.bias[0] = -torch.inf
    model.save_pretrained(str(tmp_path / "infinite"))
    import_weights(str(tmp_path / "infinite"), str(tmp_path / "good"), dtype="float16")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = -70_000
    model.save_pretrained(str(tmp_path / "large"))
    with pytest.raises(CheckpointError, match=r"ln_f\.weight has values up to 70000.*bfloat16"):
        import_weights(str(tmp_path / "large"), str(tmp_path / "bad"), dtype="float16")
    assert storage.list_files(str(tmp_path / "bad")) == []
    with pytest.raises(FileNotFoundError, match="nothing is at"):
        GPTJForCausalLM.from_pretrained(str(tmp_path / "bad"))


@pytest.mark.slow
def test_a_killed_import_leaves_no_checkpoint(model: GPTJForCausalLM, tmp_path: Path) -> None:
    """Killed in the middle of the weights; the same command then says what to do."""
    model.save_pretrained(str(tmp_path / "source"))
    program = """
import os, signal, sys
from gptj.interop import conversion, importer
read, left = conversion._read, 5
def count(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments)
conversion._read = count
checkpoint = importer.save_folder
importer.save_folder = lambda *a, **k: checkpoint(*a, **k, shard_bytes=20_000)
importer.import_weights(sys.argv[1], sys.argv[2])
"""
    source, destination = str(tmp_path / "source"), str(tmp_path / "ours")
    done = subprocess.run([sys.executable, "-c", program, source, destination])
    assert done.returncode == -9
    assert any(file.name.startswith("model-") for file in storage.list_files(destination))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        GPTJForCausalLM.from_pretrained(destination)
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        verify(destination)
    with pytest.raises(FileExistsError, match=r"model-0.*interrupted run.*delete it first"):
        import_weights(source, destination)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_finished_folder_is_not_overwritten(
    place: str, model: GPTJForCausalLM, tmp_path: Path, s3: LocalS3
) -> None:
    model.save_pretrained(str(tmp_path / "source"))
    destination = str(tmp_path / "m") if place == "folder" else f"s3://gptj/{tmp_path.name}/m"
    import_weights(str(tmp_path / "source"), destination)
    with pytest.raises(FileExistsError, match="already holds files"):
        import_weights(str(tmp_path / "source"), destination)
    check_equal(destination, model)


CONVERSIONS: dict[str, Callable[[str, str, str], object]] = {  # of a model and another folder
    "import": lambda model, other, to: import_weights(model, to),
    "import, from the tokenizer's": lambda model, other, to: import_weights(
        other, to, tokenizer=model
    ),
    "export": lambda model, other, to: export_weights(model, to, format="flax"),
    "quantize": lambda model, other, to: quantize_model(model, to, None),
    "merge, from the base's": lambda model, other, to: merge_adapter(model, other, to),
    "merge, from the adapter's": lambda model, other, to: merge_adapter(other, model, to),
}


@pytest.mark.parametrize("place", ["absolute", "relative", "linked", "s3"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_folder_within_a_source_is_refused(
    conversion: str,
    place: str,
    model: GPTJForCausalLM,
    tmp_path: Path,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would not be in the source's manifest, which would then count as damaged."""
    monkeypatch.chdir(tmp_path)
    source = f"s3://gptj/{tmp_path.name}/m" if place == "s3" else str(tmp_path / "m")
    model.save_pretrained(source)
    parent = {"relative": "m", "linked": "link"}.get(place, source)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for destination in (f"{parent}/int4", f"{parent}/a/b", parent):
        with pytest.raises(ValueError, match=r"is within .* no longer match its manifest; remedy"):
            CONVERSIONS[conversion](source, str(tmp_path / "other"), destination)
    verify(source)


def test_a_folder_beside_a_source_or_named_like_a_hub_id_is_not_within_it(
    model: GPTJForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("m")
    for destination in ("m-int4", "a/m", "./m2"):
        import_weights("m", destination)
        verify(destination)
    check_outside("owner/model/int4", "owner/model")


def test_a_damaged_folder_of_ours_is_refused(model: GPTJForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "source"))
    path = tmp_path / "source" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
        import_weights(str(tmp_path / "source"), str(tmp_path / "ours"))


def test_the_tokenizer_is_the_sources_or_the_given_one(
    model: GPTJForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    model.save_pretrained(str(tmp_path / "with"), tokenizer=tokenizer, training={"a": 1})
    model.save_pretrained(str(tmp_path / "without"))
    import_weights(str(tmp_path / "with"), str(tmp_path / "one"))
    assert json.loads((tmp_path / "one" / "training.json").read_text()) == {"a": 1}
    assert "no tokenizer" not in caplog.text
    import_weights(
        str(tmp_path / "without"), str(tmp_path / "two"), tokenizer=str(tmp_path / "one")
    )
    for name in ("one", "two"):
        found = GPTJTokenizer.from_pretrained(str(tmp_path / name))
        assert found.encode("some text") == tokenizer.encode("some text")
    import_weights(str(tmp_path / "without"), str(tmp_path / "three"))
    assert "without has no tokenizer" in caplog.text
    assert not (tmp_path / "three" / "tokenizer.json").exists()
    GPTJTokenizer.train([Path(__file__).read_text()], 400).save_pretrained(tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"large: .* an id 399 .* vocab_size is 300"):
        import_weights(
            str(tmp_path / "without"), str(tmp_path / "four"), tokenizer=str(tmp_path / "large")
        )
    gapped(tokenizer, 300).save_pretrained(tmp_path / "gapped")
    with pytest.raises(CheckpointError, match=r"gapped: the tokenizer has an id 300 .*'z'"):
        import_weights(
            str(tmp_path / "without"), str(tmp_path / "five"), tokenizer=str(tmp_path / "gapped")
        )


def edit(kind: str, state: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    if kind == "missing":
        del state["transformer.h.1.attn.k_proj.weight"]
    elif kind == "too much":
        state["transformer.h.7.attn.k_proj.weight"] = torch.zeros(32, 32)
    elif kind == "shape":
        state["transformer.h.1.mlp.fc_in.bias"] = torch.zeros(7)
    elif kind == "dtype":
        state["transformer.ln_f.bias"] = torch.zeros(32, dtype=torch.int32)
    elif kind == "layers":
        fields["n_layer"] = 999
    elif kind == "another model":
        fields["model_type"] = "llama"
    elif kind == "several heads":
        state["score.weight"] = torch.zeros(3, 32)
        fields["architectures"] = None
    elif kind == "no head":
        del state["lm_head.weight"], state["lm_head.bias"]
    elif kind == "head of another class":
        fields["architectures"] = ["GPTJForSequenceClassification"]
        del state["lm_head.bias"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"h\.1\.attn\.k_proj\.weight is missing"),
        ("too much", r"h\.7\.attn\.k_proj\.weight is not part of a GPTJForCausalLM"),
        ("shape", r"h\.1\.mlp\.fc_in\.bias has the shape \(7,\), but .* \(128,\)"),
        ("dtype", r"ln_f\.bias has the dtype torch\.int32"),
        ("layers", "too few for the 999 layers"),
        ("another model", "'llama'"),
        ("several heads", "several heads.*GPTJForCausalLM, GPTJForSequenceClassification"),
        ("no head", r"lm_head\.\w+ is missing; lm_head\.\w+ is missing"),
        ("head of another class", r"lm_head\.bias is missing"),
    ],
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_mismatches_are_named(
    kind: str, message: str, file: str, model: GPTJForCausalLM, tmp_path: Path
) -> None:
    state, fields = dict(model.state_dict()), model.config_to_save().to_dict()
    edit(kind, state, fields)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        from safetensors.torch import save_file

        save_file(state, folder / file)
    with pytest.raises(CheckpointError, match=message):
        import_weights(str(folder), str(tmp_path / "ours"))
    assert storage.list_files(str(tmp_path / "ours")) == []


def test_a_pickle_that_runs_code_is_refused(model: GPTJForCausalLM, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/evil",))

    folder = tmp_path / "theirs"
    for zipped in (True, False):
        write_theirs("pickle", model, folder)
        torch.save(
            {"transformer.wte.weight": Evil()},
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin is damaged, or holds objects other"
        ):
            import_weights(str(folder), str(tmp_path / "ours"))
        assert not (tmp_path / "evil").exists()
        folder = tmp_path / "older"


def test_addresses_without_weights_are_explained(model: GPTJForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*flax_model.*tf_model.*shard_0"):
        import_weights(str(tmp_path / "empty"), str(tmp_path / "ours"))
    with pytest.raises(FileNotFoundError, match="not an existing folder"):
        import_weights(str(tmp_path / "not there"), str(tmp_path / "ours"))
    write_theirs("pickle", model, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"theirs has no weights.*looked for flax_model"):
        import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"), format="flax")
    with pytest.raises(ValueError, match="only hub ids have revisions"):
        import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"), revision="main")
    with pytest.raises(ValueError, match="drop the format flax"):
        import_weights(str(tmp_path / "m.tar.zst"), str(tmp_path / "ours"), format="flax")
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; remedy"):
        import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    (tmp_path / "given.json").write_text(model.config.to_json())
    given = str(tmp_path / "given.json")
    import_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"), config=given)
    check_equal(str(tmp_path / "ours"), model)


@pytest.mark.slow
def test_a_hub_id_imports_at_its_revision(model: GPTJForCausalLM, tmp_path: Path) -> None:
    """As GPT-J is published: a pickle on one branch, and on another the weights of Flax."""
    write_theirs("pickle", model, tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    flax = Path(__file__).parent / "fixtures" / "FlaxGPTJForCausalLM"
    others = {path.name: path.read_bytes() for path in flax.iterdir()}
    program = f"""
import sys
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.interop.merging import merge_adapter
import_weights({REPOSITORY!r}, "ours")
import_weights({REPOSITORY!r}, "flax", revision="old")
"""
    with serving(Hub({MAIN: files, OLD: others})) as hub:
        Client(tmp_path / "cache").run(
            hub.endpoint, f"import os; os.chdir({str(tmp_path)!r}){program}"
        )
    check_equal(str(tmp_path / "ours"), model)
    assert GPTJConfig.from_pretrained(str(tmp_path / "flax")).vocab_size == 48


@pytest.mark.slow
def test_the_command_prints_the_address_and_logs_progress(
    model: GPTJForCausalLM, tmp_path: Path
) -> None:
    write_theirs("pickle", model, tmp_path / "theirs")
    command = [sys.executable, str(JOB), str(tmp_path / "theirs"), str(tmp_path / "ours")]
    done = subprocess.run([*command, "--dtype", "float16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'ours'}\n"
    assert "has the format huggingface" in done.stderr
    tensors = len(model.state_dict())
    assert f"tensor {tensors} of {tensors}, 0.00 of 0.00 GB, 0 s, 0 s left" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "already holds files" in again.stderr
    assert "Traceback" not in again.stderr
