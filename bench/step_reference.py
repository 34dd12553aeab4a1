#!/usr/bin/env python3
"""The other side of `retune bench`: training steps of PEFT on PyTorch, same shape, same batch, random weights.

    python bench/step_reference.py lora --rank 8
    python bench/step_reference.py prompt
    python bench/step_reference.py last-layers
    python bench/step_reference.py lora --rank 8 --dtype bfloat16
    python bench/step_reference.py lora --rank 8 --recompute

On a GPU, with attention by `scaled_dot_product_attention`; `--autocast` is what the Trainer of transformers does for
`bf16=True`, and the faster of with and without is the one to compare with:

    python bench/step_reference.py lora --rank 16 --shape llama1b --batch 8 --length 1024 --device cuda --dtype bfloat16 --autocast
    python bench/step_reference.py lora --rank 16 --shape llama8b --batch 4 --length 2048 --device cuda --dtype bfloat16 --autocast

Prints one JSON line: tokens per second of the median step after the warm-up, and the peak of the resident memory or, on a
GPU, of what tensors take there, the base included: `retune bench` says the same of its own.
"""

import argparse
import contextlib
import json
import resource
import statistics
import time

import peft
import torch
import transformers

# Those of `retune bench --help`: hidden, layers, heads, key-value heads, intermediate, vocabulary.
SHAPES = {
    "stories15m": (288, 6, 6, 6, 768, 32000),
    "smol135m": (576, 30, 9, 3, 1536, 49152),
    "qwen05b": (896, 24, 14, 2, 4864, 151936),
    "llama1b": (2048, 16, 32, 8, 8192, 128256),
    "llama8b": (4096, 32, 32, 8, 14336, 128256),
}


def frozen_base(arguments):
    hidden, layers, heads, key_value_heads, intermediate, vocabulary = SHAPES[arguments.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=max(4096, arguments.length),
        attn_implementation="sdpa",
        use_cache=False,
    )
    dtype = getattr(torch, arguments.dtype)
    if arguments.device == "cpu":
        return transformers.LlamaForCausalLM(config).to(dtype)
    # Made where and as it is used: a large base has no room in main memory in f32.
    torch.set_default_dtype(dtype)
    with torch.device(arguments.device):
        base = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return base


def adapted(base, arguments):
    if arguments.method == "lora":
        options = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
        )
        return peft.get_peft_model(base, options)
    if arguments.method == "prompt":
        options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
        return peft.get_peft_model(base, options)
    for parameter in base.parameters():
        parameter.requires_grad = False
    for block in base.model.layers[-2:]:
        for parameter in block.mlp.parameters():
            parameter.requires_grad = True
    return base


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=["lora", "prompt", "last-layers"])
    parser.add_argument("--shape", choices=SHAPES, default="smol135m")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="all steps, those of the warm-up too")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--autocast", action="store_true", help="products in bf16, whatever the weights")
    parser.add_argument("--recompute", "--checkpointing", action="store_true", help="gradient checkpointing")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(torch.device(arguments.device))
    base = frozen_base(arguments)
    if arguments.recompute:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = adapted(base, arguments).to(arguments.device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True if on_gpu else None)
    vocabulary = SHAPES[arguments.shape][-1]
    tokens = torch.randint(3, vocabulary, (arguments.batch, arguments.length)).to(arguments.device)

    def precision():
        if not arguments.autocast:
            return contextlib.nullcontext()
        return torch.autocast(arguments.device.split(":")[0], dtype=torch.bfloat16)

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.steps):
        wait()
        start = time.perf_counter()
        with precision():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() >> 20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    result = {
        "method": arguments.method,
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
        "trained_weights": sum(parameter.numel() for parameter in trained),
        "tokens_per_second": tokens.numel() / statistics.median(seconds[arguments.warm_up :]),
        "peak_memory_mib": peak,
        "loss": loss.item(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
