//! `--model`: a folder, or a hub id that is downloaded with a progress bar.

use super::note;
use super::progress::{Progress, Show};
use crate::Result;
use crate::model::hub::{self, HubOptions, ModelSource, PlannedFile};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The folder of `model`, downloaded into the hub's cache first if need be.
pub(super) fn resolve(model: &str, show: Show) -> Result<PathBuf> {
    let source = ModelSource::parse(model)?;
    let ModelSource::Hub(_) = &source else {
        return source.folder(&HubOptions::new(""), &mut Download::new(show));
    };
    let options = HubOptions::from_variables(|name| std::env::var(name).ok())?;
    let mut download = Download::new(show);
    let folder = source.folder(&options, &mut download)?;
    if let Some(bar) = download.bar {
        bar.finish();
    }
    Ok(folder)
}

/// One bar over the bytes of all files.
struct Download {
    show: Show,
    bar: Option<Progress>,
    present: BTreeMap<String, u64>,
}

impl Download {
    fn new(show: Show) -> Self {
        Self {
            show,
            bar: None,
            present: BTreeMap::new(),
        }
    }
}

impl hub::Progress for Download {
    fn begin(&mut self, files: &[PlannedFile]) {
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        note(self.show, &format!("downloading {}", names.join(", ")));
        let total = files.iter().filter_map(|file| file.size).sum();
        self.bar = Some(Progress::bytes(self.show, "download", total));
    }

    fn advance(&mut self, file: &str, present: u64) {
        self.present.insert(file.to_owned(), present);
        if let Some(bar) = &self.bar {
            bar.set(self.present.values().sum());
        }
    }
}
