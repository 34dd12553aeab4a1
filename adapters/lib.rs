//! Adapter methods: open the folder, see the methods.
//!
//! # Adding a method
//!
//! 1. Make `adapters/<method>.rs`; open it with the paper and the formula.
//! 2. Declare its options as a struct that derives `clap::Args` behind the `cli` feature: the only declaration of them.
//! 3. Implement [`hooks::AdapterMethod`]: answer at the sites where it acts, leave the other hooks alone.
//! 4. Take trained tensors from [`storage::AdapterWeights::var`], under the names that PEFT gives them.
//! 5. Say in `peft_config` what `adapter_config.json` holds, and read it back in `from_peft`.
//! 6. Give it a default learning rate that works, and an `ENTRY`.
//! 7. Add the row to [`METHODS`]: the command line, `compare`, `merge` and the laws in `tests/method_laws.rs` pick it up.
//!
//! A method never names a model or a task, and this crate never depends on `retune`.

#![forbid(unsafe_code)]

mod error;
pub mod hooks;
pub mod last_layers;
pub mod lora;
pub mod prompt;
pub mod storage;

pub use error::{Context, Error, ErrorKind, IntoError, Result, json_fault};
use hooks::{AdapterMethod, MethodEntry};
use storage::PeftConfig;

/// Every method, in the order in which help and tables list them.
pub const METHODS: [MethodEntry; 3] = [lora::ENTRY, last_layers::ENTRY, prompt::ENTRY];

/// The method of an adapter folder's configuration; refuses one that asks for what is not implemented.
pub fn method_of(config: &PeftConfig) -> Result<Box<dyn AdapterMethod>> {
    let entry = METHODS
        .iter()
        .find(|entry| (entry.reads)(config))
        .ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|entry| entry.name).collect();
            Error::new(format!(
                "adapters of type `{}` are not implemented",
                config.peft_type()
            ))
            .at("adapter_config.json")
            .hint(format!("implemented methods: {}", names.join(", ")))
        })?;
    let mut left = config.clone();
    let method = (entry.from_peft)(&mut left)?;
    left.finish()?;
    Ok(method)
}
