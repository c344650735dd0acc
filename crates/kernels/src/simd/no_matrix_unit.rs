//! Where no unit multiplies matrices.

use super::{Halves, Line};

/// There is none.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MatrixUnit {}

pub(crate) type Tiles = MatrixUnit;

pub(crate) type Sums = [[Line; 16]; 2];

impl MatrixUnit {
    pub(crate) fn configure(self) -> Self {
        self
    }

    pub(crate) fn dot(&self, _weights: &[Line; 8], _x: &[Halves; 16], _sums: &mut Sums) {}
}
