#!/usr/bin/env python3
"""Completion-only fine-tuning at real lengths: Hugging Face's Trainer with PEFT, and retune, on the same work in turn.

Needs torch, transformers and peft (see `versions` in the output), a folder to work in and a JSON-lines file of
`question`/`answer` or `prompt`/`completion` records:

    python bench/padded_reference.py --data train.jsonl --work target/padded --retune target/release/retune

It writes a base of the smol135m shape with random weights and a tokenizer trained on the data, the data as
prompt/completion records, and the order of the examples. Both sides then take the same steps: the Trainer pads each
batch to its longest example, retune lays the examples end to end. Supervised tokens per second count the tokens of the
completions alone, over all steps but the first; `command` is the same over the whole command, start-up included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RANK = 8
LEARNING_RATE = 5e-4
VOCABULARY = 49152


def records(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            yield (
                record.get("prompt", record.get("question")) + "\n",
                record.get("completion", record.get("answer")),
            )


def prepare(arguments):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    work = Path(arguments.work)
    base = work / "base"
    base.mkdir(parents=True, exist_ok=True)
    pairs = list(records(arguments.data))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    count = arguments.steps * arguments.batch
    with open(work / "data.jsonl", "w", encoding="utf-8") as file:
        for prompt, completion in pairs[:count]:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    with open(work / "order.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{index}\n" for index in range(count))


def peft_side(arguments):
    import peft
    import torch
    import transformers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.set_num_threads(arguments.threads)
    work = Path(arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32),
        peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    model.save_pretrained(work / "initial")
    examples = []
    for prompt, completion in records(work / "data.jsonl"):
        prompt = tokenizer(prompt.removesuffix("\n")).input_ids
        completion = tokenizer(completion).input_ids + [tokenizer.eos_token_id]
        examples.append(
            {
                "input_ids": prompt + completion,
                "attention_mask": [1] * (len(prompt) + len(completion)),
                "labels": [-100] * len(prompt) + completion,
            }
        )

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_train_begin(self, *_, **__):
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    clock = Clock()
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(work / "trainer"),
            per_device_train_batch_size=arguments.batch,
            max_steps=arguments.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[clock],
    )
    trainer.train()
    steps = [
        examples[step * arguments.batch : (step + 1) * arguments.batch]
        for step in range(arguments.steps)
    ]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "versions": [torch.__version__, transformers.__version__, peft.__version__],
                "seconds": [end - start for start, end in zip(clock.ends, clock.ends[1:])],
                "tokens": [sum(len(example["labels"]) for example in step) for step in steps],
                "supervised": [
                    sum(label != -100 for example in step for label in example["labels"])
                    for step in steps
                ],
                "losses": losses,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def retune_side(arguments, tokens):
    work = Path(arguments.work)
    run = work / "retune-run"
    subprocess.run(
        [arguments.retune, "train", "lora", "--model", work / "base", "--data", work / "data.jsonl"]
        + ["--init-adapter", work / "initial", "--order", work / "order.txt"]
        + ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch)]
        + ["--learning-rate", str(LEARNING_RATE), "--schedule", "constant", "--warmup-steps", "0"]
        + ["--threads", str(arguments.threads), "--out", run, "--overwrite", "--quiet"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    return {
        "seconds": [
            count / step["tokens_per_second"] for count, step in zip(tokens, steps, strict=True)
        ],
        "supervised": [step["target_tokens"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "memory": max(step["peak_memory_bytes"] for step in steps),
    }


def rate(result):
    return sum(result["supervised"][1:]) / sum(result["seconds"][1:])


def compare(arguments):
    prepare(arguments)
    ratios, commands = [], []
    for _ in range(arguments.pairs):
        start = time.perf_counter()
        output = subprocess.run(
            [sys.executable, __file__, "--side", "peft", "--work", arguments.work]
            + ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
            + ["--threads", str(arguments.threads)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        peft_wall = time.perf_counter() - start
        peft = json.loads(output.strip().splitlines()[-1])
        start = time.perf_counter()
        own = retune_side(arguments, peft["tokens"])
        own_wall = time.perf_counter() - start
        assert own["supervised"] == peft["supervised"], (own["supervised"], peft["supervised"])
        worst = max(abs(a - b) for a, b in zip(own["losses"], peft["losses"]))
        ratios.append(rate(own) / rate(peft))
        commands.append(peft_wall / own_wall)
        line = {
            "supervised_tokens_per_second": [round(rate(own), 1), round(rate(peft), 1)],
            "ratio": round(ratios[-1], 2),
            "command_seconds": [round(own_wall, 1), round(peft_wall, 1)],
            "first_losses": [round(own["losses"][0], 4), round(peft["losses"][0], 4)],
            "worst_loss_difference": worst,
            "memory_mib": [own["memory"] >> 20, peft["memory"] >> 20],
            "versions": peft["versions"],
        }
        print(json.dumps(line), flush=True)
    print(
        json.dumps(
            {
                "median_ratio": round(statistics.median(ratios), 2),
                "median_command_ratio": round(statistics.median(commands), 2),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="JSON lines of question/answer or prompt/completion")
    parser.add_argument("--work", required=True, help="folder for the base, the data and both runs")
    parser.add_argument("--retune", default="target/release/retune")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=["peft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "peft":
        peft_side(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
