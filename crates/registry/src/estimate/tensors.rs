//! Adding up the tensors of a checkpoint.

use super::fields::Count;
use super::packing::{Packing, Role};

/// The sums over the tensors so far.
#[derive(Debug)]
pub(super) struct Tensors {
    packing: Packing,
    pub(super) parameters: Count,
    pub(super) active: Count,
    bits: Count,
    /// Bits that a decoding step reads: the experts that take part, and no table that is only looked up in.
    step_bits: Count,
}

/// How many of the copies of a matrix there are, and how many take part in a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub(super) all: Count,
    pub(super) active: Count,
}

impl Tensors {
    pub(super) fn new(packing: Packing) -> Self {
        Self {
            packing,
            parameters: 0,
            active: 0,
            bits: 0,
            step_bits: 0,
        }
    }

    fn add(&mut self, weights: Count, active: Count, bits: Count, step_bits: Count) {
        self.parameters += weights;
        self.active += active;
        self.bits += bits;
        self.step_bits += step_bits;
    }

    /// A matrix that each token is multiplied with.
    pub(super) fn matrix(&mut self, path: &str, rows: Count, columns: Count) {
        let bits = self.packing.bits_of(Role::Common, path, rows, columns);
        self.add(rows * columns, rows * columns, bits, bits);
    }

    /// A matrix and its bias.
    pub(super) fn linear(&mut self, path: &str, rows: Count, columns: Count, bias: bool) {
        self.matrix(path, rows, columns);
        if bias {
            self.plain(rows);
        }
    }

    /// A table that a token reads one row of.
    pub(super) fn table(&mut self, path: &str, rows: Count, columns: Count) {
        let bits = self.packing.bits_of(Role::Common, path, rows, columns);
        self.add(rows * columns, rows * columns, bits, 0);
    }

    /// The same matrix for each expert.
    pub(super) fn experts(&mut self, path: &str, experts: Experts, rows: Count, columns: Count, bias: bool) {
        let bits = self.packing.bits_of(Role::Expert, path, rows, columns)
            + if bias { rows * self.packing.plain_bits() } else { 0 };
        let weights = rows * columns + if bias { rows } else { 0 };
        self.add(
            experts.all * weights,
            experts.active * weights,
            experts.all * bits,
            experts.active * bits,
        );
    }

    /// What is never quantized: norms, biases, convolutions.
    pub(super) fn plain(&mut self, weights: Count) {
        let bits = weights * self.packing.plain_bits();
        self.add(weights, weights, bits, bits);
    }

    /// What is never quantized and takes no part in decoding: a vision tower.
    pub(super) fn plain_aside(&mut self, weights: Count) {
        self.add(weights, weights, weights * self.packing.plain_bits(), 0);
    }

    pub(super) fn bytes(&self) -> Count {
        self.bits / 8
    }

    pub(super) fn step_bytes(&self) -> Count {
        self.step_bits / 8
    }

    /// Bytes of an element of the KV cache, which has the type of what is not quantized.
    pub(super) fn element_bytes(&self) -> Count {
        self.packing.plain_bits() / 8
    }

    pub(super) fn default_bits(&self) -> Option<u32> {
        self.packing.default_bits()
    }
}
