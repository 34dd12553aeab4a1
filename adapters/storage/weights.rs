//! The trained weights, under the names they have in `adapter_model.safetensors`.

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal, Uniform};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// How a fresh weight starts. Random values depend on the seed and the weight's name alone, never on the order in
/// which weights are made, the device, or candle's generator (which cannot be seeded on the CPU).
#[derive(Debug, Clone, Copy)]
pub enum Init<'a> {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Uniform on `[-bound, bound)`.
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// Normal around zero.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
    /// These values.
    Values(&'a Tensor),
}

/// The trained tensors of one adapter, f32, in an ordered map.
#[derive(Debug)]
pub struct AdapterWeights {
    vars: BTreeMap<String, Var>,
    source: Source,
    device: Device,
}

#[derive(Debug)]
enum Source {
    Fresh {
        seed: u64,
    },
    /// Names and shapes alone.
    Planned {
        shapes: BTreeMap<String, Shape>,
    },
    Loaded {
        unused: BTreeMap<String, Tensor>,
        problems: Vec<String>,
    },
}

impl AdapterWeights {
    /// Weights of a new adapter, initialised from `seed`.
    pub fn fresh(seed: u64, device: &Device) -> Self {
        Self {
            vars: BTreeMap::new(),
            source: Source::Fresh { seed },
            device: device.clone(),
        }
    }

    /// Weights of a new adapter that is to be counted and not made: its tensors have a shape and take no memory.
    pub fn planned() -> Self {
        Self {
            vars: BTreeMap::new(),
            source: Source::Planned {
                shapes: BTreeMap::new(),
            },
            device: Device::Cpu,
        }
    }

    /// Weights taken from a file's tensors.
    pub fn loaded(tensors: BTreeMap<String, Tensor>, device: &Device) -> Self {
        Self {
            vars: BTreeMap::new(),
            source: Source::Loaded {
                unused: tensors,
                problems: Vec::new(),
            },
            device: device.clone(),
        }
    }

    /// The same; what is made from now on is on `device`.
    pub fn on(self, device: &Device) -> Self {
        Self {
            device: device.clone(),
            ..self
        }
    }

    /// The trained tensor `name`: initialised in a fresh adapter, taken from the file in a loaded one. Asking for a
    /// name again gives the same tensor, so that sites can share one.
    ///
    /// Missing and misshapen tensors of a file are collected and reported together by [`AdapterWeights::finish`].
    pub fn var(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let shape = shape.into();
        if let Some(var) = self.vars.get(name) {
            if var.shape() != &shape {
                return Err(Error::new(format!(
                    "`{name}` is asked for as {:?} and as {:?}",
                    var.dims(),
                    shape.dims()
                )));
            }
            return Ok(var.as_tensor().clone());
        }
        let start = match &mut self.source {
            Source::Fresh { seed } => initial(*seed, name, &shape, init)?,
            Source::Planned { shapes } => {
                shapes.insert(name.to_owned(), shape.clone());
                return zeros_without_memory(shape);
            }
            Source::Loaded { unused, problems } => match unused.remove(name) {
                Some(tensor) if tensor.shape() == &shape => tensor.to_dtype(DType::F32)?,
                other => {
                    problems.push(match other {
                        None => format!("`{name}` is missing"),
                        Some(tensor) => format!(
                            "`{name}` is {:?}, the model needs {:?}",
                            tensor.dims(),
                            shape.dims()
                        ),
                    });
                    // No memory is set aside for what the configuration of a stranger asks for.
                    return zeros_without_memory(shape);
                }
            },
        };
        // `Var::from_tensor` copies, so the adapter never shares memory with what it started from.
        let var = Var::from_tensor(&start.to_device(&self.device)?.contiguous()?)?;
        let tensor = var.as_tensor().clone();
        self.vars.insert(name.to_owned(), var);
        Ok(tensor)
    }

    /// The seed of a fresh adapter, 0 for one that is planned; none for a loaded one.
    pub fn seed(&self) -> Option<u64> {
        match self.source {
            Source::Fresh { seed } => Some(seed),
            Source::Planned { .. } => Some(0),
            Source::Loaded { .. } => None,
        }
    }

    /// Drops the file's copy of a base weight after making sure that it is the model's own: PEFT stores the frozen
    /// matrix beside an adapted embedding or head.
    pub fn same(&mut self, name: &str, base: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let Source::Loaded { unused, problems } = &mut self.source else {
            return Ok(());
        };
        if let Some(copy) = unused.remove(name) {
            let base = base()?.to_device(copy.device())?;
            let equal = copy.shape() == base.shape()
                && (copy.to_dtype(DType::F32)? - base)?
                    .abs()?
                    .flatten_all()?
                    .max(0)?
                    .to_scalar::<f32>()?
                    == 0.0;
            if !equal {
                problems.push(format!("`{name}` is another matrix than the model's"));
            }
        }
        Ok(())
    }

    /// Refuses tensors of the file that no site took, and sites that the file left empty: all names in one error.
    pub fn finish(mut self) -> Result<Self> {
        if let Source::Loaded { unused, problems } = &mut self.source {
            problems.extend(
                unused
                    .keys()
                    .map(|name| format!("`{name}` fits no place in the model")),
            );
            if !problems.is_empty() {
                let count = problems.len();
                let shown = problems
                    .iter()
                    .take(8)
                    .cloned()
                    .collect::<Vec<_>>()
                    .join("; ");
                let more = if count > 8 {
                    format!("; and {} more", count - 8)
                } else {
                    String::new()
                };
                return Err(Error::new(format!(
                    "the adapter does not fit the model: {shown}{more}"
                ))
                .hint("was the adapter trained on another base, or is its file incomplete?"));
            }
        }
        Ok(self)
    }

    /// Name and tensor of every trained weight, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.vars.is_empty()
    }

    /// Number of trained values, made or planned.
    pub fn parameter_count(&self) -> usize {
        let planned: usize = match &self.source {
            Source::Planned { shapes } => shapes.values().map(Shape::elem_count).sum(),
            Source::Fresh { .. } | Source::Loaded { .. } => 0,
        };
        let made: usize = self.vars.values().map(|var| var.elem_count()).sum();
        made + planned
    }

    /// The trained tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.vars.get(name)
    }
}

/// One zero that stands in every place of the shape.
fn zeros_without_memory(shape: Shape) -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
}

fn initial(seed: u64, name: &str, shape: &Shape, init: Init) -> Result<Tensor> {
    let device = &Device::Cpu;
    let count = shape.elem_count();
    let values: Vec<f32> = match init {
        Init::Zeros => return Ok(Tensor::zeros(shape, DType::F32, device)?),
        Init::Ones => return Ok(Tensor::ones(shape, DType::F32, device)?),
        Init::Values(tensor) => {
            if tensor.shape() != shape {
                return Err(Error::new(format!(
                    "`{name}` starts from {:?}, expected {:?}",
                    tensor.dims(),
                    shape.dims()
                )));
            }
            return Ok(tensor.to_dtype(DType::F32)?);
        }
        Init::Uniform { bound } => {
            let distribution = Uniform::new(-bound as f32, bound as f32).map_err(|error| {
                Error::new(format!(
                    "`{name}` cannot start uniformly within {bound}: {error}"
                ))
            })?;
            let mut generator = generator(seed, name);
            (0..count)
                .map(|_| distribution.sample(&mut generator))
                .collect()
        }
        Init::Normal { deviation } => {
            let mut generator = generator(seed, name);
            let deviation = deviation as f32;
            (0..count)
                .map(|_| {
                    let value: f32 = StandardNormal.sample(&mut generator);
                    value * deviation
                })
                .collect()
        }
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// The random stream of the thing called `name` in the run seeded by `seed`.
pub fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_depends_on_seed_and_name_alone() -> Result<()> {
        let values = |names: &[&str], wanted: &str, seed| -> Result<Vec<f32>> {
            let mut weights = AdapterWeights::fresh(seed, &Device::Cpu);
            for name in names {
                weights.var(name, (2, 3), Init::Normal { deviation: 1.0 })?;
            }
            Ok(weights
                .get(wanted)
                .expect("made above")
                .flatten_all()?
                .to_vec1()?)
        };
        assert_eq!(values(&["a", "b"], "b", 1)?, values(&["b"], "b", 1)?);
        assert_ne!(values(&["a", "b"], "b", 1)?, values(&["a", "b"], "a", 1)?);
        assert_ne!(values(&["a"], "a", 1)?, values(&["a"], "a", 2)?);
        Ok(())
    }

    #[test]
    fn what_is_planned_is_counted_and_not_made() -> Result<()> {
        let mut weights = AdapterWeights::planned();
        let shape = (1 << 20, 1 << 30);
        let tensor = weights.var("a", shape, Init::Normal { deviation: 1.0 })?;
        assert_eq!(tensor.dims(), [1 << 20, 1 << 30]);
        weights.var("a", shape, Init::Zeros)?;
        assert_eq!(weights.finish()?.parameter_count(), 1 << 50);
        Ok(())
    }

    #[test]
    fn a_file_that_does_not_fit_is_refused_with_every_name() -> Result<()> {
        let tensor = |rows| Tensor::zeros((rows, 2), DType::F32, &Device::Cpu);
        let file = BTreeMap::from([
            ("a".to_owned(), tensor(3)?),
            ("left".to_owned(), tensor(1)?),
        ]);
        let mut weights = AdapterWeights::loaded(file, &Device::Cpu);
        weights.var("a", (2, 2), Init::Zeros)?;
        weights.var("gone", (2, 2), Init::Zeros)?;
        let message = weights.finish().expect_err("nothing fits").to_string();
        for name in ["`a` is [3, 2]", "`gone` is missing", "`left` fits no place"] {
            assert!(message.contains(name), "{message}");
        }
        Ok(())
    }

    fn values(tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    fn loaded(tensors: &[(&str, &Tensor)]) -> AdapterWeights {
        let tensors = tensors
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone()));
        AdapterWeights::loaded(tensors.collect(), &Device::Cpu)
    }

    #[test]
    fn a_weight_starts_as_it_was_told_to() -> Result<()> {
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        let shape = (64, 64);
        let mut start = |name: &str, init: Init| -> Result<Vec<f32>> {
            values(&weights.var(name, shape, init)?)
        };
        assert_eq!(start("zeros", Init::Zeros)?, [0.0; 4096]);
        assert_eq!(start("ones", Init::Ones)?, [1.0; 4096]);

        let uniform = start("uniform", Init::Uniform { bound: 0.5 })?;
        assert!(uniform.iter().all(|value| (-0.5..0.5).contains(value)));
        let smallest = uniform.iter().copied().fold(0.0, f32::min);
        let largest = uniform.iter().copied().fold(0.0, f32::max);
        assert!(smallest < -0.49 && largest > 0.49, "{smallest} {largest}");

        let normal = start("normal", Init::Normal { deviation: 3.0 })?;
        let mean = normal.iter().sum::<f32>() / 4096.0;
        let squares = normal.iter().map(|value| (value - mean).powi(2));
        let deviation = (squares.sum::<f32>() / 4096.0).sqrt();
        assert!(mean.abs() < 0.2, "{mean}");
        assert!((deviation - 3.0).abs() < 0.2, "{deviation}");
        Ok(())
    }

    #[test]
    fn a_start_is_copied_as_f32_and_has_the_weights_shape() -> Result<()> {
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        let start = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
        weights.var("a", 2usize, Init::Values(&start))?;
        let var = weights.get("a").expect("made above");
        var.set(&start.zeros_like()?)?;
        assert_eq!(values(&start)?, [1.0, 2.0]);

        let double = start.to_dtype(DType::F64)?;
        let made = weights.var("b", 2usize, Init::Values(&double))?;
        assert_eq!(values(&made)?, [1.0, 2.0]);
        let error = weights
            .var("c", 3usize, Init::Values(&start))
            .expect_err("too short");
        assert_eq!(error.to_string(), "`c` starts from [2], expected [3]");
        Ok(())
    }

    #[test]
    fn sites_that_ask_for_one_name_share_one_tensor() -> Result<()> {
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        assert!(weights.is_empty());
        let first = weights.var("a", (2, 3), Init::Zeros)?;
        let second = weights.var("a", (2, 3), Init::Ones)?;
        assert_eq!(values(&first)?, values(&second)?);
        assert!(weights.var("a", (3, 2), Init::Zeros).is_err());
        weights.var("b", 4usize, Init::Zeros)?;
        assert!(!weights.is_empty());
        assert_eq!(weights.parameter_count(), 6 + 4);
        let names: Vec<&str> = weights.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(weights.get("c").is_none());
        Ok(())
    }

    #[test]
    fn only_a_new_adapter_has_a_seed() {
        assert_eq!(AdapterWeights::fresh(7, &Device::Cpu).seed(), Some(7));
        assert_eq!(AdapterWeights::planned().seed(), Some(0));
        assert_eq!(loaded(&[]).seed(), None);
    }

    #[test]
    fn a_loaded_weight_is_the_files_in_f32() -> Result<()> {
        let saved = Tensor::new(&[1f64, 2.0], &Device::Cpu)?;
        let mut weights = loaded(&[("a", &saved)]);
        let weight = weights.var("a", 2usize, Init::Zeros)?;
        assert_eq!(values(&weight)?, [1.0, 2.0]);
        assert_eq!(weights.finish()?.parameter_count(), 2);
        Ok(())
    }

    #[test]
    fn a_copy_of_a_base_weight_is_the_models_own() -> Result<()> {
        let base = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let asked = |tensors: &[(&str, &Tensor)]| -> Result<AdapterWeights> {
            let mut weights = loaded(tensors);
            weights.same("copy", || Ok(base.clone()))?;
            weights.finish()
        };
        asked(&[])?;
        asked(&[("copy", &base)])?;
        let elsewhere = Tensor::new(&[[1f32, 2.0], [3.0, 4.5]], &Device::Cpu)?;
        for other in [elsewhere, base.neg()?, base.narrow(0, 0, 1)?] {
            let error = asked(&[("copy", &other)]).expect_err("another matrix");
            assert!(error.to_string().contains("`copy` is another"), "{error}");
        }
        // What a new adapter starts beside is not even read.
        AdapterWeights::fresh(1, &Device::Cpu).same("copy", || Err(Error::new("read")))
    }

    #[test]
    fn of_many_problems_eight_are_named_and_the_others_counted() -> Result<()> {
        let fault = |count: usize| -> Result<String> {
            let mut weights = loaded(&[]);
            for index in 0..count {
                weights.var(&format!("weight {index}"), (2, 2), Init::Zeros)?;
            }
            Ok(weights.finish().expect_err("nothing is there").to_string())
        };
        let eight = fault(8)?;
        assert!(eight.ends_with("`weight 7` is missing"), "{eight}");
        let nine = fault(9)?;
        assert!(
            nine.ends_with("`weight 7` is missing; and 1 more"),
            "{nine}"
        );
        Ok(())
    }
}
