//! Sixteen lanes of arithmetic, once for each instruction set.
//!
//! A kernel is written once, as a [`Kernel`] over any [`Simd`], and compiled for each instruction set by [`dispatch`].
//! A token of type `S: Simd` proves that the processor has the instructions, so that its methods are safe.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[expect(
    unsafe_code,
    reason = "instructions that have no intrinsics yet, found at run time"
)]
mod amx;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics of an instruction set that is found at run time"
)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics of an instruction set that is found at run time"
)]
mod avx512;
#[cfg(target_arch = "aarch64")]
#[expect(
    unsafe_code,
    reason = "intrinsics of an instruction set that is found at run time"
)]
mod neon;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod no_matrix_unit;
mod portable;

#[cfg(test)]
pub(crate) mod emulated_unit;
#[cfg(test)]
mod tests;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use amx as unit;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
use no_matrix_unit as unit;

#[cfg(test)]
pub(crate) use emulated_unit::{MatrixUnit, Tiles};
pub(crate) use unit::Sums;
#[cfg(not(test))]
pub(crate) use unit::{MatrixUnit, Tiles};

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::isa::{Isa, Level};
#[cfg(target_arch = "aarch64")]
use neon::Bytewise as _;
pub(crate) use portable::Portable;

/// Lanes of a vector, and rows of a tile of weights.
pub(crate) const LANES: usize = 16;

/// A cache line: four columns of sixteen rows as bytes, or sixteen numbers of 32 bits.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Line(pub(crate) [u8; 64]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; 64]);
}

/// Sixteen lines: of activations, each a row of 32 bfloat16; of weights, each a pair of bfloat16 for sixteen lanes; or sums.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Square(pub(crate) [Line; LANES]);

impl Square {
    pub(crate) const ZERO: Self = Self([Line::ZERO; LANES]);

    /// The lines as numbers of 32 bits.
    pub(crate) fn sums(&self) -> &[[f32; LANES]; LANES] {
        bytemuck::cast_ref(self)
    }
}

/// 32 signed bytes, four a step of four columns.
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Bytes(pub(crate) [[i8; 4]; 8]);

impl Bytes {
    /// A step, as a number of 32 bits.
    #[inline(always)]
    pub(crate) fn step(&self, step: usize) -> i32 {
        bytemuck::cast(self.0[step])
    }
}

/// An instruction set as sixteen lanes. The value is the proof that the processor has it.
pub(crate) trait Simd: Copy {
    /// Sixteen float32.
    type F: Copy;
    /// Sixteen 32-bit integers, or 64 bytes.
    type I: Copy;

    /// Vectors of sums that fit the registers, beside what is added to them. A kernel for more rows than that is slower than one
    /// for these, several times.
    const SUMS: usize = 16;

    /// Rows of bytes whose products with a block of weights [`dots`](Self::dots) should be asked for together.
    const TOGETHER: usize = 1;

    /// Whether it pays to keep a block of weights unpacked for what follows only now and then.
    const KEEPS_BLOCK: bool = true;

    /// Runs a kernel with this instruction set as a function of its own. A kernel of several parts calls them so: all
    /// in one function would need more stack than a thread has where nothing is optimised.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// The unit that multiplies matrices, where there is one.
    fn matrix_unit(self) -> Option<MatrixUnit> {
        None
    }

    /// Asks for a line that will be read soon. It need not exist.
    #[inline(always)]
    fn prefetch(self, _line: *const Line) {}

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn load_f16(self, x: &[f16; LANES]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the processor can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// The sum of the lanes.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::F) -> f32;
    /// The nearest integers, ties to even. The lanes must be within the 32-bit integers.
    fn round(self, a: Self::F) -> Self::I;

    fn zero(self) -> Self::I;
    fn line(self, x: &Line) -> Self::I;
    fn store_line(self, x: Self::I, to: &mut Line);
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn splat_i(self, x: i32) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Each 32-bit lane moved right, zeros from the left.
    fn shr<const N: u32>(self, a: Self::I) -> Self::I;
    /// Each 32-bit lane moved left.
    fn shl<const N: u32>(self, a: Self::I) -> Self::I;
    /// Each byte moved right, zeros from the left.
    #[inline(always)]
    fn shr_bytes<const N: u32>(self, a: Self::I) -> Self::I {
        self.and(self.shr::<N>(a), self.splat_i(i32::from_ne_bytes([0xff >> N; 4])))
    }
    fn to_float(self, a: Self::I) -> Self::F;
    /// The 32 bits of each lane as a float32.
    fn as_float(self, a: Self::I) -> Self::F;
    /// 32 integers of at most 127 in magnitude as bytes.
    fn narrow(self, a: Self::I, b: Self::I) -> Bytes;
    /// `start` and the sums of the products of 32 columns of numbers of `BITS` bits, four bytes a step in each lane, with
    /// bytes that are the same for all lanes.
    fn dot<const BITS: usize>(self, start: Self::I, weights: &[Self::I; 8], x: &Bytes) -> Self::I;

    /// [`dot`](Self::dot) of several rows of bytes, each with its own start.
    #[inline(always)]
    fn dots<const BITS: usize, const ROWS: usize>(
        self,
        starts: [Self::I; ROWS],
        weights: &[Self::I; 8],
        x: &[Bytes; ROWS],
    ) -> [Self::I; ROWS] {
        let mut sums = starts;
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = self.dot::<BITS>(*sum, weights, x);
        }
        sums
    }

    /// For each lane a pair of bfloat16, the nearest of each, ties away from zero; `first` is in the lower half.
    #[inline(always)]
    fn halves(self, first: Self::F, second: Self::F) -> Self::I {
        let mut pairs = [[0.0; LANES]; 2];
        let [a, b] = &mut pairs;
        self.store(first, a);
        self.store(second, b);
        let round = |x: f32| x.to_bits().wrapping_add(HALF_OF_LAST);
        let pair = |lane: usize| round(pairs[0][lane]) >> 16 | round(pairs[1][lane]) & 0xffff_0000;
        self.line(&bytemuck::cast(std::array::from_fn::<u32, LANES, _>(pair)))
    }

    /// Sixteen bytes as integers.
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I {
        let mut wide = Line::ZERO;
        for (to, &byte) in bytemuck::cast_mut::<Line, [u32; LANES]>(&mut wide)
            .iter_mut()
            .zip(x)
        {
            *to = u32::from(byte);
        }
        self.line(&wide)
    }

    /// Float16 of sixteen lanes, or bfloat16, as they lie in half a line.
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        let mut wide = Line::ZERO;
        for (to, &half) in bytemuck::cast_mut::<Line, [u32; LANES]>(&mut wide)
            .iter_mut()
            .zip(x)
        {
            *to = u32::from(half) << 16;
        }
        self.as_float(self.line(&wide))
    }
}

/// Half of what the last bit of a bfloat16 is, in the bits of a float32.
const HALF_OF_LAST: u32 = 0x8000;

/// The integers of two vectors as bytes.
#[inline(always)]
fn low_bytes<S: Simd>(s: S, a: S::I, b: S::I) -> Bytes {
    let mut lines = [Line::ZERO; 2];
    s.store_line(a, &mut lines[0]);
    s.store_line(b, &mut lines[1]);
    Bytes(bytemuck::cast::<_, [[i32; 4]; 8]>(lines).map(|four| four.map(|x| x as i8)))
}

/// Something that is computed the same way on every instruction set.
pub(crate) trait Kernel {
    type Output;

    /// Implementations are `#[inline(always)]`, so that they are compiled with the features of their caller.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs a kernel with an instruction set, which the processor has.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa.level() {
        Level::Portable => Portable.call(kernel),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => neon::Widening::run(kernel),
        #[cfg(target_arch = "aarch64")]
        Level::NeonDotprod => neon::DotProduct::run(kernel),
        #[cfg(target_arch = "aarch64")]
        Level::NeonI8mm => neon::MixedSigns::run(kernel),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::run(kernel),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => avx512::run(kernel, false),
        #[cfg(target_arch = "x86_64")]
        Level::Amx => avx512::run(kernel, true),
    }
}

/// The exponential of -87.3 to 88, within 2 units in the last place; what lies beyond counts as the limit.
///
/// The argument is split into whole powers of two and a rest of at most `ln 2 / 2` (with `ln 2` in two parts, after Cody
/// and Waite), and the rest goes through the Taylor polynomial of degree 7.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.max(x, s.splat(-87.3)), s.splat(88.0));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let whole = s.to_float(n);
    let rest = s.fma(whole, s.splat(-0.693_359_4), x);
    let rest = s.fma(whole, s.splat(2.121_944_4e-4), rest);
    let mut y = s.splat(1.0 / 5040.0);
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = s.fma(y, rest, s.splat(factor));
    }
    let power = s.shl::<23>(s.add_i(n, s.splat_i(127)));
    s.mul(y, s.as_float(power))
}
