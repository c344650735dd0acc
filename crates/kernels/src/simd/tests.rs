//! Each operation of each instruction set against plain arithmetic.

use proptest::prelude::*;

use super::{Bytes, Kernel, LANES, Line, Simd, dispatch, exp};
use crate::isa::Isa;

/// Products of blocks of weights with three rows of bytes, together and one by one.
struct Dots<'a, const BITS: usize> {
    starts: [Line; 3],
    weights: &'a [Line; 8],
    x: &'a [Bytes; 3],
}

impl<const BITS: usize> Kernel for Dots<'_, BITS> {
    type Output = [[Line; 3]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let weights = std::array::from_fn(|step| s.line(&self.weights[step]));
        let starts = self.starts.map(|line| s.line(&line));
        let mut alone = starts;
        for (sum, x) in alone.iter_mut().zip(self.x) {
            *sum = s.dot::<BITS>(*sum, &weights, x);
        }
        let together = s.dots::<BITS, 3>(starts, &weights, self.x);
        [together, alone].map(|sums| {
            sums.map(|sum| {
                let mut line = Line::ZERO;
                s.store_line(sum, &mut line);
                line
            })
        })
    }
}

/// What [`Dots`] gives.
fn expected(starts: [Line; 3], weights: &[Line; 8], x: &[Bytes; 3]) -> [Line; 3] {
    std::array::from_fn(|row| {
        let starts: [i32; LANES] = bytemuck::cast(starts[row]);
        let sums: [i32; LANES] = std::array::from_fn(|lane| {
            let products = weights.iter().zip(x[row].0).flat_map(|(weights, x)| {
                std::array::from_fn::<_, 4, _>(|i| i32::from(weights.0[lane * 4 + i]) * i32::from(x[i]))
            });
            starts[lane] + products.sum::<i32>()
        });
        bytemuck::cast(sums)
    })
}

fn check_dots<const BITS: usize>(numbers: &[u8], x: &[Bytes; 3], start: i32) -> Result<(), TestCaseError> {
    let mask = ((1_u16 << BITS) - 1) as u8;
    let weights: [Line; 8] =
        std::array::from_fn(|step| Line(std::array::from_fn(|i| numbers[step * 64 + i] & mask)));
    let starts: [Line; 3] = std::array::from_fn(|row| {
        bytemuck::cast(std::array::from_fn::<i32, LANES, _>(|lane| {
            start.wrapping_mul((row * LANES + lane) as i32) >> 8
        }))
    });
    let expected = expected(starts, &weights, x);
    for isa in Isa::available() {
        let weights = &weights;
        let [together, alone] = dispatch(isa, Dots::<BITS> { starts, weights, x });
        prop_assert_eq!(together, expected, "{} {} bits", isa, BITS);
        prop_assert_eq!(alone, expected, "{} {} bits", isa, BITS);
    }
    Ok(())
}

/// Bytes that are often as large as they may be, so that sums of 16 bits are too.
fn bytes() -> impl Strategy<Value = Bytes> {
    let byte = prop_oneof![Just(127_i8), Just(-127), -127..=127_i8];
    let extreme = prop_oneof![Just(127_i8), Just(-127)].prop_map(|byte| Bytes([[byte; 4]; 8]));
    prop_oneof![
        extreme,
        prop::array::uniform8(prop::array::uniform4(byte)).prop_map(Bytes)
    ]
}

/// What vectors of floats are tried with.
fn floats(limit: f32) -> impl Strategy<Value = [f32; LANES]> {
    prop::array::uniform16(-limit..limit)
}

/// Every operation on floats, of two vectors.
struct Operations([[f32; LANES]; 2]);

impl Kernel for Operations {
    type Output = (Vec<[f32; LANES]>, [f32; 2]);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let [a, b] = self.0.map(|x| s.load(&x));
        let half: [half::f16; LANES] = self.0[0].map(half::f16::from_f32);
        let brain: [u16; LANES] = self.0[0].map(|x| half::bf16::from_f32(x).to_bits());
        let bytes: [u8; LANES] = std::array::from_fn(|lane| (self.0[0][lane].to_bits() >> 7) as u8);
        let integers = s.round(s.mul(a, s.splat(0.25)));
        let results = [
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.max(a, b),
            s.min(a, b),
            s.abs(a),
            s.splat(self.0[0][3]),
            s.load_f16(&half),
            s.load_bf16(&brain),
            s.to_float(s.load_u8(&bytes)),
            s.to_float(integers),
            s.to_float(s.add_i(integers, s.splat_i(-7))),
            s.to_float(s.and(integers, s.splat_i(0x55))),
            s.to_float(s.or(integers, s.splat_i(0x55))),
            s.to_float(s.shl::<3>(integers)),
            s.to_float(s.shr::<4>(integers)),
            s.to_float(s.shr::<24>(integers)),
            s.as_float(s.shr::<9>(s.load_u8(&bytes))),
            s.to_float(s.shr_bytes::<5>(integers)),
            s.to_float(s.zero()),
        ];
        let stored = results.map(|x| {
            let mut out = [f32::NAN; LANES];
            s.store(x, &mut out);
            out
        });
        (stored.to_vec(), [s.sum(s.to_float(integers)), s.largest(a)])
    }
}

/// What [`Operations`] gives.
fn operations([a, b]: [[f32; LANES]; 2]) -> (Vec<[f32; LANES]>, [f32; 2]) {
    let each = |f: &dyn Fn(f32, f32) -> f32| std::array::from_fn(|lane| f(a[lane], b[lane]));
    let integers: [i32; LANES] = a.map(|x| (x * 0.25).round_ties_even() as i32);
    let byte = |lane: usize| (a[lane].to_bits() >> 7) as u8;
    let results = vec![
        each(&|a, b| a + b),
        each(&|a, b| a - b),
        each(&|a, b| a * b),
        each(&|a, b| a / b),
        each(&f32::max),
        each(&f32::min),
        a.map(f32::abs),
        [a[3]; LANES],
        a.map(|x| half::f16::from_f32(x).to_f32()),
        a.map(|x| half::bf16::from_f32(x).to_f32()),
        std::array::from_fn(|lane| f32::from(byte(lane))),
        integers.map(|x| x as f32),
        integers.map(|x| (x - 7) as f32),
        integers.map(|x| (x & 0x55) as f32),
        integers.map(|x| (x | 0x55) as f32),
        integers.map(|x| (x << 3) as f32),
        integers.map(|x| (x as u32 >> 4) as i32 as f32),
        integers.map(|x| (x as u32 >> 24) as i32 as f32),
        std::array::from_fn(|lane| f32::from_bits(u32::from(byte(lane)) >> 9)),
        integers.map(|x| i32::from_le_bytes(x.to_le_bytes().map(|byte| byte >> 5)) as f32),
        [0.0; LANES],
    ];
    let sum = integers.map(|x| x as f32).iter().sum();
    let largest = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (results, [sum, largest])
}

/// 32 integers as bytes.
struct Narrow([i32; 2 * LANES]);

impl Kernel for Narrow {
    type Output = [[i8; 4]; 8];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let [low, high]: [Line; 2] = bytemuck::cast(self.0);
        s.narrow(s.line(&low), s.line(&high)).0
    }
}

/// `a * b + c`, and the exponential of `a`.
struct Rounded([[f32; LANES]; 3]);

impl Kernel for Rounded {
    type Output = [[f32; LANES]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let [a, b, c] = self.0.map(|x| s.load(&x));
        [s.fma(a, b, c), exp(s, a)].map(|x| {
            let mut out = [f32::NAN; LANES];
            s.store(x, &mut out);
            out
        })
    }
}

proptest! {
    #[test]
    fn products_of_bytes_are_exact(
        numbers in prop_oneof![Just(vec![255_u8; 512]), prop::collection::vec(any::<u8>(), 512)],
        x in prop::array::uniform3(bytes()),
        start in any::<i32>(),
    ) {
        check_dots::<2>(&numbers, &x, start)?;
        check_dots::<3>(&numbers, &x, start)?;
        check_dots::<4>(&numbers, &x, start)?;
        check_dots::<5>(&numbers, &x, start)?;
        check_dots::<6>(&numbers, &x, start)?;
        check_dots::<8>(&numbers, &x, start)?;
    }

    #[test]
    fn operations_are_those_of_plain_arithmetic(a in floats(1e4), b in floats(1e4)) {
        let (expected, scalars) = operations([a, b]);
        for isa in Isa::available() {
            let (found, of_lanes) = dispatch(isa, Operations([a, b]));
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                prop_assert_eq!(found.map(f32::to_bits), expected.map(f32::to_bits), "{} operation {}", isa, index);
            }
            prop_assert_eq!(of_lanes, scalars, "{}", isa);
        }
    }

    #[test]
    fn integers_become_bytes_in_their_order(integers in prop::array::uniform32(-127_i32..=127)) {
        let expected = integers.map(|x| x as i8);
        for isa in Isa::available() {
            let found = dispatch(isa, Narrow(integers));
            prop_assert_eq!(found.as_flattened(), &expected, "{}", isa);
        }
    }

    #[test]
    fn sums_of_products_and_exponentials_are_those_of_float64(a in floats(80.0), b in floats(9.0), c in floats(9.0)) {
        for isa in Isa::available() {
            let [sums, powers] = dispatch(isa, Rounded([a, b, c]));
            for lane in 0..LANES {
                let (a, b, c) = (f64::from(a[lane]), f64::from(b[lane]), f64::from(c[lane]));
                let error = (f64::from(sums[lane]) - (a * b + c)).abs();
                prop_assert!(error <= 1.2e-7 * (a * b).abs().max((a * b + c).abs()), "{} {}", isa, error);
                let error = (f64::from(powers[lane]) / a.exp() - 1.0).abs();
                prop_assert!(error <= 4e-7, "{} {}", isa, error);
            }
        }
    }
}
