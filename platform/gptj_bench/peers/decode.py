"""Another engine's tokens/s on the CPU, run in that engine's own environment.

    decode.py vllm|ctranslate2|transformers|openvino|openvino-paged MODEL
              --dtype bfloat16|float32|int8|int4
              [--prompt-tokens 64] [--new-tokens 64] [--threads 2]

Random prompts, greedy, ignoring eos, no prefix caching. Prints a JSON object once the model is
loaded, and then one for each batch size that it reads, one a line, from its input. It imports none
of our code: the environment has only the engine. CTranslate2, OpenVINO and, for int8, vLLM get a
converted model, which is written once beside the model's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

TEXT_IDS = 50000  # ids below this are text in GPT-J's vocabulary
WARM_UP_TOKENS = 4

Prompts = list[list[int]]
Generate = Callable[
    [Prompts, int], int
]  # prompts and new tokens per prompt in, total generated tokens out


def vllm(model: str, dtype: str, threads: int) -> Generate:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    # Compiled, which is its default and its fastest.
    if dtype == "int8":
        model, dtype = _converted_to_w8a8(model), "bfloat16"
    engine = LLM(model, dtype=dtype, max_model_len=2048, enable_prefix_caching=False)

    def generate(prompts: Prompts, new_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _converted_to_w8a8(model: str) -> str:
    """Weights of blocks in int8 by column, activations by token, as compressed-tensors has them."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(f"{model.rstrip('/')}-vllm-int8")
    if folder.exists():
        return str(folder)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.copytree(
        model,
        partial_folder,
        ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json"),
        dirs_exist_ok=True,
    )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(model).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if weight.ndim == 2 and ".h." in name:
                scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
                tensors[name] = (weight.float() / scale).round().to(torch.int8)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = weight
    save_file(tensors, partial_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((partial_folder / "config.json").read_text())
    each = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**each, "strategy": "channel", "dynamic": False},
                "input_activations": {**each, "strategy": "token", "dynamic": True},
            }
        },
    }
    (partial_folder / "config.json").write_text(json.dumps(config))
    partial_folder.rename(folder)
    return str(folder)


def ctranslate2(model: str, dtype: str, threads: int) -> Generate:
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = f"{model.rstrip('/')}-ctranslate2-{dtype}"
    if not Path(folder).exists():
        ctranslate2.converters.TransformersConverter(model).convert(folder, quantization=dtype)
    engine = ctranslate2.Generator(folder, device="cpu", intra_threads=threads, compute_type=dtype)

    def generate(prompts: Prompts, new_tokens: int) -> int:
        outputs = engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return sum(len(output.sequences_ids[0]) for output in outputs)

    return generate


def transformers(model: str, dtype: str, threads: int) -> Generate:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import GPTJForCausalLM

    torch.set_num_threads(threads)
    loaded = GPTJForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, new_tokens: int) -> int:
        ids = torch.tensor(prompts)
        output = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=50256,
        )
        return int(output[:, ids.shape[1] :].numel())

    return generate


def openvino(model: str, dtype: str, threads: int, *, paged: bool) -> Generate:
    """OpenVINO GenAI, by its pipeline with continuous batching or by the plain one."""
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    folder = _converted_to_openvino(model, dtype)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def config(new_tokens: int) -> genai.GenerationConfig:
        wanted = genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = new_tokens
        wanted.ignore_eos, wanted.do_sample = True, False
        return wanted

    if paged:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 2, False
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 64, 2048
        batching = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)

        def generate_paged(prompts: Prompts, new_tokens: int) -> int:
            inputs = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
            outputs = batching.generate(inputs, [config(new_tokens)] * len(prompts))
            return sum(len(output.m_generation_ids[0]) for output in outputs)

        return generate_paged
    pipeline = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", **settings)

    def generate(prompts: Prompts, new_tokens: int) -> int:
        ids = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        return sum(map(len, pipeline.generate(inputs, config(new_tokens)).tokens))

    return generate


def _converted_to_openvino(model: str, dtype: str) -> str:
    """int4 as in OpenVINO's own conversion of 4-bit models: groups of 128 with zero points."""
    folder = Path(f"{model.rstrip('/')}-openvino-{dtype}")
    if folder.exists():
        return str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    options = {
        "int8": {"load_in_8bit": True},
        "int4": {
            "quantization_config": OVWeightQuantizationConfig(
                bits=4, sym=False, group_size=128, ratio=1.0
            )
        },
    }.get(dtype, {"load_in_8bit": False})
    partial_folder = folder.with_name(f"{folder.name}.partial")
    OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, **options
    ).save_pretrained(partial_folder)
    tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for part, name in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, partial_folder / f"openvino_{name}.xml")
    partial_folder.rename(folder)
    return str(folder)


ENGINES: dict[str, Callable[[str, str, int], Generate]] = {
    "vllm": vllm,
    "ctranslate2": ctranslate2,
    "transformers": transformers,
    "openvino": partial(openvino, paged=False),
    "openvino-paged": partial(openvino, paged=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    generate = ENGINES[given.engine](given.model, given.dtype, given.threads)
    print(json.dumps({"loaded": given.engine}), flush=True)
    warm: set[int] = set()
    for line in sys.stdin:
        batch = int(line)
        numbers = random.Random(batch)
        prompts = [
            [numbers.randrange(TEXT_IDS) for _ in range(given.prompt_tokens)] for _ in range(batch)
        ]
        if batch not in warm:
            generate(prompts, WARM_UP_TOKENS)
            warm.add(batch)
        start = time.perf_counter()
        generate(prompts, 1)
        prefilled = time.perf_counter()
        tokens = generate(prompts, given.new_tokens)
        seconds = time.perf_counter() - prefilled
        row = {
            "engine": given.engine,
            "dtype": given.dtype,
            "batch": batch,
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "first_token_s": round(prefilled - start, 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":  # vLLM's subprocesses import this file
    main()
