//! Rows of activations, as float32 and, for products with quantized weights, as integers or as bfloat16.

mod halves;
mod integers;

use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::BLOCK;
use crate::simd::{Kernel, Simd, dispatch};
use crate::{KernelError, Pool};

pub(crate) use halves::Halves;
pub(crate) use integers::{FEW, Factors, Integers, Rest, Strip};

/// How products with quantized weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights become float32 and everything is summed in float32.
    Exact,
    /// Activations become integers of 8 bits with a scale for each 32 of a row, and integers are summed within these.
    /// The error of an activation is at most 1/254 of the largest of its 32, and where that is large for its row, at most
    /// 1/64,000 of it: such 32 have 8 bits more.
    ///
    /// A matrix unit multiplies rows that are [given for it](Activations::prepare_with) as bfloat16: activations and weights are
    /// wrong by at most 1/256 of themselves, and are summed in float32.
    Integer,
}

/// Rows of activations `[rows, columns]` that go into projections.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    columns: usize,
    /// For which integers and halves are laid out, where they are those of the floats.
    isa: Option<Isa>,
    pub(crate) floats: Vec<f32>,
    /// The first rows.
    pub(crate) integers: Integers,
    /// The last rows.
    pub(crate) halves: Halves,
}

impl Activations {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes the shape and gives the floats to write; what they hold before is arbitrary. Memory is kept.
    pub fn resize(&mut self, rows: usize, columns: usize) -> &mut [f32] {
        (self.rows, self.columns) = (rows, columns);
        self.isa = None;
        self.floats.resize(rows * columns, 0.0);
        &mut self.floats
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The floats, row-major.
    pub fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// The floats to write. An earlier [`prepare`](Self::prepare) does not hold for what is written.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        self.isa = None;
        &mut self.floats
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.floats.capacity() * size_of::<f32>() + self.integers.bytes() + self.halves.bytes()
    }

    /// Makes the rows ready for products of this precision. Columns that are not whole blocks of 32 are left to the
    /// exact products: no quantized matrix has such columns.
    pub fn prepare(&mut self, isa: Isa, pool: &Pool, precision: Precision) {
        self.prepare_with(isa, pool, precision, 0);
    }

    /// As [`prepare`](Self::prepare). Where they are not computed exactly, the last `halves` rows are made bfloat16 if the
    /// processor has a unit that multiplies matrices of these: that is several times as fast for many rows, and rounds
    /// otherwise than integers. Which rows are given for it should not depend on how many there are.
    pub fn prepare_with(&mut self, isa: Isa, pool: &Pool, precision: Precision, halves: usize) {
        let (rows, columns) = (self.rows, self.columns);
        self.isa = None;
        if precision == Precision::Exact || !columns.is_multiple_of(BLOCK) || rows * columns == 0 {
            return;
        }
        let halves = if dispatch(isa, HasUnit) {
            halves.min(rows)
        } else {
            0
        };
        let (first, last) = self.floats.split_at((rows - halves) * columns);
        self.integers.quantize(isa, pool, first, columns);
        self.halves.round(isa, pool, last, columns);
        self.isa = Some(isa);
    }

    /// How many of the last rows were made bfloat16.
    pub fn halves(&self) -> usize {
        self.isa.map_or(0, |_| self.halves.rows)
    }

    /// Whether rows were made ready for products with quantized weights, as integers or as bfloat16.
    pub(crate) fn is_rounded(&self) -> bool {
        self.isa.is_some()
    }

    pub(crate) fn check(&self, isa: Isa, columns: usize) -> Result<(), KernelError> {
        if self.isa.is_some_and(|own| own != isa) {
            return Err(KernelError::OtherIsa);
        }
        check_len("the activations", self.columns, columns)
    }
}

/// Whether there is a unit that multiplies matrices.
struct HasUnit;

impl Kernel for HasUnit {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        s.matrix_unit().is_some()
    }
}
