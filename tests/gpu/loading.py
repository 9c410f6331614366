"""A random 6B in fp16 made on the card: seconds to load and capture, and memory."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from checking import Check, run
from models import cache_tokens, new_engine, new_runner, prompts

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj_bench.decode import generate, random_model

SHARE = 0.9  # of free memory, less than a deployment's 0.95
FILE_LAYERS = 4  # of the model that goes through files


def main(check: Check) -> None:
    check.add("memory", when="before", **check.device.memory())
    with_runner(check)
    check.device.empty()
    if not check.late("through a file", 15):
        with check.attempt("through a file"):
            through_a_file(check)


def with_runner(check: Check) -> None:
    config = check.config()
    seconds, model = check.wall(lambda: random_model(config, torch.float16, check.device.kind))
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    check.add("making the model", seconds=seconds, gb=gigabytes, dtype="fp16")
    check.add("memory", when="with the model", **check.device.memory())
    most = check.pick(256, 2)
    tokens = cache_tokens(check, model, SHARE, most)
    pages = tokens // CudaRunner.page_size
    seconds, runner = check.wall(lambda: new_runner(check, model.requires_grad_(False), pages))
    check.add("fusing, compiling, measuring and capturing", seconds=seconds, tokens=tokens)
    check.add("memory", when="with cache and graphs", cache_share=SHARE, **check.device.memory())
    seconds, again = _first_token(check, runner)
    check.add("first token", seconds=seconds, the_second_request=again)
    check.device.reset_peak()
    with check.attempt("memory under load"):
        _load(check, runner, most)
    runner.close()


def _first_token(check: Check, runner: CudaRunner) -> tuple[float, float]:
    engine = new_engine(runner, 1, 256)
    try:
        prompt = prompts(runner.config, [check.pick(128, 8)])
        return generate(engine, prompt, 1).seconds, generate(engine, prompt, 1).seconds
    finally:
        engine.close()


def _load(check: Check, runner: CudaRunner, streams: int) -> None:
    """As many sequences as the engine may run, with a long step of prompts beside them."""
    length, new = check.pick((400, 48), (9, 3))
    engine = new_engine(runner, streams, check.pick(2048, 16))
    try:
        timing = generate(engine, prompts(runner.config, [length] * streams), new)
        stats = engine.stats()
    finally:
        engine.close()
    check.add(
        "memory",
        when="under load",
        streams=streams,
        prompt_tokens=length,
        new_tokens=new,
        tokens_per_s=timing.tokens / timing.seconds,
        preemptions=stats.preemptions,
        **check.device.memory(),
    )


def through_a_file(check: Check) -> None:
    """Some layers' weights from a file in memory to the card, as `from_pretrained` brings them."""
    layers = check.pick(FILE_LAYERS, 1)
    config: GPTJConfig = check.config(layers)
    with tempfile.TemporaryDirectory() as folder:  # just written, it is in memory
        model = random_model(config, torch.float16, check.device.kind)
        size = sum(parameter.nbytes for parameter in model.parameters())
        seconds, _ = check.wall(lambda: model.save_pretrained(folder))
        check.add("saving to a file", seconds=seconds, gb_per_s=size / seconds / 1e9, layers=layers)
        for verify in (True, False):
            seconds, loaded = check.wall(
                partial(
                    GPTJForCausalLM.from_pretrained,
                    folder,
                    device=check.device.kind,
                    verify=verify,
                )
            )
            pairs = zip(model.parameters(), loaded.parameters(), strict=True)
            check.add(
                "loading from a file",
                seconds=seconds,
                gb_per_s=size / seconds / 1e9,
                hashes_compared=verify,
                layers=layers,
                right=all(torch.equal(a, b) for a, b in pairs),
            )
            del loaded


if __name__ == "__main__":
    run(main)
