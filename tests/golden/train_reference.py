"""Train an adapter with PEFT as retune trains it, to compare a real run step by step. Run by hand.

    python tests/golden/train_reference.py --model BASE --data train.jsonl --eval-data eval.jsonl \\
        --method lora --rank 8 --alpha 16 --learning-rate 1e-4 --steps 50 --batch-size 4

Records are {"prompt", "completion"} (the completion and the closing eos are learned) or {"text"} (all tokens and the
closing eos). Each example goes through the model on its own; a step's loss is the sum over its batch divided by its
learned tokens. Prints one JSON line per step, and the evaluation loss before the first and after the last. To start
both programs from the same weights, give --initial: the adapter folder that the other one starts from. Batches follow
--order: a file with one record index per line, used again from the start when it ends.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from reference import (
    last_layers_config,
    learned_tokens,
    load_base,
    lora_config,
    mean_loss,
    prepare,
    prompt_config,
    read_examples,
    train_step,
    trainable,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer


def main():
    options = parse_options()
    prepare(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = read_examples(options.data, tokenizer, options.max_length)
    evaluation = read_examples(options.eval_data, tokenizer, options.max_length) if options.eval_data else []
    for index, example in enumerate(examples):
        if learned_tokens(example) == 0:
            raise SystemExit(f"error: record {index} of {options.data} has no token to learn")

    model = adapted_model(options)
    print_line(trained_weights=sum(parameter.numel() for parameter in trainable(model)))
    if evaluation:
        print_line(evaluation_loss=mean_loss(model, evaluation), step=0)
    optimizer = torch.optim.AdamW(
        trainable(model),
        lr=options.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=options.weight_decay,
        foreach=False,
    )
    order = record_order(options, len(examples))
    for step in range(options.steps):
        start = time.perf_counter()
        rate = options.learning_rate * schedule(options, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [examples[next(order)] for _ in range(options.batch_size)]
        loss, norm = train_step(model, optimizer, batch, options.max_gradient_norm)
        print_line(
            step=step + 1,
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            learned_tokens=sum(learned_tokens(example) for example in batch),
            seconds=round(time.perf_counter() - start, 3),
        )
    if evaluation:
        print_line(evaluation_loss=mean_loss(model, evaluation), step=options.steps)
    if options.out:
        model.save_pretrained(options.out)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", required=True, type=Path, metavar="DIR", help="checkpoint folder of the base")
    option("--data", required=True, type=Path, metavar="FILE", help="training records, JSON lines")
    option("--eval-data", type=Path, metavar="FILE", help="records of the evaluation loss")
    option("--method", choices=["lora", "prompt", "last-layers"], help="what is trained (not needed with --initial)")
    option("--initial", type=Path, metavar="DIR", help="adapter folder to start from, instead of fresh weights")
    option("--out", type=Path, metavar="DIR", help="where the trained adapter is written")
    option("--rank", type=int, default=8, help="LoRA: rank (default %(default)s)")
    option("--alpha", type=float, default=16, help="LoRA: alpha (default %(default)s)")
    option("--targets", default="all-linear", help="LoRA: all-linear, or layer names with commas between them")
    option("--layers-from-end", type=int, default=1, metavar="K", help="last-layers: blocks that are trained")
    option("--feed-forward-only", action="store_true", help="last-layers: only the feed-forward part of the blocks")
    option("--final-norm", action="store_true", help="last-layers: the final norm too")
    option("--head", action="store_true", help="last-layers: the untied head too")
    option("--virtual-tokens", type=int, default=16, metavar="N", help="prompt: length (default %(default)s)")
    option("--prompt-init", choices=["random", "sample-vocab"], default="sample-vocab", help="prompt: first weights")
    option("--learning-rate", type=float, default=1e-4)
    option("--schedule", choices=["constant", "linear", "cosine"], default="constant", help="down to 0 at the end")
    option("--warmup-steps", type=int, default=0, help="steps over which the learning rate rises from 0")
    option("--weight-decay", type=float, default=0.01)
    option("--max-gradient-norm", type=float, default=1.0)
    option("--steps", type=int, default=20)
    option("--batch-size", type=int, default=4)
    option("--order", type=Path, metavar="FILE", help="record indices in the order of training; else shuffles")
    option("--max-length", type=int, metavar="TOKENS", help="longer examples are cut at the end")
    option("--seed", type=int, default=0, help="of fresh weights and shuffles")
    option("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    options = parser.parse_args()
    if not (options.method or options.initial):
        parser.error("give --method or --initial")
    return options


def adapted_model(options):
    """The frozen base with a trainable adapter."""
    base = load_base(options.model)
    if options.initial:
        config = PeftConfig.from_pretrained(options.initial)
        config.inference_mode = False
    else:
        config = fresh_config(options, base)
    model = get_peft_model(base, config).eval()  # evaluation mode: no dropout; gradients flow all the same
    if options.initial:
        set_peft_model_state_dict(model, load_file(options.initial / "adapter_model.safetensors"))
    return model


def fresh_config(options, base):
    """The PEFT configuration of a method."""
    if options.method == "lora":
        targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
        return lora_config(r=options.rank, lora_alpha=options.alpha, target_modules=targets)
    if options.method == "prompt":
        return prompt_config(options.virtual_tokens, options.prompt_init.replace("-", "_").upper())
    return last_layers_config(
        base, options.layers_from_end, options.feed_forward_only, options.final_norm, options.head
    )


def schedule(options, step):
    """Factor of the learning rate at a step, counted from 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[options.schedule]


def record_order(options, count):
    """Record indices without end: the given order again and again, or one shuffle after the other."""
    given = [int(line) for line in options.order.read_text().split()] if options.order else None
    while True:
        yield from given or torch.randperm(count).tolist()


def print_line(**fields):
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
