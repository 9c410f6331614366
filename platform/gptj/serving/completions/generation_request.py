"""The fields shared by completions and chat requests: sampling, stops and streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, PrivateAttr, WithJsonSchema

from gptj.engine.adapter_slots import Adapter
from gptj.engine.constraints.compiler import CompiledGrammar
from gptj.engine.request import BeamParams
from gptj.sampling import SamplingParams
from gptj.serving.adapters import ServedAdapter
from gptj.serving.completions.constraints import ConstraintFields
from gptj.serving.errors import APIError, InvalidRequestError
from gptj.serving.requests import FailFastList, RequestModel, bounds, checked_text

MAX_SEQUENCES = 128  # outputs of one request: prompts times candidates
MAX_LOGPROBS = 20  # vLLM's limit; OpenAI's completions have 5
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024

Prompt = str | list[int]


def as_token_biases(value: Any) -> dict[int, float]:
    """`{"50256": -100}` as a map of ids. Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"{key!r:.40} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be in [-100, 100], got {bias!r:.40}")
        biases[int(key)] = float(bias)
    return biases


def as_stop_strings(value: Any) -> list[str]:
    """One or several strings. Raises ValueError for an empty one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings")
    if not all(texts):
        raise ValueError("must not have an empty string")
    return [checked_text(text) for text in texts]


_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA = {
    "anyOf": [
        _STRING_SCHEMA,
        {"type": "array", "items": _STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS},
    ]
}
_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_BIASES,
}


class StreamOptions(RequestModel):
    include_usage: bool = False  # a last chunk with token counts
    continuous_usage_stats: bool = False  # vLLM's: counts so far in each chunk
    include_obfuscation: Literal[False] = False  # OpenAI's padding, not supported


class GenerationRequest(ConstraintFields):
    """The fields of both endpoints, with OpenAI's names and vLLM's extensions.

    Subclasses map fields that the endpoints name differently to the properties.
    """

    # New tokens if the request sets no limit; None: all that fit the context.
    default_tokens: ClassVar[int | None] = None
    prompt_field: ClassVar[str] = "prompt"

    model: str | None = None  # the base model's name, which is the default, or an adapter's
    temperature: Annotated[float, bounds(minimum=0, maximum=100)] = 1.0
    top_p: Annotated[float, bounds(minimum=0, maximum=1)] = 1.0
    n: Annotated[int, bounds(minimum=1, maximum=MAX_SEQUENCES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], PlainValidator(as_stop_strings), WithJsonSchema(_STOP_SCHEMA)] = (
        Field(default_factory=list)
    )
    presence_penalty: Annotated[float, bounds(minimum=-2, maximum=2)] = 0.0
    frequency_penalty: Annotated[float, bounds(minimum=-2, maximum=2)] = 0.0
    logit_bias: Annotated[
        dict[int, float], PlainValidator(as_token_biases), WithJsonSchema(_BIAS_SCHEMA)
    ] = Field(default_factory=dict)
    seed: int | None = None
    user: str = ""  # ignored
    # vLLM's. No effect: GPT-J's tokenizer adds none, and requests have no priorities.
    add_special_tokens: bool = False
    priority: Literal[0] = 0

    top_k: Annotated[int, bounds(minimum=-1)] = 0  # only the k most likely tokens; 0 or -1: all
    # Relative to the most likely token's probability.
    min_p: Annotated[float, bounds(minimum=0, maximum=1)] = 0.0
    repetition_penalty: Annotated[float, bounds(minimum=0.01, maximum=100)] = 1.0
    # Ignore eos and stops before this many tokens.
    min_tokens: Annotated[int, bounds(minimum=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[
        FailFastList[int], bounds(items={"type": "integer", "minimum": 0}, maxItems=MAX_BIASES)
    ] = Field(default_factory=list)
    # Keep only this many of the prompt's last tokens; -1: as many as fit beside the new tokens.
    truncate_prompt_tokens: Annotated[int | None, bounds(minimum=-1, **{"not": {"const": 0}})] = (
        None
    )
    include_stop_str_in_output: bool = False  # end the text after the stop, not before it
    skip_special_tokens: bool = True  # omit them from the text
    return_token_ids: bool = False  # of the prompt and of each output
    use_beam_search: bool = False  # best_of beams, returning the best n
    # Rank beams by logprob / length ** length_penalty.
    length_penalty: Annotated[float, bounds(minimum=-10, maximum=10)] = 1.0
    early_stopping: bool = False  # stop once best_of beams have ended

    _adapter: ServedAdapter | None = PrivateAttr(default=None)

    @property
    def candidates(self) -> int:
        """Outputs generated per prompt."""
        return self.n

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        """None if the body has no prompt: left out, or rendered from messages."""
        return None

    @property
    def stops(self) -> Sequence[str]:
        """All strings that end an output."""
        return self.stop

    @property
    def sequences_field(self) -> str:
        """The field to lower if there are too many outputs."""
        return "n"

    @property
    def token_limit(self) -> int | None:
        """The requested limit of new tokens."""
        raise NotImplementedError

    @property
    def limit_field(self) -> str:
        """The field that sets `token_limit`."""
        return "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """Number of top tokens to report per position; None: no logprobs."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """Number of top tokens to report per prompt position; None: no logprobs."""
        return self.alternatives if self.shows_prompt else None

    def count_logprobs(self, prompt_tokens: int, output_tokens: int) -> int:
        """Logprobs in a reply with so many tokens; each output repeats its prompt's."""
        found = 0
        if self.prompt_alternatives is not None:
            found += self.n * prompt_tokens * (1 + self.prompt_alternatives)
        if self.alternatives is not None:
            found += output_tokens * (1 + self.alternatives)
        return found

    @property
    def logprobs_field(self) -> str:
        """The field to lower if there are too many logprobs."""
        return "logprobs" if self.alternatives is not None else "prompt_logprobs"

    @property
    def shows_prompt(self) -> bool:
        """Whether the reply includes the prompt."""
        return False

    def served_by(self, adapter: ServedAdapter | None) -> Self:
        """The request with the adapter that its `model` names, which the caller holds."""
        copy = self.model_copy()
        copy._adapter = adapter
        return copy

    @property
    def adapter(self) -> ServedAdapter | None:
        """None: the base model."""
        return self._adapter

    @property
    def engine_adapter(self) -> Adapter | None:
        return None if self._adapter is None else self._adapter.loaded

    def check(self) -> None:
        """Raises InvalidRequestError for fields that contradict each other or exceed a limit."""
        self.check_constraints(beams=self.use_beam_search)
        if self.n < 1:
            raise invalid("n", f"n must be 1 or more, got {self.n}")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options needs stream=true")
        limit, field = self.token_limit, self.limit_field
        if limit is not None and limit < 0:
            raise invalid(field, f"{field} must be 0 or more, got {limit}")
        if limit == 0 and not self.shows_prompt and self.prompt_alternatives is None:
            raise invalid(field, f"{field}=0 needs echo=true or prompt_logprobs")
        prompts = 1 if self.prompts is None else len(self.prompts)
        if prompts * self.candidates > MAX_SEQUENCES:
            raise invalid(
                self.sequences_field,
                f"{prompts} prompts with {self.candidates} outputs each exceed the limit of "
                f"{MAX_SEQUENCES} outputs: send several requests",
            )
        if len(self.stop) > MAX_STOP_STRINGS or sum(map(len, self.stop)) > MAX_STOP_CHARACTERS:
            raise invalid(
                "stop",
                f"stop may have {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARACTERS} characters "
                f"in total, got {len(self.stop)} of {sum(map(len, self.stop))}",
            )
        cut = self.truncate_prompt_tokens
        if cut is not None and cut != -1 and cut < 1:
            raise invalid(
                "truncate_prompt_tokens",
                f"truncate_prompt_tokens must be 1 or more, or -1, got {cut}",
            )
        for name, given in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
        ):
            if len(given) > MAX_BIASES:
                raise invalid(name, f"{name} may have {MAX_BIASES} tokens, got {len(given)}")
        if self.use_beam_search:
            self._check_beam_search()
        elif self.length_penalty != 1 or self.early_stopping:
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise invalid(name, f"{name} needs use_beam_search=true")

    def _check_beam_search(self) -> None:
        refused = {
            "stream": self.stream,
            "logprobs": self.alternatives is not None,
            "temperature": self.temperature not in (0, 1),
            "top_p": self.top_p != 1,
            "top_k": self.top_k not in (0, -1),
            "min_p": self.min_p != 0,
            "seed": self.seed is not None,
        }
        for name, is_set in refused.items():
            if is_set:
                raise invalid(name, f"beam search does not work with {name}: leave one out")
        if not -10 <= self.length_penalty <= 10:
            raise invalid(
                "length_penalty", f"length_penalty must be in [-10, 10], got {self.length_penalty}"
            )
        if self.token_limit == 0:
            field = self.limit_field
            raise invalid(field, f"beam search needs {field} of 1 or more")

    def sampling(
        self,
        max_tokens: int,
        grammar: CompiledGrammar | None = None,
        bad_words_ids: tuple[tuple[int, ...], ...] = (),
    ) -> list[SamplingParams]:
        """Sampling parameters for each sample of a prompt; beam search has one.

        Args:
            grammar, bad_words_ids: from the body's fields.

        Raises InvalidRequestError naming the field that is out of range.
        """
        ranks = self.candidates > self.n and not self.use_beam_search
        try:
            first = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                temperature=self.temperature,
                top_k=0 if self.top_k == -1 else self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=self.logit_bias,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                seed=self.seed,
                logprobs=0 if self.alternatives is None and ranks else self.alternatives,
                prompt_logprobs=self.prompt_alternatives,
                allowed_token_ids=(
                    None if self.allowed_token_ids is None else tuple(self.allowed_token_ids)
                ),
                bad_words_ids=bad_words_ids,
                grammar=grammar,
            )
        except ValueError as error:
            raise self.named(error) from error
        if self.use_beam_search:
            return [first]
        # Samples differ by seed; prompt logprobs are reported once.
        others = [
            replace(
                first, seed=None if self.seed is None else self.seed + sample, prompt_logprobs=None
            )
            for sample in range(1, self.candidates)
        ]
        return [first, *others]

    def beams(self) -> BeamParams:
        return BeamParams(self.candidates, self.n, self.length_penalty, self.early_stopping)

    def named(self, error: ValueError) -> APIError:
        """Convert a ValueError of the library, whose message begins with the field's name."""
        field = str(error).split(maxsplit=1)[0].rstrip(":")
        if field == "num_beams":
            field = self.sequences_field
        if field == "max_tokens":
            field = self.limit_field
        return invalid(field if field in type(self).model_fields else None, str(error))


def invalid(param: str | None, message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0  # found in the prefix cache


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int  # of all outputs, including those that best_of discards
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=PromptTokensDetails)
