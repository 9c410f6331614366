"""Transformers' GPT-J on the same card: the same decode rows, by its `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from checking import Check, run
from models import prompts

BATCHES = (1, 64, 8, 32, 128)
PROMPT, NEW = 128, 128


def main(check: Check) -> None:
    config = check.config()
    theirs = transformers.GPTJConfig(**config.to_dict())
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(check.device.kind):
            model = transformers.GPTJForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(before)
    attention = getattr(model.config, "_attn_implementation", None)
    for batch in check.pick(BATCHES, (1, 2)):
        if check.late("decode", 8, engine="transformers", batch=batch):
            continue
        with check.attempt("decode", engine="transformers", batch=batch):
            decode(check, model, batch, attention)


def decode(check: Check, model: Any, batch: int, attention: str | None) -> None:
    prompt, new = check.pick((PROMPT, NEW), (9, 3))
    asked = prompts(check.config(), [prompt] * batch)
    ids = torch.tensor(asked, device=check.device.kind)

    def generate(count: int) -> tuple[float, int]:
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
        check.device.synchronize()
        return time.perf_counter() - start, found.shape[1] - prompt

    generate(2)
    repeats = check.pick(2 if batch <= 8 else 1, 1)
    runs = sorted(generate(new) for _ in range(repeats))
    seconds, made = runs[len(runs) // 2]
    check.add(
        "decode",
        engine="transformers",
        version=transformers.__version__,
        attention=attention,
        dtype="fp16",
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=made,
        repeats=repeats,
        tokens_per_s=batch * made / seconds,
        seconds=[each for each, _ in runs],
        right=made == new,
    )


if __name__ == "__main__":
    run(main)
