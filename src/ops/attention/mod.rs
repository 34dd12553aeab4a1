//! Attention over segments of flat rows, causal or in both directions.

mod backward;
mod block;
mod forward;
mod soft_cap;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape, matrix_shape};
use super::graph::{Backward, record};
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// Rows of one example: its queries are the last rows of its keys, so each has a key of its own.
///
/// In training both are the same rows; with a cache of keys the queries are the new tokens at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of `q`.
    pub queries: Range<usize>,
    /// Rows of `k` and `v`, at least as many.
    pub keys: Range<usize>,
}

/// Which keys of its segment a query sees, as far as the window reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// Its own and those before it, as a decoder.
    Causal,
    /// Those after it too, as an encoder.
    All,
}

/// How the features of a row are heads, and what they see.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; each serves `heads / key_value_heads` query heads that follow each other.
    pub key_value_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / √head_dim`.
    pub scale: f32,
    /// In which directions a query sees.
    pub visible: Visible,
    /// With a window `w` the query at position `p` sees of the visible keys only those less than `w` positions away:
    /// `p - w + 1 ..= p` if causal, as in Hugging Face's Mistral, else `p - w + 1 ..= p + w - 1`.
    pub window: Option<usize>,
    /// With a cap `c`, positive and finite, a scaled score `s` becomes `c · tanh(s / c)` before the softmax, as in
    /// Gemma 2 (<https://arxiv.org/abs/2408.00118>).
    pub soft_cap: Option<f32>,
}

/// `softmax(scale · q kᵀ) v` per head and segment, over the keys that each query sees.
///
/// `q` is `(rows, heads · head_dim)`, `k` and `v` `(key rows, key_value_heads · head_dim)`, the result has the shape of
/// `q`. The queries of the segments follow each other and cover all rows of `q`; their keys do not overlap. Scores exist
/// only for one block of queries per thread, so memory grows linearly with the length. Saved are the arguments, and the
/// maximum and sum of each softmax. With the probabilities `p` and `δ = Σ p · dout vᵀ` of each query:
///
/// ```text
/// dv = pᵀ dout      ds = scale · p · (dout vᵀ - δ)      dq = ds k      dk = dsᵀ q
/// ```
///
/// With a soft cap the softmax is that of `s = cap · tanh(scale · q kᵀ / cap)`, and `ds` has one more factor,
/// `1 - (s / cap)²`.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: Arc<[Segment]>,
) -> Result<Tensor> {
    let (q, k, v) = (&q.contiguous()?, &k.contiguous()?, &v.contiguous()?);
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        check(q, k, v, shape, &segments)?;
        let (out, log_sum_exp) = cuda::attention([q, k, v], shape, &segments)?;
        let kept = cuda::KeptSoftmax {
            log_sum_exp,
            out: None,
        };
        let backward = Attention {
            shape: shape.clone(),
            segments,
            softmax: Softmax(Kept::Device(kept)),
        };
        return record([q, k, v], out, q.shape(), backward);
    }
    let (out, softmax) = attend(q, k, v, shape, &segments)?;
    record(
        [q, k, v],
        out,
        q.shape(),
        Attention {
            shape: shape.clone(),
            segments,
            softmax,
        },
    )
}

/// [`attention`] without history: the result, and what its backward needs besides it.
pub(crate) fn attention_forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<(Tensor, Softmax)> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        check(&q, &k, &v, shape, segments)?;
        let (out, log_sum_exp) = cuda::attention([&q, &k, &v], shape, segments)?;
        let out = out.into_tensor(q.shape());
        let kept = cuda::KeptSoftmax {
            log_sum_exp,
            out: Some(out.clone()),
        };
        return Ok((out, Softmax(Kept::Device(kept))));
    }
    let (out, softmax) = attend(&q, &k, &v, shape, segments)?;
    Ok((Tensor::from_vec(out, q.shape(), q.device())?, softmax))
}

fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<(Vec<f32>, Softmax)> {
    check(q, k, v, shape, segments)?;
    let inputs = Inputs {
        q: &Floats::of(NAME, "q", q)?,
        k: &Floats::of(NAME, "k", k)?,
        v: &Floats::of(NAME, "v", v)?,
        shape,
        segments,
    };
    let (out, rows) = forward::run(&inputs);
    Ok((out, Softmax(Kept::Host(rows))))
}

const NAME: &str = "attention";

struct Attention {
    shape: AttentionShape,
    segments: Arc<[Segment]>,
    softmax: Softmax,
}

/// What is kept of the softmax of each query and head.
pub(crate) struct Softmax(Kept);

enum Kept {
    /// Maximum and sum.
    Host(Vec<SoftmaxRow>),
    #[cfg(feature = "cuda")]
    Device(cuda::KeptSoftmax),
}

impl Backward<3> for Attention {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [q, k, v]: [&Tensor; 3],
        #[cfg_attr(
            not(feature = "cuda"),
            expect(unused_variables, reason = "only the kernels of a GPU need it")
        )]
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        #[cfg(feature = "cuda")]
        if let Kept::Device(kept) = &self.softmax.0 {
            return cuda::attention_gradients(
                [q, k, v],
                (&kept.log_sum_exp, &result.contiguous()?),
                &self.shape,
                &self.segments,
                &gradient.contiguous()?,
                [q, k, v].map(Tensor::track_op),
            );
        }
        attention_gradients(
            [q, k, v],
            &self.softmax,
            &self.shape,
            &self.segments,
            gradient,
            [q, k, v].map(Tensor::track_op),
        )
    }
}

/// The gradients of [`attention`] for those of q, k and v that are `wanted`.
pub(crate) fn attention_gradients(
    [q, k, v]: [&Tensor; 3],
    softmax: &Softmax,
    shape: &AttentionShape,
    segments: &[Segment],
    dout: &Tensor,
    wanted: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let dout = dout.contiguous()?;
    #[cfg_attr(
        not(feature = "cuda"),
        expect(
            clippy::infallible_destructuring_match,
            reason = "there is a second place with GPUs"
        )
    )]
    let rows = match &softmax.0 {
        Kept::Host(rows) => rows,
        #[cfg(feature = "cuda")]
        Kept::Device(kept) => {
            let out = kept.out.as_ref().ok_or_else(|| {
                Error::new(format!("`{NAME}` did not keep what its backward needs"))
            })?;
            return cuda::attention_gradients(
                [q, k, v],
                (&kept.log_sum_exp, out),
                shape,
                segments,
                &dout,
                wanted,
            );
        }
    };
    let inputs = Inputs {
        q: &Floats::of(NAME, "q", q)?,
        k: &Floats::of(NAME, "k", k)?,
        v: &Floats::of(NAME, "v", v)?,
        shape,
        segments,
    };
    let dout = Floats::of(NAME, "the gradient", &dout)?;
    let gradients = backward::run(&inputs, rows, &dout, wanted);
    let mut tensors = [None, None, None];
    for ((tensor, values), argument) in tensors.iter_mut().zip(gradients).zip([q, k, v]) {
        if let Some(values) = values {
            *tensor = Some(Tensor::from_vec(
                values,
                argument.shape(),
                argument.device(),
            )?);
        }
    }
    Ok(tensors)
}

/// Checked arguments as slices.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    shape: &'a AttentionShape,
    segments: &'a [Segment],
}

/// Maximum and inverse sum of one softmax: `p = e^(scale · s - maximum) · inverse_sum`, where a soft cap puts
/// `cap · tanh(scale · s / cap)` for `scale · s`.
#[derive(Clone, Copy, Default)]
struct SoftmaxRow {
    maximum: f32,
    inverse_sum: f32,
}

fn check(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<()> {
    let AttentionShape {
        heads,
        key_value_heads,
        head_dim,
        window,
        soft_cap,
        ..
    } = *shape;
    if heads == 0 || key_value_heads == 0 || head_dim == 0 || heads % key_value_heads != 0 {
        return Err(Error::new(format!(
            "`{NAME}`: {heads} heads of {head_dim} cannot share {key_value_heads} heads of keys and values"
        )));
    }
    if window == Some(0) {
        return Err(Error::new(format!(
            "`{NAME}`: a window of 0 keys leaves nothing to see"
        )));
    }
    if let Some(cap) = soft_cap.filter(|cap| !cap.is_finite() || *cap <= 0.0) {
        return Err(Error::new(format!(
            "`{NAME}`: a soft cap of {cap} is not a positive finite number"
        )));
    }
    let (rows, _) = matrix_shape(NAME, "q", q)?;
    let (key_rows, _) = matrix_shape(NAME, "k", k)?;
    expect_shape(
        NAME,
        "q",
        q,
        &[rows, heads * head_dim],
        "heads · head_dim features",
    )?;
    let features = key_value_heads * head_dim;
    expect_shape(
        NAME,
        "k",
        k,
        &[key_rows, features],
        "key_value_heads · head_dim features",
    )?;
    expect_shape(NAME, "v", v, &[key_rows, features], "the shape of k")?;
    let (mut query, mut key) = (0, 0);
    for Segment { queries, keys } in segments {
        if queries.start != query || queries.end < query || queries.end > rows {
            return Err(Error::new(format!(
                "`{NAME}`: a segment has the queries {queries:?} where {query} of {rows} come next"
            )));
        }
        if keys.start < key || keys.end < keys.start || keys.end > key_rows {
            return Err(Error::new(format!(
                "`{NAME}`: a segment has the keys {keys:?} where {key}..{key_rows} are left"
            )));
        }
        if queries.len() > keys.len() {
            return Err(Error::new(format!(
                "`{NAME}`: a segment has the queries {queries:?} but only the keys {keys:?}"
            )));
        }
        (query, key) = (queries.end, keys.end);
    }
    if query != rows {
        return Err(Error::new(format!(
            "`{NAME}`: the segments end at row {query} but q has {rows}"
        )));
    }
    Ok(())
}
