//! The model card: the `README.md` of an adapter folder, as the Hugging Face hub reads it.

use super::format;
use super::markdown::{Column, table};
use super::metrics::Metric;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All that the card says.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// Heading, such as the name of the adapter folder.
    pub title: String,
    /// What was adapted.
    pub base_model: BaseModel,
    /// What the model does.
    pub task: Task,
    /// Name of the method, as on the command line.
    pub method: String,
    /// One sentence about the method.
    pub about_method: String,
    /// Weights that were trained.
    pub trained_parameters: u64,
    /// Weights of the base.
    pub base_parameters: u64,
    /// What it was trained and evaluated on.
    pub data: Vec<DataFiles>,
    /// Options and their values, in the order to be shown.
    pub hyperparameters: Vec<(String, String)>,
    /// What `metrics.jsonl` says of the run.
    pub results: Results,
    /// Time spent on training.
    pub duration: Duration,
    /// What it was trained on, such as `CPU, 16 cores`.
    pub device: String,
    /// Name of the picture in the adapter folder, if there is one.
    pub picture: Option<String>,
    /// Whether HF PEFT can load the folder.
    pub loads_with_peft: bool,
    /// Whether the adapter can be folded into the base.
    pub merges: bool,
    /// Programs and libraries with their versions.
    pub versions: Vec<(String, String)>,
}

/// The model that was adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseModel {
    /// Id on the Hugging Face hub, such as `Qwen/Qwen2.5-0.5B`.
    Hub(String),
    /// Name of a local folder, without the way to it.
    Folder(String),
}

impl BaseModel {
    /// The base in the folder `path`. A folder of the hub's download cache has the hub's id.
    pub fn in_folder(path: &Path) -> Self {
        let cached = path.iter().find_map(|part| {
            let id = part.to_str()?.strip_prefix("models--")?;
            Some(id.replacen("--", "/", 1))
        });
        match cached {
            Some(id) => Self::Hub(id),
            None => Self::Folder(file_name(path)),
        }
    }

    /// How to ask for it, in a command or in Python.
    fn request(&self) -> String {
        match self {
            Self::Hub(id) => id.clone(),
            Self::Folder(_) => "path/to/base-model".to_owned(),
        }
    }
}

/// What the model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Goes on with a text.
    TextGeneration,
    /// Says which class a text belongs to.
    TextClassification,
}

impl Task {
    fn pipeline_tag(self) -> &'static str {
        match self {
            Self::TextGeneration => "text-generation",
            Self::TextClassification => "text-classification",
        }
    }

    fn transformers_class(self) -> &'static str {
        match self {
            Self::TextGeneration => "AutoModelForCausalLM",
            Self::TextClassification => "AutoModelForSequenceClassification",
        }
    }
}

/// Files of examples. The card shows their names only: the way to them is private.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFiles {
    /// Where the files are.
    pub paths: Vec<PathBuf>,
    /// What they were for.
    pub purpose: Purpose,
    /// Examples used.
    pub examples: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Tokens among these that the loss counts.
    pub target_tokens: u64,
}

/// What data are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Trained on.
    Training,
    /// Held out.
    Evaluation,
}

/// The course of the losses.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results {
    /// Training loss, if a step was made.
    pub training: Option<Course>,
    /// Evaluation loss, if there was one.
    pub evaluation: Option<Course>,
    /// The last evaluation's share of right answers, for tasks that have one.
    pub accuracy: Option<f64>,
    /// Median of the tokens that went through the model each second.
    pub tokens_per_second: Option<f64>,
    /// The most memory the process had.
    pub peak_memory_bytes: u64,
}

/// First, last and lowest of a series of losses, each with its step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// The first.
    pub first: (u64, f64),
    /// The last.
    pub last: (u64, f64),
    /// The lowest; the earliest of these.
    pub lowest: (u64, f64),
}

impl Course {
    fn of(losses: &[(u64, f64)]) -> Option<Self> {
        let finite = || losses.iter().copied().filter(|loss| loss.1.is_finite());
        Some(Self {
            first: finite().next()?,
            last: finite().next_back()?,
            lowest: finite().min_by(|a, b| a.1.total_cmp(&b.1))?,
        })
    }
}

impl Results {
    /// Sums up the lines of `metrics.jsonl`.
    pub fn of(metrics: &[Metric]) -> Self {
        let (mut training, mut evaluation, mut speeds) = (Vec::new(), Vec::new(), Vec::new());
        let mut results = Self::default();
        for metric in metrics {
            match metric {
                Metric::Step(report) => {
                    training.push((report.step, report.loss));
                    speeds.push(report.tokens_per_second);
                    results.peak_memory_bytes =
                        results.peak_memory_bytes.max(report.peak_memory_bytes);
                }
                Metric::Eval(report) => {
                    evaluation.push((report.step, report.eval_loss));
                    results.accuracy = report.accuracy;
                }
            }
        }
        speeds.retain(|speed| speed.is_finite());
        speeds.sort_by(f64::total_cmp);
        results.tokens_per_second = speeds.get(speeds.len() / 2).copied();
        results.training = Course::of(&training);
        results.evaluation = Course::of(&evaluation);
        results
    }
}

impl ModelCard {
    /// The text of the `README.md`.
    pub fn to_markdown(&self) -> String {
        let sections = [
            self.front_matter(),
            self.introduction(),
            self.how_to_load(),
            self.data_section(),
            self.hyperparameter_section(),
            self.result_section(),
            self.version_section(),
        ];
        sections.join("\n")
    }

    /// What the hub reads: <https://huggingface.co/docs/hub/model-cards>.
    fn front_matter(&self) -> String {
        let mut text = String::from("---\n");
        // The hub knows hub ids only: it refuses a path.
        if let BaseModel::Hub(id) = &self.base_model {
            text.push_str(&format!(
                "base_model: {}\nbase_model_relation: adapter\n",
                yaml(id)
            ));
        }
        let library = if self.loads_with_peft {
            "peft"
        } else {
            "retune"
        };
        text.push_str(&format!(
            "library_name: {library}\npipeline_tag: {}\ntags:\n- retune\n- {}\n---\n",
            self.task.pipeline_tag(),
            yaml(&self.method)
        ));
        text
    }

    fn introduction(&self) -> String {
        let base = match &self.base_model {
            BaseModel::Hub(id) => format!("[{id}](https://huggingface.co/{id})"),
            BaseModel::Folder(name) => format!("`{name}` (a local folder)"),
        };
        let share = 100.0 * self.trained_parameters as f64 / self.base_parameters.max(1) as f64;
        format!(
            "# {}\n\nAn adapter for {base}, trained with the method `{}`. {}\n\n\
             It has {} trained weights, {share:.3} % of the base's {}.\n",
            self.title,
            self.method,
            self.about_method,
            format::count(self.trained_parameters),
            format::count(self.base_parameters),
        )
    }

    fn how_to_load(&self) -> String {
        let base = self.base_model.request();
        let mut text = String::from("## How to use it\n\nWith retune:\n\n```sh\n");
        match self.task {
            Task::TextGeneration => text.push_str(&format!(
                "retune generate --model {base} --adapter path/to/this/folder --prompt \"Hello\"\n"
            )),
            Task::TextClassification => text.push_str(&format!(
                "retune evaluate --model {base} --adapter path/to/this/folder --data test.jsonl\n"
            )),
        }
        if self.merges {
            text.push_str(&format!(
                "retune merge --model {base} --adapter path/to/this/folder --out merged-model\n"
            ));
        }
        text.push_str("```\n");
        if self.loads_with_peft {
            let class = self.task.transformers_class();
            text.push_str(&format!(
                "\nWith Hugging Face PEFT:\n\n```python\n\
                 from peft import PeftModel\n\
                 from transformers import AutoTokenizer, {class}\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{base}\")\n\
                 model = {class}.from_pretrained(\"{base}\")\n\
                 model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"
            ));
        }
        text
    }

    fn data_section(&self) -> String {
        let columns = [
            Column::Text("file"),
            Column::Text("used for"),
            Column::Number("examples"),
            Column::Number("tokens"),
            Column::Number("target tokens"),
        ];
        let rows: Vec<_> = self
            .data
            .iter()
            .map(|data| {
                let paths = data.paths.iter();
                let names: Vec<String> =
                    paths.map(|path| format!("`{}`", file_name(path))).collect();
                let purpose = match data.purpose {
                    Purpose::Training => "training",
                    Purpose::Evaluation => "evaluation",
                };
                [
                    names.join(", "),
                    purpose.to_owned(),
                    format::whole(data.examples),
                    format::whole(data.tokens),
                    format::whole(data.target_tokens),
                ]
            })
            .collect();
        format!("## Data\n\n{}", table(&columns, &rows))
    }

    fn hyperparameter_section(&self) -> String {
        let rows: Vec<_> = self
            .hyperparameters
            .iter()
            .map(|(name, value)| [name.clone(), value.clone()])
            .collect();
        let columns = [Column::Text("option"), Column::Text("value")];
        format!("## Hyperparameters\n\n{}", table(&columns, &rows))
    }

    fn result_section(&self) -> String {
        let results = &self.results;
        let mut rows = Vec::new();
        for (name, course) in [
            ("training", results.training),
            ("evaluation", results.evaluation),
        ] {
            let Some(course) = course else { continue };
            for (which, (step, loss)) in [
                ("first", course.first),
                ("last", course.last),
                ("lowest", course.lowest),
            ] {
                rows.push([
                    format!("{name}, {which}"),
                    format::whole(step),
                    format!("{loss:.4}"),
                ]);
            }
        }
        let columns = [
            Column::Text("loss"),
            Column::Number("step"),
            Column::Number("nats per token"),
        ];
        let mut text = String::from("## Results\n");
        if !rows.is_empty() {
            text.push_str(&format!("\n{}", table(&columns, &rows)));
        }
        if let Some(accuracy) = results.accuracy {
            text.push_str(&format!("\nToken accuracy: {:.1} %.\n", 100.0 * accuracy));
        }
        text.push_str(&format!(
            "\nTrained in {} on {}",
            format::duration(self.duration),
            self.device
        ));
        if let Some(speed) = results.tokens_per_second {
            text.push_str(&format!(
                ", at {} tokens/s",
                format::count(speed.round() as u64)
            ));
        }
        if results.peak_memory_bytes > 0 {
            let peak = format::bytes(results.peak_memory_bytes);
            text.push_str(&format!(", with at most {peak} of memory"));
        }
        text.push_str(".\n");
        if let Some(picture) = &self.picture {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n![Loss by step]({picture})");
        }
        text
    }

    fn version_section(&self) -> String {
        let mut text = String::from("## Versions\n\n");
        for (name, version) in &self.versions {
            text.push_str(&format!("- {name} {version}\n"));
        }
        text
    }
}

pub(crate) fn file_name(path: &Path) -> String {
    // "data/.." has no file name; nothing of the way is shown then either.
    path.file_name().map_or_else(
        || "(unnamed)".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// `text` as YAML: bare if nothing in it could mean something else, quoted as in JSON otherwise.
fn yaml(text: &str) -> String {
    const MEANING: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let bare = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "._-/".contains(letter))
        && !MEANING.contains(&text.to_ascii_lowercase().as_str());
    if bare {
        text.to_owned()
    } else {
        serde_json::Value::from(text).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::{EvalReport, StepReport};

    fn metrics() -> Vec<Metric> {
        let step = |step, loss, tokens_per_second| {
            Metric::Step(StepReport {
                step,
                loss,
                learning_rate: 2e-4,
                gradient_norm: 1.0,
                target_tokens: 1000,
                tokens_per_second,
                peak_memory_bytes: 1_500_000_000 + step,
                epoch: 0.1,
            })
        };
        let eval = |step, eval_loss| {
            Metric::Eval(EvalReport {
                step,
                eval_loss,
                eval_tokens: 10,
                accuracy: None,
                epoch: 0.1,
            })
        };
        vec![
            eval(0, 2.75),
            step(1, 2.5, 90.0),
            step(2, f64::NAN, 1840.4),
            step(3, 1.25, 1900.0),
            eval(3, 1.5),
            step(4, 1.375, 1700.0),
        ]
    }

    fn card() -> ModelCard {
        ModelCard {
            title: "my-adapter".to_owned(),
            base_model: BaseModel::Hub("Qwen/Qwen2.5-0.5B".to_owned()),
            task: Task::TextGeneration,
            method: "lora".to_owned(),
            about_method: "Each adapted layer learns a low-rank update.".to_owned(),
            trained_parameters: 540_672,
            base_parameters: 494_032_768,
            data: vec![
                DataFiles {
                    paths: vec!["/home/ada/secret project/train.jsonl".into()],
                    purpose: Purpose::Training,
                    examples: 12_000,
                    tokens: 3_400_000,
                    target_tokens: 1_200_000,
                },
                DataFiles {
                    paths: vec!["test.jsonl".into()],
                    purpose: Purpose::Evaluation,
                    examples: 500,
                    tokens: 140_000,
                    target_tokens: 50_000,
                },
            ],
            hyperparameters: [
                ("rank", "8"),
                ("targets", "q_proj|v_proj"),
                ("learning rate", "0.0002"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
            results: Results::of(&metrics()),
            duration: Duration::from_secs(754),
            device: "CPU, 16 cores".to_owned(),
            picture: Some("loss.svg".to_owned()),
            loads_with_peft: true,
            merges: true,
            versions: [("retune", "0.1.0"), ("candle", "0.11.1")]
                .map(|(name, version)| (name.to_owned(), version.to_owned()))
                .to_vec(),
        }
    }

    #[test]
    fn the_card_of_an_adapter_for_a_hub_model() {
        let text = card().to_markdown();
        assert!(!text.contains("/home") && !text.contains("secret"));
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_card_of_an_adapter_for_a_local_model() {
        let card = ModelCard {
            base_model: BaseModel::in_folder(Path::new("/home/ada/models/tiny model")),
            task: Task::TextClassification,
            method: "on".to_owned(),
            loads_with_peft: false,
            merges: false,
            picture: None,
            results: Results {
                accuracy: Some(0.912),
                ..Results::default()
            },
            ..card()
        };
        let text = card.to_markdown();
        assert!(!text.contains("/home"));
        insta::assert_snapshot!(text);
    }

    #[test]
    fn results_pass_over_what_is_not_finite() {
        let results = Results::of(&metrics());
        let training = results.training.expect("steps");
        assert_eq!(training.first, (1, 2.5));
        assert_eq!(training.last, (4, 1.375));
        assert_eq!(training.lowest, (3, 1.25));
        assert_eq!(results.tokens_per_second, Some(1840.4));
        assert_eq!(results.peak_memory_bytes, 1_500_000_004);
        assert_eq!(Results::of(&[]), Results::default());
    }

    #[test]
    fn a_cached_download_is_known_by_its_hub_id() {
        let path = "/home/ada/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db64";
        assert_eq!(
            BaseModel::in_folder(Path::new(path)),
            BaseModel::Hub("Qwen/Qwen2.5-0.5B".to_owned())
        );
    }

    #[test]
    fn yaml_is_quoted_where_it_must_be() {
        assert_eq!(yaml("last-layers"), "last-layers");
        for text in ["no", "1e3", "a: b", "#a", "say \"hi\""] {
            assert_eq!(yaml(text), serde_json::Value::from(text).to_string());
        }
    }
}
