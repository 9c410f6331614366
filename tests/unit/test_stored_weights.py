"""Inconsistent weights: several dtypes, or ties between unequal matrices.

Each way in, with transformers as the reference: folders of ours and others, mapped, from S3, from
the cache, imported from each format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj import GPTJConfig, GPTJForCausalLM, GPTJModel, GPTJTokenizer, storage
from gptj.checkpoints.manifest import verify
from gptj.checkpoints.weights import TensorSpec, read_weights
from gptj.errors import CheckpointError
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.pretrained.saving import save_folder
from jobs import evaluate

CONFIG = GPTJConfig(
    vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, pad_token_id=0
)
TOKENS = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
WAYS_IN = ["a folder of ours", "a folder of others", "S3", "the cache"]

State = dict[str, torch.Tensor]


def state_of(*, dtype: torch.dtype = torch.float32, **replaced: torch.dtype) -> State:
    """A model's weights in a dtype, and some parameters in another."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(CONFIG)
    return {
        name: tensor.detach().to(replaced.get(name.partition(".")[0], dtype))
        for name, tensor in model.state_dict().items()
    }


def save(state: State, address: str, tokenizer: GPTJTokenizer | None = None, **fields: Any) -> None:
    """A folder of ours, as any program may have put it together."""
    config = GPTJConfig.from_dict(
        {**CONFIG.to_dict(), "architectures": ["GPTJForCausalLM"], **fields}
    )
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    save_folder(address, config, specs, state.values(), tokenizer=tokenizer)


@pytest.fixture(params=WAYS_IN)
def address(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Where a folder is to be saved, to be read in one of the ways."""
    if request.param in ("S3", "the cache"):
        request.getfixturevalue("s3")
        if request.param == "the cache":
            monkeypatch.setenv("GPTJ_CACHE_FOLDER", str(tmp_path / "cache"))
            monkeypatch.setenv("GPTJ_CACHE_GB", "1")
        yield f"s3://gptj/stored/{tmp_path.name}/m"
    else:
        yield str(tmp_path / "m")


def made_foreign(address: str, request: pytest.FixtureRequest) -> None:
    """Remove our manifest if another program's folder is meant."""
    if request.node.callspec.params["address"] == "a folder of others":
        storage.delete(storage.join(address, "manifest.json"))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("named", ["bfloat16", None])
def test_weights_in_two_dtypes_become_one(
    named: str | None,
    address: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """bf16 with an fp32 head: the configuration's dtype, or else that of most."""
    save(state_of(dtype=torch.bfloat16, lm_head=torch.float32), address, dtype=named)
    made_foreign(address, request)
    model = GPTJForCausalLM.from_pretrained(address)
    expected = GPTJForCausalLM(CONFIG).bfloat16().eval()
    expected.load_state_dict(state_of(dtype=torch.bfloat16))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert torch.equal(logits_of(model), logits_of(expected))
    assert "torch.bfloat16, torch.float32: converting all to torch.bfloat16" in caplog.text
    assert GPTJForCausalLM.from_pretrained(address, dtype="float32").dtype == torch.float32
    if not storage.is_s3(address):  # what agrees is mapped as before
        assert f"{address}/model.safetensors" in Path("/proc/self/maps").read_text()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(address).eval()
        if named:
            assert theirs.lm_head.weight.dtype == torch.bfloat16


def test_the_configurations_dtype_decides_if_some_weights_have_it(tmp_path: Path) -> None:
    mixed = state_of(dtype=torch.bfloat16, lm_head=torch.float32)
    save(mixed, str(tmp_path / "wide"), dtype="float32")
    wide = GPTJForCausalLM.from_pretrained(str(tmp_path / "wide"))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    save(mixed, str(tmp_path / "none"), dtype="float16")
    none = GPTJForCausalLM.from_pretrained(str(tmp_path / "none"))
    assert {p.dtype for p in none.parameters()} == {torch.bfloat16}
    # One dtype is kept as it is stored, whatever the configuration says.
    save(state_of(), str(tmp_path / "one"), dtype="float16")
    assert GPTJForCausalLM.from_pretrained(str(tmp_path / "one")).dtype == torch.float32
    # A head that is made new has the dtype of the others.
    base = {n: t for n, t in mixed.items() if not n.startswith("lm_head.")}
    base["transformer.ln_f.weight"] = base["transformer.ln_f.weight"].float()
    save(base, str(tmp_path / "base"))
    found = GPTJForCausalLM.from_pretrained(str(tmp_path / "base"))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_a_value_that_overflows_the_common_dtype_is_named(tmp_path: Path) -> None:
    state = state_of(dtype=torch.float16, lm_head=torch.float32)
    state[HEAD][5, 3] = 70_000
    save(state, str(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* too large for torch\.float16"):
        GPTJForCausalLM.from_pretrained(str(tmp_path / "m"))
    model = GPTJForCausalLM.from_pretrained(str(tmp_path / "m"), dtype="float32")
    assert model.lm_head.weight[5, 3] == 70_000
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has values up to 70000"):
        import_weights(str(tmp_path / "m"), str(tmp_path / "imported"))


def test_a_checkpoint_in_two_dtypes_is_evaluated(tmp_path: Path) -> None:
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 270)
    mixed = state_of(dtype=torch.bfloat16, lm_head=torch.float32)
    save(mixed, str(tmp_path / "m"), tokenizer)
    (tmp_path / "rows.txt").write_text("some text to measure on, and some more of it")
    words = [str(tmp_path / "m"), str(tmp_path / "rows.txt")]
    result = evaluate.measure(evaluate.read_settings(words))
    assert 4 < float(result["loss"]) < 8


def test_a_stored_head_that_differs_is_kept_whatever_the_configuration_says(
    address: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers: tie_word_embeddings, and two matrices that are not equal."""
    state = state_of()
    save(state, address, tie_word_embeddings=True)
    made_foreign(address, request)
    model = GPTJForCausalLM.from_pretrained(address)
    assert "an lm_head.weight that differs from its embedding" in caplog.text
    assert torch.equal(model.lm_head.weight, state[HEAD])
    assert torch.equal(model.transformer.wte.weight, state[EMBEDDING])
    assert not model.config.tie_word_embeddings
    if storage.is_s3(address):
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(address).eval()
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=0, atol=1e-5)
    # It is saved so that nobody ties it again; a base model needs no head.
    model.save_pretrained(f"{address}-again")
    assert json.loads(Path(f"{address}-again/config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    again = GPTJForCausalLM.from_pretrained(f"{address}-again")
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(GPTJModel.from_pretrained(address).wte.weight, state[EMBEDDING])


@pytest.mark.parametrize("stored", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_tied_weights_stay_tied_whether_stored_once_or_twice(
    stored: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of()
    matrix = state[EMBEDDING]
    others = {n: t for n, t in state.items() if n not in (EMBEDDING, HEAD)}
    save({**others, **dict.fromkeys(stored, matrix)}, str(tmp_path / "m"), tie_word_embeddings=True)
    model = GPTJForCausalLM.from_pretrained(str(tmp_path / "m"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, matrix)
    assert model.config.tie_word_embeddings
    import_weights(str(tmp_path / "m"), str(tmp_path / "imported"))
    names = set(dict(read_weights(str(tmp_path / "imported"), None)))
    assert EMBEDDING in names
    assert HEAD not in names
    imported = GPTJForCausalLM.from_pretrained(str(tmp_path / "imported"))
    assert torch.equal(imported.lm_head.weight, matrix)
    assert "differs" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("export", ["huggingface", "flax", "tensorflow"])
def test_imports_and_exports_have_one_dtype_and_their_own_head(
    pickled: bool, export: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(dtype=torch.float16, lm_head=torch.float32)
    source = tmp_path / "source"
    save(state, str(source), tie_word_embeddings=True, dtype="float16")
    if pickled:
        for name in ("model.safetensors", "manifest.json"):
            (source / name).unlink()
        torch.save(state, source / "pytorch_model.bin")
    import_weights(str(source), str(tmp_path / "imported"))
    assert "torch.float16, torch.float32: converting all to torch.float16" in caplog.text
    assert "an lm_head.weight that differs" in caplog.text
    export_weights(str(tmp_path / "imported"), str(tmp_path / "exported"), format=export)
    import_weights(str(tmp_path / "exported"), str(tmp_path / "back"))
    for folder in ("imported", "back"):
        model = GPTJForCausalLM.from_pretrained(str(tmp_path / folder))
        assert not model.config.tie_word_embeddings
        assert model.config.dtype == torch.float16
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name].half()), (folder, name)
    verify(str(tmp_path / "imported"))


def scalar(dtype: torch.dtype) -> State:
    return {HEAD: torch.zeros(2).to(dtype)}


NOT_PLAIN: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], r"it holds \[1, 2\] of type list"),
    "tensor": (torch.zeros(3), r"it holds a tensor of shape \(3,\)"),
    "number as a name": ({1: torch.zeros(2)}, "it has the name 1"),
    "number": ({**scalar(torch.float32), "step": 3}, "step is 3 of type int"),
    "settings": ({**scalar(torch.float32), "args": {"a": 1}}, "args is {'a': 1} of type dict"),
    "training": (
        {"epoch": 1, "state_dict": scalar(torch.float32)},
        r"training checkpoint, .* remedy: torch\.save\(.*\['state_dict'\], FILE\)",
    ),
    "sparse": ({HEAD: torch.eye(3).to_sparse()}, f"{HEAD} is a torch.sparse_coo tensor"),
    "complex": (scalar(torch.complex64), f"{HEAD} has the dtype torch.complex64, which is not"),
    "fp8": (scalar(torch.float8_e4m3fn), "(has the dtype torch.float8_e4m3fn|damaged)"),
    "empty": (b"", "is damaged"),
    "another pickle": (b"\x80\x02K\x01.", "is damaged"),
    "text": (b"not a pickle", "is damaged"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_file_that_is_not_a_plain_state_dict_is_refused_by_name(
    kind: str, zipped: bool, tmp_path: Path
) -> None:
    """As it is loaded, and as it is imported."""
    content, message = NOT_PLAIN[kind]
    source = tmp_path / "source"
    save(state_of(), str(source))
    for name in ("model.safetensors", "manifest.json"):
        (source / name).unlink()
    file = source / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*{message}"):
        GPTJForCausalLM.from_pretrained(source)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*{message}"):
        import_weights(str(source), str(tmp_path / "imported"))


def test_exports_of_inconsistent_weights_are_consistent(tmp_path: Path) -> None:
    """Straight from such a folder, without an import."""
    state = state_of(dtype=torch.bfloat16, lm_head=torch.float32)
    save(state, str(tmp_path / "m"), tie_word_embeddings=True, dtype="bfloat16")
    export_weights(str(tmp_path / "m"), str(tmp_path / "e"), format="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert torch.equal(theirs.lm_head.weight, state[HEAD].bfloat16())
