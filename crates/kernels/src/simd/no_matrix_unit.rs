//! Where no unit multiplies matrices.

use std::convert::Infallible;
use std::marker::PhantomData;

use super::{Bytes, Line};

/// There is none.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MatrixUnit {}

pub(crate) struct Tiles<const ROWS: usize>(Infallible, PhantomData<[(); ROWS]>);

pub(crate) type Sums<const ROWS: usize> = [Line; ROWS];

impl MatrixUnit {
    pub(crate) fn configure<const ROWS: usize>(self) -> Tiles<ROWS> {
        match self {}
    }
}

impl<const ROWS: usize> Tiles<ROWS> {
    pub(crate) fn dot(&self, _weights: &[Line; 8], _x: &[Bytes; ROWS], _sums: &mut Sums<ROWS>) {
        match self.0 {}
    }
}
