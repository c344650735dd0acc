//! In tests: the matrix unit of this machine, or code for any processor that gives what a unit gives, so that what is built
//! around a unit runs everywhere.

use std::cell::Cell;

use super::{Bytes, LANES, Line, Square, Sums, unit};

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
    static USED: Cell<usize> = const { Cell::new(0) };
}

/// Gives portable code a matrix unit on this thread while something runs, and says how often it multiplied.
pub(crate) fn with_unit<T>(work: impl FnOnce() -> T) -> (T, usize) {
    USED.set(0);
    WANTED.set(true);
    let done = work();
    WANTED.set(false);
    (done, USED.get())
}

/// The unit of portable code.
pub(super) fn wanted() -> Option<MatrixUnit> {
    WANTED.get().then_some(MatrixUnit::Emulated)
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum MatrixUnit {
    Real(unit::MatrixUnit),
    Emulated,
}

pub(crate) enum Tiles<const ROWS: usize> {
    Real(unit::Tiles<ROWS>),
    Emulated,
}

pub(crate) enum HalfTiles {
    Real(unit::HalfTiles),
    Emulated,
}

impl MatrixUnit {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(crate) fn detect() -> Option<Self> {
        unit::MatrixUnit::detect().map(Self::Real)
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn detected() -> Self {
        Self::Real(unit::MatrixUnit::detected())
    }

    pub(crate) fn configure<const ROWS: usize>(self) -> Tiles<ROWS> {
        match self {
            Self::Real(unit) => Tiles::Real(unit.configure()),
            Self::Emulated => Tiles::Emulated,
        }
    }

    pub(crate) fn halves(self) -> HalfTiles {
        match self {
            Self::Real(unit) => HalfTiles::Real(unit.halves()),
            Self::Emulated => HalfTiles::Emulated,
        }
    }
}

impl HalfTiles {
    pub(crate) fn multiply<const W: usize, const X: usize>(
        &self,
        weights: [&[Square]; W],
        x: [&[Square]; X],
        sums: &mut [[Square; X]; W],
    ) {
        match self {
            Self::Real(tiles) => tiles.multiply(weights, x, sums),
            Self::Emulated => {
                for (weights, sums) in weights.iter().zip(sums) {
                    for (x, sums) in x.iter().zip(sums) {
                        USED.set(USED.get() + 1);
                        *sums = product(weights, x);
                    }
                }
            }
        }
    }
}

/// As the unit sums up: of each block the first of the pairs, the second of the pairs, and both to what was before.
fn product(weights: &[Square], x: &[Square]) -> Square {
    let halves = |line: &Line| -> [[f32; 2]; LANES] {
        let pairs: [[u16; 2]; LANES] = bytemuck::cast(*line);
        pairs.map(|pair| pair.map(|half| f32::from_bits(u32::from(half) << 16)))
    };
    let mut totals = [[0.0_f32; LANES]; LANES];
    for (weights, x) in weights.iter().zip(x) {
        let weights = weights.0.each_ref().map(halves);
        for (totals, x) in totals.iter_mut().zip(x.0.each_ref().map(halves)) {
            for (lane, total) in totals.iter_mut().enumerate() {
                let of_half = |half: usize| {
                    let pairs = weights.iter().zip(&x);
                    pairs.fold(0.0_f32, |sum, (weights, x)| {
                        weights[lane][half].mul_add(x[half], sum)
                    })
                };
                *total += of_half(0) + of_half(1);
            }
        }
    }
    bytemuck::cast(totals)
}

impl<const ROWS: usize> Tiles<ROWS> {
    pub(crate) fn dot(&self, weights: &[Line; 8], x: &[Bytes; ROWS], sums: &mut Sums<ROWS>) {
        match self {
            Self::Real(tiles) => tiles.dot(weights, x, sums),
            Self::Emulated => {
                USED.set(USED.get() + 1);
                for (sums, x) in sums.iter_mut().zip(x) {
                    let lane = |lane: usize| -> i32 {
                        let products = weights.iter().zip(x.0).flat_map(|(weights, x)| {
                            let of_lane = weights.0[lane * 4..].iter();
                            of_lane
                                .zip(x)
                                .map(|(weight, x)| i32::from(*weight) * i32::from(x))
                        });
                        products.sum()
                    };
                    *sums = bytemuck::cast(std::array::from_fn::<i32, LANES, _>(lane));
                }
            }
        }
    }
}

/// Known bytes, signed and unsigned ones beyond 127, in a lane, a step and a row of their own each.
#[test]
fn a_unit_multiplies_bytes_without_a_sign_with_bytes_that_have_one() {
    let mut weights = [Line::ZERO; 8];
    weights[7].0[4 * 15 + 3] = 255;
    weights[2].0[4 * 3] = 200;
    let mut x = [Bytes::default(); 16];
    x[15].0[7][3] = -127;
    x[4].0[2][0] = 100;
    x[4].0[2][1] = 100;
    let mut expected = [Line::ZERO; 16];
    let sum = |lane: usize, sum: i32| -> Line {
        bytemuck::cast(std::array::from_fn::<i32, LANES, _>(|at| {
            if at == lane { sum } else { 0 }
        }))
    };
    expected[15] = sum(15, 255 * -127);
    expected[4] = sum(3, 200 * 100);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let real = MatrixUnit::detect();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let real = None;
    for unit in [Some(MatrixUnit::Emulated), real].into_iter().flatten() {
        // What was there before is no part of the product.
        let mut sums = [Line([7; 64]); 16];
        unit.configure::<16>().dot(&weights, &x, &mut sums);
        assert_eq!(sums, expected, "{unit:?}");
    }
}

/// A column of its own in each half of a pair, of a row, a lane and a block of their own each.
#[test]
fn a_unit_multiplies_pairs_of_bfloat16() {
    let square = |line: usize, lane: usize, pair: [f32; 2]| {
        let [first, second] = pair.map(|half| half.to_bits() >> 16);
        let mut square = Square::ZERO;
        square.0[line] = bytemuck::cast(std::array::from_fn::<u32, LANES, _>(|at| {
            if at == lane { first | second << 16 } else { 0 }
        }));
        square
    };
    // The line of weights has the lanes, and the pair that the lane of activations has.
    let weights = [[square(5, 3, [2.0, 0.5]), square(9, 15, [1.0, -4.0])]; 2];
    let x = [
        [square(0, 5, [3.0, 16.0]), square(7, 9, [256.0, 0.25])],
        [square(0, 5, [-1.0, 0.0]), square(0, 9, [0.0, 1.0])],
    ];
    let sums = |sums: &[(usize, usize, f32)]| -> Square {
        let mut all = [[0.0_f32; LANES]; LANES];
        for &(row, lane, sum) in sums {
            all[row][lane] = sum;
        }
        bytemuck::cast(all)
    };
    let expected = [
        sums(&[(0, 3, 14.0), (7, 15, 255.0)]),
        sums(&[(0, 3, -2.0), (0, 15, -4.0)]),
    ];
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let real = MatrixUnit::detect();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let real = None;
    for unit in [Some(MatrixUnit::Emulated), real].into_iter().flatten() {
        let mut found = [[bytemuck::cast([7_u32; 256]); 2]; 2];
        let tiles = unit.halves();
        tiles.multiply(
            weights.each_ref().map(|all| &all[..]),
            x.each_ref().map(|all| &all[..]),
            &mut found,
        );
        assert_eq!(found, [expected; 2], "{unit:?}");
        let mut found = [[Square::ZERO]];
        tiles.multiply([&weights[1][..]], [&x[1][..]], &mut found);
        assert_eq!(found, [[expected[1]]], "{unit:?}");
    }
}
