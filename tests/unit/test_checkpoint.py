"""Model folders: saved ones load, here and in transformers; damage is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJTokenizer,
    storage,
)
from gptj.checkpoints.__main__ import main
from gptj.checkpoints.manifest import MANIFEST, FolderWriter, verify
from gptj.checkpoints.weights import TensorSpec, read_weights, write_weights
from gptj.errors import CheckpointError
from gptj.pretrained.saving import save_folder
from gptj_local.s3 import LocalS3

CONFIG = GPTJConfig(
    vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, num_labels=3
)
HEADS = {
    GPTJForCausalLM: transformers.AutoModelForCausalLM,
    GPTJForSequenceClassification: transformers.AutoModelForSequenceClassification,
    GPTJForQuestionAnswering: transformers.AutoModelForQuestionAnswering,
}
TOKENS = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))


def make(cls: type[Any] = GPTJForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    return cls(GPTJConfig(**{**CONFIG.to_dict(), "model_type": "gptj", **fields})).eval()


def main_output(output: Any) -> torch.Tensor:
    return output["start_logits"] if "start_logits" in output else output["logits"]


@pytest.mark.parametrize("cls", HEADS)
def test_transformers_loads_our_folder_with_equal_logits(cls: type[Any], tmp_path: Path) -> None:
    ours = make(cls)
    ours.save_pretrained(str(tmp_path / "model"))
    theirs = HEADS[cls].from_pretrained(tmp_path / "model").eval()
    assert type(theirs).__name__ == cls.__name__
    with torch.no_grad():
        expected, found = main_output(ours(TOKENS)), main_output(theirs(TOKENS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("shard", ["50GB", "40KB"])
def test_we_load_a_folder_of_transformers_with_equal_logits(
    cls: type[Any], shard: str, tmp_path: Path
) -> None:
    config = transformers.GPTJConfig(**make(cls).config_to_save().to_dict())
    theirs = getattr(transformers, cls.__name__)(config).eval()
    theirs.save_pretrained(tmp_path / "model", max_shard_size=shard)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shard == "40KB")
    ours = cls.from_pretrained(str(tmp_path / "model"))
    with torch.no_grad():
        expected, found = main_output(theirs(TOKENS)), main_output(ours(TOKENS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert ours.config.id2label == theirs.config.id2label


@pytest.mark.parametrize("place", ["folder", "s3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit(
    place: str, dtype: torch.dtype, tmp_path: Path, s3: LocalS3
) -> None:
    address = str(tmp_path / "model") if place == "folder" else f"s3://gptj/{tmp_path.name}/model"
    model = make().to(dtype)
    model.save_pretrained(address)
    back = GPTJForCausalLM.from_pretrained(address)
    assert back.dtype == dtype
    assert back.config.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    verify(address)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_shards_round_trip(place: str, tmp_path: Path, s3: LocalS3) -> None:
    address = str(tmp_path / "m") if place == "folder" else f"s3://gptj/{tmp_path.name}/m"
    state = make().state_dict()
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    with FolderWriter(address) as writer:
        write_weights(writer, specs, state.values(), shard_bytes=30_000)
        writer.write("config.json", CONFIG.to_json().encode())
    shards = [f.name for f in storage.list_files(address) if f.name.endswith(".safetensors")]
    assert len(shards) > 2
    assert shards[0].startswith("model-00001-of-")
    back = GPTJForCausalLM.from_pretrained(address)
    assert all(torch.equal(back.state_dict()[name], t) for name, t in state.items())


def test_weights_load_in_the_requested_dtype_on_the_requested_device(
    device: torch.device, tmp_path: Path
) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    for arguments in ({"dtype": torch.float16}, {"torch_dtype": "float16"}):
        model = GPTJForCausalLM.from_pretrained(str(tmp_path / "m"), device=device, **arguments)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert {p.device.type for p in model.parameters()} == {device.type}
        assert not model.training


MAPPED = """
import sys
from pathlib import Path
from gptj import GPTJForCausalLM

model = GPTJForCausalLM.from_pretrained(sys.argv[1])
sum(float(p.sum()) for p in model.parameters())
print("loaded", flush=True)
sys.stdin.readline()
own = {"Rss": 0, "Shared_Clean": 0, "Shared_Dirty": 0}  # dirty until the disk has it
counts = False
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, *rest = line.split()
    if "-" in name:
        counts = line.endswith("model.safetensors")
    elif counts and name[:-1] in own:
        own[name[:-1]] += int(rest[0]) * 1024
print(own["Rss"], own["Shared_Clean"] + own["Shared_Dirty"])
"""


@pytest.mark.slow
def test_processes_share_the_pages_of_local_weights(tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "m")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "loaded\n"
    measured, _ = processes[0].communicate("", timeout=60)
    processes[1].communicate("", timeout=60)
    used, shared = map(int, measured.split())
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size * 0.95 < shared == used, "all of it is in memory, and none of it twice"


def test_writing_to_local_weights_stays_private(tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = GPTJForCausalLM.from_pretrained(str(tmp_path / "m"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_each_mapped_weight_frees_its_own_memory(tmp_path: Path) -> None:
    """So copying or packing them one by one never holds the model twice."""
    make().save_pretrained(str(tmp_path / "m"))

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    tensors = [tensor for _, tensor in read_weights(str(tmp_path / "m"), None)]
    assert mappings() == len(tensors)
    parts = tensors.pop().view(-1)[:3]
    del tensors
    assert mappings() == 1
    assert torch.isfinite(parts).all()
    del parts
    assert mappings() == 0


@pytest.mark.parametrize("cls", [GPTJForSequenceClassification, GPTJForQuestionAnswering])
def test_a_language_model_becomes_another_head(
    cls: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    model = cls.from_pretrained(str(tmp_path / "m"), num_labels=5)
    assert torch.equal(model.transformer.wte.weight, make().transformer.wte.weight)
    assert "newly initialised" in caplog.text
    if cls is GPTJForSequenceClassification:
        assert model.score.weight.shape == (5, 32)
        assert model.score.weight.std() > 0


def test_base_model_and_heads_exchange_weights(tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path / "head"))
    base = GPTJModel.from_pretrained(str(tmp_path / "head"))
    base.save_pretrained(str(tmp_path / "base"))
    head = GPTJForCausalLM.from_pretrained(str(tmp_path / "base"))
    assert torch.equal(head.transformer.h[1].mlp.fc_in.weight, base.h[1].mlp.fc_in.weight)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(
            base(TOKENS).last_hidden_state, theirs(TOKENS).last_hidden_state, rtol=0, atol=1e-5
        )


def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=True)
    model.save_pretrained(str(tmp_path / "m"))
    assert "lm_head.weight" not in dict(read_weights(str(tmp_path / "m"), None))
    back = GPTJForCausalLM.from_pretrained(str(tmp_path / "m"))
    assert back.lm_head.weight is back.transformer.wte.weight
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, back(TOKENS).logits, rtol=0, atol=1e-5)


def test_old_pickles_load_without_their_buffers(tmp_path: Path) -> None:
    """As EleutherAI/gpt-j-6B was published: pytorch_model.bin with attn.bias and masked_bias."""
    model = make()
    state = dict(model.state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG.to_json())
    for zipped in (True, False):
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        back = GPTJForCausalLM.from_pretrained(str(folder))
        assert all(torch.equal(back.state_dict()[n], t) for n, t in model.state_dict().items())


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/evil",))

    (tmp_path / "config.json").write_text(CONFIG.to_json())
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        GPTJForCausalLM.from_pretrained(str(tmp_path))
    assert not (tmp_path / "evil").exists()


def damage(kind: str, folder: Path) -> str:
    """Damage a file in a way; returns what the error must name."""
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(content[:-100])
    elif kind == "altered":
        content[-50] ^= 1
        weights.write_bytes(content)
    elif kind == "config altered":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"n_positions": 64', '"n_positions": 63'))
        return "config.json"
    elif kind == "manifest damaged":
        (folder / MANIFEST).write_text('{"format": 1, "fil')
        return MANIFEST
    elif kind == "single file added":
        weights.rename(folder / "model-1.safetensors")
        (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace("model.safetensors", "model-1.safetensors")
        )
        weights.write_bytes(content)
    return "model.safetensors"


@pytest.mark.parametrize(
    "kind",
    ["missing", "truncated", "altered", "config altered", "manifest damaged", "single file added"],
)
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_damage_is_refused_by_name(kind: str, place: str, tmp_path: Path, s3: LocalS3) -> None:
    folder = tmp_path / "m"
    make().save_pretrained(str(folder))
    named = damage(kind, folder)
    address = str(folder)
    if place == "s3":
        address = f"s3://gptj/{tmp_path.name}/m"
        storage.upload_folder(folder, address)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        GPTJForCausalLM.from_pretrained(address)
    if kind != "single file added":  # `verify` reads what the manifest names
        with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
            verify(address)


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path: Path, s3: LocalS3) -> None:
    state = make().state_dict()
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]

    def failing() -> Any:
        yield from list(state.values())[:5]
        raise RuntimeError("power cut")

    for address in (str(tmp_path / "m"), f"s3://gptj/{tmp_path.name}/m"):
        with pytest.raises(RuntimeError, match="power cut"):
            save_folder(address, CONFIG, specs, failing())
        assert storage.list_files(address) == []
        with pytest.raises(FileNotFoundError, match="nothing is at"):
            GPTJForCausalLM.from_pretrained(address)
        with pytest.raises(CheckpointError, match="nothing is at"):
            verify(address)
        make().save_pretrained(address)  # and the place can be used again
        verify(address)


def test_a_finished_folder_is_never_changed(tmp_path: Path, s3: LocalS3) -> None:
    for address in (str(tmp_path / "m"), f"s3://gptj/{tmp_path.name}/m"):
        make().save_pretrained(address)
        with pytest.raises(FileExistsError, match="never changed"):
            make(n_layer=1).save_pretrained(address)
        assert GPTJForCausalLM.from_pretrained(address).config.n_layer == 2


def test_mismatched_weights_are_named(tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"mlp\.fc_in\.weight.*\(128, 32\).*\(99, 32\)"):
        GPTJForCausalLM.from_pretrained(str(tmp_path / "m"), n_inner=99)
    with pytest.raises(CheckpointError, match=r"incomplete: transformer\.h\.2\.attn.* missing"):
        GPTJForCausalLM.from_pretrained(str(tmp_path / "m"), n_layer=3)
    with pytest.raises(CheckpointError, match=r"no GPT-J of this configuration has.*h\.1"):
        GPTJForCausalLM.from_pretrained(str(tmp_path / "m"), n_layer=1)


def test_another_models_folder_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama'"):
        GPTJConfig.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not an existing folder"):
        GPTJConfig.from_pretrained(str(tmp_path / "not there"))


@pytest.mark.slow
def test_verify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    main(["verify", str(tmp_path / "m")])
    assert "good: 2 files" in capsys.readouterr().out
    command = [sys.executable, "-m", "gptj.checkpoints", "verify", str(tmp_path / "m")]
    damage("altered", tmp_path / "m")
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "altered after it was written" in bad.stderr


def said_by_verify(address: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["verify", address])
    assert isinstance(ended.value.code, str), "status 1, and the reason"
    return ended.value.code


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_verify_reports_every_damaged_file(place: str, tmp_path: Path, s3: LocalS3) -> None:
    folder = tmp_path / "m"
    with FolderWriter(str(folder)) as writer:
        for name in ("altered", "longer", "shorter", "missing", "good", "lied-size", "lied-hash"):
            writer.write(name, b"0123456789")
    (folder / "altered").write_bytes(b"0123456780")
    (folder / "longer").write_bytes(b"0123456789a")
    (folder / "shorter").write_bytes(b"012345678")
    (folder / "missing").unlink()
    (folder / "extra").write_bytes(b"")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["lied-size"]["size"] = 11
    manifest["files"]["lied-hash"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    address = str(folder)
    if place == "s3":
        address = f"s3://gptj/{tmp_path.name}/m"
        storage.upload_folder(folder, address)
    lines = [line.removeprefix(f"{address}/") for line in said_by_verify(address).splitlines()]
    reasons = {line.split()[0]: line for line in lines}
    assert len(lines) == len(reasons) == 7
    assert "good" not in reasons
    assert "altered after it was written" in reasons["altered"]
    assert "has 11 bytes but should have 10" in reasons["longer"]
    assert reasons["shorter"].endswith("it is truncated")
    assert reasons["missing"] == "missing is missing"
    assert "is not in the folder's manifest" in reasons["extra"]
    assert "has 10 bytes but should have 11" in reasons["lied-size"]
    assert "the manifest says " + "0" * 64 in reasons["lied-hash"]


def test_verify_reports_invalid_addresses(
    tmp_path: Path, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing is at " in said_by_verify(str(tmp_path / "not there"))
    make().save_pretrained(str(tmp_path / "m"))
    (tmp_path / "m" / MANIFEST).unlink()
    assert "it was never finished" in said_by_verify(str(tmp_path / "m"))
    assert "nothing is at " in said_by_verify(f"s3://gptj/{tmp_path.name}/not-there")
    assert "no bucket 'other'" in said_by_verify("s3://other/model")
    with pytest.raises(FileNotFoundError, match="no bucket 'other'"):
        GPTJForCausalLM.from_pretrained("s3://other/model")
    assert "s3://bucket/key" in said_by_verify("s3://")
    (tmp_path / MANIFEST).write_text("{")
    assert f"{tmp_path / MANIFEST} is damaged" in said_by_verify(str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = said_by_verify(f"s3://gptj/{tmp_path.name}/m")
    assert "does not accept the credentials" in said
    assert "AWS_SECRET_ACCESS_KEY" in said


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_hashes_are_verified_by_default(place: str, tmp_path: Path, s3: LocalS3) -> None:
    make().save_pretrained(str(tmp_path / "m"))
    damage("altered", tmp_path / "m")
    address = str(tmp_path / "m")
    if place == "s3":
        address = f"s3://gptj/{tmp_path.name}/m"
        storage.upload_folder(tmp_path / "m", address)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
        GPTJForCausalLM.from_pretrained(address)
    assert GPTJForCausalLM.from_pretrained(address, verify=False).config.n_layer == 2


def test_training_and_tokenizer_are_in_the_folder(tmp_path: Path) -> None:
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    make().save_pretrained(str(tmp_path / "m"), tokenizer=tokenizer, training={"steps": 3})
    names = set(json.loads((tmp_path / "m" / MANIFEST).read_text())["files"])
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    back = GPTJTokenizer.from_pretrained(str(tmp_path / "m"))
    assert back.encode("some text") == tokenizer.encode("some text")
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(path.read_text().replace("some", "none", 1) + " ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        GPTJTokenizer.from_pretrained(str(tmp_path / "m"))


def test_a_tokenizer_can_be_saved_beside_a_finished_model(tmp_path: Path) -> None:
    """As Hugging Face's users do; the model's files stay what its manifest says."""
    make().save_pretrained(str(tmp_path / "m"))
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    tokenizer.save_pretrained(tmp_path / "m")
    back = GPTJTokenizer.from_pretrained(str(tmp_path / "m"))
    assert back.encode("some text") == tokenizer.encode("some text")
    assert GPTJForCausalLM.from_pretrained(str(tmp_path / "m")).config.n_layer == 2


MEASURED = """
import sys, threading, time
from gptj import GPTJForCausalLM
import gptj.checkpoints.folder

def own_megabytes():  # without mapped files, which the system can drop
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, own_megabytes())

for dtype in sys.argv[2:]:
    model = None
    before = peak = own_megabytes()
    ended = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    model = GPTJForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
    ended.set()
    thread.join()
    print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """210 MB of fp32."""
    folder = tmp_path_factory.mktemp("large")
    config = GPTJConfig(n_embd=512, n_layer=1, n_head=8, rotary_dim=64)
    GPTJForCausalLM(config).save_pretrained(str(folder / "m"))
    return folder / "m"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "copies"),
    [
        ("folder", {"auto": 0.0, "float16": 1.0}),  # mapped, not copied
        # And a tensor as it is stored, while the next one comes: here each is as large as half of
        # the model in fp32, of the real one a thirtieth.
        ("s3", {"auto": 1.0, "float16": 3.0}),
    ],
    ids=["folder", "s3"],
)
def test_loading_makes_no_second_copy(
    place: str, copies: dict[str, float], large: Path, s3: LocalS3
) -> None:
    """Peak memory beside mapped files, in copies of the loaded model; 120 MiB are for programs."""
    address = str(large)
    if place == "s3":
        address = "s3://gptj/large"
        storage.upload_folder(large, address)
    command = [sys.executable, "-c", MEASURED, address, *copies]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (dtype, most), line in zip(copies.items(), done.stdout.splitlines(), strict=True):
        peak, size = map(float, line.split())
        assert peak < most * size + 120, f"{dtype}: {peak:.0f} MiB for a model of {size:.0f} MiB"


@pytest.mark.parametrize("file", ["small", "large"])
def test_a_writer_that_stalled_never_alters_a_finished_folder(file: str, tmp_path: Path) -> None:
    """It starts while the folder is unfinished, and wakes up after another has finished it."""
    address = str(tmp_path / "model")
    with (
        pytest.raises(storage.AlreadyExistsError, match="already holds a finished checkpoint"),
        FolderWriter(address) as late,
    ):
        if file == "large":
            with late.open("weights", 4) as target:
                target.write(b"late")
                with FolderWriter(address) as other:
                    other.write("weights", b"good")
        else:
            with FolderWriter(address) as other:
                other.write("weights", b"good")
            late.write("weights", b"late")
    assert (tmp_path / "model" / "weights").read_bytes() == b"good"
    verify(address)


def test_a_fenced_writer_writes_nothing_more(tmp_path: Path) -> None:
    allowed = [True, True]

    def fence() -> None:
        if not allowed:
            raise RuntimeError("another one has taken over")
        allowed.pop()

    with (
        pytest.raises(RuntimeError, match="taken over"),
        FolderWriter(tmp_path / "m", fence=fence) as late,
    ):
        late.write("first", b"1")
        late.write("second", b"2")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["first"]


def test_of_two_writers_only_one_may_finish_a_folder(tmp_path: Path) -> None:
    """The second took the first one's files for a dead writer's."""
    address = str(tmp_path / "model")
    with (
        pytest.raises(storage.AlreadyExistsError, match="has changed weights"),
        FolderWriter(address) as first,
    ):
        first.write("weights", b"first's")
        second = FolderWriter(address).__enter__()
        second.write("weights", b"second's")
    second.__exit__(None)
    verify(address)
    assert (tmp_path / "model" / "weights").read_bytes() == b"second's"
