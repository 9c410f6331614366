"""Outputs that follow a grammar, and bans of tokens: in any batch, on any runner."""

from __future__ import annotations

import copy
import gc
import json
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import jsonschema
import numpy as np
import psutil
import pytest
import torch
from engine_caller import Caller, assert_same, search, submit, submit_many

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.engine.constraints import compiler as compiler_module
from gptj.engine.constraints import mask_threads
from gptj.engine.constraints import trial as trial_module
from gptj.engine.constraints.compiler import CompiledGrammar, GrammarCompiler
from gptj.engine.constraints.grammar import Grammar, GrammarError
from gptj.engine.constraints.token_mask import TokenMask, packed, unpacked
from gptj.engine.constraints.trial import Trial
from gptj.engine.engine import Engine
from gptj.engine.events import Finished, TokenEvent
from gptj.engine.request import BeamParams
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.engine.sampler import Sampler
from gptj.engine.sampling_batch import excluded
from gptj.engine.speculation import Speculation
from gptj.environment.extras import MissingPackageError
from gptj.sampling import SamplingParams, adjust
from gptj.workers.errors import ClosedError, QueueFullError

TEXTS = ['{"name": "Ann", "age": 31}', "[1, 2.5, true]", "the quick brown fox\n"] * 4
UNUSED = 5  # rows of the embedding without a token
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: GPTJTokenizer) -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer) + UNUSED,
        n_positions=1024,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return GPTJForCausalLM(config).eval()


@pytest.fixture(scope="module")
def compiler(tokenizer: GPTJTokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, len(tokenizer) + UNUSED, eos_of(tokenizer))
    yield compiler
    compiler.close()


def eos_of(tokenizer: GPTJTokenizer) -> list[int]:
    assert tokenizer.eos_token_id is not None
    return [tokenizer.eos_token_id]


def new_engine(model: GPTJForCausalLM, pages: int = 256, **settings: Any) -> Engine:
    vocabulary = model.config.vocab_size
    return Engine(
        TorchRunner(model, pages),
        eos_ids=[model.config.eos_token_id],  # type: ignore[list-item]
        banned_ids=range(vocabulary - UNUSED, vocabulary),
        **settings,
    )


@pytest.fixture(scope="module")
def engine(model: GPTJForCausalLM) -> Iterator[Engine]:
    engine = new_engine(model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def person(compiler: GrammarCompiler) -> CompiledGrammar:
    return compiler.compile(Grammar.of_json_schema(SCHEMA))


def text_of(caller: Caller, tokenizer: GPTJTokenizer) -> str:
    ids = [event.token_id for event in caller.wait() if isinstance(event, TokenEvent)]
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def reason(caller: Caller) -> str:
    last = caller.wait()[-1]
    assert isinstance(last, Finished), last
    return last.reason


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.of_regex(r"[0-9]{3}-[a-z]{2}"), r"[0-9]{3}-[a-z]{2}"),
        (Grammar.of_choices(["yes", "no", "maybe"]), "yes|no|maybe"),
        (Grammar.of_choices(['say "a"\n\\', "x|y.*", "ü\u2028€", "a/b ~\x00"]), None),
        (Grammar.of_grammar('start: item ("," item){2}\nitem: /[0-9]{1,2}/'), r"\d+,\d+,\d+"),
        (Grammar.of_grammar('root ::= "<" [a-c]+ ">" | "[]"'), r"<[a-c]+>|\[\]"),
        (Grammar.of_json_schema({"const": "<|endoftext|>"}), re.escape('"<|endoftext|>"')),
    ],
    ids=["regex", "choice", "odd characters", "lark", "gbnf", "a special token's text"],
)
def test_outputs_follow_their_grammar(
    engine: Engine,
    compiler: GrammarCompiler,
    tokenizer: GPTJTokenizer,
    grammar: Grammar,
    pattern: str | None,
) -> None:
    compiled = compiler.compile(grammar)
    callers = [
        submit(engine, [5, 6, 7], grammar=compiled, max_tokens=100, temperature=n / 2, seed=n)
        for n in range(8)
    ]
    for caller in callers:
        text = text_of(caller, tokenizer)
        if pattern is None:
            assert text in ['say "a"\n\\', "x|y.*", "ü\u2028€", "a/b ~\x00"]
        elif reason(caller) == "stop":
            assert re.fullmatch(pattern, text), text
    assert any(reason(caller) == "stop" for caller in callers)


@pytest.mark.slow
def test_objects_of_a_schema_are_valid_with_all_sampling_parameters(
    engine: Engine, person: CompiledGrammar, tokenizer: GPTJTokenizer
) -> None:
    """Penalties, biases, top_p and others only choose among what the grammar allows."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": -1, "logprobs": 3, "temperature": 1},
        {"logit_bias": dict.fromkeys(range(20), 80.0), "temperature": 1},
        {"min_tokens": 60, "temperature": 1},
        {"ignore_eos": True, "temperature": 1},
        {"stop_token_ids": tuple(eos_of(tokenizer)), "temperature": 1},
    ]
    callers = [
        submit(engine, [9, seed], grammar=person, max_tokens=900, seed=seed, **kind)
        for seed in range(2)
        for kind in kinds
    ]
    free = [submit(engine, [9, seed], max_tokens=40, seed=seed, temperature=1) for seed in range(4)]
    for caller in callers:
        assert reason(caller) == "stop"
        jsonschema.validate(json.loads(text_of(caller, tokenizer)), SCHEMA)
    again = [
        submit(engine, [9, seed], max_tokens=40, seed=seed, temperature=1) for seed in range(4)
    ]
    assert [each.ids for each in free] == [each.ids for each in again]


@pytest.mark.slow
def test_a_seed_gives_the_same_output_alone_in_company_and_after_preemption(
    model: GPTJForCausalLM, person: CompiledGrammar
) -> None:
    """Preempted outputs go on where they were, with the grammar's state; so in chunked prefill."""
    prompts = [[5 + n, *range(2, 30 + n)] for n in range(6)]
    params: list[dict[str, Any]] = [
        {"grammar": person, "seed": n, "temperature": 1, "max_tokens": 120} for n in range(6)
    ]
    roomy = new_engine(model)
    expected = [submit(roomy, p, **each).ids for p, each in zip(prompts, params, strict=True)]
    roomy.close()
    # Pages for less than three of them, prompts in several steps.
    tight = new_engine(model, pages=18, max_num_seqs=6, max_num_batched_tokens=16)
    callers = [submit(tight, p, **each) for p, each in zip(prompts, params, strict=True)]
    assert [caller.ids for caller in callers] == expected
    assert tight.stats().preemptions > 0
    assert tight.stats().constrained_tokens_out > 0
    tight.close()


@pytest.mark.slow
def test_speculation_changes_no_output(
    model: GPTJForCausalLM, compiler: GrammarCompiler, tokenizer: GPTJTokenizer
) -> None:
    """Drafts that a grammar allows, that it does not, and that end it."""
    person = '{"name": "Ann", "age": 31, "tags": ["a", "b"]}'
    grammars = [
        Grammar.of_json_schema(SCHEMA),
        Grammar.of_regex(r"(ab|cd){2,30}"),
        Grammar.of_regex("[0-9]*the quick brown fox"),
        Grammar.of_choices([person, person[:-1]]),
        Grammar.of_grammar('start: item ("," item){9}\nitem: /[0-9]{1,2}/'),
    ]
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5, "seed": 1, "logprobs": 1, "min_tokens": 50},
        {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.1, "ignore_eos": True},
        {"bad_words_ids": (tuple(tokenizer.encode("ab")), tuple(tokenizer.encode('"a"')))},
    ]
    plain = new_engine(model)
    drafting = new_engine(model, speculation=Speculation(), max_num_batched_tokens=64)
    prompts = [tokenizer.encode(text * 3) for text in (person, "ababcdab", "the quick brown fox,1")]
    pairs = []
    for grammar in grammars:
        compiled = compiler.compile(grammar)
        for prompt in prompts:
            for more in settings:
                params = {"max_tokens": 60, "grammar": compiled, **more}
                pairs.append([submit(engine, prompt, **params) for engine in (drafting, plain)])
    for found, expected in pairs:
        assert_same(found, expected)
    stats = drafting.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert stats.constrained_tokens_out == plain.stats().constrained_tokens_out
    drafting.close()
    plain.close()


def test_samples_of_one_prompt_follow_the_grammar_each(
    engine: Engine, person: CompiledGrammar, tokenizer: GPTJTokenizer
) -> None:
    callers = submit_many(
        engine,
        [3, 4, 5],
        *({"grammar": person, "max_tokens": 900, "seed": n, "temperature": 1} for n in range(4)),
    )
    texts = [text_of(caller, tokenizer) for caller in callers]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


def test_an_output_ends_with_its_grammar_despite_min_tokens(
    engine: Engine, compiler: GrammarCompiler, tokenizer: GPTJTokenizer
) -> None:
    grammar = compiler.compile(Grammar.of_regex("ab?"))
    for params in ({"min_tokens": 20}, {"ignore_eos": True}):
        caller = submit(engine, [7], grammar=grammar, max_tokens=30, **params)
        assert text_of(caller, tokenizer) == "ab"
        assert reason(caller) == "stop"
    caller = submit(engine, [7], grammar=grammar, max_tokens=1, temperature=0)
    assert reason(caller) in ("stop", "length")


def test_a_contradiction_fails_its_request_alone(
    engine: Engine, compiler: GrammarCompiler, tokenizer: GPTJTokenizer
) -> None:
    digits = compiler.compile(Grammar.of_regex("[0-9]+"))
    letters = tuple(tokenizer.encode("abc"))
    other = submit(engine, [5], max_tokens=8, ignore_eos=True)
    caller = submit(engine, [5], grammar=digits, allowed_token_ids=letters)
    assert isinstance(caller.error, GrammarError)
    assert "allows no further token" in str(caller.error)
    assert len(other.ids) == 8


def test_beam_search_takes_bans_but_no_grammar(engine: Engine, person: CompiledGrammar) -> None:
    with pytest.raises(ValueError, match="grammar does not work with beam search"):
        search(engine, [5], BeamParams(2), grammar=person)
    allowed = (20, 21, 22)
    beams = search(engine, [5], BeamParams(2), allowed_token_ids=allowed, max_tokens=6).beams
    assert set(beams[0]) <= set(allowed)


def test_bans_equal_the_reference(model: GPTJForCausalLM) -> None:
    """Token by token, with and without penalties; adjust is the slow and plain way."""
    size = model.config.vocab_size
    params = SamplingParams(
        max_tokens=50,
        temperature=0,
        allowed_token_ids=tuple(range(10, 40)),
        bad_words_ids=((12,), (14, 15), (16, 16, 17)),
        repetition_penalty=1.2,
        min_tokens=4,
    )
    sampler = Sampler([30], torch.device("cpu"), size)
    sampler.add(0, params, [1, 2], [11])
    output: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        logits = torch.randn(1, size, generator=generator)
        logits[0, [12, 15, 16, 17]] += 3
        logits[0, 30] = -torch.inf if output else 50.0
        expected = logits.clone()
        expected[0, 30] = -torch.inf
        expected = adjust(expected[0], params, [1, 2], output, [11])
        logits[0, 30] = 50.0
        (token,) = sampler.sample(logits, [0]).tokens
        assert token == int(expected.argmax())
        if token == 11:
            break
        output.append(token)
    sampler.close()
    assert 12 not in output and set(output) <= set(range(10, 40)) - {30}


def test_masks_are_expanded_on_any_device(device: torch.device) -> None:
    size = 77
    words = np.stack([packed({0, 31, 32, 64, 76}, size), packed(range(0, size, 3), size)])
    expected = torch.from_numpy(~unpacked(words, size))
    assert torch.equal(excluded(words, size, device).cpu(), expected)


def test_a_grammar_holds_on_any_device(
    device: torch.device,
    model: GPTJForCausalLM,
    person: CompiledGrammar,
    tokenizer: GPTJTokenizer,
) -> None:
    engine = new_engine(copy.deepcopy(model).to(device))
    caller = submit(engine, [9, 1], grammar=person, max_tokens=900, temperature=1, seed=1)
    jsonschema.validate(json.loads(text_of(caller, tokenizer)), SCHEMA)
    engine.close()


HOSTILE: dict[str, tuple[str, Any]] = {
    "a deep schema": ("json", '{"items":' * 3000 + "{}" + "}" * 3000),
    "a long enum": ("json", {"enum": [f"value {i} of a long enum" for i in range(100_000)]}),
    "a schema of itself": ("json", {"$ref": "#"}),
    "references in a circle": (
        "json",
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ),
    "a long chain of references": (
        "json",
        {
            "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(2500)}
            | {"d2500": {"type": "integer"}},
            "$ref": "#/$defs/d0",
        },
    ),
    "exponentially many cases": (
        "json",
        {
            "allOf": [
                {"anyOf": [{"properties": {f"{x}{i}": {"const": 1}}} for x in "xy"]}
                for i in range(25)
            ]
        },
    ),
    "multiples that keep the library busy": ("json", {"type": "integer", "multipleOf": 99999989}),
    "nested counts": ("regex", "((x{1,1000}){1,1000}){1,1000}"),
    "a huge count": ("regex", "x{3000000}"),
    "an exponential automaton": ("regex", "(.*a.{200}b|.*c.{180}d){3}"),
    "deep parentheses": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "look-ahead": ("regex", "(?=a)a"),
    "an endless rule": ("grammar", "start: start"),
    "a long chain of rules": (
        "grammar",
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(5000)) + '\nr5000: "b"',
    ),
    "deep groups": ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "an unknown rule": ("grammar", "start: other"),
}
# Cheap to begin with, and bounded at each token: these may as well fail when they are used.
LAZY = {"nested counts", "an exponential automaton", "a huge count"}
MAKERS = {
    "json": Grammar.of_json_schema,
    "regex": Grammar.of_regex,
    "grammar": Grammar.of_grammar,
}


@pytest.mark.slow
def test_hostile_grammars_are_refused_with_a_reason_while_the_engine_goes_on(
    engine: Engine, compiler: GrammarCompiler, person: CompiledGrammar, tokenizer: GPTJTokenizer
) -> None:
    """Some crash the library, or keep it busy for hours: in a process of its own."""
    ended = threading.Event()
    longest = [0.0]

    def work() -> None:
        while not ended.is_set():
            start = time.monotonic()
            submit(engine, [5], max_tokens=4, ignore_eos=True).wait()
            longest[0] = max(longest[0], time.monotonic() - start)

    worker = threading.Thread(target=work)
    worker.start()
    accepted = {}
    try:
        for name, (kind, source) in HOSTILE.items():
            try:
                accepted[name] = compiler.compile(MAKERS[kind](source))
            except GrammarError as error:
                assert 10 < len(str(error)) < 700, name
    finally:
        ended.set()
        worker.join()
    assert set(accepted) <= LAZY
    for grammar in accepted.values():
        last = submit(engine, [5], grammar=grammar, max_tokens=60, temperature=1).wait()[-1]
        assert isinstance(last, Finished) or isinstance(last.error, GrammarError), last
    assert longest[0] < 15  # less than the time of one that hangs
    caller = submit(engine, [5], grammar=person, max_tokens=900)
    jsonschema.validate(json.loads(text_of(caller, tokenizer)), SCHEMA)


def test_a_refusal_is_remembered_and_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    grammar = Grammar.of_json_schema({"type": "string", "maxLength": 3})
    assert not compiler.knows(grammar)
    assert compiler.compile(grammar) is compiler.compile(grammar)
    bad = Grammar.of_regex("(a)\\1")
    with pytest.raises(GrammarError, match="backreferences are not supported"):
        compiler.compile(bad)
    assert compiler.knows(bad)
    with pytest.raises(GrammarError, match="backreferences are not supported"):
        compiler.compile(bad)


def test_a_refused_grammar_is_retried_later(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that everybody uses is never evicted, and a busy machine may have been the reason."""
    grammar = Grammar.of_regex("[p-q]{3}")
    compiler.compile(grammar).refuse("the mask of one token takes seconds")
    with pytest.raises(GrammarError, match="takes seconds"):
        compiler.compile(grammar)
    bad = Grammar.of_regex("(b)\\1")
    for _ in range(2):
        with pytest.raises(GrammarError, match="backreferences"):
            compiler.compile(bad)
    known = len(compiler._compiled), len(compiler._refused)
    monkeypatch.setattr(compiler_module, "REFUSED_SECONDS", 0.0)
    assert compiler.compile(grammar) is compiler.compile(grammar)
    with pytest.raises(GrammarError, match="backreferences"):
        compiler.compile(bad)
    assert (len(compiler._compiled), len(compiler._refused)) == (known[0] + 1, known[1] - 1)


DATA = {"a": [1, {"b": []}], "c": {}}
LAYOUTS = {
    "compact": json.dumps(DATA, separators=(",", ":")),
    "spaces": json.dumps(DATA),
    "indented by four": json.dumps(DATA, indent=4),
    "indented by tabs": json.dumps(DATA, indent="\t"),
    "of Windows": json.dumps(DATA, indent=2).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("compact", [False, True])
def test_json_may_be_laid_out_as_usual_or_compactly(
    compiler: GrammarCompiler, tokenizer: GPTJTokenizer, compact: bool
) -> None:
    compiled = compiler.compile(Grammar.of_json_object(compact=compact))

    def accepts(text: str) -> bool:
        matcher, ids = compiled.matcher(), tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    accepted = {name for name, text in LAYOUTS.items() if accepts(text)}
    assert accepted == ({"compact"} if compact else LAYOUTS.keys())
    for blanks in ("  ", "\n\n", " \n", "\n" + 21 * " "):
        assert not accepts(f'{{"a":{blanks}1}}')


def multiples(number: int) -> Grammar:
    """A schema that keeps the library busy for longer than allowed."""
    return Grammar.of_json_schema({"type": "integer", "multipleOf": 99999989 + number})


@pytest.mark.slow
def test_slow_grammars_delay_only_one_another(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_SLOW", 2)
    slow = [compiler.submit(multiples(number)) for number in range(1, 4)]
    quick = [compiler.submit(Grammar.of_regex(f"[a-z]{{{length}}}")) for length in (31, 32)]
    for future in quick:
        assert future.result(60)
    # The third one has been turned away, since two slow ones were waiting.
    assert [future.done() for future in slow] == [False, False, True]
    with pytest.raises(QueueFullError, match="2 grammars are waiting"):
        slow[2].result()
    assert not compiler.knows(multiples(3))
    with pytest.raises(QueueFullError, match="2 grammars are waiting"):
        compiler.submit(multiples(3))  # at once: it takes no more of the others' time
    for future in slow[:2]:
        with pytest.raises(GrammarError, match="more than 3 seconds"):
            future.result(60)
    assert compiler.knows(multiples(1))


def test_refused_grammars_evict_no_compiled_ones(
    tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 2)
    monkeypatch.setattr(compiler_module, "MAX_REFUSED", 3)
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_of(tokenizer))
    try:
        good = [Grammar.of_regex(f"a{{{count}}}") for count in (3, 4)]
        compiled = [compiler.compile(each) for each in good]
        bad = [Grammar.of_regex(f"(a{{{count}}})\\1") for count in range(1, 6)]
        for each in bad:
            with pytest.raises(GrammarError):
                compiler.compile(each)
        assert [compiler.compile(each) for each in good] == compiled
        assert [compiler.knows(each) for each in bad] == [False, False, True, True, True]
        compiler.compile(Grammar.of_regex("b"))
        assert [compiler.knows(each) for each in good] == [False, True]
    finally:
        compiler.close()


def test_closing_ends_the_wait_for_grammars(tokenizer: GPTJTokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_of(tokenizer))
    compiler.prepare()
    waiting = [compiler.submit(multiples(number)) for number in range(3)]
    compiler.close()
    ends = [future.exception(10) for future in waiting]
    assert isinstance(ends[-1], ClosedError)
    assert all(isinstance(end, ClosedError | GrammarError) for end in ends)
    with pytest.raises(ClosedError):
        compiler.submit(multiples(4))


def test_a_prepared_compiler_builds_nothing_more(
    tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_of(tokenizer))
    compiler.prepare()
    monkeypatch.setattr(compiler_module, "_text_only", None)
    monkeypatch.setattr(trial_module.subprocess, "Popen", None)
    try:
        assert compiler.compile(Grammar.of_regex("[a-z]"))
    finally:
        compiler.close()


def test_preparing_never_fails(
    tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without llguidance, or if the process does not start: only formats are affected."""
    grammar = Grammar.of_regex("[a-z]")
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_of(tokenizer))
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "llguidance", None)
        compiler.prepare()
        with pytest.raises(MissingPackageError, match="llguidance"):
            compiler.compile(grammar)
    with monkeypatch.context() as broken:
        no_memory = OSError(12, "Cannot allocate memory")
        broken.setattr(trial_module.subprocess, "Popen", Mock(side_effect=no_memory))
        compiler.prepare()
        assert "Cannot allocate memory" in caplog.text
    with monkeypatch.context() as broken:
        broken.setattr(trial_module, "PROGRAM", "nothing.py")
        compiler.prepare()
        assert "did not start" in caplog.text
    try:
        assert compiler.compile(grammar)
    finally:
        compiler.close()


def test_a_grammar_is_not_blamed_for_a_killed_process(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by the system, for lack of memory."""
    monkeypatch.setattr(compiler_module, "QUICK_SECONDS", 3)  # time to find it
    compiler.prepare()
    assert compiler._ready is not None
    process = compiler._ready.quick._process
    assert process is not None
    process.kill()
    process.wait()
    assert compiler.compile(Grammar.of_regex("killed before"))
    parent = psutil.Process(compiler._ready.quick._process.pid)  # type: ignore[union-attr]
    future = compiler.submit(multiples(7))
    while not (tries := parent.children()):
        assert not future.done()
    tries[0].kill()
    with pytest.raises(RuntimeError, match="status -9"):
        future.result(10)
    assert not compiler.knows(multiples(7))


@pytest.mark.slow
def test_killed_processes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[weakref.ref[subprocess.Popen[bytes]]] = []
    start = trial_module.subprocess.Popen

    def noting(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **kwargs)
        started.append(weakref.ref(process))
        return process

    monkeypatch.setattr(trial_module.subprocess, "Popen", noting)
    trial = Trial({})  # the process needs settings
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not start"):
            trial.run(Grammar.of_regex("a"), 1)
    gc.collect()
    assert [process() for process in started] == [None, None]


@pytest.mark.parametrize("lengths", [(1,), (1, 2), (2, 3)])
def test_bad_words_are_looked_up_rather_than_tried_one_by_one(lengths: tuple[int, ...]) -> None:
    words = tuple((7,) * (length - 1) + (last,) for length in lengths for last in (40, 41))
    params = SamplingParams(max_tokens=9, bad_words_ids=words)
    mask = TokenMask(params, packed(range(64), 64), [], [])
    outputs: list[int] = []
    for token in (7, 7, 3, 7):
        mask.compute()
        (allowed,) = unpacked(mask.words[None], 64)
        ends = [w for w in words if tuple(outputs)[len(outputs) - len(w) + 1 :] == w[:-1]]
        banned = {w[-1] for w in ends if len(w) <= len(outputs) + 1}
        assert set(np.flatnonzero(~allowed)) == banned
        outputs.append(token)
        mask.advance(token)
    assert len(mask._lengths) == len(set(lengths) - {1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.of_choices(["a" * 70_000] * 2), "140000 characters"),
        (lambda: Grammar.of_json_schema("{"), "not valid JSON"),
        (lambda: Grammar.of_json_schema("[]"), "a JSON Schema is an object"),
        (lambda: Grammar.of_json_schema({"x-guidance": {}}), "x-guidance"),
        (lambda: Grammar.of_regex(""), "empty"),
        (lambda: Grammar.of_regex("a" * 200_000), "200000 characters"),
        (lambda: Grammar.of_choices([]), "at least one choice"),
        (lambda: Grammar.of_choices(["a", ""]), "no empty ones"),
        (lambda: Grammar.of_choices(["a"] * 5000), "4096 choices"),
        (lambda: Grammar.of_grammar(" "), "empty"),
    ],
)
def test_impossible_grammars_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(message)):
        make()


def test_a_mask_that_hangs_fails_its_request_and_not_the_others(
    engine: Engine,
    compiler: GrammarCompiler,
    tokenizer: GPTJTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread is given up; the grammar is refused from then on."""
    monkeypatch.setattr(mask_threads, "PATIENCE_SECONDS", 0.2)
    released = threading.Event()
    source = Grammar.of_regex("[a-z]{40}")
    hanging = compiler.compile(source)
    other = compiler.compile(Grammar.of_regex("[A-Z]{10}"))
    compute = TokenMask.compute

    def slow(mask: TokenMask) -> None:
        if mask._grammar is hanging:
            released.wait(30)
        compute(mask)

    monkeypatch.setattr(TokenMask, "compute", slow)
    callers = [submit(engine, [5], grammar=each, max_tokens=60) for each in (other, hanging, other)]
    try:
        assert "takes seconds" in str(callers[1].error)
        for caller in (callers[0], callers[2]):
            assert re.fullmatch("[A-Z]{10}", text_of(caller, tokenizer))
        with pytest.raises(GrammarError, match="takes seconds"):
            compiler.compile(source)
    finally:
        released.set()


def test_without_eos_an_output_ends_with_its_grammar(
    model: GPTJForCausalLM, tokenizer: GPTJTokenizer
) -> None:
    compiler = GrammarCompiler(tokenizer, model.config.vocab_size, [])
    engine = Engine(TorchRunner(model, 64), eos_ids=[], banned_ids=[model.config.vocab_size - 1])
    try:
        caller = submit(engine, [5], grammar=compiler.compile(Grammar.of_regex("[0-9]{1,6}")))
        assert re.fullmatch("[0-9]{6}", text_of(caller, tokenizer))
        assert reason(caller) == "stop"
    finally:
        engine.close()
        compiler.close()
