"""locate: hub ids against a real HTTP server that answers as the Hugging Face hub does.

The hub's client reads its environment when it is imported, so each test asks in a new process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.checkpoints.hub import locate, upload
from gptj.tokenizer import GPTJTokenizer
from gptj_local.processes import free_ports

REPOSITORY = "someone/model"
GATED = "someone/gated"
TOKEN = "hf_of_someone"
MAIN, OLD = "a" * 40, "b" * 40  # commits
BRANCHES = {"main": MAIN, MAIN: MAIN, "old": OLD, OLD: OLD}
SIZES = {MAIN: 300, OLD: 280}  # of the two tokenizers' vocabularies
TEXTS = [Path(__file__).read_text()]


@dataclass
class Hub:
    """The repository's files by commit, and the requested paths."""

    commits: dict[str, dict[str, bytes]]
    requests: list[str] = field(default_factory=list)
    broken: bool = False  # answer everything with an internal error
    endpoint: str = ""
    created: list[tuple[str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files that came, by SHA-256
    messages: list[str] = field(default_factory=list)  # branch and message of each commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        self.requests.append(path)
        if self.broken:
            return 500, {}, b"broken"
        api = path.startswith("/api/")
        path = re.sub(r"^(/api)?/(models|datasets)/", "/", path)
        parts = path.strip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository == GATED:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repository != REPOSITORY:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = BRANCHES.get(rest[1] if rest else "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.commits[commit]
        if not api:  # /someone/model/resolve/commit/file
            content = files.get("/".join(rest[2:]))
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}, content
        if rest[:1] == ["tree"]:
            folder = "/".join([*rest[2:], ""])
            listing: object = [
                {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                for name, content in files.items()
                if name.startswith(folder)
            ]
            if not listing:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
        else:
            listing = {
                "id": REPOSITORY,
                "sha": commit,
                "siblings": [{"rfilename": name} for name in files],
            }
        return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()

    def take(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON for a POST: what an upload asks, in the hub's order."""
        self.requests.append(path)
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            self.created.append((name, fields.get("visibility")))
            return 200, {"url": f"{self.endpoint}/{name}"}
        if "/branch/" in path:
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in files
                ]
            }
        assert "/commit/" in path, path
        commit = self.commits.setdefault(MAIN, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(f"{path.rpartition('/')[2]}: {value['summary']}")
            elif line["key"] == "file":
                commit[value["path"]] = base64.b64decode(value["content"])
            else:
                commit[value["path"]] = self.blobs[value["oid"]]
        return 200, {
            "commitUrl": f"{self.endpoint}/{REPOSITORY}/commit/{MAIN}",
            "commitOid": MAIN,
        }


def blob_id(content: bytes) -> str:
    """A file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("Authorization", "")
            status, fields = hub.take(path, self.body(), token)
            content = json.dumps(fields).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            content = self.body()
            assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
            hub.blobs[self.path.rpartition("/")[2]] = content
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: the hub records its requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            hub.endpoint = f"http://127.0.0.1:{server.server_port}"
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def commits() -> dict[str, dict[str, bytes]]:
    return {
        commit: {
            **GPTJTokenizer.train(TEXTS, size).files(),
            "README.md": commit.encode(),
            "model.safetensors": bytes(1000),
        }
        for commit, size in SIZES.items()
    }


@pytest.fixture
def hub(commits: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with serving(Hub(commits)) as hub:
        yield hub


@dataclass(frozen=True)
class Client:
    """Runs a program with the hub's client set to an endpoint and a cache."""

    cache: Path

    def run(self, endpoint: str, program: str, *, offline: bool = False) -> list[str]:
        """The lines that the program prints."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",  # a store of its own, which the server here has not
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def errors(
        self, endpoint: str, *models: tuple[str, str | None], offline: bool = False
    ) -> list[str]:
        """The messages of the FileNotFoundErrors that `locate` raises for names and revisions."""
        program = f"""
from gptj.checkpoints.hub import locate
for name, revision in {models!r}:
    try:
        locate(name, revision=revision, patterns=["*.json"])
    except FileNotFoundError as error:
        print(" ".join(str(error).split()))
"""
        messages = self.run(endpoint, program, offline=offline)
        assert len(messages) == len(models)
        return messages


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "cache")


@pytest.mark.slow
def test_a_revision_selects_the_content_and_patterns_select_the_files(
    hub: Hub, client: Client
) -> None:
    program = f"""
import os
from gptj.checkpoints.hub import locate
for revision in (None, "main", "old", "{MAIN}", "{OLD}"):
    folder = locate("{REPOSITORY}", revision=revision, patterns=["*.md", "*.json"])
    print(open(os.path.join(folder, "README.md")).read(), *sorted(os.listdir(folder)))
"""
    names = "README.md tokenizer.json tokenizer_config.json"
    assert client.run(hub.endpoint, program) == [
        f"{commit} {names}" for commit in (MAIN, MAIN, OLD, MAIN, OLD)
    ]
    assert not any(path.endswith(".safetensors") for path in hub.requests)


@pytest.mark.slow
def test_a_tokenizer_loads_by_hub_id_and_again_without_the_hub(hub: Hub, client: Client) -> None:
    program = f"""
from gptj.tokenizer import GPTJTokenizer
for revision in (None, "old"):
    tokenizer = GPTJTokenizer.from_pretrained("{REPOSITORY}", revision=revision)
    print(len(tokenizer), tokenizer.encode("a tokenizer"))
"""
    printed = client.run(hub.endpoint, program)
    assert printed == [
        f"{size} {GPTJTokenizer.train(TEXTS, size).encode('a tokenizer')}"
        for size in SIZES.values()
    ]
    asked = len(hub.requests)
    assert client.run(hub.endpoint, program, offline=True) == printed
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_a_model_loads_by_hub_id_and_revision(client: Client, tmp_path: Path) -> None:
    """Safetensors at one revision, only a pickle at the other, as GPT-J was published."""
    config = GPTJConfig(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    model = GPTJForCausalLM(config)
    model.save_pretrained(str(tmp_path / "model"))
    new = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with torch.no_grad():
        model.lm_head.bias.fill_(7.0)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    old = {"config.json": new["config.json"], "pytorch_model.bin": pickled}
    program = f"""
from gptj import GPTJConfig, GPTJForCausalLM
print(GPTJForCausalLM.from_pretrained({REPOSITORY!r}).lm_head.bias[0].item())
old = GPTJForCausalLM.from_pretrained({REPOSITORY!r}, revision="old", torch_dtype="float16")
print(old.lm_head.bias[0].item(), old.dtype)
print(GPTJConfig.from_pretrained({REPOSITORY!r}, revision="old").n_embd)
"""
    with serving(Hub({MAIN: new, OLD: old})) as hub:
        assert client.run(hub.endpoint, program) == ["0.0", "7.0 torch.float16", "8"]


@pytest.mark.slow
def test_an_adapter_is_used_with_the_commit_of_the_base_that_it_was_trained_on(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base's branch has moved since, to other weights and another tokenizer."""
    versions = {}
    for commit, size in SIZES.items():
        torch.manual_seed(size)
        fields = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "rotary_dim": 2}
        model = GPTJForSequenceClassification(GPTJConfig(vocab_size=300, num_labels=2, **fields))
        tokenizer = GPTJTokenizer.train(TEXTS, size)
        model.save_pretrained(tmp_path / commit, tokenizer=tokenizer)
        versions[commit] = {path.name: path.read_bytes() for path in (tmp_path / commit).iterdir()}
        versions[commit].pop("manifest.json")  # as on the hub, usually: no digest reveals a change
    model = GPTJForSequenceClassification.from_pretrained(tmp_path / OLD)
    add_lora(model, LoRAConfig(rank=2))
    base = Base(REPOSITORY, "main", commit=OLD)
    model.save_adapter(tmp_path / "adapter", base=base)
    shutil.copytree(tmp_path / "adapter", tmp_path / "peft")
    for name in ("base.json", "manifest.json", "config.json"):
        (tmp_path / "peft" / name).unlink()
    program = f"""
import torch
from gptj import GPTJConfig, GPTJForSequenceClassification, GPTJTokenizer
from gptj.adapters.base import check_base
from gptj.checkpoints.folder import ModelFolder
from gptj.interop.merging import merge_adapter
from jobs import evaluate

def same(address, expected, **options):
    found = GPTJForSequenceClassification.from_pretrained(address, **options).transformer.wte.weight
    wanted = GPTJForSequenceClassification.from_pretrained(expected).transformer.wte.weight
    return torch.equal(found, wanted)

old, new = {str(tmp_path / OLD)!r}, {str(tmp_path / MAIN)!r}
for adapter in ({str(tmp_path / "adapter")!r}, {str(tmp_path / "peft")!r}):
    print(len(GPTJTokenizer.from_pretrained(adapter)), GPTJConfig.from_pretrained(adapter).n_embd)
    with ModelFolder.open(adapter) as folder:
        check_base(folder)
    print(same(adapter, old), same(adapter, old, base={REPOSITORY!r}), same(adapter, new, base=new))
    for name, options in (("own", dict()), ("named", dict(revision="main"))):
        merge_adapter({REPOSITORY!r}, adapter, adapter + name, **options)
    print(same(adapter + "own", old), same(adapter + "named", new))
    words = ["sample://reviews/evaluation", "limit=4", "label_names=[negative, positive]"]
    measured = [evaluate.measure(evaluate.read_settings([each, *words])) for each in (adapter, old)]
    print(measured[0]["loss"] == measured[1]["loss"])
"""
    with serving(Hub(versions)) as hub:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        printed = client.run(hub.endpoint, program)
        assert printed == [f"{SIZES[OLD]} 8", "True True True", "True True", "True"] * 2
        # The commit is gone, and in no cache.
        del versions[OLD]
        monkeypatch.delitem(BRANCHES, OLD)
        adapter = str(tmp_path / "adapter")
        program = f"""
from gptj import GPTJForSequenceClassification, GPTJTokenizer
from gptj.interop.merging import merge_adapter
for read in (GPTJForSequenceClassification.from_pretrained, GPTJTokenizer.from_pretrained,
             lambda adapter: merge_adapter({REPOSITORY!r}, adapter, adapter + "-none")):
    try:
        read({adapter!r})
    except FileNotFoundError as error:
        print(error)
"""
        for message in Client(tmp_path / "empty").run(hub.endpoint, program):
            assert f"{adapter} was trained on {REPOSITORY} at {OLD}" in message
            assert "jobs/merge_adapter.py" in message


@pytest.mark.slow
def test_a_model_is_pushed_and_loaded_again(client: Client) -> None:
    """Large files by LFS; the manifest too, so that loading verifies it."""
    program = f"""
import torch
from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
config = GPTJConfig(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
model = GPTJForCausalLM(config)
tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
try:
    model.push_to_hub({REPOSITORY!r}, token="wrong")
except Exception as error:
    print(type(error).__name__)
print(model.push_to_hub({REPOSITORY!r}, tokenizer=tokenizer, private=True, token={TOKEN!r},
                        commit_message="First try"))
back = GPTJForCausalLM.from_pretrained({REPOSITORY!r}, token={TOKEN!r})
print(all(map(torch.equal, back.state_dict().values(), model.state_dict().values())))
print(len(GPTJTokenizer.from_pretrained({REPOSITORY!r})) == len(tokenizer))
"""
    with serving(Hub({MAIN: {}})) as hub:
        refused, address, *equal = client.run(hub.endpoint, program)
        assert refused in ("HfHubHTTPError", "RepositoryNotFoundError")
        assert address == f"{hub.endpoint}/{REPOSITORY}/commit/{MAIN}"
        assert equal == ["True", "True"]
        assert hub.created == [(REPOSITORY, "private")]
        assert hub.messages == ["main: First try"]
        assert {"manifest.json", "config.json", "tokenizer.json"} <= set(hub.commits[MAIN])


def test_a_push_to_a_hub_that_does_not_answer_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT"):
        upload(tmp_path, REPOSITORY, private=None, token="x", revision=None, commit_message="")


@pytest.mark.slow
def test_a_missing_repository_or_file_is_a_clear_error(hub: Hub, client: Client) -> None:
    absent, branch, commit, gated = client.errors(
        hub.endpoint,
        ("someone/nothing", None),
        (REPOSITORY, "nowhere"),
        (REPOSITORY, "c" * 40),
        (GATED, None),
    )
    assert "'someone/nothing'" in absent
    assert "no model of that name" in absent
    assert "not an existing folder" in absent
    assert "HF_TOKEN" in absent
    assert branch == f"{REPOSITORY!r} on the hub has no revision 'nowhere'"
    assert commit == f"{REPOSITORY!r} on the hub has no revision '{'c' * 40}'"
    assert f"{GATED!r} on the hub is gated" in gated


@pytest.mark.slow
def test_an_unreachable_hub_is_a_clear_error(hub: Hub, client: Client) -> None:
    hub.broken = True
    (message,) = client.errors(hub.endpoint, (REPOSITORY, None))
    assert "could not be downloaded" in message
    assert "500" in message
    (port,) = free_ports(1)
    (message,) = client.errors(f"http://127.0.0.1:{port}", (REPOSITORY, None))
    assert "could not be downloaded" in message
    assert "onnect" in message
    (message,) = client.errors(hub.endpoint, (REPOSITORY, None), offline=True)
    assert "HF_HUB_OFFLINE=0" in message


def test_folders_and_s3_addresses_pass_through(tmp_path: Path) -> None:
    """Without looking inside them or asking the hub."""
    for address in (str(tmp_path), "/", "s3://bucket/models/one", "s3://bucket"):
        assert locate(address, revision=None, patterns=[]) == address
        with pytest.raises(ValueError, match=f"{address} is a folder: drop main"):
            locate(address, revision="main", patterns=[])


@pytest.mark.parametrize("address", ["/no/such/folder", "./model", "a/b/c", "some one/model"])
def test_an_invalid_hub_id_is_refused_without_a_request(address: str) -> None:
    with pytest.raises(
        FileNotFoundError, match="not an existing folder, an s3:// address or a hub"
    ):
        locate(address, revision=None, patterns=[])


@pytest.mark.parametrize("address", ["a--b", "model.git", "x" * 97])
def test_a_missing_folder_whose_name_the_hub_forbids_is_a_clear_error(address: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{address}.* could not be downloaded"):
        locate(address, revision=None, patterns=[])
