"""generate: greedy and beam results equal transformers'; samples have the right distribution."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pydoc
from typing import Any

import pytest
import torch
import transformers

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.generation import StopStrings, generate
from gptj.sampling import SamplingParams, choose, restrict

# What transformers says where no length is given, as some calls here leave it out on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")

CONFIG = GPTJConfig(
    vocab_size=60,
    n_positions=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,  # wide, so that probabilities differ and eos comes
)


def models(seed: int = 0) -> tuple[GPTJForCausalLM, Any]:
    torch.manual_seed(seed)
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**CONFIG.to_dict())).eval()
    ours = GPTJForCausalLM(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def prompts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 2 tokens, padded on the left with 2."""
    tokens = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 3, 5)):
        tokens[row, :padding] = 2
        mask[row, :padding] = 0
    return tokens, mask


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_new_tokens": 30},
        {"max_length": 12},
        {"max_new_tokens": 25, "min_new_tokens": 20},
        {"max_new_tokens": 25, "eos_token_id": [1, 5, 9], "pad_token_id": 3},
        {"max_new_tokens": 20, "repetition_penalty": 1.7},
        {"max_new_tokens": 15, "use_cache": False},
        {"max_new_tokens": 20, "num_beams": 4},
        {"max_new_tokens": 20, "num_beams": 3, "num_return_sequences": 3},
        {"max_new_tokens": 20, "num_beams": 3, "length_penalty": 2.0},
        {"max_new_tokens": 20, "num_beams": 3, "length_penalty": -1.0},
        {"max_new_tokens": 20, "num_beams": 4, "early_stopping": True},
        {"max_new_tokens": 20, "num_beams": 4, "eos_token_id": [1, 5, 9, 11]},
        {"max_new_tokens": 20, "num_beams": 2, "min_new_tokens": 10},
        {"max_new_tokens": 12, "num_beams": 3, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_greedy_and_beams_equal_transformers(seed: int, arguments: dict[str, Any]) -> None:
    """Left-padded batches of random models; exact equality of all tokens."""
    ours, theirs = models(seed)
    tokens, mask = prompts(seed)
    arguments = {"pad_token_id": 2, **arguments}
    expected = theirs.generate(tokens, attention_mask=mask, do_sample=False, **arguments)
    found = ours.generate(tokens, attention_mask=mask, **arguments)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_new_tokens": 25, "eos_token_id": [1, 5, 9], "min_new_tokens": 5},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "max_new_tokens": 20, "eos_token_id": [1, 5, 9], "length_penalty": 2.0},
        {"num_beams": 2, "min_new_tokens": 6},
    ],
    ids=str,
)
def test_scores_equal_transformers(arguments: dict[str, Any]) -> None:
    """Each step's scores, the beams' ranks and origins; fp32, so to 1e-4."""
    ours, theirs = models(1)
    tokens, mask = prompts(1)
    arguments = {
        "pad_token_id": 2,
        "attention_mask": mask,
        "output_scores": True,
        "return_dict_in_generate": True,
        **arguments,
    }
    expected = theirs.generate(tokens, do_sample=False, **arguments)
    found = ours.generate(tokens, **arguments)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert len(found.scores) == len(expected.scores)
    for ours_V, theirs_V in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours_V, theirs_V, rtol=0, atol=1e-4)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    if "num_beams" in arguments:
        torch.testing.assert_close(
            found.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4
        )
        assert found.beam_indices.tolist() == expected.beam_indices.tolist()


def test_scores_of_samples_equal_transformers_at_the_same_tokens() -> None:
    """The scores to sample from, after temperature, top_k and top_p. One step, so no draw."""
    ours, theirs = models(2)
    tokens, mask = prompts(2)
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    (expected,) = theirs.generate(tokens, pad_token_id=2, **arguments).scores
    (found,) = ours.generate(tokens, **arguments).scores
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPTJTokenizer, Any]:
    """A tokenizer, ours and transformers', for the models of `worded`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = GPTJTokenizer.train(["some text to learn from, and some more text"], 290)
    ours.save_pretrained(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def worded(seed: int) -> tuple[GPTJForCausalLM, Any]:
    """Models of 300 rows: ten more than the tokenizer has entries."""
    torch.manual_seed(seed)
    config = GPTJConfig(**{**CONFIG.to_dict(), "vocab_size": 300})
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**config.to_dict())).eval()
    ours = GPTJForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_end_rows_as_transformers_does(
    seed: int, beams: int, words: tuple[GPTJTokenizer, Any]
) -> None:
    """Strings that begin or end within a token, and one that spans several."""
    our_tokenizer, their_tokenizer = words
    ours, theirs = worded(seed)
    tokens = torch.randint(3, 280, (3, 5), generator=torch.Generator().manual_seed(seed))
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 20,
        "num_beams": beams,
        "pad_token_id": 2,
    }
    free = ours.generate(tokens, **arguments)
    texts = [
        "".join(chr(byte) for token in row[7:11] for byte in our_tokenizer.token_bytes(token))
        for row in free.tolist()
        if all(map(our_tokenizer.has_id, row[7:11]))
    ]
    stops = [text[1:-1] for text in texts if text[1:-1].isascii() and text[1:-1]] or ["zzz"]
    stops += ["e", "te"]
    expected = theirs.generate(
        tokens, do_sample=False, stop_strings=stops, tokenizer=their_tokenizer, **arguments
    )
    found = ours.generate(tokens, stop_strings=stops, tokenizer=our_tokenizer, **arguments)
    assert found.tolist() == expected.tolist()


def test_beams_without_an_allowed_token_are_an_error() -> None:
    ours, _ = models()
    tokens, mask = prompts()
    with pytest.raises(ValueError, match="min_new_tokens=3 and 60 ids in eos_token_id leave"):
        ours.generate(
            tokens, attention_mask=mask, num_beams=3, min_new_tokens=3, eos_token_id=[*range(60)]
        )


ASCII = [chr(code) for code in range(1, 127)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [ASCII[96:122], ASCII[31:109], ASCII],
    ids=lambda stops: f"{len(stops)} strings",
)
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_that_complete_stop_strings_end_as_in_transformers(
    stops: list[str], beams: int, words: tuple[GPTJTokenizer, Any]
) -> None:
    """Also where fewer beams than the width go on, or none, in one row or in several."""
    our_tokenizer, their_tokenizer = words
    for seed, rows, results in itertools.product((2, 7), (1, 2), (1, beams)):
        ours, theirs = worded(seed)
        tokens = torch.randint(3, 280, (rows, 5), generator=torch.Generator().manual_seed(seed))
        arguments: dict[str, Any] = {
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": 8,
            "num_beams": beams,
            "num_return_sequences": results,
            "pad_token_id": 2,
            "stop_strings": stops,
            "output_scores": True,
            "return_dict_in_generate": True,
        }
        expected = theirs.generate(tokens, do_sample=False, tokenizer=their_tokenizer, **arguments)
        found = ours.generate(tokens, tokenizer=our_tokenizer, **arguments)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.beam_indices.tolist() == expected.beam_indices.tolist()
        assert len(found.scores) == len(expected.scores)
        torch.testing.assert_close(
            found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-4
        )


def test_a_stop_string_ends_a_row_at_once(words: tuple[GPTJTokenizer, Any]) -> None:
    """With the token that completes it, which may begin before it and end after it."""
    tokenizer, _ = words
    stops = StopStrings.of(["me te"], tokenizer)
    assert stops is not None
    ids = tokenizer.encode("some text")
    done = [stops.complete([], ids[: end + 1]) for end in range(len(ids))]
    text = ""
    for token, complete in zip(ids, done, strict=True):
        before, text = text, text + tokenizer.decode(token)
        assert complete == ("me te" in text and "me te" not in before)
    assert any(done)
    assert stops.complete(ids[:-1], ids[-1:]) == done[-1]


class Kept:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def __repr__(self) -> str:  # in a test's name, which xdist wants alike in all processes
        return "Kept()"

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def test_a_streamer_gets_what_transformers_gives_it() -> None:
    ours, theirs = models(1)
    tokens, mask = prompts(1)
    by_us, by_them = Kept(), Kept()
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 2}
    ours.generate(tokens, streamer=by_us, **arguments)
    theirs.generate(tokens, streamer=by_them, do_sample=False, **arguments)
    assert by_us.values == by_them.values
    assert by_us.values[-1] == "end"


def test_transformers_streamers_work(words: tuple[GPTJTokenizer, Any]) -> None:
    ours, _ = worded(0)
    tokenizer, theirs = words
    prompt = tokenizer("some text", return_tensors="pt").input_ids
    streamer = transformers.TextIteratorStreamer(theirs, timeout=30)
    result = ours.generate(prompt, streamer=streamer, max_new_tokens=8)
    assert "".join(streamer) == theirs.decode(result[0])


def test_help_shows_every_argument() -> None:
    assert "stop_strings" in inspect.signature(GPTJForCausalLM.generate).parameters
    text = pydoc.render_doc(GPTJForCausalLM.generate)
    for name in inspect.signature(generate).parameters:
        assert name in text
    assert "Continue each row of a batch" in text


def test_a_top_p_of_zero_leaves_the_likeliest_token() -> None:
    ours, _ = models(0)
    tokens, mask = prompts(0)
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20}
    greedy = ours.generate(tokens, **arguments)
    drawn = ours.generate(tokens, do_sample=True, temperature=5.0, top_p=0.0, seed=1, **arguments)
    assert torch.equal(drawn, greedy)


def test_a_finished_row_is_padded_while_others_continue() -> None:
    """And has no token after its eos."""
    ours, _ = models(0)
    tokens, mask = prompts(0)
    eos_ids = [int(row[9]) for row in ours.generate(tokens, attention_mask=mask, eos_token_id=[])]
    result = ours.generate(
        tokens, attention_mask=mask, max_new_tokens=20, eos_token_id=eos_ids[:1], pad_token_id=2
    )
    ended = result[0, 7:].tolist()
    assert set(ended[ended.index(eos_ids[0]) + 1 :]) == {2}
    assert result.shape[1] > 10


def test_padding_is_found_without_a_mask_as_transformers_does() -> None:
    ours, theirs = models(1)
    tokens, _ = prompts(1)
    expected = theirs.generate(tokens, do_sample=False, max_new_tokens=8, pad_token_id=2)
    assert ours.generate(tokens, max_new_tokens=8, pad_token_id=2).tolist() == expected.tolist()


@pytest.mark.slow
def test_a_seed_repeats_a_sample_and_another_differs() -> None:
    ours, _ = models()
    tokens, mask = prompts()
    arguments: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "attention_mask": mask}
    first = ours.generate(tokens, seed=7, **arguments)
    assert torch.equal(first, ours.generate(tokens, seed=7, **arguments))
    assert not torch.equal(first, ours.generate(tokens, seed=8, **arguments))
    torch.manual_seed(3)
    by_global = ours.generate(tokens, **arguments)
    torch.manual_seed(3)
    assert torch.equal(by_global, ours.generate(tokens, **arguments))
    assert ours.generate(tokens, seed=1, num_return_sequences=2, **arguments).shape == (6, 27)


@pytest.mark.slow
def test_draws_follow_the_distribution() -> None:
    """20,000 draws against p: chi-squared with 7 degrees of freedom; 40 has p < 1e-5."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.5])
    params = SamplingParams(temperature=0.7)
    expected = (logits / 0.7).softmax(dim=-1) * 20_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat(
        [choose(logits.expand(500, -1), [params] * 500, [generator] * 500) for _ in range(40)]
    )
    counts = draws.bincount(minlength=8)
    assert float(((counts - expected) ** 2 / expected).sum()) < 40


@pytest.mark.parametrize(
    "params", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8}], ids=str
)
def test_restrictions_equal_transformers_warpers(params: dict[str, Any]) -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = restrict(logits, [SamplingParams(temperature=0.8, **params)] * 16)
    expected = transformers.TemperatureLogitsWarper(0.8)(None, logits)
    if "top_k" in params:
        expected = transformers.TopKLogitsWarper(params["top_k"])(None, expected)
    if "top_p" in params:
        expected = transformers.TopPLogitsWarper(params["top_p"])(None, expected)
    if "min_p" in params:
        expected = transformers.MinPLogitsWarper(params["min_p"])(None, expected)
    torch.testing.assert_close(found, expected)


def test_sampling_stays_within_top_k() -> None:
    ours, _ = models()
    tokens, mask = prompts()
    greedy = ours.generate(tokens, attention_mask=mask, max_new_tokens=10)
    sampled = ours.generate(
        tokens, attention_mask=mask, max_new_tokens=10, do_sample=True, top_k=1, temperature=5.0
    )
    assert torch.equal(greedy, sampled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_what_fp32_finds_likeliest(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Rounding may decide near-ties: 0.1 bounds its error in bf16 logits, which spread by 1.7."""
    ours, _ = models()
    tokens, mask = prompts()
    half = copy.deepcopy(ours).to(device, dtype)
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10}  # so no eos ends a row early
    whole = torch.cat([mask, mask.new_ones(3, 10)], dim=1)

    def generated(num_beams: int) -> torch.Tensor:
        found = half.generate(
            tokens.to(device), attention_mask=mask.to(device), num_beams=num_beams, **arguments
        )
        assert found.device.type == device.type and found.shape == (3, 17)
        return found.cpu()

    def log_probs(sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By the fp32 model: of the new tokens, and of the likeliest in their places."""
        with torch.no_grad():
            logits = ours(sequences, attention_mask=whole).logits[:, 6:-1]
        all_log_probs = logits.log_softmax(2)
        chosen = all_log_probs.gather(2, sequences[:, 7:, None]).squeeze(2)
        all_log_probs[:, :, CONFIG.eos_token_id] = -torch.inf  # min_new_tokens rules it out
        return chosen, all_log_probs.amax(2)

    chosen, likeliest = log_probs(generated(num_beams=1))
    assert (likeliest - chosen).max() < 0.1
    expected = ours.generate(tokens, attention_mask=mask, num_beams=2, **arguments)
    found, _ = log_probs(generated(num_beams=2))
    assert (log_probs(expected)[0].sum(1) - found.sum(1)).max() < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 60}, "7 tokens and 60 new ones exceed .* 64"),
        ({"max_length": 7}, "nothing to generate"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, r"min_tokens must be in \[0, max_tokens=4\]"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be in .* got -1.0"),
        ({"temperature": 0.0, "do_sample": True}, "use do_sample=False"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0.1"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "beam search does not sample"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would repeat"),
        ({"num_beams": 2, "streamer": Kept()}, "a streamer needs num_beams=1, got 2"),
        ({"output_scores": True}, "needs return_dict_in_generate=True"),
        ({"stop_strings": "a"}, "remedy: tokenizer=tokenizer"),
        ({"stop_strings": [""]}, "non-empty strings, got"),
    ],
    ids=str,
)
def test_unsupported_arguments_are_refused_with_the_reason(
    arguments: dict[str, Any], message: str
) -> None:
    ours, _ = models()
    with pytest.raises(ValueError, match=message):
        ours.generate(prompts()[0], **arguments)


def test_generated_ids_can_be_trained_on() -> None:
    """As in distillation: they are not inference tensors."""
    ours, _ = models()
    ids = ours.generate(prompts()[0], max_new_tokens=3)
    ours(ids, labels=ids).loss.backward()
    assert ours.lm_head.bias.grad is not None


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        models()[0].generate(torch.zeros(1, 0, dtype=torch.long))


def test_a_tokens_probability_does_not_depend_on_the_batch() -> None:
    """A row's seeded draw does not depend on its neighbours' temperature."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=5)
    alone = choose(logits[:1], [params], [torch.Generator().manual_seed(5)])
    others = [SamplingParams(temperature=3.0), SamplingParams(temperature=0)]
    together = choose(
        logits,
        [params, *others],
        [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6), None],
    )
    assert together[0] == alone[0]
    assert together[2] == logits[2].argmax()
    assert math.isfinite(float(logits[0, alone[0]]))
