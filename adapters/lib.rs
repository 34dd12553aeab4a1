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
use storage::{PeftConfig, SavedTensors};

/// Every method, in the order in which help and tables list them.
pub const METHODS: [MethodEntry; 3] = [lora::ENTRY, last_layers::ENTRY, prompt::ENTRY];

/// The method of an adapter folder's configuration and tensors; refuses one that asks for what is not implemented.
pub fn method_of(config: &PeftConfig, tensors: &SavedTensors) -> Result<Box<dyn AdapterMethod>> {
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
    let method = (entry.from_peft)(&mut left, tensors)?;
    left.finish()?;
    Ok(method)
}

#[cfg(test)]
mod tests {
    use super::*;
    use last_layers::LastLayers;
    use lora::Lora;
    use prompt::Prompt;
    use serde_json::json;

    /// A method of each row, in their order.
    fn methods() -> [Box<dyn AdapterMethod>; 3] {
        [
            Box::new(Lora::default()),
            Box::new(LastLayers::default()),
            Box::new(Prompt::default()),
        ]
    }

    /// A configuration of each row, in their order.
    fn configurations() -> [PeftConfig; 3] {
        [
            PeftConfig::new("LORA")
                .with("r", 4)
                .with("target_modules", json!(["q_proj"])),
            PeftConfig::new("LORA").with("modules_to_save", json!(["model.norm"])),
            PeftConfig::new("PROMPT_TUNING").with("num_virtual_tokens", 4),
        ]
    }

    #[test]
    fn exactly_one_row_reads_each_configuration() {
        for (config, row) in configurations().iter().zip(&METHODS) {
            let readers: Vec<&str> = METHODS
                .iter()
                .filter(|entry| (entry.reads)(config))
                .map(|entry| entry.name)
                .collect();
            assert_eq!(readers, [row.name]);
        }
    }

    #[test]
    fn new_or_from_a_folder_a_method_has_its_rows_name_and_one_learning_rate() -> Result<()> {
        for ((row, new), config) in METHODS.iter().zip(methods()).zip(configurations()) {
            let read = method_of(&config, &SavedTensors::new())?;
            assert_eq!(new.name(), row.name);
            assert_eq!(read.name(), row.name);
            let rate = new.default_learning_rate();
            assert_eq!(read.default_learning_rate(), rate);
            assert!((1e-6..0.1).contains(&rate), "{}: {rate}", row.name);
        }
        Ok(())
    }

    #[test]
    fn what_no_method_implements_is_refused() {
        let refused = |config: PeftConfig| {
            method_of(&config, &SavedTensors::new())
                .map(|method| method.name())
                .expect_err("not implemented")
        };
        let error = refused(PeftConfig::new("IA3"));
        assert_eq!(
            error.to_string(),
            "adapter_config.json: adapters of type `IA3` are not implemented"
        );
        assert_eq!(
            error.hint_text(),
            Some("implemented methods: lora, last-layers, prompt")
        );
        for config in configurations() {
            let error = refused(config.with("use_dora", true)).to_string();
            assert!(error.contains("`use_dora`: true"), "{error}");
        }
    }
}
