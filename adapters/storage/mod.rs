//! How adapters are kept: the trained weights in memory, and the folder that PEFT reads and writes.

mod atomic;
mod peft_config;
mod peft_folder;
mod read;
mod weights;

pub use atomic::{sync_folder, write_bytes, write_file};
pub use peft_config::{CONFIG_FILE, PeftConfig};
pub use peft_folder::{
    PICKLE_FILE, PeftFolder, SavedTensors, WEIGHTS_FILE, read_adapter_tensors, refuse_pickle,
};
pub use read::{read_bytes, read_small, read_text};
pub use weights::{AdapterWeights, Init, generator};
