//! `README.md` of a base: what it is, what it learned from, how to make it again.

use super::{PretrainOptions, Pretrained};
use crate::report::format;
use crate::train::{Budget, TrainOptions};
use std::fmt::Write;
use std::path::Path;

/// The model card. The same run gives the same card: it says nothing of time or machine.
pub(super) fn model_card(
    options: &PretrainOptions,
    training: &TrainOptions,
    pretrained: &Pretrained,
) -> String {
    let shape = &options.shape;
    let names: Vec<String> = options.data.iter().map(|file| name(file)).collect();
    let mut card = String::from(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# A small base\n\n",
    );
    let mut line =
        |text: String| writeln!(card, "{text}").expect("writing to a string cannot fail");
    line(format!(
        "A `{}` with {} weights, stored as {}, trained from scratch by retune {} on {}.\n",
        shape.model_type.name(),
        format::whole(pretrained.parameters as u64),
        shape.dtype_name(),
        env!("CARGO_PKG_VERSION"),
        names
            .iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", "),
    ));
    line("| | |\n|---|---|".to_owned());
    for (what, value) in [
        ("hidden size", shape.hidden_size.to_string()),
        ("feed-forward size", shape.intermediate_size.to_string()),
        ("layers", shape.layers.to_string()),
        (
            "heads",
            format!(
                "{} of {}, {} for keys and values",
                shape.attention_heads, shape.head_dim, shape.key_value_heads
            ),
        ),
        (
            "vocabulary",
            format!(
                "{}, byte-level BPE learned from the same text",
                shape.vocabulary
            ),
        ),
        ("longest sequence", shape.max_positions.to_string()),
        (
            "steps",
            format!(
                "{} of {} segments of {} tokens",
                pretrained.state.step, training.batch_size, options.length
            ),
        ),
        (
            "learning rate",
            format!(
                "{}, {} warm-up steps",
                training.learning_rate, training.warmup_steps
            ),
        ),
    ] {
        line(format!("| {what} | {value} |"));
    }
    if let Some(best) = pretrained.state.best {
        line(format!(
            "| held-out loss | {:.4}, after step {} |",
            best.loss, best.step
        ));
    }
    line(format!(
        "\n## Make it again\n\n```sh\n{}\n```",
        command(options, training, &names)
    ));
    card
}

/// The command line of the run, without folders.
fn command(options: &PretrainOptions, training: &TrainOptions, data: &[String]) -> String {
    let mut command = format!(
        "retune pretrain --shape shape.toml --data {} --out base",
        data.join(",")
    );
    let budget = match training.budget {
        Budget::Epochs(epochs) => format!("--epochs {epochs}"),
        Budget::Steps(steps) => format!("--steps {steps}"),
    };
    for option in [
        budget,
        format!("--length {}", options.length),
        format!("--batch-size {}", training.batch_size),
        format!("--learning-rate {}", training.learning_rate),
        format!("--warmup-steps {}", training.warmup_steps),
        format!("--weight-decay {}", training.weight_decay),
        format!("--seed {}", options.seed),
    ] {
        write!(command, " \\\n  {option}").expect("writing to a string cannot fail");
    }
    if let Some(share) = options.eval_fraction {
        write!(command, " \\\n  --eval-fraction {share}").expect("writing to a string cannot fail");
    }
    command
}

fn name(file: &Path) -> String {
    file.file_name().map_or_else(
        || file.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
