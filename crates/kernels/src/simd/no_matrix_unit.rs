//! Where no unit multiplies matrices.

use std::convert::Infallible;
use std::marker::PhantomData;

use super::{Bytes, Line, Square};

/// There is none.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MatrixUnit {}

pub(crate) struct Tiles<const ROWS: usize>(Infallible, PhantomData<[(); ROWS]>);

pub(crate) type Sums<const ROWS: usize> = [Line; ROWS];

pub(crate) struct HalfTiles(Infallible);

impl MatrixUnit {
    pub(crate) fn halves(self) -> HalfTiles {
        match self {}
    }

    pub(crate) fn configure<const ROWS: usize>(self) -> Tiles<ROWS> {
        match self {}
    }
}

impl<const ROWS: usize> Tiles<ROWS> {
    pub(crate) fn dot(&self, _weights: &[Line; 8], _x: &[Bytes; ROWS], _sums: &mut Sums<ROWS>) {
        match self.0 {}
    }
}

impl HalfTiles {
    pub(crate) fn multiply<const W: usize, const X: usize>(
        &self,
        _weights: [&[Square]; W],
        _x: [&[Square]; X],
        _sums: &mut [[Square; X]; W],
    ) {
        match self.0 {}
    }
}
