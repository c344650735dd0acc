//! AVX-512 with VNNI: one register for the sixteen lanes.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "the names begin with what they are")
)]
use std::arch::x86_64::*;

use half::f16;

use super::{Bytes, HALF_OF_LAST, Kernel, LANES, Line, MatrixUnit, Simd};

/// The processor has AVX-512 F, BW, VL and VNNI, FMA and F16C. Made by [`run`] alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    /// Whether AMX is there too.
    amx: bool,
}

/// Runs a kernel; an [`Isa`](crate::Isa) of this level exists only where the processor has the instructions.
pub(super) fn run<K: Kernel>(kernel: K, amx: bool) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn compiled<K: Kernel>(kernel: K, amx: bool) -> K::Output {
        kernel.run(Avx512 { amx })
    }
    // SAFETY: `Level::Avx512Vnni` is made only where the processor reports these features.
    unsafe { compiled(kernel, amx) }
}

/// Calls an intrinsic, whose instructions the token proves to be there.
macro_rules! have {
    ($call:expr) => {
        // SAFETY: the token exists only where the processor has the instructions, and the pointers are of arrays of
        // the length that is read or written.
        unsafe { $call }
    };
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run(kernel, self.amx)
    }
    #[inline(always)]
    fn matrix_unit(self) -> Option<MatrixUnit> {
        #[cfg(target_os = "linux")]
        if self.amx {
            return Some(MatrixUnit::detected());
        }
        None
    }

    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        have!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        have!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        have!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        have!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> __m512i {
        have!(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> __m512 {
        have!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()))
        )))
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; LANES]) {
        have!(_mm512_storeu_ps(to.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        have!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        have!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        have!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        have!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        have!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512i {
        have!(_mm512_cvtps_epi32(a))
    }

    #[inline(always)]
    fn zero(self) -> __m512i {
        have!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn line(self, x: &Line) -> __m512i {
        have!(_mm512_load_si512(x.0.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_line(self, x: __m512i, to: &mut Line) {
        have!(_mm512_store_si512(to.0.as_mut_ptr().cast(), x));
    }
    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        have!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        have!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        have!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        have!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        have!(_mm512_srli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        have!(_mm512_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn to_float(self, a: __m512i) -> __m512 {
        have!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn as_float(self, a: __m512i) -> __m512 {
        have!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn narrow(self, a: __m512i, b: __m512i) -> Bytes {
        let mut bytes = [[0_i8; LANES]; 2];
        have!({
            _mm_storeu_si128(bytes[0].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(bytes[1].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(b));
        });
        Bytes(bytemuck::cast(bytes))
    }
    #[inline(always)]
    fn halves(self, first: __m512, second: __m512) -> __m512i {
        let half = self.splat_i(HALF_OF_LAST as i32);
        have!({
            let first = _mm512_add_epi32(_mm512_castps_si512(first), half);
            let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
            // The lower halves of the first, and the upper ones of the second.
            _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(first), second)
        })
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, start: __m512i, weights: &[__m512i; 8], x: &Bytes) -> __m512i {
        // One chain: there are other rows and blocks to work on while a sum waits for the one before it.
        weights.iter().enumerate().fold(start, |sum, (step, weights)| {
            have!(_mm512_dpbusd_epi32(
                sum,
                *weights,
                _mm512_set1_epi32(x.step(step))
            ))
        })
    }
}
