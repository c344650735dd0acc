//! ggml's blocks in the layout that MLX computes with.

use half::f16;

use crate::ggml::{five_bits, half_at, scale_min, word_at};
use crate::{CheckpointError, GgmlType};

/// A matrix in MLX's affine quantization: `value = scale * q + bias`, with one scale and one bias a group.
///
/// Numbers of 4 and 8 bits lie in 32-bit words, the first in the lowest bits; numbers of 5 bits are one stream of bits
/// in the same order, eight to five bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct AffineTensor {
    /// The numbers, `rows` x `columns * bits / 32`.
    pub packed: Vec<u32>,
    /// The scales, `rows` x `columns / group_size`.
    pub scales: Vec<f32>,
    /// The biases, as many as scales.
    pub biases: Vec<f32>,
    /// Bits of a number.
    pub bits: u32,
    /// Numbers that share a scale and a bias.
    pub group_size: u32,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
}

/// What every format that maps losslessly has: groups of 32.
const GROUP: usize = 32;

impl AffineTensor {
    /// The bits and the group size of what [`from_ggml`](Self::from_ggml) makes of a type, or `None` where it makes nothing.
    pub fn form_of(ggml_type: GgmlType) -> Option<(u32, u32)> {
        let bits = match ggml_type {
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q4_K => 4,
            GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q5_K => 5,
            GgmlType::Q8_0 => 8,
            _ => return None,
        };
        Some((bits, GROUP as u32))
    }

    /// Converts blocks of ggml, or `None` where MLX has no layout that keeps every value: Q2_K, Q3_K and Q6_K have
    /// groups of 16, and floats are no blocks.
    ///
    /// The integers are the same and scales and biases are float32, so that a value differs from
    /// [`GgmlType::dequantize`] at most by the rounding of one float32 addition: `d * (q - 8)` there is
    /// `d * q + (-8 * d)` here.
    ///
    /// # Errors
    ///
    /// Where the bytes are not `rows * columns` elements in whole blocks.
    pub fn from_ggml(
        ggml_type: GgmlType,
        bytes: &[u8],
        rows: usize,
        columns: usize,
    ) -> Result<Option<Self>, CheckpointError> {
        let Some((bits, _)) = Self::form_of(ggml_type) else {
            return Ok(None);
        };
        check_blocks(ggml_type, bytes, rows, columns)?;
        let mut writer = Writer::new(rows * columns / GROUP, bits);
        for block in bytes.chunks_exact(ggml_type.block_bytes()) {
            writer.block(ggml_type, block);
        }
        Ok(Some(writer.into_tensor(bits, rows, columns)))
    }

    /// The bits of what [`rounded_from_ggml`](Self::rounded_from_ggml) makes of a type, or `None` where it makes nothing.
    pub fn rounded_form_of(ggml_type: GgmlType) -> Option<(u32, u32)> {
        let eight = (!ggml_type.is_float()).then_some((8, GROUP as u32));
        Self::form_of(ggml_type).or(eight)
    }

    /// Converts blocks of ggml so that they take little more memory than in the file, for who computes with activations of 8
    /// bits, beside whose rounding this one is small; `None` where they are floats.
    ///
    /// Scales and biases are rounded to float16: those of Q4_K and Q5_K are products of two numbers and have more bits. Q2_K,
    /// Q3_K and Q6_K, which have groups of 16, become numbers of 8 bits in groups of 32 around zero, as Q8_0 has them, which is
    /// at most 1/254 of the group's largest value away.
    ///
    /// # Errors
    ///
    /// As [`from_ggml`](Self::from_ggml).
    pub fn rounded_from_ggml(
        ggml_type: GgmlType,
        bytes: &[u8],
        rows: usize,
        columns: usize,
    ) -> Result<Option<Self>, CheckpointError> {
        if let Some(mut tensor) = Self::from_ggml(ggml_type, bytes, rows, columns)? {
            for value in tensor.scales.iter_mut().chain(&mut tensor.biases) {
                *value = f16::from_f32(*value).to_f32();
            }
            return Ok(Some(tensor));
        }
        let Some((bits, _)) = Self::rounded_form_of(ggml_type) else {
            return Ok(None);
        };
        check_blocks(ggml_type, bytes, rows, columns)?;
        let mut writer = Writer::new(rows * columns / GROUP, bits);
        for block in bytes.chunks_exact(ggml_type.block_bytes()) {
            let values = ggml_type.dequantize(block)?;
            values
                .chunks_exact(GROUP)
                .for_each(|values| writer.eights(values));
        }
        Ok(Some(writer.into_tensor(bits, rows, columns)))
    }

    /// The values, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let bits = self.bits as usize;
        let number = |index: usize| {
            let (word, shift) = (index * bits / 32, index * bits % 32);
            let low = self.packed[word] >> shift;
            let high = if shift + bits > 32 {
                self.packed[word + 1] << (32 - shift)
            } else {
                0
            };
            (low | high) & ((1 << bits) - 1)
        };
        (0..self.rows * self.columns)
            .map(|index| {
                let group = index / self.group_size as usize;
                self.scales[group] * number(index) as f32 + self.biases[group]
            })
            .collect()
    }
}

/// Refuses bytes that are not the whole blocks of a matrix.
fn check_blocks(
    ggml_type: GgmlType,
    bytes: &[u8],
    rows: usize,
    columns: usize,
) -> Result<(), CheckpointError> {
    let expected = rows * columns / ggml_type.block_len() * ggml_type.block_bytes();
    if bytes.len() == expected && columns.is_multiple_of(ggml_type.block_len()) {
        return Ok(());
    }
    Err(CheckpointError::PartialBlock {
        ggml_type: ggml_type.name(),
        bytes: bytes.len(),
        block_bytes: ggml_type.block_bytes(),
    })
}

struct Writer {
    packed: Vec<u32>,
    scales: Vec<f32>,
    biases: Vec<f32>,
}

impl Writer {
    fn new(groups: usize, bits: u32) -> Self {
        Self {
            packed: Vec::with_capacity(groups * bits as usize),
            scales: Vec::with_capacity(groups),
            biases: Vec::with_capacity(groups),
        }
    }

    fn into_tensor(self, bits: u32, rows: usize, columns: usize) -> AffineTensor {
        AffineTensor {
            packed: self.packed,
            scales: self.scales,
            biases: self.biases,
            bits,
            group_size: GROUP as u32,
            rows,
            columns,
        }
    }

    /// Rounds a group to numbers of 8 bits, 128 of which is zero, with a scale that is a float16.
    fn eights(&mut self, values: &[f32]) {
        let most = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let mut scale = f16::from_f32(most / 127.0);
        if scale.to_f32() * 127.0 < most {
            // Rounded down it would not reach the largest value: the next larger.
            scale = f16::from_bits(scale.to_bits() + 1);
        }
        let scale = scale.to_f32();
        self.group(scale, -128.0 * scale);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let number = |value: f32| ((value * inverse).round_ties_even().clamp(-128.0, 127.0) + 128.0) as u32;
        self.packed.extend(values.chunks_exact(4).map(|four| {
            four.iter()
                .rev()
                .fold(0, |word, &value| word << 8 | number(value))
        }));
    }

    fn group(&mut self, scale: f32, bias: f32) {
        self.scales.push(scale);
        self.biases.push(bias);
    }

    fn block(&mut self, ggml_type: GgmlType, block: &[u8]) {
        match ggml_type {
            GgmlType::Q4_0 => {
                let d = half_at(block, 0);
                self.group(d, -8.0 * d);
                self.nibbles(&block[2..]);
            }
            GgmlType::Q4_1 => {
                self.group(half_at(block, 0), half_at(block, 2));
                self.nibbles(&block[4..]);
            }
            GgmlType::Q5_0 => {
                let d = half_at(block, 0);
                self.group(d, -16.0 * d);
                self.fives(&five_bits(word_at(block, 2), &block[6..]));
            }
            GgmlType::Q5_1 => {
                self.group(half_at(block, 0), half_at(block, 2));
                self.fives(&five_bits(word_at(block, 4), &block[8..]));
            }
            GgmlType::Q8_0 => {
                let d = half_at(block, 0);
                self.group(d, -128.0 * d);
                // Signed to offset numbers: the top bit turned over in each byte.
                self.packed.extend(
                    block[2..]
                        .chunks_exact(4)
                        .map(|four| word_at(four, 0) ^ 0x8080_8080),
                );
            }
            // `from_ggml` lets only these two others pass.
            _ => self.super_block(ggml_type, block),
        }
    }

    fn super_block(&mut self, ggml_type: GgmlType, block: &[u8]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        for j in 0..8 {
            let (scale, min) = scale_min(j, &block[4..16]);
            self.group(d * f32::from(scale), -(dmin * f32::from(min)));
            let shift = j % 2 * 4;
            let mut q = [0_u8; GROUP];
            if ggml_type == GgmlType::Q4_K {
                for (q, byte) in q.iter_mut().zip(&block[16 + j / 2 * 32..]) {
                    *q = (byte >> shift) & 15;
                }
                self.fours(&q);
            } else {
                for ((q, low), high) in q.iter_mut().zip(&block[48 + j / 2 * 32..]).zip(&block[16..48]) {
                    *q = ((low >> shift) & 15) | (((high >> j) & 1) << 4);
                }
                self.fives(&q);
            }
        }
    }

    /// 16 bytes whose low nibbles are the first half of the group and whose high nibbles are the second.
    fn nibbles(&mut self, bytes: &[u8]) {
        for shift in [0, 4] {
            for eight in bytes.chunks_exact(8) {
                let word = eight
                    .iter()
                    .rev()
                    .fold(0_u32, |word, byte| word << 4 | u32::from((byte >> shift) & 15));
                self.packed.push(word);
            }
        }
    }

    fn fours(&mut self, q: &[u8; GROUP]) {
        for eight in q.chunks_exact(8) {
            self.packed
                .push(eight.iter().rev().fold(0, |word, &q| word << 4 | u32::from(q)));
        }
    }

    fn fives(&mut self, q: &[u8; GROUP]) {
        let mut bytes = [0_u8; 20];
        for (eight, five) in q.chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
            let stream = eight
                .iter()
                .rev()
                .fold(0_u64, |stream, &q| stream << 5 | u64::from(q));
            five.copy_from_slice(&stream.to_le_bytes()[..5]);
        }
        self.packed
            .extend(bytes.chunks_exact(4).map(|four| word_at(four, 0)));
    }
}
