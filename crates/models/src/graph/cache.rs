//! Keys and values of what a sequence has seen.

use std::ops::Range;

use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};
use mlx_rs::ops::indexing::{IndexOp, TryIndexMutOp};
use mlx_rs::{Array, Dtype};

use crate::ModelError;

/// Tokens by which a cache grows. A longer step copies less often and holds more that is not used.
const BLOCK: usize = 256;

/// The keys and values of one layer: `[1, kv_heads, capacity, head_dim]` each, of which the first rows are in use.
///
/// Rows are written in place, which MLX does where nobody else holds the array. The views that attention reads are
/// gone once a step has been evaluated, so that the next step writes in place again. A clone holds the same arrays, and
/// whoever writes first gets arrays of its own.
#[derive(Clone, Debug, Default)]
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

/// The order of the elements of the blocks, as they name it: layer by layer keys and then values, `[heads, positions,
/// head_dim]` each.
pub(crate) const LAYOUT: &str = "heads-first";

/// The name of an element's type.
pub(crate) fn element(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Float16 => "f16",
        Dtype::Bfloat16 => "bf16",
        _ => "f32",
    }
}

impl KvCache {
    /// The elements of these positions, keys and then values.
    pub(crate) fn export(&self, range: &Range<usize>, bytes: &mut Vec<u8>) -> Result<(), ModelError> {
        fn of<E: NoUninit>(elements: &[E], bytes: &mut Vec<u8>) {
            bytes.extend_from_slice(bytemuck::cast_slice(elements));
        }
        for array in self.arrays() {
            let rows = array.index((.., .., range.start as i32..range.end as i32, ..));
            let rows = rows.contiguous()?;
            rows.eval()?;
            match rows.dtype() {
                Dtype::Float16 => of(rows.try_as_slice::<f16>()?, bytes),
                Dtype::Bfloat16 => of(rows.try_as_slice::<bf16>()?, bytes),
                _ => of(rows.try_as_slice::<f32>()?, bytes),
            }
        }
        Ok(())
    }

    /// Writes elements of `positions` behind the first `offset` rows: keys and then values, each `[1, kv_heads,
    /// positions, head_dim]`.
    pub(crate) fn import(
        &mut self,
        offset: usize,
        shape: [i32; 4],
        dtype: Dtype,
        elements: &[u8],
    ) -> Result<(), ModelError> {
        fn of<E: AnyBitPattern>(bytes: &[u8]) -> Vec<E> {
            let elements = bytes.chunks_exact(size_of::<E>());
            elements.map(bytemuck::pod_read_unaligned).collect()
        }
        let (keys, values) = elements.split_at(elements.len() / 2);
        let array = |bytes| match dtype {
            Dtype::Float16 => Array::from_slice(&of::<f16>(bytes), &shape),
            Dtype::Bfloat16 => Array::from_slice(&of::<bf16>(bytes), &shape),
            _ => Array::from_slice(&of::<f32>(bytes), &shape),
        };
        self.update(offset, &array(keys), &array(values))?;
        Ok(())
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
