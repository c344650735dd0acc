//! The gate of an MLP.

use std::cell::RefCell;
use std::fmt;

use mlx_engine_core::Device;
use mlx_rs::error::Exception;
use mlx_rs::transforms::compile::compile;
use mlx_rs::{Array, ops};

use crate::ModelError;
use crate::spec::Activation;

type Function = dyn for<'a> FnMut((&'a Array, &'a Array)) -> Result<Array, Exception>;

/// `activation(gate) * up`.
///
/// On a GPU the function is compiled into one kernel. It is compiled once for the decoder: mlx-rs' own `nn::silu` traces
/// and forgets it at each call, which costs more than the step's kernels. On a CPU, MLX would call the system's
/// compiler, so that there it is three operations.
pub(crate) struct Gate(RefCell<Box<Function>>);

impl Gate {
    pub(crate) fn new(activation: Activation, device: Device) -> Self {
        let silu = |gate: &Array| ops::multiply(gate, ops::sigmoid(gate)?);
        let gated = move |(gate, up): (&Array, &Array)| -> Result<Array, Exception> {
            let active = match activation {
                Activation::Silu => silu(gate)?,
                Activation::GeluTanh => gelu_tanh(gate)?,
            };
            ops::multiply(active, up)
        };
        Self(RefCell::new(if device == Device::Cpu {
            Box::new(gated)
        } else {
            Box::new(compile(gated, true))
        }))
    }

    /// Both arrays have the same shape, and so has the result.
    pub(crate) fn forward(&self, gate: &Array, up: &Array) -> Result<Array, ModelError> {
        // The function calls nothing of ours, so that the cell is never borrowed twice.
        let mut function = self
            .0
            .try_borrow_mut()
            .map_err(|error| ModelError::Mlx(error.to_string()))?;
        Ok((*function)((gate, up))?)
    }
}

/// The approximation of GELU by a hyperbolic tangent (Hendrycks and Gimpel, 2016), in the type of `x`: mlx-rs' own one
/// gives float32.
fn gelu_tanh(x: &Array) -> Result<Array, Exception> {
    let number = |value: f32| Array::from_f32(value).as_dtype(x.dtype());
    let cube = ops::multiply(ops::square(x)?, x)?;
    let inner = ops::add(x, ops::multiply(cube, number(0.044_715)?)?)?;
    let scale = number((2.0 / std::f32::consts::PI).sqrt())?;
    let tanh = ops::tanh(ops::multiply(inner, scale)?)?;
    ops::multiply(ops::multiply(x, number(0.5)?)?, ops::add(tanh, number(1.0)?)?)
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}
