//! MLX's affine quantization of floats.

use crate::{AffineTensor, CheckpointError, FloatType};

/// The smallest scale, as a number and not by its sign.
const SMALLEST_SCALE: f32 = 1e-7;

/// Values that are quantized by one thread at least: below, starting another costs more than it saves.
const VALUES_PER_THREAD: usize = 1 << 18;

impl AffineTensor {
    /// The bits that a number may have.
    pub const BITS: [u32; 6] = [2, 3, 4, 5, 6, 8];
    /// The numbers that may share a scale and a bias.
    pub const GROUP_SIZES: [u32; 3] = [32, 64, 128];

    /// Quantizes a row-major matrix as `mx.quantize` of MLX 0.32.2 does on a CPU, to the same bits.
    ///
    /// The end of a group's range that is farther from zero is the bias and is kept, the scale is changed so that zero
    /// is kept too, and the numbers between are rounded, ties to even. The scales and biases are rounded to `stored`
    /// afterwards, as MLX does for an array of that type.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Quantization`] for bits and group sizes that MLX does not have, for columns that are not whole
    /// groups, and for values that are not finite, which the integers could not stand for.
    pub fn quantize(
        values: &[f32],
        [rows, columns]: [usize; 2],
        bits: u32,
        group_size: u32,
        stored: FloatType,
    ) -> Result<Self, CheckpointError> {
        let refuse = |message: String| CheckpointError::Quantization {
            bits,
            group_size,
            message,
        };
        if !Self::BITS.contains(&bits) {
            return Err(refuse("bits may be 2, 3, 4, 5, 6 or 8".to_owned()));
        }
        if !Self::GROUP_SIZES.contains(&group_size) {
            return Err(refuse("groups may be of 32, 64 or 128".to_owned()));
        }
        if !columns.is_multiple_of(group_size as usize) {
            return Err(refuse(format!("{columns} columns are not whole groups")));
        }
        if rows.checked_mul(columns) != Some(values.len()) {
            let count = values.len();
            return Err(refuse(format!("{count} values are no {rows} x {columns} matrix")));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (row, column) = (at / columns, at % columns);
            let value = values[at];
            return Err(refuse(format!(
                "the value in row {row}, column {column} is {value}"
            )));
        }
        let group = group_size as usize;
        let groups = values.len() / group;
        let words = group * bits as usize / 32;
        let mut tensor = Self {
            packed: vec![0; groups * words],
            scales: vec![0.0; groups],
            biases: vec![0.0; groups],
            bits,
            group_size,
            rows,
            columns,
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = groups.div_ceil(threads).max(VALUES_PER_THREAD / group).max(1);
        std::thread::scope(|scope| {
            let shares = values
                .chunks(share * group)
                .zip(tensor.packed.chunks_mut(share * words))
                .zip(tensor.scales.chunks_mut(share))
                .zip(tensor.biases.chunks_mut(share));
            for (((values, packed), scales), biases) in shares {
                scope.spawn(move || {
                    let groups = values
                        .chunks_exact(group)
                        .zip(packed.chunks_exact_mut(words))
                        .zip(scales.iter_mut().zip(biases));
                    for ((values, packed), (scale, bias)) in groups {
                        let (exact_scale, exact_bias) = scale_and_bias(values, bits);
                        pack(values, exact_scale, exact_bias, bits, packed);
                        (*scale, *bias) = (stored.round(exact_scale), stored.round(exact_bias));
                    }
                });
            }
        });
        Ok(tensor)
    }
}

/// The largest number of so many bits.
fn largest(bits: u32) -> f32 {
    ((1_u32 << bits) - 1) as f32
}

fn scale_and_bias(values: &[f32], bits: u32) -> (f32, f32) {
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let step = ((max - min) / largest(bits)).max(SMALLEST_SCALE);
    let (edge, step) = if min.abs() > max.abs() {
        (min, step)
    } else {
        (max, -step)
    };
    // How many steps from the edge zero is.
    let zero = (edge / step).round_ties_even();
    if zero == 0.0 {
        (step, 0.0)
    } else {
        (edge / zero, edge)
    }
}

/// The numbers one after the other, the first in the lowest bits of the first word.
fn pack(values: &[f32], scale: f32, bias: f32, bits: u32, packed: &mut [u32]) {
    let largest = largest(bits);
    let mut waiting = 0_u64;
    let mut waiting_bits = 0;
    let mut words = packed.iter_mut();
    for &value in values {
        let number = ((value - bias) / scale).round_ties_even().max(0.0).min(largest);
        waiting |= u64::from(number as u32) << waiting_bits;
        waiting_bits += bits;
        if waiting_bits >= 32
            && let Some(word) = words.next()
        {
            *word = waiting as u32;
            waiting >>= 32;
            waiting_bits -= 32;
        }
    }
}
