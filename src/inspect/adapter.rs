//! An adapter's folder: its method, its tensors, and what it does to its base.

use super::checkpoint::{all_zero, broken_values};
use super::{InspectOptions, TensorFacts, Values, one_line, with_hint};
use crate::adapter_folder::{Adapter, OtherBase};
use crate::adapters::hooks::ModelShape;
use crate::adapters::storage::{CONFIG_FILE, PeftConfig, WEIGHTS_FILE, read_bytes, refuse_pickle};
use crate::merge::{check_soft_prompt, update_norms};
use crate::model::checkpoint::Checkpoint;
use crate::{Context, Error, ErrorKind, Result};
use safetensors::SafeTensors;
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is known of an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterFacts {
    /// Where it is.
    pub folder: PathBuf,
    /// The method, if it is implemented here.
    pub method: Option<String>,
    /// The kind of adapter in PEFT's words.
    pub peft_type: String,
    /// The options it was made with, under their names in `adapter_config.json`.
    pub options: Map<String, Value>,
    /// The base it was trained on, as its configuration names it.
    pub base: Option<String>,
    /// Identity of that base; only retune records it.
    pub base_fingerprint: Option<String>,
    /// Whether the base at hand is that base; `None` if there is no base at hand or no identity recorded.
    pub base_is_the_same: Option<bool>,
    /// Number of trained values.
    pub parameters: u64,
    /// Size of the file of weights.
    pub bytes: u64,
    /// The tensors by kind: all layers taken together.
    pub groups: Vec<Group>,
    /// What it does to the base by kind of module, if the base is at hand.
    pub update: Vec<UpdateSize>,
    /// Every tensor.
    pub tensors: Vec<TensorFacts>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// What is unusual but may be meant.
    pub notes: Vec<String>,
}

/// Tensors of the same name in different layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// Their name, with `*` for the number of the layer.
    pub name: String,
    /// How many there are.
    pub tensors: usize,
    /// Their values, taken together.
    pub values: Values,
}

/// How far an adapter moves the weights of one kind of module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpdateSize {
    /// The weights' name, with `*` for the number of the layer.
    pub name: String,
    /// How many weights it moves.
    pub tensors: usize,
    /// Norm of the update over norm of the weight, the mean of all layers.
    pub mean: f64,
    /// The same in the layer where it is largest.
    pub largest: f64,
}

pub(super) fn inspect(folder: &Path, options: &InspectOptions) -> Result<AdapterFacts> {
    let mut pickle = refuse_pickle(folder).err();
    if !folder.join(CONFIG_FILE).exists()
        && let Some(error) = pickle.take()
    {
        return Err(error);
    }
    let config = PeftConfig::read(folder)?;
    let mut facts = AdapterFacts {
        folder: folder.to_owned(),
        method: None,
        peft_type: config.peft_type().to_owned(),
        options: config
            .asked()
            .map(|(name, value)| (name.to_owned(), value.clone()))
            .collect(),
        base: Some(config.base_model().to_owned()).filter(|base| !base.is_empty()),
        base_fingerprint: None,
        base_is_the_same: None,
        parameters: 0,
        bytes: 0,
        groups: Vec::new(),
        update: Vec::new(),
        tensors: Vec::new(),
        problems: Vec::new(),
        notes: Vec::new(),
    };
    if let Some(error) = pickle {
        facts.problems.push(with_hint(&error));
        return Ok(facts);
    }
    if let Err(error) = facts.read_tensors() {
        facts.problems.push(one_line(&error));
        return Ok(facts);
    }
    match Adapter::open(folder) {
        Ok(adapter) => {
            facts.method = Some(adapter.method.name().to_owned());
            facts.base_fingerprint = adapter.base_fingerprint.clone();
            facts.look_at_soft_prompt(&adapter);
            facts.look_at_base(adapter, options.base);
        }
        Err(error) => facts.problems.push(one_line(&error)),
    }
    Ok(facts)
}

impl AdapterFacts {
    fn read_tensors(&mut self) -> Result<()> {
        let path = self.folder.join(WEIGHTS_FILE);
        let bytes = read_bytes(&path).at(path.display())?;
        self.bytes = bytes.len() as u64;
        let file = SafeTensors::deserialize(&bytes).at(path.display())?;
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        let mut names = file.names();
        names.sort_unstable();
        for name in names {
            let stored = file.tensor(name).at(path.display())?;
            let values = Values::of_stored(stored.data(), stored.dtype());
            let kind = kind_of(name);
            let group = groups.entry(kind.clone()).or_insert(Group {
                name: kind,
                tensors: 0,
                values: Values::default(),
            });
            group.tensors += 1;
            group.values = group.values.and(values.unwrap_or_default());
            self.parameters += stored.shape().iter().product::<usize>() as u64;
            self.tensors.push(TensorFacts {
                name: name.to_owned(),
                dtype: stored.dtype().to_string(),
                shape: stored.shape().to_vec(),
                values,
            });
        }
        if self.tensors.is_empty() {
            return Err(Error::new("there is no tensor in it").at(path.display()));
        }
        self.groups = groups.into_values().collect();
        self.problems.extend(broken_values(&self.tensors));
        self.notes.extend(all_zero(&self.tensors));
        Ok(())
    }

    /// What can be told of learned rows without a base: their number, and the width that their configuration names.
    fn look_at_soft_prompt(&mut self, adapter: &Adapter) {
        let named = adapter.saved.config.get("token_dim");
        let named = named.and_then(|width| usize::try_from(width.as_u64()?).ok());
        let stored = self.tensors.first().and_then(|tensor| tensor.shape.last());
        let shape = ModelShape {
            hidden_size: named.or(stored.copied()).unwrap_or_default(),
            ..ModelShape::default()
        };
        if let Err(error) = check_soft_prompt(adapter, &shape) {
            self.problems.push(one_line(&error));
        }
    }

    /// Measures the update, if the base is there: the one given, or the one that the adapter names.
    fn look_at_base(&mut self, adapter: Adapter, given: Option<&Path>) {
        let named = self.base.as_ref().map(PathBuf::from);
        let Some(base) = given
            .map(Path::to_owned)
            .or(named.filter(|base| base.is_dir()))
        else {
            return;
        };
        let compared = Checkpoint::open(&base)
            .and_then(|checkpoint| checkpoint.fingerprint())
            .map(|fingerprint| {
                adapter
                    .base_fingerprint
                    .as_ref()
                    .map(|own| *own == fingerprint)
            });
        match compared {
            Ok(same) => self.base_is_the_same = same,
            Err(error) => {
                self.notes.push(format!(
                    "the base `{}` cannot be read: {}",
                    base.display(),
                    one_line(&error)
                ));
                return;
            }
        }
        if self.base_is_the_same == Some(false) {
            self.notes.push(format!(
                "`{}` is not the base it was trained on",
                base.display()
            ));
        }
        match update_norms(&base, &adapter, OtherBase::Allow) {
            Ok(Some(norms)) => self.update = update_sizes(norms),
            // Learned rows before the tokens: there is no weight to compare them with.
            Ok(None) => {}
            // Values that are not finite have been named already.
            Err(error) if error.kind() == ErrorKind::NotFinite => {}
            Err(error) => {
                let problem = one_line(&error);
                // Learned rows of a wrong number have been named already.
                if !self.problems.contains(&problem) {
                    self.problems.push(problem);
                }
            }
        }
    }
}

/// `model.layers.*.self_attn.q_proj.lora_A.weight` for every layer's, without PEFT's prefix.
fn kind_of(name: &str) -> String {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let parts = name.split('.').map(|part| match part.parse::<usize>() {
        Ok(_) => "*",
        Err(_) => part,
    });
    parts.collect::<Vec<_>>().join(".")
}

fn update_sizes(norms: Vec<crate::merge::UpdateNorm>) -> Vec<UpdateSize> {
    let mut sizes: BTreeMap<String, UpdateSize> = BTreeMap::new();
    for norm in norms {
        let share = norm.update / norm.base.max(f64::MIN_POSITIVE);
        let kind = kind_of(&norm.name);
        let size = sizes.entry(kind.clone()).or_insert(UpdateSize {
            name: kind,
            tensors: 0,
            mean: 0.0,
            largest: 0.0,
        });
        size.mean = (size.mean * size.tensors as f64 + share) / (size.tensors + 1) as f64;
        size.tensors += 1;
        size.largest = size.largest.max(share);
    }
    sizes.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_taken_together() {
        assert_eq!(
            kind_of("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight"),
            "model.layers.*.self_attn.q_proj.lora_A.weight"
        );
        assert_eq!(kind_of("prompt_embeddings"), "prompt_embeddings");
    }
}
