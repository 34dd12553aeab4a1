//! A model's folder: configuration, weights, tokenizer.

use super::{FileFacts, InspectOptions, ReadWeights, TensorFacts, Values, one_line, with_hint};
use crate::Result;
use crate::adapters::storage::read_small;
use crate::data::{has_file, quoted};
use crate::model::checkpoint::Checkpoint;
use crate::model::{ModelConfig, inventory};
use safetensors::tensor::Dtype;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is known of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointFacts {
    /// Where it is.
    pub folder: PathBuf,
    /// The class in `config.json`, such as `LlamaForCausalLM`.
    pub architecture: Option<String>,
    /// Sizes, if the configuration can be used.
    pub shape: Option<Shape>,
    /// Number of values of all weights; a tied head counts once.
    pub parameters: u64,
    /// The same by kind of weight, if the configuration can be used.
    pub parameters_by_kind: BTreeMap<&'static str, u64>,
    /// The types of the weights, the most frequent first.
    pub types: Vec<TypeCount>,
    /// All files of the folder.
    pub files: Vec<FileFacts>,
    /// Whether there is a tokenizer that can be loaded.
    pub tokenizer: bool,
    /// Whether it has a chat template.
    pub chat_template: bool,
    /// Identity of the weights, as adapters record it.
    pub fingerprint: Option<String>,
    /// Every tensor.
    pub tensors: Vec<TensorFacts>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// What is unusual but may be meant.
    pub notes: Vec<String>,
}

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shape {
    /// The `model_type` of its configuration.
    pub model_type: &'static str,
    /// Number of blocks.
    pub layers: usize,
    /// Length of a hidden state.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of query heads.
    pub attention_heads: usize,
    /// Number of key/value heads.
    pub key_value_heads: usize,
    /// Length of one head.
    pub head_dim: usize,
    /// Number of tokens.
    pub vocabulary: usize,
    /// Number of positions it was made for.
    pub max_positions: usize,
    /// Whether the output head is the embedding matrix.
    pub tied_head: bool,
}

/// How much is stored in one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TypeCount {
    /// The type's name in the file, such as `BF16`.
    pub dtype: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of them.
    pub bytes: u64,
}

pub(super) fn inspect(
    folder: &Path,
    files: Vec<FileFacts>,
    options: &InspectOptions,
    on_bytes: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<CheckpointFacts> {
    let mut facts = CheckpointFacts {
        folder: folder.to_owned(),
        architecture: architecture(folder),
        shape: None,
        parameters: 0,
        parameters_by_kind: BTreeMap::new(),
        types: Vec::new(),
        files,
        tokenizer: false,
        chat_template: false,
        fingerprint: None,
        tensors: Vec::new(),
        problems: Vec::new(),
        notes: Vec::new(),
    };
    let config = match ModelConfig::read(folder) {
        Ok(config) => Some(config),
        Err(error) => {
            facts.problems.push(one_line(&error));
            None
        }
    };
    if let Some(config) = &config {
        facts.shape = Some(shape(config));
        facts.notes.extend(config.notes.iter().cloned());
    }
    facts.look_for_tokenizer(config.as_ref());
    match Checkpoint::open(folder) {
        Ok(checkpoint) => {
            facts.look_at_weights(&checkpoint, config.as_ref(), options.weights, on_bytes)?
        }
        Err(error) => facts.problems.push(with_hint(&error)),
    }
    Ok(facts)
}

impl CheckpointFacts {
    fn look_for_tokenizer(&mut self, config: Option<&ModelConfig>) {
        // What stands in its place and is no file is refused when it is loaded.
        if let Ok(false) = has_file(&self.folder.join("tokenizer.json")) {
            self.notes
                .push("there is no `tokenizer.json`: text cannot be turned into tokens".to_owned());
            return;
        }
        match crate::data::Tokenizer::load(&self.folder) {
            Ok(tokenizer) => {
                self.tokenizer = true;
                self.chat_template = tokenizer.has_chat_template();
                let size = tokenizer.vocabulary_size();
                if let Some(config) = config
                    && size > config.vocabulary
                {
                    self.problems.push(format!(
                        "the tokenizer has {size} tokens, the model only {}",
                        config.vocabulary
                    ));
                }
            }
            Err(error) => self.problems.push(one_line(&error)),
        }
    }

    fn look_at_weights(
        &mut self,
        checkpoint: &Checkpoint,
        config: Option<&ModelConfig>,
        read: ReadWeights,
        on_bytes: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut types: BTreeMap<String, TypeCount> = BTreeMap::new();
        let mut total = 0;
        for name in checkpoint.names() {
            let stored = checkpoint.stored(name)?;
            let (dtype, bytes) = (stored.dtype().to_string(), stored.data().len() as u64);
            let count = types.entry(dtype.clone()).or_insert(TypeCount {
                dtype,
                tensors: 0,
                bytes: 0,
            });
            count.tensors += 1;
            count.bytes += bytes;
            total += bytes;
        }
        let mut done = 0;
        for name in checkpoint.names() {
            on_bytes(done, total)?;
            let stored = checkpoint.stored(name)?;
            let values = match read {
                ReadWeights::All => Values::of_stored(stored.data(), stored.dtype()),
                ReadWeights::Headers => None,
            };
            done += stored.data().len() as u64;
            self.parameters += stored.shape().iter().product::<usize>() as u64;
            self.tensors.push(TensorFacts {
                name: name.to_owned(),
                dtype: stored.dtype().to_string(),
                shape: stored.shape().to_vec(),
                values,
            });
        }
        self.types = types.into_values().collect();
        self.types
            .sort_by_key(|count| std::cmp::Reverse(count.bytes));
        self.problems.extend(broken_values(&self.tensors));
        self.notes.extend(all_zero(&self.tensors));
        if let Some(config) = config {
            self.compare(checkpoint, config);
        }
        self.fingerprint = Some(checkpoint.fingerprint()?);
        Ok(())
    }

    /// Whether the weights are those that the configuration asks for.
    fn compare(&mut self, checkpoint: &Checkpoint, config: &ModelConfig) {
        let head = format!("{}.weight", config.shape().head_path);
        let mut missing = Vec::new();
        let mut unusable: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for parameter in inventory(config) {
            *self
                .parameters_by_kind
                .entry(parameter.kind.name())
                .or_default() += parameter.count() as u64;
            let is_shared = config.tied_head && parameter.name.ends_with("embed_tokens.weight");
            let name = match is_shared && !checkpoint.contains(&parameter.name) {
                true => &head,
                false => &parameter.name,
            };
            if let Ok(stored) = checkpoint.stored(name)
                && !is_usable(stored.dtype(), parameter.shape.len())
            {
                let names = unusable.entry(stored.dtype().to_string()).or_default();
                names.push(quoted(name));
            }
            match checkpoint.shape(name) {
                None => missing.push(format!("`{}`", parameter.name)),
                Some(stored) if stored != parameter.shape => self.problems.push(format!(
                    "`{}` is {stored:?}, `config.json` asks for {:?}",
                    parameter.name, parameter.shape
                )),
                Some(_) => {}
            }
        }
        if !missing.is_empty() {
            self.problems
                .push(format!("missing: {}", shortened(&missing)));
        }
        for (dtype, names) in &unusable {
            self.problems.push(format!(
                "stored as {dtype}, which cannot be used: {}; take a version of the checkpoint in BF16, F16 or F32",
                shortened(names)
            ));
        }
        self.notes.extend(unused_weights(checkpoint, config));
        // What is stored twice counts once.
        self.parameters = self.parameters_by_kind.values().sum();
    }
}

/// A line that names the weights of `checkpoint` that a model of this configuration does not read.
pub fn unused_weights(checkpoint: &Checkpoint, config: &ModelConfig) -> Option<String> {
    let unused = inventory::unused(config, checkpoint);
    let count = match unused.len() {
        0 => return None,
        1 => "1 weight is".to_owned(),
        count => format!("{count} weights are"),
    };
    let names: Vec<String> = unused.into_iter().map(quoted).collect();
    Some(format!(
        "{count} not part of the model: {}",
        shortened(&names)
    ))
}

/// Whether a model can be loaded with a weight of this type. Matrices stay as they are stored, vectors are widened.
fn is_usable(dtype: Dtype, dimensions: usize) -> bool {
    match dtype {
        Dtype::BF16 | Dtype::F16 | Dtype::F32 => true,
        Dtype::F64 => dimensions == 1,
        _ => false,
    }
}

/// A line for each tensor with values that are not finite.
pub(super) fn broken_values(tensors: &[TensorFacts]) -> Vec<String> {
    tensors
        .iter()
        .filter_map(|tensor| broken(&tensor.name, &tensor.values?))
        .collect()
}

fn broken(name: &str, values: &Values) -> Option<String> {
    values.broken().then(|| {
        format!(
            "{} holds {} NaN and {} infinite of {} values",
            quoted(name),
            values.nan,
            values.infinite,
            values.count
        )
    })
}

/// A line for each tensor of the checkpoint in `folder` with values that are not finite. Reads all of it.
pub fn broken_weights(folder: &Path) -> Result<Vec<String>> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut lines = Vec::new();
    for name in checkpoint.names() {
        let stored = checkpoint.stored(name)?;
        let values = Values::of_stored(stored.data(), stored.dtype());
        lines.extend(values.and_then(|values| broken(name, &values)));
    }
    Ok(lines)
}

/// A line that names the tensors that are zero throughout; biases often are.
pub(super) fn all_zero(tensors: &[TensorFacts]) -> Option<String> {
    let zero: Vec<String> = tensors
        .iter()
        .filter(|tensor| tensor.values.is_some_and(|values| values.all_zero()))
        .map(|tensor| quoted(&tensor.name))
        .collect();
    (!zero.is_empty()).then(|| format!("zero throughout: {}", shortened(&zero)))
}

/// Up to six names.
fn shortened(names: &[String]) -> String {
    let shown = names[..names.len().min(6)].join(", ");
    match names.len() {
        0..=6 => shown,
        count => format!("{shown} and {} more", count - 6),
    }
}

fn architecture(folder: &Path) -> Option<String> {
    let text = read_small(&folder.join("config.json")).ok()?;
    let fields: Value = serde_json::from_slice(&text).ok()?;
    let named = fields["architectures"][0].as_str();
    named.or(fields["model_type"].as_str()).map(str::to_owned)
}

fn shape(config: &ModelConfig) -> Shape {
    Shape {
        model_type: config.model_type.name(),
        layers: config.layers,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        attention_heads: config.attention_heads,
        key_value_heads: config.key_value_heads,
        head_dim: config.head_dim,
        vocabulary: config.vocabulary,
        max_positions: config.max_positions,
        tied_head: config.tied_head,
    }
}
