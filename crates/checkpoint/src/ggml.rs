//! ggml's block formats and their values, as `ggml-quants.c` of llama.cpp defines them.

use std::fmt;

use half::{bf16, f16};

use crate::CheckpointError;

/// Elements in a super-block of the K formats.
const SUPER: usize = 256;

/// How a GGUF tensor packs its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of ggml")]
#[expect(non_camel_case_types, reason = "the names are those of ggml")]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl GgmlType {
    /// All that is supported.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The type of a number in a GGUF file.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// The name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// The names of all, for errors.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Elements in a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => SUPER,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Whether the elements are floats and not blocks of integers.
    pub fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// The values of whole blocks, as float32 and in ggml's own order of operations.
    ///
    /// # Errors
    ///
    /// Where the bytes are not whole blocks.
    pub fn dequantize(self, bytes: &[u8]) -> Result<Vec<f32>, CheckpointError> {
        if !bytes.len().is_multiple_of(self.block_bytes()) {
            return Err(CheckpointError::PartialBlock {
                ggml_type: self.name(),
                bytes: bytes.len(),
                block_bytes: self.block_bytes(),
            });
        }
        let blocks = bytes.chunks_exact(self.block_bytes());
        let mut values = vec![0.0; blocks.len() * self.block_len()];
        let block_fn = match self {
            Self::F32 => f32_block,
            Self::F16 => f16_block,
            Self::BF16 => bf16_block,
            Self::Q4_0 => q4_0_block,
            Self::Q4_1 => q4_1_block,
            Self::Q5_0 => q5_0_block,
            Self::Q5_1 => q5_1_block,
            Self::Q8_0 => q8_0_block,
            Self::Q2_K => q2_k_block,
            Self::Q3_K => q3_k_block,
            Self::Q4_K => q4_k_block,
            Self::Q5_K => q5_k_block,
            Self::Q6_K => q6_k_block,
        };
        for (block, values) in blocks.zip(values.chunks_exact_mut(self.block_len())) {
            block_fn(block, values);
        }
        Ok(values)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The half at a byte offset of a block.
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The high bits of the 5-bit formats.
pub(crate) fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn f32_block(block: &[u8], values: &mut [f32]) {
    values[0] = f32::from_bits(word_at(block, 0));
}

fn f16_block(block: &[u8], values: &mut [f32]) {
    values[0] = half_at(block, 0);
}

fn bf16_block(block: &[u8], values: &mut [f32]) {
    values[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
}

fn q4_0_block(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    for (j, byte) in block[2..].iter().enumerate() {
        values[j] = (f32::from(byte & 15) - 8.0) * d;
        values[j + 16] = (f32::from(byte >> 4) - 8.0) * d;
    }
}

fn q4_1_block(block: &[u8], values: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, byte) in block[4..].iter().enumerate() {
        values[j] = f32::from(byte & 15) * d + m;
        values[j + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// The 32 numbers of a 5-bit block from its high bits and its low nibbles.
pub(crate) fn five_bits(high: u32, low: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for j in 0..16 {
        q[j] = (low[j] & 15) | (((high >> j) as u8 & 1) << 4);
        q[j + 16] = (low[j] >> 4) | (((high >> (j + 16)) as u8 & 1) << 4);
    }
    q
}

fn q5_0_block(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    for (value, q) in values.iter_mut().zip(five_bits(word_at(block, 2), &block[6..])) {
        *value = (f32::from(q) - 16.0) * d;
    }
}

fn q5_1_block(block: &[u8], values: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (value, q) in values.iter_mut().zip(five_bits(word_at(block, 4), &block[8..])) {
        *value = f32::from(q) * d + m;
    }
}

fn q8_0_block(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    for (value, q) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(q.cast_signed()) * d;
    }
}

fn q2_k_block(block: &[u8], values: &mut [f32]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (group, values) in values.chunks_exact_mut(16).enumerate() {
        // 128 elements share 32 bytes: a pair of groups for each two bits of a byte.
        let (half, shift) = (group / 8, group % 8 / 2 * 2);
        let q = &qs[half * 32 + group % 2 * 16..][..16];
        let (scale, min) = (
            d * f32::from(scales[group] & 15),
            dmin * f32::from(scales[group] >> 4),
        );
        for (value, q) in values.iter_mut().zip(q) {
            *value = scale * f32::from((q >> shift) & 3) - min;
        }
    }
}

/// The sixteen 6-bit scales of a Q3_K block, 0 to 63.
fn q3_k_scales(packed: &[u8]) -> [u8; 16] {
    let mut scales = [0; 16];
    for (i, scale) in scales.iter_mut().enumerate() {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let high = (packed[8 + i % 4] >> (i / 4 * 2)) & 3;
        *scale = low | (high << 4);
    }
    scales
}

fn q3_k_block(block: &[u8], values: &mut [f32]) {
    let (mask, qs, d) = (&block[..32], &block[32..96], half_at(block, 108));
    let scales = q3_k_scales(&block[96..108]);
    for (group, values) in values.chunks_exact_mut(16).enumerate() {
        let (half, pair) = (group / 8, group % 8 / 2);
        let scale = d * (f32::from(scales[group]) - 32.0);
        for (j, value) in values.iter_mut().enumerate() {
            let byte = group % 2 * 16 + j;
            let low = (qs[half * 32 + byte] >> (pair * 2)) & 3;
            // A bit that is clear takes four away.
            let high = (mask[byte] >> (half * 4 + pair)) & 1;
            *value = scale * (f32::from(low) - if high == 0 { 4.0 } else { 0.0 });
        }
    }
}

/// The 6-bit scale and minimum of a sub-block of Q4_K and Q5_K.
pub(crate) fn scale_min(j: usize, packed: &[u8]) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    }
}

fn q4_k_block(block: &[u8], values: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (j, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(j, &block[4..16]);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (value, byte) in values.iter_mut().zip(&block[16 + j / 2 * 32..]) {
            *value = scale * f32::from((byte >> (j % 2 * 4)) & 15) - min;
        }
    }
}

fn q5_k_block(block: &[u8], values: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (j, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(j, &block[4..16]);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let low = &block[48 + j / 2 * 32..];
        for ((value, low), high) in values.iter_mut().zip(low).zip(&block[16..48]) {
            let q = ((low >> (j % 2 * 4)) & 15) | (((high >> j) & 1) << 4);
            *value = scale * f32::from(q) - min;
        }
    }
}

fn q6_k_block(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 208);
    for (group, values) in values.chunks_exact_mut(16).enumerate() {
        let (half, quarter) = (group / 8, group % 8 / 2);
        let low = &block[half * 64 + quarter % 2 * 32 + group % 2 * 16..];
        let high = &block[128 + half * 32 + group % 2 * 16..];
        let scale = d * f32::from(block[192 + group].cast_signed());
        for ((value, low), high) in values.iter_mut().zip(low).zip(high) {
            let q = ((low >> (quarter / 2 * 4)) & 15) | (((high >> (quarter * 2)) & 3) << 4);
            *value = scale * (f32::from(q) - 32.0);
        }
    }
}
