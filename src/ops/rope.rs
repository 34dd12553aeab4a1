//! Rotary position embedding.

use super::buffers;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, matrix_shape};
use super::graph::{Backward, record};
use super::vectorised::vectorised;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows that one task turns.
const TASK_ROWS: usize = 64;

/// Cosines and sines of the angles of each row, `(rows, head_dim / 2)`: the positions of a batch are already looked up.
/// Cloning shares it.
#[derive(Clone)]
pub struct RotaryTable(Arc<Angles>);

struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    rows: usize,
    head_dim: usize,
    #[cfg(feature = "cuda")]
    on_device: cuda::Angles,
}

impl RotaryTable {
    /// A table of `(rows, head_dim / 2)` cosines and sines.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, head_dim: usize) -> Result<Self> {
        let half = head_dim / 2;
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::new(format!(
                "`rope` turns pairs: a head of {head_dim} values cannot be split into them"
            )));
        }
        if cos.len() != sin.len() || !cos.len().is_multiple_of(half) {
            return Err(Error::new(format!(
                "`rope` needs as many cosines as sines, a multiple of {half}: there are {} and {}",
                cos.len(),
                sin.len()
            )));
        }
        let rows = cos.len() / half;
        Ok(Self(Arc::new(Angles {
            cos,
            sin,
            rows,
            head_dim,
            #[cfg(feature = "cuda")]
            on_device: cuda::Angles::default(),
        })))
    }

    /// Puts it on `device`, if that is a GPU, where it stays. It would come there by itself, but behind the work of the
    /// blocks before the first that asks for it.
    #[cfg(feature = "cuda")]
    pub(crate) fn upload(&self, device: &Device) -> Result<()> {
        let Device::Cuda(device) = device else {
            return Ok(());
        };
        let Angles {
            cos,
            sin,
            on_device,
            ..
        } = &*self.0;
        on_device.on(device, cos, sin).map(drop)
    }

    /// Rows: tokens of the batch.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Values of a head.
    pub fn head_dim(&self) -> usize {
        self.0.head_dim
    }
}

/// Turns each pair `(x[i], x[i + head_dim / 2])` of each head by the angle of its row.
///
/// `x` is `(rows, heads · head_dim)` with the rows of the table; the halves are paired as in Hugging Face's
/// `rotate_half`. The gradient is turned back by the same angles; nothing is saved but the table.
pub fn rope(x: &Tensor, table: &RotaryTable) -> Result<Tensor> {
    let (rows, features) = matrix_shape(NAME, "x", x)?;
    if rows != table.rows() || features % table.head_dim() != 0 {
        return Err(Error::new(format!(
            "`{NAME}`: x is ({rows}, {features}) but the table has {} rows for heads of {}",
            table.rows(),
            table.head_dim()
        )));
    }
    let x = &x.contiguous()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let y = turned_on_cuda(x, table, false)?;
        let table = table.clone();
        return record([x], y, (rows, features), Rope { table });
    }
    let y = turned(&Floats::of(NAME, "x", x)?, features, table, 1.0);
    record(
        [x],
        y,
        (rows, features),
        Rope {
            table: table.clone(),
        },
    )
}

const NAME: &str = "rope";

struct Rope {
    table: RotaryTable,
}

impl Backward<1> for Rope {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        debug_assert!(x.track_op());
        Ok([Some(rope_gradient(gradient, &self.table)?)])
    }
}

/// The gradient of [`rope`]: `dy` turned back.
pub(crate) fn rope_gradient(dy: &Tensor, table: &RotaryTable) -> Result<Tensor> {
    let (rows, features) = matrix_shape(NAME, "the gradient", dy)?;
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return Ok(turned_on_cuda(&dy, table, true)?.into_tensor((rows, features)));
    }
    let dx = turned(
        &Floats::of(NAME, "the gradient", &dy)?,
        features,
        table,
        -1.0,
    );
    Ok(Tensor::from_vec(dx, (rows, features), &Device::Cpu)?)
}

#[cfg(feature = "cuda")]
fn turned_on_cuda(x: &Tensor, table: &RotaryTable, backward: bool) -> Result<cuda::Output> {
    let Angles {
        cos,
        sin,
        head_dim,
        on_device,
        ..
    } = &*table.0;
    cuda::rope(x, cos, sin, on_device, *head_dim, backward)
}

/// `x` turned forward (`direction` 1) or back (-1).
fn turned(x: &[f32], features: usize, table: &RotaryTable, direction: f32) -> Vec<f32> {
    let mut y = buffers::take(x.len());
    let Angles {
        cos, sin, head_dim, ..
    } = &*table.0;
    if features > 0 {
        let angles = TASK_ROWS * head_dim / 2;
        x.par_chunks(TASK_ROWS * features)
            .zip(y.par_chunks_mut(TASK_ROWS * features))
            .zip(cos.par_chunks(angles).zip(sin.par_chunks(angles)))
            .for_each(|((x, y), (cos, sin))| turn(x, y, features, cos, sin, *head_dim, direction));
    }
    y
}

vectorised! {
    fn turn(x: &[f32], y: &mut [f32], features: usize, cos: &[f32], sin: &[f32], head_dim: usize, direction: f32) {
        let half = head_dim / 2;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        let rows = x.chunks_exact(features).zip(y.chunks_exact_mut(features));
        for ((x, y), (cos, sin)) in rows.zip(angles) {
            for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                let ((x_low, x_high), (y_low, y_high)) = (x.split_at(half), y.split_at_mut(half));
                for i in 0..half {
                    let sin = sin[i] * direction;
                    y_low[i] = x_low[i] * cos[i] - x_high[i] * sin;
                    y_high[i] = x_high[i] * cos[i] + x_low[i] * sin;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, random, variable};
    use candle_core::D;

    fn table(rows: usize, head_dim: usize) -> Result<RotaryTable> {
        let angles = random(7, &[rows * head_dim / 2]).to_vec1::<f32>()?;
        let (cos, sin) = angles
            .iter()
            .map(|angle| (angle.cos(), angle.sin()))
            .unzip();
        RotaryTable::new(cos, sin, head_dim)
    }

    /// Hugging Face: `x * cos + rotate_half(x) * sin`.
    fn slow(x: &Tensor, table: &RotaryTable) -> Result<Tensor> {
        let (rows, half) = (table.rows(), table.head_dim() / 2);
        let heads = x.reshape((rows, (), 2 * half))?;
        let wide = |values: &[f32]| -> Result<Tensor> {
            let angles = Tensor::from_slice(values, (rows, 1, half), &Device::Cpu)?;
            Ok(Tensor::cat(&[&angles, &angles], D::Minus1)?)
        };
        let (low, high) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
        let rotated = Tensor::cat(&[&high.neg()?, &low], D::Minus1)?;
        let turned = heads.broadcast_mul(&wide(&table.0.cos)?)?
            + rotated.broadcast_mul(&wide(&table.0.sin)?)?;
        Ok(turned?.reshape(x.shape())?)
    }

    #[test]
    fn equals_its_composition() -> Result<()> {
        for (rows, heads, head_dim) in [(1, 1, 2), (1, 3, 64), (131, 3, 22), (67, 1, 64)] {
            let table = table(rows, head_dim)?;
            let x = [variable(1, &[rows, heads * head_dim])];
            check(&x, &|t| rope(&t[0], &table), &|t| slow(&t[0], &table), 1e-6);
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() -> Result<()> {
        let error = rope(&random(1, &[3, 8]), &table(2, 4)?).expect_err("3 rows are not 2");
        assert_eq!(
            error.to_string(),
            "`rope`: x is (3, 8) but the table has 2 rows for heads of 4"
        );
        assert!(rope(&random(1, &[2, 6]), &table(2, 4)?).is_err());
        assert!(RotaryTable::new(vec![0.0; 3], vec![0.0; 3], 3).is_err());
        assert!(RotaryTable::new(vec![0.0; 3], vec![0.0; 3], 4).is_err());
        assert!(RotaryTable::new(vec![0.0; 4], vec![0.0; 2], 4).is_err());
        Ok(())
    }
}
