//! In tests: the matrix unit of this machine, or code for any processor that gives what a unit gives, so that what is built
//! around a unit runs everywhere.

use std::cell::Cell;

use super::{Bytes, LANES, Line, Sums, unit};

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
