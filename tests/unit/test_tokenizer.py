"""The tokenizer's ids, texts, offsets, windows and padding are transformers'.

Both read one saved folder, so that what is compared includes what is written.
"""

from __future__ import annotations

import json
import pickle
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptj.tokenizer import END_OF_TEXT, EXTRA_TOKENS, GPTJTokenizer
from gptj_local.s3 import LocalS3

PROMPT = "In a shocking finding, scientists"

TEXTS = [
    "",
    " ",
    PROMPT,
    "Hello  world, it's  they'll I'M",
    " leading and trailing \n",
    "\t\n\r\n \u00a0\u2003\u3000x\u2028y\u0085z",
    "def f(x):\n    return {x: [1_000, 0xFF, 3.14e-10]}  # comment\n\n\n",
    "Füße, naïve café, cafe\u0301, ﬁ, Ⅳ, İstanbul",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी",
    "🤗 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0010ffff",
    "\x00\x01\x1b[31m\x7f\x80\x9f\ufeff\ufffd",
    f"{END_OF_TEXT}{END_OF_TEXT} in {END_OF_TEXT}text{END_OF_TEXT}",
    "<|extratoken_1|> <|extratoken_143|><|extratoken_144|> <|endoftext |> <|endoftext",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890123456789012345678901234567890",
]

# Between 1 and 30 tokens each.
BATCH = [PROMPT, "one", "  two three\n", "👩‍👩‍👧‍👦 four " + "five " * 12, f"six{END_OF_TEXT}"]
QUESTIONS = ["Who found it?", "What did the scientists find?", "Where", "When was that?", "Why"]
CONTEXT = "The scientists found a herd of unicorns in a remote valley. " * 6


@pytest.fixture(scope="module")
def folder(gpt2_vocabulary: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-J's tokenizer as we save it."""
    tokenizer = GPTJTokenizer.from_vocabulary(*gpt2_vocabulary)
    tokenizer.pad_token = END_OF_TEXT
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> GPTJTokenizer:
    return GPTJTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours: GPTJTokenizer, theirs: Any, *texts: Any, **arguments: Any) -> None:
    """The same call has the same keys and values, offsets included."""
    mine = ours(*texts, return_offsets_mapping=True, **arguments)
    other = theirs(*texts, return_offsets_mapping=True, **arguments)
    assert set(mine) == set(other)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(mine[name], value, strict=True)
        else:
            assert mine[name] == value, name


def test_gpt_j_has_50400_entries_of_which_143_are_unused(ours: GPTJTokenizer, theirs: Any) -> None:
    assert len(ours) == len(theirs) == 50400
    assert ours.vocab_size == theirs.vocab_size == 50257
    assert ours.unused_ids == tuple(range(50257, 50400))
    assert len(ours.unused_ids) == EXTRA_TOKENS
    assert ours.bos_token_id == ours.eos_token_id == ours.pad_token_id == 50256
    assert ours.model_max_length == theirs.model_max_length == 2048
    assert ours.encode(PROMPT) == [818, 257, 14702, 4917, 11, 5519]
    assert ours.convert_ids_to_tokens(range(50400)) == theirs.convert_ids_to_tokens(range(50400))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_offsets_and_texts_equal_transformers(
    ours: GPTJTokenizer, theirs: Any, text: str
) -> None:
    assert_same(ours, theirs, text)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert b"".join(ours.token_bytes(i) for i in ids) == text.encode()
    assert ours.convert_tokens_to_ids(ours.convert_ids_to_tokens(ids)) == ids


@pytest.mark.slow
@settings(max_examples=100)
@given(
    st.lists(st.one_of(st.text(), st.sampled_from([" ", "  ", "\n", "'s", "the", *TEXTS]))).map(
        "".join
    )
)
@example(END_OF_TEXT)
def test_any_text_round_trips_with_transformers_ids(
    ours: GPTJTokenizer, theirs: Any, text: str
) -> None:
    assert_same(ours, theirs, text)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=100)
@given(st.lists(st.integers(0, 50399), max_size=20), st.booleans())
def test_any_ids_decode_like_transformers(
    ours: GPTJTokenizer, theirs: Any, ids: list[int], skip: bool
) -> None:
    """Including halves of characters."""
    text = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip) == text
    assert ours.batch_decode([ids, ids[:1]], skip)[0] == text
    assert ours.decode(torch.tensor(ids, dtype=torch.long), skip) == text
    assert ours.decode(np.array(ids, dtype=np.int32), skip) == text
    if not skip:
        assert b"".join(map(ours.token_bytes, ids)).decode(errors="replace") == text


@pytest.mark.slow
@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_files_own_rule_for_leading_spaces_is_kept(
    folder: Path, tmp_path: Path, trim: bool, prefix: bool
) -> None:
    """Offsets with or without the space before a word, and a space before the first word."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["trim_offsets"] = trim
    content["pre_tokenizer"]["add_prefix_space"] = prefix
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["add_prefix_space"] = prefix
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = GPTJTokenizer.from_pretrained(tmp_path)
    assert ours("a bc", return_offsets_mapping=True).offset_mapping[1] == (
        (2, 4) if trim else (1, 4)
    )
    ours.save_pretrained(tmp_path / "saved")
    for place in (tmp_path, tmp_path / "saved"):
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        assert_same(ours, theirs, TEXTS)
        assert_same(ours, theirs, TEXTS, TEXTS[::-1])


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first", "do_not_truncate"])
@pytest.mark.parametrize(("max_length", "stride"), [(1, 0), (4, 0), (4, 3), (7, 2), (200, 5)])
def test_windows_of_texts_equal_transformers(
    ours: GPTJTokenizer,
    theirs: Any,
    truncation: Any,
    max_length: int,
    stride: int,
    overflow: bool,
) -> None:
    for texts in (BATCH, BATCH[3]):
        assert_same(
            ours,
            theirs,
            texts,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=overflow,
        )


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("padding", [False, True, "max_length"])
@pytest.mark.parametrize(("max_length", "stride"), [(40, 0), (24, 8), (500, 16)])
def test_windows_over_the_context_of_a_question_equal_transformers(
    ours: GPTJTokenizer,
    theirs: Any,
    max_length: int,
    stride: int,
    padding: Any,
    overflow: bool,
) -> None:
    """As for question answering: the question stays whole, the context is cut."""
    pairs: list[tuple[Any, Any]] = [
        (QUESTIONS, [CONTEXT] * len(QUESTIONS)),
        (QUESTIONS[0], CONTEXT),
    ]
    for first, second in pairs:
        common = {
            "max_length": max_length,
            "stride": stride,
            "padding": padding,
            "return_overflowing_tokens": overflow,
        }
        assert_same(ours, theirs, first, second, truncation="only_second", **common)
        assert_same(ours, theirs, second, first, truncation="only_first", **common)


@settings(max_examples=100)
@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(6, 26),
    st.integers(0, 2),
    st.booleans(),
)
def test_pairs_cut_on_both_sides_equal_transformers(
    ours: GPTJTokenizer,
    theirs: Any,
    first: int,
    second: int,
    max_length: int,
    stride: int,
    overflow: bool,
) -> None:
    """Every window of the one text with every window of the other, in their order."""
    assert_same(
        ours,
        theirs,
        " one" * first,
        " two" * second,
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=overflow,
    )


@pytest.mark.filterwarnings("ignore:.max_length. is ignored:UserWarning")
def test_max_length_alone_truncates_as_in_transformers(ours: GPTJTokenizer, theirs: Any) -> None:
    for arguments in ({}, {"truncation": False}, {"padding": True}, {"padding": "do_not_pad"}):
        assert_same(ours, theirs, BATCH, max_length=3, **arguments)
    long = "word " * 2100
    assert len(ours(long, truncation=True).input_ids) == 2048
    assert_same(ours, theirs, long, truncation=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40},
        {"padding": "max_length", "max_length": 41, "pad_to_multiple_of": 8},
        {"padding": True, "truncation": True, "max_length": 8, "pad_to_multiple_of": 4},
        {"padding": "max_length", "truncation": True, "max_length": 4},
        {
            "padding": True,
            "truncation": True,
            "max_length": 6,
            "stride": 2,
            "return_overflowing_tokens": True,
        },
    ],
)
def test_padding_equals_transformers(
    ours: GPTJTokenizer,
    theirs: Any,
    arguments: Mapping[str, Any],
    tensors: str | None,
    side: str,
) -> None:
    common = {**arguments, "return_tensors": tensors, "padding_side": side}
    assert_same(ours, theirs, BATCH, **common)
    assert_same(ours, theirs, BATCH, BATCH[::-1], **common)
    assert_same(ours, theirs, PROMPT, **common)


@pytest.mark.slow
def test_the_padding_side_is_kept_with_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    ours = GPTJTokenizer.from_pretrained(folder)
    ours.padding_side = "left"
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (ours, GPTJTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(["a", "b c"], padding=True).attention_mask == [[0, 1], [1, 1]]
        assert_same(tokenizer, theirs, BATCH, padding=True)


def test_tensors_are_rows_of_int64(ours: GPTJTokenizer) -> None:
    ids = ours(PROMPT, return_tensors="pt").input_ids
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[818, 257, 14702, 4917, 11, 5519]]
    assert ours.batch_decode(ids) == [PROMPT]
    empty = ours(["", ""], return_tensors="pt", return_offsets_mapping=True)
    assert empty.input_ids.shape == (2, 0)
    assert empty.offset_mapping.shape == (2, 0, 2)
    assert ours([], return_tensors="np").input_ids.shape == (0, 0)
    with pytest.raises(ValueError, match=r"rows of 1 to 2 tokens.*padding=True"):
        ours(["a", "b c"], return_tensors="pt")


def test_sequence_ids_distinguish_question_context_and_padding(
    ours: GPTJTokenizer, theirs: Any
) -> None:
    arguments: dict[str, Any] = {
        "truncation": "only_second",
        "max_length": 24,
        "stride": 8,
        "padding": "max_length",
        "return_overflowing_tokens": True,
    }
    contexts = [CONTEXT] * len(QUESTIONS)
    mine = ours(QUESTIONS, contexts, return_sequence_ids=True, **arguments)
    other = theirs(QUESTIONS, contexts, **arguments)
    assert mine.sequence_ids == [other.sequence_ids(row) for row in range(len(mine.input_ids))]
    with_tensors = ours(
        QUESTIONS, contexts, return_sequence_ids=True, return_tensors="pt", **arguments
    )
    assert with_tensors.sequence_ids == mine.sequence_ids


def test_the_result_moves_to_a_device_and_survives_pickle(
    ours: GPTJTokenizer, device: torch.device
) -> None:
    result = ours(PROMPT, return_tensors="pt", return_sequence_ids=True).to(device)
    assert result.input_ids.device.type == device.type
    assert pickle.loads(pickle.dumps(result)).sequence_ids == result["sequence_ids"]
    assert not hasattr(result, "labels")


def test_a_pickled_tokenizer_is_the_same(ours: GPTJTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.files() == ours.files()
    assert copy(BATCH) == ours(BATCH)


@pytest.mark.parametrize("names_special_tokens", [False, True])
def test_vocabulary_merges_and_added_tokens_load_as_in_transformers(
    ours: GPTJTokenizer, tmp_path: Path, gpt2_files: Path, names_special_tokens: bool
) -> None:
    """The older files; `<|endoftext|>` is special without being an added token."""
    (tmp_path / "vocab.json").write_bytes((gpt2_files / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_files / "vocab.bpe").read_bytes())
    added = {f"<|extratoken_{n}|>": 50256 + n for n in range(EXTRA_TOKENS, 0, -1)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if names_special_tokens:
        special = {"bos_token": {"content": END_OF_TEXT}, "pad_token": "<|extratoken_7|>"}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        config = {"model_max_length": 100, "padding_side": "left", "add_prefix_space": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = GPTJTokenizer.from_pretrained(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(theirs) == 50400
    assert loaded.unused_ids == ours.unused_ids
    for text in TEXTS:
        assert_same(loaded, theirs, text)
        ids = loaded.encode(text)
        assert loaded.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    if names_special_tokens:
        assert loaded.pad_token_id == theirs.pad_token_id == 50263
        assert loaded.model_max_length == 100
        assert_same(loaded, theirs, TEXTS, padding=True)
    else:
        assert [loaded.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


@pytest.mark.slow
def test_a_tokenizer_saved_by_transformers_loads(theirs: Any, tmp_path: Path) -> None:
    """With a padding token of its own, and with truncation left on in the file."""
    other = transformers.AutoTokenizer.from_pretrained(theirs.name_or_path)
    other.add_special_tokens({"pad_token": "<|padding|>"})
    other(TEXTS, padding=True, truncation=True, max_length=4)
    other.save_pretrained(tmp_path)
    ours = GPTJTokenizer.from_pretrained(tmp_path)
    assert len(ours) == 50401
    assert ours.pad_token_id == other.pad_token_id == 50400
    assert_same(ours, other, TEXTS)
    assert_same(ours, other, [*TEXTS, "a<|padding|> b"], padding=True)


def test_ids_with_gaps_between_them_can_be_decoded(tmp_path: Path) -> None:
    """Some published files skip ids: the number of entries is not the largest id."""
    files = GPTJTokenizer.train([], 257).files()
    content = json.loads(files["tokenizer.json"])
    moved = content["model"]["vocab"]["z"]
    content["model"]["vocab"]["z"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    ours = GPTJTokenizer.from_pretrained(tmp_path)
    assert len(ours) == 257
    assert ours.encode("z") == [999]
    assert ours.decode(999) == "z"
    assert_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), "a z")
    assert ours.decode([moved, 999]) == "z"
    with pytest.raises(ValueError, match=f"id {moved} is not in the vocabulary"):
        ours.convert_ids_to_tokens(moved)
    assert ours.rows_needed == 1000
    ours.check_rows(1000, "folder")
    with pytest.raises(
        ValueError,
        match=r"^folder: the tokenizer has an id 999 \(for the token 'z'\), .* vocab_size is 999",
    ):
        ours.check_rows(999, "folder")
    ours.add_tokens("a new one")
    assert ours.rows_needed == max(ours.get_vocab().values()) + 1


def test_a_tokenizer_saves_to_and_loads_from_s3(ours: GPTJTokenizer, s3: LocalS3) -> None:
    address = f"s3://gptj/{secrets.token_hex(6)}/tokenizer"
    ours.save_pretrained(address)
    assert GPTJTokenizer.from_pretrained(address).files() == ours.files()


def test_concurrent_calls_do_not_interfere(ours: GPTJTokenizer) -> None:
    """Each with its own truncation and padding."""
    calls: list[dict[str, Any]] = [
        {"padding": True, "padding_side": side, "truncation": True, "max_length": length}
        for length in range(1, 13)
        for side in ("left", "right")
    ]
    expected = [ours(TEXTS, **arguments) for arguments in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda arguments: ours(TEXTS, **arguments), calls * 10))
    assert found == expected * 10


@pytest.mark.parametrize("vocab_size", [257, 300, 500])
def test_training_is_deterministic_and_gives_the_requested_size(
    vocab_size: int, tmp_path: Path
) -> None:
    texts = [line for line in Path(__file__).read_text().splitlines() if line]
    trained = [GPTJTokenizer.train(iter(texts), vocab_size) for _ in range(4)]
    assert len({tokenizer.files()["tokenizer.json"] for tokenizer in trained}) == 1
    ours = trained[0]
    assert len(ours) == vocab_size
    assert ours.bos_token_id == ours.eos_token_id == ours.pad_token_id
    assert ours.unused_ids == ()
    assert ours.model_max_length is None
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert_same(ours, theirs, text)
        assert ours.decode(ours.encode(text)) == text
    assert_same(ours, theirs, TEXTS, padding=True)
    if vocab_size == 257:
        assert len(ours.encode("é€")) == 5, "the bytes alone"


def test_few_texts_give_a_smaller_vocabulary() -> None:
    assert len(GPTJTokenizer.train(["ab ab"], 1000)) < 270
    assert len(GPTJTokenizer.train([], 1000)) == 257


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncation": "first"}, "truncation must be one of .*'only_first'.* got 'first'"),
        ({"padding": "left"}, "padding must be one of .*'max_length'.* got 'left'"),
        ({"padding": True, "padding_side": "up"}, "padding_side must be one of .* got 'up'"),
        ({"return_tensors": "tf"}, "return_tensors must be one of .*'pt'.* got 'tf'"),
        ({"truncation": True, "max_length": 0}, "max_length must be 1 or more, got 0"),
        ({"max_length": -3}, "max_length must be 1 or more, got -3"),
        ({"truncation": True, "max_length": 5, "stride": 5}, r"in \[0, max_length=5\), got 5"),
        ({"truncation": True, "max_length": 5, "stride": -1}, r"in \[0, max_length=5\), got -1"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be 1 or more, got 0"),
        (
            {"padding": True, "truncation": True, "max_length": 10, "pad_to_multiple_of": 8},
            "max_length=10 is not a multiple of pad_to_multiple_of=8",
        ),
        ({"truncation": "only_second", "max_length": 3}, "'only_second' needs text_pair"),
        (
            {"text_pair": "one " * 9, "truncation": "only_second", "max_length": 6},
            "max_length=6 and truncation='only_second' leave room for 0 tokens of .* 10.*remedy",
        ),
        (
            {"text_pair": "one " * 9, "truncation": True, "max_length": 6, "stride": 4},
            "max_length=6 and truncation='longest_first' leave room for 3 .* than stride=4; remedy",
        ),
        ({"text_pair": ["one"]}, "both be strings or both be lists"),
        ({"text_pair": 5}, "text_pair must be a string or a list of strings, got 5"),
        ({"text": ["a", "b"], "text_pair": ["c"]}, "2 texts cannot pair with 1"),
        ({"text": None}, "text must be a string or a list of strings, got None"),
        ({"text": ["a", 7]}, "text 1 must be a string, got int"),
        ({"text": "a\ud800b"}, "text 0 has a lone surrogate.* at character 1.*remedy"),
        ({"text": ["a", "bc\udfff"]}, "text 1 has a lone surrogate.* at character 2"),
        ({"text_pair": "\ud83d\ude00"}, "text 0 has a lone surrogate.* at character 0"),
    ],
)
def test_a_wrong_call_is_an_error_with_its_value(
    ours: GPTJTokenizer, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(**{"text": PROMPT, **arguments})


def test_the_remedy_for_half_a_surrogate_pair_works(ours: GPTJTokenizer) -> None:
    with pytest.raises(ValueError, match="remedy"):
        ours.encode("a\ud800b")
    remedied = "a\ud800b\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ours.decode(ours.encode(remedied)) == "a\ufffdb😀"


@pytest.mark.parametrize("ids", [50400, [0, 50400, 1], [0, 2**31], torch.tensor([50400])], ids=str)
def test_ids_without_tokens_are_skipped_like_in_transformers(
    ours: GPTJTokenizer, theirs: Any, ids: Any
) -> None:
    assert ours.decode(ids) == theirs.decode(ids)
    with pytest.raises(ValueError, match="is not in the vocabulary of 50400 entries"):
        ours.check_ids(ids)


@pytest.mark.parametrize("ids", [-1, [5, -100], torch.tensor([-100])], ids=str)
def test_a_negative_id_is_an_error(ours: GPTJTokenizer, ids: Any) -> None:
    with pytest.raises(ValueError, match="is negative"):
        ours.decode(ids)


def test_tokenize_and_get_vocab_equal_transformers(ours: GPTJTokenizer, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_equal_transformers(special: bool, tmp_path: Path) -> None:
    """Their count, ids, and what they do to texts; and they are there after saving."""
    GPTJTokenizer.train(["some text to learn from"], 280).save_pretrained(tmp_path / "a")
    ours = GPTJTokenizer.from_pretrained(tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    new = ["<tool>", "text", "<tool>", "e"]
    text = "some text<tool> to learn"
    assert ours.unused_ids == ()
    assert ours.add_tokens(new, special_tokens=special) == theirs.add_tokens(
        new, special_tokens=special
    )
    assert len(ours) == len(theirs)
    assert_same(ours, theirs, text)
    ids = ours.encode(text)
    for skip in (False, True):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.token_bytes(ours.convert_tokens_to_ids("<tool>")[0]) == b"<tool>"
    ours.save_pretrained(tmp_path / "b")
    assert GPTJTokenizer.from_pretrained(tmp_path / "b").encode(text) == ids
    assert ours.add_tokens("<tool>", special_tokens=special) == 0
    with pytest.raises(ValueError, match="non-empty strings"):
        ours.add_tokens("")


def test_a_padding_token_can_be_added() -> None:
    ours = GPTJTokenizer.train(["some text to learn from"], 280)
    before = len(ours)
    assert ours.add_special_tokens({"pad_token": "<pad>"}) == 1
    assert ours.pad_token_id == before
    assert ours(["some text to learn", "e"], padding=True).input_ids[1][-1] == before
    with pytest.raises(ValueError, match=r"sep_token is not one of.*remedy: add_tokens"):
        ours.add_special_tokens({"sep_token": "<sep>"})


def test_settings_can_replace_the_folders(folder: Path) -> None:
    ours = GPTJTokenizer.from_pretrained(
        folder, padding_side="left", pad_token=END_OF_TEXT, model_max_length=5
    )
    assert (ours.padding_side, ours.pad_token_id, ours.model_max_length) == ("left", 50256, 5)
    batch = ours(["one two", "one"], padding=True)
    assert batch.attention_mask == [[1, 1], [0, 1]]
    with pytest.raises(TypeError, match="bogus"):
        GPTJTokenizer.from_pretrained(folder, bogus=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("ids", [[1.5], [[1, 2]], torch.tensor([[1, 2]]), "12", None])
def test_decoding_anything_but_a_list_of_ids_is_an_error(ours: GPTJTokenizer, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"must be an integer or one list of them.*batch_decode"):
        ours.decode(ids)


def test_tokens_are_looked_up_whole(ours: GPTJTokenizer) -> None:
    """A single string is one token, not a list of characters."""
    assert ours.convert_tokens_to_ids("Ġscientists") == [5519]
    assert ours.convert_ids_to_tokens(5519) == ["Ġscientists"]
    with pytest.raises(ValueError, match="' scientists' is not in the vocabulary of 50400"):
        ours.convert_tokens_to_ids([" scientists"])
    assert ours.decode(np.int64(5519)) == " scientists"


def test_missing_settings_are_errors_with_a_remedy(
    folder: Path, gpt2_vocabulary: tuple[Any, Any]
) -> None:
    shared, merges = gpt2_vocabulary
    vocabulary = dict(shared)  # other tests use it too
    ours = GPTJTokenizer.from_vocabulary(vocabulary, merges)
    with pytest.raises(ValueError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
        ours(BATCH, padding=True)
    ours.pad_token = "<pad>"
    with pytest.raises(ValueError, match="'<pad>' is not in the vocabulary of 50400 entries"):
        ours(BATCH, padding=True)
    ours.pad_token, ours.model_max_length = END_OF_TEXT, None
    with pytest.raises(ValueError, match="truncation needs max_length"):
        ours(BATCH, truncation=True)
    with pytest.raises(ValueError, match="padding='max_length' needs max_length"):
        ours(BATCH, padding="max_length")
    del vocabulary[END_OF_TEXT]
    with pytest.raises(ValueError, match=r"vocabulary of 50256 entries lacks '<|endoftext|>'"):
        GPTJTokenizer.from_vocabulary(vocabulary, merges)
    with pytest.raises(ValueError, match="do not match"):
        GPTJTokenizer.from_vocabulary({"a": 0, END_OF_TEXT: 1}, [("a", "b")])


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["a"], 256, "vocab_size must be at least 257 .*, got 256"),
        ("a", 300, r"texts must be several strings, got one; remedy: \[text\]"),
        (["a", b"b"], 300, "text 1 must be a string, got bytes"),
        (["a", "\udc80"], 300, "text 1 has a lone surrogate.* at character 0"),
    ],
)
def test_invalid_training_arguments_are_errors(texts: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTJTokenizer.train(texts, size)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "\ud800"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", "nothing"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "#version: 0.2\nno-merge"),
        ("merges.txt", "#version: 0.2\nx y"),
        ("added_tokens.json", '{"<new>": 7}'),
    ],
)
def test_an_unreadable_file_is_named(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    if name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    else:
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=name if name != "added_tokens.json" else "'<new>'.*id 7"):
        GPTJTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["two words", "\u2581the", "a\nb", "日本", "\x7f"])
@pytest.mark.parametrize("format_", ["tokenizer.json", "vocab.json"])
def test_an_entry_that_is_not_byte_level_is_named(tmp_path: Path, entry: str, format_: str) -> None:
    """When it is loaded, not once its bytes are needed; as an added token it is its own text."""
    content = json.loads(GPTJTokenizer.train([CONTEXT], 300).files()["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    number = vocabulary[entry] = 51000
    if format_ == "tokenizer.json":
        (tmp_path / format_).write_text(json.dumps(content))
    else:
        (tmp_path / format_).write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    named = re.escape(f"entry {entry!r} (id {number})")
    with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
        GPTJTokenizer.from_pretrained(tmp_path)
    settings = {"additional_special_tokens": [entry]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_bytes(number) == entry.encode()
    assert tokenizer.encode(entry) == [number]


def test_a_folder_without_a_tokenizer_names_the_missing_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json with merg"):
        GPTJTokenizer.from_pretrained(tmp_path)
