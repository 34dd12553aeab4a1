"""Check against PEFT what retune wrote: its scores, its adapter folder, its merged checkpoint. Run by hand.

    retune score --model BASE --adapter ADAPTER --data DATA > scores.jsonl
    python tests/golden/check_adapter.py --model BASE --adapter ADAPTER --scores scores.jsonl
    python tests/golden/check_adapter.py --model BASE --adapter ADAPTER --merged CHECKPOINT

Scores are JSON lines {"tokens": [...], "logprobs": [null, ...]}; a null is not compared. Without --adapter the bare
base is checked. The exit code is 1 if a number differs by more than the tolerance, if the adapter's tensors are not
exactly those that PEFT expects, or if the adapter changes nothing.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from reference import load_base, prepare, score
from safetensors.torch import load_file


def main():
    options = parse_options()
    prepare(options.threads)
    problems = []
    if options.scores:
        problems += check_scores(options)
    if options.merged:
        problems += check_merged(options)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="checkpoint folder of the base")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT folder")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="what `retune score` printed")
    parser.add_argument("--merged", type=Path, metavar="DIR", help="what `retune merge` wrote")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="allowed difference (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    options = parser.parse_args()
    if not (options.scores or options.merged):
        parser.error("nothing to check: give --scores, --merged or both")
    if options.merged and not options.adapter:
        parser.error("--merged needs --adapter")
    return options


def check_scores(options):
    """Compare the log-probabilities in float32; returns what is wrong."""
    records = [json.loads(line) for line in options.scores.read_text().splitlines() if line.strip()]
    if not records:
        return [f"{options.scores} has no records"]
    model = load_base(options.model)
    problems = []
    if options.adapter:
        without = [score(model, record["tokens"]) for record in records]
        model, problems = load_adapter(model, options.adapter)
        if model is None:
            return problems
    reference = [score(model, record["tokens"]) for record in records]
    if options.adapter:
        effect = max(difference(*pair) for pair in zip(reference, without))
        print(f"largest change by the adapter: {effect:.3g}")
        if effect == 0:
            problems.append("the adapter changes no log-probability")

    differences = [difference(record["logprobs"], expected) for record, expected in zip(records, reference)]
    worst = max(range(len(records)), key=differences.__getitem__)
    compared = sum(value is not None for record in records for value in record["logprobs"])
    print(
        f"largest difference of {compared} log-probabilities in {len(records)} records:"
        f" {differences[worst]:.3g} (record {worst})"
    )
    if compared == 0:
        problems.append(f"{options.scores} holds no log-probability")
    if differences[worst] > options.tolerance:
        problems.append(f"log-probabilities differ by {differences[worst]:.3g}, more than {options.tolerance:.3g}")
    return problems


def difference(logprobs, expected):
    """Largest absolute difference of the values that are not null; infinite if the lists do not fit or hold a NaN."""
    if len(logprobs) != len(expected):
        return math.inf
    pairs = [pair for pair in zip(logprobs, expected) if pair[0] is not None]
    if any(other is None or math.isnan(value) for value, other in pairs):
        return math.inf
    return max((abs(value - other) for value, other in pairs), default=0.0)


def load_adapter(model, folder):
    """The base with the adapter, and what PEFT or a comparison of tensor names found wrong.

    PEFT says nothing about tensors that it does not expect: it drops them, or writes them over base weights of the
    same name. Hence the comparison.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            adapted = PeftModel.from_pretrained(model, folder).eval()
        except KeyError as missing:
            return None, [f"the adapter lacks the tensor {missing}"]
    problems = []
    for message in sorted({str(warning.message) for warning in caught}):
        print(f"PEFT warned: {message}")
        if "missing" in message.lower() or "unexpected" in message.lower():
            problems.append("PEFT warned about missing or unexpected keys")
    present = set(load_file(folder / "adapter_model.safetensors"))
    # PEFT itself adds the base weights of adapted embeddings and heads; they are allowed and not required.
    present = {name for name in present if not name.endswith(".base_layer.weight")}
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    problems += [f"the adapter lacks the tensor `{name}`" for name in sorted(expected - present)]
    problems += [f"PEFT does not expect the tensor `{name}`" for name in sorted(present - expected)]
    return adapted, problems


def check_merged(options):
    """Compare the weights of a merged checkpoint with PEFT's, merged in the stored type of the base."""
    model, problems = load_adapter(load_base(options.model, dtype="auto"), options.adapter)
    if model is None:
        return problems
    if model.active_peft_config.is_prompt_learning:
        return problems + ["virtual tokens cannot be merged"]
    expected = model.merge_and_unload().state_dict()
    merged = {}
    for file in sorted(options.merged.glob("*.safetensors")):
        merged |= load_file(file)
    for weights in (expected, merged):  # a tied head may be stored under either name or both
        if model.config.tie_word_embeddings and "lm_head.weight" in weights:
            weights.setdefault("model.embed_tokens.weight", weights.pop("lm_head.weight"))
            weights.pop("lm_head.weight", None)
    problems += [f"the merged checkpoint lacks `{name}`" for name in sorted(expected.keys() - merged.keys())]
    problems += [f"the merged checkpoint has `{name}` too many" for name in sorted(merged.keys() - expected.keys())]

    largest, where = 0.0, "none"
    for name in sorted(expected.keys() & merged.keys()):
        weight, other = expected[name], merged[name]
        if weight.shape != other.shape or weight.dtype != other.dtype:
            problems.append(f"`{name}` is {other.dtype} {list(other.shape)}, not {weight.dtype} {list(weight.shape)}")
            continue
        distance = (weight.double() - other.double()).abs()
        # Two roundings of nearly the same number to a narrow type may be one step apart.
        step = 0.0 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps * weight.double().abs()
        if not (distance <= options.tolerance + step).all():
            problems.append(f"`{name}` differs by {distance.max():.3g}")
        if distance.max() > largest:
            largest, where = distance.max().item(), name
    print(f"largest difference of {len(expected)} merged weights: {largest:.3g} ({where})")
    return problems


if __name__ == "__main__":
    main()
