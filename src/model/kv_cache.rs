//! Keys and values of the rows a generation has seen, block by block.

use super::placement::Placement;
use crate::{Error, Result};
use candle_core::Tensor;

/// One cache per block, with room for a fixed number of rows.
pub struct KvCache {
    blocks: Vec<BlockCache>,
    length: usize,
    capacity: usize,
}

/// Keys (rotated) and values of one block, `(capacity, key_value_heads · head_dim)` each.
pub struct BlockCache {
    keys: Tensor,
    values: Tensor,
    length: usize,
}

impl KvCache {
    /// An empty cache for `capacity` rows of `width` values, where the model is and in the type of its activations.
    pub(super) fn new(
        blocks: usize,
        capacity: usize,
        width: usize,
        placement: &Placement,
    ) -> Result<Self> {
        let shape = (capacity, width);
        let empty = || Tensor::zeros(shape, placement.activations(), &placement.device);
        let blocks = (0..blocks)
            .map(|_| {
                Ok(BlockCache {
                    keys: empty()?,
                    values: empty()?,
                    length: 0,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            blocks,
            length: 0,
            capacity,
        })
    }

    /// Number of rows held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no row is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Number of rows there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for `rows` rows in all. What is held stays; a cache that has to grow at least doubles.
    pub fn reserve(&mut self, rows: usize) -> Result<()> {
        if rows <= self.capacity {
            return Ok(());
        }
        let capacity = rows.max(2 * self.capacity);
        for block in &mut self.blocks {
            block.keys = grown(&block.keys, block.length, capacity)?;
            block.values = grown(&block.values, block.length, capacity)?;
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Keeps the first `length` rows only.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        for block in &mut self.blocks {
            block.length = self.length;
        }
    }

    pub(super) fn block(&mut self, index: usize) -> &mut BlockCache {
        &mut self.blocks[index]
    }

    pub(super) fn advance(&mut self, rows: usize) {
        self.length += rows;
    }
}

impl BlockCache {
    /// Adds new rows and returns all keys and values held so far.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let new = keys.dim(0)?;
        if self.length + new > self.keys.dim(0)? {
            return Err(Error::new(format!(
                "the cache has room for {} rows, {} are needed",
                self.keys.dim(0)?,
                self.length + new
            )));
        }
        self.keys
            .slice_set(&keys.detach().contiguous()?, 0, self.length)?;
        self.values
            .slice_set(&values.detach().contiguous()?, 0, self.length)?;
        self.length += new;
        Ok((
            self.keys.narrow(0, 0, self.length)?,
            self.values.narrow(0, 0, self.length)?,
        ))
    }
}

/// The first `length` of `rows`, with room for `capacity`.
fn grown(rows: &Tensor, length: usize, capacity: usize) -> Result<Tensor> {
    let grown = Tensor::zeros((capacity, rows.dim(1)?), rows.dtype(), rows.device())?;
    if length > 0 {
        grown.slice_set(&rows.narrow(0, 0, length)?, 0, 0)?;
    }
    Ok(grown)
}
