"""Tokens/s of transformers' GPT-J in a plain training loop: train.py --model DIR --states … …

`--states bf16`: weights, gradients and AdamW's moments in bf16. `--states masters`: all of them in
fp32, computing in bf16 by autocast, which is what DeepSpeed's bf16 training keeps. `--states fp32`:
all in fp32.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import GPTJForCausalLM

NAMES = {
    "bf16": "transformers, all in bf16",
    "masters": "transformers, fp32 masters",
    "fp32": "transformers, fp32",
}

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--states", choices=NAMES, required=True)
parser.add_argument("--rows", type=int, required=True)
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--threads", type=int, required=True)
given = parser.parse_args()

torch.set_num_threads(given.threads)
torch.manual_seed(0)
dtype = torch.bfloat16 if given.states == "bf16" else torch.float32
model = GPTJForCausalLM.from_pretrained(given.model, dtype=dtype).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # Trainer's default
rates = []
for _ in range(given.steps + 1):
    started = time.perf_counter()
    ids = torch.randint(0, 50000, (given.rows, given.length))
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast if given.states == "masters" else contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    rates.append(given.rows * given.length / (time.perf_counter() - started))
print(
    json.dumps(
        {
            "engine": NAMES[given.states],
            "tokens_per_s": round(statistics.median(rates[1:]), 1),
            "useful_tokens_per_s": round(statistics.median(rates[1:]), 1),
            "each": [round(rate, 1) for rate in rates[1:]],
            "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        }
    )
)
