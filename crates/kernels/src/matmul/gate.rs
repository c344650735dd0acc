//! The functions between the two halves of a gated MLP.

use super::{padded, put};
use crate::KernelError;
use crate::error::check_len;
use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch, exp};

/// The function between the two halves of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x * sigmoid(x)`, of SwiGLU.
    Silu,
    /// The Gaussian error linear unit in its approximation by `tanh`, of GeGLU.
    GeluTanh,
}

/// The function of a gate, of every element.
///
/// # Errors
///
/// Where the lengths differ.
pub fn apply_gate(isa: Isa, gate: Gate, x: &[f32], up: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    check_len("the second half", up.len(), x.len())?;
    check_len("the output", out.len(), x.len())?;
    dispatch(isa, ApplyGate { gate, x, up, out });
    Ok(())
}

struct ApplyGate<'a> {
    gate: Gate,
    x: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for ApplyGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let parts = self.x.chunks(LANES).zip(self.up.chunks(LANES));
        for (out, (x, up)) in self.out.chunks_mut(LANES).zip(parts) {
            let (x, up) = (s.load(&padded(x)), s.load(&padded(up)));
            put(s, s.mul(gate_function(s, self.gate, x), up), out);
        }
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.mul(x, s.splat(-1.0)))))
}

#[inline(always)]
pub(crate) fn gate_function<S: Simd>(s: S, gate: Gate, x: S::F) -> S::F {
    match gate {
        Gate::Silu => s.mul(x, sigmoid(s, x)),
        // tanh(y) is 2 sigmoid(2 y) - 1, so that x (1 + tanh y) / 2 is x sigmoid(2 y).
        Gate::GeluTanh => {
            let cube = s.mul(s.mul(x, x), x);
            let inner = s.fma(cube, s.splat(0.044_715), x);
            s.mul(x, sigmoid(s, s.mul(inner, s.splat(1.595_769_2))))
        }
    }
}
