"""GPT-2's byte-level BPE, built with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post_processors

END_OF_TEXT = "<|endoftext|>"
EXTRA_TOKENS = 143  # <|extratoken_1|> … pad the embedding to 50400 rows; never in text
EXTRA = r"<\|extratoken_\d+\|>"


def byte_level_bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], prefix_space: bool = False
) -> Tokenizer:
    try:
        model = models.BPE(vocab=dict(vocabulary), merges=list(merges))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"vocabulary and merges do not match: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=False)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Mapping[str, int], *, special: bool) -> None:
    """Add tokens in the order of their ids, checking that they get those ids."""
    for token, number in sorted(tokens.items(), key=lambda each: each[1]):
        added = AddedToken(token, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(
                f"added token {token!r} should have id {number}, but gets "
                f"{tokenizer.token_to_id(token)}; remedy: ids of added tokens must follow the "
                f"vocabulary's without a gap"
            )


def check_byte_level(tokenizer: Tokenizer) -> None:
    """ValueError if an entry that is no added token has a character that stands for no byte."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if not BYTE_OF_CHARACTER.keys() >= set(token) and token not in added:
            other = min(set(token) - BYTE_OF_CHARACTER.keys())
            raise ValueError(
                f"the vocabulary is not a byte-level BPE's: entry {token!r} (id {number}) has "
                f"{other!r}, which stands for no byte; remedy: make it an added token, or use a "
                f"byte-level tokenizer"
            )


def make_special(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    """Mark entries as special: never split, and omitted with skip_special_tokens."""
    added = tokenizer.get_added_tokens_decoder().values()
    done = {token.content for token in added if token.special}
    for token in sorted(set(tokens) - done):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes map to themselves, the others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return {**table, **{chr(0x100 + index): byte for index, byte in enumerate(others)}}


BYTE_OF_CHARACTER = byte_of_character()
