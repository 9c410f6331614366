"""Resolves a request: each prompt to text, token ids and sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptj.engine.constraints.compiler import CompiledGrammar
from gptj.engine.request import check_ids
from gptj.sampling import SamplingParams
from gptj.serving.completions.detokenizer import unfinished
from gptj.serving.completions.generation_request import GenerationRequest, Prompt
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import InvalidRequestError
from gptj.tokenizer import GPTJTokenizer

# Each takes about 70 bytes of the reply, 600 of memory, and 10 microseconds of a thread.
MAX_REPLY_LOGPROBS = 500_000


@dataclass(frozen=True)
class ResolvedPrompt:
    """A prompt that fits the context, and what to generate for it."""

    text: str  # complete characters only
    ids: list[int]
    begun: bytes  # the start of a last character that the ids leave incomplete
    params: list[SamplingParams]  # one for each sample; beam search has one

    def most_tokens(self, request: GenerationRequest) -> int:
        """Most tokens of the prompt and all its outputs, as usage counts them."""
        outputs = request.n if request.use_beam_search else request.candidates
        return len(self.ids) + outputs * self.params[0].max_tokens

    def most_logprobs(self, request: GenerationRequest) -> int:
        """Most logprobs that a request keeps until it replies: those of outputs are streamed."""
        outputs = 0 if request.stream else request.candidates
        return request.count_logprobs(len(self.ids), outputs * self.params[0].max_tokens)


class PromptResolver:
    """Resolves prompts, and checks requests against the model's vocabulary and limits.

    Args:
        context_length: most tokens of a prompt and its completion together.
        cache_tokens: capacity of the engine's cache, possibly less.
        max_queued: most outputs waiting in the engine's queue.
    """

    def __init__(
        self,
        tokenizer: GPTJTokenizer,
        vocabulary: Vocabulary,
        *,
        context_length: int,
        cache_tokens: int,
        max_queued: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._cache_tokens = cache_tokens
        self._max_queued = max_queued

    def check(self, request: GenerationRequest) -> None:
        """The checks that need no tokenizing. Raises InvalidRequestError."""
        request.check()
        outputs = len(request.prompts or [""]) * request.candidates
        if not request.use_beam_search and outputs > self._max_queued:
            # They could never be queued: 429 would make clients retry in vain.
            raise InvalidRequestError(
                f"{outputs} outputs exceed the {self._max_queued} that may wait here: send "
                f"several requests",
                param=request.sequences_field,
            )

    def resolve(
        self,
        request: GenerationRequest,
        prompts: Sequence[Prompt] | None,
        grammar: CompiledGrammar | None = None,
    ) -> list[ResolvedPrompt]:
        """Takes a while for long texts. Raises InvalidRequestError.

        Args:
            prompts: None: use bos as the prompt.
            grammar: the request's, compiled.
        """
        prompts = [self._default_text()] if prompts is None else prompts
        read = self._text_and_ids
        if request.truncate_prompt_tokens is not None:
            read = self._last_tokens
        texts = [read(request, prompt) for prompt in prompts]
        self._check_ids("logit_bias", list(request.logit_bias))
        self._check_ids("stop_token_ids", request.stop_token_ids)
        self._check_ids("allowed_token_ids", request.allowed_token_ids or ())
        bad_words = request.bad_words_ids(self._tokenizer)
        resolved = [
            ResolvedPrompt(
                text,
                ids,
                begun,
                request.sampling(self._max_tokens(request, len(ids)), grammar, bad_words),
            )
            for text, ids, begun in texts
        ]
        logprobs = sum(prompt.most_logprobs(request) for prompt in resolved)
        if logprobs > MAX_REPLY_LOGPROBS:
            raise InvalidRequestError(
                f"the reply may have {logprobs} logprobs, more than {MAX_REPLY_LOGPROBS}: request "
                f"fewer alternatives, set {request.limit_field}, or send several requests",
                param=request.logprobs_field,
            )
        return resolved

    def _text_and_ids(
        self, request: GenerationRequest, prompt: Prompt
    ) -> tuple[str, list[int], bytes]:
        if isinstance(prompt, str):
            text = prompt or self._default_text()
            # Reject far too long texts without tokenizing them.
            self._check_length(request, self._vocabulary.least_tokens(text), "at least ")
            ids = self._tokenizer.encode(text)
            self._check_length(request, len(ids))
            return text, ids, b""
        return self._of_ids(request, prompt)

    def _last_tokens(
        self, request: GenerationRequest, prompt: Prompt
    ) -> tuple[str, list[int], bytes]:
        """A prompt truncated to its last `truncate_prompt_tokens`."""
        ids = prompt
        if isinstance(ids, str):
            ids = self._tokenizer.encode(ids or self._default_text())
        keep = request.truncate_prompt_tokens
        assert keep is not None
        if keep == -1:
            room = request.token_limit
            if room is None:
                room = max(self._least(request), request.default_tokens or 1)
            keep = max(1, self._context_length - room)
        return self._of_ids(request, ids[-keep:])

    def _of_ids(
        self, request: GenerationRequest, prompt: list[int]
    ) -> tuple[str, list[int], bytes]:
        self._check_length(request, len(prompt))
        try:
            text = self._tokenizer.decode(self._tokenizer.check_ids(prompt))
        except ValueError as error:
            raise InvalidRequestError(f"prompt: {error}", param="prompt") from error
        # An id has at least one byte, and a character at most four.
        begun = unfinished(b"".join(map(self._tokenizer.token_bytes, prompt[-3:])))
        return text[:-1] if begun else text, prompt, begun

    def _default_text(self) -> str:
        """OpenAI's default prompt: the token that separates texts."""
        if self._tokenizer.bos_token is None:
            raise InvalidRequestError(
                "prompt must not be empty: this model has no token that begins a text",
                param="prompt",
            )
        return self._tokenizer.bos_token

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        try:
            check_ids(name, ids, self._tokenizer.rows_needed)
        except ValueError as error:
            raise InvalidRequestError(str(error), param=name) from error

    def _max_tokens(self, request: GenerationRequest, length: int) -> int:
        """Most new tokens after a prompt of `length` tokens, which fits the context."""
        if request.token_limit is not None:
            return request.token_limit
        left = self._context_length - length
        default = request.default_tokens
        if default is None:  # as many as possible
            beams = request.candidates if request.use_beam_search else 1
            default = self._cache_tokens // beams - length
        return min(max(default, self._least(request)), left)

    def _least(self, request: GenerationRequest) -> int:
        """The new tokens that a prompt has to leave room for."""
        limit = request.token_limit
        return max(1, request.min_tokens) if limit is None else limit

    def _check_length(self, request: GenerationRequest, length: int, known: str = "") -> None:
        """InvalidRequestError if a prompt of `length` tokens leaves no room for its completion."""
        context = self._context_length
        limit, field = request.token_limit, request.limit_field
        least = self._least(request)
        if length + least <= context:
            return
        if length >= context:
            param = request.prompt_field
        else:
            param = "min_tokens" if limit is None and request.min_tokens else field
        raise InvalidRequestError(
            f"this model's context is {context} tokens, but {known}{length + least} are requested: "
            f"{known}{length} of the prompt and {least} of the completion; shorten the "
            + (f"prompt or lower {field}" if limit else "prompt"),
            param=param,
            code="context_length_exceeded",
        )
