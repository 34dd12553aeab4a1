"""Writes generation.json: what transformers and PEFT generate from the fixtures, and what transformers' logits
processors leave of some random scores.

    python generation_reference.py
"""

import json
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from reference import load_base, prepare
from transformers.generation import logits_process as processors

HERE = Path(__file__).parent
NEW_TOKENS = 24
# Where the two best scores are closer than this, rounding may decide: the text is compared up to there.
CLEAR = 1e-4


def texts(folder):
    """Greedy continuations of a fixture, plain and with a penalty on repetition."""
    config_file = folder / "adapter_config.json"
    if config_file.exists():
        base = HERE / json.loads(config_file.read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(load_base(base), folder).eval()
    else:
        base = folder
        model = load_base(folder)
    # transformers keeps keys that were turned for a shorter text; the text itself, scored anew, is the measure.
    dynamic = "dynamic" in base.name
    records = json.loads((folder / "score.json").read_text())["records"]
    for record, penalty in [(records[0], 1.0), (records[1], 1.0), (records[1], 1.3)]:
        prompt = record["tokens"][:9]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=penalty,
                pad_token_id=0,
                use_cache=not dynamic,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = output.sequences[0].tolist()[-len(output.scores) :]
        gaps = [(top := scores[0].topk(2).values)[0] - top[1] for scores in output.scores]
        clear = next((index for index, gap in enumerate(gaps) if gap < CLEAR), len(tokens))
        yield {
            "folder": str(folder.relative_to(HERE)),
            "prompt": prompt,
            "repetition_penalty": penalty,
            "tokens": tokens[:clear],
        }


def filtered():
    """Random scores, and the probabilities that remain under settings of the filters."""
    torch.manual_seed(0)
    settings = [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.5},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 0.3, "top_k": 20, "top_p": 0.99, "min_p": 0.01, "repetition_penalty": 0.8},
    ]
    for ties in [False, True]:
        for setting in settings:
            scores = torch.randn(1, 40) * 2
            if ties:
                scores = scores.round()
            text = torch.randint(0, 40, (1, 8))
            left = scores.clone()
            chosen = []
            if "repetition_penalty" in setting:
                chosen.append(processors.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
            if "temperature" in setting:
                chosen.append(processors.TemperatureLogitsWarper(setting["temperature"]))
            if "top_k" in setting:
                chosen.append(processors.TopKLogitsWarper(setting["top_k"]))
            if "top_p" in setting:
                chosen.append(processors.TopPLogitsWarper(setting["top_p"]))
            if "min_p" in setting:
                chosen.append(processors.MinPLogitsWarper(setting["min_p"]))
            for processor in chosen:
                left = processor(text, left)
            yield {
                "setting": setting,
                "text": text[0].tolist(),
                "scores": [float(f"{score:.9g}") for score in scores[0].tolist()],
                "probabilities": [float(f"{value:.6g}") for value in left.softmax(-1)[0].tolist()],
            }


def main():
    prepare()
    folders = sorted((HERE / "models").iterdir()) + sorted((HERE / "adapters").iterdir())
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "texts": [text for folder in folders for text in texts(folder)],
        "filters": list(filtered()),
    }
    lines = [f'"versions": {json.dumps(result["versions"])}']
    for key in ["texts", "filters"]:
        entries = ",\n".join(json.dumps(entry) for entry in result[key])
        lines.append(f'"{key}": [\n{entries}\n]')
    (HERE / "generation.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
