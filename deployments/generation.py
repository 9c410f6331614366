"""Text generation behind OpenAI's completions and chat APIs, as a Ray Serve application.

    POST /v1/completions
    {"prompt": "In a shocking finding, scientists", "max_tokens": 16, "temperature": 0}
    -> {"id": "cmpl-…", "object": "text_completion", "created": …, "model": "gpt-j-6b",
        "choices": [{"index": 0, "text": " …", "logprobs": null, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}}

    POST /v1/chat/completions, where the model has a chat template
    {"messages": [{"role": "user", "content": "Who wrote it?"}], "max_completion_tokens": 16}
    -> {"id": "chatcmpl-…", "object": "chat.completion", "created": …, "model": "gpt-j-6b",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "…"}, …}],
        "usage": {…}}

Also `GET /v1/models`, `GET /v1/models/{id}`, vLLM's `POST /tokenize`, `POST /detokenize` and
`GET /tokenizer_info`, and `GET /health`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

import time
from dataclasses import dataclass
from typing import Annotated, Self, cast

import torch
from fastapi import FastAPI
from pydantic import AfterValidator, Field, model_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments import haproxy
from deployments.device import replica_device
from deployments.ledger import cluster_ledger
from deployments.loading import Arguments as LoadingArguments
from deployments.loading import freeze_loaded, load, loading_turn, name_of
from deployments.logs import follow_serve
from deployments.metrics import EngineReporter, serve_metrics
from deployments.preflight import check_before_deploying
from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.adapters.base import Base
from gptj.chat import ChatTemplate, ChatTemplateError, read_template, template_of
from gptj.engine.adapter_slots import AdapterSlots
from gptj.engine.backends import (
    KVCacheDtype,
    Quantization,
    best_runner,
    cache_dtype,
    check_formats,
    freed_memory,
)
from gptj.engine.cache_size import DEFAULT_SHARES, CacheShare, room
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.engine import Engine
from gptj.engine.limits import Limits
from gptj.engine.runners.base import Runner
from gptj.engine.runners.lora import MAX_RANK, LoRALimits
from gptj.engine.speculation import Speculation
from gptj.layers.int4 import is_quantized
from gptj.serving.adapters import Adapters, check_adapter, check_name
from gptj.serving.chat.service import ChatService
from gptj.serving.completions.schemas import ModelCard
from gptj.serving.completions.service import CompletionService
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.generation import generation_app
from gptj.serving.metrics import Recorder
from gptj.storage.addresses import normalized


class Arguments(LoadingArguments):
    # For /v1/chat/completions: a name (gptj.chat.READY) or the address of a Jinja file. Default:
    # the checkpoint's own, if it has one.
    chat_template: str | None = None
    model_name: str | None = None  # what clients call it; default: by its address
    # int8, int4: weights in 8 or 4 bits, for speed and memory; on a GPU with dtype float16 or
    # bfloat16. int4 rounds to nearest; a folder made by jobs/quantize.py loses less, and stays in
    # 4 bits without this setting. fp8: weights and activations of the layers' products, on GPUs of
    # compute capability 8.9 or later (L4, H100).
    quantization: Quantization = "none"
    # fp8: keys and values in 8 bits (e4m3) with a scale for each head of a token, which takes half
    # the memory; on a GPU of compute capability 8.9 or later (L4, H100) with dtype float16 or
    # bfloat16. auto: that of the weights.
    kv_cache_dtype: KVCacheDtype = "auto"
    # Concurrent sequences, and new tokens per step, which bounds the time between tokens.
    # Default: 64 and 256 on a CPU; on a GPU as many sequences of 512 tokens as the cache holds, up
    # to 256, and four tokens for each, at least 256 (gptj.engine.limits).
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    # The time between tokens of running streams that prompts beside them should not exceed: fewer
    # of their tokens are then computed in a step, and their first token comes later. Default: only
    # max_num_batched_tokens limits them, which is best for tokens/s.
    itl_target_seconds: Annotated[float, Field(gt=0)] | None = None
    prefix_caching: bool = True  # compute shared prefixes once
    # {method: ngram, num_speculative_tokens: 8, prompt_lookup_min: 2, prompt_lookup_max: 4}:
    # verify several tokens per step if an output repeats its prompt or itself. {} means these
    # values. Default: off.
    speculation: Speculation | None = None
    # The KV cache: its size in tokens, or a share of the device's free memory, at most what
    # max_num_seqs sequences can use. Default: 0.3 on a CPU; on a GPU 0.95 of the memory that the
    # weights and the largest steps leave.
    cache_tokens: Annotated[int, Field(ge=16)] | None = None
    cache_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    # LoRA adapters of this model, in PEFT's format, by the name in requests' `model`; and a folder
    # or s3:// address, below which each folder is an adapter, named by its relative path.
    adapters: dict[Annotated[str, AfterValidator(check_name)], str] = Field(default_factory=dict)
    adapter_root: Annotated[str, AfterValidator(normalized)] | None = None
    max_loras: Annotated[int, Field(ge=1)] = 8  # adapters in memory, including `adapters`
    max_lora_rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = MAX_RANK

    def template(self, tokenizer: GPTJTokenizer) -> ChatTemplate | None:
        """The chat template, if any. Raises ChatTemplateError if it is invalid."""
        given = None if self.chat_template is None else read_template(self.chat_template)
        try:
            return template_of(tokenizer, given)
        except ChatTemplateError as error:
            whose = self.chat_template or f"{self.checkpoint}, which chat_template replaces"
            raise ChatTemplateError(f"{error} (of {whose})") from error

    def check_tokenizer(self, tokenizer: GPTJTokenizer) -> None:
        self.template(tokenizer)

    def check_others(self, config: GPTJConfig, tokenizer: GPTJTokenizer) -> None:
        if self.quantization in ("int8", "fp8") and is_quantized(config):
            raise ValueError(
                f"quantization={self.quantization} needs the original weights, and those of "
                f"{self.checkpoint} are in 4 bits; remedy: leave quantization out"
            )
        for name, address in self.adapters.items():
            try:
                check_adapter(address)
            except (ValueError, OSError) as error:
                raise ValueError(f"the adapter {name!r} cannot be served: {error}") from error

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        check_formats(self.quantization, self.kv_cache_dtype, device, dtype)

    def lora_limits(self) -> LoRALimits | None:
        """None without adapters."""
        if not self.adapters and self.adapter_root is None:
            return None
        return LoRALimits(self.max_loras, self.max_lora_rank)

    @property
    def name(self) -> str:
        return self.model_name or name_of(self.checkpoint)

    @model_validator(mode="after")
    def _room_for_adapters(self) -> Self:
        least = len(self.adapters) + (self.adapter_root is not None)
        if self.max_loras < least:
            raise ValueError(
                f"max_loras={self.max_loras} must be {least} or more: the {len(self.adapters)} in "
                f"adapters are always in memory, and adapter_root needs room for another"
            )
        if self.name in self.adapters:
            raise ValueError(f"adapters: {self.name!r} is the base model's name")
        return self

    @model_validator(mode="after")
    def _one_cache_size(self) -> Self:
        if self.cache_tokens is not None and self.cache_share is not None:
            raise ValueError("cache_tokens and cache_share both set the cache's size: remove one")
        step, running = self.max_num_batched_tokens, self.max_num_seqs
        if step is not None and running is not None and step < running:
            raise ValueError(
                f"max_num_batched_tokens={step} must be at least max_num_seqs={running}: each "
                f"running sequence takes one token of a step"
            )
        return self


# Defined before the class, which Ray pickles with the module's contents when it is decorated.
def new_engine_runner(model: GPTJForCausalLM, arguments: Arguments) -> tuple[Runner, Limits]:
    """The model with its cache, and a step's limits."""
    share = arguments.cache_share or DEFAULT_SHARES[model.device.type]
    freed = freed_memory(model, arguments.quantization)
    dtype = cache_dtype(arguments.kv_cache_dtype, model.dtype)
    limits = Limits.of(
        model.device,
        arguments.cache_tokens or room(model.config, model.device, share, dtype, freed),
        model.config.n_positions,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )
    runner = best_runner(
        model,
        arguments.cache_tokens or CacheShare(share, limits),
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        lora=arguments.lora_limits(),
        release=True,  # one copy of the weights
    )
    return runner, limits


ROUTER = "deployments.prefix_router.PrefixRouter"


@dataclass(frozen=True)
class Services:
    """The services for a model and its adapters."""

    engine: Engine
    grammars: GrammarCompiler
    completions: CompletionService
    chats: ChatService
    adapters: Adapters | None

    def close(self) -> None:
        if self.adapters is not None:
            self.adapters.close()
        self.grammars.close()
        self.engine.close()


def start_services(
    model: GPTJForCausalLM,
    tokenizer: GPTJTokenizer,
    runner: Runner,
    limits: Limits,
    arguments: Arguments,
    recorder: Recorder,
) -> Services:
    """Start the engine, and load the named adapters.

    Raises CheckpointError, ChatTemplateError or storage.StorageError.
    """
    template = arguments.template(tokenizer)
    eos = model.config.eos_token_id
    vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
    lora = arguments.lora_limits()
    slots = adapters = None
    if lora is not None:
        slots = AdapterSlots(runner, lora)
        adapters = Adapters(
            slots,
            model.config,
            Base.at(arguments.checkpoint, arguments.revision),
            tokenizer,
            recorder,
            named=arguments.adapters,
            root=arguments.adapter_root,
            verify=arguments.verify,
        )
    engine = Engine(
        runner,
        eos_ids=[] if eos is None else [eos] if isinstance(eos, int) else eos,
        banned_ids=vocabulary.unused_ids,
        max_num_seqs=limits.max_num_seqs,
        max_queued=arguments.max_queued,
        max_queue_seconds=arguments.max_queue_seconds,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        itl_target_seconds=arguments.itl_target_seconds,
        prefix_caching=arguments.prefix_caching,
        speculation=arguments.speculation,
        adapters=slots,
    )
    grammars = GrammarCompiler(tokenizer, engine.vocab_size, engine.eos_ids)
    # Now: later it would pause running streams, since it holds the GIL.
    grammars.prepare()
    parts = (engine, tokenizer, vocabulary, arguments.name, recorder, grammars)
    return Services(
        engine, grammars, CompletionService(*parts), ChatService(*parts, template), adapters
    )


@serve.deployment(name="generation")
@serve.ingress()
class Generation:
    def __init__(self, arguments: Arguments) -> None:
        follow_serve()
        with loading_turn(arguments):
            model, tokenizer = load(GPTJForCausalLM, arguments, replica_device())
            runner, limits = new_engine_runner(model, arguments)
        services = self._services = start_services(
            model, tokenizer, runner, limits, arguments, serve_metrics()
        )
        freeze_loaded()
        self._tokenizer = tokenizer
        self._reporter = EngineReporter(services.engine.stats)
        self._stalled_seconds = arguments.stalled_seconds
        self._http_options = arguments.http_options()
        self._card = ModelCard(
            id=arguments.name,
            created=int(time.time()),
            root=arguments.checkpoint,
            max_model_len=model.config.n_positions,
            chat_template=services.chats.has_template,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return generation_app(
            self._services.completions,
            self._services.chats,
            self._tokenizer,
            self._card,
            self._alive,
            serve_metrics(),
            cluster_ledger(),
            self._http_options,
            self._services.adapters,
        )

    def record_replica_metadata(self) -> dict[str, str]:
        """For deployments.prefix_router."""
        return {"model": self._card.id}

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose engine hangs or has stopped."""
        if not self._alive():
            raise RuntimeError(f"the engine made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._services.engine.alive(self._stalled_seconds)


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForCausalLM, args)
    deployment = cast(Deployment, Generation)  # which the decorator's types do not say
    if not haproxy.enabled():  # which routes by itself: Serve refuses another router
        router = RequestRouterConfig.model_validate({"request_router_class": ROUTER})
        deployment = deployment.options(request_router_config=router)
    return deployment.bind(args)
