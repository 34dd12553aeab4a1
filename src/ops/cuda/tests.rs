//! Every operation on a GPU against the same on the CPU, which is checked against its composition.

use super::compiler::{Architecture, Module, Source, compile};
use super::memory::Real;
use super::upload::{PIECE_WORDS, PIECES, upload};
use crate::Result;
use crate::adapters::hooks::{Dropout, LowRank};
use crate::ops::testing::{assert_close, cuda, find_cuda_toolkit, frozen_weights, random};
use crate::ops::{
    Activation, AdamWStep, AttentionShape, ComputeType, Fault, FrozenWeight, HeldWeights, Reaction,
    RotaryTable, Sampler, Sampling, Segment, StepLimits, TrainedWeight, Verdict, Visible, adamw,
    add_onto, attention, cross_entropy, gated_activation, layer_norm, linear, linear_cross_entropy,
    look_up, low_rank_linear, rms_norm, rope, score_logits, score_targets, seed_gradient,
    select_rows, squared_norm, trained_linear, trained_linear_cross_entropy,
};
use candle_core::{DType, Device, Tensor, Var};
use std::ops::Range;
use std::sync::Arc;

/// Where an operation runs, and the type of its activations.
struct Place {
    device: Device,
    compute: ComputeType,
}

impl Place {
    fn activations(&self) -> DType {
        match (self.device.is_cuda(), self.compute) {
            (true, ComputeType::Bf16) => DType::BF16,
            _ => DType::F32,
        }
    }

    fn weight(&self, w: &FrozenWeight) -> FrozenWeight {
        match self.device.is_cuda() {
            true => w.upload(&self.device, self.compute).expect("room for it"),
            false => w.clone(),
        }
    }

    fn tensor(&self, t: &Tensor) -> Tensor {
        t.to_device(&self.device).expect("room for it")
    }
}

/// An operation on activations and on trained f32 tensors, which begins with what it captured placed.
type Operation<'a> = &'a dyn Fn(&Place, &[Tensor], &[Tensor]) -> Result<Tensor>;

/// Value and gradients in f32 on the CPU.
fn run(
    place: &Place,
    activations: &[Tensor],
    trained: &[Tensor],
    coefficient_type: DType,
    operation: Operation<'_>,
) -> Result<Vec<Vec<f32>>> {
    let variables = |tensors: &[Tensor], dtype: DType| -> Result<Vec<Var>> {
        tensors
            .iter()
            .map(|t| Ok(Var::from_tensor(&place.tensor(t).to_dtype(dtype)?)?))
            .collect()
    };
    let activations = variables(activations, place.activations())?;
    let trained = variables(trained, DType::F32)?;
    let tensors = |variables: &[Var]| -> Vec<Tensor> {
        variables.iter().map(|v| v.as_tensor().clone()).collect()
    };
    let result = operation(place, &tensors(&activations), &tensors(&trained))?;
    let coefficients = random(99, result.dims()).to_dtype(coefficient_type)?;
    let coefficients = place.tensor(&coefficients.to_dtype(DType::F32)?);
    let loss = (result.to_dtype(DType::F32)? * coefficients)?.sum_all()?;
    let store = loss.backward()?;
    let flat = |t: &Tensor| -> Result<Vec<f32>> {
        let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(t.flatten_all()?.to_vec1()?)
    };
    let mut all = vec![flat(&result.detach())?];
    for variable in activations.iter().chain(&trained) {
        let gradient = store.get(variable).expect("every argument is tracked");
        assert_eq!(gradient.dtype(), variable.dtype());
        all.push(flat(gradient)?);
    }
    let detached: [Vec<Tensor>; 2] = [&activations, &trained]
        .map(|variables| variables.iter().map(Var::as_detached_tensor).collect());
    let plain = operation(place, &detached[0], &detached[1])?;
    assert!(!plain.track_op(), "history where nothing is tracked");
    assert_eq!(flat(&plain)?, all[0]);
    Ok(all)
}

/// Compares values and gradients in both types of activations, and that the same comes out again.
fn check(activations: &[&[usize]], trained: &[&[usize]], operation: Operation<'_>) -> Result<()> {
    for (compute, tolerance) in [(ComputeType::F32, 1e-4), (ComputeType::Bf16, 3e-2)] {
        let rounded = match compute {
            ComputeType::F32 => DType::F32,
            ComputeType::Bf16 => DType::BF16,
        };
        let values = |shapes: &[&[usize]], first: u64| -> Result<Vec<Tensor>> {
            (first..)
                .zip(shapes)
                .map(|(seed, shape)| {
                    let t = random(seed, shape).to_dtype(rounded)?;
                    Ok(t.to_dtype(DType::F32)?)
                })
                .collect()
        };
        let (activations, trained) = (values(activations, 1)?, values(trained, 50)?);
        let on = |device: Device| {
            let place = Place { device, compute };
            run(&place, &activations, &trained, rounded, operation)
        };
        let (theirs, ours) = (on(Device::Cpu)?, on(cuda())?);
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let what = format!("{compute:?}, value and gradients, number {index}");
            assert_close(&what, ours, theirs, tolerance);
        }
        assert_eq!(ours, on(cuda())?, "not the same bits again");
    }
    Ok(())
}

/// Values that bf16 has, stored so.
fn frozen(seed: u64, rows: usize, columns: usize) -> FrozenWeight {
    frozen_weights(seed, rows, columns).remove(2)
}

#[test]
fn every_kernel_compiles() -> Result<()> {
    find_cuda_toolkit();
    for architecture in [Architecture::Ampere, Architecture::Hopper] {
        for real in [Real::F32, Real::Bf16] {
            for source in Source::ALL {
                let sizes: &[usize] = match source {
                    Source::Attention => &[16, 64, 80, 128, 256],
                    _ => &[0],
                };
                for &head_dim in sizes {
                    let module = Module {
                        source,
                        real,
                        head_dim,
                    };
                    assert!(!compile(module, architecture)?.is_empty());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_newest_architecture_that_a_device_runs_is_chosen() {
    for (capability, wanted) in [
        ((8, 0), Architecture::Ampere),
        ((8, 9), Architecture::Ampere),
        ((9, 0), Architecture::Hopper),
        ((12, 0), Architecture::Hopper),
    ] {
        assert_eq!(Architecture::of(capability), wanted);
    }
}

const SHAPES: [(usize, usize, usize); 5] = [
    (1, 1, 1),
    (1, 7, 65),
    (5, 31, 17),
    (33, 64, 128),
    (131, 67, 257),
];

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn linear_layers_on_cuda() -> Result<()> {
    for (rows, inputs, outputs) in SHAPES {
        let w = frozen(2, outputs, inputs);
        let bias = random(3, &[outputs]);
        check(&[&[rows, inputs]], &[], &|place, x, _| {
            linear(&x[0], &place.weight(&w), None)
        })?;
        check(&[&[rows, inputs]], &[], &|place, x, _| {
            linear(&x[0], &place.weight(&w), Some(&place.tensor(&bias)))
        })?;
        check(&[&[rows, inputs]], &[&[outputs]], &|place, x, t| {
            linear(&x[0], &place.weight(&w), Some(&t[0]))
        })?;
        check(&[&[rows, inputs]], &[&[outputs, inputs]], &|_, x, t| {
            trained_linear(&x[0], &t[0], None)
        })?;
        check(
            &[&[rows, inputs]],
            &[&[outputs, inputs], &[outputs]],
            &|_, x, t| trained_linear(&x[0], &t[0], Some(&t[1])),
        )?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn low_rank_layers_on_cuda() -> Result<()> {
    for (rows, inputs, outputs) in SHAPES {
        let w = frozen(2, outputs, inputs);
        let rank = 4;
        for dropout in [None, Some(Dropout::new(0.3, 5, "a.layer", 11))] {
            check(
                &[&[rows, inputs]],
                &[&[rank, inputs], &[outputs, rank]],
                &|place, x, t| {
                    let update = LowRank {
                        a: &t[0],
                        b: &t[1],
                        scale: 0.7,
                        dropout,
                    };
                    low_rank_linear(&x[0], &place.weight(&w), None, &update)
                },
            )?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn held_factors_are_those_of_their_weights_on_cuda() -> Result<()> {
    let w = frozen(2, 17, 31).upload(&cuda(), ComputeType::Bf16)?;
    let x = random(1, &[5, 31])
        .to_device(&cuda())?
        .to_dtype(DType::BF16)?;
    let factor = |seed, shape: &[usize]| -> Result<Var> {
        Ok(Var::from_tensor(&random(seed, shape).to_device(&cuda())?)?)
    };
    let (a, b) = (factor(3, &[4, 31])?, factor(4, &[17, 4])?);
    let run = || -> Result<Vec<Vec<f32>>> {
        let update = LowRank {
            a: a.as_tensor(),
            b: b.as_tensor(),
            scale: 0.7,
            dropout: None,
        };
        let y = low_rank_linear(&x, &w, None, &update)?.detach();
        Ok(y.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2()?)
    };
    let before = run()?;
    let held = HeldWeights::begin();
    assert_eq!(run()?, before, "made and kept");
    assert_eq!(run()?, before, "kept");
    drop(held);
    a.set(&(a.as_tensor().detach() * 2.0)?)?;
    let after = run()?;
    assert_ne!(after, before);
    let _held = HeldWeights::begin();
    assert_eq!(run()?, after, "of weights that have changed");
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn selected_rows_on_cuda() -> Result<()> {
    for (columns, rows) in [
        (1, vec![0u32]),
        (64, vec![3, 4, 10]),
        (67, vec![0, 2, 5, 6, 7]),
    ] {
        check(&[&[11, columns]], &[], &|_, x, _| select_rows(&x[0], &rows))?;
    }
    let x = random(1, &[3, 2]).to_device(&cuda())?;
    assert!(select_rows(&x, &[0, 3]).is_err());
    assert!(select_rows(&x, &[1, 1]).is_err());
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn look_up_on_cuda() -> Result<()> {
    for (columns, rows) in [
        (1, vec![0u32]),
        (8, vec![3, 10, 3, 0, 3, 10]),
        (300, vec![7, 7, 7]),
        (67, (0..200).map(|place| place * place % 11).collect()),
    ] {
        check(&[], &[&[11, columns]], &|_, _, t| look_up(&t[0], &rows))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn norms_on_cuda() -> Result<()> {
    for shape in [
        &[1, 1][..],
        &[1, 7],
        &[5, 64],
        &[19, 4, 128],
        &[9, 256],
        &[203, 67],
        &[40, 2048],
        &[3, 5, 31],
    ] {
        let features = shape[shape.len() - 1];
        check(&[shape], &[&[features]], &|_, x, t| {
            rms_norm(&x[0], &t[0], 0.1)
        })?;
        check(&[shape], &[&[features]], &|_, x, t| {
            layer_norm(&x[0], &t[0], None, 0.1)
        })?;
        check(&[shape], &[&[features], &[features]], &|_, x, t| {
            layer_norm(&x[0], &t[0], Some(&t[1]), 0.1)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn rotations_and_gates_on_cuda() -> Result<()> {
    for (rows, heads, head_dim) in [(1, 1, 2), (1, 3, 64), (131, 3, 22), (67, 1, 64)] {
        let angles = random(7, &[rows * head_dim / 2]).to_vec1::<f32>()?;
        let (cos, sin) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let table = RotaryTable::new(cos, sin, head_dim)?;
        // Put there by the first of several uses, or before.
        if heads > 1 {
            table.upload(&cuda())?;
            table.upload(&Device::Cpu)?;
        }
        check(&[&[rows, heads * head_dim]], &[], &|_, x, _| {
            rope(&x[0], &table)
        })?;
    }
    for a in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        for shape in [&[1, 1][..], &[1, 37], &[211, 331]] {
            check(&[shape, shape], &[], &|_, x, _| {
                gated_activation(&x[0], &x[1], a)
            })?;
        }
    }
    Ok(())
}

/// Segments with so many queries and keys each.
fn segments(lengths: &[(usize, usize)]) -> Arc<[Segment]> {
    let (mut query, mut key) = (0, 0);
    lengths
        .iter()
        .map(|&(queries, keys)| {
            let next = |start: &mut usize, length: usize| -> Range<usize> {
                *start += length;
                *start - length..*start
            };
            Segment {
                queries: next(&mut query, queries),
                keys: next(&mut key, keys),
            }
        })
        .collect()
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn attention_on_cuda() -> Result<()> {
    let plain = AttentionShape {
        heads: 4,
        key_value_heads: 2,
        head_dim: 64,
        scale: 0.125,
        visible: Visible::Causal,
        window: None,
        soft_cap: None,
    };
    let shapes = [
        plain.clone(),
        AttentionShape {
            head_dim: 22,
            key_value_heads: 4,
            ..plain.clone()
        },
        AttentionShape {
            head_dim: 128,
            window: Some(9),
            ..plain.clone()
        },
        AttentionShape {
            head_dim: 80,
            key_value_heads: 1,
            visible: Visible::All,
            ..plain.clone()
        },
        AttentionShape {
            visible: Visible::All,
            window: Some(5),
            ..plain.clone()
        },
        AttentionShape {
            head_dim: 256,
            heads: 2,
            key_value_heads: 1,
            soft_cap: Some(0.5),
            ..plain
        },
    ];
    for shape in &shapes {
        for lengths in [
            &[(1, 1)][..],
            &[(7, 7), (70, 70), (1, 1)],
            &[(3, 40), (0, 5), (33, 33)],
        ] {
            let segments = segments(lengths);
            let rows = lengths.iter().map(|length| length.0).sum::<usize>();
            let key_rows = lengths.iter().map(|length| length.1).sum::<usize>();
            let key_features = shape.key_value_heads * shape.head_dim;
            check(
                &[
                    &[rows, shape.heads * shape.head_dim],
                    &[key_rows, key_features],
                    &[key_rows, key_features],
                ],
                &[],
                &|_, x, _| attention(&x[0], &x[1], &x[2], shape, segments.clone()),
            )?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn losses_on_cuda() -> Result<()> {
    for (rows, features, classes) in [(1, 3, 2), (7, 33, 1009), (301, 5, 67), (3, 16, 30_011)] {
        let targets: Vec<u32> = (0..rows as u32)
            .map(|row| row * 7919 % classes as u32)
            .collect();
        let head = frozen(2, classes, features);
        check(&[&[rows, features]], &[], &|place, x, _| {
            linear_cross_entropy(&x[0], &place.weight(&head), &targets)
        })?;
        check(&[&[rows, features]], &[&[classes, features]], &|_, x, t| {
            trained_linear_cross_entropy(&x[0], &t[0], &targets)
        })?;
        check(&[&[rows, classes]], &[], &|_, x, _| {
            cross_entropy(&x[0], &targets)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn scores_on_cuda() -> Result<()> {
    let (rows, features, classes) = (101, 33, 1009);
    let (hidden, head) = (random(1, &[rows, features]), frozen(2, classes, features));
    let targets: Vec<u32> = (0..rows as u32).collect();
    let theirs = score_targets(&hidden, &head, &targets)?;
    let on_gpu = hidden.to_device(&cuda())?;
    let ours = score_targets(&on_gpu, &head.upload(&cuda(), ComputeType::F32)?, &targets)?;
    let logits = hidden.matmul(&head.to_f32()?.t()?)?.to_device(&cuda())?;
    for ours in [ours, score_logits(&logits, &targets)?] {
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours.greedy, theirs.greedy);
            assert!((ours.log_probability - theirs.log_probability).abs() < 1e-4);
        }
    }
    let equal = Tensor::new(&[[1f32, 3.0, 3.0]], &cuda())?;
    assert_eq!(score_logits(&equal, &[0])?[0].greedy, 1);
    Ok(())
}

/// Logits of so many words that make a choice hard: spread wide, equal in bf16 as often as not, few of them possible, all
/// equal, zeros of both signs.
fn hard_logits(vocabulary: usize) -> Result<Vec<Tensor>> {
    let values = random(vocabulary as u64, &[vocabulary]);
    let spread = (&values * 12.0)?;
    let thirds = (0..vocabulary).map(|token| match token % 3 {
        0 => f32::NEG_INFINITY,
        1 => (token % 7) as f32 - 3.0,
        _ => -0.0,
    });
    let thirds = match vocabulary {
        1 => vec![0.5],
        _ => thirds.collect(),
    };
    Ok(vec![
        spread.to_dtype(DType::BF16)?,
        (&values * 3.0)?.to_dtype(DType::BF16)?,
        spread,
        Tensor::new(thirds, &Device::Cpu)?,
        values.zeros_like()?,
    ])
}

fn samplings() -> Vec<Sampling> {
    let hot = Sampling {
        temperature: 1.0,
        top_k: 0,
        ..Sampling::default()
    };
    vec![
        Sampling {
            repetition_penalty: 1.3,
            ..Sampling::default()
        },
        hot,
        Sampling { top_k: 1, ..hot },
        Sampling {
            temperature: 1.7,
            top_k: 50,
            repetition_penalty: 0.8,
            ..hot
        },
        Sampling { top_p: 0.0, ..hot },
        Sampling {
            temperature: 0.7,
            top_p: 0.3,
            ..hot
        },
        Sampling {
            temperature: 0.7,
            top_k: 50,
            top_p: 0.9,
            min_p: 0.02,
            repetition_penalty: 1.1,
            ..hot
        },
        Sampling { top_p: 0.9, ..hot },
        Sampling { min_p: 0.3, ..hot },
        Sampling {
            temperature: 1e-40,
            ..hot
        },
        Sampling {
            temperature: 1e300,
            top_k: 50,
            top_p: 0.5,
            ..hot
        },
    ]
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn tokens_are_chosen_on_cuda_as_on_the_cpu() -> Result<()> {
    for vocabulary in [1, 31, 1000, 70_000] {
        for (kind, logits) in hard_logits(vocabulary)?.into_iter().enumerate() {
            for (seed, sampling) in (0..).zip(samplings()) {
                let sampling = Sampling { seed, ..sampling };
                let prompt = [0, 17, vocabulary as u32 / 2, u32::MAX];
                let tokens = |device: &Device| -> Result<Vec<u32>> {
                    let logits = logits.to_device(device)?;
                    let mut sampler = Sampler::new(sampling, &logits, &prompt)?;
                    (0..3).map(|_| sampler.next(&logits)).collect()
                };
                let (ours, theirs) = (tokens(&cuda())?, tokens(&Device::Cpu)?);
                assert_eq!(ours, theirs, "{vocabulary}, logits {kind}, {sampling:?}");
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn scores_that_are_no_numbers_are_an_error_on_cuda() -> Result<()> {
    for scores in [
        [1.0, f32::NAN],
        [-f32::NAN, 1.0],
        [f32::INFINITY, 1.0],
        [f32::NEG_INFINITY; 2],
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let logits = Tensor::new(&scores, &Device::Cpu)?.to_dtype(dtype)?;
            for sampling in samplings() {
                let choose = |device: &Device| -> Result<u32> {
                    let logits = logits.to_device(device)?;
                    Sampler::new(sampling, &logits, &[])?.next(&logits)
                };
                let said = |device| choose(&device).map_err(|error| error.to_string());
                let ours = said(cuda());
                assert!(ours.is_err(), "{scores:?}");
                assert_eq!(ours, said(Device::Cpu));
            }
        }
    }
    let logits = random(1, &[5]).to_device(&cuda())?;
    let mut sampler = Sampler::new(Sampling::default(), &logits, &[])?;
    assert!(sampler.next(&logits.narrow(0, 0, 4)?).is_err(), "too few");
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn frozen_weights_go_to_cuda_and_back() -> Result<()> {
    let flat = |t: &Tensor| -> Result<Vec<f32>> {
        Ok(t.to_device(&Device::Cpu)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1()?)
    };
    for w in frozen_weights(3, 50, 7) {
        for (compute, dtype) in [
            (ComputeType::F32, DType::F32),
            (ComputeType::Bf16, DType::BF16),
        ] {
            let there = w.upload(&cuda(), compute)?;
            let wanted = w.to_f32()?.to_dtype(dtype)?;
            assert_eq!(there.dtype(), dtype);
            assert_eq!(flat(&there.to_tensor()?)?, flat(&wanted)?);
            assert_eq!(flat(&there.to_f32()?)?, flat(&wanted)?);
            let rows: Vec<u32> = (0..101).map(|i| i * 7 % 50).collect();
            let picked = wanted.index_select(&Tensor::new(rows.as_slice(), &Device::Cpu)?, 0)?;
            assert_eq!(flat(&there.gather(&rows)?)?, flat(&picked)?);
            assert_eq!(there.gather(&[])?.dims(), [0, 7]);
            assert!(there.gather(&[50]).is_err());
            let x = random(1, &[2, 7]);
            assert!(linear(&x, &there, None).is_err(), "x is in main memory");
        }
        assert!(linear(&random(1, &[2, 7]).to_device(&cuda())?, &w, None).is_err());
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn uploads_arrive_on_cuda() -> Result<()> {
    let device = cuda();
    let device = device.as_cuda_device()?;
    // Two u32 are a word.
    for length in [0, 1, 2 * PIECE_WORDS, 2 * PIECE_WORDS + 1, 7 * PIECE_WORDS] {
        let numbers: Vec<u32> = (0..length as u32).collect();
        assert_eq!(upload(device, &numbers)?.to_vec1::<u32>()?, numbers);
    }
    let (reals, longs) = ([-0.0f32, f32::MAX], [i64::MIN, -1, i64::MAX]);
    assert_eq!(upload(device, &reals)?.to_vec1::<f32>()?, reals);
    assert_eq!(upload(device, &longs)?.to_vec1::<i64>()?, longs);
    // More than there are pieces are on their way before the first is looked at.
    let numbers = |first: u32| [first, first + 1, first + 2];
    let there = (0..3 * PIECES as u32)
        .map(|first| upload(device, &numbers(first)))
        .collect::<Result<Vec<_>>>()?;
    for (first, there) in (0..).zip(there) {
        assert_eq!(there.to_vec1::<u32>()?, numbers(first));
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn weights_larger_than_a_piece_arrive_on_cuda() -> Result<()> {
    let (rows, columns) = (PIECES + 1, 2 * PIECE_WORDS + 3);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let values = (0..rows * columns).map(|n| (n % 251) as f32);
        let w = FrozenWeight::from_values(rows, columns, dtype, values)?;
        for compute in [ComputeType::F32, ComputeType::Bf16] {
            let there = w.upload(&cuda(), compute)?.to_f32()?;
            let there = there.flatten_all()?.to_vec1::<f32>()?;
            assert!((0..).zip(there).all(|(n, value)| (n % 251) as f32 == value));
        }
    }
    Ok(())
}

const UNLIMITED: StepLimits = StepLimits {
    target_tokens: 7,
    gradient_norm: 0.0,
    loss: None,
    on_nonfinite: Reaction::EndRun,
    on_spike: Reaction::LeaveOut,
};

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn the_optimizer_on_cuda() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[331, 211], &[1], &[70_001]];
    let variables = |seed: u64, device: &Device| -> Result<Vec<Var>> {
        (seed..)
            .zip(shapes)
            .map(|(seed, shape)| Ok(Var::from_tensor(&random(seed, shape).to_device(device)?)?))
            .collect()
    };
    let run = |device: Device| -> Result<Vec<Vec<f32>>> {
        let (weights, first) = (variables(1, &device)?, variables(10, &device)?);
        let mut second = Vec::new();
        for moment in variables(20, &device)? {
            second.push(Var::from_tensor(&moment.as_tensor().sqr()?)?);
        }
        for step in 1..4 {
            let gradients = variables(30 * step, &device)?;
            let trained: Vec<_> = (0..shapes.len())
                .map(|i| TrainedWeight {
                    weight: &weights[i],
                    gradient: gradients[i].as_tensor(),
                    first: &first[i],
                    second: &second[i],
                })
                .collect();
            let s = AdamWStep {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.99,
                epsilon: 1e-8,
                weight_decay: 0.1,
                step,
            };
            adamw(&trained, &[], &UNLIMITED, &s)?;
        }
        weights
            .iter()
            .chain(&first)
            .chain(&second)
            .map(|t| Ok(t.flatten_all()?.to_vec1()?))
            .collect()
    };
    let (ours, theirs) = (run(cuda())?, run(Device::Cpu)?);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_close("weights and moments", ours, theirs, 1e-6);
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn verdicts_on_cuda() -> Result<()> {
    // Their sums are exact in any order, so that all the bits are the same.
    let values: [Vec<f32>; 2] = [vec![0.5; 100_003], vec![-2.0; 5]];
    let squared_norm = 0.25 * 100_003.0 + 4.0 * 5.0;
    let step = AdamWStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 1,
    };
    let run = |losses: &[f32], limits: &StepLimits| -> Result<(Verdict, bool)> {
        let device = cuda();
        let scalars = losses.iter().map(|loss| Tensor::new(*loss, &device));
        let scalars = scalars.collect::<candle_core::Result<Vec<_>>>()?;
        let mut variables = Vec::new();
        for values in &values {
            let gradient = Tensor::new(values.as_slice(), &device)?;
            let ones = || Var::ones(values.len(), DType::F32, &device);
            variables.push((gradient, [ones()?, ones()?, ones()?]));
        }
        let trained: Vec<_> = variables
            .iter()
            .map(|(gradient, [weight, first, second])| TrainedWeight {
                weight,
                gradient,
                first,
                second,
            })
            .collect();
        let verdict = adamw(&trained, &scalars, limits, &step)?;
        let mut moved = false;
        for variable in variables.iter().flat_map(|(_, variables)| variables) {
            let there = variable.to_vec1::<f32>()?;
            moved |= there.iter().any(|value| *value != 1.0);
        }
        Ok((verdict, moved))
    };
    let limited = StepLimits {
        loss: Some(3.0),
        gradient_norm: 0.37,
        ..UNLIMITED
    };
    let warned = StepLimits {
        on_spike: Reaction::Take,
        ..limited
    };
    for (losses, limits) in [
        (&[20.5, 0.25][..], &UNLIMITED),
        (&[][..], &UNLIMITED),
        (&[20.5, 0.25][..], &limited),
        (&[21.0][..], &limited),
        (&[20.0, 2.0][..], &limited),
        (&[20.0, 2.0][..], &warned),
    ] {
        let (verdict, moved) = run(losses, limits)?;
        let loss_sum: f64 = losses.iter().copied().map(f64::from).sum();
        assert_eq!(verdict, limits.judge(loss_sum, squared_norm));
        assert_eq!(moved, verdict.reaction == Reaction::Take);
    }
    for loss in [f32::NAN, f32::INFINITY] {
        let (verdict, moved) = run(&[1.0, loss], &warned)?;
        assert_eq!(verdict.fault, Some(Fault::NotFinite));
        assert_eq!((verdict.reaction, moved), (Reaction::EndRun, false));
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn norms_of_gradients_on_cuda() -> Result<()> {
    let gradient = random(1, &[100_003]);
    let there = gradient.to_device(&cuda())?;
    assert!((squared_norm(&there)? / squared_norm(&gradient)? - 1.0).abs() < 1e-12);
    let twice = add_onto(there.copy()?, &there)?;
    assert_eq!(
        twice.to_vec1::<f32>()?,
        (&gradient * 2.0)?.to_vec1::<f32>()?
    );
    let nan = Tensor::new(&[1f32, f32::NAN], &cuda())?;
    assert!(squared_norm(&nan)?.is_nan());
    let none = Tensor::zeros(0, DType::F32, &cuda())?;
    assert_eq!(squared_norm(&none)?, 0.0);
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn a_seed_delivers_its_gradient_on_cuda() -> Result<()> {
    let x = Var::from_tensor(&random(1, &[3, 5]).to_device(&cuda())?)?;
    let gradient = random(2, &[3, 5]).to_device(&cuda())?;
    let seed = seed_gradient(&(x.as_tensor() * 2.0)?, &gradient)?;
    assert_eq!(seed.to_scalar::<f32>()?, 0.0);
    let store = seed.backward()?;
    assert_eq!(
        store.get(&x).expect("x is tracked").to_vec2::<f32>()?,
        (gradient * 2.0)?.to_vec2::<f32>()?
    );
    Ok(())
}

#[test]
#[ignore = "needs a GPU or the stand-in of tests/cuda_stand_in"]
fn a_weight_is_widened_where_it_is() -> Result<()> {
    for w in frozen_weights(3, 5, 64) {
        for compute in [ComputeType::F32, ComputeType::Bf16] {
            let there = w.upload(&cuda(), compute)?;
            let wide = there.widened()?;
            assert!(wide.device().is_cuda());
            assert_eq!((wide.dtype(), wide.dims()), (DType::F32, &[5, 64][..]));
            let expected = there.to_tensor()?.to_dtype(DType::F32)?;
            assert_eq!(wide.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
            assert_eq!(there.to_f32()?.to_vec2::<f32>()?, wide.to_vec2::<f32>()?);
        }
    }
    Ok(())
}
