//! NEON: four registers for the sixteen lanes.
//!
//! Levels differ in how bytes are multiplied alone, which is [`Bytewise`].

mod bytewise;

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "the names begin with what they are")
)]
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use half::f16;

pub(super) use bytewise::{Bytewise, DotProduct, MixedSigns, Widening};

use super::{Bytes, Kernel, LANES, Line, Simd};

/// The processor has NEON and what `B` needs. Made by the `run` of a [`Bytewise`] alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<B>(PhantomData<B>);

/// Sixteen 32-bit integers, or 64 bytes.
type Integers = [int32x4_t; 4];

/// Calls an intrinsic, whose instructions the token proves to be there.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: the token exists only where the processor has the instructions, and the pointers are of arrays of
        // the length that is read or written.
        unsafe { $call }
    };
}

/// Applies an intrinsic to all four quarters.
macro_rules! each {
    ($intrinsic:ident, $a:expr) => {
        have!($a.map(|a| $intrinsic(a)))
    };
    ($intrinsic:ident, $a:expr, $b:expr) => {
        have!([
            $intrinsic($a[0], $b[0]),
            $intrinsic($a[1], $b[1]),
            $intrinsic($a[2], $b[2]),
            $intrinsic($a[3], $b[3]),
        ])
    };
}

impl<B: Bytewise> Simd for Neon<B> {
    type F = [float32x4_t; 4];
    type I = Integers;

    // Of 32 registers, 20 and what is added to them.
    const SUMS: usize = 5;
    const TOGETHER: usize = B::TOGETHER;
    // It has 32 registers, which are all there are.
    const KEEPS_BLOCK: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        B::run(kernel)
    }

    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        // SAFETY: the instruction reads nothing that the program sees, wherever the pointer leads.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        have!([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        have!([
            vld1q_f32(x.as_ptr()),
            vld1q_f32(x[4..].as_ptr()),
            vld1q_f32(x[8..].as_ptr()),
            vld1q_f32(x[12..].as_ptr()),
        ])
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        have!({
            let low = vreinterpretq_f16_u16(vld1q_u16(x.as_ptr().cast()));
            let high = vreinterpretq_f16_u16(vld1q_u16(x[8..].as_ptr().cast()));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        })
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Integers {
        have!({
            let bytes = vld1q_u8(x.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                vreinterpretq_s32_u32(vmovl_high_u16(high)),
            ]
        })
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        have!({
            let (low, high) = (vld1q_u16(x.as_ptr()), vld1q_u16(x[8..].as_ptr()));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
            ]
        })
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        have!({
            vst1q_f32(to.as_mut_ptr(), x[0]);
            vst1q_f32(to[4..].as_mut_ptr(), x[1]);
            vst1q_f32(to[8..].as_mut_ptr(), x[2]);
            vst1q_f32(to[12..].as_mut_ptr(), x[3]);
        });
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vaddq_f32, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vsubq_f32, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vmulq_f32, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vdivq_f32, a, b)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // As on x86, the second where one of both is no number: `vmaxq_f32` gives NaN then.
        have!(std::array::from_fn(|i| vbslq_f32(
            vcgtq_f32(a[i], b[i]),
            a[i],
            b[i]
        )))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        have!(std::array::from_fn(|i| vbslq_f32(
            vcltq_f32(a[i], b[i]),
            a[i],
            b[i]
        )))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        have!([
            vfmaq_f32(c[0], a[0], b[0]),
            vfmaq_f32(c[1], a[1], b[1]),
            vfmaq_f32(c[2], a[2], b[2]),
            vfmaq_f32(c[3], a[3], b[3]),
        ])
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        each!(vabsq_f32, a)
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // The order is that of the other instruction sets: halves of sixteen, of eight, of four and of two.
        have!({
            let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        })
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        have!({
            let (low, high) = (vmaxnmq_f32(a[0], a[1]), vmaxnmq_f32(a[2], a[3]));
            vmaxnmvq_f32(vmaxnmq_f32(low, high))
        })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Integers {
        each!(vcvtnq_s32_f32, a)
    }

    #[inline(always)]
    fn zero(self) -> Integers {
        have!([vdupq_n_s32(0); 4])
    }
    #[inline(always)]
    fn line(self, x: &Line) -> Integers {
        have!([
            vld1q_s32(x.0.as_ptr().cast()),
            vld1q_s32(x.0[16..].as_ptr().cast()),
            vld1q_s32(x.0[32..].as_ptr().cast()),
            vld1q_s32(x.0[48..].as_ptr().cast()),
        ])
    }
    #[inline(always)]
    fn store_line(self, x: Integers, to: &mut Line) {
        have!({
            vst1q_s32(to.0.as_mut_ptr().cast(), x[0]);
            vst1q_s32(to.0[16..].as_mut_ptr().cast(), x[1]);
            vst1q_s32(to.0[32..].as_mut_ptr().cast(), x[2]);
            vst1q_s32(to.0[48..].as_mut_ptr().cast(), x[3]);
        });
    }
    #[inline(always)]
    fn add_i(self, a: Integers, b: Integers) -> Integers {
        each!(vaddq_s32, a, b)
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Integers {
        have!([vdupq_n_s32(x); 4])
    }
    #[inline(always)]
    fn and(self, a: Integers, b: Integers) -> Integers {
        each!(vandq_s32, a, b)
    }
    #[inline(always)]
    fn or(self, a: Integers, b: Integers) -> Integers {
        each!(vorrq_s32, a, b)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Integers) -> Integers {
        // A count that is negative moves to the right; it is a constant, and so becomes part of the instruction.
        have!(a.map(|a| {
            let by = vdupq_n_s32(-(N as i32));
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), by))
        }))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Integers) -> Integers {
        have!(a.map(|a| vshlq_s32(a, vdupq_n_s32(N as i32))))
    }
    #[inline(always)]
    fn shr_bytes<const N: u32>(self, a: Integers) -> Integers {
        have!(a.map(|a| {
            let by = vdupq_n_s8(-(N as i8));
            vreinterpretq_s32_u8(vshlq_u8(vreinterpretq_u8_s32(a), by))
        }))
    }
    #[inline(always)]
    fn to_float(self, a: Integers) -> Self::F {
        each!(vcvtq_f32_s32, a)
    }
    #[inline(always)]
    fn as_float(self, a: Integers) -> Self::F {
        each!(vreinterpretq_f32_s32, a)
    }
    #[inline(always)]
    fn narrow(self, a: Integers, b: Integers) -> Bytes {
        let mut bytes = [[0_i8; LANES]; 2];
        for (to, x) in bytes.iter_mut().zip([a, b]) {
            have!({
                let low = vmovn_high_s32(vmovn_s32(x[0]), x[1]);
                let high = vmovn_high_s32(vmovn_s32(x[2]), x[3]);
                vst1q_s8(to.as_mut_ptr(), vmovn_high_s16(vmovn_s16(low), high));
            });
        }
        Bytes(bytemuck::cast(bytes))
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, start: Integers, weights: &[Integers; 8], x: &Bytes) -> Integers {
        let [sums] = self.dots::<BITS, 1>([start], weights, std::array::from_ref(x));
        sums
    }
    #[inline(always)]
    fn dots<const BITS: usize, const ROWS: usize>(
        self,
        starts: [Integers; ROWS],
        weights: &[Integers; 8],
        x: &[Bytes; ROWS],
    ) -> [Integers; ROWS] {
        B::dots::<BITS, ROWS>(self, starts, weights, x)
    }
}
