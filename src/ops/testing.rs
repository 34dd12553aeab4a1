//! What every operation is tested for, in one call.

use super::{FrozenWeight, Quantization};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// An operation, or its slow composition, on the tensors under test.
pub(super) type Operation<'a> = &'a (dyn Fn(&[Tensor]) -> Result<Tensor> + Sync);

/// Reproducible values between -1 and 1.
pub(super) fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

/// Reproducible values to take gradients of.
pub(super) fn variable(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&random(seed, shape)).expect("a plain tensor")
}

/// The GPU on which tests run. They share it, and kernels that one has compiled.
#[cfg(feature = "cuda")]
pub(super) fn cuda() -> Device {
    static OPENED: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    let open = || {
        find_cuda_toolkit();
        super::cuda_device(0).expect("a GPU or the stand-in of tests/cuda_stand_in")
    };
    OPENED.get_or_init(open).clone()
}

/// Says where the headers are that kernels need.
#[cfg(feature = "cuda")]
pub(super) fn find_cuda_toolkit() {
    if let Some(toolkit) = std::env::var_os("CUDA_HOME") {
        super::set_cuda_toolkit(toolkit.into());
    }
}

/// A frozen weight of each type that can be stored, and a quantised one.
pub(super) fn frozen_weights(seed: u64, rows: usize, columns: usize) -> Vec<FrozenWeight> {
    let t = random(seed, &[rows, columns]);
    let stored = |dtype| FrozenWeight::from_tensor(&t.to_dtype(dtype)?);
    [
        stored(DType::F32),
        stored(DType::F16),
        stored(DType::BF16),
        stored(DType::F32).and_then(|w| w.quantized(Quantization::Nf4)),
    ]
    .into_iter()
    .collect::<Result<_>>()
    .expect("types that can be stored")
}

/// Checks an operation against its slow composition and finite differences, that it computes gradients exactly for the
/// arguments that are tracked, and that one and three threads give the same bits.
pub(super) fn check(arguments: &[Var], fast: Operation<'_>, slow: Operation<'_>, tolerance: f32) {
    let tracked = vec![true; arguments.len()];
    let ours = run(arguments, &tracked, fast);
    let theirs = run(arguments, &tracked, slow);
    assert_close("value", &ours.value, &theirs.value, tolerance);
    for (i, (ours, theirs)) in ours.gradients.iter().zip(&theirs.gradients).enumerate() {
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            panic!("argument {i} has no gradient");
        };
        assert_close(&format!("gradient {i}"), ours, theirs, tolerance);
    }
    check_differences(arguments, fast, &ours);
    check_subsets(arguments, fast, &ours);
    check_threads(|| run(arguments, &tracked, fast).bits());
}

/// Value and gradients of one run; the loss is the sum of the result times fixed random coefficients.
pub(super) struct Run {
    pub(super) value: Vec<f32>,
    pub(super) gradients: Vec<Option<Vec<f32>>>,
    loss: f64,
}

impl Run {
    pub(super) fn bits(&self) -> Vec<u32> {
        let gradients = self.gradients.iter().flatten().flatten();
        self.value
            .iter()
            .chain(gradients)
            .map(|value| value.to_bits())
            .collect()
    }
}

pub(super) fn run(arguments: &[Var], tracked: &[bool], operation: Operation<'_>) -> Run {
    let tensors: Vec<Tensor> = arguments
        .iter()
        .zip(tracked)
        .map(|(argument, &tracked)| match tracked {
            true => argument.as_tensor().clone(),
            false => argument.as_detached_tensor(),
        })
        .collect();
    let result = operation(&tensors).expect("the operation runs");
    assert_eq!(
        result.track_op(),
        tracked.contains(&true),
        "history where nothing is tracked, or none"
    );
    let coefficients = random(99, result.dims());
    let loss = (&result * &coefficients)
        .and_then(|product| product.sum_all())
        .expect("a loss");
    let store = loss.backward().expect("a backward");
    let flat = |t: &Tensor| {
        t.flatten_all()
            .and_then(|t| t.to_vec1::<f32>())
            .expect("f32 values")
    };
    let value = flat(&result);
    let loss = value
        .iter()
        .zip(flat(&coefficients))
        .map(|(v, c)| f64::from(*v) * f64::from(c))
        .sum();
    let gradients = tensors.iter().map(|t| store.get(t).map(flat)).collect();
    Run {
        value,
        gradients,
        loss,
    }
}

pub(super) fn assert_close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths differ");
    // The values that go in are of order one, so rounding leaves something where the exact value is zero.
    let size = theirs
        .iter()
        .fold(0.1f32, |size, value| size.max(value.abs()));
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * size,
            "{what}[{i}]: {a} against {b}, largest {size}"
        );
    }
}

/// A few entries of each argument, moved up and down.
fn check_differences(arguments: &[Var], operation: Operation<'_>, run_here: &Run) {
    const STEP: f32 = 1e-2;
    for (i, gradient) in run_here.gradients.iter().enumerate() {
        let gradient = gradient.as_ref().expect("every argument is tracked");
        let size = gradient
            .iter()
            .fold(1e-2f32, |size, value| size.max(value.abs()));
        let stride = (gradient.len() / 5).max(1);
        for entry in (0..gradient.len()).step_by(stride) {
            let loss = |step: f32| {
                let mut values = arguments[i]
                    .flatten_all()
                    .and_then(|t| t.to_vec1::<f32>())
                    .expect("f32 values");
                values[entry] += step;
                let mut moved = arguments.to_vec();
                moved[i] =
                    Var::from_vec(values, arguments[i].shape(), &Device::Cpu).expect("same shape");
                run(&moved, &vec![true; moved.len()], operation).loss
            };
            let difference = (loss(STEP) - loss(-STEP)) / f64::from(2.0 * STEP);
            let error = (difference - f64::from(gradient[entry])).abs();
            assert!(
                error <= 2e-2 * f64::from(size),
                "gradient {i}[{entry}] is {} but the difference {difference}",
                gradient[entry]
            );
        }
    }
}

/// With one argument tracked, it has its gradient and no other has one; with none, there is no history.
fn check_subsets(arguments: &[Var], operation: Operation<'_>, all: &Run) {
    for only in 0..arguments.len() {
        let tracked: Vec<bool> = (0..arguments.len()).map(|i| i == only).collect();
        let run = run(arguments, &tracked, operation);
        for (i, gradient) in run.gradients.iter().enumerate() {
            let wanted = all.gradients[i].as_ref().filter(|_| i == only);
            assert_eq!(
                gradient.as_ref(),
                wanted,
                "gradient {i} with only {only} tracked"
            );
        }
    }
    let tensors: Vec<Tensor> = arguments.iter().map(Var::as_detached_tensor).collect();
    assert!(!operation(&tensors).expect("the operation runs").track_op());
}

/// The same bits from one thread and from three.
pub(super) fn check_threads(bits: impl Fn() -> Vec<u32> + Sync) {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a thread pool");
        pool.install(&bits)
    };
    assert!(
        with(1) == with(3),
        "the bits depend on the number of threads"
    );
}
