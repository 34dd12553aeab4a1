//! What the model card of a finished run says.

use super::finished::Finished;
use crate::data::Dataset;
use crate::model::inventory::inventory;
use crate::report::format;
use crate::report::metrics::Metric;
use crate::report::model_card::{
    BaseModel, DataFiles, ModelCard, Purpose, Results, Task, file_name,
};
use crate::train::Budget;
use std::path::PathBuf;

/// The model card of a run that was measured by these `metrics`.
pub(super) fn model_card(run: &Finished, metrics: &[Metric]) -> ModelCard {
    let (model, out) = (run.model, &run.arguments.out);
    let placement = model.decoder.placement();
    ModelCard {
        title: out.file_name().map_or("adapter".to_owned(), |name| {
            name.to_string_lossy().into_owned()
        }),
        base_model: BaseModel::in_folder(run.folder),
        task: Task::TextGeneration,
        method: run.entry.name.to_owned(),
        about_method: run.entry.about.to_owned(),
        trained_parameters: model.weights.parameter_count() as u64,
        base_parameters: inventory(&model.config)
            .iter()
            .map(|parameter| parameter.count() as u64)
            .sum(),
        data: data(run),
        hyperparameters: hyperparameters(run),
        results: Results::of(metrics),
        duration: format::seconds(run.state.seconds),
        device: match placement.device.is_cpu() {
            true => format!("CPU, {} threads", rayon::current_num_threads()),
            false => format!("GPU, {}", placement.compute.name()),
        },
        picture: Some("loss.svg".to_owned()),
        loads_with_peft: true,
        merges: model.decoder.soft_prompt().is_none(),
        versions: vec![("retune".to_owned(), env!("CARGO_PKG_VERSION").to_owned())],
    }
}

/// What it was trained on, and what it was scored on if anything.
fn data(run: &Finished) -> Vec<DataFiles> {
    let arguments = run.arguments;
    let mut data = vec![files(&arguments.data, Purpose::Training, run.data)];
    if let Some(held_out) = run.held_out {
        // A share of the training data was held out where no other data was named.
        let paths = match arguments.eval_fraction {
            Some(_) => &arguments.data,
            None => &arguments.eval_data,
        };
        data.push(files(paths, Purpose::Evaluation, held_out));
    }
    data
}

/// The files of these examples.
fn files(paths: &[PathBuf], purpose: Purpose, data: &Dataset) -> DataFiles {
    let examples = &data.examples;
    DataFiles {
        paths: paths.to_vec(),
        purpose,
        examples: examples.len() as u64,
        tokens: examples
            .iter()
            .map(|example| example.tokens.len() as u64)
            .sum(),
        target_tokens: examples
            .iter()
            .map(|example| example.target_tokens() as u64)
            .sum(),
    }
}

/// The options of the method, then those of the training.
fn hyperparameters(run: &Finished) -> Vec<(String, String)> {
    let options = run.options;
    let steps = match run.state.skipped {
        0 => format!("{} steps", run.state.step),
        skipped => format!("{} steps, {skipped} of them left out", run.state.step),
    };
    let budget = match options.budget {
        Budget::Epochs(epochs) => format!("{epochs} epochs, {steps}"),
        Budget::Steps(_) => steps,
    };
    let training = [
        ("budget", budget),
        ("batch size", format!("{} examples", options.batch_size)),
        ("learning rate", options.learning_rate.to_string()),
        ("schedule", format!("{:?}", options.schedule).to_lowercase()),
        ("warm-up", format!("{} steps", options.warmup_steps)),
        ("weight decay", options.weight_decay.to_string()),
        ("gradient clipping", options.max_gradient_norm.to_string()),
        ("seed", options.seed.to_string()),
    ];
    let quantization = run.model.decoder.placement().quantization;
    let held = quantization.map(|quantization| ("base held in", quantization.name().to_owned()));
    let template = run.arguments.base.chat_template.as_ref();
    let template = template.map(|file| ("chat template", file_name(file)));
    let training = training.into_iter().chain(held).chain(template);
    let training = training.map(|(name, value)| (name.to_owned(), value));
    run.own_options.iter().cloned().chain(training).collect()
}
