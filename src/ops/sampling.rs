//! Which token comes next: what transformers' logits processors do, in their order.
//!
//! Repetition penalty → temperature → top-k → top-p → min-p, then one draw. Each filter means what it means in
//! `transformers/generation/logits_process.py` (5.23). Where that leaves open which of two equal tokens goes, the
//! smaller one stays. On a GPU the kernels of `sampling.cu` do the same where the scores are.

#[cfg(feature = "cuda")]
use super::cuda;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cmp::Ordering;

/// How to choose among the tokens that a model holds for possible.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Scores are divided by it: below 1 the likely become likelier. At 0 the likeliest token is taken, and of
    /// everything else here only the repetition penalty counts.
    pub temperature: f64,
    /// Only so many of the likeliest tokens remain, and those as likely as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability remain; 1 keeps all.
    pub top_p: f64,
    /// Only tokens at least this likely remain, relative to the likeliest; 0 keeps all.
    pub min_p: f64,
    /// Scores of tokens that stand in the prompt or were generated are divided by it if positive, and multiplied by it
    /// if negative; 1 changes nothing.
    pub repetition_penalty: f64,
    /// Where the draws start.
    pub seed: u64,
}

impl Default for Sampling {
    /// The likeliest token always. The 50 likeliest are kept when a temperature is set, as in transformers.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 50,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Refuses what has no meaning.
    pub fn validated(self) -> Result<Self> {
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                return Ok(());
            }
            Err(Error::usage(format!(
                "{name} must be from 0 to 1, not {value}"
            )))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::usage(format!(
                "a temperature must be 0 or more, not {}",
                self.temperature
            ))
            .hint("0 takes the likeliest token always, 1 samples as the model was trained"));
        }
        share("top-p", self.top_p)?;
        share("min-p", self.min_p)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(Error::usage(format!(
                "a repetition penalty must be more than 0, not {}",
                self.repetition_penalty
            ))
            .hint("1 changes nothing, 1.1 is a usual value"));
        }
        Ok(self)
    }
}

/// Draws the tokens of one text.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    chooser: Chooser,
}

enum Chooser {
    Cpu(CpuChooser),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Chooser>),
}

impl Sampler {
    /// A sampler for a text that begins with `prompt`, of a model that gives such `logits`: (vocabulary).
    pub(crate) fn new(sampling: Sampling, logits: &Tensor, prompt: &[u32]) -> Result<Self> {
        let vocabulary = logits.dims1()?;
        let chooser = match logits.device().is_cuda() {
            #[cfg(feature = "cuda")]
            true => Chooser::Cuda(Box::new(cuda::Chooser::new(
                sampling,
                logits.device(),
                vocabulary,
                prompt,
            )?)),
            _ => Chooser::Cpu(CpuChooser::new(sampling, vocabulary, prompt)),
        };
        Ok(Self {
            sampling,
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
            chooser,
        })
    }

    /// The token that follows, given the score of each: (vocabulary). Fails if the highest is no finite number.
    pub(crate) fn next(&mut self, logits: &Tensor) -> Result<u32> {
        let random = match self.sampling.temperature > 0.0 {
            true => self.random.next_u64(),
            false => 0,
        };
        match &mut self.chooser {
            Chooser::Cpu(chooser) => {
                let mut scores = logits.to_dtype(DType::F32)?.to_vec1()?;
                chooser.next(&mut scores, random)
            }
            #[cfg(feature = "cuda")]
            Chooser::Cuda(chooser) => chooser.next(logits, random),
        }
    }
}

/// Chooses tokens on the CPU.
struct CpuChooser {
    sampling: Sampling,
    /// Whether a token stands in the text: (vocabulary), empty where no penalty asks for it.
    stands: Vec<bool>,
    /// The tokens that do, each once.
    distinct: Vec<u32>,
    /// Kept between draws to save allocations.
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: u32,
    score: f32,
}

impl CpuChooser {
    fn new(sampling: Sampling, vocabulary: usize, prompt: &[u32]) -> Self {
        let penalises = sampling.repetition_penalty != 1.0;
        let mut chooser = Self {
            sampling,
            stands: vec![false; if penalises { vocabulary } else { 0 }],
            distinct: Vec::new(),
            candidates: Vec::new(),
        };
        prompt.iter().for_each(|token| chooser.note(*token));
        chooser
    }

    /// The token that follows, given the score of each. What is drawn is for the 53 highest bits of `random` to say.
    fn next(&mut self, logits: &mut [f32], random: u64) -> Result<u32> {
        self.penalise(logits);
        let (likeliest, highest) = maximum(logits)?;
        let token = if self.sampling.temperature == 0.0 {
            likeliest
        } else {
            self.draw(logits, likeliest, highest, uniform(random))
        };
        self.note(token);
        Ok(token)
    }

    fn note(&mut self, token: u32) {
        if let Some(stands) = self.stands.get_mut(token as usize)
            && !std::mem::replace(stands, true)
        {
            self.distinct.push(token);
        }
    }

    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.sampling.repetition_penalty as f32;
        for token in &self.distinct {
            if let Some(score) = logits.get_mut(*token as usize) {
                *score = if *score < 0.0 {
                    *score * penalty
                } else {
                    *score / penalty
                };
            }
        }
    }

    fn draw(&mut self, logits: &[f32], likeliest: u32, highest: f32, at: f64) -> u32 {
        let highest = self.filter(logits, highest);
        if !highest.is_finite() {
            // So cold that the scores overflow.
            return likeliest;
        }
        // The filters may have changed the order; a draw must not depend on which of them ran.
        self.candidates
            .sort_unstable_by_key(|candidate| candidate.token);
        choose(&self.candidates, highest, at)
    }

    /// Leaves the tokens that may be drawn as candidates. Returns the highest of their scores.
    fn filter(&mut self, logits: &[f32], highest: f32) -> f32 {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let temperature = temperature as f32;
        let highest = highest / temperature;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            (0..)
                .zip(logits)
                .filter(|(_, score)| **score > f32::NEG_INFINITY)
                .map(|(token, score)| Candidate {
                    token,
                    score: score / temperature,
                }),
        );
        keep_top_k(candidates, top_k);
        keep_top_p(candidates, top_p, highest);
        // Probabilities relative to the likeliest's: the sum cancels out.
        candidates.retain(|candidate| f64::from((candidate.score - highest).exp()) >= min_p);
        highest
    }
}

/// The token with the highest score, the first of equals, and that score.
fn maximum(logits: &[f32]) -> Result<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &score) in (0..).zip(logits) {
        if score > best.1 {
            best = (token, score);
        } else if score.is_nan() {
            best.1 = f32::NAN;
            break;
        }
    }
    if best.1.is_finite() {
        return Ok(best);
    }
    Err(not_finite())
}

pub(super) fn not_finite() -> Error {
    Error::new("the model's scores for the next token are not finite").hint(
        "the weights of the model or of the adapter may be damaged: compare with `retune inspect`",
    )
}

/// Keeps the `count` highest, and those equal to the last of them.
fn keep_top_k(candidates: &mut Vec<Candidate>, count: usize) {
    if count == 0 || count >= candidates.len() {
        return;
    }
    let (_, last, _) = candidates
        .select_nth_unstable_by(count - 1, |left, right| right.score.total_cmp(&left.score));
    let threshold = last.score;
    candidates.retain(|candidate| candidate.score >= threshold);
}

/// Drops the least likely as long as what is dropped sums to `1 - share` or less. One always remains.
fn keep_top_p(candidates: &mut Vec<Candidate>, share: f64, highest: f32) {
    if share >= 1.0 {
        return;
    }
    let weight = |candidate: &Candidate| f64::from((candidate.score - highest).exp());
    let total: f64 = candidates.iter().map(weight).sum();
    let droppable = (1.0 - share) * total;
    // All that are lighter than an equal part of the droppable can go at once, and need not be sorted.
    let light = droppable / candidates.len() as f64;
    let mut dropped = 0.0;
    candidates.retain(|candidate| {
        let keep = weight(candidate) > light;
        if !keep && candidate.score < highest {
            dropped += weight(candidate);
        }
        keep || candidate.score == highest
    });
    // The likeliest comes last; among equals that is the smallest token.
    candidates.sort_unstable_by(|left, right| {
        let by_score = left.score.partial_cmp(&right.score);
        let by_score = by_score.unwrap_or(Ordering::Equal);
        by_score.then(right.token.cmp(&left.token))
    });
    let first_kept = candidates
        .iter()
        .position(|candidate| {
            dropped += weight(candidate);
            dropped > droppable
        })
        .unwrap_or(candidates.len());
    candidates.drain(..first_kept.min(candidates.len().saturating_sub(1)));
}

/// The candidate in whose part of the summed probability the draw `at` (0 to below 1) falls.
fn choose(candidates: &[Candidate], highest: f32, at: f64) -> u32 {
    let weight = |candidate: &Candidate| f64::from((candidate.score - highest).exp());
    let total: f64 = candidates.iter().map(weight).sum();
    let mut left = at * total;
    let mut last = 0;
    for candidate in candidates {
        let weight = weight(candidate);
        if weight == 0.0 {
            continue;
        }
        last = candidate.token;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

/// A number from 0 to below 1, of 53 random bits.
fn uniform(random: u64) -> f64 {
    (random >> 11) as f64 * (0.5f64).powi(53)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use serde::Deserialize;
    use std::collections::BTreeSet;

    #[derive(Deserialize)]
    struct Reference {
        filters: Vec<Filtered>,
    }

    #[derive(Deserialize)]
    struct Filtered {
        setting: Setting,
        text: Vec<u32>,
        scores: Vec<f32>,
        probabilities: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Setting {
        temperature: Option<f64>,
        top_k: Option<usize>,
        top_p: Option<f64>,
        min_p: Option<f64>,
        repetition_penalty: Option<f64>,
    }

    impl Setting {
        fn sampling(&self, seed: u64) -> Sampling {
            Sampling {
                temperature: self.temperature.unwrap_or(1.0),
                top_k: self.top_k.unwrap_or(0),
                top_p: self.top_p.unwrap_or(1.0),
                min_p: self.min_p.unwrap_or(0.0),
                repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
                seed,
            }
        }
    }

    /// What the filters leave, made with transformers' own (`tests/golden/generation_reference.py`).
    #[test]
    fn filters_leave_what_those_of_transformers_leave() -> Result<()> {
        let file = include_str!("../../tests/golden/generation.json");
        let reference: Reference =
            serde_json::from_str(file).expect("a fixture of this repository");
        assert!(reference.filters.len() > 20);
        for (number, case) in reference.filters.iter().enumerate() {
            let sampling = case.setting.sampling(0);
            let mut chooser = CpuChooser::new(sampling, case.scores.len(), &case.text);
            let mut scores = case.scores.clone();
            chooser.penalise(&mut scores);
            let (_, highest) = maximum(&scores)?;
            let highest = chooser.filter(&scores, highest);
            let weight = |candidate: &Candidate| f64::from((candidate.score - highest).exp());
            let total: f64 = chooser.candidates.iter().map(weight).sum();
            let mut probabilities = vec![0.0; scores.len()];
            for candidate in &chooser.candidates {
                probabilities[candidate.token as usize] = weight(candidate) / total;
            }
            let mut expected = case.probabilities.clone();
            let distinct: BTreeSet<u32> = case.scores.iter().map(|score| score.to_bits()).collect();
            if distinct.len() < case.scores.len() {
                // Which of the equal ones remain is for torch's sort to say.
                probabilities.sort_unstable_by(f64::total_cmp);
                expected.sort_unstable_by(f64::total_cmp);
            }
            for (token, (ours, theirs)) in probabilities.iter().zip(&expected).enumerate() {
                assert!(
                    (ours - theirs).abs() < 1e-5,
                    "case {number}, token {token}: {ours} for {theirs}"
                );
            }
        }
        Ok(())
    }

    fn scores(values: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(values, &Device::Cpu)?)
    }

    /// The first token of a text.
    fn token(sampling: Sampling, values: &[f32]) -> Result<u32> {
        let logits = scores(values)?;
        Sampler::new(sampling, &logits, &[])?.next(&logits)
    }

    #[test]
    fn the_smallest_of_equals_stays() {
        let sampling = Sampling {
            temperature: 1.0,
            top_p: 0.5,
            ..Sampling::default()
        };
        let mut chooser = CpuChooser::new(sampling, 6, &[]);
        chooser.filter(&[1.0, -0.0, 0.0, 1.0, 1.0, 1.0], 1.0);
        let kept: Vec<u32> = chooser.candidates.iter().map(|kept| kept.token).collect();
        assert_eq!(kept, [4, 3, 0]);
    }

    #[test]
    fn draws_are_as_frequent_as_likely() -> Result<()> {
        let weights = [0.5f32, 0.0, 0.2, 0.3];
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let logits = scores(&weights.map(f32::ln))?;
        let mut sampler = Sampler::new(sampling, &logits, &[])?;
        let mut counts = [0; 4];
        for _ in 0..10_000 {
            counts[sampler.next(&logits)? as usize] += 1;
        }
        for (count, weight) in counts.iter().zip(weights) {
            assert!(
                (f64::from(*count) / 10_000.0 - f64::from(weight)).abs() < 0.02,
                "{counts:?}"
            );
        }
        assert_eq!(counts[1], 0);
        Ok(())
    }

    #[test]
    fn the_first_of_equals_is_the_likeliest() -> Result<()> {
        assert_eq!(token(Sampling::default(), &[1.0, 2.0, 2.0])?, 1);
        Ok(())
    }

    #[test]
    fn hardly_any_temperature_takes_the_likeliest() -> Result<()> {
        for temperature in [1e-6, 1e-40, 1e-300] {
            let sampling = Sampling {
                temperature,
                ..Sampling::default()
            };
            assert_eq!(token(sampling, &[1.0, -2.0, 1.5])?, 2);
        }
        Ok(())
    }

    #[test]
    fn scores_that_are_no_numbers_are_an_error() {
        for scores in [
            [1.0, f32::NAN],
            [f32::NAN, 1.0],
            [f32::INFINITY, 1.0],
            [f32::NEG_INFINITY; 2],
        ] {
            for temperature in [0.0, 1.0] {
                let sampling = Sampling {
                    temperature,
                    ..Sampling::default()
                };
                assert!(token(sampling, &scores).is_err(), "{scores:?}");
            }
        }
    }

    #[test]
    fn settings_without_meaning_are_refused() {
        let refused = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            assert!(sampling.validated().is_err(), "{sampling:?}");
        };
        refused(|sampling| sampling.temperature = -1.0);
        refused(|sampling| sampling.temperature = f64::NAN);
        refused(|sampling| sampling.top_p = 1.1);
        refused(|sampling| sampling.min_p = -0.1);
        refused(|sampling| sampling.repetition_penalty = 0.0);
        refused(|sampling| sampling.repetition_penalty = f64::INFINITY);
    }
}
