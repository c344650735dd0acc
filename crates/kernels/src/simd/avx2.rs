//! AVX2 with FMA: two registers for the sixteen lanes.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "the names begin with what they are")
)]
use std::arch::x86_64::*;

use half::f16;

use super::{Bytes, Kernel, LANES, Line, Simd, low_bytes};

/// The processor has AVX2, FMA and F16C. Made by [`run`] alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Runs a kernel; an [`Isa`](crate::Isa) of this level exists only where the processor has the instructions.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn compiled<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx2(()))
    }
    // SAFETY: `Level::Avx2` is made only where the processor reports these features.
    unsafe { compiled(kernel) }
}

/// Calls an intrinsic, whose instructions the token proves to be there.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: the token exists only where the processor has the instructions, and the pointers are of arrays of
        // the length that is read or written.
        unsafe { $call }
    };
}

/// Applies an intrinsic to both halves.
macro_rules! both {
    ($intrinsic:ident, $a:expr) => {
        have!([$intrinsic($a[0]), $intrinsic($a[1])])
    };
    ($intrinsic:ident, $a:expr, $b:expr) => {
        have!([$intrinsic($a[0], $b[0]), $intrinsic($a[1], $b[1])])
    };
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];

    const SUMS: usize = 6;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run(kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        have!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        have!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())])
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        have!([
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x[8..].as_ptr().cast())),
        ])
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        have!({
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), x[1]);
        });
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        have!([
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1])
        ])
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        let sign = have!(_mm256_set1_ps(-0.0));
        have!([_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])])
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        have!({
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        have!({
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        both!(_mm256_cvtps_epi32, a)
    }

    #[inline(always)]
    fn zero(self) -> Self::I {
        have!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn line(self, x: &Line) -> Self::I {
        have!([
            _mm256_load_si256(x.0.as_ptr().cast()),
            _mm256_load_si256(x.0[32..].as_ptr().cast()),
        ])
    }
    #[inline(always)]
    fn store_line(self, x: Self::I, to: &mut Line) {
        have!({
            _mm256_store_si256(to.0.as_mut_ptr().cast(), x[0]);
            _mm256_store_si256(to.0[32..].as_mut_ptr().cast(), x[1]);
        });
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        both!(_mm256_add_epi32, a, b)
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        have!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        both!(_mm256_and_si256, a, b)
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        both!(_mm256_or_si256, a, b)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I) -> Self::I {
        let by = have!(_mm_cvtsi32_si128(N as i32));
        have!([_mm256_srl_epi32(a[0], by), _mm256_srl_epi32(a[1], by)])
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I) -> Self::I {
        let by = have!(_mm_cvtsi32_si128(N as i32));
        have!([_mm256_sll_epi32(a[0], by), _mm256_sll_epi32(a[1], by)])
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        both!(_mm256_cvtepi32_ps, a)
    }
    #[inline(always)]
    fn as_float(self, a: Self::I) -> Self::F {
        both!(_mm256_castsi256_ps, a)
    }
    #[inline(always)]
    fn narrow(self, a: Self::I, b: Self::I) -> Bytes {
        low_bytes(self, a, b)
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, start: Self::I, weights: &[Self::I; 8], x: &Bytes) -> Self::I {
        have!({
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_set1_epi16(0xff);
            // Products of two columns are at most 2 * 127 * (2^BITS - 1): so many steps fit 16 bits together.
            let together = match BITS {
                ..=4 => 8,
                5 => 4,
                6 => 2,
                _ => 0,
            };
            let mut sums = start;
            if together > 0 {
                for (first, weights) in weights.chunks_exact(together).enumerate() {
                    let mut pairs = [_mm256_setzero_si256(); 2];
                    for (step, weights) in weights.iter().enumerate() {
                        let x = _mm256_set1_epi32(x.step(first * together + step));
                        for (pairs, weights) in pairs.iter_mut().zip(weights) {
                            *pairs = _mm256_add_epi16(*pairs, _mm256_maddubs_epi16(*weights, x));
                        }
                    }
                    for (sum, pairs) in sums.iter_mut().zip(pairs) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
                return sums;
            }
            // Even and odd columns apart as numbers of 16 bits, whose products are summed in pairs.
            for (step, weights) in weights.iter().enumerate() {
                let x = _mm256_set1_epi32(x.step(step));
                let (even_x, odd_x) = (
                    _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)),
                    _mm256_srai_epi16::<8>(x),
                );
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    let even = _mm256_madd_epi16(_mm256_and_si256(*weights, low), even_x);
                    let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(*weights), odd_x);
                    *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(even, odd));
                }
            }
            sums
        })
    }
}
