//! Scales and biases of groups, sixteen rows side by side.

use half::{bf16, f16};

use crate::simd::{LANES, Simd};

/// For each tile and group the scales and the biases of sixteen rows, in the smallest type that keeps their values.
///
/// Without biases the bias is the negated scale times half the range of the numbers, which is what symmetric formats
/// (Q4_0, Q5_0, Q8_0) have.
#[derive(Debug)]
pub(crate) enum Scales {
    F16(Vec<[f16; LANES]>, Option<Vec<[f16; LANES]>>),
    Bf16(Vec<[u16; LANES]>, Option<Vec<[u16; LANES]>>),
    F32(Vec<[f32; LANES]>, Option<Vec<[f32; LANES]>>),
}

/// Half the range of numbers of so many bits.
pub(crate) fn middle(bits: u32) -> f32 {
    (1_u32 << (bits - 1)) as f32
}

impl Scales {
    /// `scales` and `biases` are in the order of tiles, groups and lanes.
    pub(crate) fn new(bits: u32, scales: Vec<[f32; LANES]>, biases: Vec<[f32; LANES]>) -> Self {
        let all = || scales.iter().flatten().chain(biases.iter().flatten());
        let same = |kept: f32, value: f32| kept.to_bits() == value.to_bits();
        let symmetric = scales
            .iter()
            .flatten()
            .zip(biases.iter().flatten())
            .all(|(scale, bias)| *bias == -(scale * middle(bits)));
        let biases_if_needed = (!symmetric).then_some(&biases);
        if all().all(|&value| same(f16::from_f32(value).to_f32(), value)) {
            let narrow =
                |values: &Vec<[f32; LANES]>| values.iter().map(|lanes| lanes.map(f16::from_f32)).collect();
            Self::F16(narrow(&scales), biases_if_needed.map(narrow))
        } else if all().all(|&value| same(bf16::from_f32(value).to_f32(), value)) {
            let narrow = |values: &Vec<[f32; LANES]>| {
                values
                    .iter()
                    .map(|lanes| lanes.map(|value| bf16::from_f32(value).to_bits()))
                    .collect()
            };
            Self::Bf16(narrow(&scales), biases_if_needed.map(narrow))
        } else {
            Self::F32(scales, (!symmetric).then_some(biases))
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        fn of<T>(scales: &[T], biases: Option<&Vec<T>>) -> usize {
            size_of_val(scales) + biases.map_or(0, |biases| size_of_val(&**biases))
        }
        match self {
            Self::F16(scales, biases) => of(scales, biases.as_ref()),
            Self::Bf16(scales, biases) => of(scales, biases.as_ref()),
            Self::F32(scales, biases) => of(scales, biases.as_ref()),
        }
    }

    /// The scale and the bias of one row, of the group with this index.
    pub(crate) fn lane(&self, bits: u32, index: usize, lane: usize) -> (f32, f32) {
        let wide = |half: u16| f32::from_bits(u32::from(half) << 16);
        let (scale, bias) = match self {
            Self::F16(scales, biases) => (
                scales[index][lane].to_f32(),
                biases.as_ref().map(|biases| biases[index][lane].to_f32()),
            ),
            Self::Bf16(scales, biases) => (
                wide(scales[index][lane]),
                biases.as_ref().map(|biases| wide(biases[index][lane])),
            ),
            Self::F32(scales, biases) => (
                scales[index][lane],
                biases.as_ref().map(|biases| biases[index][lane]),
            ),
        };
        (scale, bias.unwrap_or(-(scale * middle(bits))))
    }

    /// The scales and biases of sixteen rows; no biases where these are the negated scales times half the range.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&self, s: S, index: usize) -> (S::F, Option<S::F>) {
        match self {
            Self::F16(scales, biases) => (
                s.load_f16(&scales[index]),
                biases.as_ref().map(|biases| s.load_f16(&biases[index])),
            ),
            Self::Bf16(scales, biases) => (
                s.load_bf16(&scales[index]),
                biases.as_ref().map(|biases| s.load_bf16(&biases[index])),
            ),
            Self::F32(scales, biases) => (
                s.load(&scales[index]),
                biases.as_ref().map(|biases| s.load(&biases[index])),
            ),
        }
    }
}

/// Each lane times half the range of numbers of `BITS` bits.
#[inline(always)]
pub(crate) fn times_middle<S: Simd, const BITS: usize>(s: S, x: S::I) -> S::I {
    match BITS {
        2 => s.shl::<1>(x),
        3 => s.shl::<2>(x),
        4 => s.shl::<3>(x),
        5 => s.shl::<4>(x),
        6 => s.shl::<5>(x),
        _ => s.shl::<7>(x),
    }
}
