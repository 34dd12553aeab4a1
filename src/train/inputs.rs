//! What a run is made from, by which it is known when it goes on: equal digests are equal inputs.

use super::options::{RecordedOptions, TrainOptions};
use crate::adapters::hooks::AdapterMethod;
use crate::data::{Dataset, Order};
use crate::digest::hexadecimal;
use crate::model::{Model, ModelConfig};
use crate::ops::ComputeType;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a run must find unchanged to be resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// Digest of the base: a sample of its weights, and its configuration.
    pub base: String,
    /// Digest of every byte of its weights; runs that do not say it were begun before it was asked for.
    pub weights: Option<String>,
    /// The training options that move bits; runs that do not say them were begun before they were asked for.
    pub training: Option<RecordedOptions>,
    /// Digest of the method and its options.
    pub method: String,
    /// Digest of the adapter that it starts from, if it does from one; runs that do not say it may have been begun before
    /// it was asked for.
    pub start: Option<String>,
    /// Digest of the training data.
    pub data: String,
    /// Digest of the held-out data, if there is any.
    pub held_out: Option<String>,
    /// Digest of the order of the examples, if it was given.
    pub order: Option<String>,
    /// The kind of device: `cpu` or `cuda`. Runs that do not say it were on the CPU.
    #[serde(default = "on_cpu")]
    pub device: String,
    /// The type of the products with frozen weights. In runs that do not say it, it was f32.
    #[serde(default = "in_f32")]
    pub compute_type: String,
    /// What the frozen weights of the blocks are quantised to, if they are.
    pub quantization: Option<String>,
    /// What computes ([`Placement::machine`]). A run goes on elsewhere too, and says so ([`Inputs::moved`]): its last bits
    /// are then not those of a run that stayed.
    ///
    /// [`Placement::machine`]: crate::model::Placement::machine
    pub machine: Option<String>,
}

/// A run that goes on elsewhere than it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Where it was, as [`Placement::machine`] names it.
    ///
    /// [`Placement::machine`]: crate::model::Placement::machine
    pub from: String,
    /// Where it is now.
    pub to: String,
}

impl Moved {
    /// What was and what is, if both are known and not the same.
    pub(crate) fn between(from: &Option<String>, to: &Option<String>) -> Option<Self> {
        let (from, to) = (from.clone()?, to.clone()?);
        (from != to).then_some(Self { from, to })
    }
}

impl std::fmt::Display for Moved {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "the run was computed by {}, and goes on by {}: its last bits may differ from those of an undisturbed one",
            self.from, self.to
        )
    }
}

fn on_cpu() -> String {
    "cpu".to_owned()
}

fn in_f32() -> String {
    ComputeType::F32.name().to_owned()
}

impl Inputs {
    /// What a run of `method` on `model`, whose base has these `weights` (the SHA-256 of [`Checkpoint::digest`]), must find
    /// unchanged.
    ///
    /// [`Checkpoint::digest`]: crate::model::checkpoint::Checkpoint::digest
    pub fn of(
        model: &Model,
        weights: &str,
        method: &dyn AdapterMethod,
        options: &TrainOptions,
        data: &Dataset,
        held_out: Option<&Dataset>,
        order: &Order,
    ) -> Result<Self> {
        let method = method.peft_config(model.decoder.shape(), &model.weights)?;
        let placement = model.decoder.placement();
        Ok(Self {
            base: base_digest(&model.fingerprint, &model.config),
            weights: Some(weights.to_owned()),
            training: Some(RecordedOptions::of(options)?),
            method: hexadecimal(&Sha256::digest(method.to_json()?)),
            start: None,
            data: data.digest(),
            held_out: held_out.map(Dataset::digest),
            order: order.digest(),
            device: placement.device_kind().to_owned(),
            compute_type: placement.compute.name().to_owned(),
            quantization: placement
                .quantization
                .map(|quantization| quantization.name().to_owned()),
            machine: Some(placement.machine()),
        })
    }

    /// Whether a run that was saved on these goes on elsewhere with those `found`.
    pub(super) fn moved(&self, found: &Self) -> Option<Moved> {
        Moved::between(&self.machine, &found.machine)
    }

    /// Fails by the first of them that `found` has otherwise.
    pub(super) fn refuse_others(&self, found: &Self) -> Result<()> {
        let option = changed_option(self.training.as_ref(), found.training.as_ref());
        let pairs = [
            // First: with another seed, other data may be held out.
            (
                option.as_deref().unwrap_or("an option has"),
                option.is_none(),
            ),
            ("the base has", self.base == found.base),
            (
                "the base has",
                unchanged(self.weights.as_ref(), found.weights.as_ref()),
            ),
            ("the method's options have", self.method == found.method),
            (
                "the adapter that it starts from has",
                unchanged(self.start.as_ref(), found.start.as_ref()),
            ),
            ("the training data has", self.data == found.data),
            ("the held-out data has", self.held_out == found.held_out),
            ("the order of the examples has", self.order == found.order),
            ("the kind of device has", self.device == found.device),
            (
                "the compute type has",
                self.compute_type == found.compute_type,
            ),
            (
                "the quantisation of the base has",
                self.quantization == found.quantization,
            ),
        ];
        refuse_changed(
            &pairs,
            "the run",
            "put back what it was, or start another run; `--init-adapter` can start from this one's weights",
        )
    }
}

/// Whether what was `saved` is what was `found`, if it was saved at all: what was begun by an earlier version goes on.
pub(crate) fn unchanged<T: PartialEq>(saved: Option<&T>, found: Option<&T>) -> bool {
    saved.is_none() || saved == found
}

/// The first training option that was saved and is another one now, as [`refuse_changed`] names it.
pub(crate) fn changed_option(
    saved: Option<&RecordedOptions>,
    found: Option<&RecordedOptions>,
) -> Option<String> {
    Some(format!("{} has", saved?.changed(found?)?))
}

/// Digest of a base by a sample of its weights: equal weights under another configuration are another base.
pub(crate) fn base_digest(fingerprint: &str, config: &ModelConfig) -> String {
    hexadecimal(&Sha256::digest(format!("{fingerprint} {config:?}")))
}

/// Fails by the first of these that is not the same any more.
pub(crate) fn refuse_changed(same: &[(&str, bool)], work: &str, hint: &str) -> Result<()> {
    match same.iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((what, _)) => {
            Err(Error::new(format!("{what} changed since {work} was interrupted")).hint(hint))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn inputs(options: &TrainOptions) -> Result<Inputs> {
        Ok(Inputs {
            base: "base".to_owned(),
            weights: Some("weights".to_owned()),
            training: Some(RecordedOptions::of(options)?),
            method: "method".to_owned(),
            start: Some("start".to_owned()),
            data: "data".to_owned(),
            held_out: None,
            order: None,
            device: on_cpu(),
            compute_type: in_f32(),
            quantization: None,
            machine: Some("retune 0.1.0 on a processor".to_owned()),
        })
    }

    #[test]
    fn a_run_that_goes_on_elsewhere_says_so() -> Result<()> {
        let begun = inputs(&TrainOptions::default())?;
        let elsewhere = Inputs {
            machine: Some("retune 0.1.0 on another".to_owned()),
            ..begun.clone()
        };
        let unknown = Inputs {
            machine: None,
            ..begun.clone()
        };
        begun.refuse_others(&elsewhere)?;
        let said = begun.moved(&elsewhere).expect("it moved").to_string();
        assert!(
            said.starts_with(
                "the run was computed by retune 0.1.0 on a processor, and goes on by retune 0.1.0 on another"
            ),
            "{said}"
        );
        assert_eq!(begun.moved(&begun), None);
        assert_eq!(unknown.moved(&begun), None);
        Ok(())
    }

    #[test]
    fn a_run_goes_on_with_its_options_and_on_every_byte_of_its_base() -> Result<()> {
        let begun = inputs(&TrainOptions::default())?;
        begun.refuse_others(&begun)?;
        let said = |found: &Inputs| {
            let error = begun.refuse_others(found).expect_err("another run");
            assert!(error.hint_text().is_some());
            error.to_string()
        };
        let other = TrainOptions {
            seed: 7,
            ..TrainOptions::default()
        };
        // Another seed may hold other data out: the cause is named, not what came of it.
        let reseeded = Inputs {
            data: "other".to_owned(),
            ..inputs(&other)?
        };
        assert_eq!(
            said(&reseeded),
            "`seed`, 0 before and 7 now, has changed since the run was interrupted"
        );
        let rebased = Inputs {
            weights: Some("other".to_owned()),
            ..begun.clone()
        };
        assert_eq!(
            said(&rebased),
            "the base has changed since the run was interrupted"
        );
        Ok(())
    }

    #[test]
    fn a_run_that_was_begun_before_they_were_recorded_goes_on() -> Result<()> {
        let now = inputs(&TrainOptions::default())?;
        let text = serde_json::to_string(&now).expect("written");
        let mut earlier: serde_json::Value = serde_json::from_str(&text).expect("read");
        for name in [
            "weights",
            "training",
            "device",
            "compute_type",
            "quantization",
            "machine",
        ] {
            let fields = earlier.as_object_mut().expect("fields");
            assert!(fields.remove(name).is_some(), "{name}");
        }
        let earlier: Inputs = serde_json::from_value(earlier).expect("a run from before");
        assert_eq!((on_cpu().as_str(), in_f32().as_str()), ("cpu", "f32"));
        earlier.refuse_others(&now)
    }

    #[test]
    fn whatever_has_changed_is_named() -> Result<()> {
        let begun = inputs(&TrainOptions::default())?;
        type Change = fn(&mut Inputs);
        let changes: [(&str, Change); 9] = [
            ("the base has", |found| found.base.clear()),
            ("the base has", |found| found.weights = Some(String::new())),
            ("the method's options have", |found| found.method.clear()),
            ("the training data has", |found| found.data.clear()),
            ("the held-out data has", |found| {
                found.held_out = Some("other".to_owned());
            }),
            ("the order of the examples has", |found| {
                found.order = Some("other".to_owned());
            }),
            ("the kind of device has", |found| found.device.clear()),
            ("the compute type has", |found| found.compute_type.clear()),
            ("the quantisation of the base has", |found| {
                found.quantization = Some("nf4".to_owned());
            }),
        ];
        for (what, change) in changes {
            let mut found = begun.clone();
            change(&mut found);
            let error = begun.refuse_others(&found).expect_err(what);
            let fact = format!("{what} changed since the run was interrupted");
            assert_eq!(error.to_string(), fact);
            assert!(error.hint_text().is_some());
        }
        Ok(())
    }

    #[test]
    fn equal_weights_under_another_configuration_are_another_base() -> Result<()> {
        let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama");
        let config = ModelConfig::read(&llama)?;
        let other = ModelConfig {
            rms_norm_epsilon: 2.0 * config.rms_norm_epsilon,
            ..config.clone()
        };
        let digest = base_digest("weights", &config);
        assert_eq!(digest, base_digest("weights", &config));
        assert_ne!(digest, base_digest("weights", &other));
        assert_ne!(digest, base_digest("others", &config));
        Ok(())
    }
}
