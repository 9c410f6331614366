"""Choosing tokens, beside the products before it: greedy, top_k, top_p, penalties."""

from __future__ import annotations

from typing import Any

import torch
from checking import Check

from gptj.engine.runners.cuda.sampling import draw
from gptj.engine.sampler import Sampler
from gptj.sampling import SamplingParams

# Of fp32 logits whose spread decides how many tokens top_p keeps: of a trained model, and of one
# that knows nothing, where it keeps nearly all.
SPREADS = {"peaked": 3.0, "flat": 0.3}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top_p": {"top_p": 0.9},
    "drawn": {},
    "top_k": {"top_k": 50},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 5},
}


def measure(check: Check) -> None:
    for rows in check.pick((1, 64, 256), (3,)):
        for spread in SPREADS:
            for name in SAMPLING:
                values = {"params": name, "rows": rows, "logits": spread}
                if not check.late("sampling", 3, **values):
                    with check.attempt("sampling", **values):
                        sample(check, rows, spread, name)


def sample(check: Check, rows: int, spread: str, name: str) -> None:
    vocabulary, device = check.config().vocab_size, torch.device(check.device.kind)
    kept = torch.randn(rows, vocabulary, device=device) * SPREADS[spread]
    logits = kept.clone()
    sampler = Sampler((), device, vocabulary, draw if check.device.kind == "cuda" else None)
    keys = list(range(rows))
    for key in keys:
        params = SamplingParams(max_tokens=1000, seed=key, **SAMPLING[name])
        sampler.add(key, params, [1, 2, 3], [])

    def copy_and_sample() -> None:
        logits.copy_(kept)  # they are changed
        sampler.sample(logits, keys)

    copying = check.time(lambda: logits.copy_(kept))["ms"]
    timing = check.time(copy_and_sample, repeats=5, calls=5)
    check.add("sampling", params=name, rows=rows, logits=spread, copying_ms=copying, **timing)
