"""Make the golden fixtures beside this file: `python tests/golden/make_golden.py`.

transformers and PEFT are the reference that retune must equal. This script lets them write tiny random models,
adapters of every method, the scores and merged weights that follow from them, and 20 training steps; the Rust tests
reproduce the numbers. All weights are random but not small: norms are spread around 1, biases and LoRA's B are not
zero, alpha differs from the rank, so that a forgotten bias or scale changes the result.

    models/NAME/      a checkpoint folder, and score.json: log-probabilities of three token sequences
                      (models/llama/score-nf4.json: those of the base in NF4)
                      (models/llama/chat.json: a conversation rendered by the chat template)
    adapters/NAME/    a PEFT folder, score.json of base + adapter, merged.safetensors where it can be merged
    train/METHOD/     initial/ and final/ PEFT folders, data.jsonl, order.txt, expected.json: loss and norm per step
                      (expected-nf4.json: the same on the base in NF4)
    MANIFEST.json     versions, and what each fixture is for

Everything follows from fixed seeds: the same versions on the same machine write the same bytes.
"""

import json
import os
import platform
import shutil
import warnings
import zlib
from pathlib import Path

import bitsandbytes
import peft
import safetensors
import tokenizers
import torch
import transformers
from peft import PeftModel, get_peft_model
from reference import (
    last_layers_config,
    load_base,
    lora_config,
    prepare,
    prompt_config,
    quantize,
    read_examples,
    score,
    train_step,
    trainable,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).resolve().parent
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = ["<unk>", "<s>", "</s>"] + [f"w{number}" for number in range(90)] + ROLES
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %} <|{{ message.role }}|> {{ message.content }} {{ eos_token }}{% endfor %}
{%- if add_generation_prompt %} <|assistant|>{% endif %}"""
CHAT = [
    {"role": "system", "content": "w1 w2"},
    {"role": "user", "content": "w3 w4 w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "w7 w8"},
]

SHAPE = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    bos_token_id=1,
    eos_token_id=2,
)
HALF = dict(dtype=torch.bfloat16)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=64)

QWEN3 = Qwen3Config(**SHAPE, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=5e4))

# name: (what it is for, configuration, how it is stored). Weights of the same architecture are the same.
MODELS = {
    "llama": ("untied head, grouped-query attention", LlamaConfig(**SHAPE), {}),
    "llama-tied": (
        "tied head; only model.embed_tokens.weight is stored",
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        {},
    ),
    "llama-tied-head-only": (
        "tied head; only lm_head.weight is stored; scores of llama-tied",
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        dict(head_only=True),
    ),
    "llama-sharded": (
        "several safetensors files with an index; scores of llama",
        LlamaConfig(**SHAPE),
        dict(max_shard_size="30KB"),
    ),
    "llama-bf16": ("stored in bfloat16, scored in float32", LlamaConfig(**SHAPE), HALF),
    "llama-f16": ("stored in float16, scored in float32", LlamaConfig(**SHAPE), dict(dtype=torch.float16)),
    "llama-biases": (
        "biases in attention and feed-forward",
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
        {},
    ),
    "llama-rope-linear": (
        "positions divided by a factor",
        LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        HALF,
    ),
    "llama-rope-dynamic": (
        "base grows with sequences longer than 16 positions; each score by the length of its own sequence",
        LlamaConfig(
            **(SHAPE | dict(max_position_embeddings=16)),
            rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
        ),
        HALF,
    ),
    "llama-rope-llama3": (
        "one frequency kept, one blended, two divided",
        LlamaConfig(
            **(SHAPE | dict(max_position_embeddings=1024)),
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        ),
        HALF,
    ),
    "llama-rope-yarn": (
        "a ramp of four steps, attention factor from the factor",
        LlamaConfig(**(SHAPE | dict(max_position_embeddings=256)), rope_parameters=YARN),
        HALF,
    ),
    "llama-rope-yarn-old": (
        "llama-rope-yarn with its config.json in the style of transformers 4",
        LlamaConfig(**(SHAPE | dict(max_position_embeddings=256)), rope_parameters=YARN),
        HALF | dict(old_config={}),
    ),
    "llama-rope-yarn-explicit": (
        "YaRN with every optional field, bounds not rounded",
        LlamaConfig(
            **(SHAPE | dict(max_position_embeddings=256)),
            rope_parameters=YARN | dict(attention_factor=0.9, beta_fast=8.0, beta_slow=0.7, truncate=False),
        ),
        HALF,
    ),
    "mistral": ("sliding window of 4 positions in every layer", MistralConfig(**SHAPE, sliding_window=4), {}),
    "qwen2": (
        "biases on q, k, v; tied head; config.json as of transformers 4, with a sliding window that is not used",
        Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        dict(old_config=dict(use_sliding_window=False, sliding_window=4, max_window_layers=0)),
    ),
    "qwen2-window": (
        "sliding window of 4 positions in the layers from max_window_layers on, here the last",
        Qwen2Config(
            **SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        HALF,
    ),
    "qwen3": ("norms on q and k; head_dim is not hidden_size / heads", QWEN3, {}),
}

# name: (what it is for, base, configuration of a given base model)
ADAPTERS = {
    "lora-llama": (
        "every linear layer but the head",
        "llama",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules="all-linear"),
    ),
    "lora-llama-bf16": (
        "float32 adapter of a bfloat16 base; scores in float32, merged weights in bfloat16",
        "llama-bf16",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules="all-linear"),
    ),
    "lora-llama-biases": (
        "base layers with biases",
        "llama-biases",
        lambda base: lora_config(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"]),
    ),
    "lora-rslora-llama": (
        "scale alpha / sqrt(rank)",
        "llama",
        lambda base: lora_config(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "lora-patterns-llama": (
        "own ranks and alphas for some layers, one layer excluded; two keys match one layer, the first one counts",
        "llama",
        lambda base: lora_config(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "up_proj"],
            exclude_modules=["layers.0.mlp.up_proj"],
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3},
            alpha_pattern={"up_proj": 5, "v_proj": 7},
        ),
    ),
    "lora-regex-qwen2": (
        "targets as one regular expression",
        "qwen2",
        lambda base: lora_config(
            r=4, lora_alpha=6, target_modules=r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.down_proj)"
        ),
    ),
    "lora-layers-qwen2": (
        "a list of targets in layer 1 only",
        "qwen2",
        lambda base: lora_config(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "gate_proj"], layers_to_transform=[1]
        ),
    ),
    "lora-qwen3": (
        "every linear layer but the head",
        "qwen3",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules="all-linear"),
    ),
    "lora-mistral": (
        "the attention",
        "mistral",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ),
    "lora-embeddings-llama": (
        "embeddings, head and a linear layer; PEFT adds the base weights of the first two to the file",
        "llama",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    ),
    "lora-llama-tied": (
        "a base with a tied head that is not adapted",
        "llama-tied",
        lambda base: lora_config(r=4, lora_alpha=6, target_modules=["k_proj", "down_proj"]),
    ),
    "prompt-llama": ("four virtual tokens", "llama", lambda base: prompt_config(4)),
    "prompt-qwen2": ("four virtual tokens, tied head", "qwen2", lambda base: prompt_config(4)),
    "prompt-mistral": (
        "four virtual tokens, which leave the sliding window like any other",
        "mistral",
        lambda base: prompt_config(4),
    ),
    "last-layers-llama": ("the whole last block", "llama", lambda base: last_layers_config(base, 1)),
    "last-layers-qwen3": (
        "the feed-forward part of the last block",
        "qwen3",
        lambda base: last_layers_config(base, 1, feed_forward_only=True),
    ),
    "last-layers-head-llama": (
        "the last block, the final norm and the untied head",
        "llama",
        lambda base: last_layers_config(base, 1, final_norm=True, head=True),
    ),
}

# method: (configuration of a given base model, learning rate)
TRAINED = {
    "lora": (lambda base: lora_config(r=4, lora_alpha=6, target_modules="all-linear"), 0.01),
    "prompt": (lambda base: prompt_config(4), 0.1),
    "last-layers": (lambda base: last_layers_config(base, 1, final_norm=True), 0.01),
}
TRAINED_BASE = "models/llama"
STEPS, BATCH_SIZE, RECORDS = 20, 4, 12


def main():
    prepare()
    # Relative paths keep the machine out of the fixtures: PEFT writes the path of the base into its folders.
    os.chdir(HERE)
    for folder in ("models", "adapters", "train"):
        shutil.rmtree(folder, ignore_errors=True)
    sequences = [random_tokens(f"sequence {length}", length) for length in (5, 17, 23)]
    for name, (_, config, storage) in MODELS.items():
        make_model(Path("models", name), config, sequences, **storage)
        print(f"models/{name}")
    make_chat(Path("models", "llama"))
    quantized = load_base("models/llama").requires_grad_(False)
    quantize(quantized)
    write_scores(Path("models", "llama", "score-nf4.json"), quantized, sequences)
    for name, (_, base, config) in ADAPTERS.items():
        make_adapter(Path("adapters", name), f"models/{base}", config, sequences)
        print(f"adapters/{name}")
    for method, (config, learning_rate) in TRAINED.items():
        losses = make_training(Path("train", method), method, config, learning_rate)
        print(f"train/{method}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    check_related_scores()
    write_json(Path("MANIFEST.json"), manifest())


def make_model(folder, config, sequences, dtype=torch.float32, head_only=False, old_config=None, max_shard_size="1GB"):
    """A checkpoint folder of random weights with tokenizer and scores."""
    model = AutoModelForCausalLM.from_config(config)
    fill_weights(model, config.model_type)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    if head_only:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if old_config is not None:
        write_old_config(folder / "config.json", old_config)
    write_scores(folder / "score.json", load_base(folder), sequences)


def make_adapter(folder, base_folder, config, sequences):
    """A PEFT folder of random weights, the scores with it, and the merged weights."""
    base = load_base(base_folder)
    without = [score(base, tokens) for tokens in sequences]
    model = get_peft_model(base, config(base)).eval()
    randomize(model, folder.name)
    save_adapter(model, folder)

    loaded = load_adapter(base_folder, folder)
    write_scores(folder / "score.json", loaded, sequences)
    scores = [score(loaded, tokens) for tokens in sequences]
    assert largest_difference(scores, [score(model, tokens) for tokens in sequences]) == 0, folder
    assert largest_difference(scores, without) > 0.1, folder

    if not loaded.active_peft_config.is_prompt_learning:
        assert largest_difference(scores, merge(loaded, sequences)) < 1e-4, folder
        stored_type = load_base(base_folder, dtype="auto").dtype
        merged = load_adapter(base_folder, folder, dtype=stored_type).merge_and_unload()
        weights = merged.state_dict()
        if merged.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        save_file(weights, folder / "merged.safetensors", metadata={"format": "pt"})


def make_training(folder, method, config, learning_rate):
    """A starting adapter, data and order, and what a plain training loop makes of them."""
    folder.mkdir(parents=True)
    write_data(folder / "data.jsonl")
    order = training_order()
    (folder / "order.txt").write_text("".join(f"{index}\n" for index in order))

    model = start_of_training(method, config)
    save_adapter(model, folder / "initial")
    settings = train(model, folder, order, learning_rate)
    write_json(folder / "expected.json", settings)
    save_adapter(model, folder / "final")
    losses = settings["losses"]
    assert losses[-1] < 0.7 * losses[0], losses

    quantized = start_of_training(method, config)
    quantize(quantized)
    write_json(folder / "expected-nf4.json", train(quantized, folder, order, learning_rate))
    return losses


def start_of_training(method, config):
    """The base with the adapter that a training starts from."""
    base = load_base(TRAINED_BASE)
    model = get_peft_model(base, config(base))
    randomize(model, f"train {method}")
    return model


def train(model, folder, order, learning_rate):
    """A plain training loop on the data in the folder: its settings, and loss and gradient norm of each step."""
    examples = read_examples(folder / "data.jsonl", AutoTokenizer.from_pretrained(TRAINED_BASE))
    settings = dict(learning_rate=learning_rate, weight_decay=0.01, betas=[0.9, 0.999], epsilon=1e-8)
    optimizer = torch.optim.AdamW(
        trainable(model), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, foreach=False
    )
    steps = []
    for first in range(0, len(order), BATCH_SIZE):
        batch = [examples[index] for index in order[first : first + BATCH_SIZE]]
        steps.append(train_step(model, optimizer, batch, max_gradient_norm=1.0))
    losses, norms = zip(*steps)
    return settings | dict(max_gradient_norm=1.0, batch_size=BATCH_SIZE, losses=losses, gradient_norms=norms)


def fill_weights(model, family):
    """Random weights that depend only on the family and the name, with spread norms and biases that are not zero."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(f"{family} {name}"))
        if "norm" in name:
            parameter.data = 1 + 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.data = 0.3 * noise
        else:
            parameter.data = 0.2 * noise


def randomize(model, seed):
    """Random weights for an adapter: whole base weights move by a part of themselves, new ones are set."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator(f"{seed} {name}"))
        if "modules_to_save" in name:
            parameter.data += 0.1 * noise
        elif "prompt_encoder" in name:
            parameter.data = 0.4 * noise
        else:
            parameter.data = 0.2 * noise


def save_adapter(model, folder):
    """save_pretrained without the model card, and with PEFT's sets written in a fixed order."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), list):
            config[field].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def load_adapter(base_folder, folder, dtype=torch.float32):
    """Base and adapter from their files; a PEFT warning about either is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(load_base(base_folder, dtype), folder).eval()


def merge(model, sequences):
    """Scores after merging. The adapter is gone afterwards."""
    merged = model.merge_and_unload()
    return [score(merged, tokens) for tokens in sequences]


def make_tokenizer():
    """One word is one token; words are separated by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
    )


def make_chat(folder):
    """chat.json: a conversation, its text by the chat template of the folder, and the tokens of that text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = []
    for add_generation_prompt in (False, True):
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert 0 not in tokens, text
        rendered = dict(messages=CHAT, add_generation_prompt=add_generation_prompt, text=text, tokens=tokens)
        lines.append(json.dumps(rendered))
    (folder / "chat.json").write_text('{"records": [\n' + ",\n".join(lines) + "\n]}\n")


def write_old_config(path, changes):
    """Rewrite a config.json as transformers 4 wrote it: `rope_scaling`, `rope_theta`, `torch_dtype`, no layer types."""
    config = json.loads(path.read_text()) | changes
    config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.0"
    write_json(path, config)


def write_data(path):
    """Records whose completion repeats the first and last words of the prompt, then one word that they share."""
    with path.open("w") as file:
        for record in range(RECORDS):
            words = [f"w{token % 90}" for token in random_tokens(f"record {record}", 3 + record % 4)]
            completion = [words[0], words[-1], "w7"][: 2 + record % 2]
            file.write(json.dumps(dict(prompt=" ".join(words), completion=" " + " ".join(completion))) + "\n")


def training_order():
    """Record indices for every step: one shuffle of all records after the other."""
    order, source = [], generator("order")
    while len(order) < STEPS * BATCH_SIZE:
        order += torch.randperm(RECORDS, generator=source).tolist()
    return order[: STEPS * BATCH_SIZE]


def write_scores(path, model, sequences):
    """Tokens and log-probabilities of each sequence."""
    lines = [json.dumps(dict(tokens=tokens, logprobs=score(model, tokens))) for tokens in sequences]
    path.write_text('{"records": [\n' + ",\n".join(lines) + "\n]}\n")


def check_related_scores():
    """Models that differ only in how they are stored have equal scores."""
    for name, other in [
        ("llama-sharded", "llama"),
        ("llama-tied-head-only", "llama-tied"),
        ("llama-rope-yarn-old", "llama-rope-yarn"),
    ]:
        assert Path("models", name, "score.json").read_text() == Path("models", other, "score.json").read_text(), name


def manifest():
    """Versions that wrote the fixtures, and what each fixture is for."""
    return dict(
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__.split("+")[0],
            transformers=transformers.__version__,
            peft=peft.__version__,
            safetensors=safetensors.__version__,
            tokenizers=tokenizers.__version__,
            bitsandbytes=bitsandbytes.__version__,
        ),
        models={name: purpose for name, (purpose, _, _) in MODELS.items()},
        adapters={name: dict(base=f"models/{base}", purpose=purpose) for name, (purpose, base, _) in ADAPTERS.items()},
        train={method: dict(base=TRAINED_BASE) for method in TRAINED},
    )


def random_tokens(seed, count):
    """Token indices from the whole vocabulary."""
    return torch.randint(0, len(VOCABULARY), (count,), generator=generator(seed)).tolist()


def generator(seed):
    """A source of random numbers that belongs to one name."""
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))


def largest_difference(scores, others):
    """Largest absolute difference of two lists of log-probabilities."""
    pairs = (pair for first, second in zip(scores, others) for pair in zip(first[1:], second[1:]))
    return max(abs(first - second) for first, second in pairs)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
