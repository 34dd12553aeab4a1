use super::*;
use crate::ops::testing::{assert_close, check, random, variable};
use candle_core::{D, Device, Var};

fn shape(
    heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    window: Option<usize>,
) -> AttentionShape {
    AttentionShape {
        heads,
        key_value_heads,
        head_dim,
        scale: 0.7 / (head_dim as f32).sqrt(),
        visible: Visible::Causal,
        window,
        soft_cap: None,
    }
}

/// A causal shape without a cap, and the same in both directions, with capped scores, and with both.
fn settings(shape: &AttentionShape) -> [AttentionShape; 4] {
    [
        (Visible::Causal, None),
        (Visible::All, None),
        (Visible::Causal, Some(2.0)),
        (Visible::All, Some(2.0)),
    ]
    .map(|(visible, soft_cap)| AttentionShape {
        visible,
        soft_cap,
        ..*shape
    })
}

/// Segments of these lengths, queries and keys the same rows.
fn training(lengths: &[usize]) -> Arc<[Segment]> {
    let mut start = 0;
    lengths
        .iter()
        .map(|length| {
            let rows = start..start + length;
            start += length;
            Segment {
                queries: rows.clone(),
                keys: rows,
            }
        })
        .collect()
}

/// Segment by segment and head by head, with a full mask.
fn slow(t: &[Tensor], shape: &AttentionShape, segments: &[Segment]) -> Result<Tensor> {
    let head = |t: &Tensor, rows: &Range<usize>, head| -> Result<Tensor> {
        Ok(t.narrow(0, rows.start, rows.len())?
            .narrow(1, head * shape.head_dim, shape.head_dim)?)
    };
    let mut outs = Vec::new();
    for Segment { queries, keys } in segments
        .iter()
        .filter(|segment| !segment.queries.is_empty())
    {
        let offset = keys.len() - queries.len();
        let mask: Vec<f32> = (0..queries.len() * keys.len())
            .map(|i| (i / keys.len() + offset, i % keys.len()))
            .map(|(query, key)| {
                let near = shape
                    .window
                    .is_none_or(|window| key.abs_diff(query) < window);
                near && (shape.visible == Visible::All || key <= query)
            })
            .map(|seen| if seen { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(mask, (queries.len(), keys.len()), &Device::Cpu)?;
        let mut heads = Vec::new();
        for i in 0..shape.heads {
            let key_head = i * shape.key_value_heads / shape.heads;
            let (q, k, v) = (
                head(&t[0], queries, i)?,
                head(&t[1], keys, key_head)?,
                head(&t[2], keys, key_head)?,
            );
            let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * f64::from(shape.scale))?;
            let scores = match shape.soft_cap.map(f64::from) {
                Some(cap) => ((scores / cap)?.tanh()? * cap)?,
                None => scores,
            };
            let scores = (scores + &mask)?;
            let exp = scores
                .broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?
                .exp()?;
            let probabilities = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
            heads.push(probabilities.matmul(&v.contiguous()?)?);
        }
        outs.push(Tensor::cat(&heads, 1)?);
    }
    Ok(Tensor::cat(&outs, 0)?)
}

fn arguments(shape: &AttentionShape, queries: usize, keys: usize) -> [Var; 3] {
    let features = shape.key_value_heads * shape.head_dim;
    let [q, k, v] = [
        variable(1, &[queries, shape.heads * shape.head_dim]),
        variable(2, &[keys, features]),
        variable(3, &[keys, features]),
    ];
    [q, k, v]
}

fn compare(shape: &AttentionShape, segments: &Arc<[Segment]>) {
    let end = |rows: fn(&Segment) -> usize| segments.iter().map(rows).max().unwrap_or(0);
    let arguments = arguments(shape, end(|s| s.queries.end), end(|s| s.keys.end));
    let fast = |t: &[Tensor]| attention(&(&t[0] * 3.0)?, &t[1], &t[2], shape, segments.clone());
    let slow = |t: &[Tensor]| {
        slow(
            &[(&t[0] * 3.0)?, t[1].clone(), t[2].clone()],
            shape,
            segments,
        )
    };
    check(&arguments, &fast, &slow, 1e-5);
}

#[test]
fn training_equals_its_composition() {
    for (heads, key_value_heads, head_dim) in [(1, 1, 2), (3, 3, 5), (6, 2, 16)] {
        for window in [None, Some(1), Some(5), Some(70)] {
            let shape = shape(heads, key_value_heads, head_dim, window);
            for lengths in [&[1][..], &[1, 7, 1], &[65, 3], &[131]] {
                compare(&shape, &training(lengths));
            }
        }
    }
}

#[test]
fn every_setting_equals_its_composition() {
    for window in [None, Some(1), Some(5), Some(70)] {
        for shape in settings(&shape(4, 2, 7, window)) {
            for lengths in [&[1][..], &[1, 7, 1], &[65, 3], &[131]] {
                compare(&shape, &training(lengths));
            }
        }
    }
}

#[test]
fn a_long_segment_equals_its_composition() {
    for window in [None, Some(100)] {
        let [plain, .., both] = settings(&shape(2, 1, 4, window));
        for shape in [plain, both] {
            compare(&shape, &training(&[1100, 9]));
        }
    }
}

#[test]
fn queries_after_cached_keys_equal_their_composition() {
    let segment = |queries, keys| Segment { queries, keys };
    for window in [None, Some(3), Some(80)] {
        for shape in settings(&shape(4, 2, 8, window)) {
            compare(&shape, &[segment(0..1, 0..90)].into());
            compare(
                &shape,
                &[
                    segment(0..70, 5..90),
                    segment(70..70, 90..95),
                    segment(70..72, 100..131),
                ]
                .into(),
            );
        }
    }
}

/// A token fed alone after its cache sees what it saw in the whole.
#[test]
fn decoding_continues_the_whole() -> Result<()> {
    let shape = shape(4, 2, 8, Some(20));
    let [q, k, v] = arguments(&shape, 50, 50).map(|t| t.as_detached_tensor());
    let whole = attention(&q, &k, &v, &shape, training(&[50]))?;
    for token in [0, 1, 19, 20, 49] {
        let segment = Segment {
            queries: 0..1,
            keys: 0..token + 1,
        };
        let alone = attention(&q.narrow(0, token, 1)?, &k, &v, &shape, [segment].into())?;
        let row = whole.narrow(0, token, 1)?;
        assert_close(
            "token",
            &alone.flatten_all()?.to_vec1::<f32>()?,
            &row.flatten_all()?.to_vec1::<f32>()?,
            1e-6,
        );
    }
    Ok(())
}

/// With no direction, the rows from last to first give the result from last to first.
#[test]
fn both_directions_are_alike() -> Result<()> {
    for window in [None, Some(20)] {
        let [_, both, ..] = settings(&shape(4, 2, 8, window));
        let [q, k, v] = arguments(&both, 70, 70).map(|t| t.as_detached_tensor());
        let out = attention(&q, &k, &v, &both, training(&[70]))?;
        let [q, k, v] = [q.flip(&[0])?, k.flip(&[0])?, v.flip(&[0])?];
        let turned = attention(&q, &k, &v, &both, training(&[70]))?.flip(&[0])?;
        assert_close(
            "turned",
            &turned.flatten_all()?.to_vec1::<f32>()?,
            &out.flatten_all()?.to_vec1::<f32>()?,
            1e-6,
        );
    }
    Ok(())
}

#[test]
fn nan_is_passed_on() -> Result<()> {
    for shape in settings(&shape(1, 1, 2, None)) {
        let q = Tensor::new(&[[1f32, 2.0], [f32::NAN, 1.0]], &Device::Cpu)?;
        let k = random(1, &[2, 2]);
        let out = attention(&q, &k, &k, &shape, training(&[2]))?.to_vec2::<f32>()?;
        assert!(
            out[0].iter().all(|value| value.is_finite())
                && out[1].iter().all(|value| value.is_nan())
        );
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let message = |shape: &AttentionShape, segments: &[Segment]| {
        let (q, k) = (random(1, &[4, 8]), random(2, &[4, 4]));
        attention(&q, &k, &k, shape, segments.into())
            .expect_err("refused")
            .to_string()
    };
    let good = shape(4, 2, 2, None);
    let segment = |queries, keys| Segment { queries, keys };
    assert_eq!(
        message(&shape(4, 3, 2, None), &training(&[4])),
        "`attention`: 4 heads of 2 cannot share 3 heads of keys and values"
    );
    assert_eq!(
        message(&shape(4, 2, 2, Some(0)), &training(&[4])),
        "`attention`: a window of 0 keys leaves nothing to see"
    );
    for cap in [0.0, -1.0, f32::INFINITY, f32::NAN] {
        let capped = AttentionShape {
            soft_cap: Some(cap),
            ..good
        };
        assert_eq!(
            message(&capped, &training(&[4])),
            format!("`attention`: a soft cap of {cap} is not a positive finite number")
        );
    }
    assert_eq!(
        message(&shape(2, 2, 2, None), &training(&[4])),
        "`attention` needs q of shape [4, 4] (heads · head_dim features), its shape is [4, 8]"
    );
    assert_eq!(
        message(&good, &training(&[3])),
        "`attention`: the segments end at row 3 but q has 4"
    );
    assert_eq!(
        message(&good, &[segment(0..4, 0..3)]),
        "`attention`: a segment has the queries 0..4 but only the keys 0..3"
    );
    assert_eq!(
        message(&good, &[segment(0..2, 0..2), segment(2..4, 1..3)]),
        "`attention`: a segment has the keys 1..3 where 2..4 are left"
    );
    assert_eq!(
        message(&good, &[segment(1..4, 0..4)]),
        "`attention`: a segment has the queries 1..4 where 0 of 4 come next"
    );
    Ok(())
}
