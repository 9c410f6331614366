"""Addresses: valid ones are normalized, all others refused with the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.loading import Arguments
from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.checkpoints.__main__ import main
from gptj.checkpoints.cache import CheckpointCache
from gptj.checkpoints.hub import locate
from gptj.data.sources import read_rows
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.storage.addresses import AddressError, absolute, is_s3, local_path, normalized, split_s3
from gptj.training.settings import SettingsError, read_settings
from gptj_bench import __main__ as benchmark
from jobs import evaluate
from jobs import export_weights as export_job
from jobs import import_weights as import_job

ROOT = Path(__file__).resolve().parents[2]
TINY = GPTJConfig(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)


@pytest.mark.parametrize(
    ("address", "spelling"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/train/*.parquet", "s3://bucket/train/*.parquet"),
        ("s3://bucket/run 1/ü", "s3://bucket/run 1/ü"),
        ("out", "out"),
        ("out/", "out"),
        ("./out", "./out"),
        (".", "."),
        ("/", "/"),
        ("/a//b/", "/a//b"),
        ("12:30", "12:30"),
        ("./gs://x", "./gs://x"),
        (Path("/a/b"), "/a/b"),
        ("EleutherAI/gpt-j-6B", "EleutherAI/gpt-j-6B"),
        ("~", "/home/someone"),
        ("~/x/", "/home/someone/x"),
        ("./~/x", "./~/x"),
    ],
)
def test_valid_addresses_are_normalized(
    address: str | Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert normalized(address) == spelling
    assert normalized(spelling) == spelling


UNKNOWN = [
    ("gs://bucket/x", "gs:// is not supported.*remedy: copy it"),
    ("hdfs://host/x", "hdfs:// is not supported.*remedy: copy it"),
    ("https://host/x", "https:// is not supported.*remedy: copy it"),
    ("s3a://bucket/x", "remedy: s3://bucket/x$"),
    ("s3n://bucket/x", "remedy: s3://bucket/x$"),
    ("S3://bucket/x", "remedy: s3://bucket/x$"),
    ("s3:/bucket/x", "remedy: s3://bucket/x$"),
    (str(Path("s3://bucket/x")), "remedy: s3://bucket/x$"),
    ("file:///data/x", "remedy: give only the path: /data/x$"),
    ("file:/data/x", "remedy: give only the path: /data/x$"),
    ("file://localhost/data/x", "remedy: give only the path: /data/x$"),
    ("hf://EleutherAI/gpt-j-6B", "give only its id: EleutherAI/gpt-j-6B$"),
    (
        "https://huggingface.co/EleutherAI/gpt-j-6B/tree/main",
        "give only its id: EleutherAI/gpt-j-6B$",
    ),
    ("", "the address is empty"),
    ("  ", "the address is empty"),
    (" s3://bucket/x", "white space around it"),
    ("s3://bucket/x\n", "white space around it"),
    ("a\0b", "control characters"),
    ('"s3://bucket/x"', "remove what precedes the scheme"),
    ("s3://", "s3://bucket/key, got 's3://'"),
    ("s3:///x", "s3://bucket/key, got 's3:///x'"),
    ("s3://*/x", "'\\*' is not a valid bucket name"),
    ("s3://a b/x", "'a b' is not a valid bucket name"),
    ("s3://b/a//b", "contains //, .*remedy: s3://b/a/b$"),
    ("s3://b//a", "contains //, .*remedy: s3://b/a$"),
    ("s3://b/a//", "remedy: s3://b/a$"),
    ("s3://b//", "remedy: s3://b$"),
    ("s3://b/./a", "remedy: s3://b/a$"),
    ("s3://b/a/../c", "remedy: s3://b/c$"),
    ("~no-such-user/x", "no user 'no-such-user'.*./~no-such-user/x"),
]


@pytest.mark.parametrize(("address", "message"), UNKNOWN, ids=lambda value: repr(value)[:40])
def test_invalid_addresses_are_refused_with_the_remedy(address: str, message: str) -> None:
    for understand in (normalized, absolute, is_s3, local_path):
        with pytest.raises(AddressError, match=message):
            understand(address)


def test_sample_addresses_are_only_valid_for_data() -> None:
    assert normalized("sample://reviews", samples=True) == "sample://reviews"
    with pytest.raises(AddressError, match="can only be read as data"):
        normalized("sample://reviews")
    with pytest.raises(AddressError, match="remedy: sample://reviews"):
        normalized("SAMPLE://reviews", samples=True)


def test_local_and_s3_functions_refuse_each_others_addresses() -> None:
    with pytest.raises(AddressError, match="must be a local path"):
        local_path("s3://bucket/x")
    with pytest.raises(AddressError, match="s3://bucket/key, got 'bucket/x'"):
        split_s3("bucket/x")
    assert split_s3("s3://bucket/a/b/") == ("bucket", "a/b")


WRONG = ["gs://bucket/x", "s3a://bucket/x", "S3://bucket/x", "file:///x", "", "s3://b/a//b"]


@pytest.mark.parametrize("address", WRONG)
def test_every_entry_point_refuses_invalid_addresses(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read or written: no folder with a strange name appears."""
    monkeypatch.chdir(tmp_path)
    for key in ("storage", "data.train", "data.evaluation", "model.checkpoint"):
        with pytest.raises(SettingsError, match=f"^{key}: .*remedy"):
            read_settings([f"{key}={address}"])
    with pytest.raises(SettingsError, match=r"tokenizer.address: .*remedy"):
        read_settings([f"tokenizer.address={address}"])
    model = GPTJForCausalLM(TINY)
    tokenizer = GPTJTokenizer.train(["a b"], 300)
    nowhere = str(tmp_path / "nowhere")
    for call in (
        lambda: GPTJForCausalLM.from_pretrained(address),
        lambda: GPTJConfig.from_pretrained(address),
        lambda: GPTJTokenizer.from_pretrained(address),
        lambda: model.save_pretrained(address),
        lambda: tokenizer.save_pretrained(address),
        lambda: model.save_pretrained(address),
        lambda: locate(address, revision=None, patterns=[]),
        lambda: import_weights(address, nowhere),
        lambda: import_weights(str(tmp_path), address),
        lambda: import_weights(str(tmp_path), nowhere, config=address),
        lambda: import_weights(str(tmp_path), nowhere, tokenizer=address),
        lambda: export_weights(address, nowhere, format="flax"),
        lambda: export_weights(str(tmp_path), address, format="flax"),
        lambda: read_rows(address, ["text"]),
        lambda: storage.write_bytes(address, b""),
        lambda: storage.read_bytes(address),
        lambda: storage.check_writable(address),
        lambda: storage.delete_folder(address),
        lambda: storage.list_files(address),
        lambda: storage.upload(ROOT / "LICENSE", address),
        lambda: storage.download_folder(address, tmp_path),
    ):
        with pytest.raises(AddressError, match="remedy"):
            call()
    with pytest.raises(ValidationError, match="remedy"):
        Arguments(checkpoint=address)
    with pytest.raises(ValueError, match="remedy"):
        evaluate.read_settings([address, "sample://reviews"])
    with pytest.raises(ValueError, match="remedy"):
        evaluate.read_settings(["model", address])
    with pytest.raises(ValueError, match="remedy"):
        evaluate.read_settings(["model", "sample://reviews", f"unigram={address}"])
    if address:
        monkeypatch.setenv("GPTJ_CACHE_FOLDER", address)
        monkeypatch.setenv("GPTJ_CACHE_GB", "1")
        with pytest.raises(AddressError, match="remedy"):
            CheckpointCache.from_environment()
    with pytest.raises(SystemExit, match="remedy"):
        main(["verify", address])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (import_job.read_arguments, ["gs://b/x", "out"]),
        (import_job.read_arguments, ["in", "gs://b/x"]),
        (import_job.read_arguments, ["in", "out", "--config=gs://b/x"]),
        (import_job.read_arguments, ["in", "out", "--tokenizer=gs://b/x"]),
        (import_job.read_arguments, ["in", "out", "--scratch=gs://b/x"]),
        (export_job.read_arguments, ["gs://b/x", "out", "--format=flax"]),
        (export_job.read_arguments, ["in", "gs://b/x", "--format=flax"]),
        (benchmark.main, ["decode", "--model=gs://b/x"]),
        (benchmark.main, ["serve", "--model=gs://b/x"]),
        (benchmark.main, ["perplexity", "--model=gs://b/x", "--data=d"]),
        (benchmark.main, ["perplexity", "--model=m", "--data=gs://b/x"]),
        (benchmark.main, ["mlperf", "--model=gs://b/x"]),
        (benchmark.main, ["mlperf", "--model=m", "--prompts=gs://b/x"]),
        (benchmark.main, ["mlperf", "--model=m", "--logs=gs://b/x"]),
        (benchmark.main, ["load", "--folder=gs://b/x"]),
        (benchmark.main, ["model", "gs://b/x"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines_explain_invalid_addresses(main, words, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        main(words)
    message = capsys.readouterr().err
    assert re.search(r"gs://b/x: gs:// is not supported; remedy: copy it", message)


def test_a_tilde_expands_to_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = GPTJForCausalLM(TINY)
    model.save_pretrained("~/model/", tokenizer=GPTJTokenizer.train(["a b"], 300))
    assert (tmp_path / "home/model/manifest.json").exists()
    loaded = GPTJForCausalLM.from_pretrained("~/model")
    assert loaded.config.n_embd == TINY.n_embd
    assert len(GPTJTokenizer.from_pretrained("~/model/")) == 257 + 1
    import_weights("~/model", "~/copy")
    main(["verify", "~/copy"])
    (tmp_path / "home/rows.txt").write_text("one two")
    assert [row.values for row in read_rows("~/*.txt", ["text"])] == [{"text": "one two"}]
    settings = read_settings(["storage=~/out", "data.train=~/rows.txt", "model.checkpoint=~/model"])
    assert settings.model_folder == str(tmp_path / "home/out/finetune/model")
    assert settings.train_data == str(tmp_path / "home/rows.txt")
    assert Arguments(checkpoint="~/model").checkpoint == str(tmp_path / "home/model")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.slow
def test_the_job_refuses_invalid_addresses_before_starting_ray(tmp_path: Path) -> None:
    """It used to train, and to lose the model with Ray's session folder."""
    words = [sys.executable, str(ROOT / "jobs/finetune.py"), "storage=gs://bucket/x"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "error: storage: gs://bucket/x: gs:// is not supported; remedy:" in done.stderr
    assert list(tmp_path.iterdir()) == []
