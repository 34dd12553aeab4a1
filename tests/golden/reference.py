"""What the scripts in this folder share: how transformers and PEFT load, score and train here.

Everything is float32 on the CPU with eager attention, one sequence at a time and without padding, so that a
number depends on nothing but the weights and the tokens.
"""

import json
import math
import warnings

import bitsandbytes  # noqa: F401  (its operations are found through torch)
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.nn import functional
from transformers import AutoModelForCausalLM


def prepare(threads=1):
    """One thread gives the same sums on every machine; progress bars and PEFT's use of an old name are noise."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def load_base(folder, dtype=torch.float32):
    """A checkpoint folder as a frozen model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def quantize(model):
    """Give the frozen linear layers of the blocks the values that they have in NF4, as `bnb_4bit_quant_type="nf4"` does."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path and not module.weight.requires_grad:
            # One row: bitsandbytes' code for the CPU takes blocks within rows, its code for GPUs across them.
            weight = module.weight.data.reshape(1, -1)
            codes, largest = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
            values = torch.ops.bitsandbytes.dequantize_4bit(codes, largest, 64, "nf4", weight.shape, weight.dtype)
            module.weight.data = values.reshape(module.weight.shape)


def forget_longer_sequences(model):
    """Reset dynamic RoPE, which keeps the frequencies of the longest sequence that it has seen."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def predictions(model, tokens):
    """Logits (tokens - 1, vocabulary): row i predicts token i + 1. Rows of virtual tokens are left out."""
    forget_longer_sequences(model)
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]  # (virtual + tokens, vocabulary)
    return logits[-len(tokens) :][:-1].float()


@torch.no_grad()
def score(model, tokens):
    """Log-probability of each token given those before it; the first token has none."""
    logprobs = functional.log_softmax(predictions(model, tokens), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return [None] + [float(f"{value:.9g}") for value in chosen.tolist()]


def read_examples(path, tokenizer, max_length=None):
    """JSON lines as (tokens, learn) pairs: prompts are given, completions, texts and the closing eos are learned."""
    examples = []
    with open(path, encoding="utf-8") as lines:
        for record in (json.loads(line) for line in lines if line.strip()):
            # Whatever the tokenizer puts before a text (a start token) stands before the record, once.
            if "prompt" in record:
                given = tokenizer(record["prompt"])["input_ids"]
                learned = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            else:
                given, learned = [], tokenizer(record["text"])["input_ids"]
            learned = learned + [tokenizer.eos_token_id]
            tokens = given + learned
            learn = [False] * len(given) + [True] * len(learned)
            examples.append((tokens[:max_length], learn[:max_length]))
    return examples


def example_loss(model, example):
    """Sum of the cross-entropies of the learned tokens of one example, and their number."""
    tokens, learn = example
    learned = torch.tensor(learn[1:])
    if not learned.any():
        return torch.zeros(()), 0
    targets = torch.tensor(tokens[1:])[learned]
    return functional.cross_entropy(predictions(model, tokens)[learned], targets, reduction="sum"), len(targets)


@torch.no_grad()
def mean_loss(model, examples):
    """Mean cross-entropy over the learned tokens of all examples."""
    losses, counts = zip(*(example_loss(model, example) for example in examples))
    return math.fsum(float(loss) for loss in losses) / sum(counts)


def learned_tokens(example):
    """How many tokens of an example are learned; the first token is never predicted."""
    return sum(example[1][1:])


def train_step(model, optimizer, batch, max_gradient_norm):
    """One optimizer step; returns its loss and the gradient norm before clipping.

    The loss is the sum over the batch divided by the learned tokens of the batch. Each example goes through the
    model on its own; their gradients add up.
    """
    count = sum(learned_tokens(example) for example in batch)
    optimizer.zero_grad()
    total = 0.0
    for example in batch:
        loss, _ = example_loss(model, example)
        (loss / count).backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), max_gradient_norm)
    optimizer.step()
    return total / count, norm.item()


def trainable(model):
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_config(**fields):
    """A plain LoRA of a causal language model."""
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def prompt_config(virtual_tokens, init="RANDOM"):
    """Prompt tuning with freely trained virtual tokens."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, prompt_tuning_init=init)


def last_layers_config(model, layers, feed_forward_only=False, final_norm=False, head=False):
    """PEFT's closest form of "train the last blocks as they are".

    PEFT has no such method, but a LoRA that targets nothing may carry whole modules in `modules_to_save`. It raises
    an error for an empty list of targets and allows exactly one name to match nothing. The modules are named one by
    one by their full path because PEFT matches these names with a bare `endswith`: `norm` would also mean
    `input_layernorm`.
    """
    first = model.config.num_hidden_layers - layers
    part = ".mlp" if feed_forward_only else ""
    prefixes = tuple(f"model.layers.{layer}{part}." for layer in range(first, model.config.num_hidden_layers))
    modules = [
        path
        for path, module in model.named_modules()
        if path.startswith(prefixes) and any(True for _ in module.parameters(recurse=False))
    ]
    modules += ["model.norm"] if final_norm else []
    modules += ["lm_head"] if head else []
    return lora_config(target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules)
