"""Adapters selected by a request's model name, by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from gapped_tokenizer import gapped
from peft_adapters import KINDS, Made, make_adapter
from safetensors.torch import load_file, save_file
from serving_client import CHATS, COMPLETIONS, assert_error, complete, greedy, streamed, text_of
from serving_models import SENTENCES, TEMPLATE, Models, served_with_adapters
from slow_cases import slow

from deployments.generation import Arguments, new_engine_runner
from deployments.in_process import InProcessService
from deployments.preflight import _problem
from gptj import GPTJForCausalLM, GPTJTokenizer, storage
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.chat import ChatTemplate
from gptj.engine.adapter_slots import AdapterSlots
from gptj.engine.runners.lora import LoRALimits
from gptj.serving import adapters as served_adapters
from gptj.serving.adapters import Adapters
from gptj.serving.errors import NotFoundError
from gptj.serving.keys.keyring import digest
from gptj.serving.metrics import Labels, NoRecorder
from gptj.storage.errors import UnreachableError
from gptj_local.s3 import LocalS3

pytest_plugins = ["serving_fixtures"]

PROMPT = "Who wrote the book?"
NAMES = ("queries", "team/everything")
FILE = "adapter_model.safetensors"


class Counts(NoRecorder):
    def __init__(self) -> None:
        self.requests: list[str] = []
        self.loads: list[str] = []

    def adapter_request(self, adapter: str) -> None:
        self.requests.append(adapter)

    def adapter_load(self, result: str, seconds: float) -> None:
        self.loads.append(result)


@pytest.fixture(scope="session")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        name: make_adapter(models.generation, tmp_path_factory.mktemp("made"), seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
        if name in ("queries", "everything")
    }


@pytest.fixture(scope="session")
def merged(models: Models, made: dict[str, Made]) -> dict[str, Models]:
    """The models to compare replies with, by the adapter's name."""
    return {
        "queries": replace(models, generation=made["queries"].merged),
        "team/everything": replace(models, generation=made["everything"].merged),
        "base": models,
    }


@pytest.fixture
def root(made: dict[str, Made], tmp_path: Path) -> Path:
    """A folder of adapters, each test's own."""
    root = tmp_path / "adapters"
    for name, adapter in (("queries", "queries"), ("team/everything", "everything")):
        shutil.copytree(made[adapter].folder, root / name)
    return root


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def lora(models: Models, root: Path, counts: Counts) -> Iterator[str]:
    """A service with one named adapter, and the root's."""
    with served_with_adapters(
        models, named={"kept": str(root / "queries")}, root=str(root), recorder=counts, max_loras=3
    ) as address:
        yield address


def expected(merged: dict[str, Models], name: str, prompt: str = PROMPT) -> str:
    return text_of(merged[name], greedy(merged[name], prompt))


def ask(service: str, model: str, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "max_tokens": 4, "temperature": 0, **fields}
    if path == COMPLETIONS:
        body.setdefault("prompt", PROMPT)
    else:
        body.setdefault("messages", [{"role": "user", "content": PROMPT}])
    return httpx.post(service + path, json=body, timeout=60)


def change(folder: Path, factor: float) -> None:
    """Replace an adapter's weights, as another training run would."""
    tensors = {name: factor * each for name, each in load_file(folder / FILE).items()}
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / FILE)


def test_openais_client_finds_adapters_and_completes_with_them(
    lora: str, merged: dict[str, Models], root: Path, counts: Counts
) -> None:
    client = openai.OpenAI(base_url=f"{lora}/v1", api_key="none", max_retries=0, timeout=60)
    names = ["base", *NAMES, "kept"]

    def text(name: str) -> tuple[str, str]:
        reply = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        return reply.model, reply.choices[0].text

    with ThreadPoolExecutor() as threads:  # in one batch
        found = list(threads.map(text, names * 2))
    texts = {name: expected(merged, name) for name in merged}
    texts["kept"] = texts["queries"]
    assert len(set(texts.values())) == 3
    assert found == [(name, texts[name]) for name in names * 2]
    assert sorted(counts.requests) == sorted([*NAMES, "kept"] * 2)
    assert counts.loads == ["loaded"] * 2
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert list(cards) == ["base", "kept", *NAMES]
    assert cards["base"]["parent"] is None and cards["base"]["root"] == "in-process"
    assert cards["team/everything"]["parent"] == "base"
    assert cards["team/everything"]["root"] == str(root / "team/everything")
    assert client.models.retrieve("team/everything").id == "team/everything"


def test_streams_beams_stops_and_formats_of_an_adapter(
    lora: str, merged: dict[str, Models]
) -> None:
    name = "team/everything"
    whole = complete(lora, prompt=PROMPT, model=name)["choices"][0]["text"]
    (choice,) = streamed(lora, prompt=PROMPT, model=name)
    assert choice["text"] == whole == expected(merged, name)
    stop = whole[len(whole) // 2 :][:3]
    stopped = complete(lora, prompt=PROMPT, model=name, stop=stop)["choices"][0]
    assert stopped["text"] == whole[: whole.index(stop)] and stopped["stop_reason"] == stop
    beams = complete(lora, prompt=PROMPT, model=name, n=2, use_beam_search=True)["choices"]
    ids = greedy(merged[name], PROMPT, num_beams=2)
    assert beams[0]["text"] == text_of(merged[name], ids)
    for model in (name, "base"):
        bound = complete(
            lora, prompt=PROMPT, model=model, structured_outputs={"regex": "(Anna|Paris)+!"}
        )
        assert set(bound["choices"][0]["text"]) <= set("AnaPris!")


def test_chats_use_an_adapters_own_template(
    lora: str, root: Path, models: Models, merged: dict[str, Models]
) -> None:
    message = {"role": "user", "content": PROMPT}
    own = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    models.tokenizer.save_pretrained(root / "team/everything")
    (root / "team/everything/chat_template.jinja").write_text(own)
    for name, template in (("queries", TEMPLATE), ("team/everything", own)):
        prompt = ChatTemplate(template).render([message], add_generation_prompt=True)
        reply = ask(lora, name, CHATS, max_tokens=12).json()
        assert reply["model"] == name
        assert reply["choices"][0]["message"]["content"] == expected(merged, name, prompt)


@pytest.mark.parametrize("base", ["a folder", "nothing"])
def test_an_adapters_template_needs_neither_its_vocabulary_nor_its_base(
    lora: str, root: Path, models: Models, tmp_path: Path, base: str
) -> None:
    """The base is an address that whoever wrote the adapter chose: it is never opened."""
    secret = tmp_path / base
    if base == "a folder":
        other = GPTJTokenizer.train(["secrets"], 257)
        other.chat_template = "secret"
        other.save_pretrained(secret)
        (secret / "manifest.json").write_text("{ a secret")
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ sep_token }}{{ eos_token }}"
    files = {
        "chat_template.jinja": write("chat_template.jinja", own),
        "tokenizer_config.json": write(
            "tokenizer_config.json",
            {"chat_template": own, "sep_token": "z", "pad_token": "[PAD]"},
        ),
        "special_tokens_map.json": write("special_tokens_map.json", {}),
        "added_tokens.json": write("added_tokens.json", {}),
    }
    for name, add in files.items():
        folder = root / f"own/{name}"
        shutil.copytree(root / "queries", folder)
        damage_config(folder, base_model_name_or_path=str(secret))
        add(folder)
        message = {"role": "user", "content": PROMPT}
        body = {"model": f"own/{name}", "messages": [message], "add_generation_prompt": False}
        reply = httpx.post(f"{lora}/tokenize", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        text = models.tokenizer.decode(reply.json()["tokens"])
        end = f"[{PROMPT}]" + ("z" if "config" in name else "") + "<|endoftext|>"
        has = name.startswith(("chat", "tokenizer"))
        assert text == (end if has else ChatTemplate(TEMPLATE).render([message]))
        found = httpx.get(f"{lora}/v1/models/own/{name}", timeout=60).json()
        assert found["root"] == str(folder)


@pytest.mark.parametrize(
    "name",
    ["nobody", "team", "../adapters/queries", "team/../queries", "/etc", "queries/", ".", "a//b",
     "queries\n", "q\0", "x" * 300, "link"],
)  # fmt: skip
def test_unknown_adapter_names_are_404(lora: str, root: Path, name: str) -> None:
    outside = root.parent / "outside"
    shutil.copytree(root / "queries", outside)
    (root / "link").symlink_to(outside)
    assert_error(ask(lora, name), 404, "does not exist")


def damage_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def cut(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-100])


def spoil(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def pickled(folder: Path, content: Any) -> None:
    """In place of the adapter's tensors."""
    torch.save(content, folder / "adapter_model.bin")
    (folder / FILE).unlink()


def write(name: str, content: Any) -> Callable[[Path], None]:
    """Adds a file, of bytes, a text or JSON."""
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()

    def add(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return add


def tokenizer_with(token: str) -> GPTJTokenizer:
    tokenizer = GPTJTokenizer.train(SENTENCES, 300)
    tokenizer.add_tokens(token)
    return tokenizer


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: damage_config(folder, use_dora=True), "use_dora=True is not supported"),
        (cut, FILE),
        (spoil, "non-finite"),
        (lambda folder: pickled(folder, [1]), "not a plain state dict"),
        (write("chat_template.jinja", "{% if %}"), "Jinja"),
        (write("added_tokens.json", {"<|user|>": 320}), "adds the token '<|user|>'"),
        *slow(
            [
                (lambda folder: damage_config(folder, r=65), "rank 65"),
                (lambda folder: damage_config(folder, r=2), "has the shape"),
                (lambda folder: damage_config(folder, target_modules=["q_proj"]), "not among"),
                (lambda folder: damage_config(folder, target_modules=["fc_in"]), "is missing"),
                (
                    lambda folder: damage_config(folder, modules_to_save=["lm_head"]),
                    "modules_to_save",
                ),
                (
                    lambda folder: damage_config(folder, task_type="SEQ_CLS"),
                    "SequenceClassification",
                ),
                (lambda folder: (folder / FILE).unlink(), "adapter_model"),
                (lambda folder: pickled(folder, {1: torch.zeros(1)}), "it has the name 1"),
                (
                    lambda folder: pickled(folder, {"model": load_file(folder / FILE)}),
                    "['model'], FILE",
                ),
                (write("chat_template.jinja", "a" * 2**16 + "a"), "at most 65536: shorten it"),
                (
                    write("tokenizer_config.json", {"chat_template": "a" * 2**17}),
                    "has 131072 bytes",
                ),
                (
                    write("chat_template.jinja", b"\xff"),
                    "chat_template.jinja: 'utf-8' codec can't decode",
                ),
                (write("tokenizer_config.json", {"chat_template": "{% if %}"}), "Jinja"),
                (
                    write("tokenizer_config.json", {"chat_template": 5}),
                    "chat_template must be a text",
                ),
                (write("tokenizer_config.json", {"eos_token": ["a"]}), "a token must be a string"),
                (write("tokenizer_config.json", []), "it is not a JSON object"),
                (write("special_tokens_map.json", "{"), "special_tokens_map.json is damaged"),
                (
                    write("added_tokens.json", {"<|user|>": [1]}),
                    "added_tokens.json: the id of '<|user|>' ",
                ),
                (write("tokenizer_config.json", {"added_tokens_decoder": [1]}), "must map ids"),
                (
                    write(
                        "tokenizer_config.json",
                        {"added_tokens_decoder": {"320": {"content": "<s>"}}},
                    ),
                    "adds the token '<s>'",
                ),
                (write("special_tokens_map.json", {"sep_token": "<s>"}), "adds the token '<s>'"),
                (
                    write("special_tokens_map.json", {"additional_special_tokens": ["<s>"]}),
                    "adds the token '<s>'",
                ),
                (
                    write("vocab.json", {"a": 0}),
                    "neither tokenizer.json nor vocab.json with merges.txt",
                ),
                (write("merges.txt", ""), "neither tokenizer.json nor vocab.json with merges.txt"),
                (write("tokenizer.json", "{"), "cannot read"),
                (
                    lambda folder: tokenizer_with("<s>").save_pretrained(folder),
                    "adds the token '<s>'",
                ),
                (
                    lambda folder: gapped(GPTJTokenizer.train(SENTENCES, 300), 999).save_pretrained(
                        folder
                    ),
                    "its id of 'z' is 999, not",
                ),
            ]
        ),
    ],
)
def test_a_bad_adapter_only_fails_its_own_requests_with_400(
    lora: str, root: Path, counts: Counts, merged: dict[str, Models], damage: Any, reason: str
) -> None:
    """It is read once, others go on, and it works once it is repaired."""
    shutil.copytree(root / "queries", root / "bad")
    damage(root / "bad")
    for _ in range(2):
        assert_error(ask(lora, "bad"), 400, reason)
    assert counts.loads == ["refused"]
    assert complete(lora, prompt=PROMPT, model="base")["model"] == "base"


def test_an_adapter_of_another_base_is_refused(models: Models, tmp_path: Path) -> None:
    """By the digest of the base's files, which our adapters record."""
    models.generation.save_pretrained(tmp_path / "base", tokenizer=models.tokenizer)
    model = GPTJForCausalLM.from_pretrained(tmp_path / "base")
    add_lora(model, LoRAConfig(2))
    model.save_adapter(tmp_path / "root/ours", base=Base.at(str(tmp_path / "base")))
    for base, status in (
        (Base.at(str(tmp_path / "base")), 200),
        (Base("other", digest="0" * 64), 400),
    ):
        with served_with_adapters(models, root=str(tmp_path / "root"), base=base) as service:
            reply = ask(service, "ours")
            assert reply.status_code == status, reply.text
    assert_error(reply, 400, "was not trained on")


def test_a_changed_adapter_is_reloaded(
    lora: str, root: Path, merged: dict[str, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged version changes nothing; a removed one is gone."""
    monkeypatch.setattr(served_adapters, "CHECK_SECONDS", 0.0)
    name = "queries"
    first = complete(lora, prompt=PROMPT, model=name)["choices"][0]["text"]
    assert first == expected(merged, name)
    change(root / name, -1.5)
    second = complete(lora, prompt=PROMPT, model=name)["choices"][0]["text"]
    assert second != first
    cut(root / name)
    assert complete(lora, prompt=PROMPT, model=name)["choices"][0]["text"] == second
    shutil.rmtree(root / name)
    assert_error(ask(lora, name), 404, "does not exist")
    assert complete(lora, prompt=PROMPT, model="kept")["choices"][0]["text"] == first


def test_a_storage_outage_only_affects_adapters_not_in_memory(
    lora: str, merged: dict[str, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_adapters, "CHECK_SECONDS", 0.0)
    text = complete(lora, prompt=PROMPT, model="queries")["choices"][0]["text"]

    def fail(address: str) -> str:
        raise UnreachableError(f"{address} does not answer")

    monkeypatch.setattr(served_adapters, "_version", fail)
    assert complete(lora, prompt=PROMPT, model="queries")["choices"][0]["text"] == text
    assert_error(ask(lora, "team/everything"), 503, "does not answer")


@pytest.mark.slow
def test_adapters_take_turns_in_memory(
    models: Models, root: Path, merged: dict[str, Models], counts: Counts
) -> None:
    with served_with_adapters(models, root=str(root), max_loras=1, recorder=counts) as service:
        for name in (*NAMES, *NAMES, NAMES[1]):
            reply = complete(service, prompt=PROMPT, model=name)
            assert reply["choices"][0]["text"] == expected(merged, name)
        assert counts.loads == ["loaded"] * 4
        # While one runs, there is no room for another.
        body = {"model": NAMES[0], "prompt": "x", "max_tokens": 1500, "stream": True}
        body |= {"ignore_eos": True}
        with httpx.stream("POST", service + COMPLETIONS, json=body, timeout=60) as running:
            lines = running.iter_lines()  # whose end would end the request
            next(lines)
            refused = ask(service, NAMES[1])
            assert_error(refused, 429, "max_loras")
            assert refused.headers["x-ratelimit-scope"] == "adapters"
            assert ask(service, "base").status_code == 200


def test_asking_for_a_model_loads_none(
    models: Models, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would push out those in use, and costs no key anything."""
    (root / NAMES[1] / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(root / NAMES[0], root / "bad")
    damage_config(root / "bad", use_dora=True)
    with served_with_adapters(
        models, root=str(root), max_loras=1, recorder=counts, template=None
    ) as service:

        def card(name: str) -> httpx.Response:
            return httpx.get(f"{service}/v1/models/{name}", timeout=60)

        assert ask(service, NAMES[0]).status_code == 200
        for _ in range(2):
            found = card(NAMES[1]).json()
            assert (found["id"], found["parent"]) == (NAMES[1], "base")
            assert found["root"] == str(root / NAMES[1]) and found["chat_template"]
            assert_error(card("bad"), 400, "use_dora")
            assert_error(card("nobody"), 404, "does not exist")
        assert card(NAMES[0]).json()["id"] == NAMES[0] and not card("base").json()["parent"]
        listed = httpx.get(f"{service}/v1/models", timeout=60).json()["data"]
        assert [each["id"] for each in listed] == ["base", NAMES[0]]
        assert counts.loads == ["loaded"]
        # What was found out serves who reads it next.
        monkeypatch.setattr(served_adapters, "_version", lambda address: 1 / 0)
        assert card(NAMES[1]).status_code == 200
        assert_error(ask(service, "bad"), 400, "use_dora")


def test_names_without_a_folder_are_looked_up_now_and_then(
    lora: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    version = served_adapters._version

    def count(address: str) -> str:
        looked.append(Path(address).name)
        return version(address)

    monkeypatch.setattr(served_adapters, "_version", count)
    monkeypatch.setattr(served_adapters, "MAX_KNOWN", 3)
    for _ in range(3):
        assert_error(ask(lora, "later"), 404, "does not exist")
        assert_error(ask(lora, "later", CHATS), 404, "does not exist")
    assert looked == ["later"]
    for number in range(3):
        ask(lora, f"other-{number}")
    ask(lora, "later")  # others came since, of which only so many are known
    assert looked.count("later") == 2
    shutil.copytree(root / "queries", root / "later")
    monkeypatch.setattr(served_adapters, "MISSING_SECONDS", 0.0)
    assert ask(lora, "later").status_code == 200


def test_a_flood_of_names_holds_up_no_adapter_that_is_known(
    lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_adapters, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(served_adapters, "CHECK_WAIT_SECONDS", 0.2)
    assert ask(lora, "queries").status_code == 200
    version, answered = served_adapters._version, threading.Event()

    def slow(address: str) -> str:
        answered.wait(60)
        return version(address)

    monkeypatch.setattr(served_adapters, "_version", slow)
    with ThreadPoolExecutor(40) as threads:
        flood = [threads.submit(ask, lora, f"no-{n}") for n in range(40)]
        while not any(each.done() for each in flood):
            time.sleep(0.01)
        assert ask(lora, "queries").status_code == 200
        answered.set()
    statuses = [each.result().status_code for each in flood]
    assert sorted(set(statuses)) == [404, 429]


def test_a_storage_that_hangs_delays_adapters_in_memory_once_and_others_are_503(
    lora: str, root: Path, merged: dict[str, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's requests are tried again for minutes."""
    assert ask(lora, "queries").status_code == 200
    monkeypatch.setattr(served_adapters, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(served_adapters, "CHECK_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(served_adapters, "LOAD_WAIT_SECONDS", 0.3)
    hanging, looked = threading.Event(), []

    def hang(address: str) -> str:
        looked.append(address)
        hanging.wait(60)
        raise UnreachableError(f"{address} does not answer")

    monkeypatch.setattr(served_adapters, "_version", hang)
    try:
        reply = complete(lora, prompt=PROMPT, model="queries")
        assert reply["choices"][0]["text"] == expected(merged, "queries")
        monkeypatch.setattr(served_adapters, "CHECK_SECONDS", 60.0)
        assert ask(lora, "queries").status_code == 200
        assert len(looked) == 1
        assert_error(ask(lora, "team/everything"), 503, "could not be read in 0.3 s")
    finally:
        hanging.set()


def test_an_adapter_damaged_in_place_is_refused_on_reload(
    models: Models, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, though it was in memory before in what seems the same version."""
    monkeypatch.setattr(served_adapters, "_version", lambda address: "the same")
    with served_with_adapters(models, root=str(root), max_loras=1) as service:
        assert ask(service, NAMES[0]).status_code == 200
        spoil(root / NAMES[0])
        assert ask(service, NAMES[1]).status_code == 200  # which takes its slot
        for _ in range(2):
            assert_error(ask(service, NAMES[0]), 400, "non-finite")


def test_keys_may_be_for_some_models_only(
    models: Models, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [
        {"name": "team", "sha256": digest(b"team"), "models": ["team/*"]},
        {"name": "all", "sha256": digest(b"all")},
    ]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    monkeypatch.setenv("GPTJ_KEYS_FILE", str(tmp_path / "keys.yaml"))
    with served_with_adapters(models, root=str(root)) as service:
        clients = {
            key: openai.OpenAI(base_url=f"{service}/v1", api_key=key, max_retries=0)
            for key in ("team", "all")
        }
        for key, name, allowed in (
            ("team", "team/everything", True),
            ("team", "queries", False),
            ("team", "base", False),
            ("all", "queries", True),
        ):
            try:
                clients[key].completions.create(model=name, prompt="x", max_tokens=1)
            except openai.PermissionDeniedError as error:
                assert not allowed and error.code == "model_not_allowed"
            else:
                assert allowed
        assert [card.id for card in clients["team"].models.list()] == ["team/everything"]
        assert [card.id for card in clients["all"].models.list()] == ["base", *NAMES]
        with pytest.raises(openai.PermissionDeniedError):
            clients["team"].models.retrieve("queries")
        for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [5]})):
            for named, status in (
                ({"model": "team/everything"}, 200),
                ({"model": "queries"}, 403),
                ({}, 403),
            ):
                headers = {"Authorization": "Bearer team"}
                reply = httpx.post(f"{service}/{path}", json=body | named, headers=headers)
                assert reply.status_code == status


def test_adapters_of_an_s3_root(
    models: Models, root: Path, merged: dict[str, Models], s3: LocalS3
) -> None:
    storage.upload_folder(root, "s3://gptj/adapters")
    with served_with_adapters(models, root="s3://gptj/adapters") as service:
        name = "team/everything"
        reply = complete(service, prompt=PROMPT, model=name)
        assert reply["choices"][0]["text"] == expected(merged, name)
        assert_error(ask(service, "team"), 404, "does not exist")


def test_a_deployments_settings_are_checked_in_advance(
    models: Models, root: Path, tmp_path: Path
) -> None:
    models.generation.save_pretrained(tmp_path / "run/model", tokenizer=models.tokenizer)
    given: dict[str, Any] = {"checkpoint": str(tmp_path / "run/model")}
    named = {"one": str(root / "queries")}
    assert Arguments(**given).lora_limits() is None
    good = Arguments(**given, adapters=named, adapter_root=str(root), max_loras=2)
    assert good.lora_limits() == LoRALimits(2, 64)
    assert _problem(GPTJForCausalLM, good) is None
    for wrong, reason in (
        ({"adapters": named, "adapter_root": str(root), "max_loras": 1}, "must be 2 or more"),
        ({"adapters": {"run": "x"}}, "the base model's name"),
        ({"adapters": {"../x": "x"}}, "not a valid adapter name"),
        ({"max_lora_rank": 65}, "max_lora_rank"),
    ):
        with pytest.raises(ValueError, match=reason):
            Arguments(**given, **wrong)
    damage_config(root / "queries", use_dora=True)
    problem = _problem(GPTJForCausalLM, good)
    assert problem is not None and "'one'" in problem and "use_dora" in problem
    missing = Arguments(**given, adapters={"one": str(root / "nothing")})
    problem = _problem(GPTJForCausalLM, missing)
    assert problem is not None and str(root / "nothing") in problem


def test_a_deployments_runner_has_room_for_adapters(models: Models, made: dict[str, Made]) -> None:
    arguments = Arguments(checkpoint="x", adapter_root="/nowhere", cache_tokens=64)
    runner, _ = new_engine_runner(models.with_unused_ids(), arguments)
    AdapterSlots(runner, LoRALimits()).load(made["everything"].weights())
    runner.close()


def test_adapter_label_values_are_capped() -> None:
    labels = Labels(2)
    assert [labels.of(name) for name in "abcad"] == ["a", "b", "other", "a", "other"]


def test_named_adapters_are_loaded_at_the_start_or_fail(models: Models, tmp_path: Path) -> None:
    config = models.generation.config
    slots = AdapterSlots(None, LoRALimits())  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="missing"):
        Adapters(
            slots, config, Base("x"), models.tokenizer, NoRecorder(),
            named={"one": str(tmp_path / "missing")},
        )  # fmt: skip


def test_batch_inference_answers_with_adapters(
    models: Models, root: Path, merged: dict[str, Models], tmp_path: Path
) -> None:
    """By the settings of the deployment, without HTTP."""
    models.with_unused_ids().save_pretrained(tmp_path / "run/model", tokenizer=models.tokenizer)
    arguments = Arguments(
        checkpoint=str(tmp_path / "run/model"),
        dtype="float32",
        cache_tokens=2048,
        adapters={"kept": str(root / "queries")},
        adapter_root=str(root),
    )

    async def asked(model: str) -> Any:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        return await service.answer(COMPLETIONS, body)

    with closing(InProcessService.load("generation", arguments, torch.device("cpu"))) as service:
        for model, name in (("run", "base"), ("kept", "queries"), (NAMES[1], NAMES[1])):
            reply = asyncio.run(asked(model))
            assert reply.model == model
            assert reply.choices[0].text == expected(merged, name)
        with pytest.raises(NotFoundError, match="'nothing' does not exist"):
            asyncio.run(asked("nothing"))
