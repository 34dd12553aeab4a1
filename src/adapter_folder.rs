//! An adapter on the disk: PEFT's two files, and `retune.json` with the identity of the base it was trained on.

use crate::adapters::hooks::AdapterMethod;
use crate::adapters::method_of;
use crate::adapters::storage::{AdapterWeights, PeftFolder, WEIGHTS_FILE, read_small, write_bytes};
use crate::data::{Tokenizer, has_file};
use crate::model::{self, Model};
use crate::{Context, Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Beside PEFT's two files: which base the adapter belongs to.
pub(crate) const IDENTITY_FILE: &str = "retune.json";

/// What retune adds to PEFT's files. PEFT reads past it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    retune_version: String,
    method: String,
    base_fingerprint: String,
}

/// An adapter folder that was read, not yet joined to a base.
pub struct Adapter {
    folder: PathBuf,
    /// The method, with its options as saved.
    pub method: Box<dyn AdapterMethod>,
    /// The folder's configuration and tensors.
    pub saved: PeftFolder,
    /// Identity of the base it was trained on; PEFT's own folders have none.
    pub base_fingerprint: Option<String>,
}

/// What to do when an adapter was trained on another base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OtherBase {
    /// Refuse it.
    #[default]
    Refuse,
    /// Go on: the shapes fit, and the user knows why.
    Allow,
}

impl Adapter {
    /// Reads an adapter folder written by retune or PEFT.
    pub fn open(folder: &Path) -> Result<Self> {
        let saved = PeftFolder::load(folder)?;
        let identity_path = folder.join(IDENTITY_FILE);
        let base_fingerprint = if has_file(&identity_path)? {
            let text = read_small(&identity_path).at(identity_path.display())?;
            let identity: Identity = serde_json::from_slice(&text).at(identity_path.display())?;
            Some(identity.base_fingerprint)
        } else {
            None
        };
        Ok(Self {
            method: method_of(&saved.config, &saved.tensors)
                .context(format!("cannot use the adapter `{}`", folder.display()))?,
            folder: folder.to_owned(),
            saved,
            base_fingerprint,
        })
    }

    /// The folder it was read from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes sure that the adapter may go on the base `fingerprint`: that it was trained on it, and that its own values are
    /// numbers, for else the base would be blamed for what comes of them.
    pub fn check_base(&self, fingerprint: &str, other: OtherBase) -> Result<()> {
        match &self.base_fingerprint {
            Some(trained_on) if trained_on != fingerprint && other == OtherBase::Refuse => {
                let name = self.saved.config.base_model();
                let named = if name.is_empty() {
                    String::new()
                } else {
                    format!(" (`{name}`)")
                };
                Err(Error::new(format!("the adapter was trained on another base{named}"))
                    .at(self.folder.display())
                    .hint("give that base with `--model`, or go on all the same with `--allow-other-base`"))
            }
            _ => {
                let file = self.folder.join(WEIGHTS_FILE);
                self.saved.check_finite().at(file.display())
            }
        }
    }

    /// The saved tensors, ready to be handed out to a model.
    pub fn weights(&self) -> AdapterWeights {
        AdapterWeights::loaded(self.saved.tensors.clone(), &Device::Cpu)
    }

    /// Loads the base at `model` with this adapter in it.
    pub fn load_onto(
        &self,
        model: &Path,
        tokenizer: Option<&Tokenizer>,
        other: OtherBase,
    ) -> Result<Model> {
        let checkpoint = model::checkpoint::Checkpoint::open(model)?;
        self.check_base(&checkpoint.fingerprint()?, other)?;
        model::load(model, self.method.as_ref(), self.weights(), tokenizer).context(format!(
            "the adapter `{}` cannot be applied",
            self.folder.display()
        ))
    }
}

/// Writes the adapter of `model` into `folder`: PEFT's files, and the identity of the base called `base_name`.
pub fn save(
    folder: &Path,
    model: &Model,
    method: &dyn AdapterMethod,
    base_name: &str,
) -> Result<()> {
    std::fs::create_dir_all(folder).at(folder.display())?;
    let config = method
        .peft_config(model.decoder.shape(), &model.weights)?
        .with("base_model_name_or_path", base_name);
    let identity = Identity {
        retune_version: env!("CARGO_PKG_VERSION").to_owned(),
        method: method.name().to_owned(),
        base_fingerprint: model.fingerprint.clone(),
    };
    let json =
        serde_json::to_vec_pretty(&identity).context("cannot write the adapter's identity")?;
    write_bytes(&folder.join(IDENTITY_FILE), &json)?;
    // Last, so that no adapter is ever without its base's fingerprint.
    PeftFolder::save(folder, &config, &model.weights)
}
