#!/usr/bin/env python3
"""The other side of `retune bench`: training steps of PEFT on PyTorch, same shape, same batch, random weights.

    python bench/step_reference.py lora --rank 8
    python bench/step_reference.py prompt
    python bench/step_reference.py last-layers
    python bench/step_reference.py lora --rank 8 --dtype bfloat16
    python bench/step_reference.py lora --rank 8 --checkpointing

Prints one JSON line: tokens per second of the median step after the first, and the peak of the resident memory.
"""

import argparse
import json
import resource
import statistics
import time

import peft
import torch
import transformers


def frozen_base(dtype):
    config = transformers.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


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
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    base = frozen_base(getattr(torch, arguments.dtype))
    if arguments.checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = adapted(base, arguments)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.randint(3, 49152, (arguments.batch, arguments.length))
    seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    result = {
        "method": arguments.method,
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
        "trained_weights": sum(parameter.numel() for parameter in trained),
        "tokens_per_second": tokens.numel() / statistics.median(seconds[1:]),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
