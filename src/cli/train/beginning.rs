//! What the trained weights of a run start from.

use super::arguments::TrainArgs;
use crate::adapter_folder::{Adapter, OtherBase};
use crate::adapters::hooks::{AdapterMethod, MethodEntry};
use crate::adapters::storage::{AdapterWeights, WEIGHTS_FILE};
use crate::data::Tokenizer;
use crate::model::{self, Model, Placement};
use crate::train::sum_of_file;
use crate::{Context, Error, Result};
use clap::ArgMatches;
use std::path::Path;

/// What the trained weights start from.
pub(super) enum Beginning {
    /// The method's own start.
    New(Box<dyn AdapterMethod>),
    /// An adapter that was trained before.
    Adapter(Adapter),
}

impl Beginning {
    /// That of a run of `entry`'s method: an adapter that it is to start from must be of this method.
    pub(super) fn of(
        entry: &MethodEntry,
        matches: &ArgMatches,
        arguments: &TrainArgs,
    ) -> Result<Self> {
        let Some(folder) = &arguments.init_adapter else {
            return Ok(Self::New((entry.from_args)(matches)?));
        };
        let adapter = Adapter::open(folder)?;
        let method = adapter.method.name();
        if method != entry.name {
            return Err(Error::usage(format!(
                "`--init-adapter` is of method `{method}`, not `{}`",
                entry.name
            )));
        }
        Ok(Self::Adapter(adapter))
    }

    pub(super) fn method(&self) -> &dyn AdapterMethod {
        match self {
            Self::New(method) => method.as_ref(),
            Self::Adapter(adapter) => adapter.method.as_ref(),
        }
    }

    /// Digest of the adapter's weights, if it starts from one.
    pub(super) fn digest(&self) -> Result<Option<String>> {
        match self {
            Self::New(_) => Ok(None),
            Self::Adapter(adapter) => {
                let file = adapter.folder().join(WEIGHTS_FILE);
                sum_of_file(&file).at(file.display()).map(Some)
            }
        }
    }

    /// The base in `folder` with the weights in it.
    pub(super) fn load(
        &self,
        arguments: &TrainArgs,
        placement: &Placement,
        folder: &Path,
        tokenizer: &Tokenizer,
    ) -> Result<Model> {
        match self {
            Self::New(method) => {
                let weights = AdapterWeights::fresh(arguments.training.seed, &placement.device);
                let method = method.as_ref();
                model::load_on(placement, folder, method, weights, Some(tokenizer))
            }
            Self::Adapter(adapter) => {
                let other = if arguments.allow_other_base {
                    OtherBase::Allow
                } else {
                    OtherBase::Refuse
                };
                model::load_adapted(placement, folder, adapter, Some(tokenizer), other)
            }
        }
    }
}
