//! Any processor, in a form that compilers vectorize.

use half::f16;

use super::{Bytes, Kernel, LANES, Line, Simd, low_bytes};

/// Needs nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

#[inline(always)]
fn each<T: Copy, U: Copy, V: Copy + Default>(
    a: [T; LANES],
    b: [U; LANES],
    f: impl Fn(T, U) -> V,
) -> [V; LANES] {
    let mut out = [V::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

/// Fused where the target has the instruction; the library's function is slower than two roundings are wrong.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[cfg(test)]
    fn matrix_unit(self) -> Option<super::MatrixUnit> {
        super::emulated_unit::wanted()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        x.map(f16::to_f32)
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = fused(a[lane], b[lane], c[lane]);
        }
        out
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        a.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn zero(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn line(self, x: &Line) -> Self::I {
        bytemuck::cast(*x)
    }
    #[inline(always)]
    fn store_line(self, x: Self::I, to: &mut Line) {
        *to = bytemuck::cast(x);
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        each(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|x| ((x as u32) >> N) as i32)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        a.map(|x| x as f32)
    }
    #[inline(always)]
    fn as_float(self, a: Self::I) -> Self::F {
        a.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn narrow(self, a: Self::I, b: Self::I) -> Bytes {
        low_bytes(self, a, b)
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, start: Self::I, weights: &[Self::I; 8], x: &Bytes) -> Self::I {
        let mut out = start;
        for (weights, x) in weights.iter().zip(x.0) {
            let x = x.map(i32::from);
            for (out, weights) in out.iter_mut().zip(weights) {
                let w = weights.to_le_bytes().map(i32::from);
                *out += w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
            }
        }
        out
    }
}
