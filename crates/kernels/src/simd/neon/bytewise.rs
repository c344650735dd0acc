//! Products of bytes, where the instruction sets of Arm differ.
//!
//! A register has a step of four columns of four rows, byte by byte. The instructions that multiply four bytes and sum them
//! take the activations of a step, which are the same for all rows, as one of the four quarters of a register. They have
//! no intrinsics on the stable compiler yet.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "the names begin with what they are")
)]
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use super::{Integers, Neon};
use crate::simd::{Bytes, Kernel};

/// How bytes are multiplied.
pub(crate) trait Bytewise: Copy {
    /// See [`Simd::TOGETHER`](crate::simd::Simd::TOGETHER).
    const TOGETHER: usize;

    /// Runs a kernel; an [`Isa`](crate::Isa) of this level exists only where the processor has the instructions.
    fn run<K: Kernel>(kernel: K) -> K::Output;

    /// See [`Simd::dots`](crate::simd::Simd::dots).
    fn dots<const BITS: usize, const ROWS: usize>(
        proof: Neon<Self>,
        starts: [Integers; ROWS],
        weights: &[Integers; 8],
        x: &[Bytes; ROWS],
    ) -> [Integers; ROWS];
}

/// Products of 16 bits, as every aarch64 has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widening;

/// `sdot`, of signed bytes with signed ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DotProduct;

/// `usdot`, of unsigned bytes with signed ones, which came with the products of matrices (i8mm).
#[derive(Clone, Copy, Debug)]
pub(crate) struct MixedSigns;

/// Calls what the token proves to be there.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: the token exists only where the processor has the instructions, and the pointers are of arrays of
        // the length that is read.
        unsafe { $call }
    };
}

/// Runs a kernel, compiled for some features.
macro_rules! run_with {
    ($features:literal, $bytewise:ty, $kernel:expr) => {{
        #[inline(never)]
        #[target_feature(enable = $features)]
        fn compiled<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Neon::<$bytewise>(PhantomData))
        }
        // SAFETY: an `Isa` of this level is made only where the processor reports these features.
        unsafe { compiled($kernel) }
    }};
}

impl Bytewise for Widening {
    const TOGETHER: usize = 1;

    fn run<K: Kernel>(kernel: K) -> K::Output {
        run_with!("neon", Widening, kernel)
    }

    #[inline(always)]
    fn dots<const BITS: usize, const ROWS: usize>(
        _: Neon<Self>,
        starts: [Integers; ROWS],
        weights: &[Integers; 8],
        x: &[Bytes; ROWS],
    ) -> [Integers; ROWS] {
        // Products are at most 127 * (2^BITS - 1), those of eight bits as signed numbers 127 * 128: the products of a
        // column fit 16 bits together for so many steps.
        let together = match BITS {
            ..=5 => 8,
            6 => 4,
            _ => 2,
        };
        let mut sums = signed_starts::<BITS, ROWS>(starts, x);
        for (sums, x) in sums.iter_mut().zip(x) {
            for (first, weights) in weights.chunks_exact(together).enumerate() {
                have!({
                    let mut low = [vdupq_n_s16(0); 4];
                    let mut high = [vdupq_n_s16(0); 4];
                    for (step, weights) in weights.iter().enumerate() {
                        let x = vreinterpretq_s8_s32(vdupq_n_s32(x.step(first * together + step)));
                        let weights = as_signed::<BITS>(weights);
                        for (quarter, weights) in weights.into_iter().enumerate() {
                            let weights = vreinterpretq_s8_s32(weights);
                            low[quarter] = vmlal_s8(low[quarter], vget_low_s8(weights), vget_low_s8(x));
                            high[quarter] = vmlal_high_s8(high[quarter], weights, x);
                        }
                    }
                    for (quarter, sum) in sums.iter_mut().enumerate() {
                        let (low, high) = (vpaddlq_s16(low[quarter]), vpaddlq_s16(high[quarter]));
                        *sum = vaddq_s32(*sum, vpaddq_s32(low, high));
                    }
                });
            }
        }
        sums
    }
}

impl Bytewise for DotProduct {
    const TOGETHER: usize = 4;

    fn run<K: Kernel>(kernel: K) -> K::Output {
        run_with!("neon,dotprod", DotProduct, kernel)
    }

    #[inline(always)]
    fn dots<const BITS: usize, const ROWS: usize>(
        _: Neon<Self>,
        starts: [Integers; ROWS],
        weights: &[Integers; 8],
        x: &[Bytes; ROWS],
    ) -> [Integers; ROWS] {
        let mut sums = signed_starts::<BITS, ROWS>(starts, x);
        let [low, high] = halves(x);
        have!({
            sdots::<0, ROWS>(&mut sums, &as_signed::<BITS>(&weights[0]), &low);
            sdots::<1, ROWS>(&mut sums, &as_signed::<BITS>(&weights[1]), &low);
            sdots::<2, ROWS>(&mut sums, &as_signed::<BITS>(&weights[2]), &low);
            sdots::<3, ROWS>(&mut sums, &as_signed::<BITS>(&weights[3]), &low);
            sdots::<0, ROWS>(&mut sums, &as_signed::<BITS>(&weights[4]), &high);
            sdots::<1, ROWS>(&mut sums, &as_signed::<BITS>(&weights[5]), &high);
            sdots::<2, ROWS>(&mut sums, &as_signed::<BITS>(&weights[6]), &high);
            sdots::<3, ROWS>(&mut sums, &as_signed::<BITS>(&weights[7]), &high);
        });
        sums
    }
}

impl Bytewise for MixedSigns {
    const TOGETHER: usize = 4;

    fn run<K: Kernel>(kernel: K) -> K::Output {
        run_with!("neon,dotprod,i8mm", MixedSigns, kernel)
    }

    #[inline(always)]
    fn dots<const BITS: usize, const ROWS: usize>(
        _: Neon<Self>,
        starts: [Integers; ROWS],
        weights: &[Integers; 8],
        x: &[Bytes; ROWS],
    ) -> [Integers; ROWS] {
        let mut sums = starts;
        let [low, high] = halves(x);
        have!({
            usdots::<0, ROWS>(&mut sums, &weights[0], &low);
            usdots::<1, ROWS>(&mut sums, &weights[1], &low);
            usdots::<2, ROWS>(&mut sums, &weights[2], &low);
            usdots::<3, ROWS>(&mut sums, &weights[3], &low);
            usdots::<0, ROWS>(&mut sums, &weights[4], &high);
            usdots::<1, ROWS>(&mut sums, &weights[5], &high);
            usdots::<2, ROWS>(&mut sums, &weights[6], &high);
            usdots::<3, ROWS>(&mut sums, &weights[7], &high);
        });
        sums
    }
}

/// The activations of the first four steps and of the last.
#[inline(always)]
fn halves<const ROWS: usize>(x: &[Bytes; ROWS]) -> [[int8x16_t; ROWS]; 2] {
    [0, 1].map(|half| {
        std::array::from_fn(|row| {
            let halves: &[[i8; 16]; 2] = bytemuck::cast_ref(&x[row].0);
            // SAFETY: NEON is there, by the token of the caller, and half a row has sixteen bytes.
            unsafe { vld1q_s8(halves[half].as_ptr()) }
        })
    })
}

/// The weights as signed bytes: those of eight bits less 128.
#[inline(always)]
fn as_signed<const BITS: usize>(weights: &Integers) -> Integers {
    if BITS < 8 {
        return *weights;
    }
    // SAFETY: NEON is there, by the token of the caller.
    unsafe {
        let sign = vdupq_n_s32(i32::from_ne_bytes([0x80; 4]));
        weights.map(|weights| veorq_s32(weights, sign))
    }
}

/// What sums of products with [`as_signed`] start from: weights of eight bits lack 128 times the activations.
#[inline(always)]
fn signed_starts<const BITS: usize, const ROWS: usize>(
    mut starts: [Integers; ROWS],
    x: &[Bytes; ROWS],
) -> [Integers; ROWS] {
    if BITS < 8 {
        return starts;
    }
    let [low, high] = halves(x);
    for (row, start) in starts.iter_mut().enumerate() {
        // SAFETY: NEON is there, by the token of the caller.
        unsafe {
            let sum = i32::from(vaddlvq_s8(low[row])) + i32::from(vaddlvq_s8(high[row]));
            let lacking = vdupq_n_s32(sum << 7);
            *start = start.map(|start| vaddq_s32(start, lacking));
        }
    }
    starts
}

/// Adds the products of a step of weights with a quarter of each row's activations.
macro_rules! step {
    ($name:ident, $features:literal, $instruction:literal) => {
        /// # Safety
        ///
        /// The processor must have the instruction.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name<const QUARTER: usize, const ROWS: usize>(
            sums: &mut [Integers; ROWS],
            weights: &Integers,
            x: &[int8x16_t; ROWS],
        ) {
            for (sums, x) in sums.iter_mut().zip(x) {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    // SAFETY: the instruction is there, as the caller says, and it reads and writes registers alone.
                    unsafe {
                        asm!(
                            concat!($instruction, " {sum:v}.4s, {weights:v}.16b, {x:v}.4b[{quarter}]"),
                            sum = inout(vreg) *sum,
                            weights = in(vreg) *weights,
                            x = in(vreg) *x,
                            quarter = const QUARTER,
                            options(pure, nomem, nostack, preserves_flags),
                        );
                    }
                }
            }
        }
    };
}

step!(sdots, "neon,dotprod", "sdot");
step!(usdots, "neon,i8mm", "usdot");
