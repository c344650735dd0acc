//! Keys and values of what a sequence has seen.

use mlx_rs::Array;
use mlx_rs::ops::indexing::{IndexOp, TryIndexMutOp};

use crate::ModelError;

/// Tokens by which a cache grows. A longer step copies less often and holds more that is not used.
const BLOCK: usize = 256;

/// The keys and values of one layer: `[1, kv_heads, capacity, head_dim]` each, of which the first rows are in use.
///
/// Rows are written in place, which MLX does where nobody else holds the array. The views that attention reads are
/// gone once a step has been evaluated, so that the next step writes in place again.
#[derive(Debug, Default)]
pub(crate) struct KvCache {
    keys: Option<Array>,
    values: Option<Array>,
}

impl KvCache {
    /// Writes the keys and values of new tokens, `[1, kv_heads, new, head_dim]`, behind the first `offset` rows and
    /// returns all that is in use.
    pub(crate) fn update(
        &mut self,
        offset: usize,
        keys: &Array,
        values: &Array,
    ) -> Result<(Array, Array), ModelError> {
        let keys = write(&mut self.keys, offset, keys)?;
        let values = write(&mut self.values, offset, values)?;
        Ok((keys, values))
    }

    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.keys.iter().chain(&self.values)
    }
}

fn write(buffer: &mut Option<Array>, offset: usize, new: &Array) -> Result<Array, ModelError> {
    let shape = new.shape();
    let end = offset + shape[2] as usize;
    let capacity = buffer.as_ref().map_or(0, |buffer| buffer.shape()[2] as usize);
    if end > capacity {
        let grown = end.next_multiple_of(BLOCK);
        let rest = [shape[0], shape[1], (grown - offset) as i32, shape[3]];
        let rest = mlx_rs::ops::zeros_dtype(&rest, new.dtype())?;
        *buffer = Some(match buffer.take().filter(|_| offset > 0) {
            // What lies behind the offset was given up and is not copied.
            Some(old) => mlx_rs::ops::concatenate(&[old.index((.., .., ..offset as i32, ..)), rest], 2)?,
            None => rest,
        });
    }
    let buffer = buffer.get_or_insert_with(|| new.clone());
    buffer.try_index_mut((.., .., offset as i32..end as i32, ..), new)?;
    Ok(buffer.index((.., .., ..end as i32, ..)))
}
