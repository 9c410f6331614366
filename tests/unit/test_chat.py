"""Chat templates: published ones render as in transformers, and the assistant's turns are found."""

from __future__ import annotations

import importlib.util
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from slow_cases import slow
from transformers.utils.chat_template_utils import render_jinja_template

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.chat import (
    READY,
    ChatTemplate,
    ChatTemplateError,
    SlowTemplateError,
    encode_chat,
    limits,
    read_template,
    template_of,
)
from gptj.chat.sources import MAX_BYTES
from gptj.interop.exporter import export_weights
from gptj.interop.importer import import_weights
from gptj.interop.merging import merge_adapter
from gptj.training.settings import Settings
from gptj.training.tokenizer import load_tokenizer

TEXTS = [
    "Below is an instruction that describes a task.\n\n### Instruction:\nInput: user, assistant",
    "A café opens at nine; naïve tourists wait — 東京 is far away. 😀",
]
USER = {"role": "user", "content": "Where does the café open?  "}
ASSISTANT = {"role": "assistant", "content": " In 東京 😀\n\nat nine. "}
SYSTEM = {"role": "system", "content": "Answer <briefly> & 'well'."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": "Naïve?"}],
    "system": [SYSTEM, USER, {**ASSISTANT, "tool_calls": None}],
}


def published() -> dict[str, str]:
    """Chat templates of published models, by their names; trl itself is not imported.

    The trainings' variants have `{% generation %}` blocks.
    """
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {name: (folder / f"{name}.jinja").read_text() for name in NAMES}


NAMES = [
    *("cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss", "idefics3", "lfm2"),
    *("llama3", "llama3_1", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_vl"),
    *("cohere_training", "gemma_training", "llama3_training", "phi3_training"),
    *("qwen2_5_training", "qwen3_training"),
]
PUBLISHED = published()
ALL = PUBLISHED | {name: read_template(name) for name in READY}
MARKED = sorted(name for name, source in ALL.items() if "endgeneration" in source)


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def theirs(tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def rendered(
    theirs: Any, source: str, chat: list[dict[str, Any]], **arguments: Any
) -> str | Exception:
    try:
        return theirs.apply_chat_template(chat, chat_template=source, tokenize=False, **arguments)
    except Exception as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("chat", CHATS)
def test_published_templates_render_as_in_transformers(
    tokenizer: GPTJTokenizer, theirs: Any, chat: str
) -> None:
    """Texts are equal, and both refuse the same chats."""
    refused = 0
    for name, source in ALL.items():
        template = template_of(tokenizer, source)
        assert template is not None
        for prompt in (False, True):
            expected = rendered(theirs, source, CHATS[chat], add_generation_prompt=prompt)
            if isinstance(expected, Exception):
                with pytest.raises(ChatTemplateError, match="rejects the messages"):
                    template.render(CHATS[chat], add_generation_prompt=prompt)
                refused += 1
            else:
                text = template.render(CHATS[chat], add_generation_prompt=prompt)
                assert text == expected, name
    assert refused < 12


def added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, "special": True, **flags}


SPECIAL: dict[str, dict[str, Any]] = {
    "none": {},
    "texts": {"sep_token": "<SEP>", "cls_token": "<CLS>", "mask_token": "<M>", "unk_token": "<U>"},
    "objects": {"sep_token": added("<SEP>"), "unk_token": added("<U>"), "pad_token": None},
    "null": {"unk_token": None, "bos_token": None},
    "listed": {"additional_special_tokens": ["<|user|>", added("<|bot|>")]},
    "named": {"extra_special_tokens": {"image_token": "<I>", "user_token": "<|user|>"}},
    "of a model's own": {"image_token": "<I>", "video_token": added("<V>"), "add_a_token": True},
}


@pytest.mark.parametrize("case", SPECIAL)
def test_templates_have_the_special_tokens_of_transformers(
    tokenizer: GPTJTokenizer, tmp_path: Path, case: str
) -> None:
    """All that the files name, also from the files that we write then."""
    names = [f"{n}_token" for n in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    names += ["image_token", "video_token", "user_token", "add_a_token"]
    names += ["additional_special_tokens", "extra_special_tokens"]
    source = "|".join(f"{name}={{{{ {name} }}}}" for name in names)
    tokenizer.save_pretrained(tmp_path / "1")
    file = tmp_path / "1/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SPECIAL[case]}))
    ours = GPTJTokenizer.from_pretrained(tmp_path / "1")
    ours.save_pretrained(tmp_path / "2")
    for folder in ("1", "2"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        template = template_of(GPTJTokenizer.from_pretrained(tmp_path / folder), source)
        assert template is not None
        assert template.render([USER]) == rendered(theirs, source, [USER])
        if folder == "1":
            expected = template.render([USER])
        assert template.render([USER]) == expected


def test_assistant_masks_equal_transformers(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    """Their mask, except for bytes of a last character that tokens share."""
    chat = [USER, {"role": "assistant", "content": "In 東京, at nine."}, USER]
    chat.append({"role": "assistant", "content": "No 😀 yes"})
    assert len(MARKED) == 10
    for name in MARKED:
        expected = rendered_with_mask(theirs, ALL[name], chat)
        template = template_of(tokenizer, ALL[name])
        assert template is not None and template.marks_turns
        encoded = encode_chat(tokenizer, template, chat)
        assert encoded.ids == expected["input_ids"], name
        assert [int(each) for each in encoded.assistant] == expected["assistant_masks"], name


def rendered_with_mask(theirs: Any, source: str, chat: list[dict[str, Any]]) -> Any:
    return theirs.apply_chat_template(
        chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )


PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written(tokenizer: GPTJTokenizer, source: str, chat: list[dict[str, Any]]) -> list[str]:
    """The texts of the assistant's turns, each from its first token to its last."""
    template = template_of(tokenizer, source)
    assert template is not None
    encoded = encode_chat(tokenizer, template, chat)
    assert tokenizer.decode(encoded.ids) == template.render(chat)
    turns: list[list[int]] = [[]]
    for token, assistant in zip(encoded.ids, encoded.assistant, strict=True):
        if assistant:
            turns[-1].append(token)
        elif turns[-1]:
            turns.append([])
    return [tokenizer.decode(turn) for turn in turns if turn]


def test_turns_are_found_without_generation_blocks(tokenizer: GPTJTokenizer) -> None:
    chat = [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "東京 😀"}]
    eos = tokenizer.eos_token
    expected = [f"{ASSISTANT['content']}{eos}", f"東京 😀{eos}"]
    assert written(tokenizer, PLAIN, chat) == expected
    marked = PLAIN.replace(
        "{{ message.content }}{{ eos_token }}",
        "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}",
    )
    assert written(tokenizer, marked, [*chat[2:3], chat[-1]]) == expected


def test_ambiguous_turns_are_refused(tokenizer: GPTJTokenizer) -> None:
    last = "{{ messages[-1].content }}"
    template = ChatTemplate(f"{last}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}")
    with pytest.raises(ChatTemplateError, match=r"message 1 of the chat .*endgeneration"):
        encode_chat(tokenizer, template, [USER, ASSISTANT, USER])
    with pytest.raises(ChatTemplateError, match="no message with the role assistant"):
        encode_chat(tokenizer, template, [USER])
    unseen = ChatTemplate("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match="omits the assistant"):
        encode_chat(tokenizer, unseen, [USER, ASSISTANT])
    changed = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(ChatTemplateError, match="modifies the output"):
        encode_chat(tokenizer, ChatTemplate(changed), [USER, ASSISTANT])


READY_TEXTS = {
    "alpaca": "Answer.\n\n### Instruction:\nHi\n\n### Response:\nHo<|endoftext|>\n\n"
    "### Instruction:\nMore\n\n### Response:\n",
    "dolly": "Answer.\n\n### Instruction:\nHi\n\n### Response:\nHo\n\n### End\n\n"
    "### Instruction:\nMore\n\n### Response:\n",
    "gpt-jt": "Answer.\n\nInput: Hi\nOutput: Ho\n\nInput: More\nOutput:",
    "pygmalion": "Anna's Persona: Answer.\n<START>\nYou: Hi\nAnna: Ho\nYou: More\nAnna:",
}


@pytest.mark.parametrize("name", READY)
def test_builtin_templates_match_the_models_formats(tokenizer: GPTJTokenizer, name: str) -> None:
    template = template_of(tokenizer, read_template(name))
    assert template is not None and template.marks_turns and not template.wants_parts()
    chat = [
        {"role": "system", "content": "Answer.", "name": "Anna"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "More"},
    ]
    text = template.render(chat, add_generation_prompt=True)
    assert text == READY_TEXTS[name]
    # What is trained on begins with what is served.
    whole = template.render([*chat, {"role": "assistant", "content": "Ho"}])
    assert whole.startswith(text)
    assert template.stop
    with pytest.raises(ChatTemplateError, match="system message, first"):
        template.render([*chat, chat[0]])


def test_a_template_sets_the_stop_strings() -> None:
    assert ChatTemplate("{% set stop = ['a', 'b'] %}").stop == ("a", "b")
    for source in ("", "{% set stop = other %}", "{% set stop = [''] %}", "{{ stop }}"):
        assert ChatTemplate(source).stop == ()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (r"""["\n" + "You:"]""", ("\nYou:",)),
        (r"""["\nYou:"] + ["x"]""", ("\nYou:", "x")),
        (r"""["\n" ~ "You:"]""", ("\nYou:",)),
        ("""["=" * 3] * 2""", ("===", "===")),
        ("""["%s:" % "You"]""", ("You:",)),
        ("""["You:" | upper, "%s:" | format("I")]""", ("YOU:", "I:")),
        ("""("a", "b")""", ("a", "b")),
        ("""["a"] if 2 ** 2 == 4 else []""", ("a",)),
        ("""["a" + 1]""", ()),
        ("""["a"] * 1000000000""", ()),
        ("""["a", other]""", ()),
        ("""["a" + eos_token]""", ()),
        ("""other""", ()),
        ("""[] + []""", ()),
    ],
)
def test_stop_strings_are_computed(expression: str, expected: tuple[str, ...]) -> None:
    assert ChatTemplate(f"{{% set stop = {expression} %}}").stop == expected


def test_templates_that_only_take_content_parts_are_detected() -> None:
    wanting = {name for name, source in PUBLISHED.items() if ChatTemplate(source).wants_parts()}
    assert wanting == {"idefics3"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",  # immutable
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ range(1000000) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('refused') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler() }}",
        "{{ lipsum() }}",
    ],
)
def test_forbidden_template_operations_are_errors(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"rejects the messages: ."):
        ChatTemplate(source).render([USER])


def test_a_templates_own_reason_is_cut() -> None:
    source = "{{ raise_exception('too many turns: ' ~ 'x' * 1000000) }}"
    with pytest.raises(ChatTemplateError, match="too many turns: xxx") as error:
        ChatTemplate(source).render([USER])
    assert len(str(error.value)) < 2000


GROWING = (
    "{{% set ns = namespace(x='a'*9) %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ ns.x }}}}"
)
LARGE = [
    "{{ 'aaaaaaaaaa' * 1000000000 }}",
    "{{ 1000000000 * [1] }}",
    "{{ 'x' * 3000000 ~ 'x' * 3000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ ('9' * 4000) | int * 9 }}",
    "{{ ('f' * 4000000) | int(base=16) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ ('%(a)s' * 100000) | format(a='x' * 1000000) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ ('\t' * 4000000).expandtabs(100000) }}",
    "{{ ('a' * 4000000).replace('a', 'b' * 4000000) }}",
    "{{ ('a' * 4000000).translate({97: 'b' * 4000000}) }}",
    "{{ ('a' * 4000000).join(['b', 'b', 'b']) }}",
    "{{ ''.join(range(100000) | map(attribute='x', default='a' * 4000000)) }}",
    "{{ ('a' * 4000000) | replace('a', 'b' * 4000000) }}",
    "{{ ('a' * 4000000) | join('b' * 4000000) }}",
    "{{ range(100000) | map(attribute='x', default='a' * 4000000) | join }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x' | indent(1000000000) }}",
    "{{ ('x\n' * 100000) | indent('y' * 4000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ ('a ' * 1000000) | wordwrap(1) }}",
    "{{ ([[1]] * 60000) | sum(start=[]) }}",
    "{% filter center(1000000000) %}x{% endfilter %}",
    GROWING.format("{% set ns.x = ns.x + ns.x %}"),
    GROWING.format("{% set ns.x = ns.x ~ ns.x %}"),
    GROWING.format("{% set ns.x = [ns.x, ns.x] %}"),
    GROWING.format("{% set ns.x = (ns.x, ns.x) %}"),
    GROWING.format("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    GROWING.format("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    GROWING.format("{% set ns.x = [ns.x, ns.x] | join %}"),
    GROWING.format("{% set ns.x = ns.x.replace('a', 'aa') %}"),
    GROWING.format("{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    GROWING.format("{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{{ f(ns.x, ns.x) }}"),
    "{% for i in range(99999) %}" + "{{ 'x' * 99 }}" + "{% endfor %}",
    "{% for i in range(999) %}{% set x = 'x' * 4000000 ~ i %}{% endfor %}",
    "{% set n = namespace(t='x' * 4000000) %}{{ ([n] * 9999) | sort(attribute='t') | length }}",
    "{% set n = namespace(t='x' * 4000000) %}{{ ([n] * 9999) | max(attribute='t') | length }}",
    "{{ range(9999) | map(attribute='x', default='x' * 4000000) | sort | length }}",
    "{{ range(9999) | groupby('x', default='x' * 4000000) | length }}",
    "{{ range(9999) | groupby('x', 'x' * 4000000) | length }}",
]
# Of values that all have the same hash, and other single calls whose time is not linear.
SAME = "range(0, 2305843009213693951 * 50000, 2305843009213693951)"
UNCHECKED = [
    *(
        f"{{% set t = 'a' * 200000 %}}{{{{ t.{name}('ab' + 'a' * 80000) }}}}"
        for name in ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip")
    ),
    "{{ ('a' * 200000).rsplit(sep='ab' + 'a' * 80000) }}",
    "{{ ('a' * 200000).encode().rfind(('ab' + 'a' * 80000).encode()) }}",
    "{{ ('a' * 200000) | safe | attr('rfind')('ab' + 'a' * 80000) }}",
    "{{ ('a' * 100000) | trim('b' * 100000 ~ 'a') }}",
    "{{ ('\xfc\xe9' * 30000).encode('punycode') }}",
    "{{ ('\xfc\xe9' * 30000).encode(encoding='Puny-Code') if false else "
    "('\xfc' * 30000).encode(errors='xmlcharrefreplace') }}",
    "{{ ('a' * 60000).encode().decode('punycode') }}",
    "{{ (('<!---->' * 90000) | safe).striptags() }}",
    "{{ (('&#64;' * 90000) | safe).unescape() }}",
    "{{ ('a' * 4000000).translate('') }}",
    f"{{{{ dict.fromkeys({SAME}) }}}}",
    f"{{{{ {{}}.fromkeys({SAME}) }}}}",
    f"{{{{ dict({SAME} | batch(2)) }}}}",
    f"{{{{ namespace({SAME} | batch(2)) }}}}",
    f"{{{{ {SAME} | unique | list }}}}",
    "{{ (' ' * 65000) | wordwrap(1) }}",
    "{{ ('ü' * 4000000) | urlencode }}",
    "{{ range(9999) | map(attribute='x', default=[1]) | sum(start=[]) }}",
    "{{ range(300) | map(attribute='x.' * 20000, default=1) | list }}",
    "{{ range(300) | selectattr('x.' * 20000) | list }}",
    "{{ range(300) | rejectattr('x.' * 20000, 'odd') | list }}",
    "{{ range(300) | sort(attribute='x,' * 20000) }}",
    "{{ range(300) | sort(false, false, 'x.' * 20000) }}",
    "{{ range(300) | sum('x.' * 20000) }}",
    "{{ range(300) | join('', 'x.' * 20000) }}",
    "{{ ('{0' ~ '.x' * 20000 ~ '}').format(1) }}",
    "{{ strftime_now('%d' * 20000) }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for x in [1, 1] recursive %}{% if loop.depth < 99 %}{{ loop([1, 1]) }}{% endif %}"
    "{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | map('upper') | list | length }}{% endfor %}",
]


MADE = [
    "{% set x = t[1:] %}",
    "{% set x = t.encode()[::-1] %}",
    "{% set x = b[:-1] %}",
    "{% set x = cycler(*b) %}",
    "{% set x = namespace(d) %}",
    "{% set x = d.keys() - [] %}",
    "{% for x in b | batch(1) %}{% if loop.last %}{% endif %}{% endfor %}",
    "{% for x in b | reverse %}{% if loop.last %}{% endif %}{% endfor %}",
    "{% set x %}{{ b }}{% endset %}",
    "{% set x %}{% for i in range(999) %}{{ b }}{% endfor %}{% endset %}",
    "{% autoescape true %}{% set x %}{{ t }}{% endset %}{% endautoescape %}",
    "{% set x = '%s' % t %}",
    "{% set x = '{}'.format(t) %}",
    "{% macro f() %}{{ t }}{% endmacro %}{% set x = f() %}",
]


@pytest.mark.parametrize("operation", [*MADE[:4], *slow(MADE[4:])])
def test_whatever_is_made_counts(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MADE", 2**20)
    text = "x" * 20_000
    values = {"t": text, "b": [0] * 4000, "d": dict.fromkeys(map(str, range(2000)))}
    source = f"{{% for i in range(n) %}}{operation}{{% endfor %}}"
    if "999" not in operation:
        ChatTemplate(source).render([USER], variables={**values, "n": 1}, seconds=60)
    with pytest.raises(ChatTemplateError, match="makes texts and lists of more than 1048576"):
        ChatTemplate(source).render([USER], variables={**values, "n": 99}, seconds=60)


@pytest.mark.parametrize("source", LARGE + UNCHECKED)
def test_templates_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"does too much: it (makes|gives|has) .* than \d+"):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize("source", ENDLESS)
def test_templates_cannot_keep_a_thread(source: str) -> None:
    with pytest.raises(SlowTemplateError, match=r"does too much: it takes more than 0.1 s"):
        ChatTemplate(source).render([USER], seconds=0.1)


@pytest.mark.parametrize(
    "repeated",
    [
        "b == c",
        "b < c",
        "1 in b",
        "b not in c",
        "b is in c",
        "b is eq c",
        "text is lower",
        "d[b]",
        "{b: 1}",
        "text[1:]",
        "b[1:]",
    ],
)
def test_the_time_is_seen_within_an_expression(
    repeated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that proceeds when somebody looks at it."""
    see_time_pass(monkeypatch)
    values = {"b": (1, 2), "c": (1, 3), "d": {}, "text": "some"}
    once, often = (ChatTemplate(f"{{{{ [{f'{repeated}, ' * n}] }}}}") for n in (1, 20))
    once.render([USER], variables=values, seconds=0.1)
    with pytest.raises(SlowTemplateError):
        often.render([USER], variables=values, seconds=0.1)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for x in range(n) if x is odd and x is even %}{% endfor %}",
        "{% for x in range(n) if x is odd and (x is even) recursive %}{{ loop([]) }}{% endfor %}",
        "{{ range(n) | select('none') | list }}",
        "{{ range(n) | reject('number') | list }}",
        "{{ range(n) | selectattr('x') | list }}",
        "{{ range(n) | rejectattr('x', 'undefined') | list }}",
        "{{ range(n) | map(attribute='x') | list }}",
        "{{ range(n) | batch(99) | list }}",
        "{{ range(n) | slice(1) | list }}",
        "{{ range(n) | unique | list }}",
        "{{ range(n) | sort }}",
        "{{ range(n) | min }}",
        "{{ range(n) | max }}",
        "{{ range(n) | sum }}",
        "{{ range(n) | groupby('x', default=1) }}",
        "{{ range(n) | join }}",
        "{{ ('{{' * n).format() }}",
        "{{ ('%%' * n) % () }}",
    ],
)
def test_the_time_is_seen_in_every_loop(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see_time_pass(monkeypatch)
    template = ChatTemplate(loop)
    template.render([USER], variables={"n": 1}, seconds=0.2)
    with pytest.raises(SlowTemplateError):
        template.render([USER], variables={"n": 40}, seconds=0.2)


def see_time_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check of a rendering's time sees another 10 ms."""
    looks = count()
    clock = SimpleNamespace(
        thread_time=lambda: 0.01 * next(looks), perf_counter=lambda: 0.01 * next(looks)
    )
    monkeypatch.setattr(limits, "time", clock)


def test_a_template_is_not_evaluated_while_it_is_read() -> None:
    """Jinja computes constants when it compiles, and the stop strings are read then too."""
    for source in ("{{ 'a' * 1000000000 }}", "{{ 'x' | center(1000000000) }}"):
        ChatTemplate(source)
    assert ChatTemplate("{% set stop = ['x' | center(1000000000)] %}").stop == ()
    assert ChatTemplate("{% set stop = ['a' * 1000000000] %}").stop == ()


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{:>5}|{!r}|{a[b]}'.format(1, 'x', a={'b': 3}) }}{{ '%5s' % 3 }}{{ '%s' | format(1) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 %}"
        "{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}{{ ns.n }}",
        "{{ messages | tojson(indent=2) }}{{ [1, 'a', none] | tojson(separators=(',', ':')) }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ [1, 2] | join('-') }}",
        "{% set a, b = 1, (2,) %}{{ a ~ b ~ [3] ~ {'k': 4} }}{{ 'x\ny' | indent(4, true) }}",
        "{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m('a') %}b{% endcall %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% autoescape true %}{{ '<' ~ '>' }}{{ ['<'] | join('&') }}{% endautoescape %}",
        "{{ 'x' | center(5) }}{{ 'a b' | wordwrap(1) }}{{ 'a-a' | replace('a', 'bb', 1) }}",
        "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2, 3] | batch(2) | list }}"
        "{{ ','.join(messages | map(attribute='role')) }}",
        "{{ '%s 12345678' % 'a' }}{{ '12345678 %s%%99999999' | format('a') }}"
        "{{ '**%d** %5.1f%%' % (12345678, 2) }}{{ '%(a99999999)s' % {'a99999999': 1} }}"
        "{{ '%(b(c))s' % {'b(c)': 2} }}{{ '%*d' % (3, 1) }}",
        "{{ messages | sort(attribute='role,content') | map(attribute='role') | unique | list }}"
        "{{ messages | groupby('role') | length }}{{ [3, 1, 2] | max }}{{ 'abba' | unique | join }}"
        "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first }}"
        "{{ [[1], [2]] | sum(start=[0]) }}{{ range(5) | batch(2, 0) | list }}{{ nothing | sort }}"
        "{{ range(5) | slice(2) | map('join') | list }}{{ [1, 2] | reverse | list }}",
        "{{ dict([('a', 1), ['b', 2]], c=3) }}{{ {}.fromkeys([1, (2,)], 'x') }}"
        "{{ {1: 2, (3,): 4} }}"
        "{% for x in range(9) if x is odd and x in [1, 3] %}{{ x }}{{ loop.last }}{% endfor %}"
        "{% for x in [1, [2, [3]]] if x recursive %}{{ x if x is number else loop(x) }}"
        "{% endfor %}",
        "{{ 'é'.encode('utf-8').decode('latin-1') }}{{ 'é'.encode('punycode') }}"
        "{{ ' a '.strip(' a').rsplit('b') }}{{ 'xax' | trim('x') }}{{ 'a' in 'ab' == true }}",
        "{{ messages[::-1][0].content[1:-1] }}{{ messages[messages | length - 1]['role'] }}"
        "{{ {'a': 1}.keys() - ['a'] }}{{ 1 < 2 < 3 }}{{ [1] == [1] }}"
        "{{ strftime_now('%Y') | length }}",
        "{{ 'abc'[1:] }}{{ 'a,b'.split(',') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ -2 ** 2 }}{{ 'ab' * 2 }}",
    ],
)
def test_operations_within_the_limits_equal_transformers(source: str) -> None:
    chat = [USER, ASSISTANT]
    (theirs,), _ = render_jinja_template([chat], chat_template=source)
    assert ChatTemplate(source).render(chat) == theirs


def test_a_text_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="lone surrogate at character 1"):
        ChatTemplate(r"{{ 'a\ud800' }}").render([USER])


def test_an_invalid_jinja_template_is_refused_with_its_line() -> None:
    with pytest.raises(ChatTemplateError, match=r"not valid Jinja.*line 2"):
        ChatTemplate("\n{% for %}")
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{{ " + "(" * 5000)
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):  # of Python's own limits
        ChatTemplate("{% for x in [1] %}" * 30 + "{% endfor %}" * 30)
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{{ " + "9" * 5000 + " }}")


def test_a_template_that_is_too_long_is_refused(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    """From wherever it comes, before it is compiled; in bytes."""
    longest = "é" * (MAX_BYTES // 2)
    ChatTemplate(longest)
    path = tmp_path / "mine.jinja"
    path.write_text(longest + "a")
    match = r"has 65537 bytes, but a chat template may have at most 65536: shorten it"
    with pytest.raises(ChatTemplateError, match=match):
        read_template(str(path))
    for make in (ChatTemplate, lambda source: template_of(tokenizer, source)):
        with pytest.raises(ChatTemplateError, match=f"the chat template {match}"):
            make(longest + "a")


def test_templates_come_from_names_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(PLAIN)
    assert read_template(str(path)) == PLAIN
    assert "### Response:" in read_template("dolly")
    with pytest.raises(
        ChatTemplateError, match=r"doly is neither a file nor a built-in chat template.*dolly"
    ):
        read_template("doly")
    with pytest.raises(storage.StorageError, match="directory"):
        read_template(str(tmp_path))
    path.write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match="UTF-8"):
        read_template(str(path))


def test_a_folder_keeps_its_template(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    """From transformers to ours and back: its file, its setting, and several with names."""
    tokenizer.save_pretrained(tmp_path / "plain")
    assert GPTJTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    several = {"default": PLAIN, "tool_use": "tools"}
    for template, default in ((PLAIN, PLAIN), (several, PLAIN), ({"rag": "x"}, None)):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
        theirs.chat_template = template
        theirs.save_pretrained(tmp_path / "old", save_jinja_files=False)
        old = GPTJTokenizer.from_pretrained(tmp_path / "old")
        assert (old.chat_template, old.default_chat_template) == (template, default)
        ours = tmp_path / f"ours-{type(template).__name__}-{len(template)}"
        model = GPTJForCausalLM(
            GPTJConfig(
                vocab_size=len(old),
                n_embd=8,
                n_layer=1,
                n_head=1,
                rotary_dim=4,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        model.save_pretrained(ours, tokenizer=old)
        again = transformers.AutoTokenizer.from_pretrained(ours)
        assert again.chat_template == template
        assert GPTJTokenizer.from_pretrained(ours).chat_template == template
    theirs.chat_template = PLAIN
    theirs.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "chat_template.jinja").exists()
    config = tmp_path / "new" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "other"}))
    assert GPTJTokenizer.from_pretrained(tmp_path / "new").chat_template == PLAIN


def test_import_export_merging_and_training_keep_the_template(
    tokenizer: GPTJTokenizer, tmp_path: Path
) -> None:
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "rotary_dim": 4}
    size = len(tokenizer)
    config = transformers.GPTJConfig(
        vocab_size=size, bos_token_id=0, eos_token_id=0, n_positions=32, **shape
    )
    theirs = tmp_path / "theirs"
    transformers.GPTJForCausalLM(config).save_pretrained(theirs)
    tokenizer.save_pretrained(theirs)
    (theirs / "chat_template.jinja").write_text(PLAIN)
    imported, exported, merged = (str(tmp_path / name) for name in ("in", "out", "merged"))
    import_weights(str(theirs), imported)
    export_weights(imported, exported, format="huggingface")
    model = GPTJForCausalLM.from_pretrained(imported)
    add_lora(model, LoRAConfig(2))
    adapter = str(tmp_path / "adapter")
    own = GPTJTokenizer.from_pretrained(imported)
    model.save_adapter(adapter, base=Base.at(imported), tokenizer=own)
    merge_adapter(imported, adapter, merged)
    bare = str(tmp_path / "bare")
    model.save_adapter(bare, base=Base.at(imported))
    for address in (imported, exported, adapter, merged, bare):
        assert GPTJTokenizer.from_pretrained(address).chat_template == PLAIN
    settings = Settings.model_validate({"model": {"checkpoint": imported}})
    trained = load_tokenizer(settings)
    assert json.loads(trained.files()["tokenizer_config.json"])["chat_template"] == PLAIN


def test_an_invalid_template_setting_is_refused(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    for wrong in (3, [1], [{"name": "default"}], [{"name": "default", "template": 3}]):
        config.write_text(json.dumps({**settings, "chat_template": wrong}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json.*chat_template must"):
            GPTJTokenizer.from_pretrained(tmp_path)


def test_tokens_that_change_the_text_are_refused(tmp_path: Path) -> None:
    vocabulary = GPTJTokenizer.train(TEXTS, 300)
    vocabulary.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ChatTemplateError, match="changes the chat's text"):
        encode_chat(tokenizer, ChatTemplate(PLAIN), [USER, ASSISTANT])


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("content", ["Anna", " Anna wrote ", "x\n"])
def test_continuing_a_message_equals_transformers(name: str, content: str) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": content}]
    plain = read_template(name)
    for source in (plain, plain.replace("message.content", "message.content | trim")):
        ours = ChatTemplate(source, {"eos_token": "<eos>"})
        (theirs,), _ = render_jinja_template(
            [chat], chat_template=source, continue_final_message=True, eos_token="<eos>"
        )
        assert ours.render(chat, continue_final_message=True) == theirs
    silent = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match="omits the message"):
        silent.render(chat, continue_final_message=True)
