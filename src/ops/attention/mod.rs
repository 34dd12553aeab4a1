//! Causal attention over segments of flat rows.

mod backward;
mod forward;
#[cfg(test)]
mod tests;

use super::floats::{Floats, expect_shape, matrix_shape};
use super::graph::{Backward, record};
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// Rows of one example: its queries are the last rows of its keys, so each sees all keys before it and itself.
///
/// In training both are the same rows; with a cache of keys the queries are the new tokens at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of `q`.
    pub queries: Range<usize>,
    /// Rows of `k` and `v`, at least as many.
    pub keys: Range<usize>,
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
    /// With a window `w` the query at position `p` sees the keys `p - w + 1 ..= p`, as in Hugging Face's Mistral.
    pub window: Option<usize>,
}

/// `softmax(scale · q kᵀ) v` per head and segment, causal.
///
/// `q` is `(rows, heads · head_dim)`, `k` and `v` `(key rows, key_value_heads · head_dim)`, the result has the shape of
/// `q`. The queries of the segments follow each other and cover all rows of `q`; their keys do not overlap. Scores exist
/// only for one block of queries per thread, so memory grows linearly with the length. Saved are the arguments, and the
/// maximum and sum of each softmax. With the probabilities `p` and `δ = Σ p · dout vᵀ` of each query:
///
/// ```text
/// dv = pᵀ dout      ds = scale · p · (dout vᵀ - δ)      dq = ds k      dk = dsᵀ q
/// ```
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: Arc<[Segment]>,
) -> Result<Tensor> {
    let (q, k, v) = (&q.contiguous()?, &k.contiguous()?, &v.contiguous()?);
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
    Ok((out, Softmax(rows)))
}

const NAME: &str = "attention";

struct Attention {
    shape: AttentionShape,
    segments: Arc<[Segment]>,
    softmax: Softmax,
}

/// Maximum and sum of the softmax of each query and head.
pub(crate) struct Softmax(Vec<SoftmaxRow>);

impl Backward<3> for Attention {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [q, k, v]: [&Tensor; 3],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
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
    let inputs = Inputs {
        q: &Floats::of(NAME, "q", q)?,
        k: &Floats::of(NAME, "k", k)?,
        v: &Floats::of(NAME, "v", v)?,
        shape,
        segments,
    };
    let dout = Floats::of(NAME, "the gradient", &dout)?;
    let gradients = backward::run(&inputs, &softmax.0, &dout, wanted);
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

/// Maximum and inverse sum of one softmax: `p = e^(scale · s - maximum) · inverse_sum`.
#[derive(Clone, Copy, Default)]
struct SoftmaxRow {
    maximum: f32,
    inverse_sum: f32,
}

/// Queries of a block: with 64 the scores of a few thousand keys stay in the second-level cache.
const BLOCK: usize = 64;

/// Some queries of one segment that follow each other, and the keys that any of them sees.
#[derive(Clone)]
struct Block {
    /// Rows of `q`.
    queries: Range<usize>,
    /// Rows of `k` and `v`.
    keys: Range<usize>,
    /// The row of `k` with the key of the first query.
    own_key: usize,
}

impl Block {
    /// The block of the given queries of a segment, counted from the segment's first.
    fn new(segment: &Segment, queries: Range<usize>, window: Option<usize>) -> Self {
        let own_key = segment.keys.end - segment.queries.len() + queries.start;
        let first = first_key(segment.keys.start, own_key, window);
        Self {
            keys: first..own_key + queries.len(),
            queries: segment.queries.start + queries.start..segment.queries.start + queries.end,
            own_key,
        }
    }

    /// The keys that the given query of the block sees, counted from the block's first key.
    fn seen(&self, query: usize, window: Option<usize>) -> Range<usize> {
        let own_key = self.own_key + query;
        first_key(self.keys.start, own_key, window) - self.keys.start..own_key + 1 - self.keys.start
    }
}

fn first_key(start: usize, own_key: usize, window: Option<usize>) -> usize {
    window.map_or(start, |window| {
        start.max((own_key + 1).saturating_sub(window))
    })
}

/// The queries of a segment in parts of at most `size`, counted from its first.
fn parts(queries: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..queries)
        .step_by(size)
        .map(move |start| start..(start + size).min(queries))
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
