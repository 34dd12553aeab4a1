//! The choice of the token that follows, of which the host hears nothing but the token.

use super::compiler::{Kernel, Source};
use super::launch::{Grid, THREADS, double, int, launch};
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::ops::Sampling;
use crate::ops::sampling::not_finite;
use crate::{Error, Result};
use candle_core::{CudaDevice, DType, Device, Tensor};

const NAME: &str = "sampling";

/// Threads of a warp.
const WARP: usize = 32;
/// Tokens that one warp finds the highest score of.
const GROUP: usize = 256;
/// Numbers about a choice: the token, and what became of it.
const CHOICE_NUMBERS: usize = 2;
/// The sum of all weights is below two to this power.
const SUM_BITS: u32 = 62;

/// Chooses tokens on the device.
pub(in crate::ops) struct Chooser {
    sampling: Sampling,
    vocabulary: usize,
    /// A bit for each token: whether it stands in the text. Absent where no penalty asks for it.
    stands: Option<Tensor>,
    group_highest: Output,
    group_first: Output,
    /// Absent where the likeliest is always taken.
    draw: Option<Draw>,
    choice: Output,
}

/// What a draw needs, (vocabulary) each: the scores' keys, and room for those of fewer candidates and for their tokens.
struct Draw {
    keys: Output,
    room_keys: Output,
    room_tokens: Output,
}

impl Draw {
    fn new(device: &CudaDevice, vocabulary: usize) -> Result<Self> {
        let numbers = || Output::new(device, vocabulary, DType::U32);
        Ok(Self {
            keys: numbers()?,
            room_keys: numbers()?,
            room_tokens: numbers()?,
        })
    }
}

impl Chooser {
    /// For a text that begins with `prompt`, of a model that gives `vocabulary` logits on `device`.
    pub(in crate::ops) fn new(
        sampling: Sampling,
        device: &Device,
        vocabulary: usize,
        prompt: &[u32],
    ) -> Result<Self> {
        let device = device.as_cuda_device()?;
        let groups = vocabulary.div_ceil(GROUP);
        let penalises = sampling.repetition_penalty != 1.0;
        let draws = sampling.temperature > 0.0;
        Ok(Self {
            sampling,
            vocabulary,
            stands: penalises
                .then(|| upload(device, &bits(vocabulary, prompt)))
                .transpose()?,
            group_highest: Output::new(device, groups, DType::U32)?,
            group_first: Output::new(device, groups, DType::U32)?,
            draw: draws.then(|| Draw::new(device, vocabulary)).transpose()?,
            choice: Output::new(device, CHOICE_NUMBERS, DType::U32)?,
        })
    }

    /// The token that follows, given the contiguous score of each. What is drawn is for the 53 highest bits of `random` to
    /// say.
    pub(in crate::ops) fn next(&mut self, logits: &Tensor, random: u64) -> Result<u32> {
        let device = device_of(NAME, logits)?;
        let real = Real::of(NAME, "the logits", logits)?;
        if logits.dims() != [self.vocabulary] {
            return Err(Error::new(format!(
                "`{NAME}` needs {} logits, their shape is {:?}",
                self.vocabulary,
                logits.dims()
            )));
        }
        let stands = self.stands.as_ref();
        let stands = Address::of_optional(NAME, "the tokens of the text", stands, DType::U32)?;
        let draw = self.draw.as_ref();
        let keys = draw.map(|draw| draw.keys.address());
        // The likeliest is the same at any other temperature.
        let temperature = draw.map_or(1.0, |_| self.sampling.temperature as f32);
        let vocabulary = int(self.vocabulary)?;
        launch(
            device,
            Kernel::new(Source::Sampling, real, "prepare_scores"),
            Grid::blocks(self.vocabulary.div_ceil(GROUP * THREADS / WARP)),
            &[
                Address::of(NAME, "the logits", logits, real.dtype())?.into(),
                stands.into(),
                keys.into(),
                self.group_highest.address().into(),
                self.group_first.address().into(),
                vocabulary,
                (self.sampling.repetition_penalty as f32).into(),
                temperature.into(),
            ],
        )?;
        let top_k = match self.sampling.top_k {
            0 => self.vocabulary,
            top_k => top_k.min(self.vocabulary),
        };
        let threads = if self.vocabulary < 8192 { 256 } else { 1024 };
        launch(
            device,
            Kernel::new(Source::Sampling, Real::F32, "choose_token"),
            Grid::of((1, 1, 1), threads),
            &[
                keys.into(),
                self.group_highest.address().into(),
                self.group_first.address().into(),
                draw.map(|draw| draw.room_keys.address()).into(),
                draw.map(|draw| draw.room_tokens.address()).into(),
                stands.into(),
                self.choice.address().into(),
                vocabulary,
                temperature.into(),
                int(top_k)?,
                double(1.0 - self.sampling.top_p),
                double(self.sampling.min_p),
                unit(self.vocabulary).into(),
                random.into(),
            ],
        )?;
        self.read()
    }

    /// Waits for the choice.
    fn read(&self) -> Result<u32> {
        match self.choice.read::<u32>(CHOICE_NUMBERS)?.as_slice() {
            &[token, 0] if (token as usize) < self.vocabulary => Ok(token),
            &[_, 1] => Err(not_finite()),
            nonsense => Err(Error::new(format!(
                "the GPU's choice of a token is {nonsense:?}"
            ))),
        }
    }
}

/// The weight of the likeliest token: the greatest power of two at which no sum is too large.
fn unit(vocabulary: usize) -> f32 {
    let bits = usize::BITS - vocabulary.leading_zeros();
    2f32.powi(SUM_BITS as i32 - bits as i32)
}

/// A bit for each token of the vocabulary, set where it stands in `text`, in words of 32.
fn bits(vocabulary: usize, text: &[u32]) -> Vec<u32> {
    let mut words = vec![0; vocabulary.div_ceil(32)];
    for token in text {
        if let Some(word) = words.get_mut(*token as usize / 32) {
            *word |= 1 << (token % 32);
        }
    }
    words
}
