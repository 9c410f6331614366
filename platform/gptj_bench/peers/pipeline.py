"""transformers on texts that a benchmark sends: pipeline.py TASK --model DIR --dtype … --threads …

Reads JSON lines `{"batch": 8, "inputs": […]}`, computes them, and prints one JSON line for each:
wall and CPU seconds. TASK is `classification` (the pipeline text-classification) or
`question-answering`, for which transformers 5 has no pipeline: its model in a loop, with padding to
the longest of a batch, and the best span by its logits.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers

transformers.logging.set_verbosity_error()
WINDOW, STRIDE = 384, 128  # of the question-answering pipeline that transformers 4 had


class Classification:
    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self.pipe = transformers.pipeline("text-classification", model=model, dtype=dtype)
        tokenizer: Any = self.pipe.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.pipe.model.config.pad_token_id = tokenizer.pad_token_id

    def __call__(self, inputs: list[Any], batch: int) -> Any:
        return self.pipe(inputs, batch_size=batch, top_k=None)


class QuestionAnswering:
    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = transformers.AutoModelForQuestionAnswering.from_pretrained(model, dtype=dtype)
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, inputs: list[Any], batch: int) -> Any:
        windows = self.tokenizer(
            [each["question"] for each in inputs],
            [each["context"] for each in inputs],
            truncation="only_second",
            max_length=WINDOW,
            stride=STRIDE,
            return_overflowing_tokens=True,
        )
        best: dict[int, float] = {}
        owners = windows["overflow_to_sample_mapping"]
        for start in range(0, len(owners), batch):
            ids = {"input_ids": windows["input_ids"][start : start + batch]}
            output = self.model(**self.tokenizer.pad(ids, return_tensors="pt"))
            for row, owner in enumerate(owners[start : start + batch]):
                length = len(ids["input_ids"][row])
                scores = (
                    output.start_logits[row, :length, None] + output.end_logits[row, None, :length]
                )
                score = float(scores.triu().tril(15).max())
                best[owner] = max(score, best.get(owner, score))
        return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["classification", "question-answering"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kind = Classification if given.task == "classification" else QuestionAnswering
    answer = kind(given.model, getattr(torch, given.dtype))
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        answer(request["inputs"], request["batch"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu}), flush=True)


if __name__ == "__main__":
    main()
